/* product.h: four versions, one order of sums, the CPU's: sixteen lanes, lane l adds the terms k = l mod 16 by fma from
 * +0, then the halving tree.
 *   v1  one output a thread, its sixteen lanes in registers.
 *   v2  sixteen threads an output row, a lane each, up to KL_FEW rows of x: the row of w is read once, sixteen values of
 *       it by a thread at a time.
 *   v3  32 x 32 outputs a block over shared memory. Sixteen threads share 8 x 8 outputs, a lane each: 64 running sums a
 *       thread, 4 fma a value that it reads. The tree is shuffles, at the end.
 *   v4  four threads an output row of one row of x, four lanes each: neighbours, that are read together.
 * Launched: of w's rows that lie together v4 for one row of x (of a rare type v2), v2 for few; of a transposed matrix v1
 * for few (of a rare type v3); else v3. Neighbours in a call go together, but for v1 and rare types. */
#include "product_rows.h"

#include "ragged.h"
#include "tile.h"

namespace
{

const int BLOCK = KL_TILE_BLOCK, LANES = KL_LANES, SETS = BLOCK / LANES,
          QUAD_SETS = BLOCK / KL_QUADS, TILE = KL_TILE;

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
        const kl_matrix w = kl_product_matrix(p.w, which);
        const float *x =
            p.ids != nullptr ? p.x + t / p.per_row * p.x_row : kl_product_row(p, t, which);
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
        kl_product_put(p, t, which, r, lane[0]);
    }
}

template <kl_type TYPE>
__global__ void __launch_bounds__(256, 2) product_v2(kl_products a, int64_t first)
{
    const int lane = static_cast<int>(threadIdx.x) % LANES,
              set = static_cast<int>(threadIdx.x) / LANES;
    int64_t task = first + blockIdx.x;
    const kl_product &p = a.of[kl_product_of<TYPE>(a, task)];
    const int64_t across = (p.w.rows + SETS - 1) / SETS;
    if (task < kl_product_groups(p) * across) { /* the same in every thread */
        const kl_row_group g = kl_product_group(p, task / across, KL_FEW);
        const kl_matrix w = kl_product_matrix(p.w, g.which);
        const int64_t r = task % across * SETS + set;
        const int64_t D =
            r < p.w.rows ? p.D : 0; /* behind the last row: nothing, and all the shuffles */
        const float *x[KL_FEW];
        float acc[KL_FEW] = {};
        for (int t = 0; t < KL_FEW; t++)
            x[t] = kl_product_row(p, g.begin + (t < g.count ? t : 0), g.which);
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
                kl_product_put(p, g.begin + t, g.which, r, sum);
        }
    }
}

/* GATED: y = swiglu of x of[0].w and x of[1].w */
template <kl_type TYPE, bool GATED>
__global__ void __launch_bounds__(256, 2) product_v4(kl_products a, int64_t first)
{
    const int quad = static_cast<int>(threadIdx.x) % KL_QUADS,
              set = static_cast<int>(threadIdx.x) / KL_QUADS;
    int64_t task = first + blockIdx.x;
    int i = kl_product_of<TYPE>(a, task);
    const int64_t across = (a.of[i].w.rows + QUAD_SETS - 1) / QUAD_SETS;
    if (task >= kl_product_groups(a.of[i]) * across) /* the same in every thread */
        return;
    const kl_row_group g = kl_product_group(a.of[i], task / across, 1);
    const int64_t r = task % across * QUAD_SETS + set;
    /* behind the last row: nothing, and all the shuffles */
    const int64_t D = r < a.of[i].w.rows ? a.of[i].D : 0;
    const float *x = kl_product_row(a.of[i], g.begin, g.which) + 4 * quad;
    float gate = 0.0f;
    for (const int last = GATED ? 1 : i; i <= last; i++) {
        const kl_matrix w = kl_product_matrix(a.of[i].w, g.which);
        const char *row = w.data + static_cast<size_t>(r) * w.row_bytes;
        float lane[4] = {};
        int64_t k0 = 0;
        for (; k0 + KL_SPAN <= D; k0 += KL_SPAN, row += kl_row_bytes(TYPE, KL_SPAN)) {
            KL_UNROLL
            for (int h = 0; h < KL_SPAN; h += 4 * LANES) {
                float v[4][4];
                kl_quads_at<TYPE>(v, row, static_cast<unsigned>(h), static_cast<unsigned>(quad));
                KL_UNROLL
                for (int j = 0; j < 4; j++) {
                    KL_UNROLL
                    for (int e = 0; e < 4; e++)
                        lane[e] = fmaf(x[k0 + h + j * LANES + e], v[j][e], lane[e]);
                }
            }
        }
        for (; k0 < D; k0 += LANES)
            for (int e = 0; e < 4; e++)
                if (k0 + 4 * quad + e < D)
                    lane[e] = fmaf(x[k0 + e], (kl_matrix_at<TYPE, false>(w, r, k0 + 4 * quad + e)),
                                   lane[e]);
        const float sum = kl_sum_of_quads(lane);
        if (i < last)
            gate = sum;
        else if (quad == 0 && r < a.of[i].w.rows)
            kl_product_put(a.of[i], g.begin, g.which, r,
                           GATED ? kl_swiglu_of(gate, sum, a.of[i].limit) : sum);
    }
}

