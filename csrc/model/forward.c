/* The forward pass, top to bottom as the paper has it (Kimi Linear, arXiv:2510.26692):
 *
 *     h = E[token]
 *     for each layer:   h += mixer(norm(h));   h += ffn(norm(h))
 *     logits = head(norm(h))
 *
 * A layer is a description: its mixer is KDA or MLA, its feed-forward dense or a mixture of experts. Arrays
 * are addresses in the backend's memory; nothing here reads through them. */
#include "pass.h"

#include <math.h>

#define TRY KL_TRY
#define NEW(name, n)                                                                               \
    float *name;                                                                                   \
    KL_SCRATCH(name, p->ctx, n)

static float inverse_sqrt(int64_t n) { return (float)(1.0 / sqrt((double)n)); }

static kl_slots slots(const pass *p, size_t offset) { return (kl_slots){ p->fixed, offset }; }

/* y[i] = x w[i]^T */
static kl_status project(pass *p, float *const *y, const float *x, const kl_weight *w, int n,
                         int64_t D)
{
    return kl_linear(p->ctx, y, x, w, NULL, n, p->T, D);
}

static kl_status project_one(pass *p, float *y, const float *x, const kl_weight *w)
{
    return kl_linear(p->ctx, &y, x, w, NULL, 1, p->T, w->cols);
}

/* x through the causal convolution and SiLU; the layer's history moves on */
static kl_status convolve(pass *p, float *y, const float *x, const float *taps, size_t history)
{
    const kl_config *c = &p->model->config;
    return kl_short_conv(p->ctx, y, slots(p, history), x, taps, slots(p, history), p->offsets, p->N,
                         p->T, c->kda.heads * c->kda.width, c->kda.taps, KL_SILU);
}

/* KDA: linear attention by the gated delta rule, with a decay for each key channel. */
static kl_status kda(pass *p, int64_t layer, float *out, const float *x)
{
    kl_ctx *ctx = p->ctx;
    const kl_config *c = &p->model->config;
    const kda_weights *w = &p->model->layer[layer].kda;
    const layer_layout *at = &p->model->layout[layer];
    const int64_t T = p->T, H = c->kda.heads, K = c->kda.width;

    NEW(q, T * H * K);
    NEW(k, T * H * K);
    NEW(v, T * H * K);
    NEW(q_proj, T * H * K);
    NEW(k_proj, T * H * K);
    NEW(v_proj, T * H * K);
    NEW(f_a, T * K);
    NEW(g_a, T * K);
    NEW(beta, T * H);
    float *const from_x[] = { q_proj, k_proj, v_proj, f_a, g_a, beta };
    const kl_weight of_x[] = { w->q, w->k, w->v, w->f_a, w->g_a, w->b };
    TRY(project(p, from_x, x, of_x, 6, c->D));
    TRY(kl_tap_at(p, KL_TAP_KDA_Q_PROJ, layer, q_proj));
    TRY(kl_tap_at(p, KL_TAP_KDA_K_PROJ, layer, k_proj));
    TRY(kl_tap_at(p, KL_TAP_KDA_V_PROJ, layer, v_proj));
    TRY(kl_tap_at(p, KL_TAP_KDA_F_A, layer, f_a));
    TRY(kl_tap_at(p, KL_TAP_KDA_G_A, layer, g_a));
    TRY(kl_tap_at(p, KL_TAP_KDA_B, layer, beta));

    TRY(convolve(p, q, q_proj, w->q_conv, at->q_history));
    TRY(convolve(p, k, k_proj, w->k_conv, at->k_history));
    TRY(convolve(p, v, v_proj, w->v_conv, at->v_history));
    TRY(kl_tap_at(p, KL_TAP_KDA_Q_CONV, layer, q));
    TRY(kl_tap_at(p, KL_TAP_KDA_K_CONV, layer, k));
    TRY(kl_tap_at(p, KL_TAP_KDA_V_CONV, layer, v));
    TRY(kl_l2_norm(ctx, q, q, T * H, K, c->l2_eps));
    TRY(kl_l2_norm(ctx, k, k, T * H, K, c->l2_eps));
    TRY(kl_tap_at(p, KL_TAP_KDA_Q, layer, q));
    TRY(kl_tap_at(p, KL_TAP_KDA_K, layer, k));

    float *g = q_proj, *z = k_proj, *o = v_proj; /* the projections are spent */
    TRY(project_one(p, g, f_a, &w->f_b));
    TRY(kl_tap_at(p, KL_TAP_KDA_F, layer, g));
    TRY(kl_decay_gate(ctx, g, g, w->rate, w->dt_bias, T, H, K, c->kda.lower_bound));
    TRY(kl_tap_at(p, KL_TAP_KDA_G, layer, g));
    TRY(kl_sigmoid(ctx, beta, beta, T * H));
    TRY(kl_tap_at(p, KL_TAP_KDA_BETA, layer, beta));

    const kl_delta_rule_args rule = {
        .offsets = p->offsets,
        .N = p->N,
        .T = T,
        .Hk = H,
        .Hv = H,
        .K = K,
        .V = K,
        .scale = inverse_sqrt(K),
        .gate = KL_GATE_CHANNEL,
    };
    TRY(kl_delta_rule(ctx, o, slots(p, at->delta), q, k, v, g, beta, slots(p, at->delta), &rule));
    TRY(kl_tap_at(p, KL_TAP_KDA_O, layer, o));

    TRY(project_one(p, z, g_a, &w->g_b));
    TRY(kl_tap_at(p, KL_TAP_KDA_Z, layer, z));
    TRY(kl_gated_rms_norm(ctx, o, o, z, w->o_norm, T * H, K, c->rms_eps, KL_SIGMOID));
    TRY(kl_tap_at(p, KL_TAP_KDA_O_NORM, layer, o));
    TRY(project_one(p, out, o, &w->o));
    return kl_tap_at(p, KL_TAP_KDA_OUT, layer, out);
}

