/* delta_rule: for every sequence and value head, with a = exp(g[t]) and S the state [K, V]
 *     S' = Diag(a) S     d = beta (v - S'^T k)     S = S' + k d^T     o = S^T (scale q)
 *   q, k [T, Hk, K]     v, o [T, Hv, V], o may be v     beta [T, Hv], in [0, 2]
 *   g <= 0, log-decay in nats: [T, Hv, K], [T, Hv] or none by gate; -inf forgets, exactly
 *   value head h reads key head h / (Hv / Hk) (grouped) or h % Hk (tiled)
 *   states [Hv, K, V] a sequence; state_in NULL: zeros; state_out NULL: not kept; state_out may be
 *   state_in, and is no other sequence's state_in.
 *   A sequence of no tokens hands its state on as it is.
 *   No clamp: the values are the recurrence's at any decay, NaN and infinity where it has them.
 *   Subnormals are flushed: read as 0, and results below 2^-126 become 0.
 *   Sums over K: even and odd rows apart, each in rising order by fma from +0, then even + odd. So any
 *   split of a sequence gives the same bytes.
 *   Budget: a running bound beside the recurrence (docs/math.md#delta_rule).
 *
 * Forms. Recurrent is here; auto is recurrent. */
#include "ops.h"

#include "../cpu/fpenv.h"
#include "../cpu/kernels.h"

#include <string.h>

enum { AHEAD = 4 }; /* tokens */

typedef struct task {
    const kl_kernels *k;
    float *o;
    const float *q, *key, *v, *g, *beta;
    kl_slots state_out, state_in;
    const kl_delta_rule_args *args;
    int64_t columns, n_parts; /* columns of V a task, tasks a head */
    float *scratch; /* a thread's: [KL_DELTA_BLOCK, K] three times, a strip, and a head's state */
    int64_t scratch_values;
} task;

/* The columns of one head's state that one task computes, over all tokens of a sequence. */
typedef struct part {
    int64_t sequence, head, key_head, c0, columns;
} part;

static part part_of(const task *a, int64_t i)
{
    const kl_delta_rule_args *args = a->args;
    const int64_t h = i / a->n_parts % args->Hv, c0 = i % a->n_parts * a->columns;
    return (part){
        .sequence = i / a->n_parts / args->Hv,
        .head = h,
        .key_head = args->head_map == KL_HEADS_TILED ? h % args->Hk : h / (args->Hv / args->Hk),
        .c0 = c0,
        .columns = kl_min(a->columns, args->V - c0),
    };
}

static void hand_on(float *to, const float *from, int64_t rows, int64_t row, int64_t columns)
{
    const size_t n_bytes = (size_t)columns * sizeof *to;
    for (int64_t i = 0; i < rows && to != from; i++)
        if (from != NULL)
            memcpy(to + i * row, from + i * row, n_bytes);
        else
            memset(to + i * row, 0, n_bytes);
}

static void ask_for(const float *row, int64_t n)
{
    for (int64_t i = 0; i < n; i += 16)
        __builtin_prefetch(row + i);
}

/* alpha, scaled q and k of tokens begin..begin+T-1, once for all columns of the part. A head's rows
 * lie far apart, beyond what the processor foresees: they are asked for some tokens ahead. */
static void factors(const task *a, const part *p, int64_t begin, int64_t T, float *alpha, float *q,
                    float *k)
{
    const kl_delta_rule_args *args = a->args;
    const int64_t K = args->K, V = args->V, Hv = args->Hv, Hk = args->Hk;
    const int64_t gate_width = args->gate == KL_GATE_CHANNEL ? K : 1;
    for (int64_t t = 0; t < T; t++) {
        const int64_t head = (begin + t) * Hv + p->head, key = (begin + t) * Hk + p->key_head;
        const float *g = args->gate == KL_GATE_NONE ? NULL : a->g + head * gate_width;
        if (t + AHEAD < T) {
            ask_for(a->q + (key + AHEAD * Hk) * K, K);
            ask_for(a->key + (key + AHEAD * Hk) * K, K);
            ask_for(a->v + (head + AHEAD * Hv) * V + p->c0, p->columns);
            if (g != NULL)
                ask_for(g + AHEAD * Hv * gate_width, gate_width);
        }
        a->k->delta_rule_factors(alpha + t * K, q + t * K, g, a->q + key * K, args->scale, K,
                                 args->gate);
        memcpy(k + t * K, a->key + key * K, (size_t)K * sizeof *k);
    }
}

