/* latent_attention (ops/latent_attention.c). A token's form is decided as on the CPU (ops/pieces.h): expanded in
 * expand.hip, absorbed here: w_uk moves to the query and w_uv behind the sum, so that all heads of a token share one key
 * [latent | k_shared] and one value, the latent (attend.hip).
 *   absorb   v1  one value of q~ = w_uk^T q a thread.     v2  the same for TOGETHER tokens: a weight is read once.
 *   project  v1  one value of o = w_uv acc / l a thread.  v2  a team a row of w_uv, TOGETHER tokens.
 *   count    a team a token with a row of select: its entries, looked at.
 * Tokens go in batches, which bound the scratch. What is wrong in a row of select is noted (runtime.h), and the row ends
 * before it. */
#include "../ops/pieces.h"
#include "attend.h"
#include "expand.h"
#include "product.h"
#include "reduce.h"

namespace
{

const int BLOCK = 256, TEAMS = BLOCK / KL_TEAM, TOGETHER = 8;
const int64_t BATCH = 256;

/* One of the two products of a batch: x [tokens, H, in] with matrices of H heads, y [tokens, H, out]. */
struct product {
    float *y;
    const float *x, *l;     /* l [tokens, H]: y is divided by it; NULL: it is not */
    const int64_t *entries; /* [tokens] positions attended to: y of none is 0; NULL: never none */
    int64_t x_step;         /* from head to head in x */
    const void *const *matrix;
    size_t row_bytes;
    kl_type type;
    bool across; /* an input is a stored row: w_uk, or a transposed w_uv */
    int64_t tokens, H, in, out;
};

template <kl_type TYPE>
__device__ __forceinline__ float weight(const product &p, int64_t h, int64_t out, int64_t in)
{
    const char *data = kl_global(static_cast<const char *>(p.matrix[h]));
    return p.across ? kl_value_at<TYPE>(p.type, data + static_cast<size_t>(in) * p.row_bytes, out)
                    : kl_value_at<TYPE>(p.type, data + static_cast<size_t>(out) * p.row_bytes, in);
}

__device__ __forceinline__ void put(const product &p, int64_t t, int64_t h, int64_t out, float sum)
{
    const int64_t row = t * p.H + h;
    const bool none = p.entries != nullptr && p.entries[t] == 0;
    p.y[row * p.out + out] = none ? 0.0f : p.l != nullptr ? sum / p.l[row] : sum;
}

template <kl_type TYPE>
__global__ void __launch_bounds__(256, 1) latent_product_v1(product p, int64_t first)
{
    const int64_t i = first + static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x;
    if (i >= p.tokens * p.H * p.out)
        return;
    const int64_t out = i % p.out, h = i / p.out % p.H, t = i / p.out / p.H;
    const float *x = p.x + (t * p.H + h) * p.x_step;
    float sum = 0.0f;
    for (int64_t d = 0; d < p.in; d += KL_CHAIN) {
        float chain = 0.0f;
        for (int64_t e = d; e < d + KL_CHAIN && e < p.in; e++)
            chain = fmaf(x[e], weight<TYPE>(p, h, out, e), chain);
        sum += chain;
    }
    put(p, t, h, out, sum);
}

/* v2 of absorb: neighbours have neighbouring outputs, which lie together in a row of w_uk; v1's order. The weights of a
 * whole chain are read before they are used. */
template <kl_type TYPE>
__global__ void __launch_bounds__(256, 1) latent_product_across_v2(product p, int64_t first)
{
    const int64_t i = first + static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x;
    if (i >= (p.tokens + TOGETHER - 1) / TOGETHER * p.H * p.out)
        return;
    const int64_t out = i % p.out, h = i / p.out % p.H, t = i / p.out / p.H * TOGETHER;
    const char *row = kl_global(static_cast<const char *>(p.matrix[h]));
    float sum[TOGETHER] = {};
    int64_t d = 0;
    for (; TYPE != KL_RARE && d + KL_CHAIN <= p.in; d += KL_CHAIN) {
        float w[KL_CHAIN];
        KL_UNROLL
        for (int e = 0; e < KL_CHAIN; e++, row += p.row_bytes)
            w[e] = kl_value_at<TYPE>(p.type, row, out);
        KL_UNROLL
        for (int j = 0; j < TOGETHER; j++) {
            if (t + j >= p.tokens)
                continue;
            const float *x = p.x + ((t + j) * p.H + h) * p.x_step + d;
            float chain = 0.0f;
            KL_UNROLL
            for (int e = 0; e < KL_CHAIN; e++)
                chain = fmaf(x[e], w[e], chain);
            sum[j] += chain;
        }
    }
    for (; d < p.in; d += KL_CHAIN) {
        float chain[TOGETHER] = {};
        for (int64_t e = d; e < d + KL_CHAIN && e < p.in; e++) {
            const float w = weight<TYPE>(p, h, out, e);
            KL_UNROLL
            for (int j = 0; j < TOGETHER; j++)
                if (t + j < p.tokens)
                    chain[j] = fmaf(p.x[((t + j) * p.H + h) * p.x_step + e], w, chain[j]);
        }
        KL_UNROLL
        for (int j = 0; j < TOGETHER; j++)
            sum[j] += chain[j];
    }
    KL_UNROLL
    for (int j = 0; j < TOGETHER; j++)
        if (t + j < p.tokens)
            put(p, t + j, h, out, sum[j]);
}

/* v2 of project: a team a row of w_uv, whose inputs lie together */
template <kl_type TYPE> __global__ void __launch_bounds__(256) latent_product_v2(product p)
{
    const int64_t n = (p.tokens + TOGETHER - 1) / TOGETHER * p.H * p.out;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * TEAMS; first < n;
         first += static_cast<int64_t>(gridDim.x) * TEAMS) {
        const int64_t i = first + kl_team(), out = i % p.out, h = i / p.out % p.H;
        const int64_t t = i / p.out / p.H * TOGETHER;
        const int64_t in = i < n ? p.in : 0; /* a team behind the last only shuffles */
        float acc[TOGETHER] = {};
        for (int64_t e = kl_lane(); e < in; e += KL_TEAM) {
            const float w = weight<TYPE>(p, h, out, e);
            KL_UNROLL
            for (int j = 0; j < TOGETHER; j++)
                if (t + j < p.tokens)
                    acc[j] = fmaf(p.x[((t + j) * p.H + h) * p.x_step + e], w, acc[j]);
        }
        KL_UNROLL
        for (int j = 0; j < TOGETHER; j++) {
            const float sum = kl_team_sum(acc[j]);
            if (kl_lane() == j && i < n && t + j < p.tokens)
                put(p, t + j, h, out, sum);
        }
    }
}

