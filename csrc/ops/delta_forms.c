/* The forms of delta_rule on the CPU.
 *
 *   recurrent   token by token; the state where it lies, in strips of columns (cpu/delta_rule.inc)
 *   chunked     chunks of args->chunk tokens, the last one shorter (cpu/delta_chunk.inc)
 *   auto        chunks of KL_DELTA_BLOCK tokens; what is left over, less than a chunk, is recurrent
 *
 * A task is a head of a sequence, or some columns of one. The chunked forms work on a copy of its state in
 * strips [K, KL_DELTA_COLUMNS] that lie one after another.
 * A chunk that overflows is run by the recurrence, whose sums come in another order: all of it where its
 * products of keys do, else the strips of columns that do.
 * A state kept at a checkpoint is the state of a run that ends there: inside a chunk it is computed aside,
 * from the chunk's first token. */
#include "delta.h"

#include "../cpu/fpenv.h"

#include <string.h>

enum { AHEAD = 4, DEFAULT_CHUNK = 64, COLUMNS = KL_DELTA_COLUMNS };

typedef struct task {
    const kl_kernels *k;
    float *o;
    const float *q, *key, *v, *g, *beta;
    kl_slots state_out, state_in;
    const kl_delta_rule_args *args;
    int64_t columns, n_parts; /* columns of V a task, tasks a head */
    int64_t chunk;            /* tokens; 0: no chunks */
    int64_t ld;               /* K rounded up to 16 */
    kl_rooms rooms;
} task;

/* A thread's working memory; what a form does not use is not there. */
typedef struct room {
    kl_delta_factors now, next; /* next: of the chunk to come */
    float *strip;               /* [K, COLUMNS], the recurrence's */
    kl_delta_chunk chunk;
    float *columns;       /* scratch of kl_delta_columns */
    float *state, *aside; /* a part's state, in strips; twice */
    float *thrown_away;   /* [rows, a part's columns]: o before a checkpoint */
} room;

/* The columns of one head's state that one task computes, over all tokens of a sequence. */
typedef struct part {
    const task *task;
    int64_t sequence, head, c0, columns;
    int64_t first, tokens; /* in the call */
    room room;
} part;

/* Where a part's state lies: column c of row k at base + c / COLUMNS * strip + k * row + c % COLUMNS. */
typedef struct view {
    float *base;
    int64_t row, strip;
} view;

static size_t lay_out(room *r, kl_room at, const task *a)
{
    const kl_delta_rule_args *args = a->args;
    const int64_t K = args->K, ld = a->ld, chunk_rows = kl_delta_round_up(a->chunk, KL_DELTA_BLOCK);
    const int64_t rows = kl_max(KL_DELTA_STEP, chunk_rows),
                  state = kl_delta_round_up(a->columns, COLUMNS) * K;
    r->now = kl_delta_take_factors(&at, rows * ld);
    r->strip = kl_take_floats(&at, K * COLUMNS);
    if (a->chunk > 0 || a->state_out.base == NULL)
        r->state = kl_take_floats(&at, state);
    if (a->chunk > 0) {
        r->next = kl_delta_take_factors(&at, chunk_rows * ld);
        kl_delta_take_chunk(&r->chunk, &at, a->chunk, ld);
        r->columns = kl_take_floats(&at, 2 * chunk_rows * COLUMNS);
    }
    if (a->chunk > 0 && args->checkpoints != NULL) {
        r->aside = kl_take_floats(&at, state);
        r->thrown_away = kl_take_floats(&at, rows * a->columns);
    }
    return at.used;
}

static part part_of(const task *a, int64_t i, int thread)
{
    const kl_delta_rule_args *args = a->args;
    const int64_t h = i / a->n_parts % args->Hv, c0 = i % a->n_parts * a->columns;
    const int64_t n = i / a->n_parts / args->Hv;
    part p = {
        .task = a,
        .sequence = n,
        .head = h,
        .c0 = c0,
        .columns = kl_min(a->columns, args->V - c0),
        .first = args->offsets[n],
        .tokens = args->offsets[n + 1] - args->offsets[n],
    };
    lay_out(&p.room, kl_room_of(&a->rooms, thread), a);
    return p;
}

