/* latent_attention, absorbed: the heads of a token share one key, [latent | k_shared], and one
 * value, the latent. In batches of up to BATCH tokens:
 *   q~_h = w_uk_h^T q_h
 *   a_h = sum_s p_s c_s,   l_h = sum_s p_s   over the positions s
 *   o_h = w_uv_h a_h / l_h
 * The two products take the activations that the context asks for (q_h, a_h in int8 or bfloat16), where the weights do.
 * Where those are narrow, positions are attended to in 16-bit fixed point (cpu/fixed.h).
 * The positions of a token are cut into segments of a page. A segment is a sum of its own, so that
 * threads can share a long cache; segments are merged in rising order, in waves that bound the
 * memory. Neither the wave nor the group of heads in a task changes a byte.
 * Where a token has a row of select its positions are those of the row, and what is cut into segments and blocks is the
 * list: rows of a block are gathered, so that a list of all positions gives the same bytes. */
#include "latent_attention.h"
#include "product.h"

enum { BATCH = 64, WAVE = 32, SEGMENT = KL_PAGE };

/* One thread's scratch while it attends: widened rows of one block, and what fixed point needs. */
typedef struct room {
    float *stored;     /* as kl_mla_stored_rows */
    kl_fixed_lanes q;  /* [H], of one token */
    kl_fixed_rows key; /* [64] */
    int32_t *pairs;    /* of the latents of key */
    int16_t *row;
} room;

static size_t lay_out(room *r, kl_room at, const kl_absorbed *e)
{
    const kl_latent_attention_args *g = e->a->args;
    r->stored = kl_take_floats(&at, kl_mla_stored_buffer(e->a));
    if (!kl_attends_fixed(e->a->ctx))
        return at.used;
    r->q = kl_take_lanes(&at, g->H, g->R + g->P);
    r->key = kl_take_rows(&at, g->R + g->P);
    r->pairs = kl_take_pairs(&at, g->R);
    r->row = kl_take(&at, r->q.stride, sizeof *r->row);
    return at.used;
}

/* And while it multiplies with w_uk^T or w_uv. */
typedef struct product_room {
    float *sum; /* [capacity, V] */
    void *product;
} product_room;

/* w_uk, read across */
static kl_weight w_uk_t(const kl_mla *a)
{
    kl_weight w = *a->w_uk;
    w.rows = a->args->R;
    w.cols = a->args->K;
    w.transposed = !w.transposed;
    return w;
}

static size_t lay_out_product(product_room *r, kl_room at, const kl_absorbed *e)
{
    const kl_mla *a = e->a;
    const kl_weight up = w_uk_t(a);
    r->sum = kl_take_floats(&at, e->capacity * a->args->V);
    r->product = kl_take(&at, 1,
                         kl_larger(kl_product_once_scratch(a->ctx, &up, e->capacity),
                                   kl_product_once_scratch(a->ctx, a->w_uv, e->capacity)));
    return at.used;
}

kl_status kl_absorbed_prepare(kl_absorbed *e, const kl_mla *a)
{
    const kl_latent_attention_args *g = a->args;
    int64_t longest = 0;
    room attending;
    product_room multiplying;
    e->a = a;
    for (int64_t n = 0; n < g->N; n++) {
        const int64_t expanded =
            a->ctx->arena.measuring ? kl_mla_expanded_least(g, n) : kl_mla_expanded_tokens(g, n);
        const int64_t tokens = g->offsets[n + 1] - g->offsets[n] - expanded;
        e->n_tokens += tokens;
        if (tokens > 0)
            longest = kl_max(longest, kl_mla_attended_most(g, n));
    }
    if (e->n_tokens == 0)
        return KL_OK;
    e->capacity = kl_min(e->n_tokens, BATCH);
    const int64_t segments = kl_ceil_div(longest, SEGMENT);
    const int64_t wave = kl_min(WAVE, e->capacity * segments), slots = wave * g->H;
    const int64_t rows = e->capacity * g->H;
    KL_SCRATCH(e->token, a->ctx, e->capacity);
    KL_SCRATCH(e->unit, a->ctx, wave);
    KL_SCRATCH(e->query, a->ctx, rows * g->R);
    KL_TRY(kl_scratch_running(a->ctx, &e->run, rows, g->R));
    e->run.stride = e->capacity * g->R;
    KL_TRY(kl_scratch_running(a->ctx, &e->part, slots, g->R));
    return kl_take_rooms(a->ctx, &e->rooms,
                         kl_larger(lay_out(&attending, (kl_room){ 0 }, e),
                                   lay_out_product(&multiplying, (kl_room){ 0 }, e)));
}

