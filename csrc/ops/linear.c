/* linear: y[i][t, r] = sum_k x[t, k] w[i][r, k] + bias[i][r]     for several weights over one x
 *   x [T, D], y[i] [T, rows of w[i]] float32, y overlaps no input     w[i] [rows, D] in any storage type
 *   A weight of n matrices is one whose rows are theirs, one matrix after another.
 *   Order of a sum: product.h, or cpu/int8.h or cpu/bfloat16.inc where the context asks for it and the weight takes
 *   it; the bias is added last.
 *   Budget: |y - ref| <= (D/16 + 5) u sum_k |x w| + u |ref|, u = 2^-24. */
#include "ops.h"

#include "product.h"
#include "room.h"

/* Tasks are blocks of rows of one weight, times blocks of rows of x where there are few of the first. */
typedef struct task {
    const kl_ctx *ctx;
    float *const *y;
    kl_operand x;
    const kl_weight *w;
    const float *const *bias;
    int64_t T, D;
    int64_t block, t_block, t_blocks; /* rows of w, rows of x, number of the latter blocks */
    kl_rooms rooms;                   /* of products */
} task;

/* of one matrix, and of a weight */
static int64_t matrix_blocks(const task *a, int i) { return kl_ceil_div(a->w[i].rows, a->block); }
static int64_t blocks_of(const task *a, int i) { return a->w[i].n * matrix_blocks(a, i); }
static int64_t rows_of(const kl_weight *w) { return w->n * w->rows; }

/* rows block * a->block.. of matrix number `which` */
static void product_block(const task *a, int i, int64_t which, int64_t block, int64_t t0,
                          void *scratch)
{
    const kl_weight *w = &a->w[i];
    const int64_t r0 = block * a->block, n = kl_min(a->block, w->rows - r0), rows = rows_of(w),
                  first = which * w->rows + r0, T = kl_min(a->t_block, a->T - t0);
    float *y = a->y[i] + t0 * rows + first;
    kl_operand_product(a->ctx, y, rows, &a->x, t0, NULL, T, w, which, r0, n, scratch);
    if (a->bias != NULL && a->bias[i] != NULL)
        for (int64_t t = 0; t < T; t++)
            a->ctx->k->add(y + t * rows, y + t * rows, a->bias[i] + first, n);
}

static void blocks(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    void *scratch = kl_room_of(&a->rooms, thread).base;
    for (int64_t j = begin; j < end; j++) {
        int64_t r = j / a->t_blocks;
        int i = 0;
        while (r >= blocks_of(a, i))
            r -= blocks_of(a, i++);
        const int64_t n = matrix_blocks(a, i);
        product_block(a, i, r / n, r % n, j % a->t_blocks * a->t_block, scratch);
    }
}

kl_status cpu_linear(kl_ctx *ctx, float *const *y, const float *x, const kl_weight *w,
                     const float *const *bias, int n_weights, int64_t T, int64_t D)
{
    enum { FEW_ROWS = 64, X_STEP = 12 }; /* of x: a smaller task reads its weights for too little */
    task a = { .ctx = ctx,
               .y = y,
               .x = { x, D, NULL, kl_narrow_bytes(ctx, D) },
               .w = w,
               .bias = bias,
               .T = T,
               .D = D,
               .block = 1,
               .t_block = T,
               .t_blocks = 1 };
    int64_t rows = 0, row_blocks = 0;
    size_t n_bytes = 0;
    bool narrow = false;
    for (int i = 0; i < n_weights; i++)
        rows += rows_of(&w[i]);
    for (int i = 0; i < n_weights; i++) {
        n_bytes = kl_larger(n_bytes, kl_operand_scratch(ctx, &w[i], T));
        a.block = kl_max(a.block, kl_operand_block(ctx, &w[i], T, rows));
        narrow = narrow || kl_product_is_narrow(ctx, &w[i]);
    }
    for (int i = 0; i < n_weights; i++)
        row_blocks += blocks_of(&a, i);
    if (row_blocks < 4 * ctx->threads && T > FEW_ROWS) {
        const int64_t parts =
            kl_min(kl_ceil_div(4 * ctx->threads, kl_max(1, row_blocks)), T / FEW_ROWS);
        a.t_block = kl_ceil_div(kl_ceil_div(T, parts), X_STEP) * X_STEP;
        a.t_blocks = kl_ceil_div(T, a.t_block);
    }
    char *narrow_x = NULL;
    KL_TRY(kl_take_rooms(ctx, &a.rooms, n_bytes));
    if (narrow)
        KL_SCRATCH(narrow_x, ctx, (size_t)T * a.x.narrow_bytes);
    if (ctx->arena.measuring || T == 0)
        return KL_OK;
    a.x.narrow = narrow_x;
    if (narrow)
        KL_TRY(kl_narrow_make(ctx, narrow_x, x, T, D));
    return kl_product_for(ctx, row_blocks * a.t_blocks, 1, blocks, &a);
}

kl_status kl_linear(kl_ctx *ctx, float *const *y, const float *x, const kl_weight *w,
                    const float *const *bias, int n_weights, int64_t T, int64_t D)
{
    int64_t all_rows = 0, weight_bytes = 0;
    KL_TRY(kl_check_rows(ctx, "linear", "x", T, D));
    if (n_weights < 0)
        return kl_fail(ctx, KL_ERR_ARG, "linear: n_weights is %d; it must be >= 0", n_weights);
    for (int i = 0; i < n_weights; i++) {
        int64_t rows;
        KL_TRY(kl_check_weight(ctx, "linear", "w", &w[i], w[i].n, w[i].rows, D));
        if (!kl_mul(&rows, w[i].n, w[i].rows))
            return kl_fail(ctx, KL_ERR_SHAPE, "linear: w is %lld matrices of %lld rows",
                           (long long)w[i].n, (long long)w[i].rows);
        KL_TRY(kl_check_rows(ctx, "linear", "w", rows, D));
        all_rows += rows;
        weight_bytes += (int64_t)kl_type_bytes(w[i].type, rows * D);
    }
    return KL_RUN(linear, 2 * T * D * all_rows, 4 * T * (D + all_rows) + weight_bytes, ctx, y, x, w,
                  bias, n_weights, T, D);
}
