/* l2_norm: y[t,d] = x[t,d] / sqrt(sum_d x[t,d]^2 + eps)
 *   x, y [T, D], y may be x     eps in units of x^2, >= 0 (inside the root, as flash-linear-attention has it)
 *   Where the sum of squares overflows although x is finite, it is taken of the row times 2^-96; where
 *   it underflows and eps is next to 0, times 2^96.
 *   Budget: |y - ref| <= (D/32 + 8) u |ref|. */
#include "ops.h"

#include "../cpu/kernels.h"

typedef struct task {
    const kl_kernels *k;
    float *y;
    const float *x;
    int64_t D;
    float eps;
} task;

static void rows(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    for (int64_t t = begin; t < end; t++)
        a->k->l2_norm(a->y + t * a->D, a->x + t * a->D, a->D, a->eps);
}

kl_status cpu_l2_norm(kl_ctx *ctx, float *y, const float *x, int64_t T, int64_t D, float eps)
{
    task a = { ctx->k, y, x, D, eps };
    return kl_for(ctx, T, kl_row_grain(D), rows, &a);
}

kl_status kl_l2_norm(kl_ctx *ctx, float *y, const float *x, int64_t T, int64_t D, float eps)
{
    KL_TRY(kl_check_rows(ctx, "l2_norm", "x", T, D));
    if (!(eps >= 0.0f))
        return kl_fail(ctx, KL_ERR_ARG, "l2_norm: eps is %g; it must be >= 0", (double)eps);
    if (ctx->arena.measuring)
        return KL_OK;
    return KL_RUN(l2_norm, 4 * T * D, 8 * T * D, ctx, y, x, T, D, eps);
}
