/* product: see product.h. Few rows of x go straight over the stored weights; many rows go over a panel
 * of weight rows that stays in L2, widened there once when its type is not float32. */
#include "product.h"

#include "../cpu/dot.h"
#include "../cpu/gemm.h"
#include "../cpu/kernels.h"

enum {
    PANEL_BYTES = 640 * 1024, /* of a panel of float32 rows: it stays in an L2 of 1 MiB */
    PANEL_ROWS = 96,
    DIRECT_BYTES = 96 * 1024, /* of stored weights in a task that only streams them */
    DIRECT_ROWS = 4,          /* of blocks, unpacked at a time: they stay in L1 or close to it */
    COLUMN_VALUES = 512,      /* of a stored row, unpacked at a time; a multiple of every block */
    ALIGN_FLOATS = 16,
};

static bool has_blocks(const kl_weight *w) { return kl_type_block(w->type) > 1; }

/* Blocks lie along the stored rows: a column of them is only to be had by unpacking. */
static bool is_direct(const kl_weight *w, int64_t T)
{
    return T <= KL_DOT_DIRECT && !(w->transposed && has_blocks(w));
}

static int64_t panel_rows(int64_t K)
{
    const int64_t rows = PANEL_BYTES / (int64_t)sizeof(float) / kl_max(1, K);
    return kl_max(KL_DOT_ROWS_STEP, kl_min(rows, PANEL_ROWS) / KL_DOT_ROWS_STEP * KL_DOT_ROWS_STEP);
}

/* floats from row to row of an unpacked panel: no multiple of 4096 bytes, so that rows share no cache set */
static int64_t panel_stride(int64_t K)
{
    const int64_t stride = kl_ceil_div(K, ALIGN_FLOATS) * ALIGN_FLOATS;
    return stride % 256 == 0 ? stride + ALIGN_FLOATS : stride;
}

static bool is_unpacked(const kl_weight *w)
{
    return w->type != KL_F32 || w->transposed || w->row_bytes % sizeof(float) != 0;
}

size_t kl_product_scratch(const kl_weight *w, int64_t T)
{
    if (is_direct(w, T))
        return has_blocks(w) ? (size_t)(DIRECT_ROWS * panel_stride(w->cols)) * sizeof(float) : 0;
    const int64_t rows =
        kl_min(panel_rows(w->cols), kl_ceil_div(w->rows, KL_DOT_ROWS_STEP) * KL_DOT_ROWS_STEP);
    const int64_t panel = is_unpacked(w) ? rows * panel_stride(w->cols) : 0;
    return (size_t)(panel + KL_DOT_SCRATCH(rows)) * sizeof(float);
}

int64_t kl_product_block(const kl_ctx *ctx, const kl_weight *w, int64_t T, int64_t rows)
{
    if (ctx->gemm == KL_GEMM_BLAS && !is_unpacked(w)) /* BLAS blocks by itself */
        return kl_ceil_div(kl_max(1, kl_ceil_div(rows, ctx->threads)), 4) * 4;
    const int64_t fair = kl_ceil_div(rows, 4 * (int64_t)ctx->threads);
    const int64_t whole = is_direct(w, T)
                              ? DIRECT_BYTES / kl_max(1, (int64_t)kl_type_bytes(w->type, w->cols))
                              : panel_rows(w->cols);
    return kl_ceil_div(kl_max(1, kl_min(whole, fair)), 4) * 4;
}

void kl_widen(const kl_ctx *ctx, float *y, const void *stored, kl_type type, int64_t n)
{
    if (kl_type_block(type) > 1)
        ctx->k->unpack_blocks(y, stored, type, n);
    else
        ctx->k->unpack_row(y, stored, type, n);
}

/* panel[i, k] = column row0 + i of stored row k; the stored rows are blocks */
static void unpack_block_columns(const kl_ctx *ctx, float *panel, int64_t ld, const kl_weight *w,
                                 int64_t which, int64_t row0, int64_t rows)
{
    float values[COLUMN_VALUES];
    for (int64_t k = 0; k < w->cols; k++) {
        const char *stored = (const char *)w->matrix[which] + (size_t)k * w->row_bytes;
        for (int64_t c = row0 / COLUMN_VALUES * COLUMN_VALUES; c < row0 + rows;
             c += COLUMN_VALUES) {
            const int64_t begin = kl_max(c, row0), end = kl_min(c + COLUMN_VALUES, row0 + rows);
            kl_widen(ctx, values, stored + kl_type_bytes(w->type, c), w->type,
                     kl_min(COLUMN_VALUES, w->rows - c));
            for (int64_t i = begin; i < end; i++)
                panel[(i - row0) * ld + k] = values[i - c];
        }
    }
}

