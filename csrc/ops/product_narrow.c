/* Products whose rows of x may be narrow, in int8 or bfloat16: see product.h, cpu/int8.h and cpu/bfloat16.inc. */
#include "product.h"

#include "../cpu/dot.h"
#include "../cpu/fpenv.h"
#include "../cpu/int8.h"
#include "../cpu/kernels.h"

enum {
    PANEL_ROWS = 32,          /* of weights, unpacked together */
    DIRECT_ROWS_OF_X = 3,     /* most for which weights in blocks are streamed, not unpacked */
    DIRECT_BYTES = 96 * 1024, /* of stored weights in a task that streams them */
    BFLOAT16_ROWS = 96,       /* of weights that stay in L2; a multiple of KL_DOT_ROWS_STEP */
    BFLOAT16_BYTES = 640 * 1024,
    FEW_VALUES = 32 * 1024 /* of x: quicker done at once than handed out */
};

_Static_assert((int)KL_NARROW_PART == (int)KL_INT8_VALUES, "a part is a group of int8");
_Static_assert(KL_NARROW_PART % KL_BFLOAT16_STEP == 0, "a part is whole steps of bfloat16");

bool kl_product_is_narrow(const kl_ctx *ctx, const kl_weight *w)
{
    switch (ctx->activations) {
    case KL_ACTIVATIONS_INT8: return !w->transposed && kl_takes_int8(w->type);
    case KL_ACTIVATIONS_BFLOAT16: return !w->transposed && w->type == KL_BF16;
    default: return false;
    }
}

/* ---- rows of x ---- */

static int64_t int8_groups(int64_t D) { return kl_ceil_div(D, KL_INT8_VALUES); }

size_t kl_narrow_bytes(const kl_ctx *ctx, int64_t D)
{
    switch (ctx->activations) {
    case KL_ACTIVATIONS_INT8: return (size_t)int8_groups(D) * sizeof(kl_int8_group);
    case KL_ACTIVATIONS_BFLOAT16:
        return (size_t)(kl_ceil_div(D, KL_BFLOAT16_STEP) * KL_BFLOAT16_STEP) * sizeof(uint16_t);
    default: return 0;
    }
}

void kl_narrow_part(const kl_ctx *ctx, char *row, int64_t at, const float *x, int64_t n)
{
    if (ctx->activations == KL_ACTIVATIONS_INT8)
        ctx->k->int8_quantize((kl_int8_group *)(void *)row + at / KL_INT8_VALUES, x, n);
    else
        ctx->k->bfloat16_round((uint16_t *)(void *)row + at, x, n);
}

typedef struct task {
    const kl_ctx *ctx;
    char *to;
    const float *x;
    int64_t D;
    size_t row_bytes;
} task;

static void make_rows(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    for (int64_t t = begin; t < end; t++)
        kl_narrow_part(a->ctx, a->to + (size_t)t * a->row_bytes, 0, a->x + t * a->D, a->D);
}

kl_status kl_narrow_make(kl_ctx *ctx, char *to, const float *x, int64_t T, int64_t D)
{
    task a = { ctx, to, x, D, kl_narrow_bytes(ctx, D) };
    if (T * D > FEW_VALUES)
        return kl_for(ctx, T, kl_row_grain(D), make_rows, &a);
    const kl_fp saved = kl_fp_default();
    make_rows(&a, 0, T, 0);
    kl_fp_restore(saved);
    return KL_OK;
}

/* ---- products ---- */

/* rows of weights that are multiplied with many rows of x while they stay in L2 */
static int64_t bfloat16_rows(const kl_weight *w)
{
    const int64_t rows = BFLOAT16_BYTES / (int64_t)sizeof(uint16_t) / kl_max(1, w->cols);
    return kl_max(1, kl_min(rows, BFLOAT16_ROWS) / KL_DOT_ROWS_STEP) * KL_DOT_ROWS_STEP;
}

size_t kl_operand_scratch(const kl_ctx *ctx, const kl_weight *w, int64_t T)
{
    if (!kl_product_is_narrow(ctx, w))
        return kl_product_scratch(w, T);
    if (ctx->activations == KL_ACTIVATIONS_INT8)
        return (size_t)KL_INT8_SCRATCH(int8_groups(w->cols));
    return T > KL_DOT_DIRECT ? (size_t)KL_DOT_SCRATCH(bfloat16_rows(w)) * sizeof(float) : 0;
}

