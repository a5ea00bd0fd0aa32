/* Attention in 16-bit fixed point: rows of int16 with a unit each, multiplied exactly in int32.
 *
 *   unit = |x| / 32700, |x| the row's Euclidean norm;   X_k = round(x_k / unit), halves to even;   x_k ~ unit X_k
 *
 * The norm, and not the largest value, because it bounds the product: |sum X_k Y_k| <= |X| |Y| < 2^31 by Cauchy and
 * Schwarz, for rows of any width, and no partial sum is larger. A value of a row of 576 is then some 1,360 units, a
 * lone one up to 32,700. Integers have no order of sums: results have the same bytes in any tile and on any
 * instruction set. docs/math.md#fixed has the error. */
#ifndef KL_FIXED_H
#define KL_FIXED_H

#include "attention.h"

#define FIXED_ONE 32700.0f
#define FIXED_MAGIC 0x1.8p23f /* added, the low bits are the nearest integer */

enum { KL_FIXED_LANES = 16 }; /* rows side by side, in lanes: [pairs of values][16 lanes][2] */

/* rows of int16, `stride` from one to the next (kl_fixed_stride), zeros behind their width; a unit each. A row with a
 * value that is not finite is zeros with unit NaN. */
typedef struct kl_fixed_rows {
    int16_t *value;
    float *unit;
    int64_t stride;
} kl_fixed_rows;

/* whole vectors, and no multiple of 1024 bytes, so that neighbouring rows share no cache set */
static inline int64_t kl_fixed_stride(int64_t width)
{
    const int64_t stride = (width + 31) / 32 * 32;
    return stride % 512 == 0 ? stride + 32 : stride;
}

/* Pairs of rows side by side, [n / 2][stride][2] of the first `width` values: whole vectors, and an odd number of them,
 * so that a column walks through all cache sets. */
static inline int64_t kl_fixed_pair_stride(int64_t width) { return (width + 31) / 32 * 32 + 16; }

/* n rows in lanes: groups of 16, [kl_fixed_stride / 2][16] pairs each, and 16 units; lanes past n are zero */
typedef struct kl_fixed_lanes {
    int32_t *pair;
    float *unit;
    int64_t stride; /* int16 of a row, as kl_fixed_rows */
} kl_fixed_lanes;

static inline int64_t kl_fixed_groups(int64_t n)
{
    return (n + KL_FIXED_LANES - 1) / KL_FIXED_LANES;
}

/* As kl_attend, of queries in lanes on one block of positions. v: pairs of positions, run.width wide, and the units of
 * the rows that they were made of. */
typedef struct kl_attend_fixed {
    kl_fixed_lanes q;
    kl_fixed_rows k; /* room for KL_BLOCK rows */
    const int32_t *v;
    const float *v_unit;
    kl_running run;
    kl_ahead ahead[2];
    int64_t n_queries, n, first, step;
    float scale;
} kl_attend_fixed;

#endif
