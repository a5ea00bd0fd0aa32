/* rms_norm: y[t,d] = w[d] * x[t,d] * r[t],   r[t] = 1 / sqrt(mean_d(x[t,d]^2) + eps)
 *   x, y [T, D], y may be x     w [D]     eps in units of x^2, >= 0
 *   Where the sum of squares overflows although x is finite, it is taken of the row times 2^-96; where
 *   it underflows and eps is next to 0, times 2^96.
 *   Sum of squares: 16 lanes of fma over d, then a fixed halving tree (docs/math.md#sums).
 *   Budget: |y - ref| <= (D/32 + 8) u |ref|, u = 2^-24. */
#include "ops.h"

#include "../cpu/kernels.h"

typedef struct task {
    const kl_kernels *k;
    float *y;
    const float *x, *w;
    int64_t D;
    float eps;
} task;

static void rows(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    for (int64_t t = begin; t < end; t++)
        a->k->rms_norm(a->y + t * a->D, a->x + t * a->D, a->w, a->D, a->eps);
}

kl_status cpu_rms_norm(kl_ctx *ctx, float *y, const float *x, const float *w, int64_t T, int64_t D,
                       float eps)
{
    task a = { ctx->k, y, x, w, D, eps };
    return kl_for(ctx, T, kl_row_grain(D), rows, &a);
}

kl_status kl_rms_norm(kl_ctx *ctx, float *y, const float *x, const float *w, int64_t T, int64_t D,
                      float eps)
{
    KL_TRY(kl_check_rows(ctx, "rms_norm", "x", T, D));
    if (!(eps >= 0.0f))
        return kl_fail(ctx, KL_ERR_ARG, "rms_norm: eps is %g; it must be >= 0", (double)eps);
    if (ctx->arena.measuring)
        return KL_OK;
    return KL_RUN(rms_norm, 4 * T * D, 8 * T * D, ctx, y, x, w, T, D, eps);
}
