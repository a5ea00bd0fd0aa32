/* The streams' two ends:
 *   mhc_expand:   y[t, i] = x[t]                              exact
 *   mhc_collapse: y[t] = (sum_i x[t, i]) / n                  budget n u (sum_i |x[t, i]|) / n, u = 2^-24
 *   of mhc_expand x [T, D] and y [T, n, D], of mhc_collapse x [T, n, D] and y [T, D]: they overlap nothing
 *   n up to KL_MHC_STREAMS. Order of the sum: rising i, then one division. */
#include "ops.h"

#include "../cpu/kernels.h"

#include <string.h>

typedef struct task {
    const kl_kernels *k;
    float *y;
    const float *x;
    int64_t n, D;
} task;

static void expand(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    for (int64_t row = begin * a->n; row < end * a->n; row++)
        memcpy(a->y + row * a->D, a->x + row / a->n * a->D, (size_t)a->D * sizeof *a->y);
}

static void collapse(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    for (int64_t t = begin; t < end; t++)
        a->k->mhc_mean(a->y + t * a->D, a->x + t * a->n * a->D, a->n, a->D);
}

kl_status cpu_mhc_expand(kl_ctx *ctx, float *y, const float *x, int64_t T, int64_t n, int64_t D)
{
    task a = { ctx->k, y, x, n, D };
    return kl_for(ctx, T, kl_row_grain(n * D), expand, &a);
}

kl_status cpu_mhc_collapse(kl_ctx *ctx, float *y, const float *x, int64_t T, int64_t n, int64_t D)
{
    task a = { ctx->k, y, x, n, D };
    return kl_for(ctx, T, kl_row_grain(n * D), collapse, &a);
}

kl_status kl_mhc_expand(kl_ctx *ctx, float *y, const float *x, int64_t T, int64_t n, int64_t D)
{
    KL_TRY(kl_check_streams(ctx, "mhc_expand", T, n, D));
    if (kl_is_measured(ctx))
        return KL_OK;
    return KL_RUN(mhc_expand, 0, 4 * T * (n + 1) * D, ctx, y, x, T, n, D);
}

kl_status kl_mhc_collapse(kl_ctx *ctx, float *y, const float *x, int64_t T, int64_t n, int64_t D)
{
    KL_TRY(kl_check_streams(ctx, "mhc_collapse", T, n, D));
    if (kl_is_measured(ctx))
        return KL_OK;
    return KL_RUN(mhc_collapse, T * n * D, 4 * T * (n + 1) * D, ctx, y, x, T, n, D);
}
