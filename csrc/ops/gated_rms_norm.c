/* gated_rms_norm: y[t,d] = w[d] * x[t,d] * r[t] * a(z[t,d]),   r as in rms_norm
 *   a = sigmoid (KDA) or silu (gated DeltaNet)
 *   x, y, z [T, D], y may be x or z     w [D]     eps in units of x^2, >= 0
 *   Order: normalise, weight, gate. Sum of squares as in rms_norm.
 *   Budget: |y - ref| <= (D/32 + 14) u |ref|. */
#include "ops.h"

#include "../cpu/kernels.h"

typedef struct task {
    const kl_kernels *k;
    float *y;
    const float *x, *z, *w;
    int64_t D;
    float eps;
    kl_activation activation;
} task;

static void rows(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    for (int64_t t = begin; t < end; t++)
        a->k->gated_rms_norm(a->y + t * a->D, a->x + t * a->D, a->z + t * a->D, a->w, a->D, a->eps,
                             a->activation);
}

kl_status cpu_gated_rms_norm(kl_ctx *ctx, float *y, const float *x, const float *z, const float *w,
                             int64_t T, int64_t D, float eps, kl_activation activation)
{
    task a = { ctx->k, y, x, z, w, D, eps, activation };
    return kl_for(ctx, T, kl_row_grain(4 * D), rows, &a);
}

kl_status kl_gated_rms_norm(kl_ctx *ctx, float *y, const float *x, const float *z, const float *w,
                            int64_t T, int64_t D, float eps, kl_activation activation)
{
    KL_TRY(kl_check_rows(ctx, "gated_rms_norm", "x", T, D));
    if (!(eps >= 0.0f))
        return kl_fail(ctx, KL_ERR_ARG, "gated_rms_norm: eps is %g; it must be >= 0", (double)eps);
    if (activation != KL_SIGMOID && activation != KL_SILU)
        return kl_fail(ctx, KL_ERR_ARG,
                       "gated_rms_norm: activation is %d; it must be sigmoid or silu",
                       (int)activation);
    if (ctx->arena.measuring)
        return KL_OK;
    return KL_RUN(gated_rms_norm, 8 * T * D, 12 * T * D, ctx, y, x, z, w, T, D, eps, activation);
}
