/* What the attentions take of a thread's scratch, one part behind the other; fixed-point rows (cpu/fixed.h) among it. */
#ifndef KL_ROOM_H
#define KL_ROOM_H

#include "../cpu/kernels.h"

/* Whether attention multiplies in 16-bit fixed point: where products take narrow activations. */
static inline bool kl_attends_fixed(const kl_ctx *ctx)
{
    return ctx->activations != KL_ACTIVATIONS_FLOAT32;
}

/* The next `count` values of `size` bytes of a scratch that begins at base; NULL: only counted. */
static inline void *kl_take(char *base, size_t *used, int64_t count, size_t size)
{
    void *at = base != NULL ? base + *used : NULL;
    *used += ((size_t)count * size + 63) / 64 * 64;
    return at;
}

static inline kl_fixed_lanes kl_take_lanes(char *base, size_t *used, int64_t n, int64_t width)
{
    const int64_t stride = kl_fixed_stride(width), rows = kl_fixed_groups(n) * KL_FIXED_LANES;
    int32_t *pair = kl_take(base, used, rows * stride / 2, sizeof *pair);
    return (kl_fixed_lanes){ pair, kl_take(base, used, rows, sizeof(float)), stride };
}

static inline kl_fixed_rows kl_take_rows(char *base, size_t *used, int64_t width)
{
    const int64_t stride = kl_fixed_stride(width);
    int16_t *value = kl_take(base, used, KL_BLOCK * stride, sizeof *value);
    return (kl_fixed_rows){ value, kl_take(base, used, KL_BLOCK, sizeof(float)), stride };
}

/* Of n rows, one behind the other. */
static inline kl_running kl_take_running(char *base, size_t *used, int64_t n, int64_t width)
{
    float *m = kl_take(base, used, n, sizeof *m), *l = kl_take(base, used, n, sizeof *l);
    return (kl_running){ m, l, kl_take(base, used, n * width, sizeof(float)), width, width };
}

#endif
