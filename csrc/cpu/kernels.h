/* The kernel table: one of these for each instruction set, chosen when a context is made. */
#ifndef KL_KERNELS_H
#define KL_KERNELS_H

#include "../internal.h"
#include "attention.h"
#include "delta_rule.h"
#include "fixed.h"
#include "int8.h"

struct kl_kernels {
    const char *name;
#define KL_KERNEL(name, type, parameters) type(*name) parameters;
#include "kernels.def"
#undef KL_KERNEL
};

extern const kl_kernels kl_kernels_scalar;
#if defined(__x86_64__)
extern const kl_kernels kl_kernels_avx2, kl_kernels_avx512;
#elif defined(__aarch64__)
extern const kl_kernels kl_kernels_neon;
#endif

/* Of the kernels that an extension makes faster, the others NULL: those are of the table above that it extends.
 * avxvnni_evex is avxvnni by the same instructions of AVX-512 in the same registers. */
#if defined(__x86_64__)
extern const kl_kernels kl_kernels_avxvnni, kl_kernels_avxvnni_evex, kl_kernels_avx512bf16;
#elif defined(__aarch64__)
extern const kl_kernels kl_kernels_neon_dotprod;
#endif

/* Sets ctx->k to the named table (NULL: the best that runs here). */
kl_status kl_kernels_choose(kl_ctx *ctx, const char *isa);

#endif
