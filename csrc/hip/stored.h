/* Storage types and matrices in them, as kernels read them.
 *
 * A storage type is one struct with `at`, value k of a stored row, by the formula of quant/<type>.c: the same
 * operations, each rounded, in the same order; and `bytes_of`, of a row. KL_STORED_TYPES lists the types, and every
 * kernel over weights is made for each. Blocks lie on even addresses: a row begins on one, and a block has an even
 * number of bytes. */
#ifndef KL_HIP_STORED_H
#define KL_HIP_STORED_H

#include "scalar.h"

/* clang-format off: one a line */
#define KL_STORED_TYPES(TYPE)                                                                      \
    TYPE(KL_F32)                                                                                   \
    TYPE(KL_F16)                                                                                   \
    TYPE(KL_BF16)                                                                                  \
    TYPE(KL_Q4_0)                                                                                  \
    TYPE(KL_Q8_0)                                                                                  \
    TYPE(KL_IQ4_NL)                                                                                \
    TYPE(KL_Q2_K)                                                                                  \
    TYPE(KL_Q3_K)                                                                                  \
    TYPE(KL_Q4_K)                                                                                  \
    TYPE(KL_Q5_K)                                                                                  \
    TYPE(KL_Q6_K)                                                                                  \
    TYPE(KL_IQ4_XS)
/* clang-format on */

template <kl_type TYPE> struct kl_stored;

/* ---- plain values ---- */

template <int BYTES> struct kl_in_values {
    static size_t bytes_of(int64_t cols) { return static_cast<size_t>(cols) * BYTES; }
};

template <> struct kl_stored<KL_F32> : kl_in_values<4> {
    static __device__ __forceinline__ float at(const char *row, int64_t k)
    {
        float x;
        memcpy(&x, __builtin_assume_aligned(row + 4 * k, 4), sizeof x);
        return x;
    }
};

static __device__ __forceinline__ uint16_t kl_u16_at(const void *p)
{
    uint16_t bits;
    memcpy(&bits, __builtin_assume_aligned(p, 2), sizeof bits);
    return bits;
}
static __device__ __forceinline__ float kl_f16_at(const void *p)
{
    return kl_from_f16(kl_u16_at(p));
}

template <> struct kl_stored<KL_F16> : kl_in_values<2> {
    static __device__ __forceinline__ float at(const char *row, int64_t k)
    {
        return kl_f16_at(row + 2 * k);
    }
};
template <> struct kl_stored<KL_BF16> : kl_in_values<2> {
    static __device__ __forceinline__ float at(const char *row, int64_t k)
    {
        return kl_from_bf16(kl_u16_at(row + 2 * k));
    }
};

/* ---- blocks: value i of block b ---- */

/* One with the members `values`, `bytes` and `value`, as a storage type. */
template <class BLOCK> struct kl_in_blocks {
    static size_t bytes_of(int64_t cols)
    {
        return static_cast<size_t>(cols / BLOCK::values) * BLOCK::bytes;
    }
    static __device__ __forceinline__ float at(const char *row, int64_t k)
    {
        const auto i = static_cast<unsigned>(k % BLOCK::values);
        return BLOCK::value(
            reinterpret_cast<const uint8_t *>(row) + k / BLOCK::values * BLOCK::bytes, i);
    }
};

static __device__ __forceinline__ float kl_times(float a, int q)
{
    return a * static_cast<float>(q);
}
static __device__ __forceinline__ int kl_signed_byte(uint8_t b) { return static_cast<int8_t>(b); }

struct kl_block_q8_0 { /* d[2], q[32] */
    static const int values = 32, bytes = 34;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        return kl_times(kl_f16_at(b), kl_signed_byte(b[2 + i]));
    }
};

struct kl_block_q4_0 { /* d[2], q[16] */
    static const int values = 32, bytes = 18;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        return kl_times(kl_f16_at(b), (b[2 + i % 16] >> i / 16 * 4 & 15) - 8);
    }
};

/* level q of IQ4_NL and IQ4_XS: quant/iq4.h */
static __device__ __forceinline__ int kl_iq4_level(unsigned q)
{
    const uint64_t low = 0xf6eaddcfbfad9881u, high = 0x7159453526190d01u; /* a byte a level */
    return kl_signed_byte(static_cast<uint8_t>((q < 8 ? low : high) >> q % 8 * 8));
}

struct kl_block_iq4_nl { /* d[2], q[16] */
    static const int values = 32, bytes = 18;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        return kl_times(kl_f16_at(b), kl_iq4_level(b[2 + i % 16] >> i / 16 * 4 & 15u));
    }
};

