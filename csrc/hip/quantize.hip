/* quantize, dequantize (ops/quantize.c): the CPU's bytes, by quant/<type>.c.
 *   dequantize  v1 one value a thread.
 *   quantize    v1 one block of values a thread. What is searched for (the K types, IQ4) and what asks a vendor's log2
 *               (MXFP4) is written on the CPU. */
#include "runtime.h"
#include "stored.h"

namespace
{

const int BLOCK = 256;

template <kl_type TYPE>
__global__ void __launch_bounds__(256) dequantize_v1(float *y, const char *x, kl_type type,
                                                     size_t row_bytes, int64_t rows, int64_t cols)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK, n = rows * cols;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < n; i += step)
        y[i] = kl_value_at<TYPE>(type, x + static_cast<size_t>(i / cols) * row_bytes, i % cols);
}

/* the first value that is not finite, and its place */
__global__ void __launch_bounds__(256) scan(unsigned long long *bad, const float *x, int64_t n)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < n; i += step)
        if (!(fabsf(x[i]) < INFINITY))
            atomicMin(bad, static_cast<unsigned long long>(i));
}

/* float16 bits, to nearest even: kl_f16_of */
__device__ __forceinline__ uint16_t f16_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x477ff000u) /* 65520 and above */
        return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {                     /* below 2^-14: steps of 2^-24 */
        const float f = kl_float_of(magnitude) + 0.5f; /* rounds to a multiple of 2^-24 */
        memcpy(&magnitude, &f, sizeof f);
        return static_cast<uint16_t>(sign | (magnitude - 0x3f000000u));
    }
    magnitude += 0xfffu + (magnitude >> 13 & 1u);
    return static_cast<uint16_t>(sign | (magnitude - (112u << 23)) >> 13);
}

/* toward zero, the low eight bits; 0 for what no int32 holds: kl_byte_of */
__device__ __forceinline__ uint8_t byte_of(float x)
{
    return x > -0x1p31f && x < 0x1p31f ? static_cast<uint8_t>(static_cast<int32_t>(x) & 255) : 0;
}

__device__ __forceinline__ float inverse_of(float d) { return d != 0.0f ? 1.0f / d : 0.0f; }

/* of 32 values the one farthest from zero, the first of equals */
__device__ __forceinline__ float extreme_of(const float *x)
{
    float extreme = x[0];
    for (int j = 1; j < 32; j++)
        extreme = fabsf(x[j]) > fabsf(extreme) ? x[j] : extreme;
    return extreme;
}

__device__ __forceinline__ void put_f16(uint8_t *to, float x)
{
    const uint16_t h = f16_of(x);
    to[0] = static_cast<uint8_t>(h & 255);
    to[1] = static_cast<uint8_t>(h >> 8);
}

/* a level from 0 to `top` */
__device__ __forceinline__ int clip(float x, int top)
{
    const int q = byte_of(x);
    return q < top ? q : top;
}

/* bits 0 to 3 of 32 levels: byte j has those of j (low) and j + 16; and bit 4 of level j as bit j */
template <class LEVEL> __device__ __forceinline__ void put_low(uint8_t *to, LEVEL level)
{
    for (int j = 0; j < 16; j++)
        to[j] = static_cast<uint8_t>((level(j) & 15) | (level(j + 16) & 15) << 4);
}
template <class LEVEL> __device__ __forceinline__ void put_high(uint8_t *to, LEVEL level)
{
    uint32_t bits = 0;
    for (int j = 0; j < 32; j++)
        bits |= static_cast<uint32_t>(level(j) >> 4) << j;
    for (int i = 0; i < 4; i++)
        to[i] = static_cast<uint8_t>(bits >> 8 * i & 255);
}

/* Levels of 32 values as one scale has them: from -zero on, the value farthest from zero being -zero. */
struct around_zero {
    const float *x;
    float d, inverse, zero;
    __device__ __forceinline__ around_zero(const float *from, float at)
        : x(from), d(extreme_of(from) / -at), inverse(inverse_of(d)), zero(at)
    {
    }
    __device__ __forceinline__ int operator()(int j) const
    {
        return clip(x[j] * inverse + (zero + 0.5f), static_cast<int>(zero) * 2 - 1);
    }
};
/* as a scale and the least value have them: from it on, in `top` steps to the greatest */
struct from_least {
    const float *x;
    float m, d, inverse;
    int top;
    __device__ __forceinline__ from_least(const float *from, int steps)
        : x(from), m(from[0]), top(steps)
    {
        float greatest = x[0];
        for (int j = 1; j < 32; j++) {
            m = x[j] < m ? x[j] : m;
            greatest = x[j] > greatest ? x[j] : greatest;
        }
        d = (greatest - m) / static_cast<float>(steps);
        inverse = inverse_of(d);
    }
    __device__ __forceinline__ int operator()(int j) const
    {
        return clip((x[j] - m) * inverse + 0.5f, top);
    }
};

/* The types that are written, and a block of each. */
#define KL_WRITTEN_TYPES(TYPE) TYPE(Q8_0) TYPE(Q4_0) TYPE(Q4_1) TYPE(Q5_0) TYPE(Q5_1)

