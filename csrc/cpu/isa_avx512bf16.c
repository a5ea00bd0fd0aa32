/* Products in bfloat16, compiled for AVX-512 with vdpbf16ps; every other kernel of that table is isa_avx512.c's. */
#define KL_AVX512 1
#define KL_VDPBF16PS 1
#if defined(__x86_64__)
#include "kernels.h"
#include "simd.h"

#include "dot_tile.inc"
#include "bfloat16.inc"

void kl_avx512bf16_dot(float *y, int64_t ldy, const uint16_t *x, int64_t ldx, const int32_t *index,
                       int64_t T, const void *w, size_t row_bytes, int64_t rows, int64_t K,
                       void *scratch)
{
    kernel_bfloat16_dot(y, ldy, x, ldx, index, T, w, row_bytes, rows, K, scratch);
}
#endif
