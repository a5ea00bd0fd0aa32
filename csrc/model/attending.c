/* Layers that attend to what a cache holds: MLA and gated attention. */
#include "blocks.h"

#include <stdlib.h>

static kl_cache cache(const pass *p, int64_t layer, kl_state_part part)
{
    kl_cache cache = kl_cache_of(p->model, p->cache_type, layer, part);
    cache.page = p->page;
    return cache;
}

/* The query of MLA: one projection, or two with a norm between them. q_a: [T, q_rank], behind that norm. */
static kl_status mla_query(pass *p, int64_t layer, float *q, float *q_a, const float *x)
{
    const kl_config *c = &p->model->config;
    const mla_weights *w = &p->model->layer[layer].mla;
    if (c->mla.q_rank == 0)
        return project_one(p, q, x, &w->q);
    TRY(project_one(p, q_a, x, &w->q_a));
    TRY(kl_tap_at(p, KL_TAP_MLA_Q_A, layer, q_a));
    TRY(kl_rms_norm(p->ctx, q_a, q_a, w->q_a_norm, p->T, c->mla.q_rank, c->latent_eps));
    TRY(kl_tap_at(p, KL_TAP_MLA_Q_A_NORM, layer, q_a));
    return project_one(p, q, q_a, &w->q);
}

/* ids [T, W]: the positions that each token attends to, by a lightning indexer over pools of their keys */
static kl_status select_positions(pass *p, int64_t layer, int32_t *ids, const float *x,
                                  const float *q_a)
{
    kl_ctx *ctx = p->ctx;
    const kl_config *c = &p->model->config;
    const index_weights *w = &p->model->layer[layer].mla.index;
    const int64_t T = p->T, H = c->index.heads, D = c->index.width;
    const kl_cache keys = cache(p, layer, KL_STATE_INDEX_K),
                   gates = cache(p, layer, KL_STATE_INDEX_GATE),
                   pools = cache(p, layer, KL_STATE_POOL);
    NEW(q, T * H * D);
    NEW(k, T * D);
    NEW(gate, T * D);
    NEW(weights, T * H);
    TRY(project_one(p, q, q_a, &w->q));
    TRY(kl_tap_at(p, KL_TAP_MLA_INDEX_Q, layer, q));
    float *const from_x[] = { k, gate, weights };
    const kl_weight of_x[] = { w->k, w->gate, w->weights };
    TRY(project(p, from_x, x, of_x, 3, c->D));
    TRY(kl_tap_at(p, KL_TAP_MLA_INDEX_K_RAW, layer, k));
    TRY(kl_layer_norm(ctx, k, k, w->k_norm, w->k_bias, T, D, c->index.eps));
    TRY(kl_tap_at(p, KL_TAP_MLA_INDEX_K, layer, k));
    TRY(kl_tap_at(p, KL_TAP_MLA_INDEX_GATE, layer, gate));
    TRY(kl_tap_at(p, KL_TAP_MLA_INDEX_WEIGHTS, layer, weights));
    TRY(kl_cache_append(ctx, keys, k, p->offsets, p->start, p->N, T, D));
    TRY(kl_cache_append(ctx, gates, gate, p->offsets, p->start, p->N, T, D));
    TRY(kl_index_pool(ctx, pools, keys, gates, w->ape, p->offsets, p->start, p->N, T, D,
                      c->index.pool));
    const kl_index_args index = {
        .offsets = p->offsets,
        .positions = p->end,
        .N = p->N,
        .T = T,
        .H = H,
        .D = D,
        .pool = c->index.pool,
        .topk = c->index.topk,
    };
    TRY(kl_index_select(ctx, ids, q, pools, weights, &index));
    return kl_tap_at(p, KL_TAP_MLA_SELECT, layer, ids);
}

/* Queries that see no more positions than this attend to all, and their rows of ids are not read: as many as fit into a
 * row, or, where an edit took something from such a row, none. */
