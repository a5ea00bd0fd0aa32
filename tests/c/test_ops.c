/* A C program that uses only the header: context, ops, errors, cancelling. */
#include "kimi_linear.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures;

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);                                 \
            failures++;                                                                            \
        }                                                                                          \
    } while (0)

static void check_near(const float *got, const double *want, int n, double within, const char *what)
{
    for (int i = 0; i < n; i++)
        if (!(fabs((double)got[i] - want[i]) <= within)) {
            printf("%s[%d] is %.9g; it must be %.9g\n", what, i, (double)got[i], want[i]);
            failures++;
        }
}

/* The worked example of docs/math.md#delta-rule: one head, K = V = 2, three tokens. */
static void test_delta_rule(kl_ctx *ctx)
{
    const float q_raw[] = { 1, 2, -1, 1, 3, -1 }, k_raw[] = { 2, 1, 0, 1, 1, -2 };
    const float v[] = { 1, -1, 0.5f, 2, -2, 1 }, f[] = { 0.3f, -0.2f, 1, 0, -1, 2 },
                b[] = { 0, 1, -1 };
    const float rate[] = { 2 }, dt_bias[] = { 0.5f, -0.5f };
    const double want_g[] = { -2.342201332, -0.806372098, -3.402826556,
                              -0.948153968, -0.948153968, -3.402826556 };
    const double want_o[] = { 0.282842656, -0.282842656, 0.186973346,
                              0.726849192, -0.266757022, 0.126001403 };
    const double want_state[] = { -0.233700190, 0.119969000, 0.491873158, -0.203588432 };
    const int64_t offsets[] = { 0, 3 };
    float q[6], k[6], g[6], beta[3], o[6], state[4];
    void *slot = state;
    const kl_slots none = { NULL, 0 }, out = { &slot, 0 };
    const kl_delta_rule_args args = {
        .offsets = offsets,
        .N = 1,
        .T = 3,
        .Hk = 1,
        .Hv = 1,
        .K = 2,
        .V = 2,
        .scale = 0.70710678f,
        .gate = KL_GATE_CHANNEL,
    };
    CHECK(kl_l2_norm(ctx, q, q_raw, 3, 2, 1e-6f) == KL_OK);
    CHECK(kl_l2_norm(ctx, k, k_raw, 3, 2, 1e-6f) == KL_OK);
    CHECK(kl_decay_gate(ctx, g, f, rate, dt_bias, 3, 1, 2, 0.0f) == KL_OK);
    CHECK(kl_sigmoid(ctx, beta, b, 3) == KL_OK);
    CHECK(kl_delta_rule(ctx, o, out, q, k, v, g, beta, none, &args) == KL_OK);
    check_near(g, want_g, 6, 1e-6, "g");
    check_near(o, want_o, 6, 1e-6, "o");
    check_near(state, want_state, 4, 1e-6, "state");
}

