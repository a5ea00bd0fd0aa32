/* The kernel bodies, compiled for AVX2, FMA and F16C. */
#define KL_AVX2 1
#if defined(__x86_64__)
#include "kernels.h"
#include "simd.h"

#include "bodies.inc"
#include "int8_avx2.inc"
#include "blocks_x86.inc"

const kl_kernels kl_kernels_avx2 = {
    .name = "avx2",
#define KL_KERNEL(name, type, parameters) .name = kernel_##name,
#include "kernels.def"
#undef KL_KERNEL
};
#endif
