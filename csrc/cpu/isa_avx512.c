/* The kernel bodies, compiled for AVX-512 F, BW, DQ, VL and VNNI; and the table of processors that have BF16, too. */
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

#define kernel_bfloat16_dot kl_avx512bf16_dot
const kl_kernels kl_kernels_avx512bf16 = {
    .name = "avx512bf16",
#define KL_KERNEL(name, type, parameters) .name = kernel_##name,
#include "kernels.def"
#undef KL_KERNEL
};
#endif
