/* decay_gate and decay_cumsum (ops/decay_gate.c, ops/decay_cumsum.c): the CPU's bytes.
 *   decay_gate    v1  one value a thread, its head and channel by division.
 *                 v2  one block a token: no division but one of 32 bits (launched).
 *   decay_cumsum  v1  one thread a channel of a sequence.
 *                 v2  one thread a channel of a chunk, where there are chunks: those of a sequence side by side. */
#include "ragged.h"
#include "scalar.h"

namespace
{

const int BLOCK = 256;

/* ---- decay_gate ---- */

struct gates {
    float *g;
    const float *f, *rate, *dt_bias;
    int64_t T, H, K;
    float lower_bound;
};

__device__ __forceinline__ float gate_of(const gates &a, float f, float rate, float bias)
{
    const float x = f + bias;
    return a.lower_bound < 0.0f ? a.lower_bound * kl_sigmoid_of(rate * x)
                                : -rate * kl_softplus_of(x);
}

__global__ void __launch_bounds__(256) decay_gate_v1(gates a)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK, width = a.H * a.K;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < a.T * width;
         i += step)
        a.g[i] = gate_of(a, a.f[i], a.rate[i % width / a.K], a.dt_bias[i % width]);
}

__global__ void __launch_bounds__(256) decay_gate_v2(gates a)
{
    const uint32_t width = static_cast<uint32_t>(a.H * a.K), K = static_cast<uint32_t>(a.K);
    for (int64_t t = blockIdx.x; t < a.T; t += gridDim.x)
        for (uint32_t i = threadIdx.x; i < width; i += BLOCK)
            a.g[t * width + i] = gate_of(a, a.f[t * width + i], a.rate[i / K], a.dt_bias[i]);
}

/* ---- decay_cumsum ---- */

struct sums {
    float *c;
    const float *g;
    const int64_t *offsets;
    int64_t N, T, D, chunk;
};

/* tokens begin .. end - 1 of channel d */
__device__ __forceinline__ void sum_up(const sums &a, int64_t begin, int64_t end, int64_t d)
{
    float sum = 0.0f;
    for (int64_t t = begin; t < end; t++) {
        sum = t == begin ? a.g[t * a.D + d] : sum + a.g[t * a.D + d];
        a.c[t * a.D + d] = sum;
    }
}

__global__ void __launch_bounds__(256) decay_cumsum_v1(sums a)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < a.N * a.D;
         i += step) {
        const int64_t n = i / a.D, end = a.offsets[n + 1];
        for (int64_t t = a.offsets[n]; t < end;) {
            const int64_t last = a.chunk > 0 && a.chunk < end - t ? t + a.chunk : end;
            sum_up(a, t, last, i % a.D);
            t = last;
        }
    }
}

/* Tasks are the call's tokens by `chunk`: to each its share of the chunks that begin among them. */
__global__ void __launch_bounds__(256) decay_cumsum_v2(sums a)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    const int64_t tasks = (a.T - 1) / a.chunk + 1;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < tasks * a.D;
         i += step) {
        const int64_t first = i / a.D * a.chunk;
        const int64_t end = a.chunk < a.T - first ? first + a.chunk : a.T;
        for (int64_t t = first, n = kl_sequence_of(a.offsets, a.N, first); t < end; n++) {
            const int64_t begin = a.offsets[n], last = a.offsets[n + 1];
            if (t > begin) /* to the first chunk of it from t on */
                t = begin + ((t - begin - 1) / a.chunk + 1) * a.chunk;
            for (; t < end && t < last; t += a.chunk)
                sum_up(a, t, a.chunk < last - t ? t + a.chunk : last, i % a.D);
            t = t > last ? last : t;
        }
    }
}

} // namespace

kl_status hip_decay_gate(kl_ctx *ctx, float *g, const float *f, const float *rate,
                         const float *dt_bias, int64_t T, int64_t H, int64_t K, float lower_bound)
{
    const gates a = { g, f, rate, dt_bias, T, H, K, lower_bound };
    if (T == 0)
        return KL_OK;
    if (kl_version() == 1 || H * K > INT32_MAX)
        KL_LAUNCH(decay_gate_v1, kl_grid(kl_ceil_div(T * H * K, BLOCK)), BLOCK, 0, kl_stream(ctx),
                  a);
    else
        KL_LAUNCH(decay_gate_v2, kl_grid(T), BLOCK, 0, kl_stream(ctx), a);
    return kl_launched(ctx, "decay_gate");
}

kl_status hip_decay_cumsum(kl_ctx *ctx, float *c, const float *g, const int64_t *offsets, int64_t N,
                           int64_t T, int64_t D, int64_t chunk)
{
    sums a = { c, g, nullptr, N, T, D, chunk };
    if (T == 0)
        return KL_OK;
    KL_TRY(kl_put_table(ctx, &a.offsets, offsets, N + 1));
    if (kl_core_of->measuring(ctx))
        return KL_OK;
    if (kl_version() == 1 || chunk == 0)
        KL_LAUNCH(decay_cumsum_v1, kl_grid(kl_ceil_div(N * D, BLOCK)), BLOCK, 0, kl_stream(ctx), a);
    else
        KL_LAUNCH(decay_cumsum_v2, kl_grid(kl_ceil_div(((T - 1) / chunk + 1) * D, BLOCK)), BLOCK, 0,
                  kl_stream(ctx), a);
    return kl_launched(ctx, "decay_cumsum");
}
