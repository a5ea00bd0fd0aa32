/* short_conv (ops/short_conv.c). One chain of fma by rising tap, as on the CPU: its bytes, where nothing is subnormal.
 *   v1  one thread a channel of a sequence: all its tokens, each by W loads.
 *   v2  one thread RUN tokens of a channel: the last W inputs stay in registers, a token is one load (launched).
 * The history is written when all outputs are there, because it may be the history that they read: by v2 where one run is
 * the whole batch, as in decoding, else by a launch of its own. */
#include "ragged.h"
#include "scalar.h"

namespace
{

const int BLOCK = 256, RUN = 16;

struct convolution {
    float *y;
    const float *x, *w;
    kl_states out, in;
    const int64_t *offsets;
    int64_t N, T, C, W;
    kl_activation activation;
    bool keeps; /* a history is asked for */
};

/* The input at token t of a sequence that begins at row `begin`; t counts from -(W - 1). */
__device__ __forceinline__ float input(const convolution &a, const float *history, int64_t begin,
                                       int64_t t, int64_t c)
{
    if (t >= 0)
        return a.x[(begin + t) * a.C + c];
    return history != nullptr ? history[(a.W - 1 + t) * a.C + c] : 0.0f;
}

__device__ __forceinline__ float activated(const convolution &a, float sum)
{
    return a.activation == KL_SILU ? kl_silu_of(sum) : sum;
}

/* The last W - 1 inputs of a channel, read before they are written over: row i is read from rows i and later. */
__device__ __forceinline__ void keep(const convolution &a, int64_t n, int64_t c)
{
    const int64_t begin = a.offsets[n];
    const float *history = kl_state_of(a.in, n);
    float *to = kl_state_of(a.out, n);
    for (int64_t j = 0; j < a.W - 1; j++)
        to[j * a.C + c] = input(a, history, begin, a.offsets[n + 1] - begin - (a.W - 1) + j, c);
}

__global__ void __launch_bounds__(256) short_conv_v1(convolution a)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < a.N * a.C;
         i += step) {
        const int64_t n = i / a.C, c = i % a.C, begin = a.offsets[n];
        const float *history = kl_state_of(a.in, n);
        for (int64_t t = 0; t < a.offsets[n + 1] - begin; t++) {
            float sum = 0.0f;
            for (int64_t j = 0; j < a.W; j++)
                sum = fmaf(a.w[c * a.W + j], input(a, history, begin, t - a.W + 1 + j, c), sum);
            a.y[(begin + t) * a.C + c] = activated(a, sum);
        }
    }
}

template <int W> __global__ void __launch_bounds__(256, 1) short_conv_v2(convolution a)
{
    const int64_t runs = (a.T + RUN - 1) / RUN, step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < runs * a.C;
         i += step) {
        const int64_t c = i % a.C, first = i / a.C * RUN;
        const int64_t last = first + RUN < a.T ? first + RUN : a.T;
        int64_t n = kl_sequence_of(a.offsets, a.N, first), next = first;
        float tap[W], seen[W] = {}; /* seen: the inputs of taps 0 .. W - 1 */
        for (int j = 0; j < W; j++)
            tap[j] = a.w[c * W + j];
        for (int64_t t = first; t < last; t++) {
            if (t == next) { /* the run's first token, or a sequence's */
                while (a.offsets[n + 1] <= t)
                    n++;
                const float *history = kl_state_of(a.in, n);
                const int64_t begin = a.offsets[n];
                for (int j = 1; j < W; j++)
                    seen[j] = input(a, history, begin, t - begin - W + j, c);
                next = a.offsets[n + 1];
            }
            float sum = 0.0f;
            for (int j = 0; j + 1 < W; j++)
                seen[j] = seen[j + 1];
            seen[W - 1] = a.x[t * a.C + c];
            for (int j = 0; j < W; j++)
                sum = fmaf(tap[j], seen[j], sum);
            a.y[t * a.C + c] = activated(a, sum);
        }
        for (n = 0; runs == 1 && a.keeps && n < a.N; n++)
            keep(a, n, c);
    }
}

__global__ void __launch_bounds__(256) short_conv_keep(convolution a)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < a.N * a.C;
         i += step)
        keep(a, i / a.C, i % a.C);
}

void convolve(kl_ctx *ctx, const convolution &a)
{
    if (kl_version() == 1) {
        KL_LAUNCH(short_conv_v1, kl_grid(kl_ceil_div(a.N * a.C, BLOCK)), BLOCK, 0, kl_stream(ctx),
                  a);
        return;
    }
    const unsigned grid = kl_grid(kl_ceil_div(kl_ceil_div(a.T, RUN) * a.C, BLOCK));
    switch (a.W) {
#define CASE(W)                                                                                    \
    case W: KL_LAUNCH((short_conv_v2<W>), grid, BLOCK, 0, kl_stream(ctx), a); break
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
        CASE(5);
        CASE(6);
        CASE(7);
        CASE(8);
#undef CASE
    }
}

} // namespace

kl_status hip_short_conv(kl_ctx *ctx, float *y, kl_slots history_out, const float *x,
                         const float *w, kl_slots history_in, const int64_t *offsets, int64_t N,
                         int64_t T, int64_t C, int64_t W, kl_activation activation)
{
    const bool keeps = N > 0 && W > 1 && history_out.base != nullptr;
    convolution a = { y, x, w, {}, {}, nullptr, N, T, C, W, activation, keeps };
    KL_TRY(kl_put_table(ctx, &a.offsets, offsets, N + 1));
    KL_TRY(kl_put_states(ctx, &a.out, history_out, N));
    KL_TRY(kl_put_states(ctx, &a.in, history_in, N));
    if (kl_core_of->measuring(ctx))
        return KL_OK;
    if (T > 0)
        convolve(ctx, a);
    if (keeps && (kl_version() == 1 || T == 0 || T > RUN))
        KL_LAUNCH(short_conv_keep, kl_grid(kl_ceil_div(N * C, BLOCK)), BLOCK, 0, kl_stream(ctx), a);
    return kl_launched(ctx, "short_conv");
}
