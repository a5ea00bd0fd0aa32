/* attn_res (ops/attn_res.c); y may be x. Scores, then weights, lie in scratch [T, n + 1]: n has no limit.
 *   v1  one thread a token, in the CPU's order: sixteen running sums, halving tree; the same bytes.
 *   v2  one block a token: rows are read together, a score's two sums are trees (launched). */
#include "scalar.h"
#include "reduce.h"
#include "runtime.h"

namespace
{

const int BLOCK = 256, TEAMS = BLOCK / KL_TEAM;

struct mixing {
    float *y;
    const float *snapshots, *x, *w;
    float *p;
    int64_t n, T, D;
    float eps;
};

/* of a score: the sums over d of w v s and of (v s)^2 */
struct sums {
    float dot, sq;
};

__device__ __forceinline__ const float *candidate(const mixing &a, int64_t t, int64_t j)
{
    return j < a.n ? a.snapshots + (j * a.T + t) * a.D : a.x + t * a.D;
}

__device__ __forceinline__ float score_of(const mixing &a, sums of, float s)
{
    return of.dot / sqrtf(of.sq / static_cast<float>(a.D) + a.eps * s * s);
}

/* A value of a token's result, from its weights p. A sum that begins at +0 would lose -0. */
__device__ __forceinline__ float mixed(const mixing &a, const float *p, int64_t t, int64_t d)
{
    float acc = p[0] * candidate(a, t, 0)[d];
    for (int64_t j = 1; j <= a.n; j++)
        acc = fmaf(p[j], candidate(a, t, j)[d], acc);
    return acc;
}

/* ---- v1 ---- */

__device__ float halved(float *lane)
{
    for (int half = 8; half >= 1; half /= 2)
        for (int l = 0; l < half; l++)
            lane[l] += lane[l + half];
    return lane[0];
}

__device__ sums sums_in_order(const mixing &a, const float *v, float s)
{
    float along[16] = {}, square[16] = {};
    for (int64_t d = 0; d < a.D; d++) {
        along[d % 16] = fmaf(a.w[d], v[d] * s, along[d % 16]);
        square[d % 16] = fmaf(v[d] * s, v[d] * s, square[d % 16]);
    }
    return sums{ halved(along), halved(square) };
}

__device__ float score_in_order(const mixing &a, const float *v)
{
    sums of = sums_in_order(a, v, 1.0f);
    const float s = kl_scale_after(of.sq, a.eps);
    if (s != 1.0f)
        of = sums_in_order(a, v, s);
    return score_of(a, of, s);
}

__device__ void softmax_in_order(float *p, int64_t n)
{
    float top = -INFINITY, lane[16] = {};
    for (int64_t j = 0; j < n; j++)
        top = kl_larger(top, p[j]);
    for (int64_t j = 0; j < n; j++) {
        p[j] = kl_exp(p[j] - top);
        lane[j % 16] += p[j];
    }
    const float total = halved(lane);
    for (int64_t j = 0; j < n; j++)
        p[j] = p[j] / total;
}

__global__ void __launch_bounds__(256) attn_res_v1(mixing a)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t t = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; t < a.T; t += step) {
        float *p = a.p + t * (a.n + 1);
        for (int64_t j = 0; j <= a.n; j++)
            p[j] = score_in_order(a, candidate(a, t, j));
        softmax_in_order(p, a.n + 1);
        for (int64_t d = 0; d < a.D; d++)
            a.y[t * a.D + d] = mixed(a, p, t, d);
    }
}

/* ---- v2: every thread of the block gets each sum ---- */

__device__ __forceinline__ sums sums_of_block(const mixing &a, const float *v, float s,
                                              kl_shared<float> parts)
{
    sums of = { 0.0f, 0.0f };
    for (int64_t d = threadIdx.x; d < a.D; d += BLOCK) {
        const float scaled = v[d] * s;
        of.dot = fmaf(a.w[d], scaled, of.dot);
        of.sq = fmaf(scaled, scaled, of.sq);
    }
    of.dot = kl_block_sum<BLOCK>(of.dot, parts);
    of.sq = kl_block_sum<BLOCK>(of.sq, parts);
    return of;
}

__device__ __forceinline__ float score_of_block(const mixing &a, const float *v,
                                                kl_shared<float> parts)
{
    sums of = sums_of_block(a, v, 1.0f, parts);
    const float s = kl_scale_after(of.sq, a.eps);
    if (s != 1.0f) /* the same in every thread */
        of = sums_of_block(a, v, s, parts);
    return score_of(a, of, s);
}

__device__ __forceinline__ void softmax_of_block(float *p, int64_t n, kl_shared<float> parts)
{
    float top = -INFINITY, sum = 0.0f;
    for (int64_t j = threadIdx.x; j < n; j += BLOCK)
        top = kl_larger(top, p[j]);
    top = kl_block_max<BLOCK>(top, parts);
    for (int64_t j = threadIdx.x; j < n; j += BLOCK) {
        p[j] = kl_exp(p[j] - top);
        sum += p[j];
    }
    sum = kl_block_sum<BLOCK>(sum, parts);
    for (int64_t j = threadIdx.x; j < n; j += BLOCK)
        p[j] = p[j] / sum;
}

__global__ void __launch_bounds__(256) attn_res_v2(mixing a)
{
    KL_SHARED(float, parts, [TEAMS]);
    for (int64_t t = blockIdx.x; t < a.T; t += gridDim.x) {
        float *p = a.p + t * (a.n + 1);
        for (int64_t j = 0; j <= a.n; j++) {
            const float score = score_of_block(a, candidate(a, t, j), parts);
            if (threadIdx.x == 0)
                p[j] = score;
        }
        __syncthreads();
        softmax_of_block(p, a.n + 1, parts);
        __syncthreads();
        for (int64_t d = threadIdx.x; d < a.D; d += BLOCK)
            a.y[t * a.D + d] = mixed(a, p, t, d);
    }
}

/* ---- no snapshots ---- */

__global__ void __launch_bounds__(256) attn_res_copy(float *y, const float *x, int64_t n)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < n; i += step)
        y[i] = x[i];
}

} // namespace

kl_status hip_attn_res(kl_ctx *ctx, float *y, const float *snapshots, const float *x,
                       const float *w, int64_t n, int64_t T, int64_t D, float eps)
{
    mixing a = { y, snapshots, x, w, nullptr, n, T, D, eps };
    if (T == 0 || (n == 0 && y == x))
        return KL_OK;
    if (n > 0)
        KL_SCRATCH_OF(a.p, ctx, T * (n + 1));
    if (kl_core_of->measuring(ctx))
        return KL_OK;
    if (n == 0)
        KL_LAUNCH(attn_res_copy, kl_grid(kl_ceil_div(T * D, BLOCK)), BLOCK, 0, kl_stream(ctx), y, x,
                  T * D);
    else if (kl_version() == 1)
        KL_LAUNCH(attn_res_v1, kl_grid(kl_ceil_div(T, BLOCK)), BLOCK, 0, kl_stream(ctx), a);
    else
        KL_LAUNCH(attn_res_v2, kl_grid(T), BLOCK, 0, kl_stream(ctx), a);
    return kl_launched(ctx, "attn_res");
}
