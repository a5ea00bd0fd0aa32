/* The forward pass, top to bottom as the paper has it (Kimi Linear, arXiv:2510.26692):
 *
 *     h = E[token]
 *     for each layer:   h += mixer(norm(h));   h += ffn(norm(h))
 *     logits = head(norm(h))
 *
 * A layer is a description: its mixer is a delta net (KDA, GDN), MLA or gated attention, its feed-forward dense or
 * a mixture of experts. With attention residuals (Kimi K3) a norm reads a mixture of h and of snapshots of it.
 * Arrays are addresses in the backend's memory; nothing here reads through them. */
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

/* ---- delta nets -------------------------------------------------------------------------------- */

/* In what the delta nets differ: how fine the decay is, what the output gate goes through, and the names of their
 * taps. Decay and output gate come from x straight, or by way of a low rank where the layer has a second matrix. */
typedef struct delta_net {
    kl_gate decay;
    kl_activation output;
    kl_tap q_proj, k_proj, v_proj, q_conv, k_conv, v_conv, q, k;
    kl_tap f_x, f, g, b, beta, o, z_x, z, o_norm, out; /* f_x and z_x: of a low rank */
} delta_net;

/* Kimi Delta Attention: a decay for each key channel. */
static const delta_net kda = {
    .decay = KL_GATE_CHANNEL,
    .output = KL_SIGMOID,
    .q_proj = KL_TAP_KDA_Q_PROJ,
    .k_proj = KL_TAP_KDA_K_PROJ,
    .v_proj = KL_TAP_KDA_V_PROJ,
    .q_conv = KL_TAP_KDA_Q_CONV,
    .k_conv = KL_TAP_KDA_K_CONV,
    .v_conv = KL_TAP_KDA_V_CONV,
    .q = KL_TAP_KDA_Q,
    .k = KL_TAP_KDA_K,
    .f_x = KL_TAP_KDA_F_A,
    .f = KL_TAP_KDA_F,
    .g = KL_TAP_KDA_G,
    .b = KL_TAP_KDA_B,
    .beta = KL_TAP_KDA_BETA,
    .o = KL_TAP_KDA_O,
    .z_x = KL_TAP_KDA_G_A,
    .z = KL_TAP_KDA_Z,
    .o_norm = KL_TAP_KDA_O_NORM,
    .out = KL_TAP_KDA_OUT,
};

/* Gated DeltaNet (arXiv:2412.06464): a decay for each head. */
static const delta_net gdn = {
    .decay = KL_GATE_HEAD,
    .output = KL_SILU,
    .q_proj = KL_TAP_GDN_Q_PROJ,
    .k_proj = KL_TAP_GDN_K_PROJ,
    .v_proj = KL_TAP_GDN_V_PROJ,
    .q_conv = KL_TAP_GDN_Q_CONV,
    .k_conv = KL_TAP_GDN_K_CONV,
    .v_conv = KL_TAP_GDN_V_CONV,
    .q = KL_TAP_GDN_Q,
    .k = KL_TAP_GDN_K,
    .f = KL_TAP_GDN_A,
    .g = KL_TAP_GDN_G,
    .b = KL_TAP_GDN_B,
    .beta = KL_TAP_GDN_BETA,
    .o = KL_TAP_GDN_O,
    .z = KL_TAP_GDN_Z,
    .o_norm = KL_TAP_GDN_O_NORM,
    .out = KL_TAP_GDN_OUT,
};

/* x through the causal convolution and SiLU; the layer's history moves on */
static kl_status convolve(pass *p, float *y, const float *x, const float *taps, size_t history,
                          int64_t channels)
{
    return kl_short_conv(p->ctx, y, slots(p, history), x, taps, slots(p, history), p->offsets, p->N,
                         p->T, channels, p->model->config.delta.taps, KL_SILU);
}

/* y: q, k and v convolved, then q and k of unit length */
static kl_status delta_inputs(pass *p, int64_t layer, const delta_net *is, float *const y[3],
                              float *const proj[3])
{
    const kl_config *c = &p->model->config;
    const delta_weights *w = &p->model->layer[layer].delta;
    const layer_layout *at = &p->model->layout[layer];
    const int64_t T = p->T, Hk = c->delta.Hk, K = c->delta.K, HV = c->delta.Hv * c->delta.V;
    TRY(convolve(p, y[0], proj[0], w->q_conv, at->q_history, Hk * K));
    TRY(convolve(p, y[1], proj[1], w->k_conv, at->k_history, Hk * K));
    TRY(convolve(p, y[2], proj[2], w->v_conv, at->v_history, HV));
    TRY(kl_tap_at(p, is->q_conv, layer, y[0]));
    TRY(kl_tap_at(p, is->k_conv, layer, y[1]));
    TRY(kl_tap_at(p, is->v_conv, layer, y[2]));
    TRY(kl_l2_norm(p->ctx, y[0], y[0], T * Hk, K, c->l2_eps));
    TRY(kl_l2_norm(p->ctx, y[1], y[1], T * Hk, K, c->l2_eps));
    TRY(kl_tap_at(p, is->q, layer, y[0]));
    return kl_tap_at(p, is->k, layer, y[1]);
}