template <kl_type TYPE> void launch(kl_ctx *ctx, const product &p)
{
    const bool oracle = kl_version() == 1;
    const int64_t together = kl_ceil_div(p.tokens, TOGETHER) * p.H * p.out;
    if (!oracle && !p.across) {
        KL_LAUNCH((latent_product_v2<TYPE>), kl_grid(kl_ceil_div(together, TEAMS)), BLOCK, 0,
                  kl_stream(ctx), p);
        return;
    }
    const int64_t blocks = kl_ceil_div(oracle ? p.tokens * p.H * p.out : together, BLOCK);
    for (int64_t first = 0; first < blocks; first += kl_grid(blocks - first))
        if (oracle)
            KL_LAUNCH((latent_product_v1<TYPE>), kl_grid(blocks - first), BLOCK, 0, kl_stream(ctx),
                      p, first * BLOCK);
        else
            KL_LAUNCH((latent_product_across_v2<TYPE>), kl_grid(blocks - first), BLOCK, 0,
                      kl_stream(ctx), p, first * BLOCK);
}

void multiply(kl_ctx *ctx, const product &p)
{
    switch (kl_kernel_type(p.type)) {
#define CASE(TYPE)                                                                                 \
    case TYPE: launch<TYPE>(ctx, p); break;
        KL_KERNEL_TYPES(CASE)
#undef CASE
    default: break; /* known: hip_latent_attention looks */
    }
}

/* entries of tokens a.from .. a.to - 1: the leading ones of a row that are as they must be */
__global__ void __launch_bounds__(256)
    latent_count(kl_attend a, int64_t *entries, unsigned long long *fault)
{
    const int64_t n_tokens = a.to - a.from, W = a.select_width;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * TEAMS; first < n_tokens;
         first += static_cast<int64_t>(gridDim.x) * TEAMS) {
        const bool there = first + kl_team() < n_tokens;
        const int64_t t = a.from + (there ? first + kl_team() : 0);
        const int64_t n = kl_sequence_of(a.offsets, a.N, t);
        const int64_t seen = a.positions[n] - a.offsets[n + 1] + t + 1;
        const bool has_row = there && seen > a.select_from;
        const int32_t *row = a.select + t * W;
        int64_t end = has_row ? W : seen;
        for (int64_t i = has_row ? kl_lane() : W; i < W; i += KL_TEAM) {
            const int32_t s = row[i], before = i > 0 ? row[i - 1] : 0;
            const bool wrong =
                s < -1 || s >= seen || (i > 0 && s >= 0 && (before < 0 || s <= before));
            if (wrong)
                kl_note(fault, t * W + i, s);
            if ((wrong || s < 0) && i < end)
                end = i;
        }
        end = kl_team_least(end);
        if (there && kl_lane() == 0)
            entries[t - a.from] = end;
    }
}

/* What the batches of a call share. */
struct call {
    float *o;
    const float *q;
    const kl_weight *w_uk, *w_uv;
    const void *const *uk, *const *uv; /* the heads' matrices, on the device */
    unsigned long long *fault;         /* of select */
    const kl_latent_attention_args *args;
};

