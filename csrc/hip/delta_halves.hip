/* delta_rule_intra and delta_rule_inter (ops/delta_halves.c): the halves of the chunked form, to compare kernels with.
 *   v1  one thread a value of L and P, of a column of T, of W and U; then one thread a column of the state. No shared
 *       memory, each decay multiplied anew from its factors. Sums in the CPU's order, but for L and P: chains of 16. */
#include "delta.h"

#include "stored.h"

namespace
{

const int BLOCK = 256;

/* A token's place: row i of a chunk of n tokens, which begins at token `begin` of the sequence. */
struct place {
    kl_delta_task p;
    int64_t row, begin, i, n; /* row: of [T, Hv] */
};
__device__ __forceinline__ place place_of(const kl_delta &a, int64_t row)
{
    place x;
    const int64_t t = row / a.Hv;
    x.row = row;
    x.p = kl_delta_task{};
    x.p.head = row % a.Hv;
    x.p.n = kl_sequence_of(a.offsets, a.N, t);
    x.p.key_head = a.tiled ? x.p.head % a.Hk : x.p.head / (a.Hv / a.Hk);
    x.p.first = a.offsets[x.p.n];
    x.p.tokens = a.offsets[x.p.n + 1] - x.p.first;
    x.i = (t - x.p.first) % a.chunk;
    x.begin = t - x.p.first - x.i;
    x.n = x.p.tokens - x.begin < a.chunk ? x.p.tokens - x.begin : a.chunk;
    return x;
}

/* x times the decays of channel k at rows from .. to of the chunk */
__device__ __forceinline__ float faded(const kl_delta &a, const place &x, float value, int64_t k,
                                       int64_t from, int64_t to)
{
    for (int64_t i = from; i <= to; i++)
        value = kl_delta_alpha(a, x.p, x.begin + i, k) * value;
    return value;
}

struct halves {
    kl_delta a;
    float *L, *P, *T, *W, *U, *d, *start_q, *end_k,
        *decay; /* inter has no L, T; intra none from d on */
};

/* ---- intra ---- */

__global__ void __launch_bounds__(256) delta_rule_intra_v1(halves h, int64_t rows)
{
    const kl_delta &a = h.a;
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; at < rows * a.chunk;
         at += step) {
        const place x = place_of(a, at / a.chunk);
        const int64_t j = at % a.chunk, ti = x.begin + x.i, tj = x.begin + j;
        float of_k = 0.0f, of_q = 0.0f;
        for (int64_t k0 = 0; j <= x.i && k0 < a.K; k0 += KL_CHAIN) {
            float chain_k = 0.0f, chain_q = 0.0f;
            for (int64_t k = k0; k < k0 + KL_CHAIN && k < a.K; k++) {
                const float key = faded(a, x, a.k[kl_delta_key(a, x.p, tj, k)], k, j + 1, x.i);
                chain_k = fmaf(a.k[kl_delta_key(a, x.p, ti, k)], key, chain_k);
                chain_q = fmaf(a.q[kl_delta_key(a, x.p, ti, k)] * a.scale, key, chain_q);
            }
            of_k += chain_k;
            of_q += chain_q;
        }
        h.L[at] = j < x.i ? a.beta[x.row] * of_k : 0.0f;
        h.P[at] = of_q;
    }
}

/* T = (I + L)^-1 by columns: thread j of a chunk fills column j, from its row 0 on */
__global__ void __launch_bounds__(256) delta_rule_intra_inverse(halves h, int64_t rows)
{
    const kl_delta &a = h.a;
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; at < rows * a.chunk;
         at += step) {
        const place x = place_of(a, at / a.chunk);
        const int64_t j = at % a.chunk, next = a.Hv * a.chunk; /* from row to row of the chunk */
        if (x.i > 0)
            continue;
        for (int64_t i = 0; i < x.n; i++) {
            float sum = i == j ? 1.0f : 0.0f;
            for (int64_t m = j; m < i; m++)
                sum = fmaf(-h.L[at - j + i * next + m], h.T[at + m * next], sum);
            h.T[at + i * next] = sum;
        }
    }
}

__global__ void __launch_bounds__(256) delta_rule_intra_wy(halves h, int64_t rows)
{
    const kl_delta &a = h.a;
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK, width = a.K + a.V;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; at < rows * width;
         at += step) {
        const place x = place_of(a, at / width);
        const int64_t c = at % width, k = c < a.K ? c : 0;
        float sum = 0.0f, decay = 1.0f;
        for (int64_t j = 0; j <= x.i; j++) {
            const int64_t row = x.row + (j - x.i) * a.Hv;
            const float rate = h.T[x.row * a.chunk + j] * a.beta[row];
            decay = decay * kl_delta_alpha(a, x.p, x.begin + j, k);
            const float key = decay * a.k[kl_delta_key(a, x.p, x.begin + j, k)];
            sum = fmaf(rate, c < a.K ? key : a.v[row * a.V + c - a.K], sum);
        }
        if (c < a.K)
            h.W[x.row * a.K + c] = sum;
        else
            h.U[x.row * a.V + c - a.K] = sum;
    }
}

/* ---- inter ---- */

/* start q and end k of each token; the whole decay at a chunk's last */
__global__ void __launch_bounds__(256) delta_rule_inter_factors(halves h, int64_t rows)
{
    const kl_delta &a = h.a;
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; at < rows * a.K;
         at += step) {
        const place x = place_of(a, at / a.K);
        const int64_t k = at % a.K, key = kl_delta_key(a, x.p, x.begin + x.i, k);
        const float decay = faded(a, x, 1.0f, k, 0, x.i);
        h.decay[at] = decay;
        h.start_q[at] = decay * (a.q[key] * a.scale);
        h.end_k[at] = faded(a, x, a.k[key], k, x.i + 1, x.n - 1);
    }
}

