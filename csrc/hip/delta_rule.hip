/* delta_rule (ops/delta_rule.c), token by token and in chunks.
 *   v1  one thread a column of a head's state, which lies in device memory; the CPU's order, and its bytes where
 *       nothing is subnormal. Launched for K above 128.
 *   v2  the state in registers: 8 threads share 4 columns, with every eighth row each; the factors of STEP tokens come
 *       through shared memory. Tiles of 128 columns a block, or of 32 where there are few heads.
 *   v3  the same state, 16 tokens at once (delta_chunk.hip); launched for auto's whole blocks and for chunked.
 * l2_norm is the op, once for all heads and columns that read a key.
 * Above K = 128 every form is v1's recurrence: it keeps each form's promise about splits. */
#include "delta.h"

namespace
{

const int BLOCK = 256, STEP = 8, WIDEST = 128;

/* ---- v1 ---- */

__device__ __forceinline__ void column_token(const kl_delta &a, const kl_delta_task &p, float *s,
                                             int64_t t, int64_t c)
{
    const int64_t row = (p.first + t) * a.Hv + p.head;
    float even = 0.0f, odd = 0.0f; /* they change places row by row */
    for (int64_t k = 0; k < a.K; k++) {
        const float faded = kl_delta_alpha(a, p, t, k) * s[k * a.V], last = odd;
        odd = fmaf(a.k[kl_delta_key(a, p, t, k)], faded, even);
        even = last;
        s[k * a.V] = faded;
    }
    const float d = a.beta[row] * (a.v[row * a.V + c] - (even + odd));
    even = odd = 0.0f;
    for (int64_t k = 0; k < a.K; k++) {
        const float written = fmaf(a.k[kl_delta_key(a, p, t, k)], d, s[k * a.V]), last = odd;
        odd = fmaf(a.q[kl_delta_key(a, p, t, k)] * a.scale, written, even);
        even = last;
        s[k * a.V] = written;
    }
    a.o[row * a.V + c] = even + odd;
}

/* aside [N, Hv, K, V]: where the states are worked on that nobody keeps */
__global__ void __launch_bounds__(256, 1) delta_rule_v1(kl_delta a, float *aside)
{
    kl_delta_task p = kl_delta_task_of(a, a.first + blockIdx.x);
    const int64_t c = p.tile * BLOCK + threadIdx.x, K = a.K, V = a.V;
    const float *from = kl_delta_head(a, p, kl_state_of(a.in, p.n));
    float *s = a.out.base != nullptr ? kl_state_of(a.out, p.n) : aside + p.n * a.Hv * K * V;
    if (c >= V)
        return;
    s = kl_delta_head(a, p, s) + c;
    for (int64_t k = 0; k < K; k++)
        s[k * V] = from != nullptr ? from[k * V + c] : 0.0f;
    for (int64_t t = 0;; t++) {
        for (; p.mark < p.mark_end && a.marks[p.mark] == t; p.mark++) {
            float *kept = kl_delta_head(a, p, a.kept + p.mark * a.Hv * K * V);
            for (int64_t k = 0; k < K; k++)
                kept[k * V + c] = s[k * V];
        }
        if (t == p.tokens)
            break;
        column_token(a, p, s, t, c);
    }
}

/* ---- v2 ---- */

template <int ROWS, bool WHOLE> __global__ void __launch_bounds__(256, 1) delta_rule_v2(kl_delta a)
{
    const int WIDTH = ROWS * KL_DELTA_LANES;
    KL_SHARED(float, alpha, [STEP][WIDTH]);
    KL_SHARED(float, q, [STEP][WIDTH]);
    KL_SHARED(float, k, [STEP][WIDTH]);
    if (WHOLE)
        a.K = WIDTH;
    const int columns = static_cast<int>(blockDim.x) / KL_DELTA_LANES * KL_DELTA_COLS;
    for (int64_t i = blockIdx.x; i < a.N * a.Hv * a.tiles; i += gridDim.x) {
        kl_delta_task p = kl_delta_task_of(a, i);
        float *to = kl_delta_head(a, p, kl_state_of(a.out, p.n));
        kl_delta_state<ROWS, WHOLE> x;
        kl_delta_place(x, a, p.tile * columns);
        kl_delta_load(x, a, kl_delta_head(a, p, kl_state_of(a.in, p.n)));
        kl_delta_keep(x, a, p, 0);
        for (int64_t t0 = 0; t0 < p.tokens; t0 += STEP) {
            const int64_t n = p.tokens - t0 < STEP ? p.tokens - t0 : STEP;
            for (int j = static_cast<int>(threadIdx.x); j < n * WIDTH;
                 j += static_cast<int>(blockDim.x)) {
                const int r = j / WIDTH, at = j % WIDTH;
                if (at < a.K) {
                    const int64_t key = kl_delta_key(a, p, t0 + r, at);
                    alpha[r][at] = kl_delta_alpha(a, p, t0 + r, at);
                    q[r][at] = a.q[key] * a.scale;
                    k[r][at] = a.k[key];
                }
            }
            __syncthreads();
            for (int r = 0; r < n; r++) {
                kl_delta_token(x, a, p, t0 + r, alpha[r], q[r], k[r], true,
                               [](int) { return true; });
                kl_delta_keep(x, a, p, t0 + r + 1);
            }
            __syncthreads();
        }
        if (to != nullptr)
            kl_delta_store(x, a, to);
    }
}

template <int ROWS> void recur(kl_ctx *ctx, const kl_delta &given)
{
    kl_delta a = given;
    const int64_t heads = a.N * a.Hv;
    const int threads = a.V > 32 && heads >= 256 ? BLOCK : 64; /* 2 threads a column */
    a.tiles = kl_ceil_div(a.V, threads / 2);
    if (a.K == ROWS * KL_DELTA_LANES && a.V % (threads / 2) == 0)
        KL_LAUNCH((delta_rule_v2<ROWS, true>), kl_grid(heads * a.tiles), threads, 0, kl_stream(ctx),
                  a);
    else
        KL_LAUNCH((delta_rule_v2<ROWS, false>), kl_grid(heads * a.tiles), threads, 0,
                  kl_stream(ctx), a);
}

kl_status normed(kl_ctx *ctx, const float **x, int64_t rows, int64_t K, float eps)
{
    float *y;
    KL_SCRATCH_OF(y, ctx, rows * K > 0 ? rows * K : 1);
    if (!kl_core_of->measuring(ctx))
        KL_TRY(hip_l2_norm(ctx, y, *x, rows, K, eps));
    *x = y;
    return KL_OK;
}

kl_status run(kl_ctx *ctx, kl_delta a, kl_form form)
{
    const int version = kl_version();
    if (version == 1 || a.K > WIDEST) {
        float *aside = nullptr;
        if (a.out.base == nullptr)
            KL_SCRATCH_OF(aside, ctx, a.N * a.Hv * a.K * a.V);
        a.tiles = kl_ceil_div(a.V, BLOCK);
        if (kl_core_of->measuring(ctx))
            return KL_OK;
        const int64_t tasks = a.N * a.Hv * a.tiles;
        for (a.first = 0; a.first < tasks; a.first += kl_grid(tasks - a.first))
            KL_LAUNCH(delta_rule_v1, kl_grid(tasks - a.first), BLOCK, 0, kl_stream(ctx), a, aside);
        return KL_OK;
    }
    if (kl_core_of->measuring(ctx))
        return KL_OK;
    if (version >= 3 && form != KL_FORM_RECURRENT)
        kl_delta_chunks(ctx, a);
    else if (a.K <= 32)
        recur<4>(ctx, a);
    else if (a.K <= 64)
        recur<8>(ctx, a);
    else
        recur<16>(ctx, a);
    return KL_OK;
}

} // namespace

