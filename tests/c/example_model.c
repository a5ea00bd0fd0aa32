/* A model of two layers from arrays in memory, and the likeliest next token, six times: docs/c-api.md. */
#include <kimi_linear.h>

#include <stdio.h>

enum { VOCAB = 16, D = 8, H = 2, K = 4, R = 8, F = 12, E = 4, LARGEST = VOCAB * D };

static const struct {
    const char *name;
    int64_t rows, cols; /* cols 0: a vector */
    int count;          /* so many of them, for %d; 0: one */
} shapes[] = { { "model.embed_tokens.weight", VOCAB, D, 0 },
               { "model.norm.weight", D, 0, 0 },
               /* layer 0: KDA, a dense feed-forward */
               { "model.layers.0.input_layernorm.weight", D, 0, 0 },
               { "model.layers.0.self_attn.q_proj.weight", H * K, D, 0 },
               { "model.layers.0.self_attn.k_proj.weight", H * K, D, 0 },
               { "model.layers.0.self_attn.v_proj.weight", H * K, D, 0 },
               { "model.layers.0.self_attn.q_conv1d.weight", H * K, 4, 0 },
               { "model.layers.0.self_attn.k_conv1d.weight", H * K, 4, 0 },
               { "model.layers.0.self_attn.v_conv1d.weight", H * K, 4, 0 },
               { "model.layers.0.self_attn.f_a_proj.weight", K, D, 0 },
               { "model.layers.0.self_attn.f_b_proj.weight", H * K, K, 0 },
               { "model.layers.0.self_attn.A_log", H, 0, 0 },
               { "model.layers.0.self_attn.dt_bias", H * K, 0, 0 },
               { "model.layers.0.self_attn.b_proj.weight", H, D, 0 },
               { "model.layers.0.self_attn.g_a_proj.weight", K, D, 0 },
               { "model.layers.0.self_attn.g_b_proj.weight", H * K, K, 0 },
               { "model.layers.0.self_attn.o_norm.weight", K, 0, 0 },
               { "model.layers.0.self_attn.o_proj.weight", D, H * K, 0 },
               { "model.layers.0.post_attention_layernorm.weight", D, 0, 0 },
               { "model.layers.0.mlp.gate_proj.weight", F, D, 0 },
               { "model.layers.0.mlp.up_proj.weight", F, D, 0 },
               { "model.layers.0.mlp.down_proj.weight", D, F, 0 },
               /* layer 1: MLA, a mixture of experts */
               { "model.layers.1.input_layernorm.weight", D, 0, 0 },
               { "model.layers.1.self_attn.q_proj.weight", H * K, D, 0 },
               { "model.layers.1.self_attn.kv_a_proj_with_mqa.weight", R, D, 0 },
               { "model.layers.1.self_attn.kv_a_layernorm.weight", R, 0, 0 },
               { "model.layers.1.self_attn.kv_b_proj.weight", H * (K + K), R, 0 },
               { "model.layers.1.self_attn.o_proj.weight", D, H * K, 0 },
               { "model.layers.1.post_attention_layernorm.weight", D, 0, 0 },
               { "model.layers.1.block_sparse_moe.gate.weight", E, D, 0 },
               { "model.layers.1.block_sparse_moe.gate.e_score_correction_bias", E, 0, 0 },
               { "model.layers.1.block_sparse_moe.experts.%d.w1.weight", F, D, E },
               { "model.layers.1.block_sparse_moe.experts.%d.w3.weight", F, D, E },
               { "model.layers.1.block_sparse_moe.experts.%d.w2.weight", D, F, E } };
enum { SHAPES = sizeof shapes / sizeof shapes[0], TENSORS = SHAPES + 3 * (E - 1) };

/* One token in, the likeliest one out. */
static kl_status step(kl_ctx *ctx, const kl_model *model, kl_state *state, int32_t *id)
{
    const int64_t offsets[] = { 0, 1 }, rows[] = { 0 };
    float logits[VOCAB];
    const kl_forward_args call = { .ids = id,
                                   .offsets = offsets,
                                   .N = 1,
                                   .states = &state,
                                   .logits = logits,
                                   .logit_rows = rows,
                                   .n_logits = 1 };
    const kl_sample_args greedy = { .top_p = 1 };
    const kl_status status = kl_forward(ctx, model, &call);
    return status == KL_OK ? kl_sample(ctx, id, logits, &greedy, 1, VOCAB) : status;
}

int main(void)
{
    static float values[TENSORS][LARGEST]; /* the model reads them where they are */
    static char names[TENSORS][80];
    kl_tensor tensors[TENSORS];
    int n = 0;
    for (int i = 0; i < SHAPES; i++)
        for (int e = 0; e < (shapes[i].count ? shapes[i].count : 1); e++, n++) {
            for (int j = 0; j < LARGEST; j++)
                values[n][j] =
                    shapes[i].cols == 0 ? 1.0f : (float)((j * j + 7 * j + 5 * n) % 19 - 9) / 12;
            snprintf(names[n], sizeof names[n], shapes[i].name, e);
            tensors[n] = (kl_tensor){ .name = names[n],
                                      .data = values[n],
                                      .type = KL_F32,
                                      .n_dims = shapes[i].cols == 0 ? 1 : 2,
                                      .shape = { shapes[i].rows, shapes[i].cols } };
        }
    const kl_layer layers[] = { { KL_MIXER_KDA, KL_FFN_DENSE }, { KL_MIXER_MLA, KL_FFN_MOE } };
    const kl_config config = {
        .vocab = VOCAB,
        .D = D,
        .n_layers = 2,
        .layers = layers,
        .rms_eps = 1e-5f,
        .latent_eps = 1e-6f,
        .l2_eps = 1e-6f,
        .tied = 1,
        .delta = { .Hk = H, .Hv = H, .K = K, .V = K, .taps = 4 },
        .mla = { .heads = H, .nope = K, .v = K, .rank = R },
        .ffn = { .dense = F,
                 .experts = E,
                 .k = 2,
                 .width = F,
                 .groups = 1,
                 .top_groups = 1,
                 .router = KL_ROUTER_SIGMOID,
                 .renormalise = 1,
                 .scale = 2.446f },
    };
    kl_ctx *ctx;
    kl_model *model = NULL;
    kl_state *state = NULL;
    int32_t id = 3;
    kl_status status = kl_ctx_create(&ctx, &(kl_ctx_options){ .threads = 2 });
    if (status == KL_OK)
        status = kl_model_create(ctx, &model, &config, tensors, TENSORS, 0);
    if (status == KL_OK)
        status = kl_state_create(ctx, &state, model, KL_F32, 0);
    for (int t = 0; t < 6 && status == KL_OK; t++) {
        status = step(ctx, model, state, &id);
        printf("%d\n", (int)id);
    }
    if (status != KL_OK)
        fprintf(stderr, "%s\n", kl_ctx_error(ctx));
    kl_state_destroy(ctx, state);
    kl_model_destroy(ctx, model);
    kl_ctx_destroy(ctx);
    return status != KL_OK;
}