int64_t kl_operand_block(const kl_ctx *ctx, const kl_weight *w, int64_t T, int64_t rows)
{
    if (!kl_product_is_narrow(ctx, w))
        return kl_product_block(ctx, w, T, rows);
    const bool int8 = ctx->activations == KL_ACTIVATIONS_INT8;
    const int64_t fair = kl_ceil_div(rows, 4 * (int64_t)ctx->threads);
    if (int8 && T > DIRECT_ROWS_OF_X)
        return kl_min(kl_ceil_div(fair, PANEL_ROWS), 4) * PANEL_ROWS;
    const int64_t whole = !int8 && T > KL_DOT_DIRECT
                              ? bfloat16_rows(w)
                              : DIRECT_BYTES / kl_max(1, (int64_t)kl_type_bytes(w->type, w->cols));
    return kl_ceil_div(kl_max(1, kl_min(whole, fair)), 4) * 4;
}

static void bfloat16_product(const kl_ctx *ctx, float *y, int64_t ldy, const uint16_t *x,
                             int64_t ldx, const int32_t *index, int64_t T, const kl_weight *w,
                             const char *stored, int64_t rows, void *scratch)
{
    const int64_t step = bfloat16_rows(w);
    for (int64_t i = 0; i < rows; i += step)
        ctx->k->bfloat16_dot(y + i, ldy, x, ldx, index, T, stored + (size_t)i * w->row_bytes,
                             w->row_bytes, kl_min(step, rows - i), w->cols, scratch);
}

void kl_operand_product(const kl_ctx *ctx, float *y, int64_t ldy, const kl_operand *x,
                        int64_t first, const int32_t *index, int64_t T, const kl_weight *w,
                        int64_t which, int64_t row0, int64_t rows, void *scratch)
{
    if (!kl_product_is_narrow(ctx, w)) {
        kl_product(ctx, y, ldy, x->x + first * x->ldx, x->ldx, index, T, w, which, row0, rows,
                   scratch);
        return;
    }
    const char *stored = (const char *)w->matrix[which] + (size_t)row0 * w->row_bytes;
    const void *row = x->narrow + (size_t)first * x->narrow_bytes;
    if (ctx->activations == KL_ACTIVATIONS_INT8) {
        const kl_int8_rows x8 = { row, int8_groups(w->cols) };
        ctx->k->int8_dot(y, ldy, &x8, index, T, stored, w->row_bytes, w->type, rows, w->cols,
                         scratch);
    } else {
        bfloat16_product(ctx, y, ldy, row, (int64_t)(x->narrow_bytes / sizeof(uint16_t)), index, T,
                         w, stored, rows, scratch);
    }
}

/* bytes of T rows of x in front of a product's scratch, a multiple of 64 */
static size_t rows_bytes(const kl_ctx *ctx, const kl_weight *w, int64_t T)
{
    return kl_product_is_narrow(ctx, w) ? (size_t)T * kl_narrow_bytes(ctx, w->cols) : 0;
}

size_t kl_product_once_scratch(const kl_ctx *ctx, const kl_weight *w, int64_t T)
{
    return rows_bytes(ctx, w, T) + kl_operand_scratch(ctx, w, T);
}

void kl_product_once(const kl_ctx *ctx, float *y, int64_t ldy, const float *x, int64_t ldx,
                     int64_t T, const kl_weight *w, int64_t which, int64_t row0, int64_t rows,
                     void *scratch)
{
    char *to = scratch;
    const kl_operand operand = { x, ldx, to, kl_narrow_bytes(ctx, w->cols) };
    const size_t taken = rows_bytes(ctx, w, T);
    for (int64_t t = 0; taken > 0 && t < T; t++)
        kl_narrow_part(ctx, to + (size_t)t * operand.narrow_bytes, 0, x + t * ldx, w->cols);
    kl_operand_product(ctx, y, ldy, &operand, 0, NULL, T, w, which, row0, rows, to + taken);
}