/* Linear attention by the gated delta rule. */
static kl_status run_delta_net(pass *p, int64_t layer, float *out, const float *x,
                               const delta_net *is)
{
    kl_ctx *ctx = p->ctx;
    const kl_config *c = &p->model->config;
    const delta_weights *w = &p->model->layer[layer].delta;
    const size_t state = p->model->layout[layer].delta;
    const int64_t T = p->T, Hk = c->delta.Hk, Hv = c->delta.Hv, K = c->delta.K, V = c->delta.V;
    const int64_t decays = is->decay == KL_GATE_CHANNEL ? K : 1; /* of a head */
    const bool low_f = w->f_b.n > 0, low_z = w->z_b.n > 0;

    NEW(q, T * Hk * K);
    NEW(k, T * Hk * K);
    NEW(v, T * Hv * V);
    NEW(q_proj, T * Hk * K);
    NEW(k_proj, T * Hk * K);
    NEW(v_proj, T * Hv * V);
    NEW(f_x, T * w->f_x.n * w->f_x.rows);
    NEW(z_x, T * w->z_x.n * w->z_x.rows);
    NEW(beta, T * Hv);
    float *const from_x[] = { q_proj, k_proj, v_proj, f_x, z_x, beta };
    const kl_weight of_x[] = { w->q, w->k, w->v, w->f_x, w->z_x, w->b };
    TRY(project(p, from_x, x, of_x, 6, c->D));
    TRY(kl_tap_at(p, is->q_proj, layer, q_proj));
    TRY(kl_tap_at(p, is->k_proj, layer, k_proj));
    TRY(kl_tap_at(p, is->v_proj, layer, v_proj));
    TRY(kl_tap_at(p, low_f ? is->f_x : is->f, layer, f_x));
    TRY(kl_tap_at(p, low_z ? is->z_x : is->z, layer, z_x));
    TRY(kl_tap_at(p, is->b, layer, beta));

    TRY(delta_inputs(p, layer, is, (float *const[]){ q, k, v },
                     (float *const[]){ q_proj, k_proj, v_proj }));

    /* the projections are spent; of a low rank Hk = Hv and K = V */
    float *g = low_f ? q_proj : f_x, *z = low_z ? k_proj : z_x, *o = v_proj;
    if (low_f) {
        TRY(project_one(p, g, f_x, &w->f_b));
        TRY(kl_tap_at(p, is->f, layer, g));
    }
    TRY(kl_decay_gate(ctx, g, g, w->rate, w->dt_bias, T, Hv, decays, c->delta.lower_bound));
    TRY(kl_tap_at(p, is->g, layer, g));
    TRY(kl_sigmoid(ctx, beta, beta, T * Hv));
    TRY(kl_tap_at(p, is->beta, layer, beta));

    const kl_delta_rule_args rule = {
        .offsets = p->offsets,
        .N = p->N,
        .T = T,
        .Hk = Hk,
        .Hv = Hv,
        .K = K,
        .V = V,
        .scale = inverse_sqrt(K),
        .gate = is->decay,
        .head_map = c->delta.head_map,
    };
    TRY(kl_delta_rule(ctx, o, slots(p, state), q, k, v, g, beta, slots(p, state), &rule));
    TRY(kl_tap_at(p, is->o, layer, o));

    if (low_z) {
        TRY(project_one(p, z, z_x, &w->z_b));
        TRY(kl_tap_at(p, is->z, layer, z));
    }
    TRY(kl_gated_rms_norm(ctx, o, o, z, w->o_norm, T * Hv, V, c->rms_eps, is->output));
    TRY(kl_tap_at(p, is->o_norm, layer, o));
    TRY(project_one(p, out, o, &w->o));
    return kl_tap_at(p, is->out, layer, out);
}

static kl_status run_kda(pass *p, int64_t layer, float *out, const float *x)
{
    return run_delta_net(p, layer, out, x, &kda);
}

static kl_status run_gdn(pass *p, int64_t layer, float *out, const float *x)
{
    return run_delta_net(p, layer, out, x, &gdn);
}

