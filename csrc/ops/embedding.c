/* embedding: y[t, d] = table[ids[t], d]
 *   y [T, D] float32     ids [T], 0 <= ids < rows of the table     table [vocabulary, D] in any storage type
 *   A widening: exact. */
#include "ops.h"

#include "product.h"

typedef struct task {
    const kl_ctx *ctx;
    float *y;
    const int32_t *ids;
    const kl_weight *table;
} task;

static void rows(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    const char *first = a->table->matrix[0];
    const int64_t D = a->table->cols;
    (void)thread;
    for (int64_t t = begin; t < end; t++)
        kl_widen(a->ctx, a->y + t * D, first + (size_t)a->ids[t] * a->table->row_bytes,
                 a->table->type, D);
}

kl_status cpu_embedding(kl_ctx *ctx, float *y, const int32_t *ids, const kl_weight *table,
                        int64_t T)
{
    task a = { ctx, y, ids, table };
    return kl_for(ctx, T, kl_row_grain(table->cols), rows, &a);
}

kl_status kl_embedding(kl_ctx *ctx, float *y, const int32_t *ids, const kl_weight *table, int64_t T)
{
    KL_TRY(kl_check_rows(ctx, "embedding", "y", T, table->cols));
    KL_TRY(kl_check_weight(ctx, "embedding", "table", table, 1, table->rows, table->cols));
    if (table->transposed)
        return kl_fail(ctx, KL_ERR_UNSUPPORTED,
                       "embedding: table is stored transposed; it must be [rows, cols]");
    if (kl_is_measured(ctx))
        return KL_OK;
    for (int64_t t = 0; t < T; t++)
        if (ids[t] < 0 || ids[t] >= table->rows)
            return kl_fail(ctx, KL_ERR_ARG,
                           "embedding: ids[%lld] is %d; it must be 0 <= ids < %lld", (long long)t,
                           (int)ids[t], (long long)table->rows);
    return KL_RUN(embedding, 0, T * ((int64_t)table->row_bytes + 4 * table->cols), ctx, y, ids,
                  table, T);
}
