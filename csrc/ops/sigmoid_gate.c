/* sigmoid_gate: y[t,d] = x[t,d] * sigmoid(gate[t, d / (D / G)])
 *   x, y [T, D], y may be x     gate [T, G], G divides D
 *   G = D: a gate for each value, G = 1: one for the row, G = H: one for each head.
 *   Budget: |y - ref| <= 6 u |ref| + 2^-149 (1 + |x|), u = 2^-24. */
#include "ops.h"

#include "../cpu/kernels.h"

typedef struct task {
    const kl_kernels *k;
    float *y;
    const float *x, *gate;
    int64_t D, G;
} task;

static void rows(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    a->k->sigmoid_gate(a->y + begin * a->D, a->x + begin * a->D, a->gate + begin * a->G,
                       (end - begin) * a->G, a->D / a->G);
}

kl_status cpu_sigmoid_gate(kl_ctx *ctx, float *y, const float *x, const float *gate, int64_t T,
                           int64_t D, int64_t G)
{
    task a = { ctx->k, y, x, gate, D, G };
    return kl_for(ctx, T, kl_row_grain(D), rows, &a);
}

kl_status kl_sigmoid_gate(kl_ctx *ctx, float *y, const float *x, const float *gate, int64_t T,
                          int64_t D, int64_t G)
{
    KL_TRY(kl_check_rows(ctx, "sigmoid_gate", "x", T, D));
    if (G < 1 || D % G != 0)
        return kl_fail(ctx, KL_ERR_SHAPE,
                       "sigmoid_gate: gate is [T, G] = [%lld, %lld]; G must divide D = %lld",
                       (long long)T, (long long)G, (long long)D);
    if (ctx->arena.measuring)
        return KL_OK;
    return KL_RUN(sigmoid_gate, T * (D + 4 * G), 4 * T * (2 * D + G), ctx, y, x, gate, T, D, G);
}
