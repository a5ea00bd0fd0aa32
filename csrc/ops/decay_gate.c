#include "ops.h"

kl_status cpu_decay_gate(kl_ctx *ctx, float *g, const float *f, const float *rate, const float *dt_bias, int64_t T, int64_t H, int64_t K, float lower_bound)
{
    (void)g;(void)f;(void)rate;(void)dt_bias;(void)T;(void)H;(void)K;(void)lower_bound;
    return kl_fail(ctx, KL_ERR_UNSUPPORTED, "decay_gate: not built yet");
}

kl_status kl_decay_gate(kl_ctx *ctx, float *g, const float *f, const float *rate, const float *dt_bias, int64_t T, int64_t H, int64_t K, float lower_bound)
{
    return ctx->backend->decay_gate(ctx, g, f, rate, dt_bias, T, H, K, lower_bound);
}
