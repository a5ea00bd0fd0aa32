/* mhc_pre: what a block reads of a token's n streams x[t, i], and how its result goes back into them.
 *       m = fn x[t] / sqrt(mean over all n D of x[t]^2 + norm_eps)
 *       pre = sigmoid(m[:n] scale[0] + base[:n]) + eps      post = 2 sigmoid(m[n:2n] scale[1] + base[n:2n])
 *       C = softmax of each row of m[2n:] scale[2] + base[2n:], as [n, n],  + eps
 *       comb: C, each column over its sum + eps; then iters - 1 times each row so, and each column
 *       y[d] = sum_i pre[i] x[i, d]
 *   x [T, n, D]     y [T, D], post [T, n], comb [T, n, n]: they overlap nothing
 *   fn [(2 + n) n, n D] in any storage type, not transposed; base [(2 + n) n]     scale [3]
 *   n up to KL_MHC_STREAMS; norm_eps in units of x^2, >= 0; eps >= 0: of 0, and with logits more than
 *   103 apart, a column may be 0 / 0
 *   The product with fn is in float32 whatever the context's activations: its error goes through all normalisations.
 *   Where a token's squares leave float32 it is of x times 2^-96 or 2^96, as its sum of squares is (rms_norm.c).
 *   Order of sums: product.h; over i and rows of C rising i, over a row's j 16 lanes, then the halving tree.
 *   Budget: docs/math.md#mhc_pre. */
#include "ops.h"

#include "product.h"
#include "room.h"

/* tokens of a product's task, where there are more: fn is read once for all of them */
enum { TOKENS = 60 };

typedef struct task {
    const kl_ctx *ctx;
    float *y, *post, *comb;
    const float *x;
    const kl_weight *fn;
    const float *base, *scale;
    const kl_mhc_args *args;
    float *m; /* [T, (2 + n) n]: products, then logits */
    int64_t block, tokens;
    kl_rooms rooms; /* lay_out */
} task;

static int64_t width_of(const kl_mhc_args *a) { return a->n * a->D; }
static int64_t rows_of(const kl_mhc_args *a) { return (2 + a->n) * a->n; }

/* A room's parts: scratch of a product with a task's tokens or with one, and a token times a power of two. */
static float *lay_out(const task *a, kl_room *room, void **scratch)
{
    const size_t n_bytes =
        kl_larger(kl_product_scratch(a->fn, a->tokens), kl_product_scratch(a->fn, 1));
    *scratch = kl_take(room, (int64_t)n_bytes, 1);
    return kl_take_floats(room, width_of(a->args));
}

static void products(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    void *scratch = kl_room_of(&a->rooms, thread).base;
    const int64_t K = width_of(a->args), rows = rows_of(a->args),
                  blocks = kl_ceil_div(rows, a->block);
    for (int64_t j = begin; j < end; j++) {
        const int64_t t = j / blocks * a->tokens, r = j % blocks * a->block;
        kl_product(a->ctx, a->m + t * rows + r, rows, a->x + t * K, K, NULL,
                   kl_min(a->tokens, a->args->T - t), a->fn, 0, r, kl_min(a->block, rows - r),
                   scratch);
    }
}

static void scaled_product(const task *a, float *m, const float *x, float s, int thread)
{
    const int64_t K = width_of(a->args), rows = rows_of(a->args);
    kl_room room = kl_room_of(&a->rooms, thread);
    void *scratch;
    float *scaled = lay_out(a, &room, &scratch);
    for (int64_t k = 0; k < K; k++)
        scaled[k] = x[k] * s;
    kl_product(a->ctx, m, rows, scaled, K, NULL, 1, a->fn, 0, 0, rows, scratch);
}

