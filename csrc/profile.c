/* Where the time goes: calls, seconds, flops and bytes of each op, while profiling is on. */
#include "ops/ops.h"

#include <time.h>

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int64_t kl_book_begin(const kl_ctx *ctx) { return ctx->profiling ? now_ns() : 0; }

kl_status kl_book(kl_ctx *ctx, kl_op_id op, int64_t begin, double flops, double bytes, kl_status status)
{
    if (ctx->profiling) {
        kl_profile_row *row = &ctx->profile[op];
        row->calls++;
        row->seconds += 1e-9 * (double)(now_ns() - begin);
        row->flops += flops;
        row->bytes += bytes;
    }
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
