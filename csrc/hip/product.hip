/* product.h: three versions, one order of sums, the CPU's: sixteen lanes, lane l adds the terms k = l mod 16 by fma from
 * +0, then the halving tree.
 *   v1  one output a thread, its sixteen lanes in registers.
 *   v2  sixteen threads an output row, a lane each, up to KL_FEW rows of x: the row of w is read once, sixteen values of
 *       it by a thread at a time.
 *   v3  32 x 32 outputs a block over shared memory. Sixteen threads share 8 x 8 outputs, a lane each: 64 running sums a
 *       thread, 4 fma a value that it reads. The tree is shuffles, at the end.
 * Launched: v2 for few rows of x and w's rows that lie together, v1 for few rows and a transposed matrix (of a rare
 * type v3), else v3. */
#include "product.h"

#include "../cpu/int8.h"
#include "ragged.h"
#include "tile.h"

namespace
{

const int BLOCK = KL_TILE_BLOCK, LANES = KL_LANES, SETS = BLOCK / LANES, TILE = KL_TILE;

__device__ __forceinline__ kl_matrix matrix_of(const kl_matrices &w, int64_t which)
{
    const char *data = w.table != nullptr ? w.table[which] : w.first + which * w.step;
    return kl_matrix{ data, w.row_bytes, w.rows, 0, w.type };
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

__device__ __forceinline__ const float *row_of(const kl_product &p, int64_t t, int64_t which)
{
    return p.x + (p.index != nullptr ? p.index[t] : t) * p.x_row + which * p.x_step;
}

/* output r of matrix `which` for row t */
__device__ __forceinline__ void put(const kl_product &p, int64_t t, int64_t which, int64_t r,
                                    float sum)
{
    const int64_t at = t * p.y_row + which * p.y_step + r;
    if (p.bias != nullptr)
        sum = sum + p.bias[which * p.w.rows + r];
    p.y[at] = p.gate != nullptr ? kl_silu_of(p.gate[at]) * sum : sum;
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
        const float *x = p.ids != nullptr ? p.x + t / p.per_row * p.x_row : row_of(p, t, which);
        float lane[LANES] = {};
        for (int64_t k = 0; k < p.D; k += LANES)
            for (int l = 0; l < LANES; l++) {
                const int64_t at = k + kl_forget(l); /* else LANES rows' places are kept */
                if (at < p.D)
                    lane[l] = fmaf(x[at], (kl_matrix_at<TYPE, TRANSPOSED>(w, r, at)), lane[l]);
            }
        for (int half = LANES / 2; half >= 1; half /= 2)
            for (int l = 0; l < half; l++)
                lane[l] += lane[l + half];
        put(p, t, which, r, lane[0]);
    }
}

template <kl_type TYPE>
__global__ void __launch_bounds__(256, 2) product_v2(kl_product p, int64_t first)
{
    const int lane = static_cast<int>(threadIdx.x) % LANES,
              set = static_cast<int>(threadIdx.x) / LANES;
    const int64_t across = (p.w.rows + SETS - 1) / SETS, tasks = groups_of(p) * across;
    const int64_t task = first + blockIdx.x;
    if (task < tasks) { /* the same in every thread */
        const kl_row_group g = group_of(p, task / across, KL_FEW);
        const kl_matrix w = matrix_of(p.w, g.which);
        const int64_t r = task % across * SETS + set;
        const int64_t D =
            r < p.w.rows ? p.D : 0; /* behind the last row: nothing, and all the shuffles */
        const float *x[KL_FEW];
        float acc[KL_FEW] = {};
        for (int t = 0; t < KL_FEW; t++)
            x[t] = row_of(p, g.begin + (t < g.count ? t : 0), g.which);
        int64_t k0 = lane;
        const size_t span_bytes = kl_row_bytes(TYPE == KL_RARE ? w.type : TYPE, KL_SPAN);
        const char *row = w.data + static_cast<size_t>(r) * w.row_bytes;
        for (; k0 + KL_SPAN - LANES < D; k0 += KL_SPAN, row += span_bytes) {
            float v[KL_SPAN_EACH];
            kl_span_at<TYPE>(v, w.type, row, static_cast<unsigned>(lane));
            for (int t = 0; t < KL_FEW; t++) {
                if (t >= g.count)
                    continue;
                KL_UNROLL
                for (int j = 0; j < KL_SPAN_EACH; j++)
                    acc[t] = fmaf(x[t][k0 + j * LANES], v[j], acc[t]);
            }
        }
        for (; k0 < D; k0 += LANES) {
            const float v = kl_matrix_at<TYPE, false>(w, r, k0);
            for (int t = 0; t < KL_FEW; t++)
                if (t < g.count)
                    acc[t] = fmaf(x[t][k0], v, acc[t]);
        }
        for (int t = 0; t < KL_FEW; t++) {
            if (t >= g.count) /* the same in every thread */
                continue;
            const float sum = kl_sum_of_lanes(acc[t]);
            if (lane == t && r < p.w.rows)
                put(p, g.begin + t, g.which, r, sum);
        }
    }
}

template <kl_type TYPE, bool TRANSPOSED>
__global__ void __launch_bounds__(256) product_v3(kl_product p, int64_t first)
{
    KL_SHARED(float, xs, [KL_TILE_K][TILE + 1]);
    KL_SHARED(float, ws, [KL_TILE_K][TILE + 1]);
    const kl_tile_place at = kl_tile_place_of();
    const int64_t across = (p.w.rows + TILE - 1) / TILE, tasks = groups_of(p) * across;
    const int64_t task = first + blockIdx.x;
    if (task < tasks) { /* the same in every thread */
        const kl_row_group g = group_of(p, task / across, TILE);
        const kl_matrix w = matrix_of(p.w, g.which);
        const int64_t r0 = task % across * TILE;
        kl_tile_sums acc = {};
        /* What this thread brings. Behind the last row it is the first again, whose sums nobody takes then. */
        const float *x[KL_TILE_EACH];
        const char *row[KL_TILE_EACH];
        KL_UNROLL
        for (int j = 0; j < KL_TILE_EACH; j++) {
            const int i = static_cast<int>(threadIdx.x) / KL_TILE + j * KL_TILE_APART;
            x[j] = row_of(p, g.begin + (i < g.count ? i : 0), g.which);
            row[j] = w.data + static_cast<size_t>(r0 + i < p.w.rows ? r0 + i : r0) * w.row_bytes;
        }
        /* rows of blocks are whole steps */
        const bool whole = !TRANSPOSED && TYPE != KL_F32 && TYPE != KL_F16 && TYPE != KL_BF16;
        for (int64_t k0 = 0; k0 < p.D; k0 += KL_TILE_K) {
            kl_tile_load<false, true>(
                xs, [&](int j, int, int k) { return whole || k0 + k < p.D ? x[j][k0 + k] : 0.0f; });
            kl_tile_load<TRANSPOSED, TYPE != KL_RARE>(ws, [&](int j, int i, int k) {
                if (!whole && k0 + k >= p.D)
                    return 0.0f;
                if constexpr (TRANSPOSED || TYPE == KL_RARE)
                    return kl_matrix_at<TYPE, TRANSPOSED>(w, r0 + i < p.w.rows ? r0 + i : r0,
                                                          k0 + k);
                else
                    return kl_run_at<TYPE>(row[j], k0, static_cast<unsigned>(k));
            });
            __syncthreads();
            kl_tile_multiply(acc, xs, ws, at, [](int, int) { return true; });
            __syncthreads();
        }
        kl_tile_finish(acc, at, [&](int t, int r, float sum) {
            if (t < g.count && r0 + r < p.w.rows)
                put(p, g.begin + t, g.which, r0 + r, sum);
        });
    }
}

template <kl_type TYPE, bool TRANSPOSED> void launch(kl_ctx *ctx, const kl_product &p, int64_t few)
{
    const int version = kl_version();
    if (p.ids != nullptr
        || (p.groups == nullptr && (version == 1 || (TRANSPOSED && few && TYPE != KL_RARE)))) {
        const int64_t n = p.T * p.w.rows * (p.ids != nullptr ? 1 : p.w.n);
        KL_LAUNCH((product_v1<TYPE, TRANSPOSED>), kl_grid(kl_ceil_div(n, BLOCK)), BLOCK, 0,
                  kl_stream(ctx), p);
        return;
    }
    const bool rows_alone = !TRANSPOSED && few;
    const int64_t tasks = p.most_groups * kl_ceil_div(p.w.rows, rows_alone ? SETS : TILE);
    for (int64_t first = 0; first < tasks; first += kl_grid(tasks - first))
        if (rows_alone)
            KL_LAUNCH((product_v2<TYPE>), kl_grid(tasks - first), BLOCK, 0, kl_stream(ctx), p,
                      first);
        else
            KL_LAUNCH((product_v3<TYPE, TRANSPOSED>), kl_grid(tasks - first), BLOCK, 0,
                      kl_stream(ctx), p, first);
}

bool takes_int8(kl_type type)
{
    switch (static_cast<int>(type)) {
#define CASE(TYPE) case TYPE:
        KL_INT8_TYPES(CASE)
#undef CASE
        return true;
    default: return false;
    }
}

} // namespace

