/* The halves of delta_rule in chunks, as ops of their own: of chunk i, j are rows, E_ij = a_{j+1} .. a_i with
 * a = exp(g), start_i = a_0 .. a_i, end_j = E_{n-1,j}, and q is scaled.
 *
 * delta_rule_intra: what each chunk is before any state is known
 *     L_ij = beta_i <k_i, E_ij k_j>, j < i      P_ij = <q_i, E_ij k_j>, j <= i      T = (I + L)^-1
 *     W = T Diag(beta) (start k)                U = T Diag(beta) v
 *   L, P, T [T, Hv, chunk]: row i at its token; 0 above the triangle and past a short chunk's end
 *   W [T, Hv, K]     U [T, Hv, V]     no output is an input or another output
 *   Order: L and P are dots in 16 lanes; T_ij = -sum_m L_im T_mj for m rising, W_i and U_i sums of
 *   (T_ij beta_j) times row j for j rising, each one chain of fma from +0.
 *
 * delta_rule_inter: over the chunks of a sequence in order, each with the state S that the last one left
 *     d = U - W S      o_i = S^T (start_i q_i) + sum_{j <= i} P_ij d_j
 *     S = Diag(start_{n-1}) S + sum_j (end_j k_j) d_j^T
 *   o, d [T, Hv, V], d may be U     states as in delta_rule     P is read in its triangle alone
 *   Order: one chain of fma each, k rising from +0, then j rising; d one subtraction after its chain.
 *
 * Both: q, k, g, beta, states, offsets, head map and gate as in delta_rule; chunks of args->chunk tokens, counted
 * from the first of each sequence. Every decay is a product of the factors in between, every triangle ends at the
 * diagonal. Subnormals are flushed. What overflows (L and P of long keys) is infinite or NaN, and stays: no chunk
 * is left to the recurrence.
 * Budgets and derivation: docs/math.md#delta-budgets, docs/math.md#chunked. */
#include "delta.h"

#include "../cpu/fpenv.h"

#include <string.h>

/* What both read, and where a thread works. */
typedef struct inputs {
    const kl_kernels *k;
    const kl_delta_rule_args *args;
    const float *q, *key, *g;
    const float *beta; /* NULL: L is not wanted */
    kl_rooms rooms;
} inputs;

typedef struct room {
    kl_delta_factors factors;
    kl_delta_chunk chunk;
    float *state; /* [K, V], inter's */
} room;

typedef struct intra {
    inputs in;
    const float *v;
    float *L, *P, *inverse, *W, *U;
} intra;

typedef struct inter {
    inputs in;
    kl_slots state_out, state_in;
    const float *P, *W, *U;
    float *o, *d;
} inter;

static size_t lay_out(room *r, kl_room at, const kl_delta_rule_args *args)
{
    const int64_t ld = kl_delta_ld(args->K);
    r->factors = kl_delta_take_factors(&at, args->chunk * ld);
    kl_delta_take_chunk(&r->chunk, &at, args->chunk, ld);
    r->state = kl_take_floats(&at, args->K * args->V);
    return at.used;
}

static kl_status take_rooms(kl_ctx *ctx, inputs *in)
{
    room r;
    return kl_take_rooms(ctx, &in->rooms, lay_out(&r, (kl_room){ 0 }, in->args));
}

/* A task is a head of a sequence. */
static kl_status for_heads(kl_ctx *ctx, const kl_delta_rule_args *args, kl_body body, void *arg)
{
    const int64_t tokens = kl_ceil_div(args->T, kl_max(1, args->N)); /* a sequence, on average */
    return kl_for(ctx, args->N * args->Hv, kl_row_grain(tokens * args->K * args->V / 4), body, arg);
}

/* The n tokens from token t of the call on: decays, and products of keys (of inter: not looked at). */
static kl_delta_chunk chunk_at(const inputs *in, const room *r, int64_t t, int64_t head, int64_t n)
{
    static const float none;
    const kl_delta_rule_args *args = in->args;
    const kl_delta_rows from = kl_delta_rows_of(args, in->q, in->key, in->g, t, head);
    for (int64_t i = 0; i < n; i++)
        kl_delta_fill_row(in->k, args, &r->factors, i, &from, i);
    const float *beta = in->beta != NULL ? in->beta + t * args->Hv + head : &none;
    const int64_t beta_step = in->beta != NULL ? args->Hv : 0;
    const kl_delta_chunk c = kl_delta_chunk_of(&r->chunk, args, &r->factors, n, beta, beta_step);
    (void)in->k->delta_chunk_factors(&c); /* whether the chunk is fit to be used */
    return c;
}

