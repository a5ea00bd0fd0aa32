/* Every instruction set that runs here gives the bytes of the first, the scalar code: each op, with widths that are
 * no multiple of 16, subnormals, NaN and infinity, and products of every storage type. A NaN equals any NaN. */
#include "kimi_linear.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROOM = 1 << 20, NAMES = 2048, LONGEST = 128 };

/* What an instruction set made: floats, one result behind the other. */
typedef struct {
    float value[ROOM];
    size_t used, begin[NAMES];
    char name[NAMES][LONGEST];
    int n;
} results;

static results runs[2];
static results *now;
static kl_ctx *ctx;

#define MUST(call)                                                                                 \
    do {                                                                                           \
        if ((call) != KL_OK) {                                                                     \
            printf("%s:%d: %s\n", __FILE__, __LINE__, kl_ctx_error(ctx));                          \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

/* n floats to write a result to, under a name */
static float *result(int64_t n, const char *op, const char *what, int64_t size)
{
    float *to = now->value + now->used;
    if (now->used + (size_t)n > ROOM || now->n == NAMES) {
        printf("test_isa: too little room for %s\n", op);
        exit(1);
    }
    for (int64_t i = 0; i < n; i++)
        to[i] = 12345.0f;
    snprintf(now->name[now->n], LONGEST, "%s %s %lld", op, what, (long long)size);
    now->begin[now->n++] = now->used;
    now->used += (size_t)n;
    return to;
}

static void *inputs[1 << 14];
static size_t n_inputs;

/* memory that is freed when the instruction set is done */
static void *input(size_t n_bytes)
{
    if (n_inputs == sizeof inputs / sizeof *inputs) {
        printf("test_isa: too many inputs\n");
        exit(1);
    }
    return inputs[n_inputs++] = malloc(n_bytes > 0 ? n_bytes : 1);
}

static uint32_t seed;

static uint32_t random_bits(void)
{
    seed = seed * 1664525u + 1013904223u;
    return seed >> 8;
}

/* n values within (-size, size), the same at each call with one n */
static float *numbers(int64_t n, float size)
{
    float *x = input((size_t)n * sizeof *x);
    seed = (uint32_t)n;
    for (int64_t i = 0; i < n; i++)
        x[i] = size * ((float)random_bits() / 8388608.0f - 1.0f);
    return x;
}

/* the same with what is not ordinary among them */
static float *rims(int64_t n)
{
    static const float rim[] = { 0.0f,     -0.0f,  0x1p-149f, -0x1p-130f, 0x1p-126f, 100.0f,
                                 -103.97f, -87.4f, 88.8f,     0x1p127f,   -0x1p100f, INFINITY,
                                 NAN,      -1.0f,  -INFINITY, 65520.0f };
    float *x = numbers(n, 4.0f);
    for (int64_t i = 3; i < n; i += 7)
        x[i] = rim[(size_t)(i / 7) % (sizeof rim / sizeof *rim)];
    return x;
}

/* bytes that no float of a block reads as infinite or NaN: the upper bit of its exponent is 0 */
static uint8_t *stored(size_t n)
{
    uint8_t *p = input(n);
    seed = (uint32_t)n;
    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)(random_bits() & 0xbf);
    return p;
}

/* of tokens of a size, with three streams and with so many that a row of comb is longer than sixteen */
static void hyper_connections(const char *what, int64_t D, float size)
{
    enum { T = 3 };
    for (int64_t n = 3; n <= 19; n += 16) {
        const int64_t rows = (2 + n) * n;
        const float *x = numbers(T * n * D, size), *comb = numbers(T * n * n, 1.0f);
        const void *const fn[] = { numbers(rows * n * D, 0.1f) };
        const kl_weight weight = { fn, 1, rows, n * D, (size_t)(n * D) * sizeof(float), KL_F32, 0 };
        const kl_mhc_args args = { T, n, D, 1e-6f, 1e-6f, 5 };
        MUST(kl_mhc_pre(ctx, result(T * D, "mhc_pre", what, D),
                        result(T * n, "mhc_pre: post", what, D),
                        result(T * n * n, "mhc_pre: comb", what, D), x, &weight,
                        numbers(rows, 1.0f), comb, &args));
        MUST(kl_mhc_collapse(ctx, result(T * D, "mhc_collapse", what, D), x, T, n, D));
        MUST(kl_mhc_post(ctx, result(T * n * D, "mhc_post", what, D), x, x, comb, comb, T, n, D));
    }
}

/* two of three tokens leave float32 */
static void hyper_connections_of_blocks(kl_type type, const char *what)
{
    enum { T = 3, N = 4, ROWS = (2 + N) * N };
    const int64_t block = kl_type_block(type), D = block <= N ? 11 : block / N * 3;
    float *x = numbers(T * N * D, 1.0f);
    for (int64_t d = 0; d < N * D; d++)
        x[d] *= 1e25f, x[N * D + d] *= 1e-35f;
    const size_t row_bytes = kl_type_bytes(type, N * D);
    const void *const fn[] = { type == KL_F32 ? (const void *)numbers(ROWS * N * D, 0.1f)
                                              : stored(ROWS * row_bytes) };
    const kl_weight weight = { fn, 1, ROWS, N * D, row_bytes, type, 0 };
    const kl_mhc_args args = { T, N, D, 0.0f, 1e-6f, 5 };
    char name[64];
    snprintf(name, sizeof name, "%s %s", what, kl_type_name(type));
    MUST(kl_mhc_pre(ctx, result(T * D, "mhc_pre", name, D), result(T * N, "mhc_pre: post", name, D),
                    result(T * N * N, "mhc_pre: comb", name, D), x, &weight, numbers(ROWS, 1.0f),
                    numbers(3, 1.0f), &args));
}

static void plain_ops(int64_t D)
{
    enum { T = 3 };
    for (int odd = 0; odd < 2; odd++) {
        const char *what = odd ? "with rims" : "";
        const float *x = odd ? rims(T * D) : numbers(T * D, 4.0f), *z = x + D, *w = x + 2 * D;
        const float *ordinary = numbers(T * D, 1.0f);
        MUST(kl_add(ctx, result(D, "add", what, D), x, z, D));
        MUST(kl_sigmoid(ctx, result(D, "sigmoid", what, D), x, D));
        MUST(kl_swiglu(ctx, result(D, "swiglu", what, D), x, z, D, 0.0f));
        MUST(kl_swiglu(ctx, result(D, "swiglu limit", what, D), x, z, D, 1.5f));
        MUST(kl_situ(ctx, result(D, "situ", what, D), x, z, D, &(kl_situ_betas){ 4.0f, 25.0f }));
        MUST(kl_situ(ctx, result(D, "situ of gate", what, D), x, z, D,
                     &(kl_situ_betas){ 1.7f, 0.0f }));
        MUST(kl_sigmoid_gate(ctx, result(T * D, "sigmoid_gate", what, D), ordinary, x, T, D, 1));
        MUST(
            kl_sigmoid_gate(ctx, result(T * D, "sigmoid_gate all", what, D), ordinary, x, T, D, D));
        MUST(kl_rope(ctx, result(T * D, "rope", what, D), x, (const int64_t[T]){ 0, 7, 4096 }, T, 1,
                     D, D / 2 * 2, 1e4));
        MUST(kl_softmax(ctx, result(T * D, "softmax", what, D), x, T, D));
        MUST(kl_rms_norm(ctx, result(T * D, "rms_norm", what, D), x, w, T, D, 1e-6f));
        MUST(kl_rms_norm(ctx, result(D, "rms_norm tiny", what, D), ordinary, w, 1, D, 0.0f));
        MUST(kl_layer_norm(ctx, result(T * D, "layer_norm", what, D), x, w, ordinary, T, D, 1e-6f));
        MUST(kl_layer_norm(ctx, result(T * D, "layer_norm scaled", what, D),
                           numbers(T * D, odd ? 1e25f : 1e-25f), ordinary, ordinary, T, D, 0.0f));
        MUST(kl_l2_norm(ctx, result(T * D, "l2_norm", what, D), x, T, D, 1e-6f));
        MUST(kl_attn_res(ctx, result(T * D, "attn_res", what, D), numbers(4 * T * D, 4.0f), x,
                         ordinary, 4, T, D, 1e-6f));
        MUST(kl_attn_res(ctx, result(T * D, "attn_res scaled", what, D),
                         numbers(4 * T * D, odd ? 1e25f : 1e-25f), ordinary, ordinary, 4, T, D,
                         0.0f));
        hyper_connections(what, D, odd ? 1e25f : 1.0f);
        MUST(kl_gated_rms_norm(ctx, result(T * D, "gated_rms_norm", what, D), ordinary, x, w, T, D,
                               1e-6f, KL_SILU));
        MUST(kl_decay_gate(ctx, result(T * D, "decay_gate", what, D), x, ordinary, w, T, 1, D,
                           odd ? -5.0f : 0.0f));
        const kl_sample_args args[T] = { { .temperature = 0.0f, .top_p = 1.0f },
                                         { .temperature = 0.7f, .top_k = 20, .top_p = 0.9f },
                                         { .temperature = 1.3f, .top_p = 0.8f, .min_p = 0.01f } };
        MUST(kl_sample(ctx, (int32_t *)(void *)result(T, "sample", what, D), ordinary, args, T, D));
    }
}

static void convolution(int64_t C, int64_t W)
{
    const int64_t offsets[] = { 0, 5, 6 }, T = 6;
    const float *x = numbers(T * C, 2.0f), *w = numbers(C * W, 0.5f);
    float *history = result(2 * (W - 1) * C, "short_conv history", "", W);
    void *slot[] = { history, history + (W - 1) * C };
    memset(history, 0, (size_t)(2 * (W - 1) * C) * sizeof *history);
    MUST(kl_short_conv(ctx, result(T * C, "short_conv", "", C), (kl_slots){ slot, 0 }, x, w,
                       (kl_slots){ slot, 0 }, offsets, 2, T, C, W, KL_SILU));
}

static void delta_rule(int64_t T, int64_t K, int64_t V, kl_form form, kl_gate gate)
{
    enum { H = 2 };
    const int64_t offsets[] = { 0, T };
    const char *what = form == KL_FORM_CHUNKED ? "chunked" : "recurrent";
    float *state = result(H * K * V, "delta_rule state", what, T);
    float *g = numbers(T * H * K, 3.0f), *beta = numbers(T * H, 1.0f);
    void *slot = state;
    for (int64_t i = 0; i < T * H * K; i++)
        g[i] = -fabsf(g[i]);
    for (int64_t i = 0; i < T * H; i++)
        beta[i] = fabsf(beta[i]);
    const kl_delta_rule_args args = { .offsets = offsets,
                                      .N = 1,
                                      .T = T,
                                      .Hk = H,
                                      .Hv = H,
                                      .K = K,
                                      .V = V,
                                      .scale = 0.3f,
                                      .gate = gate,
                                      .form = form,
                                      .l2_norm = 1,
                                      .l2_eps = 1e-6f };
    MUST(kl_delta_rule(ctx, result(T * H * V, "delta_rule", what, gate), (kl_slots){ &slot, 0 },
                       numbers(T * H * K, 2.0f), numbers(T * H * K + 1, 2.0f),
                       numbers(T * H * V, 2.0f), gate == KL_GATE_NONE ? NULL : g, beta,
                       (kl_slots){ NULL, 0 }, &args));
}

static void append(kl_cache cache, const float *x, int64_t T, int64_t D)
{
    const int64_t offsets[] = { 0, T }, start[] = { 0 };
    MUST(kl_cache_append(ctx, cache, x, offsets, start, 1, T, D));
}

/* 70 positions of two heads of 40 and of a latent of 32 beside 24: more than one block of 64 */
static void attention(kl_type type, int64_t T, kl_form form)
{
    enum { N = 70, H = 4, K = 64, V = 32, R = 32, P = 24 };
    const int64_t offsets[] = { 0, T }, positions[] = { N };
    static uint8_t page[2][KL_PAGE * 4 * 2 * K];
    void *const at[2] = { page[0], page[1] };
    void *const *const pages[2] = { &at[0], &at[1] };
    const kl_cache keys = { &pages[0], 0, kl_type_bytes(type, 2 * K), type },
                   values = { &pages[1], 0, kl_type_bytes(type, 2 * V), type };
    append(keys, numbers(N * 2 * K, 1.0f), N, 2 * K);
    append(values, numbers(N * 2 * V, 1.0f), N, 2 * V);
    const kl_attention_args args = { offsets, positions, 1, T, H, 2, K, V, 0.2f };
    MUST(kl_attention(ctx, result(T * H * V, "attention", kl_type_name(type), T),
                      numbers(T * H * K, 4.0f), keys, values, &args));

    const kl_cache latent = { &pages[0], 0, kl_type_bytes(type, R), type },
                   shared = { &pages[1], 0, P * sizeof(float), KL_F32 };
    append(latent, numbers(N * R, 1.0f), N, R);
    append(shared, numbers(N * P, 1.0f), N, P);
    const void *uk[H], *uv[H];
    for (int h = 0; h < H; h++) {
        uk[h] = numbers(40 * R + h, 0.5f);
        uv[h] = numbers(V * R + h, 0.5f);
    }
    const kl_weight w_uk = { uk, H, 40, R, R * sizeof(float), KL_F32, 0 },
                    w_uv = { uv, H, V, R, R * sizeof(float), KL_F32, 0 };
    kl_latent_attention_args latent_args = { .offsets = offsets,
                                             .positions = positions,
                                             .N = 1,
                                             .T = T,
                                             .H = H,
                                             .K = 40,
                                             .P = P,
                                             .V = V,
                                             .R = R,
                                             .scale = 0.2f,
                                             .form = form };
    MUST(kl_latent_attention(ctx, result(T * H * V, "latent_attention", kl_type_name(type), form),
                             numbers(T * H * (40 + P), 4.0f), latent, shared, &w_uk, &w_uv,
                             &latent_args));
    if (form == KL_FORM_EXPANDED)
        return;
    static int32_t select[64]
                         [33]; /* of token t every other position from t on; none of the first */
    for (int64_t t = 0; t < T; t++)
        for (int32_t i = 0; i < 33; i++)
            select[t][i] = t > 0 && t + 2 * i <= N - T + t ? (int32_t)t + 2 * i : -1;
    latent_args.select = select[0];
    latent_args.select_width = 33;
    MUST(kl_latent_attention(
        ctx, result(T * H * V, "latent_attention select", kl_type_name(type), form),
        numbers(T * H * (40 + P), 4.0f), latent, shared, &w_uk, &w_uv, &latent_args));
}

/* 70 positions, two calls of new ones; keys of pools of 4, 128 wide so that all types have whole blocks */
static void indexer(kl_type type)
{
    enum { N = 70, FIRST = 33, H = 5, D = 128, P = 4, T = 3, TOPK = 24 };
    const int64_t offsets[] = { 0, FIRST, N }, start[] = { 0, FIRST }, queries[] = { 0, T },
                  positions[] = { N };
    static uint8_t page[2][KL_PAGE * 4 * 2 * D];
    void *const at[2] = { page[0], page[1] };
    void *const *const pages[2] = { &at[0], &at[1] };
    const size_t row = kl_type_bytes(type, D);
    const kl_cache k = { &pages[0], 0, 2 * row, type }, gate = { &pages[0], row, 2 * row, type },
                   keys = { &pages[1], 0, kl_type_bytes(type, D / P), type };
    const float *ape = numbers(P * D, 1.0f);
    append(k, numbers(N * D, 2.0f), N, D);
    append(gate, numbers(N * D, 2.0f), N, D);
    memset(page[1], 0, sizeof page[1]);
    for (int i = 0; i < 2; i++) {
        const int64_t part[] = { 0, offsets[i + 1] - offsets[i] };
        MUST(kl_index_pool(ctx, keys, k, gate, ape, part, start + i, 1, part[1], D, P));
    }
    const size_t n_bytes = N / P * kl_type_bytes(type, D);
    memcpy(result((int64_t)n_bytes / 4, "index_pool", kl_type_name(type), P), page[1], n_bytes);
    const kl_index_args args = { queries, positions, 1, T, H, D, P, TOPK, 0.1f };
    const float *q = numbers(T * H * D, 2.0f), *w = numbers(T * H, 1.0f);
    MUST(kl_index_scores(ctx, result(T * (N / P), "index_scores", kl_type_name(type), P), q, keys,
                         w, &args));
    int32_t *ids =
        (int32_t *)(void *)result(T * (TOPK + P - 1), "index_select", kl_type_name(type), P);
    MUST(kl_index_select(ctx, ids, q, keys, w, &args));
}

static void attentions(int64_t T)
{
    attention(KL_F32, T, KL_FORM_ABSORBED);
    attention(KL_F16, T, KL_FORM_EXPANDED);
    attention(KL_Q8_0, T, KL_FORM_ABSORBED);
    indexer(KL_F32);
    indexer(KL_F16);
    indexer(KL_Q8_0);
}

/* 21 rows of weights, so that no tile and no panel is full, with T rows of x */
static void product(kl_type type, int64_t T, int64_t K, int transposed, const char *what)
{
    enum { ROWS = 21 };
    const int64_t rows = transposed ? K : ROWS, cols = transposed ? ROWS : K;
    const size_t row_bytes = kl_type_bytes(type, cols);
    const void *matrix = type == KL_F32 ? (const void *)numbers(rows * cols, 0.5f)
                                        : stored((size_t)rows * row_bytes);
    const kl_weight w = { &matrix, 1, ROWS, K, row_bytes, type, transposed };
    char name[64];
    snprintf(name, sizeof name, "%s %s%s K=%lld", what, kl_type_name(type),
             transposed ? " transposed" : "", (long long)K);
    float *y = result(T * ROWS, "linear", name, T);
    MUST(kl_linear(ctx, &y, numbers(T * K, 1.0f), &w, NULL, 1, T, K));
    y = result(T * ROWS, "linear with rims", name, T);
    MUST(kl_linear(ctx, &y, rims(T * K), &w, NULL, 1, T, K));
}

static void dequantised(void)
{
    for (int type = 0; type < KL_TYPE_END; type++) {
        const int64_t K = 3 * kl_type_block((kl_type)type);
        if (K > 0)
            MUST(kl_dequantize(ctx, result(5 * K, "dequantize", kl_type_name((kl_type)type), K),
                               stored(5 * kl_type_bytes((kl_type)type, K)), (kl_type)type, 5, K));
    }
}

static void products(const char *what)
{
    static const int64_t T[] = { 1, 2, 3, 7, 13 };
    for (size_t i = 0; i < sizeof T / sizeof *T; i++)
        for (int type = 0; type < KL_TYPE_END; type++) {
            const int64_t block = kl_type_block((kl_type)type);
            const int64_t K = block == 1 ? 801 : block < 256 ? 9 * block : 2 * block;
            if (block == 0)
                continue;
            product((kl_type)type, T[i], K, 0, what);
            if (i == 0)
                hyper_connections_of_blocks((kl_type)type, what);
            if (block == 1)
                product((kl_type)type, T[i], 37, 1, what);
        }
}

static kl_ctx *context(const char *isa, kl_activations activations)
{
    kl_ctx *made = NULL;
    const kl_ctx_options options = { .threads = 1, .isa = isa, .activations = activations };
    if (kl_ctx_create(&made, &options) != KL_OK) {
        printf("test_isa: %s\n", kl_ctx_error(made));
        exit(1);
    }
    return made;
}

static void run(const char *isa, results *to)
{
    static const char *const names[] = { "float32", "int8", "bfloat16" };
    static const int64_t widths[] = { 1, 2, 7, 15, 16, 17, 30, 33, 300 };
    now = to;
    now->used = 0;
    now->n = 0;
    ctx = context(isa, KL_ACTIVATIONS_FLOAT32);
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++)
        plain_ops(widths[i]);
    convolution(37, 4);
    convolution(21, 3);
    for (int gate = KL_GATE_NONE; gate <= KL_GATE_CHANNEL; gate++) {
        delta_rule(1, 40, 24, KL_FORM_RECURRENT, (kl_gate)gate);
        delta_rule(19, 33, 37, KL_FORM_RECURRENT, (kl_gate)gate);
        delta_rule(90, 40, 37, KL_FORM_CHUNKED, (kl_gate)gate);
    }
    for (int64_t T = 1; T <= 9; T += 4)
        attentions(T);
    dequantised();
    for (int i = 0; i < 3; i++) {
        kl_ctx_destroy(ctx);
        ctx = context(isa, (kl_activations)i);
        products(names[i]);
        attentions(19); /* in fixed point but for float32 */
    }
    kl_ctx_destroy(ctx);
    while (n_inputs > 0)
        free(inputs[--n_inputs]);
}

