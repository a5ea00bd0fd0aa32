/* A model made, run, planned and failed from C: two layers of random weights, no file. */
#include "small_model.h"

#include <fenv.h>

/* Makes the model and a state, reads T tokens; the last logits go to out. */
static kl_status whole(kl_ctx *ctx, float *out)
{
    const kl_config c = config();
    const int64_t offsets[] = { 0, T }, rows[] = { T - 1 };
    int32_t ids[T];
    kl_model *model = NULL;
    kl_state *state = NULL;
    for (int t = 0; t < T; t++)
        ids[t] = (t * 7) % VOCAB;
    kl_status status = kl_model_create(ctx, &model, &c, tensors, n_tensors, 0);
    if (status == KL_OK)
        status = kl_state_create(ctx, &state, model, KL_F32, 0);
    if (status == KL_OK) {
        const kl_forward_args args = { .ids = ids,
                                       .offsets = offsets,
                                       .N = 1,
                                       .states = &state,
                                       .logits = out,
                                       .logit_rows = rows,
                                       .n_logits = 1 };
        status = kl_forward(ctx, model, &args);
        CHECK(kl_state_position(state) == (status == KL_OK ? T : 0));
    }
    if (state != NULL)
        kl_state_destroy(ctx, state);
    kl_model_destroy(ctx, model);
    return status;
}

/* Memory that runs out at each allocation in turn: an error, nothing kept, and the next run is whole. */
static void test_out_of_memory(const float *want)
{
    const kl_ctx_options options = { .threads = 2 };
    long sites = 0;
    for (long fail_at = 1; fail_at < 1000; fail_at++) {
        float logits[VOCAB];
        counter c = { .fail_at = fail_at };
        const kl_allocator allocator = { counted, given_back, &c };
        kl_ctx *ctx;
        CHECK(kl_ctx_create(&ctx, &options) == KL_OK);
        CHECK(kl_ctx_set_allocator(ctx, &allocator) == KL_OK);
        const kl_status status = whole(ctx, logits);
        if (status == KL_OK) {
            CHECK(memcmp(logits, want, sizeof logits) == 0);
        } else {
            CHECK(status == KL_ERR_MEMORY && strstr(kl_ctx_error(ctx), "out of memory") != NULL);
            CHECK(whole(ctx, logits) == KL_OK && memcmp(logits, want, sizeof logits) == 0);
            sites++;
        }
        kl_ctx_destroy(ctx);
        CHECK(c.live == 0);
        if (status == KL_OK)
            break;
    }
    CHECK(sites >= 4); /* vectors, fixed state, a cache page, scratch */
}

static void test_plan(kl_ctx *ctx)
{
    const kl_config c = config();
    kl_plan plan, same;
    kl_model *model, *planned;
    CHECK(kl_model_create(ctx, &model, &c, tensors, n_tensors, 0) == KL_OK);
    CHECK(kl_plan_make(ctx, &plan, model, KL_F32, 1000, 2, 0) == KL_OK);
    CHECK(plan.state == 2 * (plan.state_fixed + 2 * plan.state_page));
    CHECK(plan.scratch > 0 && plan.weights > plan.vectors);
    kl_tensor without_data[64];
    memcpy(without_data, tensors, sizeof tensors);
    for (int i = 0; i < n_tensors; i++)
        without_data[i].data = NULL;
    CHECK(kl_model_create(ctx, &planned, &c, without_data, n_tensors, 0) == KL_ERR_ARG);
    CHECK(kl_model_create(ctx, &planned, &c, without_data, n_tensors, 1) == KL_OK);
    CHECK(kl_plan_make(ctx, &same, planned, KL_F32, 1000, 2, 0) == KL_OK);
    CHECK(memcmp(&plan, &same, sizeof plan) == 0);
    CHECK(kl_plan_make(ctx, &plan, model, KL_BF16, 1000, 2, 0) == KL_ERR_DTYPE);
    CHECK(kl_plan_make(ctx, &plan, model, KL_F32, 0, 2, 0) == KL_ERR_ARG);
    kl_model_destroy(ctx, model);
    kl_model_destroy(ctx, planned);
}

