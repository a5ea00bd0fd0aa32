/* A key, another, and the first again: the delta rule token by token, the state carried: docs/c-api.md. */
#include <kimi_linear.h>

#include <stdio.h>

enum { T = 3, H = 1, K = 2, V = 2 };

int main(void)
{
    /* a key comes, another comes, and the first comes again with a new value */
    const float k[T][H][K] = { { { 1, 0 } }, { { 0, 1 } }, { { 1, 0 } } };
    const float v[T][H][V] = { { { 1, 2 } }, { { 3, 4 } }, { { 5, 6 } } };
    const float g[T][H][K] = { { { 0, 0 } }, { { 0, 0 } }, { { -0.69314718f, 0 } } };
    const float beta[T][H] = { { 1 }, { 1 }, { 0.5f } };
    float o[T][H][V], state[H][K][V] = { { { 0 } } };
    void *const states[] = { state }; /* one address a sequence */
    const kl_slots slots = { states, 0 };
    kl_ctx *ctx;
    kl_status status = kl_ctx_create(&ctx, NULL);

    for (int64_t t = 0; t < T && status == KL_OK;
         t++) { /* a call a token; one call of all is the same */
        const int64_t offsets[] = { 0, 1 };
        const kl_delta_rule_args args = { .offsets = offsets,
                                          .N = 1,
                                          .T = 1,
                                          .Hk = H,
                                          .Hv = H,
                                          .K = K,
                                          .V = V,
                                          .scale = 1,
                                          .gate = KL_GATE_CHANNEL };
        status = kl_delta_rule(ctx, o[t][0], slots, k[t][0], k[t][0], v[t][0], g[t][0], beta[t],
                               slots, &args);
        if (status == KL_OK)
            printf("o %.4f %.4f\n", (double)o[t][0][0], (double)o[t][0][1]);
    }
    if (status == KL_OK)
        printf("S %.4f %.4f / %.4f %.4f\n", (double)state[0][0][0], (double)state[0][0][1],
               (double)state[0][1][0], (double)state[0][1][1]);
    else
        fprintf(stderr, "%s\n", kl_ctx_error(ctx));
    kl_ctx_destroy(ctx);
    return status != KL_OK;
}
