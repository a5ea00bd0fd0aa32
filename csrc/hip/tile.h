/* Stored matrices and tiles of a product: what kernels that multiply share.
 *
 * A storage type is one struct with `at`, value k of a stored row; KL_STORED_TYPES lists the types, and every
 * kernel over weights is made for each. The arithmetic on tiles is in two functions here, plain fma; a body for
 * matrix instructions (MFMA, WMMA, mma) takes their place behind the same names. */
#ifndef KL_HIP_TILE_H
#define KL_HIP_TILE_H

#include "scalar.h"
#include "reduce.h"

template <kl_type TYPE> struct kl_stored;

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
        uint16_t bits;
        memcpy(&bits, __builtin_assume_aligned(row + 2 * k, 2), sizeof bits);
        return kl_from_f16(bits);
    }
};
template <> struct kl_stored<KL_BF16> {
    static __device__ __forceinline__ float at(const char *row, int64_t k)
    {
        uint16_t bits;
        memcpy(&bits, __builtin_assume_aligned(row + 2 * k, 2), sizeof bits);
        return kl_from_bf16(bits);
    }
};

#define KL_STORED_TYPES(TYPE) TYPE(KL_F32) TYPE(KL_F16) TYPE(KL_BF16)

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

/* ---- a block of 256 threads makes 64 x 64 outputs, 4 x 4 a thread ---- */

enum {
    KL_TILE = 64,       /* rows of x, and of w, a block */
    KL_TILE_K = 16,     /* inputs at a time */
    KL_TILE_OWN = 4,    /* rows of each a thread */
    KL_TILE_BLOCK = 256 /* threads: 16 x 16 */
};
/* [KL_TILE_K][KL_TILE + 1]: inputs outside, so that a thread's four rows lie together; one more, so that rows
 * written by neighbours fall into different banks */
#define KL_TILE_EXTENTS [KL_TILE_K][KL_TILE + 1]

/* tile[k][i] = at(i, k) for the 64 rows i and 16 inputs k of a step; `at` gives 0 outside. Neighbouring threads take
 * neighbouring k, or neighbouring i where ALONG_ROWS says that those lie together. */
template <bool ALONG_ROWS, class TILE, class AT>
static __device__ __forceinline__ void kl_tile_load(TILE &tile, AT at)
{
    for (int j = static_cast<int>(threadIdx.x); j < KL_TILE * KL_TILE_K; j += KL_TILE_BLOCK) {
        const int i = ALONG_ROWS ? j % KL_TILE : j / KL_TILE_K;
        const int k = ALONG_ROWS ? j / KL_TILE : j % KL_TILE_K;
        tile[k][i] = at(i, k);
    }
}

/* acc[a][b] += sum over the step's 16 inputs: a chain of fma from 0 by rising k, then one addition */
template <class TILE>
static __device__ __forceinline__ void kl_tile_fma(float (&acc)[KL_TILE_OWN][KL_TILE_OWN],
                                                   const TILE &x, const TILE &w)
{
    const int x0 = static_cast<int>(threadIdx.x) / 16 * KL_TILE_OWN;
    const int w0 = static_cast<int>(threadIdx.x) % 16 * KL_TILE_OWN;
    float step[KL_TILE_OWN][KL_TILE_OWN] = {};
    for (int k = 0; k < KL_TILE_K; k++) {
        float xs[KL_TILE_OWN], ws[KL_TILE_OWN];
        for (int i = 0; i < KL_TILE_OWN; i++) {
            xs[i] = x[k][x0 + i];
            ws[i] = w[k][w0 + i];
        }
        for (int a = 0; a < KL_TILE_OWN; a++)
            for (int b = 0; b < KL_TILE_OWN; b++)
                step[a][b] = fmaf(xs[a], ws[b], step[a][b]);
    }
    for (int a = 0; a < KL_TILE_OWN; a++)
        for (int b = 0; b < KL_TILE_OWN; b++)
            acc[a][b] += step[a][b];
}

#endif