/* ---- attention --------------------------------------------------------------------------------- */

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
static kl_status run_mla(pass *p, int64_t layer, float *out, const float *x)
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
    NEW(gate, c->mla.gated ? T * H * V : 0);
    NEW(o, T * H * V);
    TRY(mla_query(p, layer, q, x));
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
static kl_status run_attn(pass *p, int64_t layer, float *out, const float *x)
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

/* ---- feed-forward ------------------------------------------------------------------------------ */

/* SiTU's constants, or NULL where the activation is SwiGLU */
static const kl_situ_betas *situ_of(const pass *p)
{
    const kl_situ_betas *situ = &p->model->config.ffn.situ;
    return situ->beta > 0 ? situ : NULL;
}

/* down(act(gate x, up x)), each step tapped; act is SiLU(gate) * up, or SiTU */
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
    if (situ_of(p) == NULL)
        TRY(kl_swiglu(p->ctx, gate, gate, up, p->T * F, 0.0f));
    else
        TRY(kl_situ(p->ctx, gate, gate, up, p->T * F, situ_of(p)));
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

/* The shared expert's output times the sigmoid of its own score. */
static kl_status gate_shared(pass *p, int64_t layer, float *shared, const float *x,
                             const kl_weight *w)
{
    NEW(score, p->T);
    TRY(project_one(p, score, x, w));
    TRY(kl_tap_at(p, KL_TAP_MOE_SHARED_G, layer, score));
    TRY(kl_sigmoid_gate(p->ctx, shared, shared, score, p->T, p->model->config.D, 1));
    return kl_tap_at(p, KL_TAP_MOE_SHARED_GATED, layer, shared);
}

/* The routed experts on a latent: down to it, a sum of theirs, up again. */
static kl_status latent_experts(pass *p, int64_t layer, float *out, const float *x,
                                const int32_t *ids, const float *weights, const float *shared)
{
    const kl_config *c = &p->model->config;
    const moe_weights *w = &p->model->layer[layer].moe;
    const int64_t T = p->T, L = c->ffn.latent;
    NEW(latent, T * L);
    NEW(y, T * L);
    TRY(project_one(p, latent, x, &w->latent_down));
    TRY(kl_tap_at(p, KL_TAP_MOE_LATENT, layer, latent));
    TRY(kl_moe(p->ctx, y, latent, ids, weights, &w->gate, &w->up, &w->down, NULL, T, L,
               c->ffn.width, c->ffn.k, situ_of(p), 0.0f));
    TRY(kl_tap_at(p, KL_TAP_MOE_ROUTED, layer, y));
    if (c->ffn.latent_norm) {
        TRY(kl_rms_norm(p->ctx, y, y, w->latent_norm, T, L, c->rms_eps));
        TRY(kl_tap_at(p, KL_TAP_MOE_ROUTED_NORM, layer, y));
    }
    TRY(project_one(p, out, y, &w->latent_up));
    if (shared == NULL)
        return KL_OK;
    TRY(kl_tap_at(p, KL_TAP_MOE_ROUTED_UP, layer, out));
    return kl_add(p->ctx, out, out, shared, T * c->D);
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
    TRY(kl_fail_in(p->ctx, layer, kl_route(p->ctx, ids, weights, logits, w->bias, &route)));
    TRY(kl_tap_at(p, KL_TAP_MOE_IDS, layer, ids));
    if (kl_pass_edits(p, KL_TAP_MOE_IDS, layer)) {
        route.given = 1;
        TRY(kl_fail_in(p->ctx, layer, kl_route(p->ctx, ids, weights, logits, w->bias, &route)));
    }
    TRY(kl_tap_at(p, KL_TAP_MOE_WEIGHTS, layer, weights));

    float *shared = NULL;
    if (c->ffn.shared > 0) {
        const kl_tap taps[] = { KL_TAP_MOE_SHARED_GATE, KL_TAP_MOE_SHARED_UP, KL_TAP_MOE_SHARED_ACT,
                                KL_TAP_MOE_SHARED_OUT };
        KL_SCRATCH(shared, p->ctx, T * c->D);
        TRY(mlp(p, layer, shared, x, &w->shared, taps));
        if (c->ffn.shared_gated)
            TRY(gate_shared(p, layer, shared, x, &w->shared_gate));
    }
    if (c->ffn.latent > 0)
        TRY(latent_experts(p, layer, out, x, ids, weights, shared));
    else
        TRY(kl_moe(p->ctx, out, x, ids, weights, &w->gate, &w->up, &w->down, shared, T, c->D,
                   c->ffn.width, k, situ_of(p), 0.0f));
    return kl_tap_at(p, KL_TAP_MOE_OUT, layer, out);
}

