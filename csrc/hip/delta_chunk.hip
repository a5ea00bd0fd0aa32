/* delta_rule in chunks of up to 16 tokens (docs/math.md#chunked), the state of 64 columns in the registers of a block:
 *     u_i = S^T start_k_i     d_i = beta_i (v_i - u_i) - sum_{j < i} L_ij d_j
 *     o_i = S^T start_q_i + sum_{j <= i} P_ij d_j         S = Diag(decay) S + sum_j end_j d_j^T
 * Every decay is a product of the factors in between: key j is decayed by row after row and meets each, 16 threads a
 * key; after the last row it is end_j. Triangles end at the diagonal by loop bounds.
 * A chunk of args->chunk tokens is run in blocks of 16 from its first token on: without matrix instructions longer
 * triangles cost more than they save.
 * A column whose o, or whose chunk's L or P, is not finite is run by the recurrence, as on the CPU. */
#include "delta.h"

namespace
{

const int BLOCK = 128, TOKENS = KL_DELTA_BLOCK, SLICES = 16;
const int COLUMNS = BLOCK / KL_DELTA_LANES * KL_DELTA_COLS; /* 64 */

/* of each pass anew, so that what a pass makes of it is not kept for the next */
__device__ __forceinline__ int thread()
{
    return kl_forget(static_cast<int>(threadIdx.x)) & (BLOCK - 1);
}

/* A block's place in shared memory. k and q become start_k and start_q, us (u, then S^T start_q) d and o. */
struct room {
    kl_shared<float> alpha, q, k, end; /* [TOKENS][width] */
    kl_shared<float> decay;            /* [width] */
    kl_shared<float> kk, qk;           /* [TOKENS][TOKENS]: L, P; their triangles */
    kl_shared<float> u, qs;            /* [TOKENS][COLUMNS] */
    kl_shared<float> bad;              /* [COLUMNS]: 1 where the recurrence is to run */
    kl_shared<float> parts;            /* of a sum over the block */
    int width;
};

/* factors of n tokens from t on */
__device__ __forceinline__ void fill(const room &s, const kl_delta &a, const kl_delta_task &p,
                                     int64_t t, int n)
{
    for (int j = thread(); j < n * s.width; j += BLOCK) {
        const int r = j / s.width, at = j % s.width;
        if (at < a.K) {
            const int64_t key = kl_delta_key(a, p, t + r, at);
            s.alpha[j] = kl_delta_alpha(a, p, t + r, at);
            s.q[j] = a.q[key] * a.scale;
            s.k[j] = a.k[key];
        }
    }
    __syncthreads();
}

/* L, P and end. Thread `slice` of key j has every sixteenth channel. */
template <int ROWS, bool WHOLE>
__device__ __forceinline__ void meet(const room &s, const kl_delta &a, const kl_delta_task &p,
                                     int64_t t, int n)
{
    const int OWN = ROWS * KL_DELTA_LANES / SLICES, slice = thread() % SLICES;
    const int channels = (static_cast<int>(a.K) - slice + SLICES - 1) / SLICES;
    for (int j = thread() / SLICES; j < TOKENS; j += BLOCK / SLICES) {
        float key[OWN] = {};
        for (int i = 0; i < n; i++) {
            const kl_delta_inside<WHOLE> in = { kl_forget(channels), 0 };
            float of_k = 0.0f, of_q = 0.0f;
            if (j <= i) {
                KL_UNROLL
                for (int m = 0; m < OWN; m++)
                    if (in.row(m)) {
                        const int row = i * s.width + slice + SLICES * m;
                        const float ki = s.k[row], qi = s.q[row], ai = s.alpha[row];
                        key[m] = j == i ? ki : ai * key[m];
                        of_k = fmaf(ki, key[m], of_k);
                        of_q = fmaf(qi, key[m], of_q);
                    }
            }
            of_k = kl_team_reduce<kl_add_of>(of_k, SLICES);
            of_q = kl_team_reduce<kl_add_of>(of_q, SLICES);
            if (slice == 0 && j <= i) {
                s.kk[i * TOKENS + j] = a.beta[(p.first + t + i) * a.Hv + p.head] * of_k;
                s.qk[i * TOKENS + j] = of_q;
            }
        }
        const kl_delta_inside<WHOLE> in = { kl_forget(channels), 0 };
        KL_UNROLL
        for (int m = 0; m < OWN; m++)
            if (j < n && in.row(m))
                s.end[j * s.width + slice + SLICES * m] = key[m];
    }
    __syncthreads();
}

/* start_k, start_q in place of k, q */
__device__ __forceinline__ void begin(const room &s, const kl_delta &a, int n)
{
    const int at = thread();
    if (at < a.K) {
        float decay = 1.0f;
        for (int i = 0; i < n; i++) {
            const float alpha = s.alpha[i * s.width + at];
            decay = decay * alpha;
            s.k[i * s.width + at] *= decay;
            s.q[i * s.width + at] *= decay;
        }
        s.decay[at] = decay;
    }
    __syncthreads();
}

/* u = S^T start_k and S^T start_q */
template <int ROWS, bool WHOLE>
__device__ __forceinline__ void ask(const room &s, const kl_delta_state<ROWS, WHOLE> &x, int n)
{
    const int column = thread() / KL_DELTA_LANES * KL_DELTA_COLS;
    for (int i = 0; i < n; i++) {
        const kl_delta_inside<WHOLE> in = kl_delta_inside_of(x);
        const int lane = kl_forget(x.lane);
        float u[KL_DELTA_COLS] = {}, qs[KL_DELTA_COLS] = {};
        KL_UNROLL
        for (int r = 0; r < ROWS; r++)
            if (in.row(r)) {
                const int at = i * s.width + lane + KL_DELTA_LANES * r;
                const float ki = s.k[at], qi = s.q[at];
                KL_UNROLL
                for (int c = 0; c < KL_DELTA_COLS; c++) {
                    u[c] = fmaf(ki, x.s[c][r], u[c]);
                    qs[c] = fmaf(qi, x.s[c][r], qs[c]);
                }
            }
        const int last = kl_forget(x.lane);
        KL_UNROLL
        for (int c = 0; c < KL_DELTA_COLS; c++) {
            u[c] = kl_team_reduce<kl_add_of>(u[c], KL_DELTA_LANES);
            qs[c] = kl_team_reduce<kl_add_of>(qs[c], KL_DELTA_LANES);
            if (last == c)
                s.u[i * COLUMNS + column + c] = u[c];
            if (last == c + KL_DELTA_COLS)
                s.qs[i * COLUMNS + column + c] = qs[c];
        }
    }
    __syncthreads();
}

/* d in place of u, o in place of S^T start_q and, if it is finite, written; a thread a column. Whether a column is to be
 * run by the recurrence. */
__device__ __forceinline__ void solve(const room &s, const kl_delta &a, const kl_delta_task &p,
                                      int64_t t, int n, bool write)
{
    const int column = thread();
    const int64_t c = p.tile * COLUMNS + column, row = (p.first + t) * a.Hv + p.head;
    if (column >= COLUMNS)
        return;
    const int here = c < a.V ? n : 0;
    float d[TOKENS], finite = 0.0f; /* 0 x is NaN where x is not finite */
    KL_UNROLL
    for (int i = 0; i < TOKENS; i++) {
        d[i] = 0.0f;
        if (i < kl_forget(here)) {
            const int64_t at = row + kl_forget(i) * a.Hv;
            d[i] = a.beta[at] * (a.v[at * a.V + c] - s.u[i * COLUMNS + column]);
        }
    }
    KL_UNROLL
    for (int i = 0; i < TOKENS; i++)
        if (i < kl_forget(here)) {
            const int own = i * COLUMNS + column, triangle = kl_forget(i * TOKENS);
            KL_UNROLL
            for (int j = 0; j < i; j++) {
                const float kk = s.kk[triangle + j];
                d[i] = fmaf(-kk, d[j], d[i]);
                finite = fmaf(0.0f, kk, finite);
            }
            float o = s.qs[own];
            KL_UNROLL
            for (int j = 0; j <= i; j++) {
                const float qk = s.qk[triangle + j];
                o = fmaf(qk, d[j], o);
                finite = fmaf(0.0f, qk, finite);
            }
            finite = fmaf(0.0f, o, finite);
            s.u[own] = d[i];
            s.qs[own] = o;
        }
    s.bad[column] = finite == 0.0f ? 0.0f : 1.0f;
    for (int i = 0; i < here && finite == 0.0f && write; i++)
        a.o[(row + i * a.Hv) * a.V + c] = s.qs[i * COLUMNS + column];
}

/* what the n tokens leave of the state, and write */
template <int ROWS, bool WHOLE>
__device__ __forceinline__ void leave(const room &s, kl_delta_state<ROWS, WHOLE> &x,
                                      const float (&bad)[KL_DELTA_COLS], int n)
{
    const int column = thread() / KL_DELTA_LANES * KL_DELTA_COLS;
    const kl_delta_inside<WHOLE> first = kl_delta_inside_of(x);
    const int own = kl_forget(x.lane);
    KL_UNROLL
    for (int r = 0; r < ROWS; r++)
        if (first.row(r)) {
            const float decay = s.decay[own + KL_DELTA_LANES * r];
            KL_UNROLL
            for (int c = 0; c < KL_DELTA_COLS; c++)
                x.s[c][r] = bad[c] == 0.0f ? decay * x.s[c][r] : x.s[c][r];
        }
    for (int j = 0; j < n; j++) {
        const kl_delta_inside<WHOLE> in = kl_delta_inside_of(x);
        const int lane = kl_forget(x.lane);
        float d[KL_DELTA_COLS];
        KL_UNROLL
        for (int c = 0; c < KL_DELTA_COLS; c++) {
            d[c] = 0.0f;
            if (in.column(c))
                d[c] = s.u[j * COLUMNS + column + c];
        }
        KL_UNROLL
        for (int r = 0; r < ROWS; r++)
            if (in.row(r)) {
                const float end = s.end[j * s.width + lane + KL_DELTA_LANES * r];
                KL_UNROLL
                for (int c = 0; c < KL_DELTA_COLS; c++)
                    x.s[c][r] = bad[c] == 0.0f ? fmaf(end, d[c], x.s[c][r]) : x.s[c][r];
            }
    }
}

/* n tokens from t on, one by one, on the columns that are bad */
template <int ROWS, bool WHOLE>
__device__ __forceinline__ void
recur(const room &s, const kl_delta &a, const kl_delta_task &p, kl_delta_state<ROWS, WHOLE> &x,
      const float (&bad)[KL_DELTA_COLS], int64_t t, int n, bool write)
{
    fill(s, a, p, t, n);
    for (int i = 0; i < n; i++)
        kl_delta_token(x, a, p, t + i, s.alpha + i * s.width, s.q + i * s.width, s.k + i * s.width,
                       write, [&](int c) { return bad[c] != 0.0f; });
    __syncthreads();
}

/* n tokens from t on, as a chunk or one by one; o is written if `write` */
template <int ROWS, bool WHOLE>
__device__ __forceinline__ void run(const room &s, const kl_delta &a, const kl_delta_task &p,
                                    kl_delta_state<ROWS, WHOLE> &x, int64_t t, int n, bool as_chunk,
                                    bool write)
{
    const int column = thread() / KL_DELTA_LANES * KL_DELTA_COLS;
    float bad[KL_DELTA_COLS];
    if (as_chunk) {
        fill(s, a, p, t, n);
        meet<ROWS, WHOLE>(s, a, p, t, n);
        begin(s, a, n);
        ask(s, x, n);
        solve(s, a, p, t, n, write);
        __syncthreads();
    }
    float any = as_chunk ? 0.0f : 1.0f;
    KL_UNROLL
    for (int c = 0; c < KL_DELTA_COLS; c++) {
        bad[c] = 1.0f;
        if (as_chunk)
            bad[c] = s.bad[column + c];
        any = kl_larger(any, bad[c]);
    }
    if (as_chunk)
        leave(s, x, bad, n);
    if (kl_block_max<BLOCK>(any, s.parts) != 0.0f) /* the same in every thread */
        recur(s, a, p, x, bad, t, n, write);
}

/* x for what is kept */
template <int ROWS, bool WHOLE>
__device__ __forceinline__ void swap(kl_delta_state<ROWS, WHOLE> &x, const kl_delta &a, float *kept)
{
    const kl_delta_inside<WHOLE> in = kl_delta_inside_of(x);
    const int lane = kl_forget(x.lane);
    KL_UNROLL
    for (int r = 0; r < ROWS; r++) {
        const int64_t at = (lane + KL_DELTA_LANES * r) * a.V + x.c0;
        KL_UNROLL
        for (int c = 0; c < KL_DELTA_COLS; c++)
            if (in.row(r) && in.column(c)) {
                const float before = kept[at + c];
                kept[at + c] = x.s[c][r];
                x.s[c][r] = before;
            }
    }
}

/* tokens of the block at t: it ends with a chunk, or with the sequence */
__device__ __forceinline__ int tokens_at(const kl_delta &a, const kl_delta_task &p, int64_t t)
{
    int64_t n = p.tokens - t;
    if (a.chunk > 0 && n > a.chunk - t % a.chunk)
        n = a.chunk - t % a.chunk;
    return n < TOKENS ? static_cast<int>(n) : TOKENS;
}

template <int ROWS, bool WHOLE> __global__ void __launch_bounds__(128, 1) delta_rule_v3(kl_delta a)
{
    const int WIDTH = ROWS * KL_DELTA_LANES;
    KL_SHARED(float, alpha, [TOKENS * WIDTH]);
    KL_SHARED(float, q, [TOKENS * WIDTH]);
    KL_SHARED(float, k, [TOKENS * WIDTH]);
    KL_SHARED(float, end, [TOKENS * WIDTH]);
    KL_SHARED(float, decay, [WIDTH]);
    KL_SHARED(float, kk, [TOKENS * TOKENS]);
    KL_SHARED(float, qk, [TOKENS * TOKENS]);
    KL_SHARED(float, u, [TOKENS * COLUMNS]);
    KL_SHARED(float, qs, [TOKENS * COLUMNS]);
    KL_SHARED(float, bad, [COLUMNS]);
    KL_SHARED(float, parts, [BLOCK / KL_TEAM]);
    const room s = { alpha, q, k, end, decay, kk, qk, u, qs, bad, parts, WIDTH };
    if (WHOLE)
        a.K = WIDTH;
    kl_delta_task p = kl_delta_task_of(a, a.first + blockIdx.x);
    float *to = kl_delta_head(a, p, kl_state_of(a.out, p.n));
    kl_delta_state<ROWS, WHOLE> x;
    kl_delta_place(x, a, p.tile * COLUMNS);
    kl_delta_load(x, a, kl_delta_head(a, p, kl_state_of(a.in, p.n)));
    kl_delta_keep(x, a, p, 0);
    for (int64_t t = 0; t < p.tokens;) {
        const int n = tokens_at(a, p, t);
        /* to a mark inside of the block: the state after it goes to `kept`, and x stays what it is */
        const bool aside = p.mark < p.mark_end && a.marks[p.mark] < t + n;
        float *kept = kl_delta_head(a, p, a.kept + p.mark * a.Hv * a.K * a.V);
        if (aside)
            kl_delta_store(x, a, kept);
        run(s, a, p, x, t, aside ? static_cast<int>(a.marks[p.mark] - t) : n,
            a.chunk > 0 || (!aside && n == TOKENS), !aside);
        if (aside) {
            swap(x, a, kept);
            p.mark++;
        } else {
            t += n;
            kl_delta_keep(x, a, p, t);
        }
    }
    if (to != nullptr)
        kl_delta_store(x, a, to);
}

template <int ROWS> void launch(kl_ctx *ctx, kl_delta a)
{
    const int64_t tasks = a.N * a.Hv * a.tiles;
    const bool whole = a.K == ROWS * KL_DELTA_LANES && a.V % COLUMNS == 0;
    for (a.first = 0; a.first < tasks; a.first += kl_grid(tasks - a.first))
        if (whole)
            KL_LAUNCH((delta_rule_v3<ROWS, true>), kl_grid(tasks - a.first), BLOCK, 0,
                      kl_stream(ctx), a);
        else
            KL_LAUNCH((delta_rule_v3<ROWS, false>), kl_grid(tasks - a.first), BLOCK, 0,
                      kl_stream(ctx), a);
}

} // namespace

void kl_delta_chunks(kl_ctx *ctx, kl_delta a)
{
    a.tiles = kl_ceil_div(a.V, COLUMNS);
    if (a.K <= 32)
        launch<4>(ctx, a);
    else if (a.K <= 64)
        launch<8>(ctx, a);
    else
        launch<16>(ctx, a);
}
