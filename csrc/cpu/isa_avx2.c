/* The kernel bodies, compiled for AVX2, FMA and F16C; and the tables of processors that have AVX-VNNI, too. */
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

#define kernel_int8_dot kl_avxvnni_int8_dot
#define kernel_fixed_product kl_avxvnni_fixed_product
#define kernel_attend_fixed kl_avxvnni_attend_fixed
const kl_kernels kl_kernels_avxvnni = {
    .name = "avxvnni",
#define KL_KERNEL(name, type, parameters) .name = kernel_##name,
#include "kernels.def"
#undef KL_KERNEL
};
#undef kernel_int8_dot
#undef kernel_fixed_product
#undef kernel_attend_fixed

#define kernel_int8_dot kl_avxvnni_evex_int8_dot
#define kernel_fixed_product kl_avxvnni_evex_fixed_product
#define kernel_attend_fixed kl_avxvnni_evex_attend_fixed
const kl_kernels kl_kernels_avxvnni_evex = {
    .name = "avxvnni",
#define KL_KERNEL(name, type, parameters) .name = kernel_##name,
#include "kernels.def"
#undef KL_KERNEL
};
#endif
