#include "ops.h"

kl_status cpu_sample(kl_ctx *ctx, int32_t *ids, const float *logits, const kl_sample_args *args, int64_t T, int64_t D)
{
    (void)ids;(void)logits;(void)args;(void)T;(void)D;
    return kl_fail(ctx, KL_ERR_UNSUPPORTED, "sample: not built yet");
}

kl_status kl_sample(kl_ctx *ctx, int32_t *ids, const float *logits, const kl_sample_args *args, int64_t T, int64_t D)
{
    return ctx->backend->sample(ctx, ids, logits, args, T, D);
}
