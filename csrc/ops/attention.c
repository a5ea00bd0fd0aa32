/* attention: causal softmax attention of grouped queries over a cache of keys and values.
 *   o[t,h] = sum_s p_s v[s,c],   p = softmax_s( scale * q[t,h] . k[s,c] ),   c = h / (H / Hkv)
 *   o [T, H, V]     q [T, H, K]     k, v: caches of rows Hkv K and Hkv V wide
 * Query i of a sequence's L sees the first positions - L + i + 1; positions not seen are left out by
 * loop bounds. Budget: kimi_linear/diff/budgets (docs/math.md#attention).
 *
 * One form for all: a query's positions are cut into segments of a page, a segment into blocks of 64,
 * both aligned to position 0. A segment is a sum of its own with a running maximum, block by block;
 * segments are merged in rising order. What a query gets therefore depends on nothing but itself and the
 * positions that it sees: a sequence may be cut into calls anywhere.
 *
 * Where products take narrow activations, tokens of long pieces (pieces.h) attend in 16-bit fixed point (cpu/fixed.h);
 * a call is then the whole where it is cut at multiples of 64 of its tokens.
 *
 * Work is cut into chunks of up to ROWS queries times heads of one key head, which share the loads (and the
 * widening) of a block. A chunk is one task for each key head, which takes all segments; but where that is too
 * much for one thread (decoding at depth), its segments are tasks of their own and a second pass merges them. */
#include "cache_rows.h"
#include "pieces.h"
#include "room.h"

#include <math.h>
#include <string.h>

enum { ROWS = 256, SEGMENT = KL_PAGE };

/* Up to this many rows, those of one token's heads, float16 is widened as it is read, where keys and values both are
 * of it: a buffer between costs more than the products do. */
enum { DIRECT = 8 };

/* queries first .. first + count - 1 of sequence n, all heads */
typedef struct chunk {
    int64_t n, first, count;
    bool fixed;
} chunk;

typedef struct job {
    kl_ctx *ctx;
    float *o;
    const float *q;
    kl_cache keys, values;
    const kl_attention_args *args;
    int64_t group, rows; /* query heads of a key head; rows of the largest chunk and one key head */
    chunk *whole;        /* [n_whole]: one task a key head each */
    int64_t n_whole;
    chunk *split; /* [n_split]: one after another, by segments */
    int64_t n_split;
    kl_running run;  /* m, l [threads, rows]; acc [threads, rows, V]: of a task */
    kl_running part; /* the same: one segment of it */
    kl_rooms rooms;
    bool fixed;      /* some chunks are */
    kl_running slot; /* of a wave of segments: m, l [wave, Hkv, rows]; acc [wave, Hkv, rows, V] */
    kl_running sum;  /* of the chunk: m, l [Hkv, rows]; acc [Hkv, rows, V] */
    int64_t wave;
    const chunk *at; /* the chunk at hand, and its segments of this wave */
    int64_t first_segment, n_segments;
} job;

/* One thread's scratch: a block, widened, and what fixed point needs. */
typedef struct room {
    float *keys, *values;
    kl_fixed_lanes q; /* [rows], each line in lanes of its own; there are at most 16 lines */
    kl_fixed_rows key, value;
    int32_t *pairs; /* of value */
    int16_t *row;
} room;

static size_t lay_out(room *r, kl_room at, const job *a)
{
    const kl_attention_args *g = a->args;
    r->keys = kl_take_floats(&at, kl_cache_buffer(&a->keys, g->K));
    r->values = kl_take_floats(&at, kl_cache_buffer(&a->values, g->V));
    if (!a->fixed)
        return at.used;
    r->q = kl_take_lanes(&at, a->rows + KL_FIXED_LANES * (KL_FIXED_LANES - 1), g->K);
    r->key = kl_take_rows(&at, g->K);
    r->value = kl_take_rows(&at, g->V);
    r->pairs = kl_take_pairs(&at, g->V);
    r->row = kl_take(&at, r->q.stride, sizeof *r->row);
    return at.used;
}

/* ---- what a query sees ---- */

static int64_t seen(const job *a, const chunk *c, int64_t i)
{
    const kl_attention_args *g = a->args;
    return g->positions[c->n] - (g->offsets[c->n + 1] - g->offsets[c->n]) + c->first + i + 1;
}

