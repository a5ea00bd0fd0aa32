/* Storage types and matrices in them, as kernels read them.
 *
 * A storage type is one struct with `at`, value k of a stored row; of a type in blocks it is made from the block
 * (blocks.h). Every kernel over weights is made for each of KL_OWN_TYPES, and once more for all KL_RARE_TYPES, as KL_RARE:
 * there the type is looked at where values are read, one branch for all threads: for 256 of them where tokens are few, for
 * each where a tile is read once for all its products. So the library has half the kernels. */
#ifndef KL_HIP_STORED_H
#define KL_HIP_STORED_H

#include "blocks.h"

/* clang-format off: one a line */
#define KL_OWN_TYPES(TYPE)                                                                         \
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
#define KL_RARE_TYPES(TYPE)                                                                        \
    TYPE(KL_Q4_1)                                                                                  \
    TYPE(KL_Q5_0)                                                                                  \
    TYPE(KL_Q5_1)                                                                                  \
    TYPE(KL_IQ2_XXS)                                                                               \
    TYPE(KL_IQ2_XS)                                                                                \
    TYPE(KL_IQ3_XXS)                                                                               \
    TYPE(KL_IQ1_S)                                                                                 \
    TYPE(KL_IQ3_S)                                                                                 \
    TYPE(KL_IQ2_S)                                                                                 \
    TYPE(KL_IQ1_M)                                                                                 \
    TYPE(KL_TQ1_0)                                                                                 \
    TYPE(KL_TQ2_0)                                                                                 \
    TYPE(KL_MXFP4)                                                                                 \
    TYPE(KL_NVFP4)                                                                                 \
    TYPE(KL_Q1_0)                                                                                  \
    TYPE(KL_Q2_0)
/* clang-format on */
#define KL_STORED_TYPES(TYPE) KL_OWN_TYPES(TYPE) KL_RARE_TYPES(TYPE)

const kl_type KL_RARE = KL_TYPE_END;

/* What a kernel is made for: switch (kl_kernel_type(type)) { KL_KERNEL_TYPES(CASE) default: kl_no_type }; -1 is a type
 * without kernels. */
#define KL_KERNEL_TYPES(TYPE) KL_OWN_TYPES(TYPE) TYPE(KL_RARE)
static inline int kl_kernel_type(kl_type type)
{
    switch (static_cast<int>(type)) {
#define CASE(TYPE) case TYPE:
        KL_RARE_TYPES(CASE) return KL_RARE;
        KL_OWN_TYPES(CASE) return type;
#undef CASE
    default: return -1;
    }
}

template <kl_type TYPE> struct kl_stored;

/* ---- plain values ---- */

template <> struct kl_stored<KL_F32> {
    static __device__ __forceinline__ float at(const char *row, int64_t k)
    {
        float x;
        memcpy(&x, __builtin_assume_aligned(row + 4 * k, 4), sizeof x);
        return x;
    }
};

template <> struct kl_stored<KL_F16> {
    static __device__ __forceinline__ float at(const char *row, int64_t k)
    {
        return kl_f16_at(row + 2 * k);
    }
};
template <> struct kl_stored<KL_BF16> {
    static __device__ __forceinline__ float at(const char *row, int64_t k)
    {
        return kl_from_bf16(kl_u16_at(row + 2 * k));
    }
};

/* ---- blocks: value i of block b ---- */

/* One with the members `values`, `bytes` and `value`, as a storage type. */
template <class BLOCK> struct kl_in_blocks {
    using block = BLOCK;
    template <class INDEX> static __device__ __forceinline__ float at(const char *row, INDEX k)
    {
        const auto i = static_cast<unsigned>(k % BLOCK::values);
        return BLOCK::value(
            reinterpret_cast<const uint8_t *>(row) + k / BLOCK::values * BLOCK::bytes, i);
    }
    /* the same, beside its neighbours */
    static __device__ __forceinline__ float among(const char *row, unsigned k)
    {
        const auto *b = reinterpret_cast<const uint8_t *>(row) + k / BLOCK::values * BLOCK::bytes;
        return BLOCK::value(kl_pairs{ b }, k % BLOCK::values);
    }
};

