#include "ops.h"

kl_status cpu_short_conv(kl_ctx *ctx, float *y, kl_slots history_out, const float *x, const float *w, kl_slots history_in, const int64_t *offsets, int64_t N, int64_t T, int64_t C, int64_t W, kl_activation activation)
{
    (void)y;(void)history_out;(void)x;(void)w;(void)history_in;(void)offsets;(void)N;(void)T;(void)C;(void)W;(void)activation;
    return kl_fail(ctx, KL_ERR_UNSUPPORTED, "short_conv: not built yet");
}

kl_status kl_short_conv(kl_ctx *ctx, float *y, kl_slots history_out, const float *x, const float *w, kl_slots history_in, const int64_t *offsets, int64_t N, int64_t T, int64_t C, int64_t W, kl_activation activation)
{
    return ctx->backend->short_conv(ctx, y, history_out, x, w, history_in, offsets, N, T, C, W, activation);
}
