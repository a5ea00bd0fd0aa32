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

/* the same where four threads have four neighbours each: all four get it */
static __device__ __forceinline__ float kl_sum_of_quads(const float (&lane)[4])
{
    float sum[4];
    KL_UNROLL
    for (int e = 0; e < 4; e++) {
        const float half = lane[e] + kl_team_swap(lane[e], 2);
        sum[e] = half + kl_team_swap(half, 1);
    }
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
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

/* tile[k][i] = at(j, i, k): neighbouring threads take neighbouring k, or neighbouring i where those lie together. A thread
 * takes KL_TILE_EACH of them, j = 0, 1, ...: one k and each KL_TILE_APART-th i, or one i and so many k. UNROLLED: several
 * values are on their way at once; not where making one takes many registers. */
enum { KL_TILE_EACH = KL_TILE * KL_TILE_K / KL_TILE_BLOCK, KL_TILE_APART = KL_TILE / KL_TILE_EACH };
template <bool ALONG_ROWS, bool UNROLLED, class TILE_OF, class AT>
static __device__ __forceinline__ void kl_tile_load(TILE_OF &tile, AT at)
{
    const int near = static_cast<int>(threadIdx.x) % KL_TILE,
              far = static_cast<int>(threadIdx.x) / KL_TILE;
    static_assert(KL_TILE == KL_TILE_K, "near and far are of either");
    const auto one = [&](int j) {
        const int i = ALONG_ROWS ? near : far + j * KL_TILE_APART;
        const int k = ALONG_ROWS ? far + j * KL_TILE_APART : near;
        tile[k][i] = at(j, i, k);
    };
    if constexpr (UNROLLED) {
        KL_UNROLL
        for (int j = 0; j < KL_TILE_EACH; j++)
            one(j);
    } else {
        KL_NO_UNROLL
        for (int j = 0; j < KL_TILE_EACH; j++)
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

/* The halving tree of 2 * HALF sums at once, the first of them to stay: a lane hands half of its sums to its partner, M
 * lanes apart, and adds the partner's other half to what it keeps. */
template <int HALF, int M, int ALL>
static __device__ __forceinline__ void kl_tile_tree(float (&v)[ALL], int lane)
{
    const bool upper = (lane & M) != 0;
    KL_UNROLL
    for (int i = 0; i < HALF; i++) {
        const float first = v[i],
                    second = v[HALF + i]; /* v[one or the other] would lie in memory */
        v[i] = (upper ? second : first) + kl_team_swap(upper ? first : second, M);
    }
    if constexpr (M > 1)
        kl_tile_tree<HALF / 2, M / 2>(v, lane);
}

/* put(row of x, row of w, sum) for each of the tile: a lane has four of them at the end, in a row of x */
template <class PUT>
static __device__ __forceinline__ void kl_tile_finish(const kl_tile_sums &acc,
                                                      const kl_tile_place &p, PUT put)
{
    enum { ALL = KL_TILE_OWN * KL_TILE_OWN, KEPT = ALL / KL_LANES };
    float v[ALL];
    KL_UNROLL
    for (int i = 0; i < ALL; i++)
        v[i] = acc.at[i / KL_TILE_OWN][i % KL_TILE_OWN];
    kl_tile_tree<ALL / 2, KL_LANES / 2>(v, p.lane);
    KL_UNROLL
    for (int i = 0; i < KEPT; i++)
        put(p.x0 + p.lane * KEPT / KL_TILE_OWN, p.w0 + p.lane * KEPT % KL_TILE_OWN + i, v[i]);
}

#endif
