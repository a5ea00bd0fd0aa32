/* mhc_post: out[t, j] = post[t, j] y[t] + sum_i comb[t, i, j] x[t, i]     (comb transposed)
 *   x, out [T, n, D], out may be x     y [T, D]     post [T, n], comb [T, n, n]: as mhc_pre gives them
 *   n up to KL_MHC_STREAMS. Order of the sum: post y, then one fma each in rising i.
 *   Budget: |out - ref| <= (n + 1) u (|post y| + sum_i |comb x|), u = 2^-24. */
#include "ops.h"

#include "../cpu/kernels.h"

typedef struct task {
    const kl_kernels *k;
    float *out;
    const float *y, *x, *post, *comb;
    int64_t n, D;
} task;

static void put_back(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    const int64_t n = a->n, D = a->D;
    (void)thread;
    for (int64_t t = begin; t < end; t++)
        a->k->mhc_post(a->out + t * n * D, a->y + t * D, a->x + t * n * D, a->post + t * n,
                       a->comb + t * n * n, n, D);
}

kl_status cpu_mhc_post(kl_ctx *ctx, float *out, const float *y, const float *x, const float *post,
                       const float *comb, int64_t T, int64_t n, int64_t D)
{
    task a = { ctx->k, out, y, x, post, comb, n, D };
    return kl_for(ctx, T, kl_row_grain((n + 1) * D), put_back, &a);
}

kl_status kl_mhc_post(kl_ctx *ctx, float *out, const float *y, const float *x, const float *post,
                      const float *comb, int64_t T, int64_t n, int64_t D)
{
    KL_TRY(kl_check_streams(ctx, "mhc_post", T, n, D));
    if (kl_is_measured(ctx))
        return KL_OK;
    return KL_RUN(mhc_post, 2 * T * n * (n + 1) * D, 4 * T * (2 * n * D + D + n * n + n), ctx, out,
                  y, x, post, comb, T, n, D);
}