/* Two chunks of two tokens by halves: as the recurrence; the cumulative gate begins afresh in the second. */
static void test_delta_halves(kl_ctx *ctx)
{
    enum { T = 4, K = 3, V = 2, C = 2 };
    const int64_t offsets[] = { 0, T };
    float q[T * K], k[T * K], g[T * K], v[T * V], beta[T], o[T * V], state[K * V];
    float L[T * C], P[T * C], inverse[T * C], W[T * K], U[T * V];
    float o_halves[T * V], d[T * V], state_halves[K * V], sums[T * K];
    double want_o[T * V], want_state[K * V];
    void *slot = state, *slot_halves = state_halves;
    const kl_slots none = { NULL, 0 }, out = { &slot, 0 }, out_halves = { &slot_halves, 0 };
    kl_delta_rule_args args = {
        .offsets = offsets, .N = 1, .T = T, .Hk = 1, .Hv = 1, .K = K, .V = V
    };
    args.scale = 0.5f;
    args.gate = KL_GATE_CHANNEL;
    args.form = KL_FORM_RECURRENT;
    args.chunk = C;
    for (int i = 0; i < T * K; i++) {
        q[i] = (float)(i * 7 % 5) / 4.0f - 0.5f;
        k[i] = (float)(i * 3 % 7) / 8.0f - 0.4f;
        g[i] = -(float)(i * 5 % 4);
    }
    for (int i = 0; i < T * V; i++)
        v[i] = (float)(i % 3) - 1.0f;
    for (int i = 0; i < T; i++)
        beta[i] = 0.25f * (float)(i + 1);
    CHECK(kl_delta_rule(ctx, o, out, q, k, v, g, beta, none, &args) == KL_OK);
    CHECK(kl_delta_rule_intra(ctx, L, P, inverse, W, U, q, k, v, g, beta, &args) == KL_OK);
    CHECK(kl_delta_rule_inter(ctx, o_halves, out_halves, d, q, k, g, P, W, U, none, &args)
          == KL_OK);
    for (int i = 0; i < T * V; i++)
        want_o[i] = (double)o[i];
    for (int i = 0; i < K * V; i++)
        want_state[i] = (double)state[i];
    check_near(o_halves, want_o, T * V, 1e-6, "o of the halves");
    check_near(state_halves, want_state, K * V, 1e-6, "state of the halves");
    CHECK(kl_delta_rule_inter(ctx, o, none, d, q, k, g, P, W, U, none, &args) == KL_OK);
    CHECK(memcmp(o, o_halves, sizeof o) == 0);

    CHECK(kl_decay_cumsum(ctx, sums, g, offsets, 1, T, K, C) == KL_OK);
    CHECK(sums[0] == g[0] && sums[K] == g[0] + g[K] && sums[2 * K] == g[2 * K]);
    CHECK(kl_decay_cumsum(ctx, sums, g, offsets, 1, T, K, -1) == KL_ERR_ARG);
    CHECK(strstr(kl_ctx_error(ctx), "decay_cumsum: chunk is -1") != NULL);
    d[0] = L[0] = 7;
    args.chunk = 0;
    CHECK(kl_delta_rule_intra(ctx, L, P, inverse, W, U, q, k, v, g, beta, &args) == KL_ERR_ARG);
    CHECK(strstr(kl_ctx_error(ctx), "delta_rule_intra: chunk is 0; it must be 1 to 256") != NULL);
    args.chunk = C;
    args.l2_norm = 1;
    CHECK(kl_delta_rule_inter(ctx, o, none, d, q, k, g, P, W, U, none, &args) == KL_ERR_ARG);
    CHECK(strstr(kl_ctx_error(ctx), "delta_rule_inter: l2_norm is 1; it must be 0") != NULL);
    CHECK(d[0] == 7 && L[0] == 7);
}

static void test_errors(kl_ctx *ctx)
{
    float x[4] = { 1, 2, 3, 4 }, w[4] = { 1, 1, 1, 1 }, y[4] = { 7, 7, 7, 7 };
    CHECK(kl_rms_norm(ctx, y, x, w, 1, 4, -1.0f) == KL_ERR_ARG);
    CHECK(strstr(kl_ctx_error(ctx), "eps is -1") != NULL);
    CHECK(kl_rms_norm(ctx, y, x, w, -1, 4, 0.0f) == KL_ERR_SHAPE);
    CHECK(kl_attn_res(ctx, y, x, x, w, 1, 1, 4, NAN) == KL_ERR_ARG);
    CHECK(strstr(kl_ctx_error(ctx), "attn_res: eps is nan; it must be >= 0") != NULL);
    CHECK(kl_attn_res(ctx, y, x, x, w, -1, 1, 4, 0.0f) == KL_ERR_SHAPE);
    CHECK(strstr(kl_ctx_error(ctx), "attn_res: snapshots are -1 of [1, 4]") != NULL);
    CHECK(kl_attn_res(ctx, y, x, x, w, INT64_C(1) << 50, 1 << 12, 4, 0.0f) == KL_ERR_SHAPE);
    const float fn[4 * 3] = { 0 };
    const void *const matrix[] = { fn };
    kl_weight weight = { matrix, 1, 3, 4, 4 * sizeof *fn, KL_F32, 0 };
    kl_mhc_args mhc = { 1, 1, 4, 0.0f, 0.0f, 1 };
    weight.transposed = 1;
    CHECK(kl_mhc_pre(ctx, y, y, y, x, &weight, w, w, &mhc) == KL_ERR_ARG);
    CHECK(strstr(kl_ctx_error(ctx), "mhc_pre: fn is transposed; it must lie row by row") != NULL);
    weight.transposed = 0, weight.type = KL_Q8_0;
    CHECK(kl_mhc_pre(ctx, y, y, y, x, &weight, w, w, &mhc) == KL_ERR_SHAPE);
    CHECK(strstr(kl_ctx_error(ctx), "fn has rows of 4 values; Q8_0 needs a multiple of 32")
          != NULL);
    weight.type = (kl_type)4; /* ggml's Q4_2, long gone */
    CHECK(kl_mhc_pre(ctx, y, y, y, x, &weight, w, w, &mhc) == KL_ERR_DTYPE);
    CHECK(strstr(kl_ctx_error(ctx), "fn has storage type 4, which is not known here") != NULL);
    weight.type = KL_F32, mhc.iters = 0;
    CHECK(kl_mhc_pre(ctx, y, y, y, x, &weight, w, w, &mhc) == KL_ERR_ARG);
    mhc.iters = 1, mhc.n = 2;
    CHECK(kl_mhc_pre(ctx, y, y, y, x, &weight, w, w, &mhc) == KL_ERR_SHAPE);
    CHECK(strstr(kl_ctx_error(ctx), "fn is 1 of [3, 4]; it must be 1 of [8, 8]") != NULL);
    CHECK(kl_mhc_post(ctx, y, x, x, w, w, 1, 65, 1) == KL_ERR_SHAPE);
    CHECK(strstr(kl_ctx_error(ctx), "mhc_post: x has 65 streams; it must have 1 to 64") != NULL);
    CHECK(kl_mhc_post(ctx, y, x, x, w, w, 1, 64, INT64_MAX) == KL_ERR_SHAPE);
    CHECK(y[0] == 7 && y[3] == 7);
    kl_ctx *none = NULL;
    const kl_ctx_options wrong = { .isa = "mmx" };
    CHECK(kl_ctx_create(&none, &wrong) == KL_ERR_UNSUPPORTED);
    CHECK(strstr(kl_ctx_error(none), "isa is \"mmx\"") != NULL);
    kl_ctx_destroy(none);
    const kl_ctx_options odd = { .delta_rule = KL_FORM_ABSORBED };
    CHECK(kl_ctx_create(&none, &odd) == KL_ERR_ARG);
    CHECK(strstr(kl_ctx_error(none), "delta_rule is 3") != NULL);
    kl_ctx_destroy(none);
    const kl_ctx_options other = { .gemm = (kl_gemm)2 };
    CHECK(kl_ctx_create(&none, &other) == KL_ERR_ARG);
    CHECK(strstr(kl_ctx_error(none), "gemm is 2") != NULL);
    kl_ctx_destroy(none);
}

