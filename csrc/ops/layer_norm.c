/* layer_norm: y[t,d] = w[d] * (x[t,d] - m[t]) * r[t] + b[d]
 *   m[t] = mean_d(x[t,d]),   r[t] = 1 / sqrt(mean_d((x[t,d] - m[t])^2) + eps)
 *   x, y [T, D], y may be x     w, b [D]     eps in units of x^2, >= 0
 *   The mean is taken in two parts, m1 of x and m2 of x - m1; what is squared is (x - m1) - m2, so that a mean far
 *   above the deviation costs no digit. Rows whose sums overflow although x is finite are taken times 2^-96; where
 *   squares underflow and eps is next to 0, times 2^96.
 *   Sums: 16 lanes, of additions or of fma of squares, over d, then a fixed halving tree (docs/math.md#sums).
 *   Budget: docs/math.md#layer_norm. */
#include "ops.h"

#include "../cpu/kernels.h"

typedef struct task {
    const kl_kernels *k;
    float *y;
    const float *x, *w, *b;
    int64_t D;
    float eps;
} task;

static void rows(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    for (int64_t t = begin; t < end; t++)
        a->k->layer_norm(a->y + t * a->D, a->x + t * a->D, a->w, a->b, a->D, a->eps);
}

kl_status cpu_layer_norm(kl_ctx *ctx, float *y, const float *x, const float *w, const float *b,
                         int64_t T, int64_t D, float eps)
{
    task a = { ctx->k, y, x, w, b, D, eps };
    return kl_for(ctx, T, kl_row_grain(D), rows, &a);
}

kl_status kl_layer_norm(kl_ctx *ctx, float *y, const float *x, const float *w, const float *b,
                        int64_t T, int64_t D, float eps)
{
    KL_TRY(kl_check_rows(ctx, "layer_norm", "x", T, D));
    if (!(eps >= 0.0f))
        return kl_fail(ctx, KL_ERR_ARG, "layer_norm: eps is %g; it must be >= 0", (double)eps);
    if (ctx->arena.measuring)
        return KL_OK;
    return KL_RUN(layer_norm, 8 * T * D, 8 * T * D, ctx, y, x, w, b, T, D, eps);
}