static void test_wrong_checkpoints(kl_ctx *ctx)
{
    kl_config c = config();
    kl_model *model;
    CHECK(kl_model_create(ctx, &model, &c, tensors, n_tensors - 1, 0) == KL_ERR_FORMAT);
    CHECK(strstr(kl_ctx_error(ctx), "shared_experts.down_proj.weight is missing") != NULL
          && model == NULL);
    tensors[0].shape[0]--;
    CHECK(kl_model_create(ctx, &model, &c, tensors, n_tensors, 0) == KL_ERR_FORMAT);
    CHECK(strstr(kl_ctx_error(ctx), "model.embed_tokens.weight is [") != NULL);
    tensors[0].shape[0]++;
    c.delta.taps = 9;
    CHECK(kl_model_create(ctx, &model, &c, tensors, n_tensors, 0) == KL_ERR_ARG);
    CHECK(strstr(kl_ctx_error(ctx), "conv_width is 9") != NULL);
}

/* A caller that rounds upwards gets the same bytes, of threads that it has made, too, and goes on rounding so. */
static void test_rounding_of_the_caller(kl_ctx *ctx, const float *want)
{
    enum { MANY = 1 << 20 };
    static float x[MANY], y[MANY], z[MANY];
    const kl_ctx_options options = { .threads = 3 };
    float logits[VOCAB];
    volatile float one = 1.0f, little = 0x1p-30f;
    kl_ctx *threads;
    for (int i = 0; i < MANY; i++)
        x[i] = (float)i / 1000.0f;
    CHECK(kl_sigmoid(ctx, y, x, MANY) == KL_OK);
    CHECK(fesetround(FE_UPWARD) == 0);
    CHECK(whole(ctx, logits) == KL_OK);
    CHECK(one + little > 1.0f);
    CHECK(kl_ctx_create(&threads, &options) == KL_OK);
    for (int i = 0; i < 4; i++) {
        CHECK(kl_sigmoid(threads, z, x, MANY) == KL_OK);
        CHECK(one + little > 1.0f);
        CHECK(memcmp(y, z, sizeof y) == 0);
    }
    CHECK(fesetround(FE_TONEAREST) == 0);
    CHECK(memcmp(logits, want, sizeof logits) == 0);
    kl_ctx_destroy(threads);
}

static void test_layers_that_are_none(kl_ctx *ctx)
{
    const struct {
        kl_layer layer;
        const char *sentence;
    } wrong[] = {
        { { (kl_mixer)4, KL_FFN_DENSE }, "layer 0 has mixer 4; it must be 0 to 3" },
        { { (kl_mixer)-1, KL_FFN_DENSE }, "layer 0 has mixer -1" },
        { { KL_MIXER_KDA, (kl_ffn)2 }, "layer 0 has ffn 2; it must be 0 to 1" },
    };
    kl_model *model;
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        kl_config c = config();
        kl_layer mine[8];
        CHECK(c.n_layers <= 8);
        memcpy(mine, c.layers, (size_t)c.n_layers * sizeof mine[0]);
        mine[0] = wrong[i].layer;
        c.layers = mine;
        CHECK(kl_model_create(ctx, &model, &c, tensors, n_tensors, 0) == KL_ERR_ARG);
        CHECK(strstr(kl_ctx_error(ctx), wrong[i].sentence) != NULL && model == NULL);
        c.layers = NULL;
        CHECK(kl_model_create(ctx, &model, &c, tensors, n_tensors, 0) == KL_ERR_ARG);
        CHECK(strstr(kl_ctx_error(ctx), "layers is NULL") != NULL);
    }
}

