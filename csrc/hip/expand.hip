/* latent_attention, expanded (ops/latent_attention.c): segment by segment of 512 positions of a sequence,
 *   k [p, h, :] = [w_uk_h c_p | k_shared_p],   v [p, h, :] = w_uv_h c_p       gathered, and products (product.h)
 *   z [h, t, p] = q_th . k_ph                                                  a product
 *   m, l, weights [h, t, p] = exp(scale z - m)                                 expand_weigh: a team a row
 *   o [t, h, :] = o keep + sum_p weights v                                     expand_values
 * k and v are made once for all tokens of the call; z is there for a chunk of them. What a token does not see is left
 * out by loop bounds, and a segment of which it sees nothing does not touch it: its bytes are its own in any call.
 *   expand_values  v1  one value of o a thread, its sixteen lanes in registers.
 *                  v2  32 tokens x 32 values a block over shared memory (tile.h). The same bytes. */
#include "expand.h"

#include "../ops/pieces.h"
#include "product.h"
#include "tile.h"

namespace
{

const int BLOCK = KL_TILE_BLOCK, TEAMS = BLOCK / KL_TEAM, TILE = KL_TILE, LANES = KL_LANES;
const int64_t SEGMENT = KL_PAGE, CHUNK = 512; /* positions, tokens: they bound the scratch */

/* A segment of sequence n, and a chunk of tokens that all see some of it. */
struct piece {
    float *o;                      /* [tokens, H, V] */
    const float *q;                /* [tokens, H, width] */
    float *latent, *keys, *values; /* [n_positions, R], [., H, width], [., H, V] */
    float *z;                      /* [H, CHUNK or less, z_row] */
    float *m, *l, *keep;           /* [tokens, H] */
    int64_t n, p0, n_positions;
    int64_t tokens, seen; /* token t sees positions to p0 + seen + t */
    int64_t H, K, P, V, R, z_row, z_head;
    float scale;
};

__device__ __forceinline__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* positions of the segment that token t sees */
__device__ __forceinline__ int64_t seen_by(const piece &a, int64_t t)
{
    return least(a.seen + t, a.n_positions);
}

/* the part of the keys that is shared, for each head, and the latents in float32 */
__global__ void __launch_bounds__(256) expand_gather(piece a, kl_cached latent, kl_cached k_shared)
{
    for (int64_t p = blockIdx.x; p < a.n_positions; p += gridDim.x) {
        const char *row = kl_cached_row(latent, a.n, a.p0 + p);
        for (int64_t d = threadIdx.x; d < a.R; d += BLOCK)
            a.latent[p * a.R + d] = kl_cached_value(latent.type, row, d);
        if (a.P == 0)
            continue;
        const char *shared = kl_cached_row(k_shared, a.n, a.p0 + p);
        for (int64_t d = kl_lane(); d < a.P; d += KL_TEAM) {
            const float x = kl_cached_value(k_shared.type, shared, d);
            for (int64_t h = kl_team(); h < a.H; h += TEAMS)
                a.keys[(p * a.H + h) * (a.K + a.P) + a.K + d] = x;
        }
    }
}

/* z to weights; m and l to what they are with this segment */
__global__ void __launch_bounds__(256) expand_weigh(piece a)
{
    const int64_t n = a.tokens * a.H, step = static_cast<int64_t>(gridDim.x) * TEAMS;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * TEAMS; first < n; first += step) {
        const int64_t i = first + kl_team(), t = i / a.H, h = i % a.H;
        const int64_t seen = i < n ? seen_by(a, t) : 0; /* a team behind the last: nothing */
        float *row = a.z + h * a.z_head + t * a.z_row;
        float z[SEGMENT / KL_TEAM], top = -INFINITY, sum = 0.0f;
        KL_UNROLL
        for (int j = 0; j < SEGMENT / KL_TEAM; j++) {
            const int64_t p = kl_lane() + KL_TEAM * j;
            z[j] = p < seen ? row[p] * a.scale : -INFINITY;
            top = z[j] > top ? z[j] : top; /* not where it is NaN */
        }
        top = kl_team_max(top);
        const float m = i < n && a.p0 > 0 ? a.m[i] : -INFINITY;
        const float now = top > m ? top : m, shift = now == -INFINITY ? 0.0f : now;
        KL_UNROLL
        for (int j = 0; j < SEGMENT / KL_TEAM; j++) {
            const int64_t p = kl_lane() + KL_TEAM * j;
            if (p < seen) {
                z[j] = kl_exp(z[j] - shift);
                row[p] = z[j];
                sum += z[j];
            }
        }
        sum = kl_team_sum(sum);
        if (kl_lane() == 0 && i < n) {
            const float keep = kl_exp(m - shift);
            a.l[i] = a.p0 > 0 ? fmaf(a.l[i], keep, sum) : sum;
            a.m[i] = now;
            a.keep[i] = keep;
        }
    }
}