#define KL_BLOCK_TYPE(name, body, id, n_values, n_bytes, access)                                   \
    template <> struct kl_stored<KL_##name> : kl_in_blocks<kl_block_##body> {};                    \
    static_assert(kl_block_##body::values == n_values && kl_block_##body::bytes == n_bytes,        \
                  "blocks.h and quant/types.def disagree on " #name);
#include "../quant/types.def"
#undef KL_BLOCK_TYPE

/* bytes of a row of whole blocks */
static __host__ __device__ constexpr size_t kl_row_bytes(kl_type type, int64_t cols)
{
    switch (static_cast<int>(type)) {
#define KL_BLOCK_TYPE(name, body, id, n_values, n_bytes, access)                                   \
    case KL_##name: return static_cast<size_t>(cols / n_values) * n_bytes;
#include "../quant/types.def"
#undef KL_BLOCK_TYPE
    default: return static_cast<size_t>(cols) * (type == KL_F32 ? 4 : 2);
    }
}

/* Value k of a row of a rare type. The block is found first, by sizes that are the same in all threads, so that the
 * types share its address: each with its own took the registers of the tiles. */
static __device__ __forceinline__ float kl_rare_at(kl_type type, const char *row, int64_t k)
{
    int shift = 8;
    int64_t bytes = 0;
    switch (static_cast<int>(type)) {
#define CASE(TYPE)                                                                                 \
    case TYPE:                                                                                     \
        shift = __builtin_ctz(kl_stored<TYPE>::block::values);                                     \
        bytes = kl_stored<TYPE>::block::bytes;                                                     \
        break;
        KL_RARE_TYPES(CASE)
#undef CASE
    default: break;
    }
    const uint8_t *b = reinterpret_cast<const uint8_t *>(row) + (k >> shift) * bytes;
    const unsigned i = static_cast<unsigned>(k) & ((1u << shift) - 1);
    switch (static_cast<int>(type)) {
#define CASE(TYPE)                                                                                 \
    case TYPE: return kl_stored<TYPE>::block::value(b, i);
        KL_RARE_TYPES(CASE)
#undef CASE
    default: return NAN; /* no other comes here: kl_kernel_type */
    }
}

/* value k of a row; `type` is TYPE, or a rare one */
template <kl_type TYPE>
static __device__ __forceinline__ float kl_value_at(kl_type type, const char *row, int64_t k)
{
    if constexpr (TYPE == KL_RARE) {
        return kl_rare_at(type, row, k);
    } else {
        (void)type;
        return kl_stored<TYPE>::at(row, k);
    }
}

/* ---- several values, whose places the compiler knows in part ----
 *
 * What is the same for them, scales above all, is then read and made once, and takes no branch: three to six times fewer
 * instructions a value than one by one (docs/hip.md#instructions). */

/* values lane, lane + 16, ... of 256 that begin at `from`, the first of a block: what one of sixteen threads reads */
const int KL_SPAN = 256, KL_SPAN_LANES = 16, KL_SPAN_EACH = KL_SPAN / KL_SPAN_LANES;
template <kl_type TYPE>
static __device__ __forceinline__ void kl_span_at(float (&v)[KL_SPAN_EACH], kl_type type,
                                                  const char *from, unsigned lane)
{
    if constexpr (TYPE == KL_RARE) {
        switch (static_cast<int>(type)) {
#define CASE(RARE)                                                                                 \
    case RARE: kl_span_at<RARE>(v, type, from, lane); break;
            KL_RARE_TYPES(CASE)
#undef CASE
        default: break; /* no other comes here: kl_kernel_type */
        }
    } else {
        (void)type;
        KL_UNROLL
        for (unsigned j = 0; j < KL_SPAN_EACH; j++)
            v[j] = kl_stored<TYPE>::at(from, j * KL_SPAN_LANES + lane % KL_SPAN_LANES);
    }
}

/* The same 256, for one of four threads: values 16 j + 4 c + e of 64 that begin at value `first`, which the compiler knows. */
const int KL_QUADS = 4;
template <kl_type TYPE>
static __device__ __forceinline__ void kl_quads_at(float (&v)[4][4], const char *from,
                                                   unsigned first, unsigned c)
{
    KL_UNROLL
    for (unsigned i = 0; i < 16; i++) {
        const unsigned k = first + i / 4 * 16 + c % KL_QUADS * 4 + i % 4;
        if constexpr (TYPE == KL_F32 || TYPE == KL_F16 || TYPE == KL_BF16)
            v[i / 4][i % 4] = kl_stored<TYPE>::at(from, k);
        else
            v[i / 4][i % 4] = kl_stored<TYPE>::among(from, k);
    }
}

/* value k0 + lane, where k0 is a multiple of 32 that is the same in all threads, and lane is below 32 */
template <kl_type TYPE>
static __device__ __forceinline__ float kl_run_at(const char *row, int64_t k0, unsigned lane)
{
    const unsigned in_span = static_cast<unsigned>(k0 / 32) % (KL_SPAN / 32) * 32;
    return kl_stored<TYPE>::at(row + k0 / KL_SPAN * kl_row_bytes(TYPE, KL_SPAN),
                               in_span + lane % 32);
}

/* ---- matrices ---- */

/* One matrix of a kl_weight, as a kernel's argument: element (r, k), r an output, k an input. */
struct kl_matrix {
    const char *data;
    size_t row_bytes; /* from one stored row to the next */
    int64_t rows, cols;
    kl_type type;
};
static inline kl_matrix kl_matrix_of(const kl_weight *w, int64_t i)
{
    return kl_matrix{ static_cast<const char *>(w->matrix[i]), w->row_bytes, w->rows, w->cols,
                      w->type };
}

template <kl_type TYPE, bool TRANSPOSED>
static __device__ __forceinline__ float kl_matrix_at(const kl_matrix &w, int64_t r, int64_t k)
{
    const size_t row = static_cast<size_t>(TRANSPOSED ? k : r) * w.row_bytes;
    return kl_value_at<TYPE>(w.type, w.data + row, TRANSPOSED ? r : k);
}

#endif
