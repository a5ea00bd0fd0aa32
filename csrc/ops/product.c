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
    ALIGN_FLOATS = 16,
};

static bool is_direct(int64_t T) { return T <= KL_DOT_DIRECT; }

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
    if (is_direct(T))
        return 0;
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
    const int64_t whole = is_direct(T)
                              ? DIRECT_BYTES / kl_max(1, (int64_t)kl_type_bytes(w->type, w->cols))
                              : panel_rows(w->cols);
    return kl_ceil_div(kl_max(1, kl_min(whole, fair)), 4) * 4;
}

/* address of output row `row` of a matrix: of a stored row, or of a place in the first stored row */
static const char *weight_at(const kl_weight *w, int64_t which, int64_t row)
{
    const char *matrix = w->matrix[which];
    return matrix + (w->transposed ? kl_type_bytes(w->type, row) : (size_t)row * w->row_bytes);
}

static void direct(const kl_kernels *k, float *y, int64_t ldy, const float *const *x, int64_t T,
                   const kl_weight *w, const void *first, int64_t rows)
{
    if (!w->transposed) {
        k->dot_direct(y, ldy, x, T, first, w->row_bytes, w->type, rows, w->cols);
        return;
    }
    for (int64_t t = 0; t < T; t++)
        k->dot_transposed(y + t * ldy, x[t], first, w->row_bytes, w->type, rows, w->cols);
}

static void unpack(const kl_kernels *k, float *panel, int64_t ld, const kl_weight *w,
                   const char *first, int64_t rows)
{
    if (w->transposed) {
        k->unpack_columns(panel, ld, first, w->row_bytes, w->type, rows, w->cols);
        return;
    }
    for (int64_t i = 0; i < rows; i++)
        k->unpack_row(panel + i * ld, first + (size_t)i * w->row_bytes, w->type, w->cols);
}

void kl_product(const kl_ctx *ctx, float *y, int64_t ldy, const float *x, int64_t ldx,
                const int32_t *index, int64_t T, const kl_weight *w, int64_t which, int64_t row0,
                int64_t rows, void *scratch)
{
    const bool blas = ctx->gemm == KL_GEMM_BLAS && index == NULL;
    if (is_direct(T) && (!blas || is_unpacked(w))) {
        const float *row[KL_DOT_DIRECT] = { NULL };
        for (int64_t t = 0; t < T; t++)
            row[t] = x + (index != NULL ? index[t] : t) * ldx;
        direct(ctx->k, y, ldy, row, T, w, weight_at(w, which, row0), rows);
        return;
    }
    const int64_t step = blas && !is_unpacked(w) ? rows : panel_rows(w->cols),
                  ld = is_unpacked(w) ? panel_stride(w->cols)
                                      : (int64_t)(w->row_bytes / sizeof(float));
    float *panel = scratch, *rest = is_unpacked(w) ? panel + kl_min(step, w->rows) * ld : panel;
    for (int64_t i = 0; i < rows; i += step) {
        const int64_t n = kl_min(step, rows - i);
        const char *first = weight_at(w, which, row0 + i);
        const float *values = (const float *)(const void *)first;
        if (is_unpacked(w)) {
            unpack(ctx->k, panel, ld, w, first, n);
            values = panel;
        }
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
    const int threads = kl_gemm_begin();
    const kl_status status = kl_for(ctx, n, grain, body, arg);
    kl_gemm_end(threads);
    return status;
}