struct kl_block_iq4_xs { /* d[2], high[2], low[4], q[8][16] */
    static const int values = 256, bytes = 136;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        const unsigned s = i / 32, j = i % 32;
        const int scale = (b[4 + s / 2] >> s % 2 * 4 & 15) | (kl_u16_at(b + 2) >> 2 * s & 3) << 4;
        const float a = kl_times(kl_f16_at(b), scale - 32);
        return kl_times(a, kl_iq4_level(b[8 + 16 * s + j % 16] >> j / 16 * 4 & 15u));
    }
};

struct kl_block_q2_k { /* scales[16], q[2][32], d[2], dmin[2] */
    static const int values = 256, bytes = 84;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        const int scales = b[i / 16], q = b[16 + i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3;
        const float a = kl_times(kl_f16_at(b + 80), scales & 15),
                    m = kl_times(kl_f16_at(b + 82), scales >> 4);
        return kl_times(a, q) - m;
    }
};

struct kl_block_q3_k { /* high[32], low[2][32], scales[12], d[2] */
    static const int values = 256, bytes = 110;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        const unsigned s = i / 16, r = i / 32;
        const uint8_t *scales = b + 96;
        const int scale =
            (scales[s % 8] >> s / 8 * 4 & 15) | (scales[8 + s % 4] >> s / 4 * 2 & 3) << 4;
        const int q = (b[32 + r / 4 * 32 + i % 32] >> r % 4 * 2 & 3) | (b[i % 32] >> r & 1) << 2;
        return kl_times(kl_times(kl_f16_at(b + 108), scale - 32), q - 4);
    }
};

/* scale (WHICH 0) or minimum (WHICH 1) of sub-block s of Q4_K and Q5_K: quant/k_quants.h */
template <int WHICH>
static __device__ __forceinline__ int kl_packed_scale(const uint8_t *packed, unsigned s)
{
    if (s < 4)
        return packed[s + 4 * WHICH] & 63;
    return (packed[s + 4] >> 4 * WHICH & 15) | packed[s - 4 + 4 * WHICH] >> 6 << 4;
}

struct kl_block_q4_k { /* d[2], dmin[2], scales[12], q[4][32] */
    static const int values = 256, bytes = 144;
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
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
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
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
    static __device__ __forceinline__ float value(const uint8_t *b, unsigned i)
    {
        const unsigned half = i / 128, r = i / 32 % 4, j = i % 32;
        const int q = (b[64 * half + r % 2 * 32 + j] >> r / 2 * 4 & 15)
                      | (b[128 + 32 * half + j] >> 2 * r & 3) << 4;
        return kl_times(kl_times(kl_f16_at(b + 208), kl_signed_byte(b[192 + i / 16])), q - 32);
    }
};

template <> struct kl_stored<KL_Q4_0> : kl_in_blocks<kl_block_q4_0> {};
template <> struct kl_stored<KL_Q8_0> : kl_in_blocks<kl_block_q8_0> {};
template <> struct kl_stored<KL_Q2_K> : kl_in_blocks<kl_block_q2_k> {};
template <> struct kl_stored<KL_Q3_K> : kl_in_blocks<kl_block_q3_k> {};
template <> struct kl_stored<KL_Q4_K> : kl_in_blocks<kl_block_q4_k> {};
template <> struct kl_stored<KL_Q5_K> : kl_in_blocks<kl_block_q5_k> {};
template <> struct kl_stored<KL_Q6_K> : kl_in_blocks<kl_block_q6_k> {};
template <> struct kl_stored<KL_IQ4_NL> : kl_in_blocks<kl_block_iq4_nl> {};
template <> struct kl_stored<KL_IQ4_XS> : kl_in_blocks<kl_block_iq4_xs> {};

/* ---- matrices ---- */

/* One matrix of a kl_weight, as a kernel's argument: element (r, k), r an output, k an input. */
struct kl_matrix {
    const char *data;
    size_t row_bytes; /* from one stored row to the next */
    int64_t rows, cols;
};
static inline kl_matrix kl_matrix_of(const kl_weight *w, int64_t i)
{
    return kl_matrix{ static_cast<const char *>(w->matrix[i]), w->row_bytes, w->rows, w->cols };
}

template <kl_type TYPE, bool TRANSPOSED>
static __device__ __forceinline__ float kl_matrix_at(const kl_matrix &w, int64_t r, int64_t k)
{
    return TRANSPOSED ? kl_stored<TYPE>::at(w.data + static_cast<size_t>(k) * w.row_bytes, r)
                      : kl_stored<TYPE>::at(w.data + static_cast<size_t>(r) * w.row_bytes, k);
}

#endif