static kl_status select_from(pass *p, int64_t layer, const int32_t *ids, int64_t width,
                             int64_t *from)
{
    *from = width;
    if (!kl_pass_edits(p, KL_TAP_MLA_SELECT, layer) || p->ctx->arena.measuring)
        return KL_OK;
    const size_t n_bytes = (size_t)(p->T * width) * sizeof *ids;
    int32_t *rows = malloc(n_bytes + 1);
    if (rows == NULL)
        return kl_fail(p->ctx, KL_ERR_MEMORY, "out of memory: edit of mla.select");
    const kl_status status = p->model->backend->download(p->ctx, rows, ids, n_bytes);
    for (int64_t n = 0; status == KL_OK && n < p->N; n++)
        for (int64_t t = p->offsets[n]; t < p->offsets[n + 1]; t++) {
            const int64_t seen = p->end[n] - p->offsets[n + 1] + t + 1;
            for (int64_t i = 0; seen <= width && i < seen; i++)
                if (rows[t * width + i] != i)
                    *from = 0;
        }
    free(rows);
    return status;
}

/* MLA: softmax attention of all heads over one cached latent a token, of all tokens or of those that an indexer
 * chooses. No rotation. */
kl_status kl_run_mla(pass *p, int64_t layer, float *out, const float *x)
{
    kl_ctx *ctx = p->ctx;
    const kl_config *c = &p->model->config;
    const mla_weights *w = &p->model->layer[layer].mla;
    const int64_t T = p->T, H = c->mla.heads, K = c->mla.nope, P = c->mla.rope, V = c->mla.v,
                  R = c->mla.rank;
    const kl_cache latents = cache(p, layer, KL_STATE_LATENT),
                   k_shareds = cache(p, layer, KL_STATE_K_SHARED);

    NEW(q, T * H * (K + P));
    NEW(q_a, T * c->mla.q_rank);
    NEW(latent, T * R);
    NEW(k_shared, T * P);
    NEW(gate, c->mla.gated ? T * H * V : 0);
    NEW(o, T * H * V);
    TRY(mla_query(p, layer, q, q_a, x));
    TRY(kl_tap_at(p, KL_TAP_MLA_Q, layer, q));

    float *from_x[3] = { latent };
    kl_weight of_x[3] = { w->latent };
    int n = 1;
    if (P > 0) {
        from_x[n] = k_shared;
        of_x[n++] = w->k_shared;
    }
    if (c->mla.gated) {
        from_x[n] = gate;
        of_x[n++] = w->gate;
    }
    TRY(project(p, from_x, x, of_x, n, c->D));
    TRY(kl_tap_at(p, KL_TAP_MLA_LATENT_RAW, layer, latent));
    TRY(kl_tap_at(p, KL_TAP_MLA_K_SHARED, layer, k_shared));
    TRY(kl_rms_norm(ctx, latent, latent, w->latent_norm, T, R, c->latent_eps));
    TRY(kl_tap_at(p, KL_TAP_MLA_LATENT, layer, latent));
    TRY(kl_cache_append(ctx, latents, latent, p->offsets, p->start, p->N, T, R));
    if (P > 0)
        TRY(kl_cache_append(ctx, k_shareds, k_shared, p->offsets, p->start, p->N, T, P));

    const int64_t chosen = c->index.heads > 0 ? kl_index_width(c) : 0;
    int32_t *select;
    KL_SCRATCH(select, ctx, T * chosen);
    int64_t from = 0;
    if (chosen > 0) {
        TRY(select_positions(p, layer, select, x, q_a));
        TRY(select_from(p, layer, select, chosen, &from));
    }

    const kl_latent_attention_args attention = {
        .offsets = p->offsets,
        .positions = p->end,
        .N = p->N,
        .T = T,
        .H = H,
        .K = K,
        .P = P,
        .V = V,
        .R = R,
        .select = chosen > 0 ? select : NULL,
        .select_width = chosen,
        .select_from = from,
        .scale = inverse_sqrt(K + P),
    };
    TRY(kl_latent_attention(ctx, o, q, latents, k_shareds, &w->w_uk, &w->w_uv, &attention));
    TRY(kl_tap_at(p, KL_TAP_MLA_O, layer, o));
    if (c->mla.gated) {
        TRY(kl_tap_at(p, KL_TAP_MLA_GATE, layer, gate));
        TRY(kl_sigmoid_gate(ctx, o, o, gate, T, H * V, H * V));
        TRY(kl_tap_at(p, KL_TAP_MLA_GATED, layer, o));
    }
    TRY(project_one(p, out, o, &w->o));
    return kl_tap_at(p, KL_TAP_MLA_OUT, layer, out);
}

