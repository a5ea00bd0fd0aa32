/* linear (ops/linear.c): y[t, r] = sum_k x[t, k] w[r, k] + bias[r], one launch for the weights that follow each other in one
 * storage type: a decoded token's small matrices fill no GPU alone. The ladder is product.hip's. */
#include "product.h"

/* rows of x at a time: a kl_row_group counts them in 32 bits */
static const int64_t PASS = INT64_C(1) << 30;

static kl_status product_with(kl_ctx *ctx, kl_product *p, float *y, const kl_weight *w,
                              const float *bias)
{
    *p = {};
    KL_TRY(kl_matrices_of(ctx, &p->w, w));
    p->y = y;
    p->bias = bias;
    p->y_row = w->n * w->rows;
    p->y_step = w->rows;
    return KL_OK;
}

/* over all rows of x */
static kl_status launch(kl_ctx *ctx, kl_product *p, int n, const kl_operand &x, const kl_weight *w,
                        int64_t T)
{
    for (int64_t t = 0; t < T; t += PASS) {
        for (int i = 0; i < n; i++) {
            p[i].T = PASS < T - t ? PASS : T - t;
            p[i].most_groups = kl_ceil_div(p[i].T, kl_rows_of_a_group(p[i].T)) * w[i].n;
            p[i].y += t > 0 ? PASS * p[i].y_row : 0;
            kl_operand_of(ctx, &p[i], x, t, &w[i]);
        }
        KL_TRY(kl_launch_products(ctx, p, n, w, "linear", "w"));
    }
    return KL_OK;
}

kl_status hip_linear(kl_ctx *ctx, float *const *y, const float *x, const kl_weight *w,
                     const float *const *bias, int n_weights, int64_t T, int64_t D)
{
    kl_product p[KL_TOGETHER];
    kl_operand operand;
    for (int i = 0; i < n_weights; i++)
        KL_TRY(kl_check_blocks(ctx, &w[i], "linear", "w"));
    KL_TRY(kl_operand_room(ctx, &operand, w, n_weights, T, D));
    if (!kl_core_of->measuring(ctx))
        kl_operand_make(ctx, &operand, x, T);
    for (int first = 0, n = 0; first < n_weights; first += n) {
        for (n = 0; n < KL_TOGETHER && first + n < n_weights; n++) {
            const int i = first + n;
            if (n > 0 && !kl_go_together(&w[first], &w[i]))
                break;
            KL_TRY(product_with(ctx, &p[n], y[i], &w[i], bias != nullptr ? bias[i] : nullptr));
        }
        if (!kl_core_of->measuring(ctx))
            KL_TRY(launch(ctx, p, n, operand, &w[first], T));
    }
    return kl_core_of->measuring(ctx) || T == 0 ? KL_OK : kl_launched(ctx, "linear");
}
