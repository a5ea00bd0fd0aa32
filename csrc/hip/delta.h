/* What the kernels of the delta rule share: a call as they take it, where a head's rows lie, and the state of some
 * columns in registers. */
#ifndef KL_HIP_DELTA_H
#define KL_HIP_DELTA_H

#include "ragged.h"
#include "reduce.h"
#include "scalar.h"

struct kl_delta {
    float *o;
    const float *q, *k, *v, *g, *beta; /* g NULL: no gate */
    kl_states out, in;
    const int64_t *offsets, *marks, *mark_offsets; /* marks NULL: no checkpoints */
    float *kept;
    int64_t N, Hk, Hv, K, V, chunk, tiles; /* tiles: tasks a head, by columns of V */
    int64_t first;                         /* task of a launch, where a block is one */
    float scale;
    bool by_channel, tiled;
};

static inline kl_delta kl_delta_call(const kl_delta_rule_args *args, const float *q, const float *k,
                                     const float *g)
{
    kl_delta a = {};
    a.q = q;
    a.k = k;
    a.g = args->gate == KL_GATE_NONE ? nullptr : g;
    a.N = args->N;
    a.Hk = args->Hk;
    a.Hv = args->Hv;
    a.K = args->K;
    a.V = args->V;
    a.chunk = args->chunk;
    a.scale = args->scale;
    a.by_channel = args->gate == KL_GATE_CHANNEL;
    a.tiled = args->head_map == KL_HEADS_TILED;
    return a;
}

/* One head of a sequence: its first token, how many, and which of the marks are its own. */
struct kl_delta_task {
    int64_t n, head, key_head, tile, first, tokens, mark, mark_end;
};
static __device__ __forceinline__ kl_delta_task kl_delta_task_of(const kl_delta &a, int64_t i)
{
    kl_delta_task p;
    p.tile = i % a.tiles;
    p.head = i / a.tiles % a.Hv;
    p.n = i / a.tiles / a.Hv;
    p.key_head = a.tiled ? p.head % a.Hk : p.head / (a.Hv / a.Hk);
    p.first = a.offsets[p.n];
    p.tokens = a.offsets[p.n + 1] - p.first;
    p.mark = p.mark_end = 0;
    if (kl_forget(a.marks) != nullptr) {
        p.mark = a.mark_offsets[p.n];
        p.mark_end = a.mark_offsets[p.n + 1];
    }
    return p;
}

/* Factors of channel k at token t of the task: exp(g), scaled q, k. */
static __device__ __forceinline__ float kl_delta_alpha(const kl_delta &a, const kl_delta_task &p,
                                                       int64_t t, int64_t k)
{
    if (kl_forget(a.g) == nullptr)
        return 1.0f;
    const int64_t row = (p.first + t) * a.Hv + p.head;
    return kl_exp(a.by_channel ? a.g[row * a.K + k] : a.g[row]);
}
static __device__ __forceinline__ int64_t kl_delta_key(const kl_delta &a, const kl_delta_task &p,
                                                       int64_t t, int64_t k)
{
    return ((p.first + t) * a.Hk + p.key_head) * a.K + k;
}

/* The state of a task at `states` [Hv, K, V]; NULL stays. */
static __device__ __forceinline__ float *kl_delta_head(const kl_delta &a, const kl_delta_task &p,
                                                       float *states)
{
    return states != nullptr ? states + p.head * a.K * a.V : nullptr;
}

/* ---- a tile of columns in registers: LANES threads share COLS columns, thread `lane` has rows lane + LANES i ---- */

enum { KL_DELTA_LANES = 8, KL_DELTA_COLS = 4, KL_DELTA_BLOCK = 16 };

/* WHOLE: K is 8 ROWS, and each thread's columns are all there, so that nothing is compared with K or V. */
template <int ROWS, bool WHOLE> struct kl_delta_state {
    float s[KL_DELTA_COLS][ROWS];
    int64_t c0;           /* first column */
    int lane, rows, cols; /* rows and cols: how many are there */
};

/* What of a thread's rows and columns is there. Asked anew for each pass: answers that were kept from pass to pass would
 * be a scalar register or two for every row and column (docs/hip.md#registers). */
template <bool WHOLE> struct kl_delta_inside {
    int rows, cols;
    __device__ __forceinline__ bool row(int i) const { return WHOLE || i < rows; }
    __device__ __forceinline__ bool column(int c) const { return WHOLE || c < cols; }
};
template <int ROWS, bool WHOLE>
static __device__ __forceinline__ kl_delta_inside<WHOLE>
kl_delta_inside_of(const kl_delta_state<ROWS, WHOLE> &x)
{
    return kl_delta_inside<WHOLE>{ WHOLE ? 0 : kl_forget(x.rows), WHOLE ? 0 : kl_forget(x.cols) };
}

template <int ROWS, bool WHOLE>
static __device__ __forceinline__ void kl_delta_place(kl_delta_state<ROWS, WHOLE> &x,
                                                      const kl_delta &a, int64_t first_column)
{
    x.lane = static_cast<int>(threadIdx.x) % KL_DELTA_LANES;
    x.c0 = first_column + static_cast<int>(threadIdx.x) / KL_DELTA_LANES * KL_DELTA_COLS;
    x.rows = (static_cast<int>(a.K) - x.lane + KL_DELTA_LANES - 1) / KL_DELTA_LANES;
    x.cols = x.c0 + KL_DELTA_COLS <= a.V ? KL_DELTA_COLS : static_cast<int>(a.V - x.c0);
}

