/* Products in int8, compiled for aarch64 with sdot; every other kernel of that table is isa_neon.c's. */
#define KL_NEON 1
#define KL_SDOT 1
#if defined(__aarch64__)
#include "kernels.h"
#include "simd.h"

#include "int8_neon.inc"

void kl_neon_dotprod_int8_dot(float *y, int64_t ldy, const kl_int8_rows *x, const int32_t *index,
                              int64_t T, const void *w, size_t row_bytes, kl_type type,
                              int64_t rows, int64_t K, void *scratch)
{
    kernel_int8_dot(y, ldy, x, index, T, w, row_bytes, type, rows, K, scratch);
}
#endif