/* ---- layers ------------------------------------------------------------------------------------ */

typedef kl_status (*block)(pass *p, int64_t layer, float *out, const float *x);

/* The residual stream: h is what has been added up, since the last snapshot where there are attention residuals. It
 * lies behind the snapshots, so that it becomes one by another n. */
typedef struct stream {
    float *all; /* [n + 1, T, D] */
    int64_t n;  /* snapshots */
} stream;

static float *sum_of(const pass *p, const stream *s)
{
    return s->all != NULL ? s->all + s->n * p->T * p->model->config.D : NULL;
}

/* x: what a norm reads, the stream's h or its mixture with the snapshots, normed */
static kl_status normed(pass *p, int64_t layer, float *x, const stream *s, const float *score,
                        kl_tap mixed_tap, const float *norm, kl_tap norm_tap)
{
    const kl_config *c = &p->model->config;
    const float *h = sum_of(p, s);
    if (c->attn_res_block > 0) {
        TRY(kl_attn_res(p->ctx, x, s->n > 0 ? s->all : NULL, h, score, s->n, p->T, c->D,
                        c->rms_eps));
        TRY(kl_tap_at(p, mixed_tap, layer, x));
        h = x;
    }
    TRY(kl_rms_norm(p->ctx, x, h, norm, p->T, c->D, c->rms_eps));
    return kl_tap_at(p, norm_tap, layer, x);
}

/* h += body(x); where a block of attention residuals begins, h becomes a snapshot and what body gives the new h. */
static kl_status residual(pass *p, int64_t layer, stream *s, const float *x, block body,
                          bool begins)
{
    const int64_t n = p->T * p->model->config.D;
    const size_t mark = kl_scratch_mark(p->ctx);
    if (begins) {
        s->n++;
        TRY(body(p, layer, sum_of(p, s), x));
    } else {
        NEW(out, n);
        TRY(body(p, layer, out, x));
        TRY(kl_add(p->ctx, sum_of(p, s), sum_of(p, s), out, n));
    }
    kl_scratch_reset(p->ctx, mark);
    return KL_OK;
}

static kl_status run_layer(pass *p, int64_t layer, stream *s)
{
    static const block mixers[] = {
        [KL_MIXER_KDA] = run_kda,
        [KL_MIXER_MLA] = run_mla,
        [KL_MIXER_GDN] = run_gdn,
        [KL_MIXER_ATTN] = run_attn,
    };
    const kl_config *c = &p->model->config;
    const kl_layer *is = &c->layers[layer];
    const layer_weights *w = &p->model->layer[layer];
    const size_t mark = kl_scratch_mark(p->ctx);
    NEW(x, p->T * c->D);
    TRY(normed(p, layer, x, s, w->attn_res, KL_TAP_ATTN_RES, w->attn_norm, KL_TAP_ATTN_NORM));
    TRY(residual(p, layer, s, x, mixers[is->mixer], kl_begins_block(c, layer)));
    TRY(kl_tap_at(p, KL_TAP_MID, layer, sum_of(p, s)));
    TRY(normed(p, layer, x, s, w->ffn_res, KL_TAP_FFN_RES, w->ffn_norm, KL_TAP_FFN_NORM));
    TRY(residual(p, layer, s, x, is->ffn == KL_FFN_DENSE ? dense : moe, false));
    kl_scratch_reset(p->ctx, mark);
    return kl_tap_at(p, KL_TAP_OUT, layer, sum_of(p, s));
}

kl_status kl_pass_run(pass *p)
{
    const kl_model *m = p->model;
    const kl_config *c = &m->config;
    NEW(all, kl_stream_parts(c, kl_last_layer(p)) * p->T * c->D);
    stream s = { .all = all, .n = kl_stream_parts(c, kl_first_layer(p)) - 1 };
    if (p->args->embeds != NULL)
        TRY(kl_pass_embeds(p, all, s.n + 1));
    else
        TRY(kl_embedding(p->ctx, all, p->ids, &m->embed, p->T));
    if (kl_first_layer(p) == 0)
        TRY(kl_tap_at(p, KL_TAP_EMBED, -1, all));
    for (int64_t layer = kl_first_layer(p); layer < kl_last_layer(p); layer++) {
        TRY(kl_poll(p->ctx));
        TRY(run_layer(p, layer, &s));
    }
    if (kl_last_layer(p) < c->n_layers)
        return KL_OK;
    NEW(x, p->T * c->D);
    TRY(normed(p, -1, x, &s, m->output_res, KL_TAP_OUTPUT_RES, m->norm, KL_TAP_NORM));
    return kl_pass_logits(p, x);
}