/* tokens a.from .. a.to - 1 */
kl_status run_batch(kl_ctx *ctx, const call &c, kl_attend a)
{
    const kl_latent_attention_args *g = c.args;
    const int64_t tokens = a.to - a.from, H = g->H, R = g->R, width = g->K + g->P;
    float *query;
    int64_t *entries = nullptr;
    if (a.select_width > 0)
        KL_SCRATCH_OF(entries, ctx, tokens);
    KL_SCRATCH_OF(query, ctx, tokens * H * R);
    KL_SCRATCH_OF(a.o, ctx, tokens * H * R);
    KL_SCRATCH_OF(a.l, ctx, tokens * H);
    a.key[0].q = query;
    a.key[0].first = a.from;
    a.entries = entries;
    const product up = {
        query,        c.q + a.from * H * width, nullptr, nullptr, width, c.uk, c.w_uk->row_bytes,
        c.w_uk->type, c.w_uk->transposed == 0,  tokens,  H,       g->K,  R
    };
    const product down = {
        c.o + a.from * H * g->V, a.o,    a.l, entries, R,   c.uv, c.w_uv->row_bytes, c.w_uv->type,
        c.w_uv->transposed != 0, tokens, H,   R,       g->V
    };
    if (!kl_core_of->measuring(ctx) && entries != nullptr)
        KL_LAUNCH(latent_count, kl_grid(kl_ceil_div(tokens, TEAMS)), BLOCK, 0, kl_stream(ctx), a,
                  entries, c.fault);
    if (!kl_core_of->measuring(ctx))
        multiply(ctx, up);
    KL_TRY(kl_attend_run(ctx, a, g->offsets, g->positions));
    if (!kl_core_of->measuring(ctx))
        multiply(ctx, down);
    return KL_OK;
}

/* runs of absorbed tokens: what is left of a sequence goes with the sequences behind it that are absorbed whole */
kl_status run_absorbed(kl_ctx *ctx, const call &c, kl_attend a)
{
    const kl_latent_attention_args *g = c.args;
    const auto expanded =
        kl_core_of->measuring(ctx) ? kl_mla_expanded_least : kl_mla_expanded_tokens;
    for (int64_t n = 0; n < g->N;) {
        const int64_t begin = g->offsets[n] + expanded(g, n);
        for (n++; n < g->N && expanded(g, n) == 0;)
            n++;
        for (int64_t t = begin; t < g->offsets[n]; t += BATCH) {
            const size_t mark = kl_core_of->scratch_mark(ctx);
            a.from = t;
            a.to = t + BATCH < g->offsets[n] ? t + BATCH : g->offsets[n];
            KL_TRY(run_batch(ctx, c, a));
            kl_core_of->scratch_reset(ctx, mark);
        }
    }
    return KL_OK;
}

} // namespace

kl_status hip_latent_attention(kl_ctx *ctx, float *o, const float *q, kl_cache latent,
                               kl_cache k_shared, const kl_weight *w_uk, const kl_weight *w_uv,
                               const kl_latent_attention_args *args)
{
    const int64_t N = args->N, H = args->H, T = args->T, R = args->R, width = args->K + args->P;
    const auto positions = [=](int64_t n) { return args->positions[n]; };
    const auto shared = [=](int64_t n) { return args->P > 0 ? args->positions[n] : 0; };
    call c = { o, q, w_uk, w_uv, nullptr, nullptr, nullptr, args };
    kl_attend a = {};
    if (kl_kernel_type(w_uk->type) < 0)
        return kl_no_type(ctx, "latent_attention", "w_uk", w_uk->type);
    if (kl_kernel_type(w_uv->type) < 0)
        return kl_no_type(ctx, "latent_attention", "w_uv", w_uv->type);
    if (T == 0)
        return KL_OK;
    a.key[0] = kl_attend_part{ nullptr, 0, H * R, R, R, {} };
    a.key[1] = kl_attend_part{ q + args->K, 0, H * width, width, args->P, {} };
    a.N = N;
    a.H = H;
    a.Hkv = 1;
    a.V = R;
    a.scale = args->scale;
    a.select = args->select;
    a.select_width = args->select_width;
    a.select_from = args->select_from;
    if (a.select_width > 0 && !kl_core_of->measuring(ctx))
        KL_TRY(kl_select_fault_of(ctx, &c.fault, a.select_width));
    KL_TRY(kl_put_table(ctx, &a.offsets, args->offsets, N + 1));
    KL_TRY(kl_put_table(ctx, &a.positions, args->positions, N));
    KL_TRY(kl_put_cache(ctx, &a.key[0].cache, latent, N, positions));
    KL_TRY(kl_put_cache(ctx, &a.key[1].cache, k_shared, N, shared));
    KL_TRY(kl_put_table(ctx, &c.uk, w_uk->matrix, H));
    KL_TRY(kl_put_table(ctx, &c.uv, w_uv->matrix, H));
    a.values = a.key[0].cache;
    KL_TRY(kl_expand_run(ctx, { o, q, a.values, a.key[1].cache, w_uk, w_uv, args }));
    KL_TRY(run_absorbed(ctx, c, a));
    return kl_core_of->measuring(ctx) ? KL_OK : kl_launched(ctx, "latent_attention");
}
