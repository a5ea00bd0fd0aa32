/* kl_for: tasks on a pool of threads.
 *
 * One word, the gate, says everything about the job at hand: its number (high bits), how many workers
 * are inside (bits 1..15) and whether it still takes workers (bit 0). A worker enters by compare and
 * swap, so a worker that wakes late never delays a job that is over. Between jobs workers watch the gate
 * for some 50 microseconds, which covers the gap between two ops of a decode step, then sleep. */
#define _POSIX_C_SOURCE 200809L /* getpid */
#include "internal.h"

#include "cpu/fpenv.h"
#include "system.h"

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

enum { SPINS = 2000, OPEN = 1, WORKER = 2, WORKERS = 0xfffe, JOB = 0x10000 };
static const int64_t POLL_NS = 50 * 1000 * 1000;

struct kl_pool {
    kl_ctx *ctx;
    int n_workers;
    pid_t pid; /* threads do not survive a fork: the child works alone */
    atomic_uint_fast64_t gate;
    atomic_int_fast64_t next; /* first task not handed out */
    int64_t n, grain;
    kl_body body;
    void *arg;

    pthread_mutex_t mutex;
    pthread_cond_t wake, left;
    atomic_int sleepers, caller_waits;
    bool quit;
    struct worker {
        pthread_t thread;
        kl_pool *pool;
        int id;
    } worker[];
};

static void pause_briefly(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static bool cancelled(kl_ctx *ctx)
{
    return !ctx->uninterruptible && atomic_load_explicit(&ctx->cancelled, memory_order_relaxed);
}

/* The calling thread asks now and then whether to go on (Ctrl-C), unless the answer could change nothing. */
static void poll_caller(kl_ctx *ctx)
{
    if (ctx->poll == NULL || ctx->uninterruptible)
        return;
    const int64_t now = kl_now_ns();
    if (now - ctx->polled_at < POLL_NS)
        return;
    ctx->polled_at = now;
    if (ctx->poll(ctx->poll_user) != 0)
        kl_ctx_cancel(ctx);
}

/* The same where work begins; a test cancels at one such place. */
static void ask(kl_ctx *ctx)
{
    poll_caller(ctx);
    if (ctx->cancel_at > 0 && --ctx->cancel_at == 0)
        kl_ctx_cancel(ctx);
}

static kl_status go_on(kl_ctx *ctx)
{
    if (!ctx->uninterruptible && atomic_exchange(&ctx->cancelled, 0))
        return kl_fail(ctx, KL_ERR_INTERRUPTED, "interrupted");
    return KL_OK;
}

static void take_tasks(kl_pool *pool, int thread)
{
    while (!cancelled(pool->ctx)) {
        const int64_t begin = atomic_fetch_add(&pool->next, pool->grain);
        if (begin >= pool->n)
            return;
        pool->body(pool->arg, begin, kl_min(begin + pool->grain, pool->n), thread);
        if (thread == 0)
            poll_caller(pool->ctx);
    }
}

/* Enters the job at hand if it takes workers and is not the one numbered *seen. */
static bool enter(kl_pool *pool, uint64_t *seen)
{
    uint_fast64_t gate = atomic_load(&pool->gate);
    while ((gate & OPEN) != 0 && gate / JOB != *seen)
        if (atomic_compare_exchange_weak(&pool->gate, &gate, gate + WORKER)) {
            *seen = gate / JOB;
            return true;
        }
    return false;
}

static void leave(kl_pool *pool)
{
    const uint_fast64_t before = atomic_fetch_sub(&pool->gate, WORKER);
    if ((before & WORKERS) == WORKER && atomic_load(&pool->caller_waits)) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_signal(&pool->left);
        pthread_mutex_unlock(&pool->mutex);
    }
}

