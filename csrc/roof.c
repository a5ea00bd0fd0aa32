/* The machine's roofs, measured with the context's threads and instruction set; a device's by its backend. */
#include "internal.h"

#include "cpu/kernels.h"

#include <stdatomic.h>

enum { READ_BLOCK = 1 << 20, FMA_ROUNDS = 200000, FMA_TASKS = 64, FMAS = 12 * 16 };

typedef struct task {
    const kl_kernels *k;
    const char *data;
    int64_t n_bytes;
    _Atomic float sink; /* so that nothing is left out */
} task;

static void read_blocks(void *arg, int64_t begin, int64_t end, int thread)
{
    task *a = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++)
        atomic_store_explicit(
            &a->sink,
            a->k->read((const float *)(const void *)(a->data + i * READ_BLOCK), READ_BLOCK / 4),
            memory_order_relaxed);
}

static void fma_rounds(void *arg, int64_t begin, int64_t end, int thread)
{
    task *a = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++)
        atomic_store_explicit(&a->sink, a->k->fma(FMA_ROUNDS), memory_order_relaxed);
}

static double seconds(void) { return 1e-9 * (double)kl_now_ns(); }

kl_status kl_roof_read(kl_ctx *ctx, const void *data, int64_t n_bytes, double *bytes_per_second)
{
    if (ctx->backend->roof_read != NULL)
        return ctx->backend->roof_read(ctx, data, n_bytes, bytes_per_second);
    const int64_t blocks = n_bytes / READ_BLOCK;
    if (blocks < 1 || (uintptr_t)data % 4 != 0)
        return kl_fail(ctx, KL_ERR_ARG,
                       "roof_read: %lld bytes; it must be at least %d, aligned to 4",
                       (long long)n_bytes, READ_BLOCK);
    task a = { .k = ctx->k, .data = data };
    const double begin = seconds();
    KL_TRY(kl_for(ctx, blocks, 1, read_blocks, &a));
    *bytes_per_second = (double)(blocks * READ_BLOCK) / (seconds() - begin);
    return KL_OK;
}

kl_status kl_roof_fma(kl_ctx *ctx, double *flops_per_second)
{
    if (ctx->backend->roof_fma != NULL)
        return ctx->backend->roof_fma(ctx, flops_per_second);
    task a = { .k = ctx->k };
    const double begin = seconds();
    KL_TRY(kl_for(ctx, FMA_TASKS, 1, fma_rounds, &a));
    *flops_per_second =
        2.0 * (double)((int64_t)FMAS * FMA_ROUNDS * FMA_TASKS) / (seconds() - begin);
    return KL_OK;
}