static void weigh_token(const task *a, int64_t t, int thread)
{
    const kl_kernels *k = a->ctx->k;
    const int64_t n = a->args->n, D = a->args->D;
    const float *x = a->x + t * n * D;
    float *pre = a->m + t * rows_of(a->args), *post = a->post + t * n, *comb = a->comb + t * n * n,
          s;
    const float length = k->mhc_length(x, n * D, a->args->norm_eps, &s);
    if (s != 1.0f)
        scaled_product(a, pre, x, s, thread);
    k->mhc_logits(comb, pre + 2 * n, length, a->scale[2], a->base + 2 * n, n * n);
    k->mhc_logits(post, pre + n, length, a->scale[1], a->base + n, n);
    k->mhc_logits(pre, pre, length, a->scale[0], a->base, n);
    k->sigmoid(pre, pre, n);
    k->sigmoid(post, post, n);
    for (int64_t i = 0; i < n; i++) {
        pre[i] += a->args->eps;
        post[i] *= 2.0f;
    }
    k->mhc_sinkhorn(comb, n, a->args->eps, a->args->iters);
    k->mhc_collapse(a->y + t * D, x, pre, n, D);
}

static void weigh(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    for (int64_t t = begin; t < end; t++)
        weigh_token(a, t, thread);
}

kl_status cpu_mhc_pre(kl_ctx *ctx, float *y, float *post, float *comb, const float *x,
                      const kl_weight *fn, const float *base, const float *scale,
                      const kl_mhc_args *args)
{
    const int64_t T = args->T, rows = rows_of(args), tokens = kl_max(1, kl_min(TOKENS, T));
    task a = { .ctx = ctx,
               .y = y,
               .post = post,
               .comb = comb,
               .x = x,
               .fn = fn,
               .base = base,
               .scale = scale,
               .args = args,
               .block = kl_product_block(ctx, fn, tokens, rows),
               .tokens = tokens };
    kl_room room = { NULL, 0 };
    void *scratch;
    (void)lay_out(&a, &room, &scratch);
    KL_TRY(kl_take_rooms(ctx, &a.rooms, room.used));
    KL_SCRATCH(a.m, ctx, T * rows);
    if (ctx->arena.measuring || T == 0)
        return KL_OK;
    const int64_t tasks = kl_ceil_div(T, tokens) * kl_ceil_div(rows, a.block);
    KL_TRY(kl_product_for(ctx, tasks, 1, products, &a));
    return kl_product_for(ctx, T, kl_row_grain(2 * width_of(args)), weigh, &a);
}

static kl_status check_fn(kl_ctx *ctx, const kl_weight *fn, const kl_mhc_args *a)
{
    if (fn->transposed)
        return kl_fail(ctx, KL_ERR_ARG, "mhc_pre: fn is transposed; it must lie row by row");
    return kl_check_weight(ctx, "mhc_pre", "fn", fn, 1, rows_of(a), width_of(a));
}

kl_status kl_mhc_pre(kl_ctx *ctx, float *y, float *post, float *comb, const float *x,
                     const kl_weight *fn, const float *base, const float *scale,
                     const kl_mhc_args *args)
{
    const kl_mhc_args *a = args;
    KL_TRY(kl_check_streams(ctx, "mhc_pre", a->T, a->n, a->D));
    KL_TRY(check_fn(ctx, fn, a));
    KL_TRY(kl_check_rows(ctx, "mhc_pre", "fn", rows_of(a), width_of(a)));
    if (a->iters < 1 || a->iters > KL_MHC_ITERS)
        return kl_fail(ctx, KL_ERR_ARG, "mhc_pre: iters is %lld; it must be 1 to %d",
                       (long long)a->iters, KL_MHC_ITERS);
    if (!(a->norm_eps >= 0.0f))
        return kl_fail(ctx, KL_ERR_ARG, "mhc_pre: norm_eps is %g; it must be >= 0",
                       (double)a->norm_eps);
    if (!(a->eps >= 0.0f))
        return kl_fail(ctx, KL_ERR_ARG, "mhc_pre: eps is %g; it must be >= 0", (double)a->eps);
    const int64_t K = width_of(a), rows = rows_of(a);
    return KL_RUN(mhc_pre, a->T * (2 * K * rows + 4 * K + 4 * a->n * a->n * a->iters),
                  4 * a->T * (K + a->D + rows - a->n) + (int64_t)kl_type_bytes(fn->type, rows * K),
                  ctx, y, post, comb, x, fn, base, scale, args);
}
