/* latent_attention, expanded, in 16-bit fixed point (cpu/fixed.h), which is what a task of latent_expanded.c does
 * where products take narrow activations. Rows are made fixed once for all that they are multiplied with: queries and
 * the rows of w_uk and w_uv once a task, latents, keys and values once a block. */
#include "latent_attention.h"
#include "product.h"

/* One thread's scratch. */
typedef struct room {
    kl_fixed_lanes q, w_uk, w_uv;     /* [longest], [K], [V] */
    kl_fixed_rows latent, key, value; /* [64] of one block */
    kl_running run;                   /* [longest] */
    float *rows;                      /* [max(K, V), R] of w_uk or w_uv */
    float *k, *v, *stored;            /* [64, K], [64, V], as kl_mla_stored_rows */
    int32_t *pairs;                   /* of value */
    int16_t *row;
} room;

static size_t lay_out(room *r, kl_room at, const kl_expanded *e)
{
    const kl_mla *a = e->a;
    const kl_latent_attention_args *g = a->args;
    const int64_t width = g->K + g->P;
    r->q = kl_take_lanes(&at, e->longest, width);
    r->w_uk = kl_take_lanes(&at, g->K, g->R);
    r->w_uv = kl_take_lanes(&at, g->V, g->R);
    r->latent = kl_take_rows(&at, g->R);
    r->key = kl_take_rows(&at, width);
    r->value = kl_take_rows(&at, g->V);
    r->run = kl_take_running(&at, e->longest, g->V);
    r->rows = kl_take_floats(&at, kl_max(g->K, g->V) * g->R);
    r->k = kl_take_floats(&at, KL_BLOCK * g->K);
    r->v = kl_take_floats(&at, KL_BLOCK * g->V);
    r->stored = kl_take_floats(&at, kl_mla_stored_buffer(a));
    r->pairs = kl_take_pairs(&at, g->V);
    r->row = kl_take(&at, kl_max(r->q.stride, r->w_uk.stride), sizeof *r->row);
    return at.used;
}

size_t kl_expanded_fixed_bytes(const kl_expanded *e)
{
    room r;
    return lay_out(&r, (kl_room){ 0 }, e);
}

static void weight_lanes(const kl_mla *a, const room *r, const kl_fixed_lanes *to,
                         const kl_weight *w, int64_t h, int64_t rows)
{
    const int64_t R = a->args->R;
    kl_product_rows(a->ctx, r->rows, R, w, h, 0, rows);
    const kl_rows x[2] = { { r->rows, R, R, NULL } };
    a->ctx->k->fixed_lanes(to, x, rows, r->row);
}

/* keys and values of positions p .. p + count - 1 of sequence n */
static void expand(const kl_mla *a, const room *r, int64_t n, int64_t p, int64_t count)
{
    const kl_latent_attention_args *g = a->args;
    const kl_kernels *kernels = a->ctx->k;
    kl_rows stored[2];
    kl_mla_stored_rows(a, n, p, count, r->stored, stored);
    const kl_rows latent[2] = { stored[0] };
    kernels->fixed_rows(&r->latent, latent, count);
    kernels->fixed_product(r->k, g->K, &r->latent, count, &r->w_uk, g->K);
    kernels->fixed_product(r->v, g->V, &r->latent, count, &r->w_uv, g->V);
    const kl_rows key[2] = { { r->k, g->K, g->K, NULL }, stored[1] };
    const kl_rows value[2] = { { r->v, g->V, g->V, NULL } };
    kernels->fixed_rows(&r->key, key, count);
    kernels->fixed_rows(&r->value, value, count);
    kernels->fixed_pairs(r->pairs, g->V, &r->value, count);
}

void kl_expanded_fixed(const kl_expanded *e, kl_room at, int64_t n, int64_t h, int64_t first,
                       int64_t last)
{
    const kl_mla *a = e->a;
    const kl_latent_attention_args *g = a->args;
    const int64_t width = g->K + g->P, row = g->H * width, count = last - first;
    const int64_t seen = kl_mla_seen(g, n, first), all = kl_mla_seen(g, n, last - 1);
    const float *q = a->q + (g->offsets[n] + first) * row + h * width;
    const kl_rows queries[2] = { { q, row, width, NULL } };
    room r;
    lay_out(&r, at, e);
    a->ctx->k->fixed_lanes(&r.q, queries, count, r.row);
    weight_lanes(a, &r, &r.w_uk, a->w_uk, h, g->K);
    weight_lanes(a, &r, &r.w_uv, a->w_uv, h, g->V);
    kl_running_clear(r.run, count);
    for (int64_t p = 0; p < all; p += KL_BLOCK) {
        const int64_t positions = kl_min(KL_BLOCK, all - p);
        expand(a, &r, n, p, positions);
        const kl_attend_fixed block = {
            .q = r.q,
            .k = r.key,
            .v = r.pairs,
            .v_unit = r.value.unit,
            .run = r.run,
            .n_queries = count,
            .n = positions,
            .first = seen - p,
            .step = 1,
            .scale = g->scale,
        };
        a->ctx->k->attend_fixed(&block);
    }
    kl_mla_put(a, r.run, g->offsets[n] + first, h, count);
}
