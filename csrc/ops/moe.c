/* moe: y[t] = sum_i weights[t, i] * w_down[e] h + shared[t],  e = ids[t, i]
 *   h = swiglu of w_gate[e] x[t] and w_up[e] x[t], with its limit, or situ where there are betas (elementwise.c)
 *   x, y [T, D], y overlaps no input     ids, weights [T, k], ids ascending in each row
 *   w_gate, w_up [E of F x D], w_down [E of D x F] in any storage type     shared [T, D] or NULL
 *   A token's experts are added in ascending id by fma from +0, then shared: the same bytes in any batch.
 *   Budget: docs/math.md#moe.
 *
 * Tokens are grouped by expert, so that each expert is one matrix product over all its tokens: a pair is a
 * token and one of its experts; pairs are ordered by expert, then token. Two hand-outs of work a pass:
 *   1  (expert, block of F):  h[pair] = swiglu or situ of its products with x, rows of x taken by index
 *   2  (block of D):          experts in ascending order, w_down h added to the rows of y
 * Only h [pairs, F] is kept whole; a pass is at most PASS tokens, which bounds it and changes no byte. */
#include "ops.h"

#include "product.h"
#include "room.h"

#include <string.h>

enum {
    PASS = 1024,    /* tokens: h is 32 MiB for k = 8, F = 1024 */
    MAX_BLOCK = 256 /* rows of a matrix in a task; a part of a narrow row is as wide */
};

_Static_assert((int)MAX_BLOCK == (int)KL_NARROW_PART, "a block of h is made narrow in one");

typedef struct pass {
    kl_ctx *ctx;
    float *y;
    kl_operand x; /* [T, D] */
    const kl_weight *w_gate, *w_up, *w_down;
    const float *shared;
    const kl_situ_betas *situ; /* NULL: swiglu */
    float limit;               /* swiglu's; 0: none */
    int64_t T, D, F;

    int32_t *token; /* [pairs] */
    float *weight;  /* [pairs] */
    int64_t *begin; /* [E + 1] first pair of each expert */
    int32_t *used;  /* [n_used] experts that have pairs, ascending */
    int64_t n_used;
    kl_operand h; /* [pairs, F], made in h_to and narrow_h */
    float *h_to;
    char *narrow_h; /* NULL where w_down takes float32 */
    int64_t f_block, d_block;
    kl_rooms rows;     /* [T, MAX_BLOCK] */
    kl_rooms products; /* their scratch */
} pass;

/* Pairs by expert, then token: a counting sort. */
static void group(pass *p, const int32_t *ids, const float *weights, int64_t k)
{
    const int64_t E = p->w_gate->n, n = p->T * k;
    memset(p->begin, 0, (size_t)(E + 1) * sizeof *p->begin);
    for (int64_t i = 0; i < n; i++)
        p->begin[ids[i] + 1]++;
    p->n_used = 0;
    for (int64_t e = 0; e < E; e++) {
        if (p->begin[e + 1] > 0)
            p->used[p->n_used++] = (int32_t)e;
        p->begin[e + 1] += p->begin[e];
    }
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = p->begin[ids[i]]++;
        p->token[at] = (int32_t)(i / k);
        p->weight[at] = weights[i];
    }
    memmove(p->begin + 1, p->begin, (size_t)E * sizeof *p->begin);
    p->begin[0] = 0;
}

static void activate(const pass *p, float *h, const float *up, int64_t n)
{
    if (p->situ != NULL)
        p->ctx->k->situ(h, h, up, n, p->situ);
    else
        p->ctx->k->swiglu(h, h, up, n, p->limit);
}

static void hidden(void *arg, int64_t begin, int64_t end, int thread)
{
    const pass *p = arg;
    float *up = kl_room_of(&p->rows, thread).base;
    void *scratch = kl_room_of(&p->products, thread).base;
    const int64_t blocks = kl_ceil_div(p->F, p->f_block);
    for (int64_t j = begin; j < end; j++) {
        const int32_t e = p->used[j / blocks];
        const int64_t f = j % blocks * p->f_block, n = kl_min(p->f_block, p->F - f);
        const int64_t first = p->begin[e], T = p->begin[e + 1] - first;
        const int32_t *index = p->token + first;
        float *gate = p->h_to + first * p->F + f;
        kl_operand_product(p->ctx, gate, p->F, &p->x, 0, index, T, p->w_gate, e, f, n, scratch);
        kl_operand_product(p->ctx, up, n, &p->x, 0, index, T, p->w_up, e, f, n, scratch);
        for (int64_t t = 0; t < T; t++) {
            float *h = gate + t * p->F;
            activate(p, h, up + t * n, n);
            if (p->narrow_h != NULL)
                kl_narrow_part(p->ctx, p->narrow_h + (size_t)(first + t) * p->h.narrow_bytes, f, h,
                               n);
        }
    }
}

