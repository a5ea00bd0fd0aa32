/* Arguments that only C can get wrong, or that Python looks at before it calls: each is refused, in a sentence. */
#include "small_model.h"

enum { ROWS = 2, COLS = 64, STEPS = 3 };

static float zeros[4096], out[4096];
static int32_t ids[64];

static void expect(kl_ctx *ctx, int line, kl_status status, kl_status wanted, const char *words)
{
    if (status == wanted && strstr(kl_ctx_error(ctx), words) != NULL)
        return;
    printf("%s:%d: status %d, not %d, or not \"%s\": %s\n", __FILE__, line, (int)status,
           (int)wanted, words, status == KL_OK ? "no error" : kl_ctx_error(ctx));
    failures++;
}
#define REFUSED(wanted, words, call) expect(ctx, __LINE__, call, wanted, words)

/* ---- what several ops share ---- */

static kl_status linear(kl_ctx *ctx, kl_type type, int64_t rows, int64_t cols, size_t row_bytes)
{
    const void *matrix = zeros;
    float *const y = out;
    const kl_weight w = { &matrix, 1, rows, cols, row_bytes, type, 0 };
    return kl_linear(ctx, &y, zeros, &w, NULL, 1, 1, COLS);
}

static void test_weights(kl_ctx *ctx)
{
    CHECK(linear(ctx, KL_F32, ROWS, COLS, 4 * COLS) == KL_OK);
    REFUSED(KL_ERR_SHAPE, "has 252 bytes a row; a row needs 256",
            linear(ctx, KL_F32, ROWS, COLS, 4 * COLS - 4));
    REFUSED(KL_ERR_SHAPE, "[2, 63]; it must be", linear(ctx, KL_F32, ROWS, COLS - 1, 4 * COLS));
    REFUSED(KL_ERR_DTYPE, "storage type 99", linear(ctx, (kl_type)99, ROWS, COLS, 4 * COLS));
    REFUSED(KL_ERR_SHAPE, "needs a multiple of 256", linear(ctx, KL_Q4_K, ROWS, COLS, 4 * COLS));
}

static kl_status append(kl_ctx *ctx, kl_type type, size_t row_bytes, const int64_t *offsets,
                        int64_t start, int64_t width)
{
    void *const page = out;
    void *const *const pages = &page;
    const kl_cache cache = { &pages, 0, row_bytes, type };
    return kl_cache_append(ctx, cache, zeros, offsets, &start, 1, 2, width);
}

/* Rows may lie any number of bytes apart. */
static void test_rows_between_which_bytes_lie(kl_ctx *ctx)
{
    enum { MANY = 9, N = 2, APART = 4 * COLS + 2 };
    static unsigned char stored[N * APART];
    static float x[MANY * COLS], w[N * COLS], packed[MANY * N], apart[MANY * N];
    float *y[] = { packed }, *z[] = { apart };
    for (int i = 0; i < N * COLS; i++)
        w[i] = (float)(i * 7 % 11) - 5.0f;
    for (int i = 0; i < MANY * COLS; i++)
        x[i] = (float)(i * 5 % 13) - 6.0f;
    for (int i = 0; i < N; i++)
        memcpy(stored + i * APART, w + i * COLS, 4 * COLS);
    const void *whole = w, *spread = stored;
    const kl_weight a = { &whole, 1, N, COLS, 4 * COLS, KL_F32, 0 },
                    b = { &spread, 1, N, COLS, APART, KL_F32, 0 };
    for (int64_t n = 1; n <= MANY; n += MANY - 1) { /* few rows of x, and many */
        CHECK(kl_linear(ctx, y, x, &a, NULL, 1, n, COLS) == KL_OK);
        CHECK(kl_linear(ctx, z, x, &b, NULL, 1, n, COLS) == KL_OK);
        CHECK(memcmp(packed, apart, sizeof packed) == 0);
    }
}

static void test_caches_and_offsets(kl_ctx *ctx)
{
    const int64_t right[] = { 0, 2 }, late[] = { 1, 2 }, falls[] = { 0, -1 }, far[] = { 0, 3 },
                  near[] = { 0, 1 };
    CHECK(append(ctx, KL_F32, 16, right, 0, 4) == KL_OK);
    REFUSED(KL_ERR_DTYPE, "it must be F32, F16 or Q8_0", append(ctx, KL_BF16, 16, right, 0, 4));
    REFUSED(KL_ERR_SHAPE, "cache has 12 bytes a row; a row needs 16",
            append(ctx, KL_F32, 12, right, 0, 4));
    REFUSED(KL_ERR_SHAPE, "cache has 18 bytes a row", append(ctx, KL_F32, 18, right, 0, 4));
    REFUSED(KL_ERR_SHAPE, "Q8_0 needs a multiple of 32", append(ctx, KL_Q8_0, 64, right, 0, 4));
    REFUSED(KL_ERR_ARG, "start[0] is -1; it must be >= 0", append(ctx, KL_F32, 16, right, -1, 4));
    REFUSED(KL_ERR_ARG, "start[0] is 9223372036854775807; it must be at most 2^40",
            append(ctx, KL_F32, 16, right, INT64_MAX, 4));
    REFUSED(KL_ERR_ARG, "offsets[0] is 1; it must be 0", append(ctx, KL_F32, 16, late, 0, 4));
    REFUSED(KL_ERR_ARG, "offsets[1] is -1 after 0", append(ctx, KL_F32, 16, falls, 0, 4));
    REFUSED(KL_ERR_SHAPE, "offsets end at 3; they must end at T = 2",
            append(ctx, KL_F32, 16, far, 0, 4));
    REFUSED(KL_ERR_SHAPE, "offsets end at 1; they must end at T = 2",
            append(ctx, KL_F32, 16, near, 0, 4));
}