/* Numbers that an op would refuse in the first pass, where a layer has a use for them. */
static void test_reals_that_no_op_takes(kl_ctx *ctx)
{
    kl_config c;
    const struct {
        float *at;
        float value;
        const char *sentence;
    } wrong[] = {
        { &c.rms_eps, NAN, "config: rms_norm_eps is nan; it must be finite and >= 0" },
        { &c.rms_eps, -1e-6f, "rms_norm_eps is -1e-06; it must be" },
        { &c.latent_eps, INFINITY, "latent_eps is inf; it must be finite and >= 0" },
        { &c.l2_eps, -INFINITY, "l2_eps is -inf; it must be finite and >= 0" },
        { &c.delta.lower_bound, 5,
          "gate_lower_bound is 5; it must be finite and < 0, or 0 for none" },
        { &c.delta.lower_bound, -INFINITY, "gate_lower_bound is -inf; it must be" },
        { &c.ffn.scale, NAN, "routed_scale is nan; it must be finite" },
        { &c.ffn.situ.beta, -4, "situ_beta is -4; it must be finite and > 0, or 0 for swiglu" },
        { &c.ffn.situ.linear_beta, NAN, "situ_linear_beta is nan; it must be" },
    };
    kl_model *model;
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        c = config();
        *wrong[i].at = wrong[i].value;
        CHECK(kl_model_create(ctx, &model, &c, tensors, n_tensors, 0) == KL_ERR_ARG);
        CHECK(strstr(kl_ctx_error(ctx), wrong[i].sentence) != NULL && model == NULL);
    }
    c = config(); /* no layer rotates: its base is not looked at */
    c.attn.rope_base = NAN;
    CHECK(kl_model_create(ctx, &model, &c, tensors, n_tensors, 0) == KL_OK);
    kl_model_destroy(ctx, model);
}

