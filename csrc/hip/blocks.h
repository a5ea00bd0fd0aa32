/* Blocks of values: value i of block b, by the formula of quant/<type>.c: the same operations, each rounded, in the
 * same order. `values` and `bytes` are of a block (quant/types.def). Where a type has words of two bytes its blocks lie
 * on even addresses: a row begins on one, and a block has an even number of bytes. */
#ifndef KL_HIP_BLOCKS_H
#define KL_HIP_BLOCKS_H

#include "scalar.h"

#include "../quant/iq_rows.h"

static __device__ __forceinline__ uint16_t kl_u16_at(const void *p)
{
    typedef uint16_t __attribute__((may_alias)) word;
    return *static_cast<const word *>(p);
}
static __device__ __forceinline__ uint32_t kl_u32_at(const uint8_t *p) /* on an even address */
{
    return kl_u16_at(p) | static_cast<uint32_t>(kl_u16_at(p + 2)) << 16;
}
static __device__ __forceinline__ float kl_f16_at(const void *p)
{
    return kl_from_f16(kl_u16_at(p));
}

/* The bytes of a block, read two at a time: of values that lie side by side each second one comes with its neighbour. */
struct kl_pairs {
    const uint8_t *p; /* on an even address */
    __device__ __forceinline__ uint8_t operator[](unsigned i) const
    {
        return static_cast<uint8_t>(kl_u16_at(p + (i & ~1u)) >> (i & 1u) * 8);
    }
    __device__ __forceinline__ kl_pairs operator+(unsigned n) const { return kl_pairs{ p + n }; }
};
static __device__ __forceinline__ uint16_t kl_u16_at(kl_pairs b) { return kl_u16_at(b.p); }
static __device__ __forceinline__ float kl_f16_at(kl_pairs b) { return kl_f16_at(b.p); }

static __device__ __forceinline__ float kl_times(float a, int q)
{
    return a * static_cast<float>(q);
}
static __device__ __forceinline__ int kl_signed_byte(uint8_t b) { return static_cast<int8_t>(b); }

/* ---- types with kernels of their own: of bytes, or of kl_pairs of them ---- */

struct kl_block_q8_0 { /* d[2], q[32] */
    static const int values = 32, bytes = 34;
    template <class BYTES> static __device__ __forceinline__ float value(BYTES b, unsigned i)
    {
        return kl_times(kl_f16_at(b), kl_signed_byte(b[2 + i]));
    }
};

struct kl_block_q4_0 { /* d[2], q[16] */
    static const int values = 32, bytes = 18;
    template <class BYTES> static __device__ __forceinline__ float value(BYTES b, unsigned i)
    {
        return kl_times(kl_f16_at(b), (b[2 + i % 16] >> i / 16 * 4 & 15) - 8);
    }
};

/* Sixteen levels, a byte each, the first eight in `low`: of IQ4_NL and IQ4_XS (quant/iq4.h), and the doubled E2M1 floats of
 * MXFP4 and NVFP4 (quant/fp4.h) */
struct kl_levels {
    uint64_t low, high;
    __device__ __forceinline__ int operator[](unsigned q) const
    {
        return kl_signed_byte(static_cast<uint8_t>((q < 8 ? low : high) >> q % 8 * 8));
    }
};
static __device__ __forceinline__ kl_levels kl_iq4_levels()
{
    return { 0xf6eaddcfbfad9881u, 0x7159453526190d01u };
}
static __device__ __forceinline__ kl_levels kl_fp4_levels()
{
    return { 0x0c08060403020100u, 0xf4f8fafcfdfeff00u };
}

struct kl_block_iq4_nl { /* d[2], q[16] */
    static const int values = 32, bytes = 18;
    template <class BYTES> static __device__ __forceinline__ float value(BYTES b, unsigned i)
    {
        return kl_times(kl_f16_at(b), kl_iq4_levels()[b[2 + i % 16] >> i / 16 * 4 & 15u]);
    }
};

struct kl_block_iq4_xs { /* d[2], high[2], low[4], q[8][16] */
    static const int values = 256, bytes = 136;
    template <class BYTES> static __device__ __forceinline__ float value(BYTES b, unsigned i)
    {
        const unsigned s = i / 32, j = i % 32;
        const int scale = (b[4 + s / 2] >> s % 2 * 4 & 15) | (kl_u16_at(b + 2) >> 2 * s & 3) << 4;
        const float a = kl_times(kl_f16_at(b), scale - 32);
        return kl_times(a, kl_iq4_levels()[b[8 + 16 * s + j % 16] >> j / 16 * 4 & 15u]);
    }
};