/* ---- ops ---- */

static void test_sizes_that_are_too_large(kl_ctx *ctx)
{
    static const int64_t offsets[] = { 0, 1 };
    const kl_cache none = { 0 };
    const kl_weight empty = { 0 };
    const kl_attention_args wide = { .offsets = offsets,
                                     .positions = offsets + 1,
                                     .N = 1,
                                     .T = 1,
                                     .H = 1,
                                     .Hkv = 1,
                                     .K = 1,
                                     .V = INT64_MAX };
    const kl_latent_attention_args deep = { .offsets = offsets,
                                            .positions = offsets + 1,
                                            .N = 1,
                                            .T = 1,
                                            .H = 1,
                                            .K = 1,
                                            .V = 1,
                                            .R = INT64_MAX };
    REFUSED(KL_ERR_SHAPE, "add: n is 9223372036854775807, which is too large",
            kl_add(ctx, out, zeros, zeros, INT64_MAX));
    REFUSED(KL_ERR_SHAPE, "sigmoid: n is 9223372036854775807, which is too large",
            kl_sigmoid(ctx, out, zeros, INT64_MAX));
    REFUSED(KL_ERR_SHAPE, "[1, 9223372036854775807, 4], which is too large",
            kl_rope(ctx, out, zeros, offsets, 1, INT64_MAX, 4, 4, 1e4));
    REFUSED(KL_ERR_SHAPE, "1, 1, 1, 1, 9223372036854775807, which is too large",
            kl_attention(ctx, out, zeros, none, none, &wide));
    REFUSED(KL_ERR_SHAPE, "1, 1, 1, 0, 1, 9223372036854775807, which is too large",
            kl_latent_attention(ctx, out, zeros, none, none, &empty, &empty, &deep));
    REFUSED(KL_ERR_SHAPE, "[-1, 1, 4]; T must be >= 0, H and K must be >= 1",
            kl_rope(ctx, out, zeros, offsets, -1, 1, 4, 4, 1e4));
}

/* ---- the indexer ---- */

static kl_status pool(kl_ctx *ctx, int64_t width, int64_t size, size_t row_bytes, int64_t start)
{
    static float rows[KL_PAGE], keys[KL_PAGE];
    static const int64_t offsets[] = { 0, 1 };
    void *const page[2] = { keys, rows };
    void *const *const pages[2] = { &page[0], &page[1] };
    const kl_cache pooled = { &pages[0], 0, row_bytes, KL_F32 },
                   given = { &pages[1], 0, width > 0 && width <= 8 ? (size_t)(8 * width) : 0,
                             KL_F32 };
    return kl_index_pool(ctx, pooled, given, given, zeros, offsets, &start, 1, 1, width, size);
}

static void test_index_pool(kl_ctx *ctx)
{
    CHECK(pool(ctx, 4, 2, 8, 1) == KL_OK);
    REFUSED(KL_ERR_ARG, "index_pool: P is 3; it must be >= 1 and divide 512",
            pool(ctx, 4, 3, 8, 0));
    REFUSED(KL_ERR_ARG, "index_pool: P is 0; it must be >= 1", pool(ctx, 4, 0, 8, 0));
    REFUSED(KL_ERR_SHAPE, "index_pool: D is 6; it must be a multiple of P = 4",
            pool(ctx, 6, 4, 8, 0));
    REFUSED(KL_ERR_SHAPE, "index_pool: k is [1, 0]", pool(ctx, 0, 1, 8, 0));
    REFUSED(KL_ERR_SHAPE, "pooled has 4 bytes a row; a row needs 8", pool(ctx, 4, 2, 4, 0));
    REFUSED(KL_ERR_SHAPE, "its rows must follow each other without gaps, 8 each",
            pool(ctx, 4, 2, 16, 0));
    REFUSED(KL_ERR_ARG, "index_pool: start[0] is -1; it must be >= 0", pool(ctx, 4, 2, 8, -1));
    REFUSED(KL_ERR_ARG, "it must be at most 2^40", pool(ctx, 4, 2, 8, INT64_MAX));
}

