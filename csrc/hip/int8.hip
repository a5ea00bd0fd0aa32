/* Products with activations in int8: cpu/int8.h has the definition, with the order of the sums, and an element has the
 * CPU's bytes. Integers are exact in any order, so eight threads share an output, lane b with block b of each 256 inputs.
 *   few    up to KL_FEW rows of x: eight threads a row of w, of which they read a block each.
 *   many   32 x 32 outputs a block over shared memory: half of its threads bring weights, half rows of x; then eight
 *          threads share 4 x 4 outputs, a lane of each a thread. */
#include "product_rows.h"

#include "int8_blocks.h"
#include "tile.h"

namespace
{

const int BLOCK = 256, LANES = KL_INT8_BLOCKS, SETS = BLOCK / LANES;
/* threads of `many`; rows of a set's outputs */
const int TILE = KL_TILE, MANY = 2 * TILE * LANES, OWN = 4;
/* words from row to row of shared memory: the four sets of 32 threads, OWN rows apart, have their own banks */
const int APART = LANES + 2;
static_assert(TILE / OWN * (TILE / OWN) == MANY / LANES, "a set has OWN x OWN outputs");

__device__ __forceinline__ int dot(const kl_words4 &w, const kl_words4 &x)
{
    int sum = 0;
    KL_UNROLL
    for (int i = 0; i < 4; i++)
        sum = kl_dot4(w.at[i], x.at[i], sum);
    return sum;
}

/* what a block adds to its lane, over the scale of x: `sum` are products of the bits, and their subs where the type is
 * fine, over both halves */
template <class TYPE>
__device__ __forceinline__ float inner_of(int sum, float d, float m, const int (&sub_min)[2],
                                          const kl_int8_scale &x)
{
    if constexpr (!TYPE::fine)
        sum -= TYPE::offset * (x.sum[0] + x.sum[1]);
    const float inner = d * static_cast<float>(sum);
    if constexpr (!TYPE::has_min)
        return inner;
    const int of_x =
        TYPE::fine ? sub_min[0] * x.sum[0] + sub_min[1] * x.sum[1] : x.sum[0] + x.sum[1];
    return fmaf(-m, static_cast<float>(of_x), inner);
}

/* the products of half h */
template <class TYPE>
__device__ __forceinline__ int half_of(const kl_words4 &w, const kl_words4 &x, int sub,
                                       int sum_of_x)
{
    const int sum = dot(w, x);
    return TYPE::fine ? sub * (sum - TYPE::offset * sum_of_x) : sum;
}

/* what lane b has of a row of x: a block of each group */
struct blocks_of_x {
    const kl_words4 *q; /* two */
    const kl_int8_scale *scale;
    __device__ __forceinline__ blocks_of_x operator+(int64_t groups) const
    {
        return { q + groups * LANES * 2, scale + groups * LANES };
    }
};
__device__ __forceinline__ blocks_of_x x_row(const kl_product &p, int64_t t, int b)
{
    const int64_t row = p.index != nullptr ? p.index[t] : t;
    return blocks_of_x{ reinterpret_cast<const kl_words4 *>(p.int8.q) + b * 2, p.int8.scale + b }
           + row * p.int8.groups;
}

/* groups of 256 inputs in which lane b has a block */
__device__ __forceinline__ int groups_with(const kl_product &p, int b)
{
    return static_cast<int>((p.D - 32 * b + KL_INT8_VALUES - 1) / KL_INT8_VALUES);
}

/* The first product's blocks take the second, too, where `gated`: y = swiglu of x of[0].w and x of[1].w.
 * MOST rows of x. */
template <kl_type T, int MOST>
__global__ void __launch_bounds__(256) int8_few(kl_products a, int64_t first, bool gated)
{
    using TYPE = kl_int8_block<T>;
    const int b = static_cast<int>(threadIdx.x) % LANES,
              set = static_cast<int>(threadIdx.x) / LANES;
    int64_t task = first + blockIdx.x;
    int i = kl_product_of<T>(a, task);
    const int64_t across = (a.of[i].w.rows + SETS - 1) / SETS;
    if (task >= kl_product_groups(a.of[i]) * across) /* the same in every thread */
        return;
    const kl_row_group g = kl_product_group(a.of[i], task / across, MOST);
    const int64_t r = task % across * SETS + set;
    float gate[MOST] = {};
    for (const int last = gated ? 1 : i; i <= last; i++) {
        const kl_product &p = a.of[i];
        const kl_matrix w = kl_product_matrix(p.w, g.which);
        /* behind the last row: nothing, and all the shuffles */
        const int groups = r < p.w.rows ? groups_with(p, b) : 0;
        blocks_of_x only = x_row(p, g.begin, b);
        const auto *row =
            reinterpret_cast<const uint8_t *>(w.data) + static_cast<size_t>(r) * w.row_bytes;
        float lane[MOST] = {};
        KL_NO_UNROLL
        for (int k = 0; k < groups; k++, row += kl_row_bytes(T, KL_INT8_VALUES), only = only + 1) {
            kl_int8_weights v = {};
            TYPE::read(v, row, static_cast<unsigned>(b));
            KL_UNROLL
            for (int t = 0; t < MOST; t++) {
                if (MOST > 1 && t >= g.count)
                    continue;
                const blocks_of_x at = MOST == 1 ? only : x_row(p, g.begin + t, b) + k;
                const kl_int8_scale x = *at.scale;
                int sum = 0;
                KL_UNROLL
                for (int h = 0; h < 2; h++)
                    sum += half_of<TYPE>(v.half[h], at.q[h], v.sub[h], x.sum[h]);
                lane[t] = fmaf(inner_of<TYPE>(sum, v.d, v.m, v.sub_min, x), x.scale, lane[t]);
            }
        }
        /* A zero block that fills up the last group adds +0, and makes a lane +0 that was -0; x + -0 is x. */
        const float filling = groups < p.int8.groups ? 0.0f : -0.0f;
        KL_UNROLL
        for (int t = 0; t < MOST; t++) {
            if (MOST > 1 && t >= g.count) /* the same in every thread */
                continue;
            lane[t] += filling;
            for (int m = LANES / 2; m >= 1; m /= 2)
                lane[t] += kl_team_swap(lane[t], m);
            if (i < last)
                gate[t] = lane[t];
            else if (b == t && r < p.w.rows)
                kl_product_put(p, g.begin + t, g.which, r,
                               gated ? kl_swiglu_of(gate[t], lane[t], p.limit) : lane[t]);
        }
    }
}

template <kl_type T> __global__ void __launch_bounds__(MANY) int8_many(kl_products a, int64_t first)
{
    using TYPE = kl_int8_block<T>;
    KL_SHARED(kl_words4, ws, [2][TILE][LANES]);
    KL_SHARED(kl_words4, xs, [2][TILE][LANES]);
    KL_SHARED(kl_int8_scale, x_scales, [TILE][LANES]);
    KL_SHARED(float, ds, [TILE][APART]);
    KL_SHARED(float, ms, [TYPE::has_min ? TILE : 1][APART]);
    KL_SHARED(uint32_t, subs, [TYPE::fine ? TILE : 1][APART]); /* a byte each: two, two of minima */
    const int b = static_cast<int>(threadIdx.x) % LANES,
              set = static_cast<int>(threadIdx.x) / LANES, w0 = set % (TILE / OWN) * OWN,
              x0 = set / (TILE / OWN) * OWN;
    const bool brings_w = set < TILE; /* else x: the same in a wave */
    int64_t task = first + blockIdx.x;
    const kl_product &p = a.of[kl_product_of<T>(a, task)];
    const int64_t across = (p.w.rows + TILE - 1) / TILE;
    if (task >= kl_product_groups(p) * across) /* the same in every thread */
        return;
    const kl_row_group g = kl_product_group(p, task / across, TILE);
    const kl_matrix w = kl_product_matrix(p.w, g.which);
    const int64_t r0 = task % across * TILE;
    /* What this thread brings. Behind the last row it is the first again, whose sums nobody takes then. */
    const int own = set % TILE;
    const auto *row = reinterpret_cast<const uint8_t *>(w.data)
                      + static_cast<size_t>(r0 + own < p.w.rows ? r0 + own : r0) * w.row_bytes;
    blocks_of_x x = x_row(p, g.begin + (own < g.count ? own : 0), b);
    const int groups = static_cast<int>(p.int8.groups), /* and those in which it has a block */
        there = groups_with(p, b);
    float lane[OWN][OWN] = {};
    for (int i = 0; i < groups; i++) {
        if (brings_w) {
            kl_int8_weights v = {};
            if (i < there)
                TYPE::read(v, row, static_cast<unsigned>(b));
            for (int h = 0; h < 2; h++)
                ws[h][own][b] = v.half[h];
            ds[own][b] = v.d;
            if constexpr (TYPE::has_min)
                ms[own][b] = v.m;
            if constexpr (TYPE::fine)
                subs[own][b] = static_cast<uint32_t>(v.sub[0] & 255) | (v.sub[1] & 255) << 8
                               | v.sub_min[0] << 16 | v.sub_min[1] << 24;
            row += kl_row_bytes(T, KL_INT8_VALUES);
        } else {
            for (int h = 0; h < 2; h++)
                xs[h][own][b] = x.q[h];
            x_scales[own][b] = *x.scale;
            x = x + 1;
        }
        __syncthreads();
        kl_int8_scale x_scale[OWN];
        KL_UNROLL
        for (int t = 0; t < OWN; t++)
            x_scale[t] = x_scales[x0 + t][b];
        KL_UNROLL
        for (int j = 0; j < OWN; j++) {
            int sum[OWN] = {}, sub[2] = {}, sub_min[2] = {};
            if constexpr (TYPE::fine) {
                const uint32_t packed = subs[w0 + j][b];
                for (int h = 0; h < 2; h++) {
                    sub[h] = static_cast<int8_t>(packed >> 8 * h);
                    sub_min[h] = static_cast<int>(packed >> (16 + 8 * h) & 255u);
                }
            }
            KL_UNROLL
            for (int h = 0; h < 2; h++) {
                const kl_words4 of_w = ws[h][w0 + j][b];
                KL_UNROLL
                for (int t = 0; t < OWN; t++) {
                    const kl_words4 of_x = xs[h][x0 + t][b];
                    sum[t] += half_of<TYPE>(of_w, of_x, sub[h], x_scale[t].sum[h]);
                }
            }
            const float d = ds[w0 + j][b];
            float m = 0.0f;
            if constexpr (TYPE::has_min)
                m = ms[w0 + j][b];
            KL_UNROLL
            for (int t = 0; t < OWN; t++)
                lane[j][t] = fmaf(inner_of<TYPE>(sum[t], d, m, sub_min, x_scale[t]),
                                  x_scale[t].scale, lane[j][t]);
        }
        __syncthreads();
    }
    float v[OWN * OWN];
    KL_UNROLL
    for (int j = 0; j < OWN * OWN; j++)
        v[j] = lane[j % OWN][j / OWN];
    kl_tile_tree<OWN * OWN / 2, LANES / 2>(v, b); /* two are left, from 2 b on */
    KL_UNROLL
    for (int j = 0; j < OWN * OWN / LANES; j++) {
        const int i = b * (OWN * OWN / LANES) + j, t = x0 + i / OWN;
        const int64_t r = r0 + w0 + i % OWN;
        if (t < g.count && r < p.w.rows)
            kl_product_put(p, g.begin + t, g.which, r, v[j]);
    }
}

template <kl_type T> void launch(kl_ctx *ctx, const kl_product *p, int n, bool gated)
{
    const bool few = p->T <= KL_FEW;
    const kl_products a = kl_products_of(p, n, gated, few ? SETS : TILE);
    const int64_t tasks = a.end[KL_TOGETHER - 1];
    for (int64_t first = 0; first < tasks; first += kl_grid(tasks - first)) {
        const unsigned grid = kl_grid(tasks - first);
        if (p->T <= 1)
            KL_LAUNCH((int8_few<T, 1>), grid, BLOCK, 0, kl_stream(ctx), a, first, gated);
        else if (few)
            KL_LAUNCH((int8_few<T, KL_FEW>), grid, BLOCK, 0, kl_stream(ctx), a, first, gated);
        else
            KL_LAUNCH((int8_many<T>), grid, MANY, 0, kl_stream(ctx), a, first);
    }
}

int align_of(kl_type type)
{
    switch (static_cast<int>(type)) {
#define CASE(TYPE)                                                                                 \
    case TYPE: return kl_int8_block<TYPE>::align;
        KL_INT8_TYPES(CASE)
#undef CASE
    default: return 1;
    }
}

} // namespace

kl_status kl_check_blocks(kl_ctx *ctx, const kl_weight *w, const char *op, const char *name)
{
    const int align = align_of(w->type);
    size_t of_all = w->row_bytes; /* bits that are set in any address */
    for (int64_t i = 0; i < w->n && !kl_core_of->measuring(ctx); i++)
        of_all |= reinterpret_cast<size_t>(w->matrix[i]);
    if (!kl_is_narrow(ctx, w) || align <= 2 || of_all % static_cast<size_t>(align) == 0)
        return KL_OK;
    return kl_core_of->fail(
        ctx, KL_ERR_ARG,
        "%s: %s is at no multiple of %d bytes; for int8 activations on a device "
        "blocks of its type must be",
        op, name, align);
}

void kl_int8_launch(kl_ctx *ctx, const kl_product *p, int n, bool gated)
{
    switch (static_cast<int>(p->w.type)) {
#define CASE(TYPE)                                                                                 \
    case TYPE: launch<TYPE>(ctx, p, n, gated); break;
        KL_INT8_TYPES(CASE)
#undef CASE
    default: break; /* no other comes here: kl_is_narrow */
    }
}
