/* Block types as int8 products read them (cpu/int8_blocks.h defines the integers): 32 weights of a row for one thread, four a
 * word in their order, and what they are multiplied with.
 *
 *   plain   w = d * (q - offset) - m
 *   fine    w = d * sub[i] * (q - offset) - m * sub_min[i]      for half i of the 32
 *
 * q are the bits as they lie: the offset goes to the sum of x, which is known. `align` is what divides the address of
 * each group of 256, so that it is read in words of so many bytes. */
#ifndef KL_HIP_INT8_BLOCKS_H
#define KL_HIP_INT8_BLOCKS_H

#include "blocks.h"

#include "../cpu/int8.h"

struct alignas(16) kl_words4 {
    uint32_t at[4];
};

struct kl_int8_weights {
    kl_words4 half[2];
    float d, m;
    int sub[2], sub_min[2];
};

/* N words from p, a multiple of ALIGN: no byte before them or behind them is read */
template <int ALIGN, int N>
static __device__ __forceinline__ void kl_words_at(uint32_t (&w)[N], const uint8_t *p)
{
    typedef uint32_t __attribute__((may_alias)) word;
#if defined(__HIP_DEVICE_COMPILE__)
    const bool anywhere = true; /* AMD's read words at any address */
    typedef uint32_t __attribute__((may_alias, aligned(1))) word_anywhere;
#else
    const bool anywhere = false;
    typedef word word_anywhere;
#endif
    if constexpr (ALIGN >= 4) {
        KL_UNROLL
        for (int i = 0; i < N; i++)
            w[i] = reinterpret_cast<const word *>(__builtin_assume_aligned(p, ALIGN))[i];
    } else if constexpr (anywhere) {
        KL_UNROLL
        for (int i = 0; i < N; i++)
            w[i] = reinterpret_cast<const word_anywhere *>(p)[i];
    } else if constexpr (ALIGN == 2) {
        /* N - 1 words on multiples of 4; of the last one half is before them, or both are behind */
        const unsigned past = reinterpret_cast<uintptr_t>(p) & 2u;
        const auto *from = reinterpret_cast<const word *>(p + past);
        const uint32_t which = past != 0 ? 0x5432u : 0x7654u,
                       half = kl_u16_at(past != 0 ? p : p + 4 * (N - 1));
        uint32_t before = half << 16;
        KL_UNROLL
        for (int i = 0; i < N - 1; i++) {
            const uint32_t next = from[i];
            w[i] = kl_bytes_of(before, next, which);
            before = next;
        }
        w[N - 1] = kl_bytes_of(past != 0 ? before : half << 16, kl_u16_at(p + 4 * N - 2), 0x5432u);
    } else {
        KL_UNROLL
        for (int i = 0; i < N; i++)
            w[i] = p[4 * i] | p[4 * i + 1] << 8 | p[4 * i + 2] << 16
                   | static_cast<uint32_t>(p[4 * i + 3]) << 24;
    }
}

/* sixteen bytes of nibbles: values 0 to 15 are the low ones */
template <int ALIGN>
static __device__ __forceinline__ void kl_nibbles_at(kl_int8_weights &to, const uint8_t *p)
{
    uint32_t w[4];
    kl_words_at<ALIGN>(w, p);
    KL_UNROLL
    for (int i = 0; i < 4; i++) {
        to.half[0].at[i] = w[i] & 0x0f0f0f0fu;
        to.half[1].at[i] = w[i] >> 4 & 0x0f0f0f0fu;
    }
}

static __device__ __forceinline__ void kl_levels_of(kl_int8_weights &to, kl_levels levels)
{
    KL_UNROLL
    for (int i = 0; i < 8; i++) {
        const uint32_t q = to.half[i / 4].at[i % 4], at = q & 0x07070707u,
                       upper = (q >> 3 & 0x01010101u) * 255u;
        to.half[i / 4].at[i % 4] =
            (kl_pick4(levels.low, at) & ~upper) | (kl_pick4(levels.high, at) & upper);
    }
}

/* bit i of four, to bit 0 of byte i */
static __device__ __forceinline__ uint32_t kl_bit_a_byte(uint32_t four)
{
    return (four & 15u) * 0x00204081u & 0x01010101u;
}

/* bits 2 i and 2 i + 1 of eight, to the low end of byte i */
static __device__ __forceinline__ uint32_t kl_crumb_a_byte(uint32_t eight)
{
    const uint32_t twice = (eight & 255u) | (eight & 255u) << 12;
    return (twice | twice << 6) & 0x03030303u;
}

struct kl_int8_plain {
    static const bool fine = false, has_min = false;
    static const int offset = 0;
};

/* One with `align`, and `read`: block b of the group of 256 that begins at p; it sets what its kind of type has. */
template <kl_type TYPE> struct kl_int8_block;