void kl_product_rows(const kl_ctx *ctx, float *panel, int64_t ld, const kl_weight *w, int64_t which,
                     int64_t row0, int64_t rows)
{
    const char *matrix = w->matrix[which];
    if (w->transposed && has_blocks(w)) {
        unpack_block_columns(ctx, panel, ld, w, which, row0, rows);
        return;
    }
    if (w->transposed) {
        ctx->k->unpack_columns(panel, ld, matrix + kl_type_bytes(w->type, row0), w->row_bytes,
                               w->type, rows, w->cols);
        return;
    }
    for (int64_t i = 0; i < rows; i++)
        kl_widen(ctx, panel + i * ld, matrix + (size_t)(row0 + i) * w->row_bytes, w->type, w->cols);
}

/* few rows of x, straight over the stored weights, or over a few rows of blocks unpacked in scratch */
static void direct(const kl_ctx *ctx, float *y, int64_t ldy, const float *const *x, int64_t T,
                   const kl_weight *w, int64_t which, int64_t row0, int64_t rows, float *scratch)
{
    const char *matrix = w->matrix[which];
    if (has_blocks(w)) {
        const int64_t ld = panel_stride(w->cols);
        for (int64_t i = 0; i < rows; i += DIRECT_ROWS) {
            const int64_t n = kl_min(DIRECT_ROWS, rows - i);
            kl_product_rows(ctx, scratch, ld, w, which, row0 + i, n);
            ctx->k->dot_cached(y + i, ldy, x, T, scratch, ld, n, w->cols);
        }
        return;
    }
    if (!w->transposed) {
        ctx->k->dot_direct(y, ldy, x, T, matrix + (size_t)row0 * w->row_bytes, w->row_bytes,
                           w->type, rows, w->cols);
        return;
    }
    for (int64_t t = 0; t < T; t++)
        ctx->k->dot_transposed(y + t * ldy, x[t], matrix + kl_type_bytes(w->type, row0),
                               w->row_bytes, w->type, rows, w->cols);
}

void kl_product(const kl_ctx *ctx, float *y, int64_t ldy, const float *x, int64_t ldx,
                const int32_t *index, int64_t T, const kl_weight *w, int64_t which, int64_t row0,
                int64_t rows, void *scratch)
{
    const bool blas = ctx->gemm == KL_GEMM_BLAS && index == NULL;
    if (is_direct(w, T) && (!blas || is_unpacked(w))) {
        const float *row[KL_DOT_DIRECT] = { NULL };
        for (int64_t t = 0; t < T; t++)
            row[t] = x + (index != NULL ? index[t] : t) * ldx;
        direct(ctx, y, ldy, row, T, w, which, row0, rows, scratch);
        return;
    }
    const int64_t step = blas && !is_unpacked(w) ? rows : panel_rows(w->cols),
                  ld = is_unpacked(w) ? panel_stride(w->cols)
                                      : (int64_t)(w->row_bytes / sizeof(float));
    float *panel = scratch, *rest = is_unpacked(w) ? panel + kl_min(step, w->rows) * ld : panel;
    for (int64_t i = 0; i < rows; i += step) {
        const int64_t n = kl_min(step, rows - i);
        const float *values = panel;
        if (is_unpacked(w))
            kl_product_rows(ctx, panel, ld, w, which, row0 + i, n);
        else
            values = (const float *)w->matrix[which] + (row0 + i) * ld;
        if (blas)
            kl_gemm_rows(y + i, ldy, x, ldx, T, values, ld, n, w->cols);
        else
            ctx->k->dot_panel(y + i, ldy, x, ldx, index, T, values, ld, n, w->cols, rest);
    }
}

kl_status kl_product_for(kl_ctx *ctx, int64_t n, int64_t grain, kl_body body, void *arg)
{
    if (ctx->gemm != KL_GEMM_BLAS)
        return kl_for(ctx, n, grain, body, arg);
    kl_gemm_begin();
    const kl_status status = kl_for(ctx, n, grain, body, arg);
    kl_gemm_end();
    return status;
}