/* ---- the state -------------------------------------------------------------------------------- */

static float *corner(const part *p, float *states)
{
    const kl_delta_rule_args *args = p->task->args;
    return states != NULL ? states + p->head * args->K * args->V + p->c0 : NULL;
}

static view in_place(const part *p, float *states)
{
    return (view){ corner(p, states), p->task->args->V, COLUMNS };
}

static view in_strips(const part *p, float *base)
{
    return (view){ base, COLUMNS, COLUMNS * p->task->args->K };
}

static void copy_row(float *y, const float *x, int64_t n)
{
    if (x == NULL)
        memset(y, 0, (size_t)n * sizeof *y);
    else if (n == COLUMNS)
        memcpy(y, x, COLUMNS * sizeof *y); /* a few moves, not a call */
    else
        memcpy(y, x, (size_t)n * sizeof *y);
}

/* from with no base: zeros */
static void copy_state(const part *p, view to, view from)
{
    if (to.base == NULL || to.base == from.base)
        return;
    for (int64_t k = 0; k < p->task->args->K; k++)
        for (int64_t c = 0; c < p->columns; c += COLUMNS)
            copy_row(to.base + c / COLUMNS * to.strip + k * to.row,
                     from.base != NULL ? from.base + c / COLUMNS * from.strip + k * from.row : NULL,
                     kl_min(COLUMNS, p->columns - c));
}

/* ---- tokens ----------------------------------------------------------------------------------- */

static kl_delta_rows rows_from(const part *p, int64_t t)
{
    const task *a = p->task;
    return kl_delta_rows_of(a->args, a->q, a->key, a->g, p->first + t, p->head);
}

/* A head's rows lie far apart, beyond what the processor foresees: they are asked for before they are
 * wanted. These are the rows of q, k, v, o and, by channel, g of one token; returns how many. */
static int rows_of(const part *p, int64_t t, const float **rows)
{
    const task *a = p->task;
    const kl_delta_rows at = rows_from(p, t);
    rows[0] = at.q;
    rows[1] = at.k;
    rows[2] = a->v + ((p->first + t) * a->args->Hv + p->head) * a->args->V + p->c0;
    rows[3] = a->o + ((p->first + t) * a->args->Hv + p->head) * a->args->V + p->c0;
    rows[4] = at.g;
    return a->args->gate == KL_GATE_CHANNEL ? 5 : 4;
}

static void ask_for_token(const part *p, int64_t t)
{
    const float *rows[5];
    const int n = t < p->tokens ? rows_of(p, t, rows) : 0;
    for (int i = 0; i < n; i++)
        kl_delta_ask(rows[i], kl_min(p->task->args->K, 256));
}

/* Of T tokens from t on, into rows from `row` on: once for all columns of the part. Others are asked for some
 * tokens ahead (0: that was done). */
static void fill(const part *p, const kl_delta_factors *to, int64_t row, int64_t t, int64_t T,
                 int64_t ahead)
{
    const task *a = p->task;
    const kl_delta_rule_args *args = a->args;
    const int64_t ld = a->ld;
    kl_delta_rows from = rows_from(p, t);
    if (args->l2_norm) {
        const kl_fp flushing = kl_fp_default(); /* the bytes of the op l2_norm */
        for (int64_t i = 0; i < T; i++) {
            a->k->l2_norm(to->q + (row + i) * ld, from.q + i * from.key_step, args->K,
                          args->l2_eps);
            a->k->l2_norm(to->k + (row + i) * ld, from.k + i * from.key_step, args->K,
                          args->l2_eps);
        }
        kl_fp_restore(flushing);
        from.q = to->q + row * ld;
        from.k = to->k + row * ld;
        from.key_step = ld;
    }
    for (int64_t i = 0; i < T; i++) {
        if (ahead > 0)
            ask_for_token(p, t + i + ahead);
        kl_delta_fill_row(a->k, args, to, row + i, &from, i);
    }
}

