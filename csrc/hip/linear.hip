/* linear (ops/linear.c): y[t, r] = sum_k x[t, k] w[r, k] + bias[r], one launch a weight.
 *   v1  one output a thread, no shared memory. Its sums: as in v3.
 *   v2  one team a row of w, for up to FEW tokens: the row is read once, neighbours in one access; 32 running sums,
 *       then the team's tree.
 *   v3  tiles of 64 x 64 outputs over shared memory: a value is read once a tile. Steps of 16 inputs, each a chain of
 *       fma, added up in order (tile.h).
 * Launched: v2 for few tokens and rows that lie together, v1 for few tokens of a transposed matrix, else v3. */
#include "runtime.h"
#include "tile.h"

namespace
{

const int BLOCK = 256, TEAMS = BLOCK / KL_TEAM, FEW = 8;

struct product {
    float *y;
    const float *x;
    kl_matrix w;
    const float *bias; /* NULL: none */
    int64_t T, D;
};

__device__ __forceinline__ void put(const product &p, int64_t t, int64_t r, float sum)
{
    p.y[t * p.w.rows + r] = p.bias != nullptr ? sum + p.bias[r] : sum;
}

template <kl_type TYPE, bool TRANSPOSED> __global__ void __launch_bounds__(256) linear_v1(product p)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK, n = p.T * p.w.rows;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < n; i += step) {
        const int64_t t = i / p.w.rows, r = i % p.w.rows;
        float sum = 0.0f;
        for (int64_t k0 = 0; k0 < p.D; k0 += KL_TILE_K) {
            const int64_t end = k0 + KL_TILE_K < p.D ? k0 + KL_TILE_K : p.D;
            float part = 0.0f;
            for (int64_t k = k0; k < end; k++)
                part = fmaf(p.x[t * p.D + k], (kl_matrix_at<TYPE, TRANSPOSED>(p.w, r, k)), part);
            sum += part;
        }
        put(p, t, r, sum);
    }
}

template <kl_type TYPE> __global__ void __launch_bounds__(256) linear_v2(product p)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * TEAMS;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * TEAMS; first < p.w.rows;
         first += step) {
        const int64_t r = first + kl_team();
        const int64_t D =
            r < p.w.rows ? p.D
                         : 0; /* a team behind the last row does nothing, and all the shuffles */
        float acc[FEW] = {};
        for (int64_t k = kl_lane(); k < D; k += KL_TEAM) {
            const float w = kl_matrix_at<TYPE, false>(p.w, r, k);
            for (int t = 0; t < FEW; t++)
                if (t < p.T)
                    acc[t] = fmaf(p.x[t * p.D + k], w, acc[t]);
        }
        for (int t = 0; t < FEW; t++) {
            const float sum = kl_team_sum(acc[t]);
            if (t < p.T && kl_lane() == t && r < p.w.rows)
                put(p, t, r, sum);
        }
    }
}

template <kl_type TYPE, bool TRANSPOSED> __global__ void __launch_bounds__(256) linear_v3(product p)
{
    KL_SHARED(float, xs, KL_TILE_EXTENTS);
    KL_SHARED(float, ws, KL_TILE_EXTENTS);
    const int64_t across = (p.w.rows + KL_TILE - 1) / KL_TILE,
                  tiles = (p.T + KL_TILE - 1) / KL_TILE * across;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t t0 = tile / across * KL_TILE, r0 = tile % across * KL_TILE;
        float acc[KL_TILE_OWN][KL_TILE_OWN] = {};
        for (int64_t k0 = 0; k0 < p.D; k0 += KL_TILE_K) {
            kl_tile_load<false>(xs, [&](int i, int k) {
                return t0 + i < p.T && k0 + k < p.D ? p.x[(t0 + i) * p.D + k0 + k] : 0.0f;
            });
            kl_tile_load<TRANSPOSED>(ws, [&](int i, int k) {
                return r0 + i < p.w.rows && k0 + k < p.D
                           ? kl_matrix_at<TYPE, TRANSPOSED>(p.w, r0 + i, k0 + k)
                           : 0.0f;
            });
            __syncthreads();
            kl_tile_fma(acc, xs, ws);
            __syncthreads();
        }
        const int64_t t1 = t0 + threadIdx.x / 16 * KL_TILE_OWN,
                      r1 = r0 + threadIdx.x % 16 * KL_TILE_OWN;
        for (int a = 0; a < KL_TILE_OWN; a++)
            for (int b = 0; b < KL_TILE_OWN; b++)
                if (t1 + a < p.T && r1 + b < p.w.rows)
                    put(p, t1 + a, r1 + b, acc[a][b]);
    }
}

template <kl_type TYPE, bool TRANSPOSED> void launch(kl_ctx *ctx, const product &p)
{
    const int64_t tiles = kl_ceil_div(p.T, KL_TILE) * kl_ceil_div(p.w.rows, KL_TILE);
    const int version = kl_version();
    if (version == 1 || (TRANSPOSED && p.T <= FEW))
        KL_LAUNCH((linear_v1<TYPE, TRANSPOSED>), kl_grid(kl_ceil_div(p.T * p.w.rows, BLOCK)), BLOCK,
                  0, kl_stream(ctx), p);
    else if (p.T <= FEW)
        KL_LAUNCH((linear_v2<TYPE>), kl_grid(kl_ceil_div(p.w.rows, TEAMS)), BLOCK, 0,
                  kl_stream(ctx), p);
    else
        KL_LAUNCH((linear_v3<TYPE, TRANSPOSED>), kl_grid(tiles), BLOCK, 0, kl_stream(ctx), p);
}

} // namespace

kl_status hip_linear(kl_ctx *ctx, float *const *y, const float *x, const kl_weight *w,
                     const float *const *bias, int n_weights, int64_t T, int64_t D)
{
    if (kl_core_of->measuring(ctx) || T == 0)
        return KL_OK;
    for (int i = 0; i < n_weights; i++) {
        const product p = { y[i], x, kl_matrix_of(&w[i], 0), bias != nullptr ? bias[i] : nullptr,
                            T,    D };
        switch (w[i].type) {
#define CASE(TYPE)                                                                                 \
    case TYPE: w[i].transposed ? launch<TYPE, true>(ctx, p) : launch<TYPE, false>(ctx, p); break;
            KL_STORED_TYPES(CASE)
#undef CASE
        default: return kl_no_type(ctx, "linear", "w", w[i].type);
        }
    }
    return kl_launched(ctx, "linear");
}