template <int ROWS, bool WHOLE>
static __device__ __forceinline__ void kl_delta_load(kl_delta_state<ROWS, WHOLE> &x,
                                                     const kl_delta &a, const float *from)
{
    const kl_delta_inside<WHOLE> in = kl_delta_inside_of(x);
    const int lane = kl_forget(x.lane); /* nor are places kept */
    KL_UNROLL
    for (int i = 0; i < ROWS; i++) {
        const int64_t at = (lane + KL_DELTA_LANES * i) * a.V + x.c0;
        KL_UNROLL
        for (int c = 0; c < KL_DELTA_COLS; c++)
            x.s[c][i] = from != nullptr && in.row(i) && in.column(c) ? from[at + c] : 0.0f;
    }
}

template <int ROWS, bool WHOLE>
static __device__ __forceinline__ void kl_delta_store(const kl_delta_state<ROWS, WHOLE> &x,
                                                      const kl_delta &a, float *to)
{
    const kl_delta_inside<WHOLE> in = kl_delta_inside_of(x);
    const int lane = kl_forget(x.lane); /* nor are places kept */
    KL_UNROLL
    for (int i = 0; i < ROWS; i++) {
        const int64_t at = (lane + KL_DELTA_LANES * i) * a.V + x.c0;
        KL_UNROLL
        for (int c = 0; c < KL_DELTA_COLS; c++)
            if (in.row(i) && in.column(c))
                to[at + c] = x.s[c][i];
    }
}

/* What is to be kept after `t` tokens. */
template <int ROWS, bool WHOLE>
static __device__ __forceinline__ void kl_delta_keep(const kl_delta_state<ROWS, WHOLE> &x,
                                                     const kl_delta &a, kl_delta_task &p, int64_t t)
{
    for (; p.mark < p.mark_end && a.marks[p.mark] == t; p.mark++)
        kl_delta_store(x, a, kl_delta_head(a, p, a.kept + p.mark * a.Hv * a.K * a.V));
}

/* One token on the columns c that `takes(c)` names; its factors lie in shared rows of `alpha`, `q`, `k`. o is
 * written if `write`. The sums over K: ROWS rows by fma, then the tree over the lanes. Rows past K are left out: 0
 * times an infinity would be NaN. */
template <int ROWS, bool WHOLE, class FACTORS, class TAKES>
static __device__ __forceinline__ void
kl_delta_token(kl_delta_state<ROWS, WHOLE> &x, const kl_delta &a, const kl_delta_task &p, int64_t t,
               const FACTORS &alpha, const FACTORS &q, const FACTORS &k, bool write, TAKES takes)
{
    const kl_delta_inside<WHOLE> first = kl_delta_inside_of(x);
    const int64_t row = (p.first + t) * a.Hv + p.head;
    const float beta = a.beta[row];
    float u[KL_DELTA_COLS] = {}, o[KL_DELTA_COLS] = {}, d[KL_DELTA_COLS];
    KL_UNROLL
    for (int i = 0; i < ROWS; i++)
        if (first.row(i)) {
            const int at = x.lane + KL_DELTA_LANES * i;
            const float ai = alpha[at], ki = k[at];
            KL_UNROLL
            for (int c = 0; c < KL_DELTA_COLS; c++) {
                const float s = ai * x.s[c][i];
                x.s[c][i] = takes(c) ? s : x.s[c][i];
                u[c] = fmaf(ki, s, u[c]);
            }
        }
    KL_UNROLL
    for (int c = 0; c < KL_DELTA_COLS; c++) {
        u[c] = kl_team_reduce<kl_add_of>(u[c], KL_DELTA_LANES);
        d[c] = first.column(c) ? beta * (a.v[row * a.V + x.c0 + c] - u[c]) : 0.0f;
    }
    const kl_delta_inside<WHOLE> then = kl_delta_inside_of(x);
    KL_UNROLL
    for (int i = 0; i < ROWS; i++)
        if (then.row(i)) {
            const int at = x.lane + KL_DELTA_LANES * i;
            const float qi = q[at], ki = k[at];
            KL_UNROLL
            for (int c = 0; c < KL_DELTA_COLS; c++) {
                const float s = fmaf(ki, d[c], x.s[c][i]);
                x.s[c][i] = takes(c) ? s : x.s[c][i];
                o[c] = fmaf(qi, s, o[c]);
            }
        }
    const int lane = kl_forget(x.lane);
    KL_UNROLL
    for (int c = 0; c < KL_DELTA_COLS; c++) {
        o[c] = kl_team_reduce<kl_add_of>(o[c], KL_DELTA_LANES);
        if (lane == c && then.column(c) && write && takes(c))
            a.o[row * a.V + x.c0 + c] = o[c];
    }
}

/* v3 (delta_chunk.hip): K up to 128; a.chunk 0 is auto. */
void kl_delta_chunks(kl_ctx *ctx, kl_delta a);

#endif
