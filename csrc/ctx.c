/* The context: error sentence, memory, scratch arena, kernel table. */
#include "internal.h"

#include "cpu/kernels.h"
#include "device.h"
#include "ops/ops.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ALIGN = 64, MAX_CHUNKS = 24 };

kl_status kl_fail(kl_ctx *ctx, kl_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(ctx->error, sizeof ctx->error, format, args);
    va_end(args);
    return status;
}

kl_status kl_fail_in(kl_ctx *ctx, int64_t layer, kl_status status)
{
    char sentence[sizeof ctx->error];
    if (status == KL_OK
        || ctx->backend->wait != NULL) /* a device tells of its values later, at a wait */
        return status;
    memcpy(sentence, ctx->error, sizeof sentence);
    return kl_fail(ctx, status, "layer %lld: %s", (long long)layer, sentence);
}

kl_status kl_settle(kl_ctx *ctx)
{
    const kl_backend *backend = ctx->backend;
    return backend->wait == NULL ? KL_OK : backend->wait(ctx, backend->stream(ctx));
}

bool kl_mul(int64_t *product, int64_t a, int64_t b)
{
    const int64_t most = INT64_C(1) << 50; /* beside a 0, too: what is made of a size must fit */
    return a >= 0 && b >= 0 && a <= most && b <= most && !__builtin_mul_overflow(a, b, product)
           && *product < (INT64_C(1) << 62);
}

const char *kl_library_version(void) { return KL_VERSION; }

/* ---- allocation ------------------------------------------------------------------------------ */

static void *default_allocate(void *user, size_t n_bytes)
{
    (void)user;
    return aligned_alloc(ALIGN, (n_bytes + ALIGN - 1) / ALIGN * ALIGN);
}

static void default_release(void *user, void *p, size_t n_bytes)
{
    (void)user;
    (void)n_bytes;
    free(p);
}

int kl_allocation_fails(kl_ctx *ctx)
{
    ctx->allocations++;
    return ctx->fail_at > 0 && --ctx->fail_at == 0;
}

static size_t at_least_one(size_t n_bytes) { return n_bytes > 0 ? n_bytes : 1; }

void *kl_allocate(kl_ctx *ctx, size_t n_bytes)
{
    const bool fails = kl_allocation_fails(ctx);
    void *p = fails ? NULL : ctx->allocator.allocate(ctx->allocator.user, at_least_one(n_bytes));
    if (p == NULL)
        (void)kl_fail(ctx, KL_ERR_MEMORY, "out of memory: %zu bytes were wanted", n_bytes);
    return p;
}

void kl_release(kl_ctx *ctx, void *p, size_t n_bytes)
{
    if (p != NULL)
        ctx->allocator.release(ctx->allocator.user, p, at_least_one(n_bytes));
}

kl_status kl_ctx_set_allocator(kl_ctx *ctx, const kl_allocator *allocator)
{
    kl_ctx_trim(ctx);
    ctx->allocator =
        allocator != NULL ? *allocator : (kl_allocator){ default_allocate, default_release, NULL };
    return KL_OK;
}

/* ---- scratch ---------------------------------------------------------------------------------- */

typedef struct kl_chunk {
    char *data;
    size_t size, begin; /* begin: bytes in use before this chunk's first */
} chunk;

static size_t round_up(size_t n_bytes) { return (n_bytes + ALIGN - 1) / ALIGN * ALIGN; }

static void release_chunks(kl_ctx *ctx)
{
    kl_arena *a = &ctx->arena;
    for (int i = 0; i < a->n_chunks; i++)
        ctx->backend->release(ctx, a->chunks[i].data, a->chunks[i].size);
    a->n_chunks = a->current = 0;
}

static kl_status add_chunk(kl_ctx *ctx, size_t size)
{
    kl_arena *a = &ctx->arena;
    if (a->n_chunks == MAX_CHUNKS)
        return kl_fail(ctx, KL_ERR_MEMORY, "scratch: more than %d pieces in one call", MAX_CHUNKS);
    char *data = ctx->backend->allocate(ctx, size);
    if (data == NULL)
        return kl_fail(ctx, KL_ERR_MEMORY, "out of memory: scratch of %zu bytes was wanted", size);
    a->chunks[a->n_chunks++] = (chunk){ data, size, a->used };
    a->current = a->n_chunks - 1;
    return KL_OK;
}