static void run_part(const task *a, const part *p, float *scratch)
{
    const kl_delta_rule_args *args = a->args;
    const int64_t K = args->K, V = args->V, Hv = args->Hv;
    const int64_t first = args->offsets[p->sequence], last = args->offsets[p->sequence + 1];
    float *alpha = scratch, *q = alpha + KL_DELTA_BLOCK * K, *k = q + KL_DELTA_BLOCK * K;
    float *strip = k + KL_DELTA_BLOCK * K, *state = strip + KL_DELTA_COLUMNS * K;
    const int64_t corner = p->head * K * V + p->c0;
    const float *from = kl_slot_of(a->state_in, p->sequence);
    float *to = kl_slot_of(a->state_out, p->sequence);

    from = from != NULL ? from + corner : NULL;
    if (to != NULL)
        to += corner;
    else
        to = state + p->c0;
    if (first == last && a->state_out.base != NULL)
        hand_on(to, from, K, V, p->columns);

    for (int64_t t = first; t < last; t += KL_DELTA_BLOCK) {
        const int64_t T = kl_min(KL_DELTA_BLOCK, last - t), row = t * Hv + p->head;
        factors(a, p, t, T, alpha, q, k);
        a->k->delta_rule_strip(&(kl_delta_strip){ .T = T,
                                                  .K = K,
                                                  .columns = p->columns,
                                                  .o = a->o + row * V + p->c0,
                                                  .to = to,
                                                  .from = from,
                                                  .alpha = alpha,
                                                  .q = q,
                                                  .k = k,
                                                  .v = a->v + row * V + p->c0,
                                                  .beta = a->beta + row,
                                                  .o_step = Hv * V,
                                                  .state_step = V,
                                                  .beta_step = Hv,
                                                  .scratch = strip });
        from = to;
    }
}

static void parts(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    const kl_fp saved = kl_fp_flush();
    for (int64_t i = begin; i < end; i++) {
        const part p = part_of(a, i);
        run_part(a, &p, a->scratch + thread * a->scratch_values);
    }
    kl_fp_restore(saved);
}

/* Columns of V a task: a whole head, or strips of it where there would be less than two tasks a
 * thread. */
static int64_t columns_of(const kl_ctx *ctx, const kl_delta_rule_args *args)
{
    const int64_t wanted = kl_ceil_div(2 * ctx->threads, kl_max(1, args->N * args->Hv));
    const int64_t strips = kl_ceil_div(args->V, KL_DELTA_COLUMNS);
    return kl_ceil_div(strips, kl_min(ctx->threads > 1 ? wanted : 1, strips)) * KL_DELTA_COLUMNS;
}

static kl_status recurrent(kl_ctx *ctx, float *o, kl_slots state_out, const float *q,
                           const float *k, const float *v, const float *g, const float *beta,
                           kl_slots state_in, const kl_delta_rule_args *args)
{
    const int64_t K = args->K, V = args->V;
    task a = {
        ctx->k, o, q, k, v, g, beta, state_out, state_in, args, .columns = columns_of(ctx, args)
    };
    a.n_parts = kl_ceil_div(V, a.columns);
    a.scratch_values =
        (3 * KL_DELTA_BLOCK + KL_DELTA_COLUMNS) * K + (state_out.base == NULL ? K * V : 0);
    a.scratch_values = kl_ceil_div(a.scratch_values, 16) * 16;
    KL_SCRATCH(a.scratch, ctx, a.scratch_values * ctx->threads);
    if (ctx->arena.measuring)
        return KL_OK;

    const int64_t tokens = kl_ceil_div(args->T, kl_max(1, args->N)); /* a sequence, on average */
    return kl_for(ctx, args->N * args->Hv * a.n_parts,
                  kl_row_grain(tokens * K * kl_min(V, a.columns) / 4), parts, &a);
}

