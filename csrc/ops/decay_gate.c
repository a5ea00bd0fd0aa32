/* decay_gate: log-decay in nats per token, never positive
 *   lower_bound 0:  g[t,h,i] = -rate[h] * softplus(f[t,h,i] + dt_bias[h,i])
 *   below 0:        g[t,h,i] = lower_bound * sigmoid(rate[h] * (f[t,h,i] + dt_bias[h,i]))
 *   f, g [T, H, K], g may be f     rate [H] = exp(A_log), >= 0     dt_bias [H, K]
 *   One gate a head is K = 1: f, g [T, H], dt_bias [H].
 *   Budget, x = f + dt_bias: 6 u |ref| + u rate sigmoid(x) |x|; with a lower bound 6 u |ref| +
 *   2 u |lower_bound| s (1 - s) |rate x|, s the sigmoid (docs/math.md#decay_gate). */
#include "ops.h"

#include "../cpu/kernels.h"

typedef struct task {
    const kl_kernels *k;
    float *g;
    const float *f, *rate, *dt_bias;
    int64_t H, K;
    float lower_bound;
} task;

/* one gate a head: a token is one row of H gates */
static void tokens(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    for (int64_t t = begin; t < end; t++)
        a->k->decay_gate(a->g + t * a->H, a->f + t * a->H, a->rate, 1, a->dt_bias, a->H,
                         a->lower_bound);
}

/* one gate a channel: a token is H rows, each with one rate */
static void heads(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const int64_t h = i % a->H;
        a->k->decay_gate(a->g + i * a->K, a->f + i * a->K, a->rate + h, 0, a->dt_bias + h * a->K,
                         a->K, a->lower_bound);
    }
}

kl_status cpu_decay_gate(kl_ctx *ctx, float *g, const float *f, const float *rate,
                         const float *dt_bias, int64_t T, int64_t H, int64_t K, float lower_bound)
{
    task a = { ctx->k, g, f, rate, dt_bias, H, K, lower_bound };
    if (K == 1)
        return kl_for(ctx, T, kl_row_grain(8 * H), tokens, &a);
    return kl_for(ctx, T * H, kl_row_grain(8 * K), heads, &a);
}

kl_status kl_decay_gate(kl_ctx *ctx, float *g, const float *f, const float *rate,
                        const float *dt_bias, int64_t T, int64_t H, int64_t K, float lower_bound)
{
    int64_t width;
    if (H < 1 || K < 1 || !kl_mul(&width, H, K))
        return kl_fail(ctx, KL_ERR_SHAPE,
                       "decay_gate: f is [%lld, %lld, %lld]; H and K must be >= 1", (long long)T,
                       (long long)H, (long long)K);
    KL_TRY(kl_check_rows(ctx, "decay_gate", "f", T, width));
    if (!(lower_bound <= 0.0f) || lower_bound == -1.0f / 0.0f)
        return kl_fail(ctx, KL_ERR_ARG,
                       "decay_gate: lower_bound is %g; it must be finite and < 0, or 0 for none",
                       (double)lower_bound);
    if (ctx->arena.measuring)
        return KL_OK;
    return KL_RUN(decay_gate, 6 * T * H * K, 8 * T * H * K, ctx, g, f, rate, dt_bias, T, H, K,
                  lower_bound);
}
