#include "ops.h"

kl_status cpu_cache_append(kl_ctx *ctx, kl_cache cache, const float *x, const int64_t *offsets, const int64_t *start, int64_t N, int64_t T, int64_t D)
{
    (void)cache;(void)x;(void)offsets;(void)start;(void)N;(void)T;(void)D;
    return kl_fail(ctx, KL_ERR_UNSUPPORTED, "cache_append: not built yet");
}

kl_status kl_cache_append(kl_ctx *ctx, kl_cache cache, const float *x, const int64_t *offsets, const int64_t *start, int64_t N, int64_t T, int64_t D)
{
    return ctx->backend->cache_append(ctx, cache, x, offsets, start, N, T, D);
}
