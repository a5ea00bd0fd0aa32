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
    for (int j = static_cast<int>(threadIdx.x); j < n * s.width; j += BLOCK) {
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
template <int ROWS>
__device__ __forceinline__ void meet(const room &s, const kl_delta &a, const kl_delta_task &p,
                                     int64_t t, int n)
{
    const int OWN = ROWS * KL_DELTA_LANES / SLICES, slice = static_cast<int>(threadIdx.x) % SLICES;
    for (int j = static_cast<int>(threadIdx.x) / SLICES; j < TOKENS; j += BLOCK / SLICES) {
        float key[OWN] = {};
        for (int i = 0; i < n; i++) {
            float of_k = 0.0f, of_q = 0.0f;
            if (j <= i) {
                KL_UNROLL
                for (int m = 0; m < OWN; m++) {
                    const int at = slice + SLICES * m, row = i * s.width + at;
                    if (at < a.K) {
                        const float ki = s.k[row], qi = s.q[row], ai = s.alpha[row];
                        key[m] = j == i ? ki : ai * key[m];
                        of_k = fmaf(ki, key[m], of_k);
                        of_q = fmaf(qi, key[m], of_q);
                    }
                }
            }
            of_k = kl_team_reduce<kl_add_of>(of_k, SLICES);
            of_q = kl_team_reduce<kl_add_of>(of_q, SLICES);
            if (slice == 0 && j <= i) {
                s.kk[i * TOKENS + j] = a.beta[(p.first + t + i) * a.Hv + p.head] * of_k;
                s.qk[i * TOKENS + j] = of_q;
            }
        }
        KL_UNROLL
        for (int m = 0; m < OWN; m++)
            if (j < n && slice + SLICES * m < a.K)
                s.end[j * s.width + slice + SLICES * m] = key[m];
    }
    __syncthreads();
}

/* start_k, start_q in place of k, q */
__device__ __forceinline__ void begin(const room &s, const kl_delta &a, int n)
{
    const int at = static_cast<int>(threadIdx.x);
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
template <int ROWS>
__device__ __forceinline__ void ask(const room &s, const kl_delta &a, const kl_delta_state<ROWS> &x,
                                    int n)
{
    const int column = static_cast<int>(threadIdx.x) / KL_DELTA_LANES * KL_DELTA_COLS;
    for (int i = 0; i < n; i++) {
        float u[KL_DELTA_COLS] = {}, qs[KL_DELTA_COLS] = {};
        KL_UNROLL
        for (int r = 0; r < ROWS; r++) {
            const int at = x.lane + KL_DELTA_LANES * r;
            if (at < a.K) {
                const float ki = s.k[i * s.width + at], qi = s.q[i * s.width + at];
                KL_UNROLL
                for (int c = 0; c < KL_DELTA_COLS; c++) {
                    u[c] = fmaf(ki, x.s[c][r], u[c]);
                    qs[c] = fmaf(qi, x.s[c][r], qs[c]);
                }
            }
        }
        KL_UNROLL
        for (int c = 0; c < KL_DELTA_COLS; c++) {
            u[c] = kl_team_reduce<kl_add_of>(u[c], KL_DELTA_LANES);
            qs[c] = kl_team_reduce<kl_add_of>(qs[c], KL_DELTA_LANES);
            if (x.lane == c)
                s.u[i * COLUMNS + column + c] = u[c];
            if (x.lane == c + KL_DELTA_COLS)
                s.qs[i * COLUMNS + column + c] = qs[c];
        }
    }
    __syncthreads();
}

/* d in place of u, o; a thread a column. Whether a column is to be run by the recurrence. */
__device__ __forceinline__ void solve(const room &s, const kl_delta &a, const kl_delta_task &p,
                                      int64_t t, int n, bool write)
{
    const int column = static_cast<int>(threadIdx.x);
    const int64_t c = p.tile * COLUMNS + column;
    if (column >= COLUMNS)
        return;
    float d[TOKENS], o[TOKENS], finite = 0.0f; /* 0 x is NaN where x is not finite */
    KL_UNROLL
    for (int i = 0; i < TOKENS; i++) {
        d[i] = o[i] = 0.0f;
        if (i < n && c < a.V) {
            const int64_t row = (p.first + t + i) * a.Hv + p.head;
            const float u = s.u[i * COLUMNS + column];
            d[i] = a.beta[row] * (a.v[row * a.V + c] - u);
            o[i] = s.qs[i * COLUMNS + column];
            KL_UNROLL
            for (int j = 0; j <= i; j++) {
                if (j < i) {
                    const float kk = s.kk[i * TOKENS + j];
                    d[i] = fmaf(-kk, d[j], d[i]);
                    finite = fmaf(0.0f, kk, finite);
                }
                const float qk = s.qk[i * TOKENS + j];
                finite = fmaf(0.0f, qk, finite);
            }
            KL_UNROLL
            for (int j = 0; j <= i; j++)
                o[i] = fmaf(s.qk[i * TOKENS + j], d[j], o[i]);
            finite = fmaf(0.0f, o[i], finite);
            s.u[i * COLUMNS + column] = d[i];
        }
    }
    s.bad[column] = finite == 0.0f ? 0.0f : 1.0f;
    KL_UNROLL
    for (int i = 0; i < TOKENS; i++)
        if (i < n && c < a.V && finite == 0.0f && write)
            a.o[((p.first + t + i) * a.Hv + p.head) * a.V + c] = o[i];
}

/* what the n tokens leave of the state, and write */
template <int ROWS>
__device__ __forceinline__ void leave(const room &s, const kl_delta &a, kl_delta_state<ROWS> &x,
                                      const float (&bad)[KL_DELTA_COLS], int n)
{
    const int column = static_cast<int>(threadIdx.x) / KL_DELTA_LANES * KL_DELTA_COLS;
    KL_UNROLL
    for (int r = 0; r < ROWS; r++) {
        const int at = x.lane + KL_DELTA_LANES * r;
        if (at < a.K) {
            const float decay = s.decay[at];
            KL_UNROLL
            for (int c = 0; c < KL_DELTA_COLS; c++)
                x.s[c][r] = bad[c] == 0.0f ? decay * x.s[c][r] : x.s[c][r];
        }
    }
    for (int j = 0; j < n; j++) {
        float d[KL_DELTA_COLS];
        KL_UNROLL
        for (int c = 0; c < KL_DELTA_COLS; c++) {
            d[c] = 0.0f;
            if (x.c0 + c < a.V)
                d[c] = s.u[j * COLUMNS + column + c];
        }
        KL_UNROLL
        for (int r = 0; r < ROWS; r++) {
            const int at = x.lane + KL_DELTA_LANES * r;
            if (at < a.K) {
                const float end = s.end[j * s.width + at];
                KL_UNROLL
                for (int c = 0; c < KL_DELTA_COLS; c++)
                    x.s[c][r] = bad[c] == 0.0f ? fmaf(end, d[c], x.s[c][r]) : x.s[c][r];
            }
        }
    }
}

/* n tokens from t on, one by one, on the columns that are bad */
template <int ROWS>
__device__ __forceinline__ void recur(const room &s, const kl_delta &a, const kl_delta_task &p,
                                      kl_delta_state<ROWS> &x, const float (&bad)[KL_DELTA_COLS],
                                      int64_t t, int n, bool write)
{
    fill(s, a, p, t, n);
    for (int i = 0; i < n; i++)
        kl_delta_token(x, a, p, t + i, s.alpha + i * s.width, s.q + i * s.width, s.k + i * s.width,
                       write, [&](int c) { return bad[c] != 0.0f; });
    __syncthreads();
}

/* n tokens from t on, as a chunk or one by one; o is written if `write` */
template <int ROWS>
__device__ __forceinline__ void run(const room &s, const kl_delta &a, const kl_delta_task &p,
                                    kl_delta_state<ROWS> &x, int64_t t, int n, bool as_chunk,
                                    bool write)
{
    const int column = static_cast<int>(threadIdx.x) / KL_DELTA_LANES * KL_DELTA_COLS;
    float bad[KL_DELTA_COLS];
    if (as_chunk) {
        fill(s, a, p, t, n);
        meet<ROWS>(s, a, p, t, n);
        begin(s, a, n);
        ask(s, a, x, n);
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
        leave(s, a, x, bad, n);
    if (kl_block_max<BLOCK>(any, s.parts) != 0.0f) /* the same in every thread */
        recur(s, a, p, x, bad, t, n, write);
}

/* The state after n of the tokens from t on goes to `kept`, and x stays what it is. */
template <int ROWS>
__device__ __forceinline__ void run_aside(const room &s, const kl_delta &a, const kl_delta_task &p,
                                          kl_delta_state<ROWS> &x, int64_t t, int n, float *kept)
{
    kl_delta_store(x, a, kept);
    run(s, a, p, x, t, n, a.chunk > 0, false);
    KL_UNROLL
    for (int r = 0; r < ROWS; r++) {
        const int k = x.lane + KL_DELTA_LANES * r;
        KL_UNROLL
        for (int c = 0; c < KL_DELTA_COLS; c++)
            if (k < a.K && x.c0 + c < a.V) {
                const float before = kept[k * a.V + x.c0 + c];
                kept[k * a.V + x.c0 + c] = x.s[c][r];
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

template <int ROWS> __global__ void __launch_bounds__(128, 1) delta_rule_v3(kl_delta a)
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
    for (int64_t i = blockIdx.x; i < a.N * a.Hv * a.tiles; i += gridDim.x) {
        kl_delta_task p = kl_delta_task_of(a, i);
        float *to = kl_delta_head(a, p, kl_state_of(a.out, p.n));
        kl_delta_state<ROWS> x;
        kl_delta_place(x, p.tile * COLUMNS);
        kl_delta_load(x, a, kl_delta_head(a, p, kl_state_of(a.in, p.n)));
        kl_delta_keep(x, a, p, 0);
        for (int64_t t = 0; t < p.tokens;) {
            const int n = tokens_at(a, p, t);
            for (; p.mark < p.mark_end && a.marks[p.mark] < t + n; p.mark++)
                run_aside(s, a, p, x, t, static_cast<int>(a.marks[p.mark] - t),
                          kl_delta_head(a, p, a.kept + p.mark * a.Hv * a.K * a.V));
            run(s, a, p, x, t, n, a.chunk > 0 || n == TOKENS, true);
            t += n;
            kl_delta_keep(x, a, p, t);
        }
        if (to != nullptr)
            kl_delta_store(x, a, to);
    }
}

template <int ROWS> void launch(kl_ctx *ctx, const kl_delta &a)
{
    KL_LAUNCH((delta_rule_v3<ROWS>), kl_grid(a.N * a.Hv * a.tiles), BLOCK, 0, kl_stream(ctx), a);
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
