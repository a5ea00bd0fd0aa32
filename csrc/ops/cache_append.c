/* cache_append: rows x of each sequence behind its first start[n] positions, in the cache's type.
 *   x [T, D]     cache rows D wide: float32 as they are, float16 to nearest even, or Q8_0, blocks of
 *                32 values (quant/q8_0.c)
 * NaN and infinity are stored; in Q8_0 they make NaN of their block. A finite value that the cache
 * cannot hold is an error, and then nothing is written. */
#include "../cpu/kernels.h"
#include "../quant/quant.h"
#include "cache_rows.h"
#include "ops.h"

#include <math.h>
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

/* The size from which on a finite value cannot be stored: float16 rounds it to infinity, or the
 * scale of its block, a 127th of it. */
float kl_cache_limit(kl_type type) { return type == KL_Q8_0 ? 127.0f * 65520.0f : 65520.0f; }

static void check_rows(void *arg, int64_t begin, int64_t end, int thread)
{
    task *a = arg;
    const int64_t n = (end - begin) * a->D;
    (void)thread;
    if (a->k->find_large(a->x + begin * a->D, n, kl_cache_limit(a->cache.type)) < n)
        atomic_store(&a->too_large, true);
}

/* As quant/q8_0.c quantises, but for blocks that it does not take: with a value that is not finite
 * (NaN), and so small that the inverse of the scale overflows (zeros, as their scale is in float16). */
static void store_q8_0(char *to, const float *x, int64_t n)
{
    static const uint16_t nan = 0x7e00;
    const int64_t values = kl_type_block(KL_Q8_0);
    const size_t bytes = kl_type_bytes(KL_Q8_0, values);
    for (int64_t i = 0; i < n; i += values, x += values, to += bytes) {
        bool finite = true;
        float largest = 0.0f;
        for (int64_t j = 0; j < values; j++) {
            finite = finite && isfinite(x[j]);
            largest = fmaxf(largest, fabsf(x[j]));
        }
        if (finite && largest >= 0x1p-120f) {
            kl_quantize_q8_0(to, x, 1);
            continue;
        }
        memset(to, 0, bytes);
        if (!finite)
            memcpy(to, &nan, sizeof nan);
    }
}

void kl_cache_store(const kl_kernels *k, kl_type type, void *to, const float *x, int64_t n)
{
    if (type == KL_F16)
        k->store_f16(to, x, n);
    else if (type == KL_Q8_0)
        store_q8_0(to, x, n);
    else
        memcpy(to, x, (size_t)n * sizeof *x);
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
        kl_cache_store(a->k, a->cache.type, to, a->x + t * a->D, a->D);
    }
}

kl_status cpu_cache_append(kl_ctx *ctx, kl_cache cache, const float *x, const int64_t *offsets,
                           const int64_t *start, int64_t N, int64_t T, int64_t D)
{
    task a = { ctx->k, cache, x, offsets, start, N, D, false };
    if (cache.type != KL_F32) {
        KL_TRY(kl_for(ctx, T, kl_row_grain(D), check_rows, &a));
        if (atomic_load(&a.too_large)) {
            const int64_t i = ctx->k->find_large(x, T * D, kl_cache_limit(cache.type));
            return kl_fail(
                ctx, KL_ERR_ARG,
                "cache_append: x[%lld, %lld] is %g, too large for a %s cache (%s at most); "
                "use a float32 cache",
                (long long)(i / D), (long long)(i % D), (double)x[i],
                cache.type == KL_F16 ? "float16" : "q8_0",
                cache.type == KL_F16 ? "65504" : "8319008");
        }
    }
    return kl_for(ctx, T, kl_row_grain(D), store_rows, &a);
}

kl_status kl_cache_append(kl_ctx *ctx, kl_cache cache, const float *x, const int64_t *offsets,
                          const int64_t *start, int64_t N, int64_t T, int64_t D)
{
    KL_TRY(kl_check_rows(ctx, "cache_append", "x", T, D));
    KL_TRY(kl_check_offsets(ctx, "cache_append", offsets, N, T));
    KL_TRY(kl_check_cache(ctx, "cache_append", "cache", &cache, D));
    for (int64_t n = 0; n < N; n++)
        if (start[n] < 0 || start[n] > KL_MAX_TOKENS)
            return kl_fail(ctx, KL_ERR_ARG, "cache_append: start[%lld] is %lld; it must be %s",
                           (long long)n, (long long)start[n],
                           start[n] < 0 ? ">= 0" : "at most 2^40");
    if (kl_is_measured(ctx))
        return KL_OK;
    return KL_RUN(cache_append, 0, T * (4 * D + (int64_t)cache.row_bytes), ctx, cache, x, offsets,
                  start, N, T, D);
}