/* ---- intra ------------------------------------------------------------------------------------ */

/* row: the chunk's first among the T * Hv rows of the outputs */
static void intra_chunk(const intra *a, const kl_delta_chunk *c, int64_t row)
{
    const kl_delta_rule_args *args = a->in.args;
    const int64_t Hv = args->Hv, C = args->chunk, K = args->K, V = args->V;
    const size_t row_bytes = (size_t)C * sizeof(float);
    for (int64_t i = 0; i < c->n; i++) {
        const int64_t at = row + i * Hv;
        const float *minus_kk = c->minus_kk + i * c->rows;
        float *L = a->L + at * C, *P = a->P + at * C, *T = a->inverse + at * C;
        float *W = a->W + at * K, *U = a->U + at * V;
        memset(L, 0, row_bytes);
        memset(P, 0, row_bytes);
        memset(T, 0, row_bytes);
        memset(W, 0, (size_t)K * sizeof *W);
        memset(U, 0, (size_t)V * sizeof *U);

        memcpy(P, c->qk + i * c->rows, (size_t)(i + 1) * sizeof *P);
        for (int64_t m = 0; m < i; m++) {
            L[m] = -minus_kk[m];
            a->in.k->add_scaled(T, a->inverse + (row + m * Hv) * C, minus_kk[m], m + 1);
        }
        T[i] = 1.0f;
        for (int64_t j = 0; j <= i; j++) {
            const float rate = T[j] * c->beta[j * c->beta_step];
            a->in.k->add_scaled(W, c->start + j * c->ld, rate, K);
            a->in.k->add_scaled(U, a->v + (row + j * Hv) * V, rate, V);
        }
    }
}

static void intra_heads(void *arg, int64_t begin, int64_t end, int thread)
{
    const intra *a = arg;
    const kl_delta_rule_args *args = a->in.args;
    room r;
    lay_out(&r, kl_room_of(&a->in.rooms, thread), args);
    const kl_fp saved = kl_fp_flush();
    for (int64_t i = begin; i < end; i++) {
        const int64_t *sequence = args->offsets + i / args->Hv, head = i % args->Hv;
        for (int64_t t = sequence[0]; t < sequence[1]; t += args->chunk) {
            const int64_t n = kl_min(args->chunk, sequence[1] - t);
            const kl_delta_chunk c = chunk_at(&a->in, &r, t, head, n);
            intra_chunk(a, &c, t * args->Hv + head);
        }
    }
    kl_fp_restore(saved);
}

kl_status cpu_delta_rule_intra(kl_ctx *ctx, float *L, float *P, float *inverse, float *W, float *U,
                               const float *q, const float *k, const float *v, const float *g,
                               const float *beta, const kl_delta_rule_args *args)
{
    intra a = { { .k = ctx->k, .args = args, .q = q, .key = k, .g = g, .beta = beta },
                .v = v,
                .L = L,
                .P = P,
                .inverse = inverse,
                .W = W,
                .U = U };
    KL_TRY(take_rooms(ctx, &a.in));
    if (ctx->arena.measuring)
        return KL_OK;
    return for_heads(ctx, args, intra_heads, &a);
}

/* ---- inter ------------------------------------------------------------------------------------ */

/* y [V] = S^T x */
static void read_state(const inputs *in, float *y, const float *S, const float *x)
{
    const int64_t V = in->args->V;
    memset(y, 0, (size_t)V * sizeof *y);
    for (int64_t k = 0; k < in->args->K; k++)
        in->k->add_scaled(y, S + k * V, x[k], V);
}

static void inter_chunk(const inter *a, const kl_delta_chunk *c, float *S, int64_t row)
{
    const kl_delta_rule_args *args = a->in.args;
    const int64_t Hv = args->Hv, K = args->K, V = args->V;
    for (int64_t i = 0; i < c->n; i++) {
        const int64_t at = row + i * Hv;
        const float *P = a->P + at * args->chunk, *U = a->U + at * V;
        float *o = a->o + at * V, *d = a->d + at * V;
        read_state(&a->in, o, S, a->W + at * K);
        for (int64_t x = 0; x < V; x++)
            d[x] = U[x] - o[x];
        read_state(&a->in, o, S, c->start + (c->rows + i) * c->ld);
        for (int64_t j = 0; j <= i; j++)
            a->in.k->add_scaled(o, a->d + (row + j * Hv) * V, P[j], V);
    }
    for (int64_t k = 0; k < K; k++) {
        float *S_k = S + k * V;
        for (int64_t x = 0; x < V; x++)
            S_k[x] *= c->decay[k];
        for (int64_t j = 0; j < c->n; j++)
            a->in.k->add_scaled(S_k, a->d + (row + j * Hv) * V, c->end[j * c->ld + k], V);
    }
}

