/* product.h: three versions, one order of sums, the CPU's: sixteen lanes, lane l adds the terms k = l mod 16 by fma from
 * +0, then the halving tree.
 *   v1  one output a thread, its sixteen lanes in registers.
 *   v2  sixteen threads an output row, a lane each, up to KL_FEW rows of x: the row of w is read once.
 *   v3  32 x 32 outputs a block over shared memory. Sixteen threads share 8 x 8 outputs, a lane each: 64 running sums a
 *       thread, 4 fma a value that it reads. The tree is shuffles, at the end.
 * Launched: v2 for few rows of x and w's rows that lie together, v1 for few rows and a transposed matrix, else v3. */
#include "product.h"

#include "reduce.h"

#include <stdlib.h>

namespace
{

const int BLOCK = 256, LANES = 16, SETS = BLOCK / LANES;
const int TILE = KL_MANY, TILE_K = 32, OWN = 8;

__device__ __forceinline__ kl_matrix matrix_of(const kl_matrices &w, int64_t which)
{
    const char *data = w.table != nullptr ? w.table[which] : w.first + which * w.step;
    return kl_matrix{ data, w.row_bytes, w.rows, 0 };
}

/* by sizes: group j is matrix j % n, so that blocks that run together read the same rows of x */
__device__ __forceinline__ kl_row_group group_of(const kl_product &p, int64_t j, int most)
{
    if (p.groups != nullptr)
        return p.groups[j];
    const int64_t begin = j / p.w.n * most, left = p.T - begin;
    return kl_row_group{ static_cast<int32_t>(j % p.w.n), static_cast<int32_t>(begin),
                         static_cast<int32_t>(left < most ? left : most) };
}

__device__ __forceinline__ int64_t groups_of(const kl_product &p)
{
    return p.groups != nullptr ? *p.n_groups : p.most_groups;
}

__device__ __forceinline__ const float *row_of(const kl_product &p, int64_t t)
{
    return p.x + (p.index != nullptr ? p.index[t] : t) * p.D;
}

/* output r of matrix `which` for row t */
__device__ __forceinline__ void put(const kl_product &p, int64_t t, int64_t which, int64_t r,
                                    float sum)
{
    const bool stacked = p.groups == nullptr && p.ids == nullptr;
    const int64_t column = stacked ? which * p.w.rows + r : r;
    const int64_t at = t * (stacked ? p.w.n * p.w.rows : p.w.rows) + column;
    if (p.bias != nullptr)
        sum = sum + p.bias[column];
    p.y[at] = p.gate != nullptr ? kl_silu_of(p.gate[at]) * sum : sum;
}

/* the halving tree over LANES neighbours */
__device__ __forceinline__ float sum_of_lanes(float v)
{
    for (int m = LANES / 2; m >= 1; m /= 2)
        v += kl_team_swap(v, m);
    return v;
}

template <kl_type TYPE, bool TRANSPOSED>
__global__ void __launch_bounds__(256) product_v1(kl_product p)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    const int64_t across = p.ids != nullptr ? p.w.rows : p.w.n * p.w.rows, n = p.T * across;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < n; i += step) {
        const int64_t t = i / across, r = i % across % p.w.rows;
        const int64_t which = p.ids != nullptr ? p.ids[t] : i % across / p.w.rows;
        if (which < 0 || which >= p.w.n)
            continue;
        const kl_matrix w = matrix_of(p.w, which);
        const float *x = p.ids != nullptr ? p.x + t / p.per_row * p.D : row_of(p, t);
        float lane[LANES] = {};
        for (int64_t k = 0; k < p.D; k += LANES)
            for (int l = 0; l < LANES; l++)
                if (k + l < p.D)
                    lane[l] =
                        fmaf(x[k + l], (kl_matrix_at<TYPE, TRANSPOSED>(w, r, k + l)), lane[l]);
        for (int half = LANES / 2; half >= 1; half /= 2)
            for (int l = 0; l < half; l++)
                lane[l] += lane[l + half];
        put(p, t, which, r, lane[0]);
    }
}

template <kl_type TYPE> __global__ void __launch_bounds__(256) product_v2(kl_product p)
{
    const int lane = static_cast<int>(threadIdx.x) % LANES,
              set = static_cast<int>(threadIdx.x) / LANES;
    const int64_t across = (p.w.rows + SETS - 1) / SETS, tasks = groups_of(p) * across;
    for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
        const kl_row_group g = group_of(p, task / across, KL_FEW);
        const kl_matrix w = matrix_of(p.w, g.which);
        const int64_t r = task % across * SETS + set;
        const int64_t D =
            r < p.w.rows ? p.D : 0; /* behind the last row: nothing, and all the shuffles */
        const float *x[KL_FEW];
        float acc[KL_FEW] = {};
        for (int t = 0; t < KL_FEW; t++)
            x[t] = row_of(p, g.begin + (t < g.count ? t : 0));
        for (int64_t k = lane; k < D; k += LANES) {
            const float v = kl_matrix_at<TYPE, false>(w, r, k);
            for (int t = 0; t < KL_FEW; t++)
                if (t < g.count)
                    acc[t] = fmaf(x[t][k], v, acc[t]);
        }
        for (int t = 0; t < KL_FEW; t++) {
            const float sum = sum_of_lanes(acc[t]);
            if (t < g.count && lane == t && r < p.w.rows)
                put(p, g.begin + t, g.which, r, sum);
        }
    }
}

