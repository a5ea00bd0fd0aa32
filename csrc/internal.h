/* What the parts of the library share: the context, its scratch, threads, and the op table. */
#ifndef KL_INTERNAL_H
#define KL_INTERNAL_H

#include "kimi_linear.h"
#include "ops/backend.h"

#include <stdatomic.h>
#include <stdbool.h>

typedef struct kl_kernels kl_kernels; /* cpu/kernels.h: one table an instruction set */
typedef struct kl_pool kl_pool;       /* pool.c */

/* A stack of scratch memory in chunks: an allocation never moves, and once a context has seen its
 * largest call it allocates no more. While measuring nothing is allocated: addresses are NULL and
 * only the peak is counted. */
typedef struct kl_arena {
    struct kl_chunk *chunks; /* oldest first */
    int n_chunks, current;
    size_t used, peak; /* bytes, as if in one piece */
    bool measuring;
} kl_arena;

struct kl_ctx {
    const kl_backend *backend;
    void *device; /* the backend's own part, NULL on the CPU */
    int device_number;
    const kl_kernels *k;
    kl_pool *pool;
    kl_arena arena;
    kl_allocator allocator;
    kl_gemm gemm;
    kl_form delta_rule;         /* of a call that says auto */
    kl_activations activations; /* of products */
    int threads;
    int64_t allocations;
    int64_t fail_at, cancel_at; /* calls of kl_allocate, of kl_for, until one fails; 0: never */
    atomic_int cancelled;
    bool uninterruptible; /* a step that must run to its end: cancelling waits for the next */
    int (*poll)(void *user);
    void *poll_user;
    int64_t polled_at;                                    /* ns */
    int (*report)(void *user, int64_t done, int64_t all); /* of weights that are uploaded */
    void *report_user;
    bool profiling;
    int64_t booking; /* of the op at hand: ns when it began, */
    size_t mark;     /* and the scratch that was taken before it */
    kl_profile_row profile[KL_OP_COUNT];
    char error[512];
};

