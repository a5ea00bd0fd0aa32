/* A model of one layer from arrays in memory, and the likeliest next token, four times: docs/c-api.md. */
#include <kimi_linear.h>

#include <stdio.h>

enum { VOCAB = 16, D = 8, H = 2, K = 4, R = 8, F = 12, LARGEST = VOCAB * D };

static const struct {
    const char *name;
    int64_t rows, cols; /* cols 0: a vector */
} shapes[] = { { "model.embed_tokens.weight", VOCAB, D },
               { "model.norm.weight", D, 0 },
               { "model.layers.0.input_layernorm.weight", D, 0 },
               { "model.layers.0.self_attn.q_proj.weight", H * K, D },
               { "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", R, D },
               { "model.layers.0.self_attn.kv_a_layernorm.weight", R, 0 },
               { "model.layers.0.self_attn.kv_b_proj.weight", H * (K + K), R },
               { "model.layers.0.self_attn.o_proj.weight", D, H * K },
               { "model.layers.0.post_attention_layernorm.weight", D, 0 },
               { "model.layers.0.mlp.gate_proj.weight", F, D },
               { "model.layers.0.mlp.up_proj.weight", F, D },
               { "model.layers.0.mlp.down_proj.weight", D, F } };
enum { TENSORS = sizeof shapes / sizeof shapes[0] };

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
    kl_tensor tensors[TENSORS];
    for (int i = 0; i < TENSORS; i++) {
        for (int j = 0; j < LARGEST; j++)
            values[i][j] = shapes[i].cols == 0 ? 1.0f : (float)((j * 7 + i) % 11 - 5) / 8;
        tensors[i] = (kl_tensor){ .name = shapes[i].name,
                                  .data = values[i],
                                  .type = KL_F32,
                                  .n_dims = shapes[i].cols == 0 ? 1 : 2,
                                  .shape = { shapes[i].rows, shapes[i].cols } };
    }
    const kl_layer layers[] = { { KL_MIXER_MLA, KL_FFN_DENSE } };
    const kl_config config = { .vocab = VOCAB,
                               .D = D,
                               .n_layers = 1,
                               .layers = layers,
                               .rms_eps = 1e-5f,
                               .latent_eps = 1e-6f,
                               .tied = 1,
                               .mla = { .heads = H, .nope = K, .v = K, .rank = R },
                               .ffn = { .dense = F } };
    kl_ctx *ctx;
    kl_model *model = NULL;
    kl_state *state = NULL;
    int32_t id = 3;
    kl_status status = kl_ctx_create(&ctx, &(kl_ctx_options){ .threads = 2 });
    if (status == KL_OK)
        status = kl_model_create(ctx, &model, &config, tensors, TENSORS, 0);
    if (status == KL_OK)
        status = kl_state_create(ctx, &state, model, KL_F32, 0);
    for (int t = 0; t < 4 && status == KL_OK; t++) {
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
