/* index_pool: one key for each P consecutive positions of a sequence, from its first on: a softmax over the positions of
 * the pool, in each channel d,
 *   p[j, d] = softmax_j(gate[j, d] + ape[j, d])      key[d] = sum_j p[j, d] k[j, d]
 *   k, gate: caches of D values a position, of one type and bytes a row     ape [P, D]
 *   pooled: a cache of D / P values a position; the key of pool p is rows p P .. p P + P - 1, one behind the other
 * Computed are the pools whose last position is among the new ones, start[n] .. start[n] + new tokens - 1; complete pools
 * only. So tokens give the same bytes however they are split in calls.
 * Order of sums: j rising, of exponentials and of products by fma. A finite key that the cache cannot hold is an error,
 * and then nothing is written. Budget: kimi_linear/diff/budgets. */
#include "index.h"

#include <math.h>
#include <stdatomic.h>

typedef struct pooling {
    const kl_kernels *k;
    kl_cache pooled, keys, gate;
    const float *ape;
    const int64_t *start;
    int64_t *pool_end; /* [N]: new pools of the sequences up to n */
    int64_t N, D, P;
    kl_rooms rooms;
    atomic_bool too_large;
} pooling;

/* One thread's scratch: rows of a pool, widened, and its key. */
typedef struct room {
    float *k, *gate, *key;
} room;

static size_t lay_out(room *r, kl_room at, const pooling *a)
{
    const int64_t widened = a->keys.type == KL_F32 ? 0 : a->P * a->D;
    r->k = kl_take_floats(&at, widened);
    r->gate = kl_take_floats(&at, widened);
    r->key = kl_take_floats(&at, a->D);
    return at.used;
}

/* The key of new pool i, into the room; where it belongs. */
static void *pool_key(const pooling *a, const room *r, int64_t i)
{
    int64_t n = 0;
    while (a->pool_end[n] <= i)
        n++;
    const int64_t before = n > 0 ? a->pool_end[n - 1] : 0;
    const int64_t position = (a->start[n] / a->P + i - before) * a->P;
    const kl_rows k = kl_cache_rows(a->k, &a->keys, n, position, a->P, 0, a->D, r->k),
                  gate = kl_cache_rows(a->k, &a->gate, n, position, a->P, 0, a->D, r->gate);
    a->k->index_pool(r->key, k.data, gate.data, k.stride, a->ape, a->P, a->D);
    return (char *)a->pooled.page[n][position / KL_PAGE] + a->pooled.offset
           + (size_t)(position % KL_PAGE) * a->pooled.row_bytes;
}

static void check_keys(void *arg, int64_t begin, int64_t end, int thread)
{
    pooling *a = arg;
    room r;
    lay_out(&r, kl_room_of(&a->rooms, thread), a);
    for (int64_t i = begin; i < end; i++) {
        pool_key(a, &r, i);
        if (a->k->find_large(r.key, a->D, kl_cache_limit(a->pooled.type)) < a->D)
            atomic_store(&a->too_large, true);
    }
}

static void store_keys(void *arg, int64_t begin, int64_t end, int thread)
{
    const pooling *a = arg;
    room r;
    lay_out(&r, kl_room_of(&a->rooms, thread), a);
    for (int64_t i = begin; i < end; i++) {
        void *to = pool_key(a, &r, i);
        kl_cache_store(a->k, a->pooled.type, to, r.key, a->D);
    }
}

/* The sentence of the first key that is too large. */
static kl_status fail_key(kl_ctx *ctx, const pooling *a, int64_t pools)
{
    room r;
    int64_t i = 0, d = a->D;
    lay_out(&r, kl_room_of(&a->rooms, 0), a);
    for (; i < pools && d == a->D; i++) {
        pool_key(a, &r, i);
        d = a->k->find_large(r.key, a->D, kl_cache_limit(a->pooled.type));
    }
    return kl_fail(
        ctx, KL_ERR_ARG,
        "index_pool: keys[%lld, %lld] is %g, too large for a %s cache (%s at most); use a "
        "float32 cache",
        (long long)i - 1, (long long)d, (double)r.key[d],
        a->pooled.type == KL_F16 ? "float16" : "q8_0",
        a->pooled.type == KL_F16 ? "65504" : "8319008");
}

