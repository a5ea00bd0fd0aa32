/* index_select: the positions that each query attends to, by its scores (index_scores, of scale 1):
 *   of the pools complete for the query the topk / pool with the largest scores, the lower pool among equals, or all
 *   where they are no more; each with its `pool` positions; then those of the incomplete pool, up to and with its own
 *   ids [T, topk + pool - 1], rising, -1 behind the last
 * NaN counts as the largest score, so that a key that is not a number shows. A query that sees at most topk + pool - 1
 * positions gets all of them, and nothing is scored for it.
 * The threshold is found by counting bytes of the ordered bits, from the highest on: four walks over the scores,
 * whatever they are. ids share no memory with the inputs. */
#include "index.h"

#include <string.h>

enum { BATCH = 64, BATCH_SCORES = 1 << 20 };

typedef struct selecting {
    kl_scoring scoring;
    int32_t *ids;
    float *scores;                 /* of a batch: [capacity, most] */
    int64_t most, capacity, pages; /* most pools that a query chooses of */
    int64_t first;                 /* query of the batch at hand */
} selecting;

/* Whether a query that sees so many positions has to choose. */
static bool chooses(const kl_index_args *a, int64_t seen)
{
    return seen / a->pool > a->topk / a->pool;
}

/* ---- the threshold ---- */

/* Rises with the score: NaN is above all, -0 is 0. */
static uint32_t rank_of(float score)
{
    uint32_t bits;
    const float x = score + 0.0f;
    memcpy(&bits, &x, sizeof bits);
    if (x != x)
        return UINT32_MAX;
    return bits >> 31 != 0 ? ~bits : bits | UINT32_C(1) << 31;
}

/* The k-th largest rank of n scores, and how many that have it are among the k. */
static uint32_t kth_rank(const float *scores, int64_t n, int64_t k, int64_t *equals)
{
    uint64_t high = 0; /* the bytes that are known */
    for (int shift = 24; shift >= 0; shift -= 8) {
        int64_t count[256] = { 0 };
        int byte = 255;
        for (int64_t i = 0; i < n; i++) {
            const uint64_t rank = rank_of(scores[i]);
            if (rank >> (shift + 8) == high)
                count[rank >> shift & 255]++;
        }
        while (count[byte] < k)
            k -= count[byte--];
        high = high << 8 | (uint64_t)byte;
    }
    *equals = k;
    return (uint32_t)high;
}

/* ---- a query ---- */

static void choose(int32_t *ids, const float *scores, int64_t seen, const kl_index_args *a)
{
    const int64_t complete = seen / a->pool;
    int64_t at = 0, equals = 0;
    uint32_t least = 0;
    const bool all = !chooses(a, seen);
    if (!all)
        least = kth_rank(scores, complete, a->topk / a->pool, &equals);
    for (int64_t p = 0; p < complete; p++) {
        const uint32_t rank = all ? 0 : rank_of(scores[p]);
        if (!all && (rank < least || (rank == least && equals-- <= 0)))
            continue;
        for (int64_t j = 0; j < a->pool; j++)
            ids[at++] = (int32_t)(p * a->pool + j);
    }
    for (int64_t s = complete * a->pool; s < seen; s++)
        ids[at++] = (int32_t)s;
    while (at < a->topk + a->pool - 1)
        ids[at++] = -1;
}

/* ---- a batch: a task scores the pools of one page for one query; then one chooses for a query ---- */

static void score_pages(void *arg, int64_t begin, int64_t end, int thread)
{
    const selecting *s = arg;
    const kl_index_args *a = s->scoring.args;
    const int64_t size = kl_pools_a_page(a);
    for (int64_t task = begin; task < end; task++) {
        const int64_t i = task / s->pages, t = s->first + i, n = kl_index_sequence(a, t);
        const int64_t seen = kl_index_seen(a, n, t - a->offsets[n]), p = task % s->pages * size;
        if (chooses(a, seen))
            kl_score_pools(&s->scoring, s->scores + i * s->most, n, t, p,
                           kl_min(p + size, seen / a->pool), thread);
    }
}

