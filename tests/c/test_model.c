/* A model made, run, planned and failed from C: two layers of random weights, no file. */
#include "small_model.h"

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
    CHECK(strstr(kl_ctx_error(ctx), "model.embed_tokens.weight") != NULL);
    tensors[0].shape[0]++;
    c.delta.taps = 9;
    CHECK(kl_model_create(ctx, &model, &c, tensors, n_tensors, 0) == KL_ERR_ARG);
    CHECK(strstr(kl_ctx_error(ctx), "conv_width is 9") != NULL);
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

int main(void)
{
    float logits[VOCAB];
    kl_ctx *ctx;
    make_checkpoint();
    CHECK(kl_ctx_create(&ctx, NULL) == KL_OK);
    CHECK(whole(ctx, logits) == KL_OK);
    for (int i = 0; i < VOCAB; i++)
        CHECK(isfinite(logits[i]));
    test_out_of_memory(logits);
    test_plan(ctx);
    test_wrong_checkpoints(ctx);
    test_layers_that_are_none(ctx);
    kl_ctx_destroy(ctx);
    free_checkpoint();
    printf("%s: %s\n", __FILE__, failures == 0 ? "ok" : "failed");
    return failures != 0;
}
