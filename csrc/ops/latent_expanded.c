/* latent_attention, expanded: a task is one head of up to CHUNK queries of a sequence. Block by
 * block of positions it computes the head's keys and values, the same bytes in any call,
 *   k_nope [64, K] = c w_uk_h^T,   v [64, V] = c w_uv_h^T
 * then brings every query that sees the block up to date. */
#include "latent_attention.h"
#include "product.h"

/* bounds a thread's scratch; the keys and values are computed once for each chunk */
enum { CHUNK = 1024 };

/* One thread's scratch. */
typedef struct room {
    float *k, *v, *latent, *k_shared; /* [64, .] of one block */
    kl_running run;                   /* [longest] */
    void *product;
} room;

static size_t lay_out(room *r, kl_room at, const kl_expanded *e)
{
    const kl_mla *a = e->a;
    const kl_latent_attention_args *g = a->args;
    r->k = kl_take_floats(&at, KL_BLOCK * g->K);
    r->v = kl_take_floats(&at, KL_BLOCK * g->V);
    r->latent = kl_take_floats(&at, kl_cache_buffer(&a->latent, g->R));
    r->k_shared = kl_take_floats(&at, kl_cache_buffer(&a->k_shared, g->P));
    r->run = kl_take_running(&at, e->longest, g->V);
    r->product = kl_take(
        &at, 1,
        kl_larger(kl_product_scratch(a->w_uk, KL_BLOCK), kl_product_scratch(a->w_uv, KL_BLOCK)));
    return at.used;
}

kl_status kl_expanded_prepare(kl_expanded *e, const kl_mla *a)
{
    const kl_latent_attention_args *g = a->args;
    room r;
    e->a = a;
    for (int64_t n = 0; n < g->N; n++) {
        const int64_t queries =
            a->ctx->arena.measuring ? kl_mla_expanded_most(g, n) : kl_mla_expanded_tokens(g, n);
        e->n_chunks += kl_ceil_div(queries, CHUNK);
        e->longest = kl_max(e->longest, kl_min(queries, CHUNK));
    }
    if (e->n_chunks == 0)
        return KL_OK;
    KL_SCRATCH(e->chunk_end, a->ctx, g->N);
    KL_TRY(kl_take_rooms(a->ctx, &e->rooms,
                         kl_attends_fixed(a->ctx) ? kl_expanded_fixed_bytes(e)
                                                  : lay_out(&r, (kl_room){ 0 }, e)));
    if (a->ctx->arena.measuring)
        return KL_OK;
    for (int64_t n = 0, end = 0; n < g->N; n++)
        e->chunk_end[n] = end += kl_ceil_div(kl_mla_expanded_tokens(g, n), CHUNK);
    return KL_OK;
}

/* keys and values of positions p .. p + count - 1 */
static void expand(const kl_mla *a, const room *r, int64_t n, int64_t h, int64_t p, int64_t count)
{
    const kl_latent_attention_args *g = a->args;
    const kl_rows c = kl_mla_cache_rows(a, &a->latent, n, p, count, g->R, r->latent);
    kl_product(a->ctx, r->k, g->K, c.data, c.stride, NULL, count, a->w_uk, h, 0, g->K, r->product);
    kl_product(a->ctx, r->v, g->V, c.data, c.stride, NULL, count, a->w_uv, h, 0, g->V, r->product);
}

/* head h of queries first .. last - 1 of sequence n */
static void attend(const kl_expanded *e, kl_room at, int64_t n, int64_t h, int64_t first,
                   int64_t last)
{
    const kl_mla *a = e->a;
    const kl_latent_attention_args *g = a->args;
    const int64_t width = g->K + g->P, row = g->H * width, count = last - first;
    const int64_t seen = kl_mla_seen(g, n, first), all = kl_mla_seen(g, n, last - 1);
    const float *q = a->q + (g->offsets[n] + first) * row + h * width;
    room r;
    lay_out(&r, at, e);
    kl_running_clear(r.run, count);
    for (int64_t p = 0; p < all; p += KL_BLOCK) {
        const int64_t positions = kl_min(KL_BLOCK, all - p), skip = kl_max(0, p + 1 - seen);
        expand(a, &r, n, h, p, positions);
        const kl_attend block = {
            .q = { { q + skip * row, row, g->K, NULL },
                   { q + skip * row + g->K, row, g->P, NULL } },
            .k = { { r.k, g->K, g->K, NULL },
                   kl_mla_cache_rows(a, &a->k_shared, n, p, positions, g->P, r.k_shared) },
            .v = { r.v, g->V, g->V, NULL },
            .run = kl_running_from(r.run, skip),
            .n_queries = count - skip,
            .n = positions,
            .first = seen + skip - p,
            .step = 1,
            .scale = g->scale,
        };
        a->ctx->k->attend(&block);
    }
    kl_mla_put(a, r.run, g->offsets[n] + first, h, count);
}

static void heads(void *arg, int64_t begin, int64_t end, int thread)
{
    const kl_expanded *e = arg;
    const kl_mla *a = e->a;
    const kl_room at = kl_room_of(&e->rooms, thread);
    for (int64_t task = begin; task < end; task++) {
        const int64_t h = task / e->n_chunks, chunk = task % e->n_chunks;
        int64_t n = 0;
        while (e->chunk_end[n] <= chunk)
            n++;
        const int64_t first = (chunk - (n > 0 ? e->chunk_end[n - 1] : 0)) * CHUNK;
        const int64_t last = kl_min(first + CHUNK, kl_mla_expanded_tokens(a->args, n));
        if (kl_attends_fixed(a->ctx))
            kl_expanded_fixed(e, at, n, h, first, last);
        else
            attend(e, at, n, h, first, last);
    }
}

kl_status kl_expanded_run(const kl_expanded *e)
{
    kl_expanded copy = *e;
    return kl_product_for(e->a->ctx, e->n_chunks * e->a->args->H, 1, heads, &copy);
}