/* ---- queries ---- */

/* q~ of heads begin .. end - 1, for the tokens of the batch */
static void absorb_queries(void *arg, int64_t begin, int64_t end, int thread)
{
    const kl_absorbed *e = arg;
    const kl_latent_attention_args *g = e->a->args;
    const int64_t width = g->K + g->P;
    const kl_weight w = w_uk_t(e->a);
    product_room r;
    lay_out_product(&r, kl_room_of(&e->rooms, thread), e);
    for (int64_t h = begin; h < end; h++)
        for (int64_t i = 0; i < e->n_batch;) {
            int64_t run = 1; /* tokens that follow each other in q */
            while (i + run < e->n_batch && e->token[i + run].t == e->token[i].t + run)
                run++;
            kl_product_once(e->a->ctx, e->query + (h * e->capacity + i) * g->R, g->R,
                            e->a->q + (e->token[i].t * g->H + h) * width, g->H * width, run, &w, h,
                            0, g->R, r.product);
            i += run;
        }
}

/* ---- positions ---- */

/* A token's running softmax, from head h on. */
static kl_running of_token(const kl_absorbed *e, int64_t token, int64_t h)
{
    const int64_t row = token * e->a->args->H + h;
    return (kl_running){ e->run.m + row, e->run.l + row,
                         e->run.acc + h * e->run.stride + token * e->run.width, e->run.stride,
                         e->run.width };
}

/* Where unit u keeps head h: segment 0 begins the token's running softmax, others are partial. */
static kl_running place(const kl_absorbed *e, int64_t u, int64_t h)
{
    return e->unit[u].segment == 0 ? of_token(e, e->unit[u].token, h)
                                   : kl_running_from(e->part, u * e->a->args->H + h);
}

/* A segment's heads of one token, and the block at hand. */
typedef struct segment {
    const kl_mla *a;
    int64_t n, heads;      /* sequence */
    const int32_t *select; /* of the token, or NULL */
    kl_rows q[2];          /* [heads] of q~ and of q's shared part */
    kl_running run;
} segment;

/* Rows of positions, or entries of the token's list, at .. at + count - 1, widened. */
static kl_rows rows_of(const segment *s, const kl_cache *cache, int64_t at, int64_t count,
                       int64_t width, float *buffer)
{
    const kl_mla *a = s->a;
    if (s->select == NULL)
        return kl_mla_cache_rows(a, cache, s->n, at, count, width, buffer);
    return kl_cache_gather(a->ctx->k, cache, s->n, s->select + at, count, 0, width, buffer);
}

static void both_rows(const segment *s, int64_t at, int64_t count, float *buffer, kl_rows rows[2])
{
    const kl_mla *a = s->a;
    const kl_latent_attention_args *g = a->args;
    rows[0] = rows_of(s, &a->latent, at, count, g->R, buffer);
    rows[1] =
        rows_of(s, &a->k_shared, at, count, g->P, buffer + kl_mla_buffer(a, &a->latent, g->R));
}

static void attend_block(const segment *s, const room *r, int64_t at, int64_t count)
{
    const kl_mla *a = s->a;
    const kl_latent_attention_args *g = a->args;
    kl_rows rows[2];
    both_rows(s, at, count, r->stored, rows);
    const kl_attend block = {
        .q = { s->q[0], s->q[1] },
        .k = { rows[0], rows[1] },
        .v = rows[0],
        .run = s->run,
        .n_queries = s->heads,
        .n = count,
        .first = count,
        .step = 0,
        .scale = g->scale,
    };
    a->ctx->k->attend(&block);
}

