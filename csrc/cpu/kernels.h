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
extern const kl_kernels kl_kernels_avx2, kl_kernels_avx512, kl_kernels_avx512bf16;
extern const kl_kernels kl_kernels_avxvnni, kl_kernels_avxvnni_evex;

/* The kernels of the table "avxvnni" that are not AVX2's: by AVX-VNNI (isa_avxvnni.c), and by the same instructions of
 * AVX-512 in the same registers (isa_avxvnni_evex.c). */
#define KL_AVXVNNI_KERNELS(of)                                                                     \
    void of##_int8_dot(float *y, int64_t ldy, const kl_int8_rows *x, const int32_t *index,         \
                       int64_t T, const void *w, size_t row_bytes, kl_type type, int64_t rows,     \
                       int64_t K, void *scratch);                                                  \
    void of##_fixed_product(float *y, int64_t ldy, const kl_fixed_rows *x, int64_t n,              \
                            const kl_fixed_lanes *w, int64_t rows);                                \
    void of##_attend_fixed(const kl_attend_fixed *a);
KL_AVXVNNI_KERNELS(kl_avxvnni)
KL_AVXVNNI_KERNELS(kl_avxvnni_evex)

/* bfloat16_dot by vdpbf16ps (isa_avx512bf16.c) */
void kl_avx512bf16_dot(float *y, int64_t ldy, const uint16_t *x, int64_t ldx, const int32_t *index,
                       int64_t T, const void *w, size_t row_bytes, int64_t rows, int64_t K,
                       void *scratch);
#elif defined(__aarch64__)
extern const kl_kernels kl_kernels_neon, kl_kernels_neon_dotprod;

/* int8_dot by sdot (isa_neon_dotprod.c) */
void kl_neon_dotprod_int8_dot(float *y, int64_t ldy, const kl_int8_rows *x, const int32_t *index,
                              int64_t T, const void *w, size_t row_bytes, kl_type type,
                              int64_t rows, int64_t K, void *scratch);
#endif

/* Sets ctx->k to the named table (NULL: the best that runs here). */
kl_status kl_kernels_choose(kl_ctx *ctx, const char *isa);

#endif
