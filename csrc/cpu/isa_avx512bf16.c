/* Products in bfloat16, compiled for AVX-512 with vdpbf16ps; every other kernel is isa_avx512.c's. */
#define KL_AVX512 1
#define KL_VDPBF16PS 1
#if defined(__x86_64__)
#include "kernels.h"
#include "simd.h"

#include "dot_tile.inc"
#include "bfloat16.inc"

const kl_kernels kl_kernels_avx512bf16 = {
    .name = "avx512bf16",
    .bfloat16_dot = kernel_bfloat16_dot,
};
#endif