struct kl_block_q2_k { /* scales[16], q[2][32], d[2], dmin[2] */
    static const int values = 256, bytes = 84;
    template <class BYTES> static __device__ __forceinline__ float value(BYTES b, unsigned i)
    {
        const int scales = b[i / 16], q = b[16 + i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3;
        const float a = kl_times(kl_f16_at(b + 80), scales & 15),
                    m = kl_times(kl_f16_at(b + 82), scales >> 4);
        return kl_times(a, q) - m;
    }
};

struct kl_block_q3_k { /* high[32], low[2][32], scales[12], d[2] */
    static const int values = 256, bytes = 110;
    template <class BYTES> static __device__ __forceinline__ float value(BYTES b, unsigned i)
    {
        const unsigned s = i / 16, r = i / 32;
        const BYTES scales = b + 96;
        const int scale =
            (scales[s % 8] >> s / 8 * 4 & 15) | (scales[8 + s % 4] >> s / 4 * 2 & 3) << 4;
        const int q = (b[32 + r / 4 * 32 + i % 32] >> r % 4 * 2 & 3) | (b[i % 32] >> r & 1) << 2;
        return kl_times(kl_times(kl_f16_at(b + 108), scale - 32), q - 4);
    }
};

/* scale (WHICH 0) or minimum (WHICH 1) of sub-block s of Q4_K and Q5_K: quant/k_quants.h. The second four have their low
 * bits behind the first four, their high bits above these. Without a branch, also where s is known late. */
template <int WHICH, class BYTES>
static __device__ __forceinline__ int kl_packed_scale(BYTES packed, unsigned s)
{
    const unsigned second = s / 4; /* 0 or 1 */
    const int low = packed[s + 4 * (second != 0 ? 1 : WHICH)], above = packed[s % 4 + 4 * WHICH];
    return (low >> (second != 0 ? 4 * WHICH : 0) & (second != 0 ? 15 : 63))
           | (above >> 6) * static_cast<int>(second * 16);
}

struct kl_block_q4_k { /* d[2], dmin[2], scales[12], q[4][32] */
    static const int values = 256, bytes = 144;
    template <class BYTES> static __device__ __forceinline__ float value(BYTES b, unsigned i)
    {
        const unsigned s = i / 32;
        const int q = b[16 + s / 2 * 32 + i % 32] >> s % 2 * 4 & 15;
        const float a = kl_times(kl_f16_at(b), kl_packed_scale<0>(b + 4, s)),
                    m = kl_times(kl_f16_at(b + 2), kl_packed_scale<1>(b + 4, s));
        return kl_times(a, q) - m;
    }
};

struct kl_block_q5_k { /* d[2], dmin[2], scales[12], high[32], low[4][32] */
    static const int values = 256, bytes = 176;
    template <class BYTES> static __device__ __forceinline__ float value(BYTES b, unsigned i)
    {
        const unsigned s = i / 32, j = i % 32;
        const int q = (b[48 + s / 2 * 32 + j] >> s % 2 * 4 & 15) | (b[16 + j] >> s & 1) << 4;
        const float a = kl_times(kl_f16_at(b), kl_packed_scale<0>(b + 4, s)),
                    m = kl_times(kl_f16_at(b + 2), kl_packed_scale<1>(b + 4, s));
        return kl_times(a, q) - m;
    }
};

struct kl_block_q6_k { /* low[2][64], high[2][32], scales[16], d[2] */
    static const int values = 256, bytes = 210;
    template <class BYTES> static __device__ __forceinline__ float value(BYTES b, unsigned i)
    {
        const unsigned half = i / 128, r = i / 32 % 4, j = i % 32;
        const int q = (b[64 * half + r % 2 * 32 + j] >> r / 2 * 4 & 15)
                      | (b[128 + 32 * half + j] >> 2 * r & 3) << 4;
        return kl_times(kl_times(kl_f16_at(b + 208), kl_signed_byte(b[192 + i / 16])), q - 32);
    }
};

/* ---- rare types: kernels look at the type where they read a value (stored.h) ---- */

/* 4-bit number i of 32, and bit i of 32 behind it: q[16] holds values j (low) and j + 16 */
static __device__ __forceinline__ int kl_nibble(const uint8_t *q, unsigned i)
{
    return q[i % 16] >> i / 16 * 4 & 15;
}
static __device__ __forceinline__ int kl_fifth_bit(const uint8_t *high, unsigned i)
{
    return (high[i / 8] >> i % 8 & 1) << 4;
}

struct kl_block_q4_1 { /* d[2], m[2], q[16] */
    static const int values = 32, bytes = 20;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        return kl_times(kl_f16_at(b), kl_nibble(b + 4, i)) + kl_f16_at(b + 2);
    }
};

struct kl_block_q5_0 { /* d[2], high[4], low[16] */
    static const int values = 32, bytes = 22;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        const int q = kl_nibble(b + 6, i) | kl_fifth_bit(b + 2, i);
        return kl_times(kl_f16_at(b), q - 16);
    }
};

