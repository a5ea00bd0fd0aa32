/* Feed-forwards: dense, and a mixture of experts. */
#include "blocks.h"

/* SiTU's constants, or NULL where the activation is SwiGLU */
static const kl_situ_betas *situ_of(const pass *p)
{
    const kl_situ_betas *situ = &p->model->config.ffn.situ;
    return situ->beta > 0 ? situ : NULL;
}

/* down(act(gate x, up x)), each step tapped; act is SwiGLU, or SiTU */
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
        TRY(kl_swiglu(p->ctx, gate, gate, up, p->T * F, p->model->config.ffn.limit));
    else
        TRY(kl_situ(p->ctx, gate, gate, up, p->T * F, situ_of(p)));
    TRY(kl_tap_at(p, taps[2], layer, gate));
    TRY(project_one(p, out, gate, &w->down));
    return kl_tap_at(p, taps[3], layer, out);
}

kl_status kl_run_dense(pass *p, int64_t layer, float *out, const float *x)
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
               c->ffn.width, c->ffn.k, situ_of(p), c->ffn.limit));
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
kl_status kl_run_moe(pass *p, int64_t layer, float *out, const float *x)
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
                   c->ffn.width, k, situ_of(p), c->ffn.limit));
    return kl_tap_at(p, KL_TAP_MOE_OUT, layer, out);
}
