/* rms_norm, gated_rms_norm, l2_norm (ops/rms_norm.c and its neighbours); y may be x or z.
 *   v1  one thread a row: the CPU's sixteen running sums and halving tree, the same bytes as the CPU's sum.
 *   v2  one block a row: reads lie together, the sum is a tree (launched for wide rows).
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
    const float *x, *w, *z; /* w, z: NULL where there is none */
    int64_t T, D;
    float eps, mean_of; /* the sum of squares is divided by mean_of */
    kl_activation activation;
};

/* x s r is what x is multiplied by, s before r. A product with 2^-96 would lose what is small in x: there r takes
 * half of it before it meets x, and the other half comes behind (cpu/norm.inc). */
__device__ __forceinline__ float root(const norm_args &a, float sq, float *s)
{
    const float r = 1.0f / sqrtf(sq / a.mean_of + a.eps * *s * *s);
    if (*s >= 1.0f)
        return r;
    *s = r * 0x1p-48f;
    return 0x1p-48f;
}

__device__ __forceinline__ void put(const norm_args &a, int64_t row, int64_t d, float s, float r)
{
    float v = a.x[row + d] * s * r;
    if (a.w != nullptr)
        v = a.w[d] * v;
    if (a.z != nullptr)
        v *= kl_gate_of(a.z[row + d], a.activation);
    a.y[row + d] = v;
}

/* ---- v1 ---- */

__device__ float sum_sq_in_order(const float *x, int64_t D, float s)
{
    float lane[16] = {};
    for (int64_t d = 0; d < D; d++)
        lane[d % 16] = fmaf(x[d] * s, x[d] * s, lane[d % 16]);
    for (int half = 8; half >= 1; half /= 2)
        for (int l = 0; l < half; l++)
            lane[l] += lane[l + half];
    return lane[0];
}

__global__ void __launch_bounds__(256) norm_v1(norm_args a)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t t = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; t < a.T; t += step) {
        const int64_t row = t * a.D;
        float sq = sum_sq_in_order(a.x + row, a.D, 1.0f);
        float s = kl_scale_after(sq, a.eps);
        if (s != 1.0f)
            sq = sum_sq_in_order(a.x + row, a.D, s);
        const float r = root(a, sq, &s);
        for (int64_t d = 0; d < a.D; d++)
            put(a, row, d, s, r);
    }
}

/* ---- v2, v3: `n` threads a row, of which this is number `i` ---- */

__device__ __forceinline__ float sum_sq_part(const norm_args &a, int64_t row, int64_t i, int64_t n,
                                             float s)
{
    float acc = 0.0f;
    for (int64_t d = i; d < a.D; d += n) {
        const float v = a.x[row + d] * s;
        acc = fmaf(v, v, acc);
    }
    return acc;
}

__global__ void __launch_bounds__(256) norm_v2(norm_args a)
{
    KL_SHARED(float, sums, [TEAMS]);
    for (int64_t t = blockIdx.x; t < a.T; t += gridDim.x) {
        const int64_t row = t * a.D;
        float sq = kl_block_sum<BLOCK>(sum_sq_part(a, row, threadIdx.x, BLOCK, 1.0f), sums);
        float s = kl_scale_after(sq, a.eps);
        if (s != 1.0f) /* the same in every thread */
            sq = kl_block_sum<BLOCK>(sum_sq_part(a, row, threadIdx.x, BLOCK, s), sums);
        const float r = root(a, sq, &s);
        for (int64_t d = threadIdx.x; d < a.D; d += BLOCK)
            put(a, row, d, s, r);
    }
}

__global__ void __launch_bounds__(256) norm_v3(norm_args a)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * TEAMS;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * TEAMS; first < a.T; first += step) {
        const int64_t t = first + kl_team();
        norm_args mine = a;
        mine.D =
            t < a.T ? a.D : 0; /* a team behind the last row does nothing, and all the shuffles */
        const int64_t row = t * a.D;
        float sq = kl_team_sum(sum_sq_part(mine, row, kl_lane(), KL_TEAM, 1.0f));
        float s = kl_scale_after(sq, a.eps);
        if (s != 1.0f) /* the same in every thread of the team */
            sq = kl_team_sum(sum_sq_part(mine, row, kl_lane(), KL_TEAM, s));
        const float r = root(a, sq, &s);
        for (int64_t d = kl_lane(); d < mine.D; d += KL_TEAM)
            put(a, row, d, s, r);
    }
}

kl_status launch(kl_ctx *ctx, const char *op, const norm_args &a)
{
    const int version = kl_version();
    if (a.T == 0)
        return KL_OK;
    if (version == 1)
        KL_LAUNCH(norm_v1, kl_grid(kl_ceil_div(a.T, BLOCK)), BLOCK, 0, kl_stream(ctx), a);
    else if (version == 2 || a.D > TEAM_WIDTH)
        KL_LAUNCH(norm_v2, kl_grid(a.T), BLOCK, 0, kl_stream(ctx), a);
    else
        KL_LAUNCH(norm_v3, kl_grid(kl_ceil_div(a.T, TEAMS)), BLOCK, 0, kl_stream(ctx), a);
    return kl_launched(ctx, op);
}

} // namespace

kl_status hip_rms_norm(kl_ctx *ctx, float *y, const float *x, const float *w, int64_t T, int64_t D,
                       float eps)
{
    return launch(ctx, "rms_norm",
                  norm_args{ y, x, w, nullptr, T, D, eps, static_cast<float>(D), KL_NONE });
}

kl_status hip_gated_rms_norm(kl_ctx *ctx, float *y, const float *x, const float *z, const float *w,
                             int64_t T, int64_t D, float eps, kl_activation activation)
{
    return launch(ctx, "gated_rms_norm",
                  norm_args{ y, x, w, z, T, D, eps, static_cast<float>(D), activation });
}

kl_status hip_l2_norm(kl_ctx *ctx, float *y, const float *x, int64_t T, int64_t D, float eps)
{
    return launch(ctx, "l2_norm", norm_args{ y, x, nullptr, nullptr, T, D, eps, 1.0f, KL_NONE });
}
