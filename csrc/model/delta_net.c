/* Layers of linear attention by the gated delta rule: KDA and the gated delta net. */
#include "blocks.h"

static kl_slots slots(const pass *p, size_t offset) { return (kl_slots){ p->fixed, offset }; }

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

kl_status kl_run_kda(pass *p, int64_t layer, float *out, const float *x)
{
    return run_delta_net(p, layer, out, x, &kda);
}

kl_status kl_run_gdn(pass *p, int64_t layer, float *out, const float *x)
{
    return run_delta_net(p, layer, out, x, &gdn);
}