kl_status cpu_index_pool(kl_ctx *ctx, kl_cache pooled, kl_cache k, kl_cache gate, const float *ape,
                         const int64_t *offsets, const int64_t *start, int64_t N, int64_t T,
                         int64_t D, int64_t P)
{
    pooling a = { ctx->k, pooled, k, gate, ape, start, NULL, N, D, P, { NULL, 0 }, false };
    room r;
    (void)T;
    KL_SCRATCH(a.pool_end, ctx, N);
    KL_TRY(kl_take_rooms(ctx, &a.rooms, lay_out(&r, (kl_room){ 0 }, &a)));
    if (ctx->arena.measuring)
        return KL_OK;
    int64_t pools = 0;
    for (int64_t n = 0; n < N; n++)
        a.pool_end[n] = pools += (start[n] + offsets[n + 1] - offsets[n]) / P - start[n] / P;
    const int64_t grain = kl_row_grain(16 * P * D);
    if (pooled.type != KL_F32) {
        KL_TRY(kl_for(ctx, pools, grain, check_keys, &a));
        if (atomic_load(&a.too_large))
            return fail_key(ctx, &a, pools);
    }
    return kl_for(ctx, pools, grain, store_keys, &a);
}

kl_status kl_check_pools(kl_ctx *ctx, const char *op, const char *name, const kl_cache *cache,
                         int64_t D, const char *pool_name, int64_t pool)
{
    if (pool < 1 || KL_PAGE % pool != 0)
        return kl_fail(ctx, KL_ERR_ARG, "%s: %s is %lld; it must be >= 1 and divide %d", op,
                       pool_name, (long long)pool, KL_PAGE);
    if (D < 1 || D % pool != 0)
        return kl_fail(ctx, KL_ERR_SHAPE, "%s: D is %lld; it must be a multiple of %s = %lld", op,
                       (long long)D, pool_name, (long long)pool);
    KL_TRY(kl_check_cache(ctx, op, name, cache, D / pool));
    if (cache->row_bytes != kl_type_bytes(cache->type, D / pool))
        return kl_fail(ctx, KL_ERR_SHAPE,
                       "%s: %s has %zu bytes a row; its rows must follow each other without gaps, "
                       "%zu each",
                       op, name, cache->row_bytes, kl_type_bytes(cache->type, D / pool));
    return KL_OK;
}

kl_status kl_index_pool(kl_ctx *ctx, kl_cache pooled, kl_cache k, kl_cache gate, const float *ape,
                        const int64_t *offsets, const int64_t *start, int64_t N, int64_t T,
                        int64_t D, int64_t P)
{
    KL_TRY(kl_check_rows(ctx, "index_pool", "k", T, D));
    KL_TRY(kl_check_offsets(ctx, "index_pool", offsets, N, T));
    KL_TRY(kl_check_pools(ctx, "index_pool", "pooled", &pooled, D, "P", P));
    KL_TRY(kl_check_cache(ctx, "index_pool", "k", &k, D));
    KL_TRY(kl_check_cache(ctx, "index_pool", "gate", &gate, D));
    if (gate.type != k.type || gate.row_bytes != k.row_bytes)
        return kl_fail(ctx, KL_ERR_DTYPE,
                       "index_pool: gate is of type %s, %zu bytes a row; it must be as k, %s and "
                       "%zu",
                       kl_type_name(gate.type), gate.row_bytes, kl_type_name(k.type), k.row_bytes);
    for (int64_t n = 0; n < N; n++)
        if (start[n] < 0 || start[n] > KL_MAX_TOKENS)
            return kl_fail(ctx, KL_ERR_ARG, "index_pool: start[%lld] is %lld; it must be %s",
                           (long long)n, (long long)start[n],
                           start[n] < 0 ? ">= 0" : "at most 2^40");
    return KL_RUN(index_pool, 8 * T * D, T * (int64_t)(2 * k.row_bytes + pooled.row_bytes), ctx,
                  pooled, k, gate, ape, offsets, start, N, T, D, P);
}