static void test_index_choice(kl_ctx *ctx)
{
    static const int64_t offsets[] = { 0, 1 };
    int64_t positions[] = { 4 };
    void *const page = (void *)(uintptr_t)zeros, *const *const pages = &page;
    const kl_cache keys = { &pages, 0, 8, KL_F32 };
    const kl_index_args right = { offsets, positions, 1, 1, 1, 4, 2, 4, 1.0f };
    kl_index_args args = right;
#define WITH(field, value) (args = right, args.field = (value), &args)
    CHECK(kl_index_select(ctx, ids, zeros, keys, zeros, &right) == KL_OK);
    CHECK(ids[0] == 0 && ids[3] == 3 && ids[4] == -1);
    REFUSED(KL_ERR_ARG, "index_select: topk is 3; it must be a multiple of pool = 2",
            kl_index_select(ctx, ids, zeros, keys, zeros, WITH(topk, 3)));
    REFUSED(KL_ERR_ARG, "index_select: topk is 0",
            kl_index_select(ctx, ids, zeros, keys, zeros, WITH(topk, 0)));
    REFUSED(KL_ERR_SHAPE, "which is too large",
            kl_index_select(ctx, ids, zeros, keys, zeros, WITH(topk, INT64_MAX - 1)));
    REFUSED(KL_ERR_ARG, "index_select: pool is 3; it must be >= 1 and divide 512",
            kl_index_select(ctx, ids, zeros, keys, zeros, WITH(pool, 3)));
    REFUSED(KL_ERR_SHAPE, "index_select: q is [T, H, D] = [1, 0, 4]",
            kl_index_select(ctx, ids, zeros, keys, zeros, WITH(H, 0)));
    REFUSED(KL_ERR_SHAPE, "index_scores: q is [T, H, D] = [1, 9223372036854775807, 4]",
            kl_index_scores(ctx, out, zeros, keys, zeros, WITH(H, INT64_MAX)));
    REFUSED(KL_ERR_ARG, "index_scores: scale is inf; it must be finite",
            kl_index_scores(ctx, out, zeros, keys, zeros, WITH(scale, INFINITY)));
    positions[0] = 0;
    REFUSED(KL_ERR_ARG, "positions[0] is 0 for 1 queries",
            kl_index_select(ctx, ids, zeros, keys, zeros, &right));
    positions[0] = INT64_C(1) << 31;
    REFUSED(KL_ERR_ARG, "index_select: positions[0] is 2147483648; ids are int32",
            kl_index_select(ctx, ids, zeros, keys, zeros, &right));
#undef WITH
}

static kl_status conv(kl_ctx *ctx, int64_t taps, kl_activation activation)
{
    const int64_t offsets[] = { 0, STEPS };
    const kl_slots none = { NULL, 0 };
    return kl_short_conv(ctx, out, none, zeros, zeros, none, offsets, 1, STEPS, 4, taps,
                         activation);
}

static kl_status gate(kl_ctx *ctx, float lower_bound)
{
    return kl_decay_gate(ctx, out, zeros, zeros, zeros, 1, 2, 3, lower_bound);
}

static void test_kda(kl_ctx *ctx)
{
    CHECK(conv(ctx, 8, KL_SILU) == KL_OK && gate(ctx, -5.0f) == KL_OK);
    REFUSED(KL_ERR_UNSUPPORTED, "w has 9 taps; there may be 1 to 8", conv(ctx, 9, KL_SILU));
    REFUSED(KL_ERR_UNSUPPORTED, "w has 0 taps", conv(ctx, 0, KL_SILU));
    REFUSED(KL_ERR_ARG, "activation is 9; it must be KL_NONE or KL_SILU",
            conv(ctx, 4, (kl_activation)9));
    REFUSED(KL_ERR_ARG, "lower_bound is 1; it must be finite and < 0", gate(ctx, 1.0f));
    REFUSED(KL_ERR_ARG, "lower_bound is -inf", gate(ctx, -INFINITY));
}

static kl_status rule(kl_ctx *ctx, const kl_delta_rule_args *args)
{
    const kl_slots none = { NULL, 0 };
    return kl_delta_rule(ctx, out, none, zeros, zeros, zeros, zeros, zeros, none, args);
}