/* Adds expert e to columns d .. d + n of its tokens' results. */
static void add_expert(const pass *p, int32_t e, int64_t d, int64_t n, float *out, void *scratch)
{
    const int64_t first = p->begin[e], T = p->begin[e + 1] - first;
    kl_operand_product(p->ctx, out, n, &p->h, first, NULL, T, p->w_down, e, d, n, scratch);
    for (int64_t t = 0; t < T; t++)
        p->ctx->k->add_scaled(p->y + p->token[first + t] * p->D + d, out + t * n,
                              p->weight[first + t], n);
}

static void results(void *arg, int64_t begin, int64_t end, int thread)
{
    const pass *p = arg;
    float *out = kl_room_of(&p->rows, thread).base;
    void *scratch = kl_room_of(&p->products, thread).base;
    for (int64_t j = begin; j < end; j++) {
        const int64_t d = j * p->d_block, n = kl_min(p->d_block, p->D - d);
        for (int64_t t = 0; t < p->T; t++)
            memset(p->y + t * p->D + d, 0, (size_t)n * sizeof *p->y);
        for (int64_t i = 0; i < p->n_used; i++)
            add_expert(p, p->used[i], d, n, out, scratch);
        for (int64_t t = 0; p->shared != NULL && t < p->T; t++) {
            float *y = p->y + t * p->D + d;
            p->ctx->k->add(y, y, p->shared + t * p->D + d, n);
        }
    }
}

static int64_t block_of(const pass *p, const kl_weight *w, int64_t T, int64_t rows)
{
    return kl_min(MAX_BLOCK, kl_operand_block(p->ctx, w, T, rows));
}

static kl_status run(pass *p, const int32_t *ids, const float *weights, int64_t k)
{
    group(p, ids, weights, k);
    const int64_t T =
        kl_ceil_div(p->T * k, kl_max(1, p->n_used)); /* rows of an expert, on average */
    p->f_block = p->narrow_h != NULL ? MAX_BLOCK : block_of(p, p->w_gate, T, p->n_used * p->F);
    /* a block of D goes through all experts, so blocks are kept small enough to balance */
    p->d_block = block_of(p, p->w_down, T, kl_max(1, p->D / 4));
    KL_TRY(kl_product_for(p->ctx, p->n_used * kl_ceil_div(p->F, p->f_block), 1, hidden, p));
    return kl_product_for(p->ctx, kl_ceil_div(p->D, p->d_block), 1, results, p);
}

static kl_status check_ids(kl_ctx *ctx, const int32_t *ids, int64_t T, int64_t k, int64_t E)
{
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < k; i++) {
            const int32_t e = ids[t * k + i];
            if (e < 0 || e >= E)
                return kl_fail(
                    ctx, KL_ERR_ARG,
                    "moe: ids[%lld, %lld] (token, slot) is %d; it must be 0 <= id < %lld",
                    (long long)t, (long long)i, (int)e, (long long)E);
            if (i > 0 && e <= ids[t * k + i - 1])
                return kl_fail(ctx, KL_ERR_ARG,
                               "moe: ids[%lld, %lld] (token, slot) is %d after %d; the ids of a "
                               "token must ascend",
                               (long long)t, (long long)i, (int)e, (int)ids[t * k + i - 1]);
        }
    return KL_OK;
}

