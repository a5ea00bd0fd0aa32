/* The ops that work element by element; y may be an input.
 *   add:     y = a + b                                   exact to one rounding
 *   sigmoid: y = 1 / (1 + exp(-x))                       budget 4 u |ref|
 *   swiglu:  y = gate * sigmoid(gate) * up               budget 6 u |ref|
 *            with a limit of min(gate, limit) and clip(up, -limit, limit), 9 u |ref|
 *   situ:    y = beta * tanh(gate / beta) * sigmoid(gate) * up'
 *            up' = linear_beta * tanh(up / linear_beta)  budget 21 u |ref|
 *            up' = up, where linear_beta is 0            budget 14 u |ref| */
#include "ops.h"

#include "../cpu/kernels.h"

enum { BLOCK = 8192 }; /* values a task: a multiple of 16, so that blocks change no result */

typedef struct task {
    void (*binary)(float *y, const float *a, const float *b, int64_t n);
    void (*unary)(float *y, const float *x, int64_t n);
    void (*swiglu)(float *y, const float *a, const float *b, int64_t n, float limit);
    void (*situ)(float *y, const float *a, const float *b, int64_t n, const kl_situ_betas *betas);
    float *y;
    const float *a, *b;
    int64_t n;
    float limit;
    const kl_situ_betas *betas;
} task;

static void blocks(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    const int64_t first = begin * BLOCK, n = kl_min(end * BLOCK, a->n) - first;
    if (a->binary != NULL)
        a->binary(a->y + first, a->a + first, a->b + first, n);
    else if (a->unary != NULL)
        a->unary(a->y + first, a->a + first, n);
    else if (a->swiglu != NULL)
        a->swiglu(a->y + first, a->a + first, a->b + first, n, a->limit);
    else
        a->situ(a->y + first, a->a + first, a->b + first, n, a->betas);
}

static kl_status run(kl_ctx *ctx, task a)
{
    return kl_for(ctx, kl_ceil_div(a.n, BLOCK), 1, blocks, &a);
}

kl_status cpu_add(kl_ctx *ctx, float *y, const float *a, const float *b, int64_t n)
{
    return run(ctx, (task){ .binary = ctx->k->add, .y = y, .a = a, .b = b, .n = n });
}

kl_status cpu_swiglu(kl_ctx *ctx, float *y, const float *gate, const float *up, int64_t n,
                     float limit)
{
    return run(
        ctx,
        (task){ .swiglu = ctx->k->swiglu, .y = y, .a = gate, .b = up, .n = n, .limit = limit });
}

kl_status cpu_situ(kl_ctx *ctx, float *y, const float *gate, const float *up, int64_t n,
                   const kl_situ_betas *betas)
{
    return run(ctx,
               (task){ .situ = ctx->k->situ, .y = y, .a = gate, .b = up, .n = n, .betas = betas });
}

kl_status cpu_sigmoid(kl_ctx *ctx, float *y, const float *x, int64_t n)
{
    return run(ctx, (task){ .unary = ctx->k->sigmoid, .y = y, .a = x, .n = n });
}

static kl_status check_count(kl_ctx *ctx, const char *op, int64_t n)
{
    int64_t all;
    if (n < 0)
        return kl_fail(ctx, KL_ERR_SHAPE, "%s: n is %lld; it must be >= 0", op, (long long)n);
    if (!kl_mul(&all, n, 1))
        return kl_fail(ctx, KL_ERR_SHAPE, "%s: n is %lld, which is too large", op, (long long)n);
    return KL_OK;
}

kl_status kl_add(kl_ctx *ctx, float *y, const float *a, const float *b, int64_t n)
{
    KL_TRY(check_count(ctx, "add", n));
    return ctx->arena.measuring ? KL_OK : KL_RUN(add, n, 12 * n, ctx, y, a, b, n);
}

kl_status kl_swiglu(kl_ctx *ctx, float *y, const float *gate, const float *up, int64_t n,
                    float limit)
{
    KL_TRY(check_count(ctx, "swiglu", n));
    KL_TRY(kl_check_limit(ctx, "swiglu", limit));
    return ctx->arena.measuring ? KL_OK : KL_RUN(swiglu, 4 * n, 12 * n, ctx, y, gate, up, n, limit);
}

kl_status kl_situ(kl_ctx *ctx, float *y, const float *gate, const float *up, int64_t n,
                  const kl_situ_betas *betas)
{
    KL_TRY(check_count(ctx, "situ", n));
    KL_TRY(kl_check_betas(ctx, "situ", betas));
    if (ctx->arena.measuring)
        return KL_OK;
    const int64_t flops = betas->linear_beta > 0.0f ? 10 : 7;
    return KL_RUN(situ, flops * n, 12 * n, ctx, y, gate, up, n, betas);
}

kl_status kl_sigmoid(kl_ctx *ctx, float *y, const float *x, int64_t n)
{
    KL_TRY(check_count(ctx, "sigmoid", n));
    return ctx->arena.measuring ? KL_OK : KL_RUN(sigmoid, 4 * n, 8 * n, ctx, y, x, n);
}
