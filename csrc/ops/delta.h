/* What delta_rule and its halves share: checks, where a head's tokens lie, the room of a chunk. */
#ifndef KL_DELTA_H
#define KL_DELTA_H

#include "ops.h"
#include "room.h"

/* Sizes and offsets, scale, gate and head map, before anything is written; in delta_rule.c. */
kl_status kl_delta_check(kl_ctx *ctx, const char *op, const kl_delta_rule_args *args);

/* exp(g), scaled q, k: [rows, ld] each, ld = kl_delta_ld(K) */
typedef struct kl_delta_factors {
    float *alpha, *q, *k;
} kl_delta_factors;

/* The rows of one head, from one token on; so many floats lie between two tokens. */
typedef struct kl_delta_rows {
    const float *q, *k, *g; /* g NULL: no gate */
    int64_t key_step, gate_step;
} kl_delta_rows;

static inline int64_t kl_delta_round_up(int64_t n, int64_t to) { return kl_ceil_div(n, to) * to; }
static inline int64_t kl_delta_ld(int64_t K) { return kl_delta_round_up(K, 16); }

/* Of value head h, from token t of the call on. */
static inline kl_delta_rows kl_delta_rows_of(const kl_delta_rule_args *args, const float *q,
                                             const float *k, const float *g, int64_t t, int64_t h)
{
    const int64_t key_head =
        args->head_map == KL_HEADS_TILED ? h % args->Hk : h / (args->Hv / args->Hk);
    const int64_t key = (t * args->Hk + key_head) * args->K;
    const int64_t width = args->gate == KL_GATE_CHANNEL ? args->K : 1;
    return (kl_delta_rows){ .q = q + key,
                            .k = k + key,
                            .g = args->gate == KL_GATE_NONE ? NULL : g + (t * args->Hv + h) * width,
                            .key_step = args->Hk * args->K,
                            .gate_step = args->Hv * width };
}

/* Row `row` of `to`, from token i of `from`. */
static inline void kl_delta_fill_row(const kl_kernels *k, const kl_delta_rule_args *args,
                                     const kl_delta_factors *to, int64_t row,
                                     const kl_delta_rows *from, int64_t i)
{
    const int64_t at = row * kl_delta_ld(args->K), key = i * from->key_step;
    k->delta_rule_factors(to->alpha + at, to->q + at, to->k + at,
                          from->g != NULL ? from->g + i * from->gate_step : NULL, from->q + key,
                          from->k + key, args->scale, args->K, args->gate);
}

static inline kl_delta_factors kl_delta_take_factors(kl_room *room, int64_t values)
{
    float *alpha = kl_take_floats(room, values), *q = kl_take_floats(room, values);
    return (kl_delta_factors){ alpha, q, kl_take_floats(room, values) };
}

/* What delta_chunk_factors writes for a chunk of so many tokens or fewer. */
static inline void kl_delta_take_chunk(kl_delta_chunk *c, kl_room *room, int64_t chunk, int64_t ld)
{
    const int64_t rows = kl_delta_round_up(chunk, KL_DELTA_BLOCK);
    c->start = kl_take_floats(room, 2 * rows * ld);
    c->end = kl_take_floats(room, rows * ld);
    c->decay = kl_take_floats(room, ld);
    c->minus_kk = kl_take_floats(room, rows * rows);
    c->qk = kl_take_floats(room, rows * rows);
    c->scratch = kl_take_floats(room, (2 * KL_DELTA_BLOCK + 1) * kl_max(ld, rows));
}

/* A chunk of n tokens in the room of `laid_out`; its factors are there. */
static inline kl_delta_chunk kl_delta_chunk_of(const kl_delta_chunk *laid_out,
                                               const kl_delta_rule_args *args,
                                               const kl_delta_factors *factors, int64_t n,
                                               const float *beta, int64_t beta_step)
{
    kl_delta_chunk c = *laid_out;
    c.n = n;
    c.rows = kl_delta_round_up(n, KL_DELTA_BLOCK);
    c.K = args->K;
    c.ld = kl_delta_ld(args->K);
    c.by_channel = args->gate == KL_GATE_CHANNEL;
    c.alpha = factors->alpha;
    c.q = factors->q;
    c.k = factors->k;
    c.beta = beta;
    c.beta_step = beta_step;
    return c;
}

#endif
