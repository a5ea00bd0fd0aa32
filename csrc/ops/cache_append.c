/* cache_append: rows x of each sequence behind its first start[n] positions, in the cache's type.
 *   x [T, D]     cache rows D wide, float32 as they are or float16 to nearest even
 * NaN and infinity are stored; a finite value that float16 cannot hold is an error, and then
 * nothing is written. */
#include "../cpu/kernels.h"
#include "ops.h"

#include <stdatomic.h>
#include <string.h>

typedef struct task {
    const kl_kernels *k;
    kl_cache cache;
    const float *x;
    const int64_t *offsets, *start;
    int64_t N, D;
    atomic_bool too_large;
} task;

static void check_rows(void *arg, int64_t begin, int64_t end, int thread)
{
    task *a = arg;
    const int64_t n = (end - begin) * a->D;
    (void)thread;
    if (a->k->f16_overflow(a->x + begin * a->D, n) < n)
        atomic_store(&a->too_large, true);
}

static void store_rows(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    int64_t n = 0;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        while (a->offsets[n + 1] <= t)
            n++;
        const int64_t position = a->start[n] + t - a->offsets[n];
        char *to = (char *)a->cache.page[n][position / KL_PAGE] + a->cache.offset
                   + (size_t)(position % KL_PAGE) * a->cache.row_bytes;
        const float *from = a->x + t * a->D;
        if (a->cache.type == KL_F16)
            a->k->store_f16((uint16_t *)(void *)to, from, a->D);
        else
            memcpy(to, from, (size_t)a->D * sizeof *from);
    }
}

kl_status cpu_cache_append(kl_ctx *ctx, kl_cache cache, const float *x, const int64_t *offsets,
                           const int64_t *start, int64_t N, int64_t T, int64_t D)
{
    task a = { ctx->k, cache, x, offsets, start, N, D, false };
    if (cache.type == KL_F16) {
        KL_TRY(kl_for(ctx, T, kl_row_grain(D), check_rows, &a));
        if (atomic_load(&a.too_large)) {
            const int64_t i = ctx->k->f16_overflow(x, T * D);
            return kl_fail(
                ctx, KL_ERR_ARG,
                "cache_append: x[%lld, %lld] is %g, too large for a float16 cache (65504 at most); "
                "use a float32 cache",
                (long long)(i / D), (long long)(i % D), (double)x[i]);
        }
    }
    return kl_for(ctx, T, kl_row_grain(D), store_rows, &a);
}

kl_status kl_cache_append(kl_ctx *ctx, kl_cache cache, const float *x, const int64_t *offsets,
                          const int64_t *start, int64_t N, int64_t T, int64_t D)
{
    KL_TRY(kl_check_rows(ctx, "cache_append", "x", T, D));
    KL_TRY(kl_check_offsets(ctx, "cache_append", offsets, N, T));
    if (cache.type != KL_F32 && cache.type != KL_F16)
        return kl_fail(ctx, KL_ERR_DTYPE,
                       "cache_append: the cache has storage type %d; it must be F32 or F16",
                       (int)cache.type);
    if (cache.row_bytes < kl_type_bytes(cache.type, D))
        return kl_fail(ctx, KL_ERR_SHAPE,
                       "cache_append: the cache has %zu bytes a row; a row needs %zu",
                       cache.row_bytes, kl_type_bytes(cache.type, D));
    for (int64_t n = 0; n < N; n++)
        if (start[n] < 0)
            return kl_fail(ctx, KL_ERR_ARG, "cache_append: start[%lld] is %lld; it must be >= 0",
                           (long long)n, (long long)start[n]);
    if (ctx->arena.measuring)
        return KL_OK;
    return KL_RUN(cache_append, 0, T * (4 * D + (int64_t)cache.row_bytes), ctx, cache, x, offsets,
                  start, N, T, D);
}
