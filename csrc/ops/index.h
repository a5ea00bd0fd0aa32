/* What index_pool, index_scores and index_select share: keys of pools in a cache, and who sees which. */
#ifndef KL_INDEX_H
#define KL_INDEX_H

#include "cache_rows.h"
#include "room.h"

/* A key is the `pool` rows of D / pool values of a cache that begin at position p pool: rows without gaps, of whole
 * blocks, pools that do not cross a page. */
kl_status kl_check_pools(kl_ctx *ctx, const char *op, const char *name, const kl_cache *cache,
                         int64_t D, const char *pool_name, int64_t pool) KL_CHECKED;

/* Positions that new token i of sequence n sees, and how many pools of it are complete then. */
static inline int64_t kl_index_seen(const kl_index_args *a, int64_t n, int64_t i)
{
    return a->positions[n] - (a->offsets[n + 1] - a->offsets[n]) + i + 1;
}

/* The most pools that a sequence has. */
static inline int64_t kl_index_most(const kl_index_args *a)
{
    int64_t most = 0;
    for (int64_t n = 0; n < a->N; n++)
        most = kl_max(most, a->positions[n] / a->pool);
    return most;
}

/* sequence of query t */
static inline int64_t kl_index_sequence(const kl_index_args *a, int64_t t)
{
    int64_t n = 0;
    while (a->offsets[n + 1] <= t)
        n++;
    return n;
}

/* index_scores.c: the scores of pools, made the same way in both ops. */
typedef struct kl_scoring {
    kl_ctx *ctx;
    const float *q;
    kl_cache keys;
    const float *weights;
    const kl_index_args *args;
    float scale;
    kl_rooms rooms;
} kl_scoring;
kl_status kl_scoring_prepare(kl_scoring *s) KL_CHECKED;

/* to[p]: of query t of sequence n the scores of pools p = first .. end - 1, which lie in one page */
void kl_score_pools(const kl_scoring *s, float *to, int64_t n, int64_t t, int64_t first,
                    int64_t end, int thread);

static inline int64_t kl_pools_a_page(const kl_index_args *a) { return KL_PAGE / a->pool; }

/* all arguments but the op's own */
kl_status kl_check_index(kl_ctx *ctx, const char *op, const kl_cache *keys,
                         const kl_index_args *args) KL_CHECKED;
/* flops and bytes, for profiles */
void kl_count_index(const kl_ctx *ctx, const kl_cache *keys, const kl_index_args *args,
                    int64_t *flops, int64_t *bytes);

#endif