template <kl_type TYPE> struct written;
template <> struct written<KL_Q8_0> {
    static __device__ void block(uint8_t *b, const float *x)
    {
        const float d = fabsf(extreme_of(x)) / 127.0f, inverse = inverse_of(d);
        put_f16(b, d);
        for (int j = 0; j < 32; j++)
            b[2 + j] = byte_of(roundf(x[j] * inverse));
    }
};
template <> struct written<KL_Q4_0> {
    static __device__ void block(uint8_t *b, const float *x)
    {
        const around_zero level(x, 8.0f);
        put_f16(b, level.d);
        put_low(b + 2, level);
    }
};
template <> struct written<KL_Q5_0> {
    static __device__ void block(uint8_t *b, const float *x)
    {
        const around_zero level(x, 16.0f);
        put_f16(b, level.d);
        put_high(b + 2, level);
        put_low(b + 6, level);
    }
};
template <> struct written<KL_Q4_1> {
    static __device__ void block(uint8_t *b, const float *x)
    {
        const from_least level(x, 15);
        put_f16(b, level.d);
        put_f16(b + 2, level.m);
        put_low(b + 4, level);
    }
};
template <> struct written<KL_Q5_1> {
    static __device__ void block(uint8_t *b, const float *x)
    {
        const from_least level(x, 31);
        put_f16(b, level.d);
        put_f16(b + 2, level.m);
        put_high(b + 4, level);
        put_low(b + 8, level);
    }
};

template <kl_type TYPE>
__global__ void __launch_bounds__(256) quantize_v1(uint8_t *y, const float *x, int64_t blocks)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < blocks; i += step)
        written<TYPE>::block(y + i * kl_stored<TYPE>::block::bytes, x + 32 * i);
}

#define NAME(TYPE) " " #TYPE
const char WRITTEN[] = KL_WRITTEN_TYPES(NAME);
#undef NAME

bool is_written(kl_type type)
{
    switch (static_cast<int>(type)) {
#define CASE(TYPE) case KL_##TYPE:
        KL_WRITTEN_TYPES(CASE)
#undef CASE
        return true;
    default: return false;
    }
}

kl_status check_finite(kl_ctx *ctx, const float *x, int64_t n, int64_t cols)
{
    unsigned long long first = ~0ULL, *bad;
    float value = 0.0f;
    KL_SCRATCH_OF(bad, ctx, 1);
    KL_TRY(kl_put(ctx, bad, &first, sizeof first));
    KL_LAUNCH(scan, kl_grid(kl_ceil_div(n, BLOCK)), BLOCK, 0, kl_stream(ctx), bad, x, n);
    KL_TRY(kl_launched(ctx, "quantize"));
    KL_TRY(kl_get(ctx, &first, bad, sizeof first));
    if (first == ~0ULL)
        return KL_OK;
    const int64_t at = static_cast<int64_t>(first);
    KL_TRY(kl_get(ctx, &value, x + at, sizeof value));
    return kl_core_of->fail(ctx, KL_ERR_ARG, "quantize: x[%lld, %lld] is %g; it must be finite",
                            static_cast<long long>(at / cols), static_cast<long long>(at % cols),
                            static_cast<double>(value));
}

} // namespace

kl_status hip_quantize(kl_ctx *ctx, void *y, const float *x, kl_type type, int64_t rows,
                       int64_t cols)
{
    const int64_t blocks = rows * cols / 32;
    uint8_t *to = static_cast<uint8_t *>(y);
    if (!is_written(type))
        return kl_core_of->fail(
            ctx, KL_ERR_UNSUPPORTED,
            "quantize: type %d is not written on hip; these are:%s; device='cpu' writes the others",
            static_cast<int>(type), WRITTEN);
    if (blocks == 0)
        return KL_OK;
    KL_TRY(check_finite(ctx, x, rows * cols, cols));
    const unsigned grid = kl_grid(kl_ceil_div(blocks, BLOCK));
    switch (static_cast<int>(type)) {
#define CASE(TYPE)                                                                                 \
    case KL_##TYPE:                                                                                \
        KL_LAUNCH((quantize_v1<KL_##TYPE>), grid, BLOCK, 0, kl_stream(ctx), to, x, blocks);        \
        break;
        KL_WRITTEN_TYPES(CASE)
#undef CASE
    default: break; /* it was refused */
    }
    return kl_launched(ctx, "quantize");
}

kl_status hip_dequantize(kl_ctx *ctx, float *y, const void *x, kl_type type, int64_t rows,
                         int64_t cols)
{
    const char *from = static_cast<const char *>(x);
    const unsigned grid = kl_grid(kl_ceil_div(rows * cols, BLOCK));
    switch (kl_kernel_type(type)) {
#define CASE(TYPE)                                                                                 \
    case TYPE:                                                                                     \
        if (rows > 0)                                                                              \
            KL_LAUNCH((dequantize_v1<TYPE>), grid, BLOCK, 0, kl_stream(ctx), y, from, type,        \
                      kl_row_bytes(type, cols), rows, cols);                                       \
        break;
        KL_KERNEL_TYPES(CASE)
#undef CASE
    default: return kl_no_type(ctx, "dequantize", "x", type);
    }
    return kl_launched(ctx, "dequantize");
}