struct kl_block_q5_1 { /* d[2], m[2], high[4], low[16] */
    static const int values = 32, bytes = 24;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        const int q = kl_nibble(b + 8, i) | kl_fifth_bit(b + 4, i);
        return kl_times(kl_f16_at(b), q) + kl_f16_at(b + 2);
    }
};

struct kl_block_tq1_0 { /* five digits of base 3 a byte: q[32], q[16]; four: q[4]; d[2] */
    static const int values = 256, bytes = 54;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        const unsigned n = i < 160 ? 32 : i < 240 ? 16 : 4, first = i < 160 ? 0 : i < 240 ? 32 : 48;
        const unsigned at = i - first * 5, digit = at / n;
        const unsigned power = digit == 0   ? 1
                               : digit == 1 ? 3
                               : digit == 2 ? 9
                               : digit == 3 ? 27
                                            : 81;
        const unsigned fraction = b[first + at % n] * power & 255u;
        return kl_times(kl_f16_at(b + 52), static_cast<int>(fraction * 3 >> 8) - 1);
    }
};

struct kl_block_tq2_0 { /* q[2][32], d[2] */
    static const int values = 256, bytes = 66;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        const int q = b[i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3;
        return kl_times(kl_f16_at(b + 64), q - 1);
    }
};

/* 2^(e - 128), for the doubled floats of MXFP4; subnormal for e < 2 */
static __device__ __forceinline__ float kl_half_e8m0(uint32_t e)
{
    return kl_float_of(e < 2 ? 0x200000u << e : (e - 1) << 23);
}

struct kl_block_mxfp4 { /* e, q[16] */
    static const int values = 32, bytes = 17;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        return kl_times(kl_half_e8m0(b[0]),
                        kl_fp4_levels()[static_cast<unsigned>(kl_nibble(b + 1, i))]);
    }
};

struct kl_block_nvfp4 { /* scales[4], q[4][8] */
    static const int values = 64, bytes = 36;
    /* half of an E4M3 number, its sign not looked at; NaN counts as zero */
    static __device__ __forceinline__ float half_e4m3(uint8_t x)
    {
        const uint32_t exponent = x >> 3 & 15u, fraction = x & 7u;
        if (x == 0x7f)
            return 0.0f;
        return exponent == 0 ? static_cast<float>(fraction) * 0x1p-10f
                             : kl_float_of((exponent + 119) << 23 | fraction << 20);
    }
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        const unsigned s = i / 16, j = i % 16;
        return kl_times(half_e4m3(b[s]), kl_fp4_levels()[b[4 + 8 * s + j % 8] >> j / 8 * 4 & 15u]);
    }
};

struct kl_block_q1_0 { /* d[2], q[16] */
    static const int values = 128, bytes = 18;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        return kl_times(kl_f16_at(b), (b[2 + i / 8] >> i % 8 & 1) != 0 ? 1 : -1);
    }
};

struct kl_block_q2_0 { /* d[2], q[16] */
    static const int values = 64, bytes = 18;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        return kl_times(kl_f16_at(b), (b[2 + i / 4] >> i % 4 * 2 & 3) - 1);
    }
};

/* The codebooks. Each thread reads a row of its own, which constant memory would serve one by one. */
#define KL_ROW(hex) 0x##hex,
static __device__ const uint16_t kl_iq1_rows[2048] = { KL_IQ1_ROWS(KL_ROW) };
static __device__ const uint16_t kl_iq2_xxs_rows[256] = { KL_IQ2_XXS_ROWS(KL_ROW) };
static __device__ const uint16_t kl_iq2_xs_rows[512] = { KL_IQ2_XS_ROWS(KL_ROW) };
static __device__ const uint16_t kl_iq2_s_rows[1024] = { KL_IQ2_S_ROWS(KL_ROW) };
static __device__ const uint16_t kl_iq3_xxs_rows[256] = { KL_IQ3_XXS_ROWS(KL_ROW) };
static __device__ const uint16_t kl_iq3_s_rows[512] = { KL_IQ3_S_ROWS(KL_ROW) };
#undef KL_ROW

/* a times value j of eight, negated where bit j of signs is set; a row of two bits a value */
static __device__ __forceinline__ float kl_signed_value(float a, int value, unsigned signs,
                                                        unsigned j)
{
    return kl_times(a, (signs >> j & 1) != 0 ? -value : value);
}
static __device__ __forceinline__ float kl_iq2_value(float a, unsigned row, unsigned signs,
                                                     unsigned j)
{
    const int bits = static_cast<int>(row >> 2 * j);
    return kl_signed_value(a, KL_IQ2_VALUE(bits), signs, j);
}

/* seven sign bits, and an eighth that makes their number even */
static __device__ __forceinline__ unsigned kl_even_signs(uint32_t seven)
{
    uint32_t parity = seven ^ seven >> 4;
    parity ^= parity >> 2;
    return seven | ((parity ^ parity >> 1) & 1) << 7;
}

