#include "ops.h"

kl_status cpu_route(kl_ctx *ctx, int32_t *ids, float *weights, const float *scores, const float *bias, const kl_route_args *args)
{
    (void)ids;(void)weights;(void)scores;(void)bias;(void)args;
    return kl_fail(ctx, KL_ERR_UNSUPPORTED, "route: not built yet");
}

kl_status kl_route(kl_ctx *ctx, int32_t *ids, float *weights, const float *scores, const float *bias, const kl_route_args *args)
{
    return ctx->backend->route(ctx, ids, weights, scores, bias, args);
}
