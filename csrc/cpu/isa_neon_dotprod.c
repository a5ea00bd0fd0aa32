/* Products in int8, compiled for aarch64 with sdot; every other kernel is isa_neon.c's. */
#define KL_NEON 1
#define KL_SDOT 1
#if defined(__aarch64__)
#include "kernels.h"
#include "simd.h"

#include "int8_neon.inc"

const kl_kernels kl_kernels_neon_dotprod = {
    .name = "neon_dotprod",
    .int8_dot = kernel_int8_dot,
};
#endif