kl_status cpu_delta_rule(kl_ctx *ctx, float *o, kl_slots state_out, const float *q, const float *k,
                         const float *v, const float *g, const float *beta, kl_slots state_in,
                         const kl_delta_rule_args *args)
{
    if (args->form == KL_FORM_AUTO || args->form == KL_FORM_RECURRENT)
        return recurrent(ctx, o, state_out, q, k, v, g, beta, state_in, args);
    return kl_fail(ctx, KL_ERR_UNSUPPORTED,
                   "delta_rule: chunked form: not in this build; recurrent and auto are");
}

static kl_status check_sizes(kl_ctx *ctx, const kl_delta_rule_args *a)
{
    int64_t n;
    if (a->Hk < 1 || a->Hv < 1 || a->K < 1 || a->V < 1)
        return kl_fail(ctx, KL_ERR_SHAPE,
                       "delta_rule: Hk, Hv, K, V are %lld, %lld, %lld, %lld; each must be >= 1",
                       (long long)a->Hk, (long long)a->Hv, (long long)a->K, (long long)a->V);
    if (a->Hv % a->Hk != 0)
        return kl_fail(
            ctx, KL_ERR_SHAPE,
            "delta_rule: v has %lld heads for %lld heads of q and k; it must be a multiple",
            (long long)a->Hv, (long long)a->Hk);
    if (!kl_mul(&n, a->Hv, a->K) || !kl_mul(&n, n, a->V) || !kl_mul(&n, n, kl_max(a->N, 1))
        || !kl_mul(&n, n, 1024)) /* room for sizes in bytes, and for scratch */
        return kl_fail(ctx, KL_ERR_SHAPE,
                       "delta_rule: states of [%lld, %lld, %lld, %lld] are too large",
                       (long long)a->N, (long long)a->Hv, (long long)a->K, (long long)a->V);
    KL_TRY(kl_check_rows(ctx, "delta_rule", "q", a->T, a->Hk * a->K));
    KL_TRY(kl_check_rows(ctx, "delta_rule", "v", a->T, a->Hv * a->V));
    KL_TRY(kl_check_rows(ctx, "delta_rule", "g", a->T, a->Hv * a->K));
    return kl_check_offsets(ctx, "delta_rule", a->offsets, a->N, a->T);
}

kl_status kl_delta_rule(kl_ctx *ctx, float *o, kl_slots state_out, const float *q, const float *k,
                        const float *v, const float *g, const float *beta, kl_slots state_in,
                        const kl_delta_rule_args *args)
{
    KL_TRY(check_sizes(ctx, args));
    if (!(args->scale - args->scale == 0.0f))
        return kl_fail(ctx, KL_ERR_ARG, "delta_rule: scale is %g; it must be finite",
                       (double)args->scale);
    if (args->gate < KL_GATE_NONE || args->gate > KL_GATE_CHANNEL)
        return kl_fail(ctx, KL_ERR_ARG, "delta_rule: gate is %d; it must be none, head or channel",
                       (int)args->gate);
    if (args->head_map != KL_HEADS_GROUPED && args->head_map != KL_HEADS_TILED)
        return kl_fail(ctx, KL_ERR_ARG, "delta_rule: head_map is %d; it must be grouped or tiled",
                       (int)args->head_map);
    if (args->form != KL_FORM_AUTO && args->form != KL_FORM_RECURRENT
        && args->form != KL_FORM_CHUNKED)
        return kl_fail(ctx, KL_ERR_ARG,
                       "delta_rule: form is %d; it must be auto, recurrent or chunked",
                       (int)args->form);
    const size_t mark = kl_scratch_mark(ctx);
    return kl_done(
        ctx, mark,
        KL_RUN(delta_rule, 7 * args->T * args->Hv * args->K * args->V,
               8 * args->N * args->Hv * args->K * args->V
                   + 4 * args->T * (2 * args->Hk * args->K + args->Hv * (args->K + 2 * args->V)),
               ctx, o, state_out, q, k, v, g, beta, state_in, args));
}