static int64_t segments(const job *a, const chunk *c)
{
    return kl_ceil_div(seen(a, c, c->count - 1), SEGMENT);
}

/* ---- a segment of a chunk ---- */

/* The rows of a chunk lie by head where that makes longer lines, else by query: lines of `length` rows
 * whose queries are `stride` values apart. */
typedef struct lines {
    int64_t n, length, stride, next; /* next: from line to line in q, values */
    int64_t query_step, line_step;   /* by how many queries a row, a line moves on */
} lines;

static lines lines_of(const job *a, const chunk *c)
{
    const int64_t K = a->args->K, token = a->args->H * K;
    if (c->count >= a->group)
        return (lines){ a->group, c->count, token, K, 1, 0 };
    return (lines){ c->count, a->group, K, token, 0, 1 };
}

/* Leading rows of a line that see nothing behind a place, where the first sees `first` positions. */
static int64_t unseeing(lines l, int64_t first)
{
    return first > 0 ? 0 : l.query_step == 1 ? 1 - first : l.length;
}

/* The lanes from row number `row` on, a multiple of 16. */
static kl_fixed_lanes lanes_from(kl_fixed_lanes l, int64_t row)
{
    return (kl_fixed_lanes){ l.pair + row * l.stride / 2, l.unit + row, l.stride };
}

static const float *first_query(const job *a, const chunk *c, int64_t head)
{
    const kl_attention_args *g = a->args;
    return a->q + ((g->offsets[c->n] + c->first) * g->H + head * a->group) * g->K;
}

/* A head's keys or values of a block, for `rows` rows. */
static kl_rows block_of(const job *a, const kl_cache *cache, const chunk *c, int64_t position,
                        int64_t count, int64_t head, int64_t width, int64_t rows, float *buffer)
{
    if (rows <= DIRECT && a->keys.type == a->values.type)
        return kl_cache_stored(a->ctx->k, cache, c->n, position, count, head * width, width,
                               buffer);
    return kl_cache_rows(a->ctx->k, cache, c->n, position, count, head * width, width, buffer);
}

/* attend_segment in fixed point: keys, values and queries are made so once a block, once a segment. */
static void attend_segment_fixed(const job *a, const chunk *c, int64_t head, int64_t segment,
                                 kl_running run, const room *r)
{
    const kl_attention_args *g = a->args;
    const kl_kernels *k = a->ctx->k;
    const lines l = lines_of(a, c);
    const int64_t begin = segment * SEGMENT, lanes = kl_fixed_groups(l.length) * KL_FIXED_LANES;
    const int64_t end = kl_min(begin + SEGMENT, seen(a, c, c->count - 1));
    const float *q = first_query(a, c, head);
    kl_running_clear(run, l.n * l.length);
    for (int64_t i = 0; i < l.n; i++) {
        const kl_rows x[2] = { { q + i * l.next, l.stride, g->K, NULL } };
        const kl_fixed_lanes line = lanes_from(r->q, i * lanes);
        k->fixed_lanes(&line, x, l.length, r->row);
    }
    for (int64_t p = begin; p < end; p += KL_BLOCK) {
        const int64_t count = kl_min(KL_BLOCK, end - p);
        const kl_rows key[2] = { kl_cache_stored(k, &a->keys, c->n, p, count, head * g->K, g->K,
                                                 r->keys) };
        const kl_rows value[2] = { kl_cache_stored(k, &a->values, c->n, p, count, head * g->V, g->V,
                                                   r->values) };
        k->fixed_rows(&r->key, key, count);
        k->fixed_rows(&r->value, value, count);
        k->fixed_pairs(r->pairs, g->V, &r->value, count);
        kl_attend_fixed block = {
            .k = r->key,
            .v = r->pairs,
            .v_unit = r->value.unit,
            .ahead = { kl_cache_ahead(&a->keys, c->n, p + KL_BLOCK, end, head * g->K, g->K),
                       kl_cache_ahead(&a->values, c->n, p + KL_BLOCK, end, head * g->V, g->V) },
            .n_queries = l.length,
            .n = count,
            .step = l.query_step,
            .scale = g->scale,
        };
        for (int64_t i = 0; i < l.n; i++) {
            block.q = lanes_from(r->q, i * lanes);
            block.run = kl_running_from(run, i * l.length);
            block.first = seen(a, c, i * l.line_step) - p;
            k->attend_fixed(&block);
            block.ahead[0].n = block.ahead[1].n = 0;
        }
    }
}

