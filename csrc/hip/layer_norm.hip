/* layer_norm (ops/layer_norm.c); y may be x.
 *   v1  one thread a row, in the CPU's order: sixteen running sums, halving tree; the same bytes.
 *   v2  one block a row: reads lie together, a sum is a tree (launched for wide rows).
 *   v3  one team a row: no barrier, eight rows a block (launched for rows of up to 512). */
#include "scalar.h"
#include "reduce.h"
#include "runtime.h"

namespace
{

const int BLOCK = 256, TEAMS = BLOCK / KL_TEAM;
const int64_t TEAM_WIDTH = 512; /* rows up to here go to a team */

struct norm_args {
    float *y;
    const float *x, *w, *b;
    int64_t T, D;
    float eps;
};

/* Of a row times s: its mean, what the mean of the rest adds to that, and the sum of squares of what is left. */
struct moments {
    float s, mean, rest, sq;
    __device__ __forceinline__ float left(float x) const { return x * s - mean - rest; }
};

struct values {
    static __device__ __forceinline__ float added(float acc, float c) { return acc + c; }
};
struct squares {
    static __device__ __forceinline__ float added(float acc, float c) { return fmaf(c, c, acc); }
};

/* SUM: how the threads of a row add up what is left of it, `sum.of<TERMS>(m)` */
template <class SUM> __device__ __forceinline__ moments moments_of(const SUM &sum, float s, float D)
{
    moments m = { s, 0.0f, 0.0f, 0.0f };
    m.mean = sum.template of<values>(m) / D;
    m.rest = sum.template of<values>(m) / D;
    m.sq = sum.template of<squares>(m);
    return m;
}

/* cpu/norm.inc */
__device__ __forceinline__ float scale_of(const moments &m, float eps)
{
    if (!(m.sq < INFINITY)) /* NaN: a difference of infinities */
        return 0x1p-96f;
    return fabsf(m.mean) < 0x1p-30f ? kl_scale_after(m.sq, eps) : 1.0f;
}

template <class SUM>
__device__ __forceinline__ moments good_moments(const norm_args &a, const SUM &sum, float *r)
{
    const float D = static_cast<float>(a.D);
    moments m = moments_of(sum, 1.0f, D);
    const float s = scale_of(m, a.eps);
    if (s != 1.0f) /* the same in every thread of the row */
        m = moments_of(sum, s, D);
    const float eps = a.eps * s * s;
    const float least = a.eps > 0.0f && eps < 0x1p-149f ? 0x1p-149f : eps;
    *r = 1.0f / sqrtf(m.sq / D + least);
    return m;
}

__device__ __forceinline__ void put(const norm_args &a, int64_t row, int64_t d, const moments &m,
                                    float r)
{
    a.y[row + d] = fmaf(a.w[d], m.left(a.x[row + d]) * r, a.b[d]);
}

/* ---- v1 ---- */

struct in_order {
    const float *x;
    int64_t D;
    template <class TERMS> __device__ float of(const moments &m) const
    {
        float lane[16] = {};
        for (int64_t d = 0; d < D; d++)
            lane[d % 16] = TERMS::added(lane[d % 16], m.left(x[d]));
        for (int half = 8; half >= 1; half /= 2)
            for (int l = 0; l < half; l++)
                lane[l] += lane[l + half];
        return lane[0];
    }
};

__global__ void __launch_bounds__(256) layer_norm_v1(norm_args a)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t t = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; t < a.T; t += step) {
        const int64_t row = t * a.D;
        float r;
        const moments m = good_moments(a, in_order{ a.x + row, a.D }, &r);
        for (int64_t d = 0; d < a.D; d++)
            put(a, row, d, m, r);
    }
}

/* ---- v2, v3: `n` threads a row, of which this is number `i` ---- */

template <class TERMS>
__device__ __forceinline__ float part(const float *x, int64_t D, int64_t i, int64_t n,
                                      const moments &m)
{
    float acc = 0.0f;
    for (int64_t d = i; d < D; d += n)
        acc = TERMS::added(acc, m.left(x[d]));
    return acc;
}

struct of_block {
    const float *x;
    int64_t D;
    kl_shared<float> sums;
    template <class TERMS> __device__ __forceinline__ float of(const moments &m) const
    {
        return kl_block_sum<BLOCK>(part<TERMS>(x, D, threadIdx.x, BLOCK, m), sums);
    }
};

__global__ void __launch_bounds__(256) layer_norm_v2(norm_args a)
{
    KL_SHARED(float, sums, [TEAMS]);
    for (int64_t t = blockIdx.x; t < a.T; t += gridDim.x) {
        const int64_t row = t * a.D;
        float r;
        const moments m = good_moments(a, of_block{ a.x + row, a.D, sums }, &r);
        for (int64_t d = threadIdx.x; d < a.D; d += BLOCK)
            put(a, row, d, m, r);
    }
}

struct of_team {
    const float *x;
    int64_t D;
    template <class TERMS> __device__ __forceinline__ float of(const moments &m) const
    {
        return kl_team_sum(part<TERMS>(x, D, kl_lane(), KL_TEAM, m));
    }
};

__global__ void __launch_bounds__(256) layer_norm_v3(norm_args a)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * TEAMS;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * TEAMS; first < a.T; first += step) {
        const int64_t t = first + kl_team(), row = t * a.D;
        const int64_t D =
            t < a.T ? a.D : 0; /* a team behind the last row does nothing, and all the shuffles */
        float r;
        const moments m = good_moments(a, of_team{ a.x + row, D }, &r);
        for (int64_t d = kl_lane(); d < D; d += KL_TEAM)
            put(a, row, d, m, r);
    }
}

} // namespace

kl_status hip_layer_norm(kl_ctx *ctx, float *y, const float *x, const float *w, const float *b,
                         int64_t T, int64_t D, float eps)
{
    const norm_args a = { y, x, w, b, T, D, eps };
    const int version = kl_version();
    if (T == 0)
        return KL_OK;
    if (version == 1)
        KL_LAUNCH(layer_norm_v1, kl_grid(kl_ceil_div(T, BLOCK)), BLOCK, 0, kl_stream(ctx), a);
    else if (version == 2 || D > TEAM_WIDTH)
        KL_LAUNCH(layer_norm_v2, kl_grid(T), BLOCK, 0, kl_stream(ctx), a);
    else
        KL_LAUNCH(layer_norm_v3, kl_grid(kl_ceil_div(T, TEAMS)), BLOCK, 0, kl_stream(ctx), a);
    return kl_launched(ctx, "layer_norm");
}
