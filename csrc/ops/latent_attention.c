#include "ops.h"

kl_status cpu_latent_attention(kl_ctx *ctx, float *o, const float *q, kl_cache latent, kl_cache k_shared, const kl_weight *w_uk, const kl_weight *w_uv, const kl_latent_attention_args *args)
{
    (void)o;(void)q;(void)latent;(void)k_shared;(void)w_uk;(void)w_uv;(void)args;
    return kl_fail(ctx, KL_ERR_UNSUPPORTED, "latent_attention: not built yet");
}

kl_status kl_latent_attention(kl_ctx *ctx, float *o, const float *q, kl_cache latent, kl_cache k_shared, const kl_weight *w_uk, const kl_weight *w_uv, const kl_latent_attention_args *args)
{
    return ctx->backend->latent_attention(ctx, o, q, latent, k_shared, w_uk, w_uv, args);
}
