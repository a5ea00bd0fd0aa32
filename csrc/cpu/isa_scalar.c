/* The kernel bodies, compiled for any processor: the oracle. */
#define KL_SCALAR 1
#include "kernels.h"
#include "simd.h"

#include "bodies.inc"
#include "int8.inc"
#include "blocks.inc"

const kl_kernels kl_kernels_scalar = {
    .name = "scalar",
#define KL_KERNEL(name, type, parameters) .name = kernel_##name,
#include "kernels.def"
#undef KL_KERNEL
};
