/* The BLAS of this build, the other provider of float32 products (gemm="blas"). Its sums have an order
 * of their own: results are within the budget of linear, not the same bytes in every batch. */
#ifndef KL_GEMM_H
#define KL_GEMM_H

#include <stdint.h>

/* y[t, i] = sum_k x[t, k] w[i, k] for T rows of x and n rows of w, by the calling thread alone */
void kl_gemm_rows(float *y, int64_t ldy, const float *x, int64_t ldx, int64_t T, const float *w,
                  int64_t ldw, int64_t n, int64_t K);

/* Around calls from several threads: BLAS itself keeps to one. */
void kl_gemm_begin(void);
void kl_gemm_end(void);

#endif