/* What a caller gets wrong in numbers: said when the model, the state or the plan is made, not later. */
static void test_numbers_out_of_range(kl_ctx *ctx)
{
    const int64_t most = INT64_C(1) << 40, offsets[] = { 0, 1 }, rows[] = { 0 };
    const int32_t id = 0;
    kl_config c = config();
    kl_model *model;
    kl_state *state = NULL;
    kl_plan plan;
    c.delta.head_map = (kl_head_map)2;
    CHECK(kl_model_create(ctx, &model, &c, tensors, n_tensors, 0) == KL_ERR_ARG);
    CHECK(strstr(kl_ctx_error(ctx), "head_map is 2") != NULL);
    c = config();
    c.ffn.router = (kl_router)7;
    CHECK(kl_model_create(ctx, &model, &c, tensors, n_tensors, 0) == KL_ERR_ARG);
    CHECK(strstr(kl_ctx_error(ctx), "router is 7") != NULL);
    c = config();
    c.attn_res_block = -1;
    CHECK(kl_model_create(ctx, &model, &c, tensors, n_tensors, 0) == KL_ERR_ARG);
    CHECK(strstr(kl_ctx_error(ctx), "attn_res_block is -1; it must be 0 to") != NULL);
    c.attn_res_block = 1; /* whose scores the tensors lack */
    CHECK(kl_model_create(ctx, &model, &c, tensors, n_tensors, 0) == KL_ERR_FORMAT);
    CHECK(strstr(kl_ctx_error(ctx), "output_attn_res_norm.weight is missing") != NULL);
    c = config();
    c.ffn.latent = -1;
    CHECK(kl_model_create(ctx, &model, &c, tensors, n_tensors, 0) == KL_ERR_ARG);
    CHECK(strstr(kl_ctx_error(ctx), "expert_latent is -1; it must be 0 to") != NULL);
    c = config();
    c.delta.Hk = c.delta.Hv = c.delta.K = c.delta.V = 1 << 20;
    CHECK(kl_model_create(ctx, &model, &c, tensors, n_tensors, 1) == KL_ERR_ARG);
    CHECK(strstr(kl_ctx_error(ctx), "more than 2^56") != NULL);
    c = config();
    CHECK(kl_model_create(ctx, &model, &c, tensors, -1, 0) == KL_ERR_ARG);
    CHECK(strstr(kl_ctx_error(ctx), "n_tensors is -1") != NULL && model == NULL);

    CHECK(kl_model_create(ctx, &model, &c, tensors, n_tensors, 0) == KL_OK);
    CHECK(kl_plan_make(ctx, &plan, model, KL_F32, most, 1, 0) == KL_OK);
    CHECK(kl_plan_make(ctx, &plan, model, KL_F32, most + 1, 1, 0) == KL_ERR_ARG);
    CHECK(kl_plan_make(ctx, &plan, model, KL_F32, most, most, 0) == KL_ERR_ARG);
    CHECK(strstr(kl_ctx_error(ctx), "do not fit 2^62 bytes") != NULL);
    CHECK(kl_state_create(ctx, &state, model, KL_F32, INT64_MAX) == KL_ERR_ARG && state == NULL);
    CHECK(kl_state_create(ctx, &state, model, KL_F32, 0) == KL_OK);
    CHECK(kl_state_fill(ctx, state, INT64_MAX) == KL_ERR_ARG && kl_state_position(state) == 0);
    CHECK(kl_state_keep(ctx, state, INT64_MAX - 1, 1) == KL_ERR_ARG);
    CHECK(kl_state_keep(ctx, state, most, 1) == KL_OK);
    kl_forward_args args = {
        .ids = &id, .offsets = offsets, .N = 1, .states = &state, .logit_rows = rows, .n_logits = 1
    };
    CHECK(kl_forward(ctx, model, &args) == KL_ERR_ARG);
    CHECK(strstr(kl_ctx_error(ctx), "logits and logit_rows must be given") != NULL);
    for (int64_t n = -1; n <= 2; n += 3) {
        args.n_logits = n;
        CHECK(kl_forward(ctx, model, &args) == KL_ERR_ARG);
        CHECK(strstr(kl_ctx_error(ctx), "it must be 0 to 1, the tokens") != NULL);
    }
    args.n_logits = 0;
    const int64_t endless[] = { 0, INT64_C(1) << 61 };
    args.offsets = endless;
    CHECK(kl_forward(ctx, model, &args) == KL_ERR_SHAPE);
    CHECK(strstr(kl_ctx_error(ctx), "there may be 2^40 tokens") != NULL);
    args.offsets = offsets;
    CHECK(kl_state_position(state) == 0);
    CHECK(kl_forward(ctx, model, &args) == KL_OK && kl_state_position(state) == 1);
    CHECK(kl_type_bytes(KL_F32, INT64_C(1) << 60) == 0 && kl_type_bytes(KL_Q4_K, -256) == 0);
    CHECK(kl_type_bytes(KL_F32, (INT64_C(1) << 60) - 1) == ((size_t)1 << 62) - 4);
    kl_state_destroy(ctx, state);
    kl_model_destroy(ctx, model);
}

int main(void)
{
    float logits[VOCAB];
    kl_ctx *ctx;
    make_checkpoint();
    CHECK(kl_ctx_create(&ctx, NULL) == KL_OK);
    CHECK(whole(ctx, logits) == KL_OK);
    for (int i = 0; i < VOCAB; i++)
        CHECK(isfinite(logits[i]));
    test_rounding_of_the_caller(ctx, logits);
    test_out_of_memory(logits);
    test_plan(ctx);
    test_wrong_checkpoints(ctx);
    test_layers_that_are_none(ctx);
    test_reals_that_no_op_takes(ctx);
    test_numbers_out_of_range(ctx);
    kl_ctx_destroy(ctx);
    free_checkpoint();
    printf("%s: %s\n", __FILE__, failures == 0 ? "ok" : "failed");
    return failures != 0;
}
