/* softmax (ops/softmax.c); y may be x.
 *   v1  one thread a row, in the CPU's order: sixteen running sums, halving tree.
 *   v2  one block a row, tree over the block (launched). */
#include "scalar.h"
#include "reduce.h"
#include "runtime.h"

namespace
{

const int BLOCK = 256;

__global__ void __launch_bounds__(256, 1) softmax_v1(float *y, const float *x, int64_t T, int64_t D)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t t = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; t < T; t += step) {
        const int64_t row = t * D;
        float top = -INFINITY, lane[16] = {};
        for (int64_t d = 0; d < D; d++)
            top = kl_larger(top, x[row + d]);
        for (int64_t d = 0; d < D; d++) {
            y[row + d] = kl_exp(x[row + d] - top);
            lane[d % 16] += y[row + d];
        }
        for (int half = 8; half >= 1; half /= 2)
            for (int l = 0; l < half; l++)
                lane[l] += lane[l + half];
        for (int64_t d = 0; d < D; d++)
            y[row + d] = y[row + d] / lane[0];
    }
}

__global__ void __launch_bounds__(256) softmax_v2(float *y, const float *x, int64_t T, int64_t D)
{
    KL_SHARED(float, parts, [BLOCK / KL_TEAM]);
    for (int64_t t = blockIdx.x; t < T; t += gridDim.x) {
        const int64_t row = t * D;
        float top = -INFINITY, sum = 0.0f;
        for (int64_t d = threadIdx.x; d < D; d += BLOCK)
            top = kl_larger(top, x[row + d]);
        top = kl_block_max<BLOCK>(top, parts);
        for (int64_t d = threadIdx.x; d < D; d += BLOCK) {
            const float e = kl_exp(x[row + d] - top);
            y[row + d] = e;
            sum += e;
        }
        sum = kl_block_sum<BLOCK>(sum, parts);
        for (int64_t d = threadIdx.x; d < D; d += BLOCK)
            y[row + d] = y[row + d] / sum;
    }
}

} // namespace

kl_status hip_softmax(kl_ctx *ctx, float *y, const float *x, int64_t T, int64_t D)
{
    if (T == 0)
        return KL_OK;
    if (kl_version() == 1)
        KL_LAUNCH(softmax_v1, kl_grid(kl_ceil_div(T, BLOCK)), BLOCK, 0, kl_stream(ctx), y, x, T, D);
    else
        KL_LAUNCH(softmax_v2, kl_grid(T), BLOCK, 0, kl_stream(ctx), y, x, T, D);
    return kl_launched(ctx, "softmax");
}