template <> struct kl_int8_block<KL_Q8_0> : kl_int8_plain {
    static const int align = 2;
    static __device__ __forceinline__ void read(kl_int8_weights &to, const uint8_t *p, unsigned b)
    {
        p += 34 * b;
        to.d = kl_f16_at(p);
        uint32_t q[8];
        kl_words_at<align>(q, p + 2);
        KL_UNROLL
        for (int i = 0; i < 8; i++)
            to.half[i / 4].at[i % 4] = q[i];
    }
};

template <> struct kl_int8_block<KL_Q4_0> : kl_int8_plain {
    static const int align = 2, offset = 8;
    static __device__ __forceinline__ void read(kl_int8_weights &to, const uint8_t *p, unsigned b)
    {
        p += 18 * b;
        to.d = kl_f16_at(p);
        kl_nibbles_at<align>(to, p + 2);
    }
};

template <> struct kl_int8_block<KL_Q5_0> : kl_int8_plain {
    static const int align = 2, offset = 16;
    static __device__ __forceinline__ void read(kl_int8_weights &to, const uint8_t *p, unsigned b)
    {
        p += 22 * b;
        to.d = kl_f16_at(p);
        kl_nibbles_at<align>(to, p + 6);
        const uint32_t high = kl_u32_at(p + 2);
        KL_UNROLL
        for (int i = 0; i < 8; i++)
            to.half[i / 4].at[i % 4] |= kl_bit_a_byte(high >> 4 * i) << 4;
    }
};

template <> struct kl_int8_block<KL_IQ4_NL> : kl_int8_plain {
    static const int align = 2;
    static __device__ __forceinline__ void read(kl_int8_weights &to, const uint8_t *p, unsigned b)
    {
        p += 18 * b;
        to.d = kl_f16_at(p);
        kl_nibbles_at<align>(to, p + 2);
        kl_levels_of(to, kl_iq4_levels());
    }
};

template <> struct kl_int8_block<KL_MXFP4> : kl_int8_plain {
    static const int align = 1;
    static __device__ __forceinline__ void read(kl_int8_weights &to, const uint8_t *p, unsigned b)
    {
        p += 17 * b;
        to.d = kl_half_e8m0(p[0]);
        kl_nibbles_at<align>(to, p + 1);
        kl_levels_of(to, kl_fp4_levels());
    }
};

template <> struct kl_int8_block<KL_Q1_0> : kl_int8_plain { /* 0 or 2, less 1 */
    static const int align = 2, offset = 1;
    static __device__ __forceinline__ void read(kl_int8_weights &to, const uint8_t *p, unsigned b)
    {
        p += 18 * (b / 4);
        to.d = kl_f16_at(p);
        const uint32_t bits = kl_u32_at(p + 2 + 4 * (b % 4));
        KL_UNROLL
        for (int i = 0; i < 8; i++)
            to.half[i / 4].at[i % 4] = kl_bit_a_byte(bits >> 4 * i) << 1;
    }
};

template <> struct kl_int8_block<KL_Q2_0> : kl_int8_plain {
    static const int align = 2, offset = 1;
    static __device__ __forceinline__ void read(kl_int8_weights &to, const uint8_t *p, unsigned b)
    {
        p += 18 * (b / 2);
        to.d = kl_f16_at(p);
        uint32_t w[2];
        kl_words_at<align>(w, p + 2 + 8 * (b % 2));
        KL_UNROLL
        for (int i = 0; i < 8; i++)
            to.half[i / 4].at[i % 4] = kl_crumb_a_byte(w[i / 4] >> 8 * (i % 4));
    }
};

template <> struct kl_int8_block<KL_IQ4_XS> : kl_int8_plain {
    static const int align = 8;
    static __device__ __forceinline__ void read(kl_int8_weights &to, const uint8_t *p, unsigned b)
    {
        uint32_t head[2]; /* d, high bits; low bits */
        kl_words_at<align>(head, p);
        const int scale =
            static_cast<int>((head[1] >> 4 * b & 15u) | (head[0] >> (16 + 2 * b) & 3u) << 4);
        to.d = kl_times(kl_from_f16(static_cast<uint16_t>(head[0])), scale - 32);
        kl_nibbles_at<align>(to, p + 8 + 16 * b);
        kl_levels_of(to, kl_iq4_levels());
    }
};

/* the scale and the minimum of block b of Q4_K and Q5_K, of sixteen bytes: d, dmin, three words of packed numbers */
static __device__ __forceinline__ void kl_int8_scales_k4(kl_int8_weights &to, const uint8_t *p,
                                                         unsigned b)
{
    uint32_t head[4];
    kl_words_at<16>(head, p);
    const unsigned shift = b % 4 * 8;
    const uint32_t lows = head[3] >> shift,
                   scale = b < 4 ? head[1] >> shift & 63u
                                 : (lows & 15u) | (head[1] >> (shift + 6) & 3u) << 4,
                   min = b < 4 ? head[2] >> shift & 63u
                               : (lows >> 4 & 15u) | (head[2] >> (shift + 6) & 3u) << 4;
    to.d = kl_times(kl_from_f16(static_cast<uint16_t>(head[0])), static_cast<int>(scale));
    to.m = kl_times(kl_from_f16(static_cast<uint16_t>(head[0] >> 16)), static_cast<int>(min));
}