static int differ(const results *a, const results *b, const char *isa)
{
    int wrong = 0;
    if (a->used != b->used || a->n != b->n)
        return printf("%s: %d results; the first set has %d\n", isa, b->n, a->n);
    for (int n = 0; n < a->n; n++) {
        const size_t end = n + 1 < a->n ? a->begin[n + 1] : a->used;
        for (size_t i = a->begin[n]; i < end; i++) {
            const float x = a->value[i], y = b->value[i];
            if (memcmp(&x, &y, sizeof x) == 0 || (isnan(x) && isnan(y)))
                continue;
            printf("%s: %s, value %zu: %a, and %a by the first set\n", isa, a->name[n],
                   i - a->begin[n], (double)y, (double)x);
            wrong++;
            break;
        }
    }
    return wrong;
}

int main(void)
{
    const char *isa[16];
    const int n = kl_isa_list(isa, 16);
    int wrong = 0;
    run(isa[0], &runs[0]);
    for (int i = 1; i < n; i++) {
        run(isa[i], &runs[1]);
        wrong += differ(&runs[0], &runs[1], isa[i]);
    }
    printf("tests/c/test_isa: %d results of %zu values by %s", runs[0].n, runs[0].used, isa[0]);
    for (int i = 1; i < n; i++)
        printf(", %s", isa[i]);
    printf("\n");
    return wrong != 0;
}
