/* index_scores: how much each query would look at each pool of positions of its sequence:
 *   scores[t, p] = scale * sum_h weights[t, h] max(0, q[t, h] . keys[p])
 *   scores [T, most pools]     q [T, H, D]     weights [T, H]     keys: a cache, as index_pool writes it
 * -infinity where pool p is not complete for the query: its last position is behind the query's own. Query i of a
 * sequence's L is at position positions - L + i. With pool = 1 there is a key for each position (DeepSeek-V3.2).
 * Order of sums: a dot as linear's, 16 lanes of fma over d, then the halving tree; fma over h, rising; then the scale.
 * float32 whatever the context's activations are. NaN and infinity go through. Budget: kimi_linear/diff/budgets. */
#include "index.h"

#include <math.h>

/* One thread's scratch: the heads of a query by address, widened keys of a block, and their dots. */
typedef struct room {
    const float **head;
    float *keys, *dots;
} room;

static size_t lay_out(room *r, kl_room at, const kl_scoring *s)
{
    const kl_index_args *a = s->args;
    r->head = kl_take(&at, a->H, sizeof *r->head);
    r->keys = kl_take_floats(&at, s->keys.type == KL_F32 ? 0 : KL_BLOCK * a->D);
    r->dots = kl_take_floats(&at, a->H * KL_BLOCK);
    return at.used;
}

kl_status kl_scoring_prepare(kl_scoring *s)
{
    room r;
    return kl_take_rooms(s->ctx, &s->rooms, lay_out(&r, (kl_room){ 0 }, s));
}

void kl_score_pools(const kl_scoring *s, float *to, int64_t n, int64_t t, int64_t first,
                    int64_t end, int thread)
{
    const kl_index_args *a = s->args;
    const kl_kernels *k = s->ctx->k;
    room r;
    lay_out(&r, kl_room_of(&s->rooms, thread), s);
    for (int64_t h = 0; h < a->H; h++)
        r.head[h] = s->q + (t * a->H + h) * a->D;
    for (int64_t p = first; p < end; p += KL_BLOCK) {
        const int64_t count = kl_min(KL_BLOCK, end - p);
        /* the keys of a page are one row of the cache, as far as its types know */
        const kl_rows keys = kl_cache_rows(k, &s->keys, n, p * a->pool, 1, 0, count * a->D, r.keys);
        k->dot_cached(r.dots, KL_BLOCK, r.head, a->H, keys.data, a->D, count, a->D);
        k->index_sum(to + p, r.dots, KL_BLOCK, s->weights + t * a->H, a->H, count, s->scale);
    }
}

typedef struct task {
    kl_scoring scoring;
    float *scores;
    int64_t most, pages;
} task;

/* a task: the pools of one page, for one query */
static void pages(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    const kl_index_args *args = a->scoring.args;
    const int64_t size = kl_pools_a_page(args);
    for (int64_t i = begin; i < end; i++) {
        const int64_t t = i / a->pages, first = i % a->pages * size;
        const int64_t n = kl_index_sequence(args, t), last = kl_min(first + size, a->most);
        const int64_t complete = kl_index_seen(args, n, t - args->offsets[n]) / args->pool;
        float *to = a->scores + t * a->most;
        kl_score_pools(&a->scoring, to, n, t, first, kl_min(last, complete), thread);
        for (int64_t p = kl_max(first, complete); p < last; p++)
            to[p] = -INFINITY;
    }
}

kl_status cpu_index_scores(kl_ctx *ctx, float *scores, const float *q, kl_cache keys,
                           const float *weights, const kl_index_args *args)
{
    task a = { { ctx, q, keys, weights, args, args->scale, { NULL, 0 } }, scores, 0, 0 };
    a.most = kl_index_most(args);
    a.pages = kl_ceil_div(a.most, kl_pools_a_page(args));
    KL_TRY(kl_scoring_prepare(&a.scoring));
    if (ctx->arena.measuring)
        return KL_OK;
    return kl_for(ctx, args->T * a.pages, 1, pages, &a);
}

kl_status kl_check_index(kl_ctx *ctx, const char *op, const kl_cache *keys, const kl_index_args *a)
{
    int64_t n;
    if (a->T < 0 || a->H < 1 || a->D < 1 || a->D > INT32_MAX || !kl_mul(&n, a->H, KL_BLOCK * a->D)
        || !kl_mul(&n, a->T, n))
        return kl_fail(
            ctx, KL_ERR_SHAPE,
            "%s: q is [T, H, D] = [%lld, %lld, %lld]; T must be >= 0, the others >= 1, and "
            "it must not be too large",
            op, (long long)a->T, (long long)a->H, (long long)a->D);
    KL_TRY(kl_check_offsets(ctx, op, a->offsets, a->N, a->T));
    KL_TRY(kl_check_positions(ctx, op, a->positions, a->offsets, a->N));
    return kl_check_pools(ctx, op, "keys", keys, a->D, "pool", a->pool);
}

void kl_count_index(const kl_ctx *ctx, const kl_cache *keys, const kl_index_args *a, int64_t *flops,
                    int64_t *bytes)
{
    *flops = *bytes = 0;
    if (ctx->arena.measuring) /* a plan's context may be longer than any work that can be counted */
        return;
    *bytes = 4 * a->T * a->H * (a->D + 1);
    for (int64_t n = 0; n < a->N; n++) {
        const int64_t L = a->offsets[n + 1] - a->offsets[n], S = a->positions[n];
        *flops += (L * (S - L) + L * (L + 1) / 2) / a->pool * 2 * a->H * (a->D + 1);
        *bytes += S * (int64_t)keys->row_bytes;
    }
}

kl_status kl_index_scores(kl_ctx *ctx, float *scores, const float *q, kl_cache keys,
                          const float *weights, const kl_index_args *args)
{
    int64_t flops, bytes, n;
    KL_TRY(kl_check_index(ctx, "index_scores", &keys, args));
    if (!kl_mul(&n, args->T, kl_index_most(args)))
        return kl_fail(ctx, KL_ERR_SHAPE,
                       "index_scores: scores are [%lld, %lld], which is too large",
                       (long long)args->T, (long long)kl_index_most(args));
    if (!isfinite(args->scale))
        return kl_fail(ctx, KL_ERR_ARG, "index_scores: scale is %g; it must be finite",
                       (double)args->scale);
    kl_count_index(ctx, &keys, args, &flops, &bytes);
    return KL_RUN(index_scores, flops, bytes, ctx, scores, q, keys, weights, args);
}