template <kl_type TYPE, bool TRANSPOSED>
__global__ void __launch_bounds__(256) product_v3(kl_products a, int64_t first)
{
    KL_SHARED(float, xs, [KL_TILE_K][TILE + 1]);
    KL_SHARED(float, ws, [KL_TILE_K][TILE + 1]);
    const kl_tile_place at = kl_tile_place_of();
    int64_t task = first + blockIdx.x;
    const kl_product &p = a.of[kl_product_of<TYPE>(a, task)];
    const int64_t across = (p.w.rows + TILE - 1) / TILE, tasks = kl_product_groups(p) * across;
    if (task < tasks) { /* the same in every thread */
        const kl_row_group g = kl_product_group(p, task / across, TILE);
        const kl_matrix w = kl_product_matrix(p.w, g.which);
        const int64_t r0 = task % across * TILE;
        kl_tile_sums acc = {};
        /* What this thread brings. Behind the last row it is the first again, whose sums nobody takes then. */
        const float *x[KL_TILE_EACH];
        const char *row[KL_TILE_EACH];
        KL_UNROLL
        for (int j = 0; j < KL_TILE_EACH; j++) {
            const int i = static_cast<int>(threadIdx.x) / KL_TILE + j * KL_TILE_APART;
            x[j] = kl_product_row(p, g.begin + (i < g.count ? i : 0), g.which);
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
                kl_product_put(p, g.begin + t, g.which, r0 + r, sum);
        });
    }
}

template <kl_type TYPE, bool TRANSPOSED> void launch_v1(kl_ctx *ctx, const kl_product &p)
{
    const int64_t n = p.T * p.w.rows * (p.ids != nullptr ? 1 : p.w.n);
    KL_LAUNCH((product_v1<TYPE, TRANSPOSED>), kl_grid(kl_ceil_div(n, BLOCK)), BLOCK, 0,
              kl_stream(ctx), p);
}

/* how products are launched */
enum way { BY_ITSELF, TILES, LANE_A_THREAD, QUADS, QUADS_GATED };

/* blocks from `first` on: as many as a grid takes */
template <kl_type TYPE, bool TRANSPOSED>
void launch_some(kl_ctx *ctx, const kl_products &a, way how, int64_t first, unsigned grid)
{
    if constexpr (!TRANSPOSED) {
        if (how == LANE_A_THREAD) {
            KL_LAUNCH((product_v2<TYPE>), grid, BLOCK, 0, kl_stream(ctx), a, first);
            return;
        }
        if constexpr (TYPE != KL_RARE) {
            if (how == QUADS) {
                KL_LAUNCH((product_v4<TYPE, false>), grid, BLOCK, 0, kl_stream(ctx), a, first);
                return;
            }
            if (how == QUADS_GATED) {
                KL_LAUNCH((product_v4<TYPE, true>), grid, BLOCK, 0, kl_stream(ctx), a, first);
                return;
            }
        }
    }
    KL_LAUNCH((product_v3<TYPE, TRANSPOSED>), grid, BLOCK, 0, kl_stream(ctx), a, first);
}

