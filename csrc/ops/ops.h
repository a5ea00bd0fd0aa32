/* The op table. A public op (ops/<op>.c) checks its arguments and calls the entry of the context's
 * backend; a backend fills in the table and knows nothing else. The CPU's entries stand beside the
 * checks in ops/<op>.c, under the name cpu_<op>. */
#ifndef KL_OPS_H
#define KL_OPS_H

#include "../internal.h"
#include "backend.h"

/* Runs the backend's entry of an op, gives back the scratch that it took and, while profiling, books its time, flops
 * and bytes. Ops call no ops. */
#define KL_RUN(op, flops, bytes, ...)                                                              \
    (kl_book_begin(ctx), kl_book_end(ctx, KL_OP_##op, (int64_t)(flops), (int64_t)(bytes),          \
                                     ctx->backend->op(__VA_ARGS__)))
void kl_book_begin(kl_ctx *ctx);
kl_status kl_book_end(kl_ctx *ctx, kl_op_id op, int64_t flops, int64_t bytes, kl_status status);

#define KL_OP(name, parameters) kl_status cpu_##name parameters;
KL_OPS(KL_OP)
#undef KL_OP

extern const kl_backend kl_cpu_backend; /* cpu/backend.c */

/* Whether an op has nothing to do: scratch is measured, and only devices take some for it. */
static inline bool kl_is_measured(const kl_ctx *ctx)
{
    return ctx->arena.measuring && ctx->backend == &kl_cpu_backend;
}

#endif
