/* The kernel bodies, compiled for aarch64, which always has NEON; and the table of processors that have sdot, too. */
#define KL_NEON 1
#if defined(__aarch64__)
#include "kernels.h"
#include "simd.h"

#include "bodies.inc"
#include "int8_neon.inc"
#include "blocks.inc"

const kl_kernels kl_kernels_neon = {
    .name = "neon",
#define KL_KERNEL(name, type, parameters) .name = kernel_##name,
#include "kernels.def"
#undef KL_KERNEL
};

#define kernel_int8_dot kl_neon_dotprod_int8_dot
const kl_kernels kl_kernels_neon_dotprod = {
    .name = "neon_dotprod",
#define KL_KERNEL(name, type, parameters) .name = kernel_##name,
#include "kernels.def"
#undef KL_KERNEL
};
#endif