template <kl_type TYPE, bool TRANSPOSED>
void launch(kl_ctx *ctx, const kl_product *p, int n, way how)
{
    if (how == BY_ITSELF) {
        for (int i = 0; i < n; i++)
            launch_v1<TYPE, TRANSPOSED>(ctx, p[i]);
        return;
    }
    const int rows_of_a_block = how == TILES ? TILE : how == LANE_A_THREAD ? SETS : QUAD_SETS;
    const kl_products a = kl_products_of(p, n, how == QUADS_GATED, rows_of_a_block);
    const int64_t tasks = a.end[KL_TOGETHER - 1];
    for (int64_t first = 0; first < tasks; first += kl_grid(tasks - first))
        launch_some<TYPE, TRANSPOSED>(ctx, a, how, first, kl_grid(tasks - first));
}

/* By rows of x: of groups, theirs; else T. */
way way_of(const kl_product &p, const kl_weight *w)
{
    const int version = kl_version();
    const bool few = p.T <= KL_FEW && version != 3, rare = kl_kernel_type(w->type) == KL_RARE;
    if (p.ids != nullptr
        || (p.groups == nullptr && (version == 1 || (w->transposed && few && !rare))))
        return BY_ITSELF;
    if (!few || w->transposed)
        return TILES;
    return rare || version == 2 || p.T > 1 ? LANE_A_THREAD : QUADS;
}

kl_status launch_any(kl_ctx *ctx, const kl_product *p, int n, way how, const kl_weight *w,
                     const char *op, const char *name)
{
    switch (kl_kernel_type(w->type)) {
#define CASE(TYPE)                                                                                 \
    case TYPE:                                                                                     \
        w->transposed ? launch<TYPE, true>(ctx, p, n, how) : launch<TYPE, false>(ctx, p, n, how);  \
        return KL_OK;
        KL_KERNEL_TYPES(CASE)
#undef CASE
    default: return kl_no_type(ctx, op, name, w->type);
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

bool kl_go_together(const kl_weight *a, const kl_weight *b)
{
    const int type = kl_kernel_type(a->type);
    return type != KL_RARE && type == kl_kernel_type(b->type) && a->transposed == b->transposed;
}

kl_status kl_launch_products(kl_ctx *ctx, const kl_product *p, int n, const kl_weight *w,
                             const char *op, const char *name)
{
    if (p->int8.q == nullptr)
        return launch_any(ctx, p, n, way_of(*p, w), w, op, name);
    kl_int8_launch(ctx, p, n, false);
    return KL_OK;
}

kl_status kl_launch_product(kl_ctx *ctx, const kl_product *p, const kl_weight *w, const char *op,
                            const char *name)
{
    return kl_launch_products(ctx, p, 1, w, op, name);
}

kl_status kl_launch_swiglu(kl_ctx *ctx, const kl_product *gate, const kl_product *up,
                           const kl_weight *w_gate, const kl_weight *w_up, const char *op)
{
    kl_product both[] = { *gate, *up };
    const bool together = kl_go_together(w_gate, w_up);
    if (together && gate->int8.q != nullptr && gate->T <= KL_FEW) {
        kl_int8_launch(ctx, both, 2, true);
        return KL_OK;
    }
    if (together && gate->int8.q == nullptr && way_of(*gate, w_gate) == QUADS)
        return launch_any(ctx, both, 2, QUADS_GATED, w_gate, op, "w_gate");
    KL_TRY(kl_launch_product(ctx, gate, w_gate, op, "w_gate"));
    both[1].gate = gate->y;
    return kl_launch_product(ctx, &both[1], w_up, op, "w_up");
}