static kl_cache cache(const pass *p, int64_t layer, kl_state_part part)
{
    kl_cache cache = kl_cache_of(p->model, p->cache_type, layer, part);
    cache.page = p->page;
    return cache;
}

/* The query of MLA: one projection, or two with a norm between them. */
static kl_status mla_query(pass *p, int64_t layer, float *q, const float *x)
{
    const kl_config *c = &p->model->config;
    const mla_weights *w = &p->model->layer[layer].mla;
    if (c->mla.q_rank == 0)
        return project_one(p, q, x, &w->q);
    NEW(q_a, p->T * c->mla.q_rank);
    TRY(project_one(p, q_a, x, &w->q_a));
    TRY(kl_tap_at(p, KL_TAP_MLA_Q_A, layer, q_a));
    TRY(kl_rms_norm(p->ctx, q_a, q_a, w->q_a_norm, p->T, c->mla.q_rank, c->latent_eps));
    TRY(kl_tap_at(p, KL_TAP_MLA_Q_A_NORM, layer, q_a));
    return project_one(p, q, q_a, &w->q);
}

/* MLA: softmax attention of all heads over one cached latent a token. No rotation. */
static kl_status mla(pass *p, int64_t layer, float *out, const float *x)
{
    kl_ctx *ctx = p->ctx;
    const kl_config *c = &p->model->config;
    const mla_weights *w = &p->model->layer[layer].mla;
    const int64_t T = p->T, H = c->mla.heads, K = c->mla.nope, P = c->mla.rope, V = c->mla.v,
                  R = c->mla.rank;
    const kl_cache latents = cache(p, layer, KL_STATE_LATENT),
                   k_shareds = cache(p, layer, KL_STATE_K_SHARED);

    NEW(q, T * H * (K + P));
    NEW(latent, T * R);
    NEW(k_shared, T * P);
    NEW(o, T * H * V);
    TRY(mla_query(p, layer, q, x));
    TRY(kl_tap_at(p, KL_TAP_MLA_Q, layer, q));

    float *const from_x[] = { latent, k_shared };
    const kl_weight of_x[] = { w->latent, w->k_shared };
    TRY(project(p, from_x, x, of_x, P > 0 ? 2 : 1, c->D));
    TRY(kl_tap_at(p, KL_TAP_MLA_LATENT_RAW, layer, latent));
    TRY(kl_tap_at(p, KL_TAP_MLA_K_SHARED, layer, k_shared));
    TRY(kl_rms_norm(ctx, latent, latent, w->latent_norm, T, R, c->latent_eps));
    TRY(kl_tap_at(p, KL_TAP_MLA_LATENT, layer, latent));
    TRY(kl_cache_append(ctx, latents, latent, p->offsets, p->start, p->N, T, R));
    if (P > 0)
        TRY(kl_cache_append(ctx, k_shareds, k_shared, p->offsets, p->start, p->N, T, P));

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
        .scale = inverse_sqrt(K + P),
    };
    TRY(kl_latent_attention(ctx, o, q, latents, k_shareds, &w->w_uk, &w->w_uv, &attention));
    TRY(kl_tap_at(p, KL_TAP_MLA_O, layer, o));
    TRY(project_one(p, out, o, &w->o));
    return kl_tap_at(p, KL_TAP_MLA_OUT, layer, out);
}