/* Rows of key head `head` over the positions of one segment, in run: cleared, then block by block. */
static void attend_segment(const job *a, const chunk *c, int64_t head, int64_t segment,
                           kl_running run, const room *r)
{
    if (c->fixed) {
        attend_segment_fixed(a, c, head, segment, run, r);
        return;
    }
    const kl_attention_args *g = a->args;
    const lines l = lines_of(a, c);
    const int64_t begin = segment * SEGMENT, rows = l.n * l.length;
    const int64_t end = kl_min(begin + SEGMENT, seen(a, c, c->count - 1));
    const float *q = first_query(a, c, head);
    kl_running_clear(run, rows);
    for (int64_t p = begin; p < end; p += KL_BLOCK) {
        const int64_t count = kl_min(KL_BLOCK, end - p);
        kl_attend block = {
            .k = { block_of(a, &a->keys, c, p, count, head, g->K, rows, r->keys) },
            .v = block_of(a, &a->values, c, p, count, head, g->V, rows, r->values),
            .ahead = { kl_cache_ahead(&a->keys, c->n, p + KL_BLOCK, end, head * g->K, g->K),
                       kl_cache_ahead(&a->values, c->n, p + KL_BLOCK, end, head * g->V, g->V) },
            .n = count,
            .step = l.query_step,
            .scale = g->scale,
        };
        for (int64_t i = 0; i < l.n; i++) {
            const int64_t first = seen(a, c, i * l.line_step) - p;
            const int64_t skip = unseeing(l, first);
            if (skip == l.length)
                continue;
            block.q[0] = (kl_rows){ q + i * l.next + skip * l.stride, l.stride, g->K, NULL };
            block.run = kl_running_from(run, i * l.length + skip);
            block.n_queries = l.length - skip;
            block.first = first + skip * l.query_step;
            a->ctx->k->attend(&block);
            block.ahead[0].n = block.ahead[1].n = 0;
        }
    }
}

/* Adds a segment's sums to those of the segments before it, for the queries that see any of it. */
static void merge_segment(const job *a, const chunk *c, int64_t segment, kl_running to,
                          kl_running from)
{
    const lines l = lines_of(a, c);
    for (int64_t i = 0; i < l.n; i++) {
        const int64_t skip = unseeing(l, seen(a, c, i * l.line_step) - segment * SEGMENT);
        const kl_running part = kl_running_from(from, i * l.length + skip);
        const kl_running sum = kl_running_from(to, i * l.length + skip);
        a->ctx->k->attend_merge(&sum, &part, l.length - skip);
    }
}

static void put_rows(const job *a, const chunk *c, int64_t head, kl_running run)
{
    const kl_attention_args *g = a->args;
    const lines l = lines_of(a, c);
    float *first = a->o + ((g->offsets[c->n] + c->first) * g->H + head * a->group) * g->V;
    for (int64_t row = 0; row < c->count * a->group; row++) {
        const int64_t line = row / l.length, i = row % l.length;
        const int64_t query = l.query_step == 1 ? i : line, h = l.query_step == 1 ? line : i;
        float *o = first + (query * g->H + h) * g->V;
        for (int64_t v = 0; v < g->V; v++)
            o[v] = run.acc[row * run.stride + v] / run.l[row];
    }
}

/* ---- chunks that one task takes ---- */

static void attend_chunks(void *arg, int64_t begin, int64_t end, int thread)
{
    const job *a = arg;
    const kl_running run = kl_running_from(a->run, thread * a->rows),
                     part = kl_running_from(a->part, thread * a->rows);
    room r;
    lay_out(&r, kl_room_of(&a->rooms, thread), a);
    for (int64_t task = begin; task < end; task++) {
        const int64_t head = task % a->args->Hkv;
        const chunk *c = &a->whole[a->n_whole - 1 - task / a->args->Hkv]; /* the longest first */
        const int64_t n = segments(a, c);
        attend_segment(a, c, head, 0, run, &r);
        for (int64_t s = 1; s < n; s++) {
            attend_segment(a, c, head, s, part, &r);
            merge_segment(a, c, s, run, part);
        }
        put_rows(a, c, head, run);
    }
}

/* ---- chunks whose segments are tasks ---- */