/* RMS norm and rotation of each head of x [T, heads, K], in place */
static kl_status norm_and_rope(pass *p, int64_t layer, float *x, int64_t heads, const float *norm,
                               kl_tap normed, kl_tap roped)
{
    const kl_config *c = &p->model->config;
    const int64_t T = p->T, K = c->attn.width;
    TRY(kl_rms_norm(p->ctx, x, x, norm, T * heads, K, c->rms_eps));
    TRY(kl_tap_at(p, normed, layer, x));
    if (c->attn.rotary > 0)
        TRY(kl_rope(p->ctx, x, x, p->positions, T, heads, K, c->attn.rotary, c->attn.rope_base));
    return kl_tap_at(p, roped, layer, x);
}

/* Softmax attention, a key head for a group of query heads, its output gated. */
kl_status kl_run_attn(pass *p, int64_t layer, float *out, const float *x)
{
    kl_ctx *ctx = p->ctx;
    const kl_config *c = &p->model->config;
    const attn_weights *w = &p->model->layer[layer].attn;
    const int64_t T = p->T, H = c->attn.heads, Hkv = c->attn.kv_heads, K = c->attn.width;
    const kl_cache keys = cache(p, layer, KL_STATE_KEYS), values = cache(p, layer, KL_STATE_VALUES);

    NEW(q, T * H * K);
    NEW(gate, T * H * K);
    NEW(k, T * Hkv * K);
    NEW(v, T * Hkv * K);
    float *const from_x[] = { q, gate, k, v };
    const kl_weight of_x[] = { w->q, w->gate, w->k, w->v };
    TRY(project(p, from_x, x, of_x, 4, c->D));
    TRY(kl_tap_at(p, KL_TAP_ATTN_Q_PROJ, layer, q));
    TRY(kl_tap_at(p, KL_TAP_ATTN_GATE, layer, gate));
    TRY(kl_tap_at(p, KL_TAP_ATTN_K_PROJ, layer, k));
    TRY(kl_tap_at(p, KL_TAP_ATTN_V, layer, v));
    TRY(norm_and_rope(p, layer, q, H, w->q_norm, KL_TAP_ATTN_Q_NORM, KL_TAP_ATTN_Q));
    TRY(norm_and_rope(p, layer, k, Hkv, w->k_norm, KL_TAP_ATTN_K_NORM, KL_TAP_ATTN_K));
    TRY(kl_cache_append(ctx, keys, k, p->offsets, p->start, p->N, T, Hkv * K));
    TRY(kl_cache_append(ctx, values, v, p->offsets, p->start, p->N, T, Hkv * K));

    const kl_attention_args attention = {
        .offsets = p->offsets,
        .positions = p->end,
        .N = p->N,
        .T = T,
        .H = H,
        .Hkv = Hkv,
        .K = K,
        .V = K,
        .scale = inverse_sqrt(K),
    };
    NEW(o, T * H * K);
    TRY(kl_attention(ctx, o, q, keys, values, &attention));
    TRY(kl_tap_at(p, KL_TAP_ATTN_O, layer, o));
    TRY(kl_sigmoid_gate(ctx, o, o, gate, T, H * K, H * K));
    TRY(kl_tap_at(p, KL_TAP_ATTN_GATED, layer, o));
    TRY(project_one(p, out, o, &w->o));
    return kl_tap_at(p, KL_TAP_ATTN_OUT, layer, out);
}
