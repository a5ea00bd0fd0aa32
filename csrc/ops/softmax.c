/* softmax: y[t,d] = exp(x[t,d] - m[t]) / sum_d exp(x[t,d] - m[t]),   m[t] = max_d x[t,d]
 *   x, y [T, D], y may be x. NaN in a row makes that row NaN; -inf gives exactly 0.
 *   Sum: 16 lanes over d, then the halving tree.
 *   Budget: |y - ref| <= (D/16 + 8 + |x - m| + sum_d y |x - m|) u |ref| (the difference x - m is
 *   rounded once, there and in the sum). */
#include "ops.h"

#include "../cpu/kernels.h"

typedef struct task {
    const kl_kernels *k;
    float *y;
    const float *x;
    int64_t D;
} task;

static void rows(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    for (int64_t t = begin; t < end; t++)
        a->k->softmax(a->y + t * a->D, a->x + t * a->D, a->D);
}

kl_status cpu_softmax(kl_ctx *ctx, float *y, const float *x, int64_t T, int64_t D)
{
    task a = { ctx->k, y, x, D };
    return kl_for(ctx, T, kl_row_grain(8 * D), rows, &a);
}

kl_status kl_softmax(kl_ctx *ctx, float *y, const float *x, int64_t T, int64_t D)
{
    KL_TRY(kl_check_rows(ctx, "softmax", "x", T, D));
    if (ctx->arena.measuring)
        return KL_OK;
    return KL_RUN(softmax, 4 * T * D, 8 * T * D, ctx, y, x, T, D);
}
