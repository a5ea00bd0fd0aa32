/* What the two forms of latent_attention share. */
#ifndef KL_LATENT_ATTENTION_H
#define KL_LATENT_ATTENTION_H

#include "cache_rows.h"
#include "pieces.h"
#include "room.h"

typedef struct kl_mla {
    kl_ctx *ctx;
    float *o;
    const float *q;
    kl_cache latent, k_shared;
    const kl_weight *w_uk, *w_uv;
    const kl_latent_attention_args *args;
} kl_mla;

/* As kl_cache_rows, whole rows. */
static inline kl_rows kl_mla_cache_rows(const kl_mla *a, const kl_cache *cache, int64_t n,
                                        int64_t position, int64_t count, int64_t width,
                                        float *buffer)
{
    return kl_cache_rows(a->ctx->k, cache, n, position, count, 0, width, buffer);
}

/* Floats of buffer that a block of a cache needs, whose positions may be selected ones. */
static inline int64_t kl_mla_buffer(const kl_mla *a, const kl_cache *cache, int64_t width)
{
    return kl_mla_selects(a->args) ? KL_BLOCK * width : kl_cache_buffer(cache, width);
}

/* And of both caches. */
static inline int64_t kl_mla_stored_buffer(const kl_mla *a)
{
    return kl_mla_buffer(a, &a->latent, a->args->R) + kl_mla_buffer(a, &a->k_shared, a->args->P);
}

/* As kl_mla_cache_rows of both caches, float16 as it lies. */
static inline void kl_mla_stored_rows(const kl_mla *a, int64_t n, int64_t position, int64_t count,
                                      float *buffer, kl_rows latent_and_shared[2])
{
    const kl_latent_attention_args *g = a->args;
    const kl_kernels *k = a->ctx->k;
    latent_and_shared[0] = kl_cache_stored(k, &a->latent, n, position, count, 0, g->R, buffer);
    latent_and_shared[1] = kl_cache_stored(k, &a->k_shared, n, position, count, 0, g->P,
                                           buffer + kl_mla_buffer(a, &a->latent, g->R));
}

/* o of head h of `count` queries from row t on */
static inline void kl_mla_put(const kl_mla *a, kl_running run, int64_t t, int64_t h, int64_t count)
{
    const kl_latent_attention_args *g = a->args;
    for (int64_t i = 0; i < count; i++) {
        float *o = a->o + ((t + i) * g->H + h) * g->V;
        for (int64_t v = 0; v < g->V; v++)
            o[v] = run.acc[i * run.stride + v] / run.l[i];
    }
}

/* Each form: what it needs, taken before either runs. */
typedef struct kl_expanded {
    const kl_mla *a;
    int64_t n_chunks, *chunk_end; /* [N]: chunks of queries of the sequences up to n */
    int64_t longest;              /* queries of the longest chunk */
    kl_rooms rooms;
} kl_expanded;
kl_status kl_expanded_prepare(kl_expanded *e, const kl_mla *a) KL_CHECKED;
kl_status kl_expanded_run(const kl_expanded *e) KL_CHECKED;

/* A task in fixed point (latent_fixed.c): bytes of a room, and head h of queries first .. last - 1 of sequence n. */
size_t kl_expanded_fixed_bytes(const kl_expanded *e);
void kl_expanded_fixed(const kl_expanded *e, kl_room at, int64_t n, int64_t h, int64_t first,
                       int64_t last);

typedef struct kl_absorbed {
    const kl_mla *a;
    int64_t n_tokens, capacity; /* absorbed tokens of the call; of a batch */
    struct kl_absorbed_token {
        int64_t n, t, count;   /* sequence, row of q, positions that it attends to */
        const int32_t *select; /* [count]: these; NULL: the first */
    } *token;                  /* [capacity], n_batch of them at hand */
    int64_t n_batch;
    struct kl_absorbed_unit {
        int64_t token, segment;
    } *unit; /* a wave: n_units of them at hand */
    int64_t n_units, head_group;
    float *query;    /* [H, capacity, R]: W_uk^T q */
    kl_running run;  /* m, l [capacity, H]; acc [H, capacity, R] */
    kl_running part; /* of a wave: m, l [units, H]; acc [units, H, R] */
    kl_rooms rooms;
} kl_absorbed;
kl_status kl_absorbed_prepare(kl_absorbed *e, const kl_mla *a) KL_CHECKED;
kl_status kl_absorbed_run(kl_absorbed *e) KL_CHECKED;

#endif
