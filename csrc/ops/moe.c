#include "ops.h"

kl_status cpu_moe(kl_ctx *ctx, float *y, const float *x, const int32_t *ids, const float *weights, const kl_weight *w_gate, const kl_weight *w_up, const kl_weight *w_down, const float *shared, int64_t T, int64_t D, int64_t F, int64_t k)
{
    (void)y;(void)x;(void)ids;(void)weights;(void)w_gate;(void)w_up;(void)w_down;(void)shared;(void)T;(void)D;(void)F;(void)k;
    return kl_fail(ctx, KL_ERR_UNSUPPORTED, "moe: not built yet");
}

kl_status kl_moe(kl_ctx *ctx, float *y, const float *x, const int32_t *ids, const float *weights, const kl_weight *w_gate, const kl_weight *w_up, const kl_weight *w_down, const float *shared, int64_t T, int64_t D, int64_t F, int64_t k)
{
    return ctx->backend->moe(ctx, y, x, ids, weights, w_gate, w_up, w_down, shared, T, D, F, k);
}