static void test_delta_rule(kl_ctx *ctx)
{
    const int64_t offsets[] = { 0, STEPS }, falling[] = { 2, 0 }, equal[] = { 1, 1 },
                  beyond[] = { 0, STEPS + 1 };
    const int64_t marks[] = { 0, STEPS }, of[] = { 0, 2 };
    const kl_delta_rule_args right = { .offsets = offsets,
                                       .N = 1,
                                       .T = STEPS,
                                       .Hk = 2,
                                       .Hv = 2,
                                       .K = 4,
                                       .V = 4,
                                       .gate = KL_GATE_CHANNEL };
    kl_delta_rule_args a = right;
    CHECK(rule(ctx, &a) == KL_OK);
    a.Hv = 3;
    REFUSED(KL_ERR_SHAPE, "v has 3 heads for 2 heads of q and k", rule(ctx, &a));
    a = right, a.scale = NAN;
    REFUSED(KL_ERR_ARG, "scale is nan; it must be finite", rule(ctx, &a));
    a = right, a.gate = (kl_gate)3;
    REFUSED(KL_ERR_ARG, "gate is 3", rule(ctx, &a));
    a = right, a.head_map = (kl_head_map)2;
    REFUSED(KL_ERR_ARG, "head_map is 2", rule(ctx, &a));
    a = right, a.form = KL_FORM_ABSORBED;
    REFUSED(KL_ERR_ARG, "form is 3", rule(ctx, &a));
    a = right, a.chunk = 257;
    REFUSED(KL_ERR_ARG, "chunk is 257; it must be 1 to 256", rule(ctx, &a));
    a = right, a.l2_norm = 1, a.l2_eps = NAN;
    REFUSED(KL_ERR_ARG, "l2_eps is nan; it must be >= 0", rule(ctx, &a));
    a = right, a.checkpoints = marks;
    REFUSED(KL_ERR_ARG, "checkpoint_offsets and kept must be, too", rule(ctx, &a));
    a.checkpoint_offsets = of, a.kept = out + 1024;
    CHECK(rule(ctx, &a) == KL_OK);
    a.checkpoint_offsets = falling;
    REFUSED(KL_ERR_ARG, "checkpoint_offsets[1] is 0; it must not be below 2", rule(ctx, &a));
    a.checkpoint_offsets = of, a.checkpoints = equal;
    REFUSED(KL_ERR_ARG, "checkpoints[1] is 1; it must be 2 to 3", rule(ctx, &a));
    a.checkpoints = beyond;
    REFUSED(KL_ERR_ARG, "checkpoints[1] is 4; it must be 1 to 3", rule(ctx, &a));
}

static kl_status attend(kl_ctx *ctx, kl_type type, size_t row_bytes, const kl_attention_args *args)
{
    void *const page = out + 1024;
    void *const *const pages = &page;
    const kl_cache cache = { &pages, 0, row_bytes, type };
    return kl_attention(ctx, out, zeros, cache, cache, args);
}

static void test_attention(kl_ctx *ctx)
{
    const int64_t offsets[] = { 0, STEPS }, positions[] = { STEPS }, fewer[] = { STEPS - 1 },
                  many[] = { (INT64_C(1) << 40) + 1 };
    const kl_attention_args right = { .offsets = offsets,
                                      .positions = positions,
                                      .N = 1,
                                      .T = STEPS,
                                      .H = 2,
                                      .Hkv = 2,
                                      .K = 16,
                                      .V = 16,
                                      .scale = 1 };
    kl_attention_args a = right;
    CHECK(attend(ctx, KL_F32, 128, &a) == KL_OK);
    REFUSED(KL_ERR_SHAPE, "keys has heads of 16 values; Q8_0 needs a multiple of 32",
            attend(ctx, KL_Q8_0, 34, &a));
    a.H = 3;
    REFUSED(KL_ERR_SHAPE, "Hkv must divide H", attend(ctx, KL_F32, 128, &a));
    a = right, a.scale = INFINITY;
    REFUSED(KL_ERR_ARG, "scale is inf; it must be finite", attend(ctx, KL_F32, 128, &a));
    a = right, a.positions = fewer;
    REFUSED(KL_ERR_ARG, "positions[0] is 2 for 3 queries", attend(ctx, KL_F32, 128, &a));
    a.positions = many;
    REFUSED(KL_ERR_ARG, "positions[0] is 1099511627777; there may be 2^40",
            attend(ctx, KL_F32, 128, &a));
}

static kl_status attend_latent(kl_ctx *ctx, const kl_latent_attention_args *args)
{
    void *const page = zeros;
    void *const *const pages = &page;
    const void *matrix[] = { zeros, zeros };
    const kl_cache cache = { &pages, 0, 64, KL_F32 };
    const kl_weight w = { matrix, 2, 16, 16, 64, KL_F32, 0 };
    return kl_latent_attention(ctx, out, zeros, cache, cache, &w, &w, args);
}

