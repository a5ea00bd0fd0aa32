/* cache_append (ops/cache_append.c): the CPU's bytes.
 *   v1  one value a thread, or one block of Q8_0; its token and sequence by division and search.
 *   v2  one block a token; a team a block of Q8_0 (launched).
 * float16 and Q8_0 cannot hold every finite value: the first that is too large is noted (runtime.h), and its cache is
 * not to be read. */
#include "cache.h"
#include "reduce.h"

namespace
{

const char *const what = "cache_append: x";
const int BLOCK = 256, TEAMS = BLOCK / KL_TEAM, VALUES = 32;

struct rows {
    const float *x;
    const int64_t *offsets, *start;
    int64_t N, T, D;
    kl_cached cache;
    unsigned long long *fault;
    float limit; /* too large from here on; infinite: never */
};

__device__ __forceinline__ void check(const rows &a, int64_t at, float x)
{
    if (fabsf(x) >= a.limit && fabsf(x) < INFINITY)
        kl_note(a.fault, at, x);
}

__device__ __forceinline__ char *row_of(const rows &a, int64_t t)
{
    const int64_t n = kl_sequence_of(a.offsets, a.N, t);
    return kl_cached_row(a.cache, n, a.start[n] + t - a.offsets[n]);
}

__global__ void __launch_bounds__(256) cache_append_v1(rows a)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    const int64_t width = a.cache.type == KL_Q8_0 ? a.D / VALUES : a.D;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < a.T * width;
         i += step) {
        char *row = row_of(a, i / width);
        const int n = a.cache.type == KL_Q8_0 ? VALUES : 1;
        float largest = 0.0f;
        for (int j = 0; j < n; j++)
            largest = kl_larger(largest, fabsf(a.x[i * n + j]));
        for (int j = 0; j < n && !(largest < a.limit); j++)
            check(a, i * n + j, a.x[i * n + j]);
        if (a.cache.type != KL_Q8_0) {
            kl_put_value(a.cache.type, row, i % width, a.x[i]);
            continue;
        }
        const kl_q8_0_scale s = kl_q8_0_scale_of(largest);
        char *block = row + i % width * 34;
        memcpy(block, &s.bits, sizeof s.bits);
        for (int j = 0; j < VALUES; j++)
            block[2 + j] = kl_q8_0_byte(a.x[i * VALUES + j], s);
    }
}

__global__ void __launch_bounds__(256, 1) cache_append_v2(rows a)
{
    for (int64_t t = blockIdx.x; t < a.T; t += gridDim.x) {
        char *row = row_of(a, t);
        for (int64_t d = threadIdx.x; d < a.D; d += BLOCK) {
            check(a, t * a.D + d, a.x[t * a.D + d]);
            kl_put_value(a.cache.type, row, d, a.x[t * a.D + d]);
        }
    }
}

__global__ void __launch_bounds__(256) cache_append_q8_0_v2(rows a)
{
    for (int64_t t = blockIdx.x; t < a.T; t += gridDim.x) {
        char *row = row_of(a, t);
        for (int64_t first = 0; first < a.D / VALUES; first += TEAMS) {
            const int64_t b = first + kl_team();
            const bool mine = b < a.D / VALUES; /* a team behind the last block only shuffles */
            const float x = mine ? a.x[t * a.D + b * VALUES + kl_lane()] : 0.0f;
            check(a, t * a.D + b * VALUES + kl_lane(), x);
            const kl_q8_0_scale s = kl_q8_0_scale_of(kl_team_max(fabsf(x)));
            if (mine && kl_lane() == 0)
                memcpy(row + b * 34, &s.bits, sizeof s.bits);
            if (mine)
                row[b * 34 + 2 + kl_lane()] = kl_q8_0_byte(x, s);
        }
    }
}

} // namespace

kl_status hip_cache_append(kl_ctx *ctx, kl_cache cache, const float *x, const int64_t *offsets,
                           const int64_t *start, int64_t N, int64_t T, int64_t D)
{
    rows a = { x, nullptr, nullptr, N, T, D, {}, nullptr, INFINITY };
    if (T == 0)
        return KL_OK;
    KL_TRY(kl_put_table(ctx, &a.offsets, offsets, N + 1));
    KL_TRY(kl_put_table(ctx, &a.start, start, N));
    KL_TRY(kl_put_cache(ctx, &a.cache, cache, N, [=](int64_t n) {
        const int64_t tokens = offsets[n + 1] - offsets[n];
        return tokens > 0 ? start[n] + tokens : 0;
    }));
    if (kl_core_of->measuring(ctx))
        return KL_OK;
    if (cache.type != KL_F32) {
        a.limit = kl_cache_limit_of(cache.type);
        KL_TRY(kl_cache_fault_of(ctx, &a.fault, what, D, cache.type));
    }
    if (kl_version() == 1)
        KL_LAUNCH(cache_append_v1, kl_grid(kl_ceil_div(T * D, BLOCK)), BLOCK, 0, kl_stream(ctx), a);
    else if (cache.type == KL_Q8_0)
        KL_LAUNCH(cache_append_q8_0_v2, kl_grid(T), BLOCK, 0, kl_stream(ctx), a);
    else
        KL_LAUNCH(cache_append_v2, kl_grid(T), BLOCK, 0, kl_stream(ctx), a);
    return kl_launched(ctx, "cache_append");
}