static void *work(void *arg)
{
    const struct worker *self = arg;
    kl_pool *pool = self->pool;
    uint64_t seen = 0;
    kl_fp_default();
    for (;;) {
        bool entered = false;
        for (int i = 0; i < SPINS && !entered; i++) {
            entered = enter(pool, &seen);
            if (!entered)
                pause_briefly();
        }
        if (!entered) {
            pthread_mutex_lock(&pool->mutex);
            atomic_fetch_add(&pool->sleepers, 1);
            while (!pool->quit && !(entered = enter(pool, &seen)))
                pthread_cond_wait(&pool->wake, &pool->mutex);
            atomic_fetch_sub(&pool->sleepers, 1);
            pthread_mutex_unlock(&pool->mutex);
            if (!entered)
                return NULL;
        }
        take_tasks(pool, self->id);
        leave(pool);
    }
}

static void run_on_all(kl_pool *pool)
{
    const uint_fast64_t job = atomic_load(&pool->gate) / JOB + 1;
    atomic_store(&pool->next, 0);
    atomic_store(&pool->gate, job * JOB + OPEN);
    if (atomic_load(&pool->sleepers) > 0) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
    take_tasks(pool, 0);
    atomic_fetch_and(&pool->gate, ~(uint_fast64_t)OPEN);
    for (int i = 0; i < SPINS && (atomic_load(&pool->gate) & WORKERS) != 0; i++)
        pause_briefly();
    if ((atomic_load(&pool->gate) & WORKERS) != 0) {
        pthread_mutex_lock(&pool->mutex);
        atomic_store(&pool->caller_waits, 1);
        while ((atomic_load(&pool->gate) & WORKERS) != 0)
            pthread_cond_wait(&pool->left, &pool->mutex);
        atomic_store(&pool->caller_waits, 0);
        pthread_mutex_unlock(&pool->mutex);
    }
}

kl_status kl_for(kl_ctx *ctx, int64_t n, int64_t grain, kl_body body, void *arg)
{
    kl_pool *pool = ctx->pool;
    if (n <= 0)
        return KL_OK;
    ask(ctx);
    const kl_fp saved = kl_fp_default();
    pool->n = n;
    pool->grain = grain > 0 ? grain : 1;
    pool->body = body;
    pool->arg = arg;
    if (pool->n_workers == 0 || n <= pool->grain || getpid() != pool->pid) {
        atomic_store(&pool->next, 0);
        take_tasks(pool, 0);
    } else {
        run_on_all(pool);
    }
    kl_fp_restore(saved);
    return go_on(ctx);
}

kl_status kl_poll(kl_ctx *ctx)
{
    if (ctx->arena.measuring)
        return KL_OK;
    ask(ctx);
    return go_on(ctx);
}

kl_status kl_pool_create(kl_ctx *ctx, int threads)
{
    if (threads == 0)
        threads = kl_processors();
    kl_pool *pool = calloc(1, sizeof *pool + (size_t)threads * sizeof pool->worker[0]);
    if (pool == NULL)
        return kl_fail(ctx, KL_ERR_MEMORY, "out of memory: thread pool");
    pool->ctx = ctx;
    pool->pid = getpid();
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->left, NULL);
    kl_pool_destroy(ctx);
    ctx->pool = pool;
    ctx->threads = 1;
    for (int i = 0; i + 1 < threads; i++) {
        struct worker *w = &pool->worker[i];
        w->pool = pool;
        w->id = i + 1;
        if (pthread_create(&w->thread, NULL, work, w) != 0)
            break; /* fewer threads than asked for: the same results */
        pool->n_workers++;
        ctx->threads++;
    }
    return KL_OK;
}

void kl_pool_destroy(kl_ctx *ctx)
{
    kl_pool *pool = ctx->pool;
    if (pool == NULL)
        return;
    if (getpid() == pool->pid) {
        pthread_mutex_lock(&pool->mutex);
        pool->quit = true;
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
        for (int i = 0; i < pool->n_workers; i++)
            pthread_join(pool->worker[i].thread, NULL);
        pthread_mutex_destroy(&pool->mutex);
        pthread_cond_destroy(&pool->wake);
        pthread_cond_destroy(&pool->left);
    } /* in the child of a fork the workers still count as waiting, and destroying would wait for them */
    free(pool);
    ctx->pool = NULL;
}
