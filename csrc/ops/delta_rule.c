#include "ops.h"

kl_status cpu_delta_rule(kl_ctx *ctx, float *o, kl_slots state_out, const float *q, const float *k, const float *v, const float *g, const float *beta, kl_slots state_in, const kl_delta_rule_args *args)
{
    (void)o;(void)state_out;(void)q;(void)k;(void)v;(void)g;(void)beta;(void)state_in;(void)args;
    return kl_fail(ctx, KL_ERR_UNSUPPORTED, "delta_rule: not built yet");
}

kl_status kl_delta_rule(kl_ctx *ctx, float *o, kl_slots state_out, const float *q, const float *k, const float *v, const float *g, const float *beta, kl_slots state_in, const kl_delta_rule_args *args)
{
    return ctx->backend->delta_rule(ctx, o, state_out, q, k, v, g, beta, state_in, args);
}