/* In one piece what a call like the largest yet takes. Where that cannot be had the largest is forgotten: the next
 * call asks for its own. */
static kl_status add_more(kl_ctx *ctx, size_t n_bytes)
{
    kl_arena *a = &ctx->arena;
    const kl_status status = add_chunk(ctx, n_bytes > a->peak ? n_bytes : a->peak);
    if (status != KL_OK)
        a->peak = a->used;
    return status;
}

kl_status kl_scratch_reserve(kl_ctx *ctx, size_t n_bytes)
{
    kl_arena *a = &ctx->arena;
    n_bytes = round_up(n_bytes);
    if (a->used != 0 || n_bytes == 0 || (a->n_chunks > 0 && a->chunks[0].size >= n_bytes))
        return KL_OK;
    release_chunks(ctx);
    return add_chunk(ctx, n_bytes);
}

kl_status kl_scratch(kl_ctx *ctx, void **p, size_t n_bytes)
{
    kl_arena *a = &ctx->arena;
    *p = NULL;
    if (n_bytes > SIZE_MAX / 2 || a->used > SIZE_MAX / 2)
        return kl_fail(ctx, KL_ERR_MEMORY,
                       "out of memory: scratch of more than %zu bytes was wanted", SIZE_MAX / 2);
    n_bytes = round_up(n_bytes);
    if (!a->measuring) {
        /* the current chunk, or a later one kept from before, or a new one */
        while (a->current < a->n_chunks
               && a->used - a->chunks[a->current].begin + n_bytes > a->chunks[a->current].size) {
            if (a->current + 1 == a->n_chunks)
                break;
            a->chunks[++a->current].begin = a->used;
        }
        if (a->current >= a->n_chunks
            || a->used - a->chunks[a->current].begin + n_bytes > a->chunks[a->current].size)
            KL_TRY(add_more(ctx, n_bytes));
        const chunk *c = &a->chunks[a->current];
        *p = c->data + (a->used - c->begin);
#ifdef KL_DEBUG
        if (ctx->backend == &kl_cpu_backend)
            memset(*p, 0xff,
                   n_bytes); /* NaN in every type: what is read before it is written shows */
#endif
    }
    a->used += n_bytes;
    if (a->used > a->peak)
        a->peak = a->used;
    return KL_OK;
}

size_t kl_scratch_mark(const kl_ctx *ctx) { return ctx->arena.used; }

void kl_scratch_reset(kl_ctx *ctx, size_t mark)
{
    kl_arena *a = &ctx->arena;
    a->used = mark;
    while (a->current > 0 && a->chunks[a->current].begin > mark)
        a->current--;
    if (mark == 0 && a->n_chunks > 1
        && !a->measuring) /* a larger call than any before: one piece for the next */
        release_chunks(ctx);
}

void kl_measure_begin(kl_ctx *ctx, kl_measure *saved)
{
    *saved = (kl_measure){ ctx->arena.used, ctx->arena.peak };
    ctx->arena.measuring = true;
    ctx->arena.used = ctx->arena.peak = 0;
}

size_t kl_measure_end(kl_ctx *ctx, const kl_measure *saved)
{
    const size_t peak = ctx->arena.peak;
    ctx->arena.measuring = false;
    ctx->arena.used = saved->used;
    ctx->arena.peak = saved->peak;
    return peak;
}

size_t kl_ctx_scratch_bytes(const kl_ctx *ctx)
{
    size_t sum = 0;
    for (int i = 0; i < ctx->arena.n_chunks; i++)
        sum += ctx->arena.chunks[i].size;
    return sum;
}

int64_t kl_ctx_allocations(const kl_ctx *ctx) { return ctx->allocations; }

void kl_ctx_trim(kl_ctx *ctx)
{
    release_chunks(ctx);
    ctx->arena.used = ctx->arena.peak = 0;
}