static kl_running slot_of(const job *a, int64_t i, int64_t head)
{
    if (a->first_segment + i == 0)
        return kl_running_from(a->sum, head * a->rows);
    return kl_running_from(a->slot, (i * a->args->Hkv + head) * a->rows);
}

static void attend_wave(void *arg, int64_t begin, int64_t end, int thread)
{
    const job *a = arg;
    room r;
    lay_out(&r, kl_room_of(&a->rooms, thread), a);
    for (int64_t task = begin; task < end; task++) {
        const int64_t i = task / a->args->Hkv, head = task % a->args->Hkv;
        attend_segment(a, a->at, head, a->first_segment + i, slot_of(a, i, head), &r);
    }
}

/* The wave's segments into the sums, of a key head each. */
static void merge_wave(void *arg, int64_t begin, int64_t end, int thread)
{
    const job *a = arg;
    (void)thread;
    for (int64_t head = begin; head < end; head++) {
        const kl_running sum = kl_running_from(a->sum, head * a->rows);
        for (int64_t i = a->first_segment == 0 ? 1 : 0; i < a->n_segments; i++)
            merge_segment(a, a->at, a->first_segment + i, sum, slot_of(a, i, head));
        if (a->first_segment + a->n_segments == segments(a, a->at))
            put_rows(a, a->at, head, sum);
    }
}

static kl_status attend_by_segments(job *a, const chunk *c)
{
    const int64_t n = segments(a, c), Hkv = a->args->Hkv;
    a->at = c;
    for (int64_t s = 0; s < n; s += a->wave) {
        a->first_segment = s;
        a->n_segments = kl_min(a->wave, n - s);
        KL_TRY(kl_for(a->ctx, a->n_segments * Hkv, 1, attend_wave, a));
        KL_TRY(kl_for(a->ctx, Hkv, 1, merge_wave, a));
    }
    return KL_OK;
}

/* ---- planning ---- */

static int64_t work_of(const job *a, const chunk *c) { return c->count * seen(a, c, c->count - 1); }

static int64_t chunk_queries(const job *a) { return kl_max(1, ROWS / a->group); }

/* Calls `take` for each chunk of the call. */
static void each_chunk(job *a, void (*take)(job *a, const chunk *c, int64_t *sum), int64_t *sum)
{
    const kl_attention_args *g = a->args;
    for (int64_t n = 0; n < g->N; n++) {
        const int64_t L = g->offsets[n + 1] - g->offsets[n];
        const int64_t fixed = kl_attends_fixed(a->ctx) ? kl_long_pieces(L) : 0;
        for (int64_t first = 0, count; first < L; first += count) {
            count = kl_min(chunk_queries(a), (first < fixed ? fixed : L) - first);
            const chunk c = { n, first, count, first < fixed };
            take(a, &c, sum);
        }
    }
}

static void add_work(job *a, const chunk *c, int64_t *sum)
{
    *sum += work_of(a, c);
    a->rows = kl_max(a->rows, c->count * a->group);
    a->fixed |= c->fixed;
    a->n_whole++;
}

/* A chunk whose task would be more than a quarter of a thread's share is split. */
static void sort_chunk(job *a, const chunk *c, int64_t *sum)
{
    const bool split = a->ctx->threads > 1 && segments(a, c) > 1
                       && work_of(a, c) * 4 * a->ctx->threads > *sum * a->args->Hkv;
    if (!a->ctx->arena.measuring)
        *(split ? &a->split[a->n_split] : &a->whole[a->n_whole]) = *c;
    a->n_split += split;
    a->n_whole += !split;
}

static kl_status prepare(job *a)
{
    const kl_attention_args *g = a->args;
    const int64_t threads = a->ctx->threads;
    int64_t work = 0;
    each_chunk(a, add_work, &work);
    KL_SCRATCH(a->whole, a->ctx, a->n_whole);
    KL_SCRATCH(a->split, a->ctx, a->n_whole);
    a->n_whole = 0;
    each_chunk(a, sort_chunk, &work);
    room r;
    KL_TRY(kl_take_rooms(a->ctx, &a->rooms, lay_out(&r, (kl_room){ 0 }, a)));
    KL_TRY(kl_scratch_running(a->ctx, &a->run, threads * a->rows, g->V));
    KL_TRY(kl_scratch_running(a->ctx, &a->part, threads * a->rows, g->V));
    if (a->n_split == 0)
        return KL_OK;
    /* four tasks a thread, and for few rows more: a wave costs two hand-outs */
    a->wave = kl_max(kl_ceil_div(4 * threads, g->Hkv), ROWS / a->rows);
    KL_TRY(kl_scratch_running(a->ctx, &a->sum, g->Hkv * a->rows, g->V));
    return kl_scratch_running(a->ctx, &a->slot, a->wave * g->Hkv * a->rows, g->V);
}