kl_status cpu_moe(kl_ctx *ctx, float *y, const float *x, const int32_t *ids, const float *weights,
                  const kl_weight *w_gate, const kl_weight *w_up, const kl_weight *w_down,
                  const float *shared, int64_t T, int64_t D, int64_t F, int64_t k,
                  const kl_situ_betas *situ, float limit)
{
    const int64_t most_T = kl_min(T, PASS), E = w_gate->n, pairs = most_T * k;
    pass p = { .ctx = ctx,
               .w_gate = w_gate,
               .w_up = w_up,
               .w_down = w_down,
               .situ = situ,
               .limit = limit,
               .D = D,
               .F = F };
    const size_t in_bytes =
        kl_larger(kl_operand_scratch(ctx, w_gate, most_T), kl_operand_scratch(ctx, w_up, most_T));
    KL_SCRATCH(p.token, ctx, pairs);
    KL_SCRATCH(p.weight, ctx, pairs);
    KL_SCRATCH(p.begin, ctx, E + 1);
    KL_SCRATCH(p.used, ctx, E);
    KL_SCRATCH(p.h_to, ctx, pairs * F);
    KL_TRY(kl_take_rooms(ctx, &p.rows, (size_t)(most_T * MAX_BLOCK) * sizeof(float)));
    KL_TRY(kl_take_rooms(ctx, &p.products,
                         kl_larger(in_bytes, kl_operand_scratch(ctx, w_down, most_T))));
    char *narrow_x = NULL;
    const size_t x_bytes = kl_narrow_bytes(ctx, D), h_bytes = kl_narrow_bytes(ctx, F);
    if (kl_product_is_narrow(ctx, w_gate) || kl_product_is_narrow(ctx, w_up))
        KL_SCRATCH(narrow_x, ctx, (size_t)most_T * x_bytes);
    if (kl_product_is_narrow(ctx, w_down))
        KL_SCRATCH(p.narrow_h, ctx, (size_t)pairs * h_bytes);
    p.h = (kl_operand){ p.h_to, F, p.narrow_h, h_bytes };
    if (ctx->arena.measuring)
        return KL_OK;
    KL_TRY(check_ids(ctx, ids, T, k, E));
    for (int64_t t = 0; t < T; t += PASS) {
        p.y = y + t * D;
        p.x = (kl_operand){ x + t * D, D, narrow_x, x_bytes };
        p.shared = shared != NULL ? shared + t * D : NULL;
        p.T = kl_min(PASS, T - t);
        if (narrow_x != NULL)
            KL_TRY(kl_narrow_make(ctx, narrow_x, p.x.x, p.T, D));
        KL_TRY(run(&p, ids + t * k, weights + t * k, k));
    }
    return KL_OK;
}

kl_status kl_moe(kl_ctx *ctx, float *y, const float *x, const int32_t *ids, const float *weights,
                 const kl_weight *w_gate, const kl_weight *w_up, const kl_weight *w_down,
                 const float *shared, int64_t T, int64_t D, int64_t F, int64_t k,
                 const kl_situ_betas *situ, float limit)
{
    const int64_t E = w_gate->n;
    KL_TRY(kl_check_rows(ctx, "moe", "x", T, D));
    KL_TRY(kl_check_rows(ctx, "moe", "w_gate", F, D));
    KL_TRY(kl_check_weight(ctx, "moe", "w_gate", w_gate, E, F, D));
    KL_TRY(kl_check_weight(ctx, "moe", "w_up", w_up, E, F, D));
    KL_TRY(kl_check_weight(ctx, "moe", "w_down", w_down, E, D, F));
    if (k < 1 || k > E || E > INT32_MAX)
        return kl_fail(ctx, KL_ERR_ARG, "moe: k is %lld of %lld experts; it must be 1 <= k <= E",
                       (long long)k, (long long)E);
    if (situ != NULL)
        KL_TRY(kl_check_betas(ctx, "moe", situ));
    KL_TRY(kl_check_limit(ctx, "moe", limit));
    if (situ != NULL && limit != 0.0f)
        return kl_fail(ctx, KL_ERR_ARG,
                       "moe: limit is %g beside situ; it must be 0, it is SwiGLU's", (double)limit);
    const int64_t experts = kl_min(E, T * k); /* read at most */
    return KL_RUN(moe, 6 * T * k * D * F,
                  8 * T * D + experts * (int64_t)kl_type_bytes(w_gate->type, 3 * D * F), ctx, y, x,
                  ids, weights, w_gate, w_up, w_down, shared, T, D, F, k, situ, limit);
}
