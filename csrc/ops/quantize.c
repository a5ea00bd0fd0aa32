/* quantize:   y[r] = the blocks of row r of x
 * dequantize: y[r, c] = the value that block c / values of row r of x has there
 *   Float32 rows [rows, cols] and rows of blocks, cols / values of them; quant/<type>.c has each type's formula.
 *   A value of x that is NaN or infinite is an error, and nothing is written.
 *   dequantize is exact where the formula has one operation; every operation rounds once, in its order. */
#include "ops.h"

#include "../quant/quant.h"
#include "product.h"

#include <math.h>

enum { SCAN_VALUES = 65536 };

typedef struct task {
    const kl_ctx *ctx;
    void *y;
    const void *x;
    const kl_block_type *blocks;
    kl_type type;
    int64_t cols;
    size_t row_bytes;
    int64_t n_values;
    _Atomic int64_t first; /* place of the first value that is not finite; n_values: none */
} task;

static void scan(void *arg, int64_t begin, int64_t end, int thread)
{
    task *a = arg;
    const float *x = a->x;
    (void)thread;
    for (int64_t i = begin * SCAN_VALUES; i < kl_min(end * SCAN_VALUES, a->n_values); i++) {
        if (isfinite(x[i]))
            continue;
        int64_t first = atomic_load(&a->first);
        while (i < first && !atomic_compare_exchange_weak(&a->first, &first, i)) {
        }
        return;
    }
}

static void quantize_rows(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    for (int64_t r = begin; r < end; r++)
        a->blocks->quantize((char *)a->y + (size_t)r * a->row_bytes,
                            (const float *)a->x + r * a->cols, a->cols / a->blocks->values);
}

static void dequantize_rows(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    for (int64_t r = begin; r < end; r++)
        kl_widen(a->ctx, (float *)a->y + r * a->cols, (const char *)a->x + (size_t)r * a->row_bytes,
                 a->type, a->cols);
}

static task task_of(kl_ctx *ctx, void *y, const void *x, kl_type type, int64_t rows, int64_t cols)
{
    return (task){ .ctx = ctx,
                   .y = y,
                   .x = x,
                   .type = type,
                   .cols = cols,
                   .blocks = kl_block_type_of(type),
                   .row_bytes = kl_type_bytes(type, cols),
                   .n_values = rows * cols,
                   .first = rows * cols };
}

kl_status cpu_quantize(kl_ctx *ctx, void *y, const float *x, kl_type type, int64_t rows,
                       int64_t cols)
{
    task a = task_of(ctx, y, x, type, rows, cols);
    KL_TRY(kl_for(ctx, kl_ceil_div(a.n_values, SCAN_VALUES), 1, scan, &a));
    const int64_t first = atomic_load(&a.first);
    if (first < a.n_values)
        return kl_fail(ctx, KL_ERR_ARG, "quantize: x[%lld, %lld] is %g; it must be finite",
                       (long long)(first / cols), (long long)(first % cols), (double)x[first]);
    return kl_for(ctx, rows, kl_row_grain(cols), quantize_rows, &a);
}

kl_status cpu_dequantize(kl_ctx *ctx, float *y, const void *x, kl_type type, int64_t rows,
                         int64_t cols)
{
    task a = task_of(ctx, y, x, type, rows, cols);
    return kl_for(ctx, rows, kl_row_grain(cols), dequantize_rows, &a);
}

static kl_status check(kl_ctx *ctx, const char *op, kl_type type, int64_t rows, int64_t cols)
{
    KL_TRY(kl_check_rows(ctx, op, "x", rows, cols));
    if (kl_type_block(type) == 0)
        return kl_fail(ctx, KL_ERR_DTYPE, "%s: type is %d, which is not known here", op, (int)type);
    return kl_check_whole(ctx, op, "x", "rows", type, cols);
}

kl_status kl_quantize(kl_ctx *ctx, void *y, const float *x, kl_type type, int64_t rows,
                      int64_t cols)
{
    KL_TRY(check(ctx, "quantize", type, rows, cols));
    const kl_block_type *blocks = kl_block_type_of(type);
    if (blocks == NULL || blocks->quantize == NULL)
        return kl_fail(ctx, KL_ERR_UNSUPPORTED, "quantize: %s is %s here; types to write are%s",
                       kl_type_name(type), blocks == NULL ? "no block type" : "only read",
                       kl_written_types);
    if (ctx->arena.measuring)
        return KL_OK;
    const int64_t n = rows * cols;
    return KL_RUN(quantize, 0, 4 * n + (int64_t)kl_type_bytes(type, n), ctx, y, x, type, rows,
                  cols);
}

kl_status kl_dequantize(kl_ctx *ctx, float *y, const void *x, kl_type type, int64_t rows,
                        int64_t cols)
{
    KL_TRY(check(ctx, "dequantize", type, rows, cols));
    if (ctx->arena.measuring)
        return KL_OK;
    const int64_t n = rows * cols;
    return KL_RUN(dequantize, 0, 4 * n + (int64_t)kl_type_bytes(type, n), ctx, y, x, type, rows,
                  cols);
}