kl_status cpu_attention(kl_ctx *ctx, float *o, const float *q, kl_cache keys, kl_cache values,
                        const kl_attention_args *args)
{
    job a = { .ctx = ctx,
              .o = o,
              .q = q,
              .keys = keys,
              .values = values,
              .args = args,
              .group = args->H / args->Hkv };
    KL_TRY(prepare(&a));
    if (ctx->arena.measuring)
        return KL_OK;
    KL_TRY(kl_for(ctx, a.n_whole * args->Hkv, 1, attend_chunks, &a));
    for (int64_t i = 0; i < a.n_split; i++)
        KL_TRY(attend_by_segments(&a, &a.split[i]));
    return KL_OK;
}

/* ---- checks ---- */

static kl_status check_sizes(kl_ctx *ctx, const kl_attention_args *a)
{
    int64_t n;
    const int64_t widest = kl_max(a->K, a->V);
    const bool low = a->T < 0 || a->H < 1 || a->Hkv < 1 || a->K < 1 || a->V < 1;
    if (low || widest > INT32_MAX || !kl_mul(&n, a->T, a->H) || !kl_mul(&n, n, 2 * widest)
        || !kl_mul(&n, a->Hkv, 2 * widest))
        return kl_fail(
            ctx, KL_ERR_SHAPE, "attention: T, H, Hkv, K, V are %lld, %lld, %lld, %lld, %lld%s",
            (long long)a->T, (long long)a->H, (long long)a->Hkv, (long long)a->K, (long long)a->V,
            low ? "; T must be >= 0, the others >= 1" : ", which is too large");
    if (a->H % a->Hkv != 0)
        return kl_fail(
            ctx, KL_ERR_SHAPE,
            "attention: there are H = %lld query heads and Hkv = %lld key heads; Hkv must "
            "divide H",
            (long long)a->H, (long long)a->Hkv);
    if (!(a->scale - a->scale == 0.0f))
        return kl_fail(ctx, KL_ERR_ARG, "attention: scale is %g; it must be finite",
                       (double)a->scale);
    return KL_OK;
}

static kl_status check_head(kl_ctx *ctx, const char *name, const kl_cache *cache, int64_t Hkv,
                            int64_t width)
{
    KL_TRY(kl_check_cache(ctx, "attention", name, cache, Hkv * width));
    return kl_check_whole(ctx, "attention", name, "heads", cache->type, width);
}

static void count_work(const kl_ctx *ctx, const kl_attention_args *a, const kl_cache *keys,
                       const kl_cache *values, int64_t *flops, int64_t *bytes)
{
    *flops = *bytes = 0;
    if (ctx->arena.measuring) /* a plan's context may be longer than any work that can be counted */
        return;
    *bytes = 4 * a->T * a->H * (a->K + a->V);
    for (int64_t n = 0; n < a->N; n++) {
        const int64_t L = a->offsets[n + 1] - a->offsets[n], S = a->positions[n];
        *flops += 2 * a->H * (L * (S - L) + L * (L + 1) / 2) * (a->K + a->V);
        *bytes += L > 0 ? S * (int64_t)(keys->row_bytes + values->row_bytes) : 0;
    }
}

kl_status kl_attention(kl_ctx *ctx, float *o, const float *q, kl_cache keys, kl_cache values,
                       const kl_attention_args *args)
{
    KL_TRY(check_sizes(ctx, args));
    KL_TRY(kl_check_offsets(ctx, "attention", args->offsets, args->N, args->T));
    KL_TRY(kl_check_positions(ctx, "attention", args->positions, args->offsets, args->N));
    KL_TRY(check_head(ctx, "keys", &keys, args->Hkv, args->K));
    KL_TRY(check_head(ctx, "values", &values, args->Hkv, args->V));
    int64_t flops, bytes;
    count_work(ctx, args, &keys, &values, &flops, &bytes);
    return KL_RUN(attention, flops, bytes, ctx, o, q, keys, values, args);
}