struct kl_block_iq1_s { /* d[2], row[8][4], high[8][2] */
    static const int values = 256, bytes = 50;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        const unsigned s = i / 32, r = i / 8 % 4, high = kl_u16_at(b + 34 + 2 * s);
        const float a = kl_times(kl_f16_at(b), static_cast<int>(2 * (high >> 12 & 7) + 1));
        const int bits = kl_iq1_rows[b[2 + i / 8] | (high >> 3 * r & 7) << 8] >> i % 8 * 2;
        return a * (static_cast<float>(KL_IQ1_VALUE(bits)) + (high >> 15 ? -0.125f : 0.125f));
    }
};

struct kl_block_iq1_m { /* row[32], high[16], scales[4][2] */
    static const int values = 256, bytes = 56;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        const unsigned r = i / 8, high = b[32 + r / 2] >> r % 2 * 4 & 15u;
        uint32_t d = 0;
        for (unsigned k = 0; k < 4; k++)
            d |= static_cast<uint32_t>(b[49 + 2 * k] >> 4) << 4 * k;
        const unsigned scale = kl_u16_at(b + 48 + r / 8 * 2) >> r / 2 % 4 * 3 & 7u;
        const float a =
            kl_times(kl_from_f16(static_cast<uint16_t>(d)), static_cast<int>(2 * scale + 1));
        const int bits = kl_iq1_rows[b[r] | (high & 7) << 8] >> i % 8 * 2;
        return a * (static_cast<float>(KL_IQ1_VALUE(bits)) + (high & 8 ? -0.125f : 0.125f));
    }
};

struct kl_block_iq2_xxs { /* d[2], then eight times row[4], signs and scale [4] */
    static const int values = 256, bytes = 66;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        const unsigned r = i / 8 % 4;
        const uint8_t *sub = b + 2 + i / 32 * 8;
        const uint32_t packed = kl_u32_at(sub + 4);
        const float a = kl_f16_at(b) * (0.5f + static_cast<float>(packed >> 28)) * 0.25f;
        return kl_iq2_value(a, kl_iq2_xxs_rows[sub[r]], kl_even_signs(packed >> 7 * r & 127),
                            i % 8);
    }
};

/* scale of rows 2 m and 2 m + 1 of IQ2_XS and IQ2_S */
static __device__ __forceinline__ float kl_iq2_scale(const uint8_t *d, const uint8_t *scales,
                                                     unsigned m)
{
    return kl_f16_at(d) * (0.5f + static_cast<float>(scales[m / 2] >> m % 2 * 4 & 15)) * 0.25f;
}

struct kl_block_iq2_xs { /* d[2], row and signs [32][2], scales[8] */
    static const int values = 256, bytes = 74;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        const unsigned r = i / 8, row = kl_u16_at(b + 2 + 2 * r);
        return kl_iq2_value(kl_iq2_scale(b, b + 66, r / 2), kl_iq2_xs_rows[row & 511],
                            kl_even_signs(row >> 9), i % 8);
    }
};

struct kl_block_iq2_s { /* d[2], row[32], signs[32], high[8], scales[8] */
    static const int values = 256, bytes = 82;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        const unsigned r = i / 8, row = b[2 + r] | (b[66 + r / 4] >> r % 4 * 2 & 3u) << 8;
        return kl_iq2_value(kl_iq2_scale(b, b + 74, r / 2), kl_iq2_s_rows[row], b[34 + r], i % 8);
    }
};

struct kl_block_iq3_xxs { /* d[2], row[8][8], signs and scale [8][4] */
    static const int values = 256, bytes = 98;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        const uint32_t packed = kl_u32_at(b + 66 + i / 32 * 4);
        const float a = kl_f16_at(b) * (0.5f + static_cast<float>(packed >> 28)) * 0.5f;
        const int bits = kl_iq3_xxs_rows[b[2 + i / 4]] >> i % 4 * 4;
        return kl_signed_value(a, KL_IQ3_XXS_VALUE(bits),
                               kl_even_signs(packed >> i / 8 % 4 * 7 & 127), i % 8);
    }
};

struct kl_block_iq3_s { /* d[2], row[8][8], high[8], signs[8][4], scales[4] */
    static const int values = 256, bytes = 110;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        const unsigned s = i / 32, r = i / 4 % 8;
        const int scale = b[106 + s / 2] >> s % 2 * 4 & 15;
        const int bits = kl_iq3_s_rows[b[2 + i / 4] | (b[66 + s] >> r & 1u) << 8] >> i % 4 * 4;
        return kl_signed_value(kl_times(kl_f16_at(b), 2 * scale + 1), KL_IQ3_S_VALUE(bits),
                               b[74 + i / 8], i % 8);
    }
};

#endif