/* Leaves the sentence in the context and returns status. */
kl_status kl_fail(kl_ctx *ctx, kl_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Of an op that failed or did not: its status; on the CPU its sentence gets the layer of the model before it. */
kl_status kl_fail_in(kl_ctx *ctx, int64_t layer, kl_status status);

/* product of two sizes from outside; false when it does not fit 2^62, or one is negative or above 2^50 */
bool kl_mul(int64_t *product, int64_t a, int64_t b);

/* What was asked of a device is done, and what its kernels noted of the values is told. */
kl_status kl_settle(kl_ctx *ctx) KL_CHECKED;

/* ---- memory (ctx.c) ---- */

void *kl_allocate(kl_ctx *ctx, size_t n_bytes); /* NULL: out of memory, the error is set */
void kl_release(kl_ctx *ctx, void *p, size_t n_bytes);
int kl_allocation_fails(kl_ctx *ctx); /* counts it; 1: a test wants this one to fail */

/* Scratch, 64-byte aligned, valid until kl_scratch_reset to a mark taken before; an op's, until the op ends (KL_RUN).
 * An op takes all of its scratch first, then returns KL_OK if the context is only measuring:
 *     float *buffer;
 *     KL_SCRATCH(buffer, ctx, T * D);
 *     if (ctx->arena.measuring) return KL_OK; */
kl_status kl_scratch(kl_ctx *ctx, void **p, size_t n_bytes) KL_CHECKED;
size_t kl_scratch_mark(const kl_ctx *ctx);
void kl_scratch_reset(kl_ctx *ctx, size_t mark);
kl_status kl_scratch_reserve(kl_ctx *ctx, size_t n_bytes) KL_CHECKED; /* one piece of that size */

/* Between the two, ops only count their scratch; the second gives the peak in bytes. */
typedef struct kl_measure {
    size_t used, peak;
} kl_measure;
void kl_measure_begin(kl_ctx *ctx, kl_measure *saved);
size_t kl_measure_end(kl_ctx *ctx, const kl_measure *saved);

/* n values of a size; what no memory holds, where that is more than it can be */
static inline size_t kl_bytes_of(int64_t n, size_t size)
{
    return n < 0 || (size_t)n > SIZE_MAX / 2 / size ? SIZE_MAX : (size_t)n * size;
}

/* n values of *pointer's type; returns from the caller on failure */
#define KL_SCRATCH(pointer, ctx, n)                                                                \
    do {                                                                                           \
        void *kl_p = NULL;                                                                         \
        KL_TRY(kl_scratch((ctx), &kl_p, kl_bytes_of((int64_t)(n), sizeof *(pointer))));            \
        (pointer) = kl_p;                                                                          \
    } while (0)

/* ---- threads (pool.c) ---- */

/* body(arg, begin, end, thread): work on tasks begin..end-1; thread < ctx->threads names scratch. */
typedef void (*kl_body)(void *arg, int64_t begin, int64_t end, int thread);

/* Runs tasks 0..n-1, grain at a time, handed out in rising order to whichever thread is free; returns
 * when all are done. Tasks must not depend on each other. The floating-point environment inside a
 * task is the default one, whoever called. KL_ERR_INTERRUPTED when cancelled: some tasks are undone. */
kl_status kl_for(kl_ctx *ctx, int64_t n, int64_t grain, kl_body body, void *arg) KL_CHECKED;

/* Whether to go on, asked where a device computes and kl_for does not run. */
kl_status kl_poll(kl_ctx *ctx) KL_CHECKED;

int64_t kl_now_ns(void); /* of a clock that never steps back (system.c) */

/* In the place of the pool that the context has; on failure that one stays. */
kl_status kl_pool_create(kl_ctx *ctx, int threads) KL_CHECKED;
void kl_pool_destroy(kl_ctx *ctx);

/* ---- checks that ops share (checks.c) ---- */

/* Tokens that a sequence has at most: positions, and the pages they take, are then far from overflow. */
enum { KL_MAX_TOKENS_LOG2 = 40 };
#define KL_MAX_TOKENS (INT64_C(1) << KL_MAX_TOKENS_LOG2)

kl_status kl_check_offsets(kl_ctx *ctx, const char *op, const int64_t *offsets, int64_t N,
                           int64_t T);
/* a known type, whose blocks make up `parts` (rows, heads) so wide */
kl_status kl_check_whole(kl_ctx *ctx, const char *op, const char *name, const char *parts,
                         kl_type type, int64_t width);
kl_status kl_check_weight(kl_ctx *ctx, const char *op, const char *name, const kl_weight *w,
                          int64_t n, int64_t rows, int64_t cols);

/* positions [N] of a cache are enough for the queries that offsets [N+1] give, and no more than there may be */
kl_status kl_check_positions(kl_ctx *ctx, const char *op, const int64_t *positions,
                             const int64_t *offsets, int64_t N);

/* a type that caches have, rows of whole blocks, room for `width` values a row */
kl_status kl_check_cache(kl_ctx *ctx, const char *op, const char *name, const kl_cache *cache,
                         int64_t width);
/* x is [T, D] with T >= 0 and D >= 1, and T * D fits */
kl_status kl_check_rows(kl_ctx *ctx, const char *op, const char *name, int64_t T, int64_t D);
/* [T, n, D] of streams: 1 <= n <= KL_MHC_STREAMS, T >= 0, D >= 1, and a product of sizes fits */
kl_status kl_check_streams(kl_ctx *ctx, const char *op, int64_t T, int64_t n, int64_t D) KL_CHECKED;
/* That SwiGLU's limit is above 0 and finite, or 0. */
kl_status kl_check_limit(kl_ctx *ctx, const char *op, float limit);
/* That beta is above 0, linear_beta not below it, and both are finite. */
kl_status kl_check_betas(kl_ctx *ctx, const char *op, const kl_situ_betas *betas);

/* where sequence n's values begin; NULL where there is no state */
static inline float *kl_slot_of(kl_slots slots, int64_t n)
{
    return slots.base != NULL ? (float *)(void *)((char *)slots.base[n] + slots.offset) : NULL;
}

static inline int64_t kl_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t kl_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline size_t kl_larger(size_t a, size_t b) { return a > b ? a : b; }
/* rows a task where a row is D cheap values: enough work to be worth handing out */
static inline int64_t kl_row_grain(int64_t D) { return kl_max(1, 16384 / kl_max(1, D)); }

#endif
