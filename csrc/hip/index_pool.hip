/* index_pool (ops/index_pool.c): the CPU's bytes.
 *   v1  one channel of a pool a thread, or one block of Q8_0 of it; its pool and sequence by division and search.
 *   v2  one block a pool; a team a block of Q8_0 (launched).
 * The first key that the cache cannot hold is noted (runtime.h). */
#include "cache.h"
#include "reduce.h"

namespace
{

const char *const what = "index_pool: keys";
const int BLOCK = 128, VALUES = 32;

struct pooling {
    kl_cached pooled, keys, gate;
    const float *ape;
    const int64_t *pools, *start; /* [N + 1]: where the new pools of each sequence begin */
    int64_t N, D, P, n_pools;
    unsigned long long *fault;
    float limit; /* too large from here on; infinite: never */
};

/* A pool: its sequence and first position. */
struct pool {
    int64_t n, position;
};
__device__ __forceinline__ pool pool_of(const pooling &a, int64_t i)
{
    const int64_t n = kl_sequence_of(a.pools, a.N, i);
    return pool{ n, (a.start[n] / a.P + i - a.pools[n]) * a.P };
}

__device__ __forceinline__ float logit_of(const pooling &a, const pool &p, int64_t j, int64_t d)
{
    const char *row = kl_cached_row(a.gate, p.n, p.position + j);
    return kl_cached_value(a.gate.type, row, d) + a.ape[j * a.D + d];
}

/* channel d of new pool i, in the CPU's order */
__device__ float key_of(const pooling &a, const pool &p, int64_t i, int64_t d)
{
    float top = -INFINITY, total = 0.0f, key = 0.0f;
    for (int64_t j = 0; j < a.P; j++) {
        const float logit = logit_of(a, p, j, d);
        top = top > logit ? top : logit;
    }
    for (int64_t j = 0; j < a.P; j++)
        total += kl_exp(logit_of(a, p, j, d) - top);
    for (int64_t j = 0; j < a.P; j++) {
        const char *row = kl_cached_row(a.keys, p.n, p.position + j);
        const float weight = kl_exp(logit_of(a, p, j, d) - top) / total;
        key = fmaf(weight, kl_cached_value(a.keys.type, row, d), key);
    }
    if (fabsf(key) >= a.limit && fabsf(key) < INFINITY)
        kl_note(a.fault, i * a.D + d, key);
    return key;
}

__global__ void __launch_bounds__(128) index_pool_v1(pooling a)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    const int n = a.pooled.type == KL_Q8_0 ? VALUES : 1;
    const int64_t width = a.D / n;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x;
         at < a.n_pools * width; at += step) {
        const int64_t i = at / width, d = at % width * n;
        const pool p = pool_of(a, i);
        char *row = kl_cached_row(a.pooled, p.n, p.position);
        if (n == 1) {
            kl_put_value(a.pooled.type, row, d, key_of(a, p, i, d));
            continue;
        }
        float keys[VALUES], largest = 0.0f;
        for (int j = 0; j < VALUES; j++) {
            keys[j] = key_of(a, p, i, d + j);
            largest = kl_larger(largest, fabsf(keys[j]));
        }
        const kl_q8_0_scale s = kl_q8_0_scale_of(largest);
        char *block = row + d / VALUES * 34;
        memcpy(block, &s.bits, sizeof s.bits);
        for (int j = 0; j < VALUES; j++)
            block[2 + j] = kl_q8_0_byte(keys[j], s);
    }
}

__global__ void __launch_bounds__(128) index_pool_v2(pooling a)
{
    for (int64_t i = blockIdx.x; i < a.n_pools; i += gridDim.x) {
        const pool p = pool_of(a, i);
        char *row = kl_cached_row(a.pooled, p.n, p.position);
        for (int64_t first = 0; first < a.D; first += BLOCK) {
            const int64_t d = first + threadIdx.x;
            const bool mine = d < a.D; /* Q8_0: all of a team, or none of it, which only shuffles */
            const float key = mine ? key_of(a, p, i, d) : 0.0f;
            if (a.pooled.type != KL_Q8_0) {
                if (mine)
                    kl_put_value(a.pooled.type, row, d, key);
                continue;
            }
            const kl_q8_0_scale s = kl_q8_0_scale_of(kl_team_max(fabsf(key)));
            char *block = row + d / VALUES * 34;
            if (mine && kl_lane() == 0)
                memcpy(block, &s.bits, sizeof s.bits);
            if (mine)
                block[2 + kl_lane()] = kl_q8_0_byte(key, s);
        }
    }
}

} // namespace

kl_status hip_index_pool(kl_ctx *ctx, kl_cache pooled, kl_cache k, kl_cache gate, const float *ape,
                         const int64_t *offsets, const int64_t *start, int64_t N, int64_t,
                         int64_t D, int64_t P)
{
    pooling a = { {}, {}, {}, ape, nullptr, nullptr, N, D, P, 0, nullptr, INFINITY };
    const auto length = [=](int64_t n) { return offsets[n + 1] - offsets[n]; };
    const auto end = [=](int64_t n) { return length(n) > 0 ? start[n] + length(n) : 0; };
    if (N == 0)
        return KL_OK;
    KL_TRY(kl_put_made(ctx, &a.pools, N + 1,
                       [&](int64_t n) { /* asked in order, each once */
                                        const int64_t begin = a.n_pools;
                                        a.n_pools +=
                                            n < N ? (start[n] + length(n)) / P - start[n] / P : 0;
                                        return begin;
                       }));
    KL_TRY(kl_put_table(ctx, &a.start, start, N));
    KL_TRY(kl_put_cache(ctx, &a.pooled, pooled, N, [=](int64_t n) { return end(n) / P * P; }));
    KL_TRY(kl_put_cache(ctx, &a.keys, k, N, [=](int64_t n) { return end(n) / P * P; }));
    KL_TRY(kl_put_cache(ctx, &a.gate, gate, N, [=](int64_t n) { return end(n) / P * P; }));
    if (kl_core_of->measuring(ctx) || a.n_pools == 0)
        return KL_OK;
    a.limit = kl_cache_limit_of(pooled.type);
    if (pooled.type != KL_F32)
        KL_TRY(kl_cache_fault_of(ctx, &a.fault, what, D, pooled.type));
    if (kl_version() == 1)
        KL_LAUNCH(index_pool_v1, kl_grid(kl_ceil_div(a.n_pools * D, BLOCK)), BLOCK, 0,
                  kl_stream(ctx), a);
    else
        KL_LAUNCH(index_pool_v2, kl_grid(a.n_pools), BLOCK, 0, kl_stream(ctx), a);
    return kl_launched(ctx, "index_pool");
}
