/* The kernel bodies, compiled for AVX-512 F, BW, DQ, VL and VNNI. */
#define KL_AVX512 1
#if defined(__x86_64__)
#include "kernels.h"
#include "simd.h"

#include "bodies.inc"
#include "int8_avx512.inc"
#include "blocks_x86.inc"

const kl_kernels kl_kernels_avx512 = {
    .name = "avx512",
#define KL_KERNEL(name, type, parameters) .name = kernel_##name,
#include "kernels.def"
#undef KL_KERNEL
};
#endif
