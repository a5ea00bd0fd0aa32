/* product: rows of x times rows of a matrix, by one thread. linear, moe and latent_attention are built
 * on it.
 *
 *   y[t, i] = sum_k x[t, k] w[row0 + i, k]     0 <= t < T, 0 <= i < rows, 0 <= k < w->cols
 *
 * Order of a sum: 16 lanes, lane l adds the terms k = l mod 16 in rising k by fma, from +0 (the last
 * 16 padded with zeros), then the halving tree. So an element has the same bytes whatever the T, the
 * block of rows, the layout of w (transposed or not) and the instruction set; and a weight stored in a
 * narrower type gives the bytes of its float32 widening, which is exact. */
#ifndef KL_PRODUCT_H
#define KL_PRODUCT_H

#include "../internal.h"

/* n stored values, whole blocks of them, widened exactly */
void kl_widen(const kl_ctx *ctx, float *y, const void *stored, kl_type type, int64_t n);

/* output rows row0 .. row0 + rows - 1 of matrix number `which`, as float32 rows ld apart */
void kl_product_rows(const kl_ctx *ctx, float *to, int64_t ld, const kl_weight *w, int64_t which,
                     int64_t row0, int64_t rows);

/* Bytes of scratch that kl_product needs for up to T rows of x with matrices like w; for one thread.
 * Depends on w's sizes and type, not on its matrices. A multiple of 64. */
size_t kl_product_scratch(const kl_weight *w, int64_t T);

/* y: row t begins at y + t * ldy, and element i is output row row0 + i; it overlaps no input.
 * x: row t begins at x + t * ldx, or at x + index[t] * ldx where index is not NULL.
 * w: matrix number `which` of w. scratch: kl_product_scratch(w, T) bytes, 64-byte aligned, this thread's.
 * With the BLAS provider, rows of x without an index go to BLAS where that has float32 rows to read. */
void kl_product(const kl_ctx *ctx, float *y, int64_t ldy, const float *x, int64_t ldx,
                const int32_t *index, int64_t T, const kl_weight *w, int64_t which, int64_t row0,
                int64_t rows, void *scratch);

/* Rows to give to one call so that a task is worth handing out, threads stay balanced, and w is read from
 * memory once: a multiple of 4. T rows of x, of `rows` output rows in all. */
int64_t kl_product_block(const kl_ctx *ctx, const kl_weight *w, int64_t T, int64_t rows);

/* Rows of x for several products: as they are and, for the weights that kl_product_is_narrow (they are of the kind
 * that the context's activations are made for), in those: int8 (cpu/int8.h) or bfloat16 (cpu/bfloat16.inc). */
typedef struct kl_operand {
    const float *x;
    int64_t ldx;
    const char *narrow;  /* NULL where no weight takes it */
    size_t narrow_bytes; /* of a row */
} kl_operand;

bool kl_product_is_narrow(const kl_ctx *ctx, const kl_weight *w);

/* Bytes of a narrow row of width D; T rows of them made from float32 rows; n values made from part of a row, which
 * begin at a multiple of KL_NARROW_PART and go on to the next one or to the row's end. */
enum { KL_NARROW_PART = 256 };
size_t kl_narrow_bytes(const kl_ctx *ctx, int64_t D);
kl_status kl_narrow_make(kl_ctx *ctx, char *to, const float *x, int64_t T, int64_t D) KL_CHECKED;
void kl_narrow_part(const kl_ctx *ctx, char *row, int64_t at, const float *x, int64_t n);

/* kl_product, its scratch and its block, in whichever form the weight takes. Rows of x begin at first, or are
 * those of index. */
size_t kl_operand_scratch(const kl_ctx *ctx, const kl_weight *w, int64_t T);
int64_t kl_operand_block(const kl_ctx *ctx, const kl_weight *w, int64_t T, int64_t rows);
void kl_operand_product(const kl_ctx *ctx, float *y, int64_t ldy, const kl_operand *x,
                        int64_t first, const int32_t *index, int64_t T, const kl_weight *w,
                        int64_t which, int64_t row0, int64_t rows, void *scratch);

/* The same for rows of x that one product uses: they are made narrow in scratch. */
size_t kl_product_once_scratch(const kl_ctx *ctx, const kl_weight *w, int64_t T);
void kl_product_once(const kl_ctx *ctx, float *y, int64_t ldy, const float *x, int64_t ldx,
                     int64_t T, const kl_weight *w, int64_t which, int64_t row0, int64_t rows,
                     void *scratch);

/* kl_for for bodies that call kl_product: with the BLAS provider, BLAS keeps to one thread meanwhile. */
kl_status kl_product_for(kl_ctx *ctx, int64_t n, int64_t grain, kl_body body, void *arg) KL_CHECKED;

#endif