static void attend_block_fixed(const segment *s, const room *r, int64_t at, int64_t count,
                               int64_t end)
{
    const kl_mla *a = s->a;
    kl_rows stored[2];
    if (s->select == NULL)
        kl_mla_stored_rows(a, s->n, at, count, r->stored, stored);
    else
        both_rows(s, at, count, r->stored, stored);
    /* rows that lie apart are not announced */
    const int64_t next = s->select == NULL ? at + KL_BLOCK : end;
    a->ctx->k->fixed_rows(&r->key, stored, count);
    a->ctx->k->fixed_pairs(r->pairs, a->args->R, &r->key, count);
    const kl_attend_fixed block = {
        .q = r->q,
        .k = r->key,
        .v = r->pairs,
        .v_unit = r->key.unit,
        .run = s->run,
        .ahead = { kl_cache_ahead(&a->latent, s->n, next, end, 0, a->args->R),
                   kl_cache_ahead(&a->k_shared, s->n, next, end, 0, a->args->P) },
        .n_queries = s->heads,
        .n = count,
        .first = count,
        .step = 0,
        .scale = a->args->scale,
    };
    a->ctx->k->attend_fixed(&block);
}

static void attend_segment(const kl_absorbed *e, int64_t u, int64_t h, int64_t heads, const room *r)
{
    const kl_mla *a = e->a;
    const kl_latent_attention_args *g = a->args;
    const struct kl_absorbed_token *token = &e->token[e->unit[u].token];
    const int64_t width = g->K + g->P, begin = e->unit[u].segment * SEGMENT;
    const int64_t end = kl_min(begin + SEGMENT, token->count);
    const segment s = {
        .a = a,
        .n = token->n,
        .heads = heads,
        .select = token->select,
        .q = { { e->query + (h * e->capacity + e->unit[u].token) * g->R, e->capacity * g->R, g->R,
                 NULL },
               { a->q + (token->t * g->H + h) * width + g->K, width, g->P, NULL } },
        .run = place(e, u, h),
    };
    const bool fixed = kl_attends_fixed(a->ctx);
    kl_running_clear(s.run, heads);
    if (fixed)
        a->ctx->k->fixed_lanes(&r->q, s.q, heads, r->row);
    for (int64_t p = begin; p < end; p += KL_BLOCK) {
        const int64_t count = kl_min(KL_BLOCK, end - p);
        if (fixed)
            attend_block_fixed(&s, r, p, count, end);
        else
            attend_block(&s, r, p, count);
    }
}

static void attend_units(void *arg, int64_t begin, int64_t end, int thread)
{
    const kl_absorbed *e = arg;
    const int64_t H = e->a->args->H, groups = kl_ceil_div(H, e->head_group);
    room r;
    lay_out(&r, kl_room_of(&e->rooms, thread), e);
    for (int64_t task = begin; task < end; task++) {
        const int64_t h = task % groups * e->head_group;
        attend_segment(e, task / groups, h, kl_min(e->head_group, H - h), &r);
    }
}

/* Adds the partial sums of the wave to their tokens', segment by segment. */
static void merge_heads(void *arg, int64_t begin, int64_t end, int thread)
{
    const kl_absorbed *e = arg;
    (void)thread;
    for (int64_t u = 0; u < e->n_units; u++) {
        if (e->unit[u].segment == 0)
            continue;
        for (int64_t h = begin; h < end; h++) {
            const kl_running from = place(e, u, h), to = of_token(e, e->unit[u].token, h);
            e->a->ctx->k->attend_merge(&to, &from, 1);
        }
    }
}