/* T tokens from t on whose factors lie in the room from row 0 on, for a strip of columns from c on, a multiple
 * of COLUMNS. o: the part's first output. */
static void run_strip(const part *p, view to, view from, float *o, int64_t o_step, int64_t t,
                      int64_t T, int64_t c, int64_t columns)
{
    const task *a = p->task;
    const kl_delta_rule_args *args = a->args;
    const int64_t row = (p->first + t) * args->Hv + p->head;
    a->k->delta_rule_strip(
        &(kl_delta_strip){ .T = T,
                           .K = args->K,
                           .columns = columns,
                           .o = o + c,
                           .to = to.base + c / COLUMNS * to.strip,
                           .from = from.base != NULL ? from.base + c / COLUMNS * from.strip : NULL,
                           .alpha = p->room.now.alpha,
                           .q = p->room.now.q,
                           .k = p->room.now.k,
                           .v = a->v + row * args->V + p->c0 + c,
                           .beta = a->beta + row,
                           .ld = a->ld,
                           .o_step = o_step,
                           .v_step = args->Hv * args->V,
                           .state_step = to.row,
                           .beta_step = args->Hv,
                           .scratch = p->room.strip });
}

/* The same for all columns of the part. */
static void run_tokens(const part *p, view to, view from, float *o, int64_t o_step, int64_t t,
                       int64_t T)
{
    const int64_t wide = to.row == COLUMNS ? COLUMNS : p->columns;
    for (int64_t c = 0; c < p->columns; c += wide)
        run_strip(p, to, from, o, o_step, t, T, c, kl_min(wide, p->columns - c));
}

static void run_recurrent(const part *p, view to, view from, float *o, int64_t o_step, int64_t t,
                          int64_t T)
{
    for (int64_t i = 0; i < T; i += KL_DELTA_STEP) {
        const int64_t n = kl_min(KL_DELTA_STEP, T - i);
        fill(p, &p->room.now, 0, t + i, n, AHEAD);
        run_tokens(p, to, from, o + i * o_step, o_step, t + i, n);
        from = to;
    }
}

static kl_delta_chunk chunk_of_tokens(const part *p, int64_t t, int64_t n)
{
    const room *r = &p->room;
    const kl_delta_rule_args *args = p->task->args;
    const float *beta = p->task->beta + (p->first + t) * args->Hv + p->head;
    return kl_delta_chunk_of(&r->chunk, args, &r->now, n, beta, args->Hv);
}

/* At most a chunk of tokens, whose factors are there, on a state in strips. Between its strips of columns it
 * fetches the factors of the `next` tokens after them, a share at a time. */
static void run_chunk(const part *p, view state, float *o, int64_t o_step, int64_t t, int64_t n,
                      int64_t next)
{
    const task *a = p->task;
    const kl_delta_rule_args *args = a->args;
    const kl_delta_chunk chunk = chunk_of_tokens(p, t, n);
    const bool as_chunk = a->k->delta_chunk_factors(&chunk);
    const int64_t row = (p->first + t) * args->Hv + p->head;
    const int64_t share = kl_ceil_div(next, kl_ceil_div(p->columns, COLUMNS));
    int64_t filled = 0;
    for (int64_t c = 0; c < p->columns; c += COLUMNS) {
        const int64_t T = kl_min(share, next - filled);
        const float *ask[5 * KL_DELTA_BLOCK];
        int n_ask = 0;
        for (int64_t i = 0; i < kl_min(T, KL_DELTA_BLOCK); i++)
            n_ask += rows_of(p, t + n + filled + i, ask + n_ask);
        const kl_delta_columns strip = { .columns = kl_min(COLUMNS, p->columns - c),
                                         .state = state.base + c / COLUMNS * state.strip,
                                         .o = o + c,
                                         .v = a->v + row * args->V + p->c0 + c,
                                         .o_step = o_step,
                                         .v_step = args->Hv * args->V,
                                         .ask = ask,
                                         .n_ask = n_ask,
                                         .ask_values = kl_min(args->K, args->V),
                                         .scratch = p->room.columns };
        if (!as_chunk || !a->k->delta_chunk_columns(&chunk, &strip))
            run_strip(p, state, state, o, o_step, t, n, c, strip.columns);
        fill(p, &p->room.next, filled, t + n + filled, T, 0);
        filled += T;
    }
}