/* tile[k][i] = at(i, k): neighbouring threads take neighbouring k, or neighbouring i where those lie together */
template <bool ALONG_ROWS, class TILE_OF, class AT>
__device__ __forceinline__ void load(TILE_OF &tile, AT at)
{
    for (int j = static_cast<int>(threadIdx.x); j < TILE * TILE_K; j += BLOCK) {
        const int i = ALONG_ROWS ? j % TILE : j / TILE_K;
        const int k = ALONG_ROWS ? j / TILE : j % TILE_K;
        tile[k][i] = at(i, k);
    }
}

/* a thread's lane of a step: inputs k = lane mod LANES, in order */
template <class TILE_OF>
__device__ __forceinline__ void multiply(float (&acc)[OWN][OWN], const TILE_OF &xs,
                                         const TILE_OF &ws, int lane, int x0, int w0)
{
    for (int k = lane; k < TILE_K; k += LANES) {
        float x[OWN], w[OWN];
        for (int i = 0; i < OWN; i++) {
            x[i] = xs[k][x0 + i];
            w[i] = ws[k][w0 + i];
        }
        for (int a = 0; a < OWN; a++)
            for (int b = 0; b < OWN; b++)
                acc[a][b] = fmaf(x[a], w[b], acc[a][b]);
    }
}

template <kl_type TYPE, bool TRANSPOSED>
__global__ void __launch_bounds__(256) product_v3(kl_product p)
{
    KL_SHARED(float, xs, [TILE_K][TILE + 1]);
    KL_SHARED(float, ws, [TILE_K][TILE + 1]);
    const int lane = static_cast<int>(threadIdx.x) % LANES,
              set = static_cast<int>(threadIdx.x) / LANES;
    const int x0 = set / (TILE / OWN) * OWN, w0 = set % (TILE / OWN) * OWN;
    const int64_t across = (p.w.rows + TILE - 1) / TILE, tasks = groups_of(p) * across;
    for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
        const kl_row_group g = group_of(p, task / across, TILE);
        const kl_matrix w = matrix_of(p.w, g.which);
        const int64_t r0 = task % across * TILE;
        float acc[OWN][OWN] = {};
        for (int64_t k0 = 0; k0 < p.D; k0 += TILE_K) {
            load<false>(xs, [&](int i, int k) {
                return i < g.count && k0 + k < p.D ? row_of(p, g.begin + i)[k0 + k] : 0.0f;
            });
            load<TRANSPOSED>(ws, [&](int i, int k) {
                return r0 + i < p.w.rows && k0 + k < p.D
                           ? kl_matrix_at<TYPE, TRANSPOSED>(w, r0 + i, k0 + k)
                           : 0.0f;
            });
            __syncthreads();
            multiply(acc, xs, ws, lane, x0, w0);
            __syncthreads();
        }
        for (int a = 0; a < OWN; a++)
            for (int b = 0; b < OWN; b++) {
                const float sum = sum_of_lanes(acc[a][b]);
                const bool mine = lane == (a * OWN + b) % LANES;
                if (mine && x0 + a < g.count && r0 + w0 + b < p.w.rows)
                    put(p, g.begin + x0 + a, g.which, r0 + w0 + b, sum);
            }
    }
}

template <kl_type TYPE, bool TRANSPOSED> void launch(kl_ctx *ctx, const kl_product &p, int64_t few)
{
    const int version = kl_version();
    if (p.ids != nullptr || (p.groups == nullptr && (version == 1 || (TRANSPOSED && few)))) {
        const int64_t n = p.T * p.w.rows * (p.ids != nullptr ? 1 : p.w.n);
        KL_LAUNCH((product_v1<TYPE, TRANSPOSED>), kl_grid(kl_ceil_div(n, BLOCK)), BLOCK, 0,
                  kl_stream(ctx), p);
    } else if (!TRANSPOSED && few)
        KL_LAUNCH((product_v2<TYPE>), kl_grid(p.most_groups * kl_ceil_div(p.w.rows, SETS)), BLOCK,
                  0, kl_stream(ctx), p);
    else
        KL_LAUNCH((product_v3<TYPE, TRANSPOSED>),
                  kl_grid(p.most_groups * kl_ceil_div(p.w.rows, TILE)), BLOCK, 0, kl_stream(ctx),
                  p);
}

} // namespace

kl_status kl_matrices_of(kl_ctx *ctx, kl_matrices *to, const kl_weight *w)
{
    const char *const *matrix = reinterpret_cast<const char *const *>(w->matrix);
    const bool measuring = kl_core_of->measuring(ctx) != 0;
    *to = kl_matrices{ nullptr, nullptr, 0, w->n, w->rows, w->row_bytes };
    if (w->n == 0)
        return KL_OK;
    bool even = kl_version() > 1; /* the oracles go the general way */
    if (!measuring) {
        to->first = matrix[0];
        to->step = w->n > 1 ? matrix[1] - matrix[0] : 0;
        for (int64_t i = 0; i < w->n && even; i++)
            even = matrix[i] == to->first + i * to->step;
    }
    if (even && !measuring)
        return KL_OK;
    const char **table;
    KL_SCRATCH_OF(table, ctx, w->n);
    to->table = table;
    return measuring ? KL_OK
                     : kl_put(ctx, table, matrix, static_cast<size_t>(w->n) * sizeof *table);
}

kl_status kl_launch_product(kl_ctx *ctx, const kl_product *p, const kl_weight *w, const char *op,
                            const char *name)
{
    /* which version: by groups, their rows; else by T */
    const bool few = p->T <= KL_FEW && kl_version() != 3;
    switch (w->type) {
#define CASE(TYPE)                                                                                 \
    case TYPE:                                                                                     \
        w->transposed ? launch<TYPE, true>(ctx, *p, few) : launch<TYPE, false>(ctx, *p, few);      \
        return KL_OK;
        KL_STORED_TYPES(CASE)
#undef CASE
    default: return kl_no_type(ctx, op, name, w->type);
    }
}
