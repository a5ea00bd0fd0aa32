/* linear (ops/linear.c): y[t, r] = sum_k x[t, k] w[r, k] + bias[r], one launch a weight. The ladder is product.hip's. */
#include "product.h"

/* rows of x at a time: a kl_row_group counts them in 32 bits */
static const int64_t PASS = INT64_C(1) << 30;

kl_status hip_linear(kl_ctx *ctx, float *const *y, const float *x, const kl_weight *w,
                     const float *const *bias, int n_weights, int64_t T, int64_t D)
{
    for (int i = 0; i < n_weights; i++) {
        kl_product p = {};
        KL_TRY(kl_check_activations(ctx, &w[i], "linear", "w"));
        KL_TRY(kl_matrices_of(ctx, &p.w, &w[i]));
        if (kl_core_of->measuring(ctx) || T == 0 || w[i].n == 0)
            continue;
        p.bias = bias != nullptr ? bias[i] : nullptr;
        p.D = p.x_row = D;
        p.y_row = w[i].n * w[i].rows;
        p.y_step = w[i].rows;
        for (int64_t t = 0; t < T; t += PASS) {
            p.y = y[i] + t * p.y_row;
            p.x = x + t * D;
            p.T = PASS < T - t ? PASS : T - t;
            p.most_groups = kl_ceil_div(p.T, kl_rows_of_a_group(p.T)) * w[i].n;
            KL_TRY(kl_launch_product(ctx, &p, &w[i], "linear", "w"));
        }
    }
    return kl_core_of->measuring(ctx) || T == 0 ? KL_OK : kl_launched(ctx, "linear");
}