static void choose_rows(void *arg, int64_t begin, int64_t end, int thread)
{
    const selecting *s = arg;
    const kl_index_args *a = s->scoring.args;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const int64_t t = s->first + i, n = kl_index_sequence(a, t);
        choose(s->ids + t * (a->topk + a->pool - 1), s->scores + i * s->most,
               kl_index_seen(a, n, t - a->offsets[n]), a);
    }
}

/* The most pools that a query chooses of; 0 where none does. */
static int64_t most_to_score(const kl_index_args *a)
{
    int64_t most = 0;
    for (int64_t n = 0; n < a->N; n++)
        if (a->offsets[n + 1] > a->offsets[n] && chooses(a, a->positions[n]))
            most = kl_max(most, a->positions[n] / a->pool);
    return most;
}

kl_status cpu_index_select(kl_ctx *ctx, int32_t *ids, const float *q, kl_cache keys,
                           const float *weights, const kl_index_args *args)
{
    selecting s = { { ctx, q, keys, weights, args, 1.0f, { NULL, 0 } }, ids, NULL, 0, 0, 0, 0 };
    s.most = most_to_score(args);
    s.pages = kl_ceil_div(s.most, kl_pools_a_page(args));
    s.capacity = kl_max(1, kl_min(BATCH, BATCH_SCORES / kl_max(1, s.most)));
    s.capacity = kl_min(s.capacity, args->T);
    KL_TRY(kl_scoring_prepare(&s.scoring));
    /* no less at any shallower depth, as a plan measures the deepest alone */
    KL_SCRATCH(s.scores, ctx,
               kl_max(s.most, kl_min(kl_min(BATCH, args->T) * s.most, BATCH_SCORES)));
    if (ctx->arena.measuring)
        return KL_OK;
    for (s.first = 0; s.first < args->T; s.first += s.capacity) {
        const int64_t rows = kl_min(s.capacity, args->T - s.first);
        KL_TRY(kl_for(ctx, rows * s.pages, 1, score_pages, &s));
        KL_TRY(kl_for(ctx, rows, 1, choose_rows, &s));
    }
    return KL_OK;
}

static kl_status check_choice(kl_ctx *ctx, const kl_index_args *a)
{
    int64_t n;
    if (a->topk < a->pool || a->topk % a->pool != 0)
        return kl_fail(ctx, KL_ERR_ARG,
                       "index_select: topk is %lld; it must be a multiple of pool = %lld, and >= 1",
                       (long long)a->topk, (long long)a->pool);
    if (a->topk > INT32_MAX || !kl_mul(&n, a->T, a->topk + a->pool))
        return kl_fail(ctx, KL_ERR_SHAPE,
                       "index_select: topk is %lld for %lld queries, which is "
                       "too large",
                       (long long)a->topk, (long long)a->T);
    for (int64_t i = 0; i < a->N; i++)
        if (a->positions[i] > INT32_MAX)
            return kl_fail(ctx, KL_ERR_ARG, "index_select: positions[%lld] is %lld; ids are int32",
                           (long long)i, (long long)a->positions[i]);
    return KL_OK;
}

kl_status kl_index_select(kl_ctx *ctx, int32_t *ids, const float *q, kl_cache keys,
                          const float *weights, const kl_index_args *args)
{
    int64_t flops, bytes;
    KL_TRY(kl_check_index(ctx, "index_select", &keys, args));
    KL_TRY(check_choice(ctx, args));
    kl_count_index(ctx, &keys, args, &flops, &bytes);
    if (most_to_score(args) == 0) /* all positions, without a score */
        flops = bytes = 0;
    return KL_RUN(index_select, flops, bytes, ctx, ids, q, keys, weights, args);
}
