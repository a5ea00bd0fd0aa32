/* linear (ops/linear.c): y[t, r] = sum_k x[t, k] w[r, k] + bias[r], one launch a weight. The ladder is product.hip's. */
#include "product.h"

kl_status hip_linear(kl_ctx *ctx, float *const *y, const float *x, const kl_weight *w,
                     const float *const *bias, int n_weights, int64_t T, int64_t D)
{
    const int64_t rows = kl_rows_of_a_group(T);
    for (int i = 0; i < n_weights; i++) {
        kl_product p = {};
        KL_TRY(kl_check_activations(ctx, &w[i], "linear", "w"));
        KL_TRY(kl_matrices_of(ctx, &p.w, &w[i]));
        if (kl_core_of->measuring(ctx) || T == 0 || w[i].n == 0)
            continue;
        p.y = y[i];
        p.x = x;
        p.bias = bias != nullptr ? bias[i] : nullptr;
        p.T = T;
        p.D = p.x_row = D;
        p.y_row = w[i].n * w[i].rows;
        p.y_step = w[i].rows;
        p.most_groups = kl_ceil_div(T, rows) * w[i].n;
        KL_TRY(kl_launch_product(ctx, &p, &w[i], "linear", "w"));
    }
    return kl_core_of->measuring(ctx) || T == 0 ? KL_OK : kl_launched(ctx, "linear");
}