static void test_latent_attention(kl_ctx *ctx)
{
    const int64_t offsets[] = { 0, STEPS }, positions[] = { STEPS };
    static const int32_t select[STEPS][3] = { { 0, -1, -1 }, { -1, -1, -1 }, { 0, 2, -1 } };
    static const int32_t ahead[STEPS][3] = { { 0, -1, -1 }, { 0, 2, -1 }, { 0, 2, -1 } };
    static const int32_t behind[STEPS][3] = { { -1, -1, -1 }, { 0, -1, 1 }, { 0, 1, 2 } };
    static const int32_t equal[STEPS][3] = { { -1, -1, -1 }, { 0, 1, -1 }, { 0, 1, 1 } };
    static const int32_t below[STEPS][3] = { { -1, -2, -1 } };
    const kl_latent_attention_args right = { .offsets = offsets,
                                             .positions = positions,
                                             .N = 1,
                                             .T = STEPS,
                                             .H = 2,
                                             .K = 16,
                                             .P = 16,
                                             .V = 16,
                                             .R = 16,
                                             .scale = 1,
                                             .select = select[0],
                                             .select_width = 3 };
    kl_latent_attention_args a = right;
    out[0] = out[16] = 7;
    CHECK(attend_latent(ctx, &a) == KL_OK && out[0] == 0 && out[16] == 0);
    out[0] = 7;
    a.select = ahead[0];
    REFUSED(KL_ERR_ARG, "select[1, 1] (query, entry) is 2; the query sees positions 0 to 1",
            attend_latent(ctx, &a));
    a.select = behind[0];
    REFUSED(KL_ERR_ARG,
            "select[1, 2] (query, entry) is 1 after -1; behind the last position all must be -1",
            attend_latent(ctx, &a));
    a.select = equal[0];
    REFUSED(KL_ERR_ARG,
            "select[2, 2] (query, entry) is 1 after 1; the positions of a query must rise",
            attend_latent(ctx, &a));
    a.select = below[0];
    REFUSED(KL_ERR_ARG, "select[0, 1] (query, entry) is -2; it must be a position, or -1",
            attend_latent(ctx, &a));
    CHECK(out[0] == 7);
    a.select_from = 3; /* all of them see no more: no row is read */
    CHECK(attend_latent(ctx, &a) == KL_OK);
    a = right, a.select_from = -1;
    REFUSED(KL_ERR_ARG, "select_from is -1; it must be >= 0", attend_latent(ctx, &a));
    a = right, a.form = KL_FORM_EXPANDED;
    REFUSED(KL_ERR_ARG, "form is expanded and select is given", attend_latent(ctx, &a));
    a = right, a.select = NULL;
    REFUSED(KL_ERR_ARG, "select is NULL and its width 3", attend_latent(ctx, &a));
    a = right, a.select_width = 0;
    REFUSED(KL_ERR_SHAPE, "select is [T, W] = [3, 0]; W must be >= 1", attend_latent(ctx, &a));
    a.select_width = INT64_MAX;
    REFUSED(KL_ERR_SHAPE, "select is [T, W] = [3, 9223372036854775807]", attend_latent(ctx, &a));
    a.select = NULL, a.select_width = 0;
    CHECK(attend_latent(ctx, &a) == KL_OK);
}

static kl_status route(kl_ctx *ctx, kl_route_args args)
{
    return kl_route(ctx, ids, out, zeros, NULL, &args);
}

static kl_status mix(kl_ctx *ctx, int64_t k, const kl_situ_betas *situ)
{
    const void *matrix[] = { zeros, zeros, zeros, zeros };
    const kl_weight w = { matrix, 4, 8, 8, 32, KL_F32, 0 };
    return kl_moe(ctx, out, zeros, ids, zeros, &w, &w, &w, NULL, 1, 8, 8, k, situ, 0);
}

static void test_experts(kl_ctx *ctx)
{
    const kl_route_args right = {
        .T = 1, .E = 4, .k = 2, .groups = 2, .top_groups = 1, .scale = 1
    };
    kl_route_args a = right;
    CHECK(route(ctx, a) == KL_OK && mix(ctx, 2, NULL) == KL_OK);
    CHECK(mix(ctx, 2, &(kl_situ_betas){ 4, 25 }) == KL_OK);
    REFUSED(KL_ERR_ARG, "moe: beta is 0; it must be > 0 and finite",
            mix(ctx, 2, &(kl_situ_betas){ 0, 25 }));
    REFUSED(KL_ERR_ARG, "situ: beta is nan; it must be > 0 and finite",
            kl_situ(ctx, out, zeros, zeros, 8, &(kl_situ_betas){ NAN, 25 }));
    REFUSED(KL_ERR_ARG, "situ: linear_beta is -1; it must be > 0 and finite, or 0 for none",
            kl_situ(ctx, out, zeros, zeros, 8, &(kl_situ_betas){ 4, -1 }));
    REFUSED(KL_ERR_ARG, "swiglu: limit is -10; it must be > 0 and finite, or 0 for none",
            kl_swiglu(ctx, out, zeros, zeros, 8, -10));
    REFUSED(KL_ERR_ARG, "swiglu: limit is inf", kl_swiglu(ctx, out, zeros, zeros, 8, INFINITY));
    REFUSED(KL_ERR_ARG, "layer_norm: eps is -1; it must be >= 0",
            kl_layer_norm(ctx, out, zeros, zeros, zeros, 1, 8, -1));
    REFUSED(KL_ERR_SHAPE, "layer_norm: x is [1, 0]; the first must be >= 0, the second >= 1",
            kl_layer_norm(ctx, out, zeros, zeros, zeros, 1, 0, 0));
    REFUSED(KL_ERR_SHAPE, "situ: n is -1; it must be >= 0",
            kl_situ(ctx, out, zeros, zeros, -1, &(kl_situ_betas){ 4, 25 }));
    a.groups = 3;
    REFUSED(KL_ERR_ARG, "groups is 3; it must divide the 4 experts", route(ctx, a));
    a = right, a.top_groups = 3;
    REFUSED(KL_ERR_ARG, "top_groups is 3; it must be", route(ctx, a));
    a = right, a.k = 3;
    REFUSED(KL_ERR_ARG, "k is 3; it must be 1 <= k <= 2", route(ctx, a));
    a = right, a.function = (kl_router)3;
    REFUSED(KL_ERR_ARG, "function is 3", route(ctx, a));
    a = right, a.scale = INFINITY;
    REFUSED(KL_ERR_ARG, "scale is inf; it must be finite", route(ctx, a));
    REFUSED(KL_ERR_ARG, "k is 0 of 4 experts", mix(ctx, 0, NULL));
    REFUSED(KL_ERR_ARG, "k is 5 of 4 experts", mix(ctx, 5, NULL));
    a = right, a.given = 1;
    ids[0] = 1, ids[1] = 4;
    REFUSED(KL_ERR_ARG, "ids[0, 1] is 4; ids of a token must rise within 0 to 3", route(ctx, a));
    REFUSED(KL_ERR_ARG, "ids[0, 1] (token, slot) is 4; it must be 0 <= id < 4", mix(ctx, 2, NULL));
    ids[1] = 1;
    REFUSED(KL_ERR_ARG, "ids[0, 1] is 1", route(ctx, a));
    REFUSED(KL_ERR_ARG, "is 1 after 1; the ids of a token must ascend", mix(ctx, 2, NULL));
}