/* o with the segment; behind the last that the token sees, divided */
__device__ __forceinline__ void put(const piece &a, int64_t t, int64_t h, int64_t d, float sum)
{
    const int64_t i = t * a.H + h;
    float *o = a.o + i * a.V + d;
    if (a.p0 > 0)
        sum = fmaf(*o, a.keep[i], sum);
    *o = a.seen + t <= SEGMENT ? sum / a.l[i] : sum;
}

__global__ void __launch_bounds__(256) expand_values_v1(piece a)
{
    const int64_t n = a.tokens * a.H * a.V, step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < n; i += step) {
        const int64_t d = i % a.V, h = i / a.V % a.H, t = i / a.V / a.H, seen = seen_by(a, t);
        const float *weight = a.z + h * a.z_head + t * a.z_row;
        float lane[LANES] = {};
        for (int64_t p = 0; p < seen; p += LANES)
            for (int j = 0; j < LANES; j++)
                if (p + j < seen)
                    lane[j] = fmaf(weight[p + j], a.values[((p + j) * a.H + h) * a.V + d], lane[j]);
        for (int half = LANES / 2; half >= 1; half /= 2)
            for (int j = 0; j < half; j++)
                lane[j] += lane[j + half];
        put(a, t, h, d, lane[0]);
    }
}

__global__ void __launch_bounds__(256) expand_values_v2(piece a, int64_t first)
{
    KL_SHARED(float, xs, [KL_TILE_K][TILE + 1]);
    KL_SHARED(float, ws, [KL_TILE_K][TILE + 1]);
    const kl_tile_place at = kl_tile_place_of();
    const int64_t across = (a.V + TILE - 1) / TILE, down = (a.tokens + TILE - 1) / TILE;
    const int64_t task = first + blockIdx.x;
    const int64_t d0 = task % across * TILE, t0 = task / across % down * TILE;
    const int64_t h = task / across / down;
    const int rows = static_cast<int>(least(TILE, a.tokens - t0)),
              columns = static_cast<int>(least(TILE, a.V - d0));
    const int n = static_cast<int>(a.n_positions),
              all = static_cast<int>(least(a.seen + t0, SEGMENT)); /* row i: all + i, up to n */
    const int end = all + rows - 1 < n ? all + rows - 1 : n;
    const float *z = a.z + h * a.z_head + t0 * a.z_row, *v = a.values + h * a.V + d0;
    kl_tile_sums acc = {};
    for (int p0 = 0; p0 < end; p0 += KL_TILE_K) {
        kl_tile_load<false, true>(xs, [&](int, int i, int k) {
            return i < rows && p0 + k < end ? z[i * a.z_row + p0 + k] : 0.0f;
        });
        kl_tile_load<true, true>(ws, [&](int, int i, int k) {
            return i < columns && p0 + k < end ? v[(p0 + k) * (a.H * a.V) + i] : 0.0f;
        });
        __syncthreads();
        const bool whole = p0 + KL_TILE_K <= all && p0 + KL_TILE_K <= n;
        kl_tile_multiply(acc, xs, ws, at,
                         [=](int i, int k) { return whole || (p0 + k < n && p0 + k < all + i); });
        __syncthreads();
    }
    kl_tile_finish(acc, at, [&](int i, int j, float sum) {
        if (i < rows && j < columns)
            put(a, t0 + i, h, d0 + j, sum);
    });
}

/* ---- host ---- */

/* What the products of a call share, and its scratch. */
struct call {
    const kl_expansion *e;
    kl_matrices uk, uv;
    piece a; /* of all tokens: m, l and keep begin at the first of the sequence */
};

kl_product product_of(const kl_matrices &w, float *y, const float *x, int64_t T, int64_t D)
{
    kl_product p = {};
    p.w = w;
    p.y = y;
    p.x = x;
    p.T = T;
    p.D = p.x_row = D;
    p.most_groups = kl_ceil_div(T, kl_rows_of_a_group(T)) * w.n;
    return p;
}

/* keys and values of a segment */
kl_status expand(kl_ctx *ctx, const call &c)
{
    const piece &a = c.a;
    const int64_t width = a.K + a.P;
    KL_LAUNCH(expand_gather, kl_grid(a.n_positions), BLOCK, 0, kl_stream(ctx), a, c.e->latent,
              c.e->k_shared);
    kl_product k = product_of(c.uk, a.keys, a.latent, a.n_positions, a.R);
    k.y_row = a.H * width;
    k.y_step = width;
    kl_product v = product_of(c.uv, a.values, a.latent, a.n_positions, a.R);
    v.y_row = a.H * a.V;
    v.y_step = a.V;
    KL_TRY(kl_launch_product(ctx, &k, c.e->w_uk, "latent_attention", "w_uk"));
    return kl_launch_product(ctx, &v, c.e->w_uv, "latent_attention", "w_uv");
}

