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

void kl_gemm_begin(void) {}
void kl_gemm_end(void) {}

#else

#include <cblas.h>
#include <pthread.h>

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

/* OpenBLAS has one number of threads for the process: the first user saves it, the last puts it back */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int users, saved;

void kl_gemm_begin(void)
{
    pthread_mutex_lock(&lock);
    if (users++ == 0) {
        saved = BLAS(openblas_get_num_threads)();
        BLAS(openblas_set_num_threads)(1);
    }
    pthread_mutex_unlock(&lock);
}

void kl_gemm_end(void)
{
    pthread_mutex_lock(&lock);
    if (--users == 0)
        BLAS(openblas_set_num_threads)(saved);
    pthread_mutex_unlock(&lock);
}

#endif