static kl_status draw(kl_ctx *ctx, float temperature, int64_t top_k, float top_p, float min_p)
{
    const kl_sample_args a = {
        .temperature = temperature, .top_k = top_k, .top_p = top_p, .min_p = min_p
    };
    return kl_sample(ctx, ids, zeros, &a, 1, 4);
}

static void test_sample(kl_ctx *ctx)
{
    CHECK(draw(ctx, 1, 0, 1, 0) == KL_OK);
    REFUSED(KL_ERR_ARG, "temperature of row 0 is inf", draw(ctx, INFINITY, 0, 1, 0));
    REFUSED(KL_ERR_ARG, "temperature of row 0 is -1", draw(ctx, -1, 0, 1, 0));
    REFUSED(KL_ERR_ARG, "top_k of row 0 is -1", draw(ctx, 1, -1, 1, 0));
    REFUSED(KL_ERR_ARG, "top_p of row 0 is 0; it must be in (0, 1]", draw(ctx, 1, 0, 0, 0));
    REFUSED(KL_ERR_ARG, "min_p of row 0 is 2; it must be in [0, 1]", draw(ctx, 1, 0, 1, 2));
    REFUSED(KL_ERR_ARG, "threads is 1025", kl_ctx_set_threads(ctx, 1025));
}

/* ---- the model ---- */

static kl_status make(kl_ctx *ctx, kl_config c)
{
    kl_model *model;
    return kl_model_create(ctx, &model, &c, tensors, n_tensors, 1);
}

static void test_configs(kl_ctx *ctx)
{
    static const kl_layer nets[] = { { KL_MIXER_KDA, KL_FFN_DENSE },
                                     { KL_MIXER_GDN, KL_FFN_DENSE } };
    static const kl_layer attn[] = { { KL_MIXER_GDN, KL_FFN_DENSE },
                                     { KL_MIXER_ATTN, KL_FFN_MOE } };
    kl_config c = config();
    c.vocab = INT64_C(1) << 31;
    REFUSED(KL_ERR_ARG, "vocab_size is 2147483648; it must be 1 to 2^31 - 1", make(ctx, c));
    c = config(), c.ffn.groups = 3;
    REFUSED(KL_ERR_ARG, "n_groups is 3; it must divide n_experts, 4", make(ctx, c));
    c = config(), c.ffn.groups = 2, c.ffn.k = 3;
    REFUSED(KL_ERR_ARG, "experts_per_token is 3; 1 groups of 2 experts have fewer", make(ctx, c));
    c = config(), c.layers = nets;
    REFUSED(KL_ERR_UNSUPPORTED, "layers are both kda and gdn", make(ctx, c));
    c = config(), c.delta.Hv = 2 * H;
    REFUSED(KL_ERR_ARG, "kda has key and value heads of one number", make(ctx, c));
    c = config(), c.layers = attn, c.attn.heads = 3, c.attn.kv_heads = 2, c.attn.width = 8;
    REFUSED(KL_ERR_ARG, "attn_heads is 3; it must be a multiple of attn_kv_heads, 2", make(ctx, c));
    c.attn.heads = 4, c.attn.rotary = 3;
    REFUSED(KL_ERR_ARG, "rotary_dim is 3; it must be even", make(ctx, c));
    c.attn.rotary = 4;
    REFUSED(KL_ERR_ARG, "rope_base is 0; it must be finite and > 0", make(ctx, c));
    c.attn.rope_base = 1e4, c.delta.Hv = 3;
    REFUSED(KL_ERR_ARG, "gdn_v_heads is 3; it must be a multiple of gdn_k_heads, 2", make(ctx, c));
}