/* Heads a task: few enough that all threads have work, whole register tiles or lanes. */
static int64_t head_group(const kl_absorbed *e)
{
    const int64_t tile = kl_attends_fixed(e->a->ctx) ? KL_FIXED_LANES : 8, H = e->a->args->H;
    const int64_t groups = kl_ceil_div(4 * (int64_t)e->a->ctx->threads, e->n_units);
    return kl_max(1, kl_ceil_div(kl_ceil_div(H, groups), tile)) * tile;
}

static kl_status run_wave(kl_absorbed *e)
{
    kl_ctx *ctx = e->a->ctx;
    const int64_t H = e->a->args->H;
    e->head_group = head_group(e);
    KL_TRY(kl_for(ctx, e->n_units * kl_ceil_div(H, e->head_group), 1, attend_units, e));
    for (int64_t u = 0; u < e->n_units; u++)
        if (e->unit[u].segment > 0)
            return kl_for(ctx, H, 4, merge_heads, e);
    return KL_OK;
}

/* ---- outputs ---- */

static void project_heads(void *arg, int64_t begin, int64_t end, int thread)
{
    const kl_absorbed *e = arg;
    const kl_latent_attention_args *g = e->a->args;
    product_room r;
    lay_out_product(&r, kl_room_of(&e->rooms, thread), e);
    for (int64_t h = begin; h < end; h++) {
        kl_product_once(e->a->ctx, r.sum, g->V, e->run.acc + h * e->run.stride, g->R, e->n_batch,
                        e->a->w_uv, h, 0, g->V, r.product);
        for (int64_t i = 0; i < e->n_batch; i++) {
            float *o = e->a->o + (e->token[i].t * g->H + h) * g->V;
            for (int64_t v = 0; v < g->V; v++)
                o[v] = e->token[i].count > 0 ? r.sum[i * g->V + v] / e->run.l[i * g->H + h] : 0.0f;
        }
    }
}

/* ---- the whole ---- */

static kl_status run_batch(kl_absorbed *e)
{
    kl_ctx *ctx = e->a->ctx;
    const int64_t H = e->a->args->H;
    KL_TRY(kl_product_for(ctx, H, 1, absorb_queries, e));
    e->n_units = 0;
    for (int64_t i = 0; i < e->n_batch; i++) {
        if (e->token[i].count == 0)
            kl_running_clear(of_token(e, i, 0), H);
        for (int64_t s = 0; s * SEGMENT < e->token[i].count; s++) {
            e->unit[e->n_units++] = (struct kl_absorbed_unit){ i, s };
            if (e->n_units == WAVE) {
                KL_TRY(run_wave(e));
                e->n_units = 0;
            }
        }
    }
    if (e->n_units > 0)
        KL_TRY(run_wave(e));
    return kl_product_for(ctx, H, 1, project_heads, e);
}

/* Positions before the first -1 of a row. */
static int64_t listed(const int32_t *row, int64_t width)
{
    int64_t low = 0, high = width;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (row[middle] < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* New token i of sequence n. */
static struct kl_absorbed_token token_of(const kl_latent_attention_args *g, int64_t n, int64_t i)
{
    const int64_t t = g->offsets[n] + i;
    if (!kl_mla_has_row(g, n, i))
        return (struct kl_absorbed_token){ n, t, kl_mla_seen(g, n, i), NULL };
    const int32_t *row = g->select + t * g->select_width;
    return (struct kl_absorbed_token){ n, t, listed(row, g->select_width), row };
}

kl_status kl_absorbed_run(kl_absorbed *e)
{
    if (e->n_tokens == 0)
        return KL_OK;
    const kl_latent_attention_args *g = e->a->args;
    e->n_batch = 0;
    for (int64_t n = 0; n < g->N; n++)
        for (int64_t i = kl_mla_expanded_tokens(g, n); i < g->offsets[n + 1] - g->offsets[n]; i++) {
            e->token[e->n_batch++] = token_of(g, n, i);
            if (e->n_batch == e->capacity) {
                KL_TRY(run_batch(e));
                e->n_batch = 0;
            }
        }
    return e->n_batch > 0 ? run_batch(e) : KL_OK;
}
