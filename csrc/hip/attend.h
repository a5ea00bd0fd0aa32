/* Softmax attention over a paged cache, for attention and latent_attention (attend.hip): queries of H heads, a group
 * of them on each of Hkv key heads, against keys of up to two parts. Positions are all that a query sees, or chosen. */
#ifndef KL_HIP_ATTEND_H
#define KL_HIP_ATTEND_H

#include "cache.h"

/* One part of queries and keys: value d of head h of token t at q + (t - first) * token + h * head + d; of key head c
 * in its cache's rows from column c * width on. */
struct kl_attend_part {
    const float *q;
    int64_t first, token, head, width;
    kl_cached cache;
};

struct kl_attend {
    kl_attend_part key[2]; /* the second may be 0 wide */
    kl_cached values;
    float *o; /* [to - from, H, V] */
    float *l; /* [to - from, H]: the sums, by which o is not divided then; NULL: it is */
    const int64_t *offsets, *positions;
    int64_t N, H, Hkv, V;
    int64_t from, to; /* tokens of the call that are computed */
    float scale;
    /* Where select_width > 0 a token that sees more than select_from positions attends to those of its row alone. Hkv is
     * 1 then. */
    const int32_t *select;  /* [T, select_width] */
    const int64_t *entries; /* [to - from] positions attended to, of the row or all */
    int64_t select_width, select_from;
    /* where segments are tasks of their own: their results, [tasks, rows of a tile] */
    float *part_m, *part_l, *part_acc;
    int64_t segments;
};

/* On the host: offsets and positions are the call's, of which `a` has the device's. Takes scratch; launches. */
kl_status kl_attend_run(kl_ctx *ctx, kl_attend a, const int64_t *offsets, const int64_t *positions);

#endif