static void test_forward(kl_ctx *ctx, const kl_model *model, kl_state *state)
{
    static float embeds[D], logits[2 * VOCAB];
    const int64_t offsets[] = { 0, 1 }, rows[] = { 0 }, both[] = { 0, 2 }, equal[] = { 0, 0 };
    const int32_t token[] = { 1, 2 }, outside[] = { VOCAB }, same[] = { 1, 1 }, none[] = { 0, E };
    const int32_t *on_dense[] = { same, NULL }, *twice[] = { NULL, same },
                  *missing[] = { NULL, none };
    const kl_forward_args right = { .ids = token, .offsets = offsets, .N = 1, .states = &state };
    int64_t done = 7;
    kl_forward_args a = right;
    a.pass_tokens = 63, a.done = &done;
    REFUSED(KL_ERR_ARG, "pass_tokens is 63; it must be 0 or at least 64",
            kl_forward(ctx, model, &a));
    CHECK(done == 0);
    a = right, a.embeds = embeds, a.start = 1, a.stop = 1;
    REFUSED(KL_ERR_ARG, "start is 1 and stop 1", kl_forward(ctx, model, &a));
    a.stop = 3;
    REFUSED(KL_ERR_ARG, "start is 1 and stop 3", kl_forward(ctx, model, &a));
    a.start = 0, a.stop = -1;
    REFUSED(KL_ERR_ARG, "start is 0 and stop -1", kl_forward(ctx, model, &a));
    a = right, a.ids = NULL;
    REFUSED(KL_ERR_ARG, "ids is NULL, so embeds must be given", kl_forward(ctx, model, &a));
    a = right, a.start = 1;
    REFUSED(KL_ERR_ARG, "start is 1, so embeds must be given", kl_forward(ctx, model, &a));
    a = right, a.stop = 1, a.n_logits = 1, a.logits = logits, a.logit_rows = rows;
    REFUSED(KL_ERR_ARG, "so there are no logits to give", kl_forward(ctx, model, &a));
    a = right, a.ids = outside;
    REFUSED(KL_ERR_ARG, "token 0 has id 50; it must be 0 to 49", kl_forward(ctx, model, &a));
    a = right, a.offsets = both, a.n_logits = 2, a.logits = logits, a.logit_rows = equal;
    REFUSED(KL_ERR_ARG, "logit row 1 is 0; rows must rise within 0 to 1",
            kl_forward(ctx, model, &a));
    a = right, a.expert_ids = on_dense;
    REFUSED(KL_ERR_ARG, "expert_ids of layer 0, which has no experts", kl_forward(ctx, model, &a));
    a.expert_ids = twice;
    REFUSED(KL_ERR_ARG, "expert_ids of layer 1 [0, 1] is 1", kl_forward(ctx, model, &a));
    a.expert_ids = missing;
    REFUSED(KL_ERR_ARG, "expert_ids of layer 1 [0, 1] is 4", kl_forward(ctx, model, &a));
    CHECK(kl_state_position(state) == 0);
}

/* Embeddings stand for ids, which then need not be there. */
static void test_embeds_without_ids(kl_ctx *ctx, const kl_model *model)
{
    static float embeds[2 * D], logits[2][VOCAB];
    const int64_t offsets[] = { 0, 2 }, rows[] = { 1 };
    const int32_t token[] = { 1, 2 };
    for (int i = 0; i < 2 * D; i++)
        embeds[i] = (float)(i % 5) - 2.0f;
    for (int with = 0; with < 2; with++) {
        kl_state *state;
        CHECK(kl_state_create(ctx, &state, model, KL_F32, 0) == KL_OK);
        const kl_forward_args a = { .ids = with ? token : NULL,
                                    .embeds = embeds,
                                    .offsets = offsets,
                                    .N = 1,
                                    .states = &state,
                                    .logits = logits[with],
                                    .logit_rows = rows,
                                    .n_logits = 1 };
        CHECK(kl_forward(ctx, model, &a) == KL_OK);
        kl_state_destroy(ctx, state);
    }
    CHECK(memcmp(logits[0], logits[1], sizeof logits[0]) == 0);
}