/* down(SiLU(gate x) * up x), each step tapped */
static kl_status mlp(pass *p, int64_t layer, float *out, const float *x, const mlp_weights *w,
                     const kl_tap taps[4])
{
    const int64_t F = w->gate.rows;
    NEW(gate, p->T * F);
    NEW(up, p->T * F);
    float *const from_x[] = { gate, up };
    const kl_weight of_x[] = { w->gate, w->up };
    TRY(project(p, from_x, x, of_x, 2, w->gate.cols));
    TRY(kl_tap_at(p, taps[0], layer, gate));
    TRY(kl_tap_at(p, taps[1], layer, up));
    TRY(kl_swiglu(p->ctx, gate, gate, up, p->T * F));
    TRY(kl_tap_at(p, taps[2], layer, gate));
    TRY(project_one(p, out, gate, &w->down));
    return kl_tap_at(p, taps[3], layer, out);
}

static kl_status dense(pass *p, int64_t layer, float *out, const float *x)
{
    const kl_tap taps[] = { KL_TAP_MLP_GATE, KL_TAP_MLP_UP, KL_TAP_MLP_ACT, KL_TAP_MLP_OUT };
    return mlp(p, layer, out, x, &p->model->layer[layer].mlp, taps);
}

/* The router's scores where the call asks for them; scores that it edits take the place of the logits. */
static kl_status router_scores(pass *p, int64_t layer, float *logits, kl_route_args *route)
{
    if (!kl_pass_wants(p, KL_TAP_MOE_SCORES, layer))
        return KL_OK;
    NEW(scores, route->T * route->E);
    if (route->function == KL_ROUTER_SIGMOID)
        TRY(kl_sigmoid(p->ctx, scores, logits, route->T * route->E));
    else
        TRY(kl_softmax(p->ctx, scores, logits, route->T, route->E));
    TRY(kl_tap_at(p, KL_TAP_MOE_SCORES, layer, scores));
    if (!kl_pass_edits(p, KL_TAP_MOE_SCORES, layer))
        return KL_OK;
    route->function = KL_ROUTER_NONE;
    return p->ctx->arena.measuring
               ? KL_OK
               : p->model->backend->copy(p->ctx, logits, scores,
                                         (size_t)(route->T * route->E) * sizeof *scores);
}

