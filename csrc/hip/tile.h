/* A tile of a matrix product: KL_TILE x KL_TILE sums of a block of KL_TILE_BLOCK threads over shared memory, in the CPU's
 * order (docs/math.md#sums). Sixteen threads share 8 x 8 of them, a lane each: 64 running sums a thread, 4 fma a value
 * that it reads. The tree is shuffles, at the end. */
#ifndef KL_HIP_TILE_H
#define KL_HIP_TILE_H

#include "reduce.h"

enum { KL_LANES = 16, KL_TILE = 32, KL_TILE_K = 32, KL_TILE_OWN = 8, KL_TILE_BLOCK = 256 };

/* the halving tree over KL_LANES neighbours */
static __device__ __forceinline__ float kl_sum_of_lanes(float v)
{
    for (int m = KL_LANES / 2; m >= 1; m /= 2)
        v += kl_team_swap(v, m);
    return v;
}

/* a thread's lane, and the first row of x and of w of its 8 x 8 */
struct kl_tile_place {
    int lane, x0, w0;
};
static __device__ __forceinline__ kl_tile_place kl_tile_place_of()
{
    const int set = static_cast<int>(threadIdx.x) / KL_LANES, across = KL_TILE / KL_TILE_OWN;
    return kl_tile_place{ static_cast<int>(threadIdx.x) % KL_LANES, set / across * KL_TILE_OWN,
                          set % across * KL_TILE_OWN };
}

struct kl_tile_sums {
    float at[KL_TILE_OWN][KL_TILE_OWN];
};

/* tile[k][i] = at(i, k): neighbouring threads take neighbouring k, or neighbouring i where those lie together. UNROLLED:
 * several values are on their way at once; not where making one takes many registers. */
template <bool ALONG_ROWS, bool UNROLLED, class TILE_OF, class AT>
static __device__ __forceinline__ void kl_tile_load(TILE_OF &tile, AT at)
{
    const auto one = [&](int j) {
        const int i = ALONG_ROWS ? j % KL_TILE : j / KL_TILE_K;
        const int k = ALONG_ROWS ? j / KL_TILE : j % KL_TILE_K;
        tile[k][i] = at(i, k);
    };
    const int first = static_cast<int>(threadIdx.x), all = KL_TILE * KL_TILE_K;
    if constexpr (UNROLLED) {
        for (int j = first; j < all; j += KL_TILE_BLOCK)
            one(j);
    } else {
        KL_NO_UNROLL
        for (int j = first; j < all; j += KL_TILE_BLOCK)
            one(j);
    }
}

/* Adds a step of KL_TILE_K inputs, those for which takes(row of x, k): lane l has k = l mod KL_LANES, in order. */
template <class TILE_OF, class TAKES>
static __device__ __forceinline__ void kl_tile_multiply(kl_tile_sums &acc, const TILE_OF &xs,
                                                        const TILE_OF &ws, const kl_tile_place &p,
                                                        TAKES takes)
{
    for (int k = p.lane; k < KL_TILE_K; k += KL_LANES) {
        float x[KL_TILE_OWN], w[KL_TILE_OWN];
        KL_UNROLL
        for (int i = 0; i < KL_TILE_OWN; i++) {
            x[i] = xs[k][p.x0 + i];
            w[i] = ws[k][p.w0 + i];
        }
        KL_UNROLL
        for (int a = 0; a < KL_TILE_OWN; a++) {
            if (!takes(p.x0 + a, k))
                continue;
            KL_UNROLL
            for (int b = 0; b < KL_TILE_OWN; b++)
                acc.at[a][b] = fmaf(x[a], w[b], acc.at[a][b]);
        }
    }
}

/* put(row of x, row of w, sum) for each of the tile, by one thread */
template <class PUT>
static __device__ __forceinline__ void kl_tile_finish(const kl_tile_sums &acc,
                                                      const kl_tile_place &p, PUT put)
{
    KL_UNROLL
    for (int i = 0; i < KL_TILE_OWN * KL_TILE_OWN; i++) {
        const int a = i / KL_TILE_OWN, b = i % KL_TILE_OWN;
        const float sum = kl_sum_of_lanes(acc.at[a][b]);
        if (p.lane == i % KL_LANES)
            put(p.x0 + a, p.w0 + b, sum);
    }
}

#endif