static void test_states(kl_ctx *ctx, const kl_model *model, const kl_model *twin)
{
    const int64_t offsets[] = { 0, 2 }, each[] = { 0, 1, 2 };
    const int32_t token[] = { 1, 2 };
    kl_state *state, *other, *narrow, *small;
    float part[1024];
    kl_plan plan;
    int64_t at;
    CHECK(kl_state_create(ctx, &state, model, KL_F32, 0) == KL_OK);
    CHECK(kl_state_create(ctx, &other, twin, KL_F32, 0) == KL_OK);
    CHECK(kl_state_create(ctx, &narrow, model, KL_F16, 0) == KL_OK);
    CHECK(kl_state_create(ctx, &small, model, KL_F32, 1) == KL_OK);
    REFUSED(KL_ERR_DTYPE, "it must be F32, F16 or Q8_0",
            kl_state_create(ctx, &(kl_state *){ NULL }, model, KL_BF16, 0));
    REFUSED(KL_ERR_SHAPE, "which do not divide the latent's 12",
            kl_state_create(ctx, &(kl_state *){ NULL }, model, KL_Q8_0, 0));
    test_forward(ctx, model, state);
    kl_forward_args a = { .ids = token, .offsets = offsets, .N = 1, .states = &other };
    REFUSED(KL_ERR_STATE, "state 0 belongs to another model", kl_forward(ctx, model, &a));
    a.states = &small;
    REFUSED(KL_ERR_STATE, "state 0 has read 0 tokens and 2 more are given",
            kl_forward(ctx, model, &a));
    kl_state *const mixed[] = { state, narrow };
    a.states = mixed, a.N = 2, a.offsets = each;
    REFUSED(KL_ERR_STATE, "state 1 has a cache of F16, state 0 of F32", kl_forward(ctx, model, &a));

    CHECK(kl_state_keep(ctx, state, 64, 2) == KL_OK);
    REFUSED(KL_ERR_STATE, "checkpoints are asked for once", kl_state_keep(ctx, state, 64, 2));
    a = (kl_forward_args){ .ids = token, .offsets = offsets, .N = 1, .states = &state };
    CHECK(kl_forward(ctx, model, &a) == KL_OK && kl_state_checkpoint(ctx, state) == KL_OK);
    a.states = &narrow;
    CHECK(kl_forward(ctx, model, &a) == KL_OK);
    REFUSED(KL_ERR_STATE, "before the first token", kl_state_keep(ctx, narrow, 64, 2));
    REFUSED(KL_ERR_ARG, "n is 1; it must be 2 to 2", kl_state_checkpoint_at(ctx, state, 1));
    REFUSED(KL_ERR_ARG, "n is 3; it must be 2 to 2", kl_state_checkpoint_at(ctx, state, 3));
    REFUSED(KL_ERR_ARG, "n is 3; it must be 0 to 2", kl_state_truncate(ctx, state, 3, &at));
    REFUSED(KL_ERR_ARG, "layer 0 of 2 has no part -1",
            kl_state_read(ctx, state, 0, (kl_state_part)-1, part));
    REFUSED(KL_ERR_ARG, "layer 2 of 2 has no part",
            kl_state_read(ctx, state, 2, KL_STATE_DELTA, part));
    REFUSED(KL_ERR_ARG, "layer 1 of 2 has no part",
            kl_state_read(ctx, state, 1, KL_STATE_DELTA, part));
    CHECK(kl_state_read_checkpoint(ctx, state, 0, 0, KL_STATE_DELTA, part) == KL_OK);
    REFUSED(KL_ERR_ARG, "checkpoint 1 of 1",
            kl_state_read_checkpoint(ctx, state, 1, 0, KL_STATE_DELTA, part));
    REFUSED(KL_ERR_ARG, "checkpoint 0 of 1 has no part",
            kl_state_read_checkpoint(ctx, state, 0, 1, KL_STATE_LATENT, part));
    REFUSED(KL_ERR_ARG, "context is 1 and sequences is 0",
            kl_plan_make(ctx, &plan, model, KL_F32, 1, 0, 0));
    REFUSED(KL_ERR_ARG, "pass_tokens is -1; it must be >= 0",
            kl_plan_make(ctx, &plan, model, KL_F32, 1, 1, -1));
    REFUSED(KL_ERR_STATE, "belong to two models", kl_state_copy(ctx, other, state));
    REFUSED(KL_ERR_STATE, "one state has a cache of F16, the other of F32",
            kl_state_copy(ctx, narrow, state));
    REFUSED(KL_ERR_STATE, "2 tokens were read; the state was made for a context of 1",
            kl_state_copy(ctx, small, state));
    REFUSED(KL_ERR_STATE, "it must be empty", kl_state_fill(ctx, state, 1));
    REFUSED(KL_ERR_STATE, "it must be empty", kl_state_fill(ctx, small, -1));
    REFUSED(KL_ERR_STATE, "the state was made for a context of 1", kl_state_fill(ctx, small, 2));
    CHECK(kl_state_position(small) == 0 && kl_state_position(state) == 2);
    kl_state_destroy(ctx, state);
    kl_state_destroy(ctx, other);
    kl_state_destroy(ctx, narrow);
    kl_state_destroy(ctx, small);
}

int main(void)
{
    kl_ctx *ctx;
    kl_model *model, *twin;
    const kl_config c = config();
    make_checkpoint();
    CHECK(kl_ctx_create(&ctx, NULL) == KL_OK);
    CHECK(strcmp(kl_library_version(), KL_VERSION) == 0);
    test_weights(ctx);
    test_sizes_that_are_too_large(ctx);
    test_index_pool(ctx);
    test_index_choice(ctx);
    test_rows_between_which_bytes_lie(ctx);
    test_caches_and_offsets(ctx);
    test_kda(ctx);
    test_delta_rule(ctx);
    test_attention(ctx);
    test_latent_attention(ctx);
    test_experts(ctx);
    test_sample(ctx);
    test_configs(ctx);
    CHECK(kl_model_create(ctx, &model, &c, tensors, n_tensors, 0) == KL_OK);
    CHECK(kl_model_create(ctx, &twin, &c, tensors, n_tensors, 0) == KL_OK);
    test_embeds_without_ids(ctx, model);
    test_states(ctx, model, twin);
    kl_model_destroy(ctx, model);
    kl_model_destroy(ctx, twin);
    kl_ctx_destroy(ctx);
    free_checkpoint();
    printf("%s: %s\n", __FILE__, failures == 0 ? "ok" : "failed");
    return failures != 0;
}