/* ---- parts ------------------------------------------------------------------------------------ */

typedef struct marks {
    const int64_t *at; /* token counts, rising */
    int64_t next, end;
} marks;

static marks marks_of(const part *p)
{
    const kl_delta_rule_args *args = p->task->args;
    if (args->checkpoints == NULL)
        return (marks){ 0 };
    return (marks){ args->checkpoints, args->checkpoint_offsets[p->sequence],
                    args->checkpoint_offsets[p->sequence + 1] };
}

static void keep(const part *p, marks *m, view state)
{
    const kl_delta_rule_args *args = p->task->args;
    float *kept = args->kept + m->next++ * args->Hv * args->K * args->V;
    copy_state(p, in_place(p, kept), state);
}

/* Token by token: to each mark, and to the end. */
static void part_recurrent(const part *p, view to, view from, float *o, int64_t o_step)
{
    marks m = marks_of(p);
    for (int64_t t = 0;;) {
        for (; m.next < m.end && m.at[m.next] == t; from = to) {
            copy_state(p, to, from);
            keep(p, &m, to);
        }
        if (t == p->tokens)
            break;
        const int64_t last = m.next < m.end ? m.at[m.next] : p->tokens;
        run_recurrent(p, to, from, o + t * o_step, o_step, t, last - t);
        from = to;
        t = last;
    }
    if (p->tokens == 0)
        copy_state(p, to, from);
}

/* Tokens of the chunk at t, or 0: what is left over is too short, or nothing. */
static int64_t chunk_at(const part *p, int64_t t)
{
    const int64_t n = kl_min(p->task->chunk, p->tokens - t);
    return p->task->args->form == KL_FORM_AUTO && n < p->task->chunk ? 0 : n;
}

/* n tokens from t on, to a checkpoint in a chunk or behind the last one. */
static void run_aside(const part *p, view state, float *o, int64_t o_step, int64_t t, int64_t n)
{
    if (p->task->args->form == KL_FORM_AUTO) {
        run_recurrent(p, state, state, o, o_step, t, n);
    } else {
        fill(p, &p->room.now, 0, t, n, AHEAD);
        run_chunk(p, state, o, o_step, t, n, 0);
    }
}

static void part_chunked(part *p, view to, view from, float *o, int64_t o_step)
{
    const view state = in_strips(p, p->room.state), aside = in_strips(p, p->room.aside);
    marks m = marks_of(p);
    if (p->columns % COLUMNS != 0) { /* padding is computed with: it must be finite */
        const int64_t values = kl_delta_round_up(p->columns, COLUMNS) * p->task->args->K;
        memset(p->room.state, 0, (size_t)values * sizeof(float));
        if (p->room.aside != NULL)
            memset(p->room.aside, 0, (size_t)values * sizeof(float));
    }
    copy_state(p, state, from);
    fill(p, &p->room.next, 0, 0, chunk_at(p, 0), AHEAD);
    for (int64_t t = 0, n; t < p->tokens; t += n) {
        n = chunk_at(p, t) > 0 ? chunk_at(p, t) : p->tokens - t;
        while (m.next < m.end && m.at[m.next] < t + n) {
            copy_state(p, aside, state);
            if (m.at[m.next] > t)
                run_aside(p, aside, p->room.thrown_away, p->task->columns, t, m.at[m.next] - t);
            keep(p, &m, aside);
        }
        const kl_delta_factors spent = p->room.now;
        p->room.now = p->room.next;
        p->room.next = spent;
        if (chunk_at(p, t) > 0)
            run_chunk(p, state, o + t * o_step, o_step, t, n, chunk_at(p, t + n));
        else
            run_recurrent(p, state, state, o + t * o_step, o_step, t, n);
    }
    while (m.next < m.end)
        keep(p, &m, state);
    copy_state(p, to, state);
}

