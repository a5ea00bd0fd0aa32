/* The ops that work element by element (ops/elementwise.c, ops/sigmoid_gate.c); y may be an input.
 *   v1  one value a thread, walking over the array.
 *   v2  four values a thread, in one load (launched where the arrays lie on 16 bytes). */
#include "scalar.h"
#include "runtime.h"

namespace
{

const int BLOCK = 256;

struct add {
    static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};
struct sigmoid {
    static __device__ __forceinline__ float of(float x, float) { return kl_sigmoid_of(x); }
};
struct swiglu {
    static __device__ __forceinline__ float of(float gate, float up, float limit)
    {
        return kl_swiglu_of(gate, up, limit);
    }
};

struct situ {
    static __device__ __forceinline__ float of(float gate, float up, kl_situ_betas betas)
    {
        const float up_of = betas.linear_beta > 0.0f ? kl_bounded_of(up, betas.linear_beta) : up;
        return kl_bounded_of(gate, betas.beta) * kl_sigmoid_of(gate) * up_of;
    }
};

/* MORE: what an op has besides its arrays */
template <class OF, class... MORE>
__global__ void __launch_bounds__(256)
    elementwise_v1(float *y, const float *a, const float *b, int64_t n, MORE... more)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < n; i += step)
        y[i] = OF::of(a[i], b[i], more...);
}

template <class OF, class... MORE>
__global__ void __launch_bounds__(256)
    elementwise_v2(float4 *y, const float4 *a, const float4 *b, int64_t n4, MORE... more)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < n4; i += step) {
        const float4 p = a[i], q = b[i];
        float4 r;
        r.x = OF::of(p.x, q.x, more...);
        r.y = OF::of(p.y, q.y, more...);
        r.z = OF::of(p.z, q.z, more...);
        r.w = OF::of(p.w, q.w, more...);
        y[i] = r;
    }
}

/* sigmoid_gate: v1 divides for the gate of each value; v2 has a block a row and divides in 32 bits */
__global__ void __launch_bounds__(256)
    sigmoid_gate_v1(float *y, const float *x, const float *gate, int64_t n, int64_t width)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < n; i += step)
        y[i] = x[i] * kl_sigmoid_of(gate[i / width]);
}

__global__ void __launch_bounds__(256) sigmoid_gate_v2(float *y, const float *x, const float *gate,
                                                       int64_t T, int64_t G, unsigned width)
{
    const unsigned D = static_cast<unsigned>(G) * width;
    for (int64_t t = blockIdx.x; t < T; t += gridDim.x)
        for (unsigned d = threadIdx.x; d < D; d += BLOCK)
            y[t * D + d] = x[t * D + d] * kl_sigmoid_of(gate[t * G + d / width]);
}

bool on_16_bytes(const void *p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class OF, class... MORE>
kl_status launch(kl_ctx *ctx, const char *op, float *y, const float *a, const float *b, int64_t n,
                 MORE... more)
{
    const bool wide = kl_version() >= 2 && on_16_bytes(y) && on_16_bytes(a) && on_16_bytes(b);
    const int64_t n4 = wide ? n / 4 : 0, rest = n - 4 * n4;
    if (n4 > 0)
        KL_LAUNCH((elementwise_v2<OF, MORE...>), kl_grid(kl_ceil_div(n4, BLOCK)), BLOCK, 0,
                  kl_stream(ctx), reinterpret_cast<float4 *>(y),
                  reinterpret_cast<const float4 *>(a), reinterpret_cast<const float4 *>(b), n4,
                  more...);
    if (rest > 0)
        KL_LAUNCH((elementwise_v1<OF, MORE...>), kl_grid(kl_ceil_div(rest, BLOCK)), BLOCK, 0,
                  kl_stream(ctx), y + 4 * n4, a + 4 * n4, b + 4 * n4, rest, more...);
    return kl_launched(ctx, op);
}

} // namespace

kl_status hip_add(kl_ctx *ctx, float *y, const float *a, const float *b, int64_t n)
{
    return launch<add>(ctx, "add", y, a, b, n);
}

kl_status hip_sigmoid(kl_ctx *ctx, float *y, const float *x, int64_t n)
{
    return launch<sigmoid>(ctx, "sigmoid", y, x, x, n);
}

kl_status hip_swiglu(kl_ctx *ctx, float *y, const float *gate, const float *up, int64_t n,
                     float limit)
{
    return launch<swiglu>(ctx, "swiglu", y, gate, up, n, limit);
}

kl_status hip_situ(kl_ctx *ctx, float *y, const float *gate, const float *up, int64_t n,
                   const kl_situ_betas *betas)
{
    return launch<situ>(ctx, "situ", y, gate, up, n, *betas);
}

kl_status hip_sigmoid_gate(kl_ctx *ctx, float *y, const float *x, const float *gate, int64_t T,
                           int64_t D, int64_t G)
{
    if (T == 0)
        return KL_OK;
    if (kl_version() == 1 || D > INT32_MAX)
        KL_LAUNCH(sigmoid_gate_v1, kl_grid(kl_ceil_div(T * D, BLOCK)), BLOCK, 0, kl_stream(ctx), y,
                  x, gate, T * D, D / G);
    else
        KL_LAUNCH(sigmoid_gate_v2, kl_grid(T), BLOCK, 0, kl_stream(ctx), y, x, gate, T, G,
                  static_cast<unsigned>(D / G));
    return kl_launched(ctx, "sigmoid_gate");
}
