/* exp and what is made of it, as cpu/simd.h has them: the same operations in the same order on every platform.
 * No vendor's fast functions, no flushed subnormals, correctly rounded division and root (docs/hip.md#numbers). */
#ifndef KL_HIP_SCALAR_H
#define KL_HIP_SCALAR_H

#include "kl_gpu.h"

#include "../kimi_linear.h"

#include <string.h>

static __device__ __forceinline__ float kl_float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static __device__ __forceinline__ uint32_t kl_bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* 2^(magic - 0x1.8p23), where the low bits of `magic` hold the exponent */
static __device__ __forceinline__ float kl_exp2_of_magic(float magic)
{
    return kl_float_of((kl_bits_of(magic) + 127u) << 23);
}

/* exp(x - n ln2) - 1 for |x - n ln2| <= ln2/2 (cpu/simd.h: v16_expm1_rest) */
static __device__ __forceinline__ float kl_expm1_rest(float x, float n)
{
    float r = fmaf(n, -0x1.62e4p-1f, x);
    r = fmaf(n, -0x1.7f7d1cp-20f, r);
    float p = fmaf(0x1.a01a02p-13f, r, 0x1.6c16c2p-10f);
    p = fmaf(p, r, 0x1.111112p-7f);
    p = fmaf(p, r, 0x1.555556p-5f);
    p = fmaf(p, r, 0x1.555556p-3f);
    p = fmaf(p, r, 0.5f);
    return fmaf(p * r, r, r);
}

/* exp(x) within 1.6 u; 0 below -104, infinity above 88.8, NaN for NaN (cpu/simd.h: v16_exp) */
static __device__ __forceinline__ float kl_exp(float x)
{
    const float magic = 0x1.8p23f;
    float c = x < -104.0f ? -104.0f : x; /* NaN compares false and goes through */
    c = c > 89.0f ? 89.0f : c;
    const float n = fmaf(c, 0x1.715476p+0f, magic) - magic;
    const float p = kl_expm1_rest(c, n) + 1.0f;
    const float half_magic = fmaf(n, 0.5f, magic);
    const float rest_magic = (n - (half_magic - magic)) + magic;
    return p * kl_exp2_of_magic(half_magic) * kl_exp2_of_magic(rest_magic);
}

/* 1 / (1 + exp(-x)) as e^min(x, 0) / (1 + e^-|x|): no overflow, within 4 u */
static __device__ __forceinline__ float kl_sigmoid_of(float x)
{
    const float e = kl_exp(-fabsf(x));
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

/* log(1 + exp(x)) as max(x, 0) + log1p(exp(-|x|)), within 5 u (cpu/simd.h: v16_softplus) */
static __device__ __forceinline__ float kl_softplus_of(float x)
{
    const float y = kl_exp(-fabsf(x)), s = y / (2.0f + y), s2 = s * s;
    float p = 2.0f / 15;
    p = fmaf(p, s2, 2.0f / 13);
    p = fmaf(p, s2, 2.0f / 11);
    p = fmaf(p, s2, 2.0f / 9);
    p = fmaf(p, s2, 2.0f / 7);
    p = fmaf(p, s2, 2.0f / 5);
    p = fmaf(p, s2, 2.0f / 3);
    const float tail = fmaf(p * s2, s, s + s);
    return (x < 0.0f ? 0.0f : x) + tail;
}

static __device__ __forceinline__ float kl_silu_of(float x) { return x * kl_sigmoid_of(x); }

/* silu(gate) * up, of values within `limit` (cpu/elementwise.inc); 0: as they are. NaN goes through. */
static __device__ __forceinline__ float kl_swiglu_of(float gate, float up, float limit)
{
    if (limit > 0.0f) {
        gate = limit < gate ? limit : gate;
        up = limit < up ? limit : up < -limit ? -limit : up;
    }
    return kl_silu_of(gate) * up;
}

/* tanh(x) as m / (m + 2) of m = exp(2|x|) - 1, with the sign of x (cpu/simd.h: v16_tanh) */
static __device__ __forceinline__ float kl_tanh_of(float x)
{
    const float magic = 0x1.8p23f, a = fabsf(x);
    const float c = 20.0f < a + a ? 20.0f : a + a; /* NaN goes through */
    const float n_magic = fmaf(c, 0x1.715476p+0f, magic);
    const float power = kl_exp2_of_magic(n_magic);
    const float m = fmaf(power, kl_expm1_rest(c, n_magic - magic), power - 1.0f);
    const float y = m / (m + 2.0f);
    return 0.0f < a ? (x < 0.0f ? -y : y) : x; /* else x is a zero or NaN */
}

static __device__ __forceinline__ float kl_bounded_of(float x, float beta)
{
    return beta * kl_tanh_of(x / beta);
}

static __device__ __forceinline__ float kl_gate_of(float z, kl_activation activation)
{
    return activation == KL_SILU ? kl_silu_of(z) : kl_sigmoid_of(z);
}

/* What a row is multiplied by before its squares are summed again (cpu/norm.inc): 2^-96 where the plain sum overflows,
 * or 2^96 where squares underflow and eps is too small to hide it; 1 where the sum is good. */
static __device__ __forceinline__ float kl_scale_after(float sq, float eps)
{
    return sq == INFINITY ? 0x1p-96f : sq < 0x1p-80f && eps < 0x1p-100f ? 0x1p96f : 1.0f;
}

/* float16 and bfloat16 to float32, exact; NaN stays NaN */
static __device__ __forceinline__ float kl_from_bf16(uint16_t bits)
{
    return kl_float_of(static_cast<uint32_t>(bits) << 16);
}

static __device__ __forceinline__ float kl_from_f16(uint16_t bits)
{
#if defined(__HIP_DEVICE_COMPILE__)
    _Float16 half;
    memcpy(&half, &bits, sizeof half);
    return static_cast<float>(half);
#elif defined(__CUDA_ARCH__)
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#else
    const uint32_t magnitude = bits & 0x7fffu, sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    if (magnitude >= 0x7c00u) /* infinity, NaN */
        return kl_float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    const float scaled = kl_float_of(magnitude << 13) * 0x1p112f; /* the exponent's bias; exact */
    return sign != 0 ? -scaled : scaled;
#endif
}

/* Notes a wrong value by its place, the first place of all: runtime.h. */
static __device__ __forceinline__ void kl_note_bits(unsigned long long *fault, int64_t place,
                                                    uint32_t bits)
{
    const unsigned long long at =
        place < 0xffffffffLL ? static_cast<unsigned long long>(place) : 0xfffffffeULL;
    atomicMin(fault, at << 32 | bits);
}
static __device__ __forceinline__ void kl_note(unsigned long long *fault, int64_t place, float x)
{
    kl_note_bits(fault, place, kl_bits_of(x));
}
static __device__ __forceinline__ void kl_note(unsigned long long *fault, int64_t place, int32_t id)
{
    kl_note_bits(fault, place, static_cast<uint32_t>(id));
}

/* float32 to float16, to nearest even; NaN stays NaN */
static __device__ __forceinline__ uint16_t kl_to_f16(float x)
{
    const uint32_t bits = kl_bits_of(x), sign = bits >> 16 & 0x8000u,
                   magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x47800000u) /* 2^16 and more */
        return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) { /* below 2^-14: the sum's last bit is 2^-24 */
        const uint32_t rounded = kl_bits_of(kl_float_of(magnitude) + 0.5f);
        return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
    }
    const uint32_t even = magnitude >> 13 & 1u;
    return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + even) >> 13);
}

#endif
