/* The only file that knows a BLAS. setup.py names it: KL_BLAS_NAME, KL_CBLAS_PREFIX, or KL_NO_BLAS. */
#include "gemm.h"

#include "../internal.h"

const char *kl_blas_name(void) { return KL_BLAS_NAME; }

#if defined(KL_NO_BLAS)

#include <assert.h>

/* never reached: a context with KL_GEMM_BLAS cannot be made in this build */
void kl_gemm_rows(float *y, int64_t ldy, const float *x, int64_t ldx, int64_t T, const float *w,
                  int64_t ldw, int64_t n, int64_t K)
{
    (void)y, (void)ldy, (void)x, (void)ldx, (void)T, (void)w, (void)ldw, (void)n, (void)K;
    assert(!"this build has no BLAS");
}

int kl_gemm_begin(void) { return 0; }
void kl_gemm_end(int threads) { (void)threads; }

#else

#include <cblas.h>

#if defined(KL_CBLAS_PREFIX)
#define JOIN(a, b) a##b
#define PREFIXED(prefix, name) JOIN(prefix, name)
#define BLAS(name) PREFIXED(KL_CBLAS_PREFIX, name)
#else
#define BLAS(name) name
#endif

/* T and n are at most a pass of tokens and a panel of rows, far below what a blasint holds */
void kl_gemm_rows(float *y, int64_t ldy, const float *x, int64_t ldx, int64_t T, const float *w,
                  int64_t ldw, int64_t n, int64_t K)
{
    if (T > 0 && n > 0)
        BLAS(cblas_sgemm)(CblasRowMajor, CblasNoTrans, CblasTrans, (blasint)T, (blasint)n,
                          (blasint)K, 1.0f, x, (blasint)ldx, w, (blasint)ldw, 0.0f, y,
                          (blasint)ldy);
}

int kl_gemm_begin(void)
{
    const int threads = BLAS(openblas_get_num_threads)();
    BLAS(openblas_set_num_threads)(1);
    return threads;
}

void kl_gemm_end(int threads) { BLAS(openblas_set_num_threads)(threads); }

#endif
