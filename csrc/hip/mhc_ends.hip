/* mhc_expand and mhc_collapse (ops/mhc_ends.c): a value of a stream, and of what all give, a thread; the CPU's order. */
#include "scalar.h"
#include "runtime.h"

namespace
{

const int BLOCK = 256;

/* count: T n D values of y */
__global__ void __launch_bounds__(256)
    mhc_expand_v1(float *y, const float *x, int64_t count, int64_t n, int64_t D)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < count; i += step)
        y[i] = x[i / (n * D) * D + i % D];
}

/* count: T D values of y */
__global__ void __launch_bounds__(256)
    mhc_collapse_v1(float *y, const float *x, int64_t count, int64_t n, int64_t D)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < count; i += step) {
        const float *from = x + i / D * n * D + i % D;
        float sum = from[0];
        for (int64_t s = 1; s < n; s++)
            sum += from[s * D];
        y[i] = sum / static_cast<float>(n);
    }
}

} // namespace

kl_status hip_mhc_expand(kl_ctx *ctx, float *y, const float *x, int64_t T, int64_t n, int64_t D)
{
    if (kl_core_of->measuring(ctx) || T == 0)
        return KL_OK;
    KL_LAUNCH(mhc_expand_v1, kl_grid(kl_ceil_div(T * n * D, BLOCK)), BLOCK, 0, kl_stream(ctx), y, x,
              T * n * D, n, D);
    return kl_launched(ctx, "mhc_expand");
}

kl_status hip_mhc_collapse(kl_ctx *ctx, float *y, const float *x, int64_t T, int64_t n, int64_t D)
{
    if (kl_core_of->measuring(ctx) || T == 0)
        return KL_OK;
    KL_LAUNCH(mhc_collapse_v1, kl_grid(kl_ceil_div(T * D, BLOCK)), BLOCK, 0, kl_stream(ctx), y, x,
              T * D, n, D);
    return kl_launched(ctx, "mhc_collapse");
}
