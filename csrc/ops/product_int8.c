/* Products whose rows of x may be in int8: see product.h and cpu/int8.h. */
#include "product.h"

#include "../cpu/kernels.h"

enum {
    PANEL_ROWS = 32,          /* of weights, unpacked together */
    DIRECT_ROWS_OF_X = 3,     /* most for which weights are streamed, not unpacked */
    DIRECT_BYTES = 96 * 1024, /* of stored weights in a task that streams them */
    FEW_VALUES = 32 * 1024    /* of x: quicker done at once than handed out */
};

bool kl_product_takes_int8(const kl_ctx *ctx, const kl_weight *w)
{
    if (ctx->activations != KL_ACTIVATIONS_INT8 || w->transposed)
        return false;
    switch (w->type) {
#define KL_INT8_TYPE(type) case type:
        KL_INT8_TYPES(KL_INT8_TYPE)
#undef KL_INT8_TYPE
        return true;
    default: return false;
    }
}

int64_t kl_int8_groups(int64_t D) { return kl_ceil_div(D, KL_INT8_VALUES); }

typedef struct task {
    const kl_kernels *k;
    kl_int8_group *to;
    const float *x;
    int64_t D, groups;
} task;

static void quantize(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    for (int64_t t = begin; t < end; t++)
        a->k->int8_quantize(a->to + t * a->groups, a->x + t * a->D, a->D);
}

kl_status kl_int8_rows_make(kl_ctx *ctx, kl_int8_group *to, const float *x, int64_t T, int64_t D)
{
    task a = { ctx->k, to, x, D, kl_int8_groups(D) };
    if (T * D > FEW_VALUES)
        return kl_for(ctx, T, kl_row_grain(D), quantize, &a);
    quantize(&a, 0, T, 0);
    return KL_OK;
}

static size_t int8_scratch(const kl_weight *w)
{
    return (size_t)KL_INT8_SCRATCH(kl_int8_groups(w->cols));
}

size_t kl_operand_scratch(const kl_ctx *ctx, const kl_weight *w, int64_t T)
{
    return kl_product_takes_int8(ctx, w) ? int8_scratch(w) : kl_product_scratch(w, T);
}

int64_t kl_operand_block(const kl_ctx *ctx, const kl_weight *w, int64_t T, int64_t rows)
{
    if (!kl_product_takes_int8(ctx, w))
        return kl_product_block(ctx, w, T, rows);
    const int64_t fair = kl_ceil_div(rows, 4 * (int64_t)ctx->threads);
    if (T > DIRECT_ROWS_OF_X)
        return kl_min(kl_ceil_div(fair, PANEL_ROWS), 4) * PANEL_ROWS;
    const int64_t whole = DIRECT_BYTES / kl_max(1, (int64_t)kl_type_bytes(w->type, w->cols));
    return kl_ceil_div(kl_max(1, kl_min(whole, fair)), 4) * 4;
}

void kl_operand_product(const kl_ctx *ctx, float *y, int64_t ldy, const kl_operand *x,
                        int64_t first, const int32_t *index, int64_t T, const kl_weight *w,
                        int64_t which, int64_t row0, int64_t rows, void *scratch)
{
    if (!kl_product_takes_int8(ctx, w)) {
        kl_product(ctx, y, ldy, x->x + first * x->ldx, x->ldx, index, T, w, which, row0, rows,
                   scratch);
        return;
    }
    const kl_int8_rows x8 = { x->int8.group + first * x->int8.groups, x->int8.groups };
    const char *stored = (const char *)w->matrix[which] + (size_t)row0 * w->row_bytes;
    ctx->k->int8_dot(y, ldy, &x8, index, T, stored, w->row_bytes, w->type, rows, w->cols, scratch);
}

/* bytes of T rows of x in front of a product's scratch */
static size_t rows_bytes(const kl_ctx *ctx, const kl_weight *w, int64_t T)
{
    return kl_product_takes_int8(ctx, w)
               ? (size_t)(T * kl_int8_groups(w->cols)) * sizeof(kl_int8_group)
               : 0;
}

size_t kl_product_once_scratch(const kl_ctx *ctx, const kl_weight *w, int64_t T)
{
    return rows_bytes(ctx, w, T) + kl_operand_scratch(ctx, w, T);
}

void kl_product_once(const kl_ctx *ctx, float *y, int64_t ldy, const float *x, int64_t ldx,
                     int64_t T, const kl_weight *w, int64_t which, int64_t row0, int64_t rows,
                     void *scratch)
{
    kl_int8_group *to = scratch;
    const kl_operand operand = { x, ldx, { to, kl_int8_groups(w->cols) } };
    const size_t taken = rows_bytes(ctx, w, T);
    for (int64_t t = 0; taken > 0 && t < T; t++)
        ctx->k->int8_quantize(to + t * operand.int8.groups, x + t * ldx, w->cols);
    kl_operand_product(ctx, y, ldy, &operand, 0, NULL, T, w, which, row0, rows,
                       (char *)scratch + taken);
}
