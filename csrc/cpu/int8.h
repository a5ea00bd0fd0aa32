/* Products of block weights with activations in int8 (docs/math.md#int8): what callers and kernels share.
 *
 * A row is cut into groups of 256 values, 8 blocks of 32; the last group is filled up with zero blocks.
 *     x[k] is about q[k] * scale[block], scale = max |x| / 127 of the block
 * A weight is scale * q - min, with one scale (and min) for 32 values, or an integer one for 16 under a float
 * one. Sums within a block are integers, exact in any order; then
 *     inner = scale_w * (sum of q_w q_x) - min_w * (sum of q_x)        the product rounds, then one fma
 *     lane[block % 8] = fma(inner, scale_x, lane)                      in rising order of groups
 *     y = the halving tree over the lanes: l + l+4, then +2, +1
 * so a result has the same bytes in any batch, at any number of threads and on any instruction set.
 *
 * The files, and where value v of block b of a group lies in each (r: a row of weights):
 *
 *     int8.inc            the definition: the scalar table, and the oracle        q[32 b + v]
 *     int8_blocks.h       what integers and scales each type has, as defined      q[32 b + v]
 *     kl_int8_group       x, below              blocks 0 4 1 5 2 6 3 7:  q[64 (b % 4) + 32 (b / 4) + v]
 *     int8_x86.inc        what types are like, and their scales, for both of x86
 *     int8_dot.inc        the choice between few rows of x and many, for both of x86
 *     int8_quads.inc      weights of half a group, a block a register:            quad b / 4, register b % 4, byte v
 *     int8_avx2.inc       x made int8
 *       _few              rows of weights as they lie: quads with x
 *       _many             a panel of 8 rows, turned:                              q[8 b + v / 4][r][v % 4]
 *       _products         bytes times bytes; with KL_AVXVNNI in one instruction
 *     avxvnni.inc         all of int8_avx2.inc once more, with KL_AVXVNNI
 *     int8_avx512.inc     x made int8
 *       _load             weights of a group, two blocks a register:              register b % 4, byte 32 (b / 4) + v
 *       _few              two rows of weights side by side, as they lie
 *       _panel, _many     a panel of 16 rows, turned:                             q[8 b + v / 4][r][v % 4]
 *     int8_neon.inc, _load   16 values a register, in order */
#ifndef KL_INT8_H
#define KL_INT8_H

#include "../kimi_linear.h"

#include <stdbool.h>

enum { KL_INT8_VALUES = 256, KL_INT8_BLOCKS = 8 };
/* Where the largest of a block is below this it counts as zero: 127 / largest would overflow. */
#define KL_INT8_SMALLEST 0x1p-100f

/* 256 activations. Values lie in the order that kernels read them in: block b begins at 64 * (b % 4) +
 * 32 * (b / 4). */
typedef struct kl_int8_group {
    int8_t q[256];
    float scale[8];
    float sum[8];         /* of the block's q */
    int32_t offset[8];    /* -128 * sum: kernels that read weights as q + 128 begin with it */
    int32_t offset16[16]; /* the same of each 16 values */
    int16_t sum16[16];
} kl_int8_group;

/* The types that int8_dot reads; weights of another type are multiplied with float32 activations. */
#define KL_INT8_TYPES(TYPE)                                                                        \
    TYPE(KL_Q8_0)                                                                                  \
    TYPE(KL_Q4_0)                                                                                  \
    TYPE(KL_Q5_0)                                                                                  \
    TYPE(KL_Q2_K)                                                                                  \
    TYPE(KL_Q3_K)                                                                                  \
    TYPE(KL_Q4_K)                                                                                  \
    TYPE(KL_Q5_K)                                                                                  \
    TYPE(KL_Q6_K)                                                                                  \
    TYPE(KL_IQ4_NL)                                                                                \
    TYPE(KL_IQ4_XS)                                                                                \
    TYPE(KL_MXFP4)                                                                                 \
    TYPE(KL_Q1_0)                                                                                  \
    TYPE(KL_Q2_0)

static inline bool kl_takes_int8(kl_type type)
{
    switch (type) {
#define KL_INT8_TYPE(type) case type:
        KL_INT8_TYPES(KL_INT8_TYPE)
#undef KL_INT8_TYPE
        return true;
    default: return false;
    }
}

/* Rows of activations, `groups` to a row. */
typedef struct kl_int8_rows {
    const kl_int8_group *group;
    int64_t groups;
} kl_int8_rows;

/* Bytes of scratch for int8_dot over rows of x of so many groups, 64-byte aligned, one thread's. */
enum { KL_INT8_TILE_BYTES = 8192, KL_INT8_PANEL_BYTES = 5696, KL_INT8_PANELS = 2 };
#define KL_INT8_SCRATCH(groups)                                                                    \
    (KL_INT8_TILE_BYTES + KL_INT8_PANELS * KL_INT8_PANEL_BYTES * (groups))

#endif
