/* One op on two rows: docs/c-api.md. */
#include <kimi_linear.h>

#include <stdio.h>

int main(void)
{
    const float x[2][4] = { { 1, 2, 3, 4 }, { -1, 0, 1, 0 } }, w[4] = { 1, 1, 1, 2 };
    float y[2][4];
    kl_ctx *ctx;
    if (kl_ctx_create(&ctx, NULL) != KL_OK
        || kl_rms_norm(ctx, y[0], x[0], w, 2, 4, 1e-5f) != KL_OK) {
        fprintf(stderr, "%s\n", kl_ctx_error(ctx));
        kl_ctx_destroy(ctx);
        return 1;
    }
    for (int t = 0; t < 2; t++)
        printf("%.4f %.4f %.4f %.4f\n", (double)y[t][0], (double)y[t][1], (double)y[t][2],
               (double)y[t][3]);
    kl_ctx_destroy(ctx);
    return 0;
}