template <> struct kl_int8_block<KL_Q4_K> : kl_int8_plain {
    static const bool has_min = true;
    static const int align = 16;
    static __device__ __forceinline__ void read(kl_int8_weights &to, const uint8_t *p, unsigned b)
    {
        kl_int8_scales_k4(to, p, b);
        uint32_t low[8];
        kl_words_at<align>(low, p + 16 + b / 2 * 32);
        KL_UNROLL
        for (int i = 0; i < 8; i++)
            to.half[i / 4].at[i % 4] = low[i] >> b % 2 * 4 & 0x0f0f0f0fu;
    }
};

template <> struct kl_int8_block<KL_Q5_K> : kl_int8_plain {
    static const bool has_min = true;
    static const int align = 16;
    static __device__ __forceinline__ void read(kl_int8_weights &to, const uint8_t *p, unsigned b)
    {
        kl_int8_scales_k4(to, p, b);
        uint32_t low[8], high[8];
        kl_words_at<align>(high, p + 16);
        kl_words_at<align>(low, p + 48 + b / 2 * 32);
        KL_UNROLL
        for (int i = 0; i < 8; i++)
            to.half[i / 4].at[i % 4] =
                (low[i] >> b % 2 * 4 & 0x0f0f0f0fu) | (high[i] >> b & 0x01010101u) << 4;
    }
};

template <> struct kl_int8_block<KL_Q2_K> {
    static const bool fine = true, has_min = true;
    static const int align = 4, offset = 0;
    static __device__ __forceinline__ void read(kl_int8_weights &to, const uint8_t *p, unsigned b)
    {
        const unsigned scales = kl_u16_at(p + 2 * b);
        uint32_t low[8], d[1];
        kl_words_at<align>(low, p + 16 + b / 4 * 32);
        kl_words_at<align>(d, p + 80);
        to.d = kl_from_f16(static_cast<uint16_t>(d[0]));
        to.m = kl_from_f16(static_cast<uint16_t>(d[0] >> 16));
        KL_UNROLL
        for (unsigned i = 0; i < 2; i++) {
            to.sub[i] = static_cast<int>(scales >> 8 * i & 15u);
            to.sub_min[i] = static_cast<int>(scales >> (8 * i + 4) & 15u);
        }
        KL_UNROLL
        for (int i = 0; i < 8; i++)
            to.half[i / 4].at[i % 4] = low[i] >> b % 4 * 2 & 0x03030303u;
    }
};

template <> struct kl_int8_block<KL_Q3_K> {
    static const bool fine = true, has_min = false;
    static const int align = 2, offset = 4;
    static __device__ __forceinline__ void read(kl_int8_weights &to, const uint8_t *p, unsigned b)
    {
        const unsigned lows = kl_u16_at(p + 96 + b % 4 * 2) >> b / 4 * 4,
                       highs = kl_u16_at(p + 104 + b % 2 * 2) >> b / 2 * 2;
        uint32_t low[8], high[8];
        kl_words_at<align>(high, p);
        kl_words_at<align>(low, p + 32 + b / 4 * 32);
        to.d = kl_f16_at(p + 108);
        KL_UNROLL
        for (unsigned i = 0; i < 2; i++)
            to.sub[i] = static_cast<int>((lows >> 8 * i & 15u) | (highs >> 8 * i & 3u) << 4) - 32;
        KL_UNROLL
        for (int i = 0; i < 8; i++)
            to.half[i / 4].at[i % 4] =
                (low[i] >> b % 4 * 2 & 0x03030303u) | (high[i] >> b & 0x01010101u) << 2;
    }
};

template <> struct kl_int8_block<KL_Q6_K> {
    static const bool fine = true, has_min = false;
    static const int align = 2, offset = 32;
    static __device__ __forceinline__ void read(kl_int8_weights &to, const uint8_t *p, unsigned b)
    {
        const unsigned scales = kl_u16_at(p + 192 + 2 * b);
        uint32_t low[8], high[8];
        kl_words_at<align>(low, p + b / 4 * 64 + b % 2 * 32);
        kl_words_at<align>(high, p + 128 + b / 4 * 32);
        to.d = kl_f16_at(p + 208);
        KL_UNROLL
        for (unsigned i = 0; i < 2; i++)
            to.sub[i] = kl_signed_byte(static_cast<uint8_t>(scales >> 8 * i));
        KL_UNROLL
        for (int i = 0; i < 8; i++)
            to.half[i / 4].at[i % 4] =
                (low[i] >> b % 4 / 2 * 4 & 0x0f0f0f0fu) | (high[i] >> b % 4 * 2 & 0x03030303u) << 4;
    }
};

#endif