/* the chunk's tokens with the segment's keys and values */
kl_status attend(kl_ctx *ctx, const piece &a)
{
    const int64_t width = a.K + a.P, last = a.seen + a.tokens - 1;
    const char *first = reinterpret_cast<const char *>(a.keys);
    const size_t row_bytes = static_cast<size_t>(a.H * width) * sizeof(float);
    const kl_matrices keys = { first,
                               nullptr,
                               width * static_cast<int64_t>(sizeof(float)),
                               a.H,
                               last < a.n_positions ? last : a.n_positions,
                               row_bytes,
                               KL_F32 };
    const kl_weight stored = { nullptr, a.H, keys.rows, width, row_bytes, KL_F32, 0 };
    kl_product z = product_of(keys, a.z, a.q, a.tokens, width);
    z.x_row = a.H * width;
    z.x_step = width;
    z.y_row = a.z_row;
    z.y_step = a.z_head;
    KL_TRY(kl_launch_product(ctx, &z, &stored, "latent_attention", "keys"));
    KL_LAUNCH(expand_weigh, kl_grid(kl_ceil_div(a.tokens * a.H, TEAMS)), BLOCK, 0, kl_stream(ctx),
              a);
    const int64_t tiles = kl_ceil_div(a.tokens, TILE) * kl_ceil_div(a.V, TILE) * a.H;
    if (kl_version() == 1)
        KL_LAUNCH(expand_values_v1, kl_grid(kl_ceil_div(a.tokens * a.H * a.V, BLOCK)), BLOCK, 0,
                  kl_stream(ctx), a);
    else
        for (int64_t tile = 0; tile < tiles; tile += kl_grid(tiles - tile))
            KL_LAUNCH(expand_values_v2, kl_grid(tiles - tile), BLOCK, 0, kl_stream(ctx), a, tile);
    return KL_OK;
}

kl_status run_sequence(kl_ctx *ctx, call c, int64_t n)
{
    const kl_latent_attention_args *g = c.e->args;
    const int64_t tokens = kl_mla_expanded_tokens(g, n), seen = kl_mla_seen(g, n, 0),
                  all = tokens > 0 ? kl_mla_seen(g, n, tokens - 1) : 0;
    c.a.n = n;
    for (int64_t p0 = 0; p0 < all; p0 += SEGMENT) {
        c.a.p0 = p0;
        c.a.n_positions = all - p0 < SEGMENT ? all - p0 : SEGMENT;
        KL_TRY(expand(ctx, c));
        for (int64_t t = p0 >= seen ? p0 + 1 - seen : 0; t < tokens; t += CHUNK) {
            piece a = c.a;
            const int64_t row = (g->offsets[n] + t) * g->H;
            a.o = c.e->o + row * g->V;
            a.q = c.e->q + row * (g->K + g->P);
            a.m += t * g->H;
            a.l += t * g->H;
            a.keep += t * g->H;
            a.seen = seen + t - p0;
            a.tokens = tokens - t < CHUNK ? tokens - t : CHUNK;
            KL_TRY(attend(ctx, a));
        }
    }
    return KL_OK;
}

/* scratch for the longest sequence of the call */
kl_status take_scratch(kl_ctx *ctx, call *c, int64_t tokens, int64_t positions)
{
    piece &a = c->a;
    const int64_t chunk = tokens < CHUNK ? tokens : CHUNK;
    a.z_row = positions < SEGMENT ? positions : SEGMENT;
    a.z_head = chunk * a.z_row;
    KL_SCRATCH_OF(a.latent, ctx, a.z_row * a.R);
    KL_SCRATCH_OF(a.keys, ctx, a.z_row * a.H * (a.K + a.P));
    KL_SCRATCH_OF(a.values, ctx, a.z_row * a.H * a.V);
    KL_SCRATCH_OF(a.z, ctx, a.H * a.z_head);
    KL_SCRATCH_OF(a.m, ctx, tokens * a.H);
    KL_SCRATCH_OF(a.l, ctx, tokens * a.H);
    KL_SCRATCH_OF(a.keep, ctx, tokens * a.H);
    KL_TRY(kl_matrices_of(ctx, &c->uk, c->e->w_uk));
    return kl_matrices_of(ctx, &c->uv, c->e->w_uv);
}

} // namespace

kl_status kl_expand_run(kl_ctx *ctx, const kl_expansion &e)
{
    const kl_latent_attention_args *g = e.args;
    const size_t mark = kl_core_of->scratch_mark(ctx);
    int64_t tokens = 0, positions = 0;
    call c = {};
    for (int64_t n = 0; n < g->N; n++) {
        const int64_t more =
            kl_core_of->measuring(ctx) ? kl_mla_expanded_most(g, n) : kl_mla_expanded_tokens(g, n);
        if (more == 0)
            continue;
        tokens = more > tokens ? more : tokens;
        positions = g->positions[n] > positions ? g->positions[n] : positions;
    }
    if (tokens == 0)
        return KL_OK;
    c.e = &e;
    c.a.H = g->H;
    c.a.K = g->K;
    c.a.P = g->P;
    c.a.V = g->V;
    c.a.R = g->R;
    c.a.scale = g->scale;
    KL_TRY(take_scratch(ctx, &c, tokens, positions));
    for (int64_t n = 0; n < g->N && !kl_core_of->measuring(ctx); n++)
        KL_TRY(run_sequence(ctx, c, n));
    kl_core_of->scratch_reset(ctx, mark);
    return KL_OK;
}
