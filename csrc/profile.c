/* Where the time goes: calls, seconds, flops and bytes of each op, while profiling is on. On a device each op is waited
 * for: a launch takes no time of its own. */
#include "ops/ops.h"

void kl_book_begin(kl_ctx *ctx)
{
    ctx->mark = kl_scratch_mark(ctx);
    if (ctx->profiling)
        ctx->booking = kl_now_ns();
}

kl_status kl_book_end(kl_ctx *ctx, kl_op_id op, int64_t flops, int64_t bytes, kl_status status)
{
    if (ctx->profiling && !ctx->arena.measuring) {
        if (status == KL_OK && ctx->backend->wait != NULL)
            status = ctx->backend->wait(ctx, ctx->backend->stream(ctx));
        kl_profile_row *row = &ctx->profile[op];
        row->calls++;
        row->seconds += 1e-9 * (double)(kl_now_ns() - ctx->booking);
        row->flops += (double)flops;
        row->bytes += (double)bytes;
    }
    kl_scratch_reset(ctx, ctx->mark);
    return status;
}

void kl_ctx_profile(kl_ctx *ctx, int on)
{
    ctx->profiling = on != 0;
    for (int i = 0; on && i < KL_OP_COUNT; i++)
        ctx->profile[i] = (kl_profile_row){ 0 };
}

int kl_ctx_profile_row(const kl_ctx *ctx, int index, const char **name, kl_profile_row *row)
{
    static const char *const names[] = {
#define KL_OP(op, parameters) #op,
        KL_OPS(KL_OP)
#undef KL_OP
    };
    if (index < 0 || index >= KL_OP_COUNT)
        return 0;
    *name = names[index];
    *row = ctx->profile[index];
    return 1;
}