kl_status hip_delta_rule(kl_ctx *ctx, float *o, kl_slots state_out, const float *q, const float *k,
                         const float *v, const float *g, const float *beta, kl_slots state_in,
                         const kl_delta_rule_args *args)
{
    const int64_t N = args->N, keys = args->T * args->Hk;
    const kl_form form = args->form == KL_FORM_AUTO ? kl_core_of->delta_rule(ctx) : args->form;
    kl_delta a = kl_delta_call(args, q, k, g);
    a.o = o;
    a.v = v;
    a.beta = beta;
    a.kept = args->kept;
    a.chunk = form != KL_FORM_CHUNKED ? 0 : args->chunk > 0 ? args->chunk : 64;
    if (N == 0)
        return KL_OK;
    KL_TRY(kl_put_table(ctx, &a.offsets, args->offsets, N + 1));
    KL_TRY(kl_put_states(ctx, &a.out, state_out, N));
    KL_TRY(kl_put_states(ctx, &a.in, state_in, N));
    if (args->checkpoints != nullptr) {
        KL_TRY(kl_put_table(ctx, &a.marks, args->checkpoints, args->checkpoint_offsets[N]));
        KL_TRY(kl_put_table(ctx, &a.mark_offsets, args->checkpoint_offsets, N + 1));
    }
    if (args->l2_norm) {
        KL_TRY(normed(ctx, &a.q, keys, a.K, args->l2_eps));
        KL_TRY(normed(ctx, &a.k, keys, a.K, args->l2_eps));
    }
    KL_TRY(run(ctx, a, form));
    return kl_core_of->measuring(ctx) ? KL_OK : kl_launched(ctx, "delta_rule");
}