/* ---- life ------------------------------------------------------------------------------------- */

kl_status kl_ctx_create(kl_ctx **out, const kl_ctx_options *options)
{
    const kl_ctx_options none = { 0 };
    if (options == NULL)
        options = &none;
    kl_ctx *ctx = calloc(1, sizeof *ctx);
    *out = ctx;
    if (ctx == NULL)
        return KL_ERR_MEMORY;
    ctx->allocator = (kl_allocator){ default_allocate, default_release, NULL };
    ctx->backend = &kl_cpu_backend;
    ctx->gemm = options->gemm;
    ctx->delta_rule = options->delta_rule;
    ctx->activations = options->activations;
    ctx->arena.chunks = calloc(MAX_CHUNKS, sizeof(chunk));
    if (ctx->arena.chunks == NULL)
        return kl_fail(ctx, KL_ERR_MEMORY, "out of memory: context");
    if (options->gemm != KL_GEMM_OWN && options->gemm != KL_GEMM_BLAS)
        return kl_fail(ctx, KL_ERR_ARG, "gemm is %d; it must be own or blas", (int)options->gemm);
    if (options->gemm == KL_GEMM_BLAS && strcmp(kl_blas_name(), "none") == 0)
        return kl_fail(ctx, KL_ERR_UNSUPPORTED,
                       "gemm: this build has no BLAS; use the own product");
    if (options->delta_rule < KL_FORM_AUTO || options->delta_rule > KL_FORM_CHUNKED)
        return kl_fail(ctx, KL_ERR_ARG, "delta_rule is %d; it must be auto, recurrent or chunked",
                       (int)options->delta_rule);
    if (options->activations < KL_ACTIVATIONS_FLOAT32
        || options->activations > KL_ACTIVATIONS_BFLOAT16)
        return kl_fail(ctx, KL_ERR_ARG, "activations is %d; it must be float32, int8 or bfloat16",
                       (int)options->activations);
    KL_TRY(kl_kernels_choose(ctx, options->isa));
    KL_TRY(kl_device_choose(ctx, options->device));
    return kl_ctx_set_threads(ctx, options->threads);
}

void kl_ctx_destroy(kl_ctx *ctx)
{
    if (ctx == NULL)
        return;
    kl_pool_destroy(ctx);
    if (ctx->arena.chunks != NULL)
        kl_ctx_trim(ctx);
    if (ctx->backend != NULL && ctx->backend->close != NULL)
        ctx->backend->close(ctx, ctx->device);
    free(ctx->arena.chunks);
    free(ctx);
}

kl_status kl_ctx_set_threads(kl_ctx *ctx, int threads)
{
    if (threads < 0 || threads > 1024)
        return kl_fail(ctx, KL_ERR_ARG, "threads is %d; it must be 0 (all processors) to 1024",
                       threads);
    return kl_pool_create(ctx, threads);
}

const char *kl_ctx_error(const kl_ctx *ctx) { return ctx == NULL ? "out of memory" : ctx->error; }
const char *kl_ctx_device(const kl_ctx *ctx) { return ctx->backend->name; }
const char *kl_ctx_isa(const kl_ctx *ctx) { return ctx->k->name; }
int kl_ctx_threads(const kl_ctx *ctx) { return ctx->threads; }
void kl_ctx_cancel(kl_ctx *ctx) { atomic_store(&ctx->cancelled, 1); }

void kl_ctx_fail_at(kl_ctx *ctx, int64_t nth) { ctx->fail_at = nth; }
void kl_ctx_cancel_at(kl_ctx *ctx, int64_t nth) { ctx->cancel_at = nth; }

void kl_ctx_set_progress(kl_ctx *ctx, int (*report)(void *user, int64_t done, int64_t all),
                         void *user)
{
    ctx->report = report;
    ctx->report_user = user;
}

void kl_ctx_set_poll(kl_ctx *ctx, int (*poll)(void *user), void *user)
{
    ctx->poll = poll;
    ctx->poll_user = user;
}
