/* The floating-point control word: default (round to nearest, gradual underflow, no traps) everywhere,
 * subnormals flushed only where an op's contract says so. */
#ifndef KL_FPENV_H
#define KL_FPENV_H

#include <stdint.h>

typedef uint64_t kl_fp;

#if defined(__x86_64__)
static inline kl_fp kl_fp_set(kl_fp to)
{
    const kl_fp before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr((unsigned)to);
    return before;
}
#define KL_FP_DEFAULT 0x1f80
#define KL_FP_FLUSH 0x9fc0 /* flush to zero, denormals are zero */
#elif defined(__aarch64__)
static inline kl_fp kl_fp_set(kl_fp to)
{
    kl_fp before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(to));
    return before;
}
#define KL_FP_DEFAULT 0
#define KL_FP_FLUSH (1u << 24)
#else
#error "kimi_linear: x86-64 or aarch64"
#endif

/* each returns what was set before, for kl_fp_restore */
static inline kl_fp kl_fp_default(void) { return kl_fp_set(KL_FP_DEFAULT); }
static inline kl_fp kl_fp_flush(void) { return kl_fp_set(KL_FP_FLUSH); }
static inline void kl_fp_restore(kl_fp before) { (void)kl_fp_set(before); }

#endif