static void inter_heads(void *arg, int64_t begin, int64_t end, int thread)
{
    const inter *a = arg;
    const kl_delta_rule_args *args = a->in.args;
    const int64_t values = args->K * args->V;
    const size_t state_bytes = (size_t)values * sizeof(float);
    room r;
    lay_out(&r, kl_room_of(&a->in.rooms, thread), args);
    const kl_fp saved = kl_fp_flush();
    for (int64_t i = begin; i < end; i++) {
        const int64_t n = i / args->Hv, head = i % args->Hv;
        const float *from = kl_slot_of(a->state_in, n);
        float *to = kl_slot_of(a->state_out, n);
        if (from != NULL)
            memcpy(r.state, from + head * values, state_bytes);
        else
            memset(r.state, 0, state_bytes);
        for (int64_t t = args->offsets[n]; t < args->offsets[n + 1]; t += args->chunk) {
            const int64_t rows = kl_min(args->chunk, args->offsets[n + 1] - t);
            const kl_delta_chunk c = chunk_at(&a->in, &r, t, head, rows);
            inter_chunk(a, &c, r.state, t * args->Hv + head);
        }
        if (to != NULL)
            memcpy(to + head * values, r.state, state_bytes);
    }
    kl_fp_restore(saved);
}

kl_status cpu_delta_rule_inter(kl_ctx *ctx, float *o, kl_slots state_out, float *d, const float *q,
                               const float *k, const float *g, const float *P, const float *W,
                               const float *U, kl_slots state_in, const kl_delta_rule_args *args)
{
    inter a = { { .k = ctx->k, .args = args, .q = q, .key = k, .g = g },
                .state_out = state_out,
                .state_in = state_in,
                .P = P,
                .W = W,
                .U = U,
                .o = o,
                .d = d };
    KL_TRY(take_rooms(ctx, &a.in));
    if (ctx->arena.measuring)
        return KL_OK;
    return for_heads(ctx, args, inter_heads, &a);
}

/* ---- checks ----------------------------------------------------------------------------------- */

static kl_status check(kl_ctx *ctx, const char *op, const kl_delta_rule_args *args)
{
    KL_TRY(kl_delta_check(ctx, op, args));
    if (args->chunk < 1 || args->chunk > KL_DELTA_CHUNK_MAX)
        return kl_fail(ctx, KL_ERR_ARG, "%s: chunk is %lld; it must be 1 to %d", op,
                       (long long)args->chunk, KL_DELTA_CHUNK_MAX);
    if (args->l2_norm)
        return kl_fail(ctx, KL_ERR_ARG, "%s: l2_norm is %d; it must be 0: norm q and k first", op,
                       args->l2_norm);
    if (args->checkpoints != NULL)
        return kl_fail(ctx, KL_ERR_ARG, "%s: checkpoints are given; there must be none", op);
    return kl_check_rows(ctx, op, "P", args->T, args->Hv * args->chunk);
}

kl_status kl_delta_rule_intra(kl_ctx *ctx, float *L, float *P, float *inverse, float *W, float *U,
                              const float *q, const float *k, const float *v, const float *g,
                              const float *beta, const kl_delta_rule_args *args)
{
    KL_TRY(check(ctx, "delta_rule_intra", args));
    const int64_t rows = args->T * args->Hv, C = args->chunk, K = args->K, V = args->V;
    const int64_t keys = 2 * args->T * args->Hk * K;
    return KL_RUN(delta_rule_intra, rows * (C * (3 * K + V) + C * C / 3),
                  4 * keys + 4 * rows * (2 * K + 2 * V + 3 * C), ctx, L, P, inverse, W, U, q, k, v,
                  g, beta, args);
}

kl_status kl_delta_rule_inter(kl_ctx *ctx, float *o, kl_slots state_out, float *d, const float *q,
                              const float *k, const float *g, const float *P, const float *W,
                              const float *U, kl_slots state_in, const kl_delta_rule_args *args)
{
    KL_TRY(check(ctx, "delta_rule_inter", args));
    const int64_t rows = args->T * args->Hv, C = args->chunk, K = args->K, V = args->V;
    const int64_t keys = 2 * args->T * args->Hk * K;
    return KL_RUN(delta_rule_inter, rows * V * (6 * K + C),
                  4 * keys + 4 * rows * (2 * K + 3 * V + C) + 8 * args->N * args->Hv * K * V, ctx,
                  o, state_out, d, q, k, g, P, W, U, state_in, args);
}
