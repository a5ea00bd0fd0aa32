#include "ops.h"

kl_status cpu_linear(kl_ctx *ctx, float *const *y, const float *x, const kl_weight *w, const float *const *bias, int n_weights, int64_t T, int64_t D)
{
    (void)y;(void)x;(void)w;(void)bias;(void)n_weights;(void)T;(void)D;
    return kl_fail(ctx, KL_ERR_UNSUPPORTED, "linear: not built yet");
}

kl_status kl_linear(kl_ctx *ctx, float *const *y, const float *x, const kl_weight *w, const float *const *bias, int n_weights, int64_t T, int64_t D)
{
    return ctx->backend->linear(ctx, y, x, w, bias, n_weights, T, D);
}
