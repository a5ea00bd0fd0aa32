/* What the C tests of the model share: two layers of random weights in memory, a config, a counting allocator. */
#ifndef SMALL_MODEL_H
#define SMALL_MODEL_H

#include "kimi_linear_model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    VOCAB = 50,
    D = 24,
    H = 2,
    K = 8,
    W = 4,
    NOPE = 6,
    ROPE = 2,
    V = 8,
    R = 12,
    E = 4,
    F = 10,
    T = 70
};

static int failures;

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);                                 \
            failures++;                                                                            \
        }                                                                                          \
    } while (0)

/* ---- a checkpoint in memory ---- */

static char names[64][96];
static kl_tensor tensors[64];
static int n_tensors;
static uint32_t seed = 1;

static float uniform(void)
{
    seed = seed * 1664525u + 1013904223u;
    return (float)(seed >> 8) / (float)(1 << 24) - 0.5f;
}

static void tensor(int layer, const char *rest, int64_t rows, int64_t cols)
{
    kl_tensor *t = &tensors[n_tensors];
    float *data = malloc((size_t)(rows * cols) * sizeof *data);
    const int is_norm = strstr(rest, "norm") != NULL;
    for (int64_t i = 0; i < rows * cols; i++)
        data[i] = is_norm ? 1.0f + 0.2f * uniform() : 2.0f * uniform() / sqrtf((float)cols);
    if (layer >= 0)
        snprintf(names[n_tensors], sizeof names[0], "model.layers.%d.%s", layer, rest);
    else
        snprintf(names[n_tensors], sizeof names[0], "%s", rest);
    t->name = names[n_tensors++];
    t->data = data;
    t->type = KL_F32;
    t->n_dims = cols == 1 ? 1 : 2;
    t->shape[0] = rows;
    t->shape[1] = cols;
}

static void mlp(int layer, const char *prefix, int64_t width)
{
    const char *parts[] = { "gate_proj", "up_proj", "down_proj" };
    for (int i = 0; i < 3; i++) {
        char rest[64];
        snprintf(rest, sizeof rest, "%s.%s.weight", prefix, parts[i]);
        tensor(layer, rest, i < 2 ? width : D, i < 2 ? D : width);
    }
}

static void make_checkpoint(void)
{
    tensor(-1, "model.embed_tokens.weight", VOCAB, D);
    tensor(-1, "lm_head.weight", VOCAB, D);
    tensor(-1, "model.norm.weight", D, 1);
    for (int layer = 0; layer < 2; layer++) {
        tensor(layer, "input_layernorm.weight", D, 1);
        tensor(layer, "post_attention_layernorm.weight", D, 1);
    }
    const char *qkv = "qkv";
    for (int i = 0; i < 3; i++) {
        char rest[64];
        snprintf(rest, sizeof rest, "self_attn.%c_proj.weight", qkv[i]);
        tensor(0, rest, H * K, D);
        snprintf(rest, sizeof rest, "self_attn.%c_conv1d.weight", qkv[i]);
        tensor(0, rest, H * K, W);
    }
    tensor(0, "self_attn.f_a_proj.weight", K, D);
    tensor(0, "self_attn.f_b_proj.weight", H * K, K);
    tensor(0, "self_attn.g_a_proj.weight", K, D);
    tensor(0, "self_attn.g_b_proj.weight", H * K, K);
    tensor(0, "self_attn.b_proj.weight", H, D);
    tensor(0, "self_attn.A_log", H, 1);
    tensor(0, "self_attn.dt_bias", H * K, 1);
    tensor(0, "self_attn.o_norm.weight", K, 1);
    tensor(0, "self_attn.o_proj.weight", D, H * K);
    mlp(0, "mlp", F);
    tensor(1, "self_attn.q_proj.weight", H * (NOPE + ROPE), D);
    tensor(1, "self_attn.kv_a_proj_with_mqa.weight", R + ROPE, D);
    tensor(1, "self_attn.kv_a_layernorm.weight", R, 1);
    tensor(1, "self_attn.kv_b_proj.weight", H * (NOPE + V), R);
    tensor(1, "self_attn.o_proj.weight", D, H * V);
    tensor(1, "block_sparse_moe.gate.weight", E, D);
    tensor(1, "block_sparse_moe.gate.e_score_correction_bias", E, 1);
    for (int e = 0; e < E; e++)
        for (int w = 1; w <= 3; w++) {
            char rest[64];
            snprintf(rest, sizeof rest, "block_sparse_moe.experts.%d.w%d.weight", e, w);
            tensor(1, rest, w == 2 ? D : F, w == 2 ? F : D);
        }
    mlp(1, "block_sparse_moe.shared_experts", F);
}

static const kl_layer layers[] = { { KL_MIXER_KDA, KL_FFN_DENSE }, { KL_MIXER_MLA, KL_FFN_MOE } };

static kl_config config(void)
{
    kl_config c = { .vocab = VOCAB,
                    .D = D,
                    .n_layers = 2,
                    .layers = layers,
                    .rms_eps = 1e-5f,
                    .latent_eps = 1e-6f,
                    .l2_eps = 1e-6f };
    c.delta.Hk = c.delta.Hv = H;
    c.delta.K = c.delta.V = K;
    c.delta.taps = W;
    c.mla.heads = H;
    c.mla.nope = NOPE;
    c.mla.rope = ROPE;
    c.mla.v = V;
    c.mla.rank = R;
    c.ffn.dense = F;
    c.ffn.experts = E;
    c.ffn.k = 2;
    c.ffn.width = F;
    c.ffn.shared = F;
    c.ffn.groups = c.ffn.top_groups = 1;
    c.ffn.renormalise = 1;
    c.ffn.scale = 2.0f;
    return c;
}

/* ---- an allocator that counts, and fails at a chosen call ---- */

typedef struct counter {
    long calls, fail_at, live;
} counter;

static inline void *counted(void *user, size_t n_bytes)
{
    counter *c = user;
    if (++c->calls == c->fail_at)
        return NULL;
    c->live++;
    return aligned_alloc(64, (n_bytes + 63) / 64 * 64);
}

static inline void given_back(void *user, void *p, size_t n_bytes)
{
    (void)n_bytes;
    ((counter *)user)->live--;
    free(p);
}

static void free_checkpoint(void)
{
    for (int i = 0; i < n_tensors; i++)
        free((void *)(uintptr_t)tensors[i].data);
}

#endif