/* Routed experts and the shared one. */
static kl_status moe(pass *p, int64_t layer, float *out, const float *x)
{
    const kl_config *c = &p->model->config;
    const moe_weights *w = &p->model->layer[layer].moe;
    const int64_t T = p->T, E = c->ffn.experts, k = c->ffn.k;
    NEW(logits, T * E);
    NEW(weights, T * k);
    int32_t *ids;
    KL_SCRATCH(ids, p->ctx, T * k);

    TRY(project_one(p, logits, x, &w->router));
    TRY(kl_tap_at(p, KL_TAP_MOE_LOGITS, layer, logits));
    kl_route_args route = {
        .T = T,
        .E = E,
        .k = k,
        .groups = c->ffn.groups,
        .top_groups = c->ffn.top_groups,
        .function = c->ffn.router,
        .renormalise = c->ffn.renormalise,
        .scale = c->ffn.scale,
        .given = kl_pass_has_experts(p, layer),
    };
    TRY(router_scores(p, layer, logits, &route));
    if (route.given)
        TRY(kl_pass_experts(p, layer, ids));
    TRY(kl_route(p->ctx, ids, weights, logits, w->bias, &route));
    TRY(kl_tap_at(p, KL_TAP_MOE_IDS, layer, ids));
    if (kl_pass_edits(p, KL_TAP_MOE_IDS, layer)) {
        route.given = 1;
        TRY(kl_route(p->ctx, ids, weights, logits, w->bias, &route));
    }
    TRY(kl_tap_at(p, KL_TAP_MOE_WEIGHTS, layer, weights));

    float *shared = NULL;
    if (c->ffn.shared > 0) {
        const kl_tap taps[] = { KL_TAP_MOE_SHARED_GATE, KL_TAP_MOE_SHARED_UP, KL_TAP_MOE_SHARED_ACT,
                                KL_TAP_MOE_SHARED_OUT };
        KL_SCRATCH(shared, p->ctx, T * c->D);
        TRY(mlp(p, layer, shared, x, &w->shared, taps));
    }
    TRY(kl_moe(p->ctx, out, x, ids, weights, &w->gate, &w->up, &w->down, shared, T, c->D,
               c->ffn.width, k));
    return kl_tap_at(p, KL_TAP_MOE_OUT, layer, out);
}

typedef kl_status (*block)(pass *p, int64_t layer, float *out, const float *x);

/* h += body(norm(h)) */
static kl_status residual(pass *p, int64_t layer, float *h, const float *norm, kl_tap norm_tap,
                          block body)
{
    const int64_t D = p->model->config.D;
    const size_t mark = kl_scratch_mark(p->ctx);
    NEW(x, p->T * D);
    NEW(out, p->T * D);
    TRY(kl_rms_norm(p->ctx, x, h, norm, p->T, D, p->model->config.rms_eps));
    TRY(kl_tap_at(p, norm_tap, layer, x));
    TRY(body(p, layer, out, x));
    TRY(kl_add(p->ctx, h, h, out, p->T * D));
    kl_scratch_reset(p->ctx, mark);
    return KL_OK;
}

static kl_status run_layer(pass *p, int64_t layer, float *h)
{
    const kl_layer *is = &p->model->config.layers[layer];
    const layer_weights *w = &p->model->layer[layer];
    TRY(residual(p, layer, h, w->attn_norm, KL_TAP_ATTN_NORM,
                 is->mixer == KL_MIXER_KDA ? kda : mla));
    TRY(kl_tap_at(p, KL_TAP_MID, layer, h));
    TRY(residual(p, layer, h, w->ffn_norm, KL_TAP_FFN_NORM, is->ffn == KL_FFN_DENSE ? dense : moe));
    return kl_tap_at(p, KL_TAP_OUT, layer, h);
}

kl_status kl_pass_run(pass *p)
{
    const kl_model *m = p->model;
    const kl_config *c = &m->config;
    NEW(h, p->T * c->D);
    if (p->args->embeds != NULL)
        TRY(kl_pass_embeds(p, h));
    else
        TRY(kl_embedding(p->ctx, h, p->ids, &m->embed, p->T));
    if (kl_first_layer(p) == 0)
        TRY(kl_tap_at(p, KL_TAP_EMBED, -1, h));
    for (int64_t layer = kl_first_layer(p); layer < kl_last_layer(p); layer++)
        TRY(run_layer(p, layer, h));
    if (kl_last_layer(p) < c->n_layers)
        return KL_OK;
    TRY(kl_rms_norm(p->ctx, h, h, m->norm, p->T, c->D, c->rms_eps));
    TRY(kl_tap_at(p, KL_TAP_NORM, -1, h));
    return kl_pass_logits(p, h);
}
