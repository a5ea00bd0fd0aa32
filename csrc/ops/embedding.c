#include "ops.h"

kl_status cpu_embedding(kl_ctx *ctx, float *y, const int32_t *ids, const kl_weight *table, int64_t T)
{
    (void)y;(void)ids;(void)table;(void)T;
    return kl_fail(ctx, KL_ERR_UNSUPPORTED, "embedding: not built yet");
}

kl_status kl_embedding(kl_ctx *ctx, float *y, const int32_t *ids, const kl_weight *table, int64_t T)
{
    return ctx->backend->embedding(ctx, y, ids, table, T);
}