static void test_same_bytes(void)
{
    enum { T = 9, D = 300 };
    static float x[T * D], w[D], first[T * D], y[T * D];
    const char *isa[8];
    const int n = kl_isa_list(isa, 8);
    for (int i = 0; i < T * D; i++)
        x[i] = (float)((i * 7919) % 1013) / 256.0f - 2.0f;
    for (int i = 0; i < D; i++)
        w[i] = 1.0f + (float)i / (float)D;
    for (int i = 0; i < n; i++)
        for (int threads = 1; threads <= 3; threads++) {
            kl_ctx *ctx;
            const kl_ctx_options options = { .isa = isa[i], .threads = threads };
            CHECK(kl_ctx_create(&ctx, &options) == KL_OK);
            CHECK(kl_ctx_threads(ctx) == threads && strcmp(kl_ctx_isa(ctx), isa[i]) == 0);
            CHECK(kl_rms_norm(ctx, y, x, w, T, D, 1e-5f) == KL_OK);
            if (i == 0 && threads == 1)
                memcpy(first, y, sizeof y);
            CHECK(memcmp(first, y, sizeof y) == 0);
            kl_ctx_destroy(ctx);
        }
}

static int stop(void *user)
{
    ++*(int *)user;
    return 1;
}

static void test_cancel(kl_ctx *ctx)
{
    enum { T = 4096, D = 64 };
    int asked = 0;
    float *x = calloc(T * D, sizeof *x), *w = calloc(D, sizeof *w);
    kl_ctx_cancel(ctx);
    CHECK(kl_rms_norm(ctx, x, x, w, T, D, 1e-5f) == KL_ERR_INTERRUPTED);
    CHECK(kl_rms_norm(ctx, x, x, w, T, D, 1e-5f) == KL_OK);
    kl_ctx_set_poll(ctx, stop, &asked);
    CHECK(kl_rms_norm(ctx, x, x, w, T, D, 1e-5f) == KL_ERR_INTERRUPTED);
    CHECK(asked > 0);
    kl_ctx_set_poll(ctx, NULL, NULL);
    CHECK(kl_rms_norm(ctx, x, x, w, T, D, 1e-5f) == KL_OK);
    free(x);
    free(w);
}

int main(void)
{
    kl_ctx *ctx;
    if (kl_ctx_create(&ctx, NULL) != KL_OK) {
        printf("%s\n", kl_ctx_error(ctx));
        return 1;
    }
    test_delta_rule(ctx);
    test_delta_halves(ctx);
    test_errors(ctx);
    test_same_bytes();
    test_cancel(ctx);
    kl_ctx_destroy(ctx);
    printf("%s: %s\n", __FILE__, failures == 0 ? "ok" : "failed");
    return failures != 0;
}