kl_status kl_matrices_of(kl_ctx *ctx, kl_matrices *to, const kl_weight *w)
{
    const char *const *matrix = reinterpret_cast<const char *const *>(w->matrix);
    const bool measuring = kl_core_of->measuring(ctx) != 0;
    *to = kl_matrices{ nullptr, nullptr, 0, w->n, w->rows, w->row_bytes, w->type };
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
    return kl_put_table(ctx, &to->table, matrix, w->n);
}

kl_status kl_check_activations(kl_ctx *ctx, const kl_weight *w, const char *op, const char *name)
{
    const kl_activations asked = kl_core_of->activations(ctx);
    const bool int8 = asked == KL_ACTIVATIONS_INT8 && takes_int8(w->type),
               bfloat16 = asked == KL_ACTIVATIONS_BFLOAT16 && w->type == KL_BF16;
    if (w->transposed || (!int8 && !bfloat16))
        return KL_OK;
    return kl_core_of->fail(ctx, KL_ERR_UNSUPPORTED,
                            "%s: activations are %s, for which %s has no kernel on hip; "
                            "activations='float32' has",
                            op, int8 ? "int8" : "bfloat16", name);
}

kl_status kl_launch_product(kl_ctx *ctx, const kl_product *p, const kl_weight *w, const char *op,
                            const char *name)
{
    /* which version: by groups, their rows; else by T */
    const bool few = p->T <= KL_FEW && kl_version() != 3;
    switch (kl_kernel_type(w->type)) {
#define CASE(TYPE)                                                                                 \
    case TYPE:                                                                                     \
        w->transposed ? launch<TYPE, true>(ctx, *p, few) : launch<TYPE, false>(ctx, *p, few);      \
        return KL_OK;
        KL_KERNEL_TYPES(CASE)
#undef CASE
    default: return kl_no_type(ctx, op, name, w->type);
    }
}
