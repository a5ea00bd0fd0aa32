/* The kernel bodies, compiled for aarch64, which always has NEON. */
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
#endif