/* one thread a column of a head's state s, V apart; `row` is the first of the chunk's n */
__device__ void column_chunk(const halves &h, float *s, int64_t row, int64_t c, int64_t n)
{
    const kl_delta &a = h.a;
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = row + i * a.Hv;
        float u = 0.0f, o = 0.0f;
        for (int64_t k = 0; k < a.K; k++) {
            u = fmaf(h.W[at * a.K + k], s[k * a.V], u);
            o = fmaf(h.start_q[at * a.K + k], s[k * a.V], o);
        }
        h.d[at * a.V + c] = h.U[at * a.V + c] - u;
        for (int64_t j = 0; j <= i; j++)
            o = fmaf(h.P[at * a.chunk + j], h.d[(row + j * a.Hv) * a.V + c], o);
        a.o[at * a.V + c] = o;
    }
    for (int64_t k = 0; k < a.K; k++) {
        float sum = h.decay[(row + (n - 1) * a.Hv) * a.K + k] * s[k * a.V];
        for (int64_t j = 0; j < n; j++)
            sum = fmaf(h.end_k[(row + j * a.Hv) * a.K + k], h.d[(row + j * a.Hv) * a.V + c], sum);
        s[k * a.V] = sum;
    }
}

/* aside [N, Hv, K, V]: where the states are worked on that nobody keeps */
__global__ void __launch_bounds__(256) delta_rule_inter_v1(halves h, float *aside)
{
    const kl_delta &a = h.a;
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK, columns = a.Hv * a.V;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < a.N * columns;
         i += step) {
        const int64_t n = i / columns, head = i / a.V % a.Hv, c = i % a.V;
        const int64_t from_head = head * a.K * a.V + c, first = a.offsets[n];
        const int64_t tokens = a.offsets[n + 1] - first;
        const float *from = kl_state_of(a.in, n);
        float *s = a.out.base != nullptr ? kl_state_of(a.out, n) : aside + n * columns * a.K;
        s += from_head;
        for (int64_t k = 0; k < a.K; k++)
            s[k * a.V] = from != nullptr ? from[from_head + k * a.V] : 0.0f;
        for (int64_t t = 0; t < tokens; t += a.chunk)
            column_chunk(h, s, (first + t) * a.Hv + head, c,
                         a.chunk < tokens - t ? a.chunk : tokens - t);
    }
}

/* ---- calls ---- */

unsigned threads_for(int64_t n) { return kl_grid(kl_ceil_div(n, BLOCK)); }

} // namespace

kl_status hip_delta_rule_intra(kl_ctx *ctx, float *L, float *P, float *inverse, float *W, float *U,
                               const float *q, const float *k, const float *v, const float *g,
                               const float *beta, const kl_delta_rule_args *args)
{
    const int64_t rows = args->T * args->Hv;
    halves h = {};
    h.a = kl_delta_call(args, q, k, g);
    h.a.v = v;
    h.a.beta = beta;
    h.L = L;
    h.P = P;
    h.T = inverse;
    h.W = W;
    h.U = U;
    if (rows == 0)
        return KL_OK;
    KL_TRY(kl_put_table(ctx, &h.a.offsets, args->offsets, args->N + 1));
    if (kl_core_of->measuring(ctx))
        return KL_OK;
    const hipStream_t stream = kl_stream(ctx);
    KL_LAUNCH(delta_rule_intra_v1, threads_for(rows * args->chunk), BLOCK, 0, stream, h, rows);
    KL_LAUNCH(delta_rule_intra_inverse, threads_for(rows * args->chunk), BLOCK, 0, stream, h, rows);
    KL_LAUNCH(delta_rule_intra_wy, threads_for(rows * (args->K + args->V)), BLOCK, 0, stream, h,
              rows);
    return kl_launched(ctx, "delta_rule_intra");
}

kl_status hip_delta_rule_inter(kl_ctx *ctx, float *o, kl_slots state_out, float *d, const float *q,
                               const float *k, const float *g, const float *P, const float *W,
                               const float *U, kl_slots state_in, const kl_delta_rule_args *args)
{
    const int64_t N = args->N, rows = args->T * args->Hv, values = rows * args->K;
    const int64_t states = N * args->Hv * args->K * args->V;
    float *aside = nullptr;
    halves h = {};
    h.a = kl_delta_call(args, q, k, g);
    h.a.o = o;
    h.d = d;
    h.P = const_cast<float *>(P);
    h.W = const_cast<float *>(W);
    h.U = const_cast<float *>(U);
    if (N == 0)
        return KL_OK;
    KL_TRY(kl_put_table(ctx, &h.a.offsets, args->offsets, N + 1));
    KL_TRY(kl_put_states(ctx, &h.a.out, state_out, N));
    KL_TRY(kl_put_states(ctx, &h.a.in, state_in, N));
    if (state_out.base == nullptr)
        KL_SCRATCH_OF(aside, ctx, states);
    KL_SCRATCH_OF(h.start_q, ctx, values > 0 ? values : 1);
    KL_SCRATCH_OF(h.end_k, ctx, values > 0 ? values : 1);
    KL_SCRATCH_OF(h.decay, ctx, values > 0 ? values : 1);
    if (kl_core_of->measuring(ctx))
        return KL_OK;
    if (rows > 0)
        KL_LAUNCH(delta_rule_inter_factors, threads_for(values), BLOCK, 0, kl_stream(ctx), h, rows);
    KL_LAUNCH(delta_rule_inter_v1, threads_for(N * args->Hv * args->V), BLOCK, 0, kl_stream(ctx), h,
              aside);
    return kl_launched(ctx, "delta_rule_inter");
}