static void run_part(part *p)
{
    const task *a = p->task;
    const kl_delta_rule_args *args = a->args;
    float *o = a->o + (p->first * args->Hv + p->head) * args->V + p->c0;
    const int64_t o_step = args->Hv * args->V;
    const view from = in_place(p, kl_slot_of(a->state_in, p->sequence));
    view to = in_place(p, kl_slot_of(a->state_out, p->sequence));
    const bool short_of_a_chunk = args->form == KL_FORM_AUTO && p->tokens < a->chunk;
    if (a->chunk > 0 && !short_of_a_chunk) {
        part_chunked(p, to, from, o, o_step);
    } else if (to.base != NULL) {
        part_recurrent(p, to, from, o, o_step);
    } else {
        to = in_strips(p, p->room.state);
        copy_state(p, to, from);
        part_recurrent(p, to, to, o, o_step);
    }
}

static void parts(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    const kl_fp saved = kl_fp_flush();
    for (int64_t i = begin; i < end; i++) {
        part p = part_of(a, i, thread);
        run_part(&p);
    }
    kl_fp_restore(saved);
}

/* Columns of V a task: a whole head, or some strips of it where that ends sooner. A task computes its factors anew, as
 * many as a head has, which take a third of the time of all its strips. */
static int64_t columns_of(const kl_ctx *ctx, const kl_delta_rule_args *args)
{
    const int64_t strips = kl_ceil_div(args->V, COLUMNS);
    int64_t longest = 1, best = strips, least = INT64_MAX;
    for (int64_t n = 0; n < args->N; n++)
        longest = kl_max(longest, args->offsets[n + 1] - args->offsets[n]);
    const int64_t heads = kl_ceil_div(args->T, longest) * args->Hv; /* as if all were as long */
    for (int64_t wide = strips; wide > 0 && ctx->threads > 1; wide--) {
        const int64_t rounds = kl_ceil_div(heads * kl_ceil_div(strips, wide), ctx->threads);
        const int64_t time = rounds * (strips + 3 * wide);
        if (time < least) {
            least = time;
            best = wide;
        }
    }
    return best * COLUMNS;
}

static int64_t chunk_of(const kl_delta_rule_args *args)
{
    switch (args->form) {
    case KL_FORM_RECURRENT: return 0;
    case KL_FORM_CHUNKED: return args->chunk > 0 ? args->chunk : DEFAULT_CHUNK;
    default: return KL_DELTA_BLOCK;
    }
}

kl_status cpu_delta_rule(kl_ctx *ctx, float *o, kl_slots state_out, const float *q, const float *k,
                         const float *v, const float *g, const float *beta, kl_slots state_in,
                         const kl_delta_rule_args *given)
{
    kl_delta_rule_args own = *given;
    if (own.form == KL_FORM_AUTO)
        own.form = ctx->delta_rule;
    const kl_delta_rule_args *args = &own;
    task a = { ctx->k,
               o,
               q,
               k,
               v,
               g,
               beta,
               state_out,
               state_in,
               args,
               .columns = columns_of(ctx, args),
               .chunk = chunk_of(args),
               .ld = kl_delta_ld(args->K) };
    a.n_parts = kl_ceil_div(args->V, a.columns);
    KL_TRY(kl_take_rooms(ctx, &a.rooms, lay_out(&(room){ 0 }, (kl_room){ 0 }, &a)));
    if (ctx->arena.measuring)
        return KL_OK;

    const int64_t tokens = kl_ceil_div(args->T, kl_max(1, args->N)); /* a sequence, on average */
    return kl_for(ctx, args->N * args->Hv * a.n_parts,
                  kl_row_grain(tokens * args->K * kl_min(args->V, a.columns) / 4), parts, &a);
}
