/* The forward pass, top to bottom as the paper has it (Kimi Linear, arXiv:2510.26692):
 *
 *     h = E[token]
 *     for each layer:   h += mixer(norm(h));   h += ffn(norm(h))
 *     logits = head(norm(h))
 *
 * A layer is a description: its mixer is a delta net (delta_net.c), MLA or gated attention (attending.c), its
 * feed-forward dense or a mixture of experts (feed_forward.c). With attention residuals (Kimi K3) a norm reads a mixture
 * of h and of snapshots of it; with hyper-connections (GLM-5.3-Flash) there are several h, which each block mixes. */
#include "blocks.h"

/* The residual stream: h is what has been added up, since the last snapshot where there are attention residuals. It
 * lies behind the snapshots, so that it becomes one by another n. Hyper-connections have several h a token. */
typedef struct stream {
    float *all; /* [n + 1, T, D], or [T, streams, D] */
    int64_t n;  /* snapshots */
} stream;

static float *sum_of(const pass *p, const stream *s)
{
    return s->all != NULL ? s->all + s->n * p->T * p->model->config.D : NULL;
}

/* How the output of a block joins the streams: its weights in each, and those of the streams among each other. */
typedef struct joint {
    float *post,
        *comb; /* [T, streams], [T, streams, streams]; NULL where it is added to the one there is */
} joint;

/* The taps on the way from the stream to a block. */
typedef struct half_taps {
    kl_tap res, hc, post, comb, norm;
} half_taps;

static const half_taps mixer_taps = { KL_TAP_ATTN_RES, KL_TAP_ATTN_HC, KL_TAP_ATTN_HC_POST,
                                      KL_TAP_ATTN_HC_COMB, KL_TAP_ATTN_NORM };
static const half_taps ffn_taps = { KL_TAP_FFN_RES, KL_TAP_FFN_HC, KL_TAP_FFN_HC_POST,
                                    KL_TAP_FFN_HC_COMB, KL_TAP_FFN_NORM };

/* x: h, or its mixture with the snapshots of it */
static kl_status mixed(pass *p, int64_t layer, float *x, const float **h, const stream *s,
                       const float *score, kl_tap tap)
{
    const kl_config *c = &p->model->config;
    if (c->attn_res_block == 0)
        return KL_OK;
    TRY(kl_attn_res(p->ctx, x, s->n > 0 ? s->all : NULL, *h, score, s->n, p->T, c->D, c->rms_eps));
    *h = x;
    return kl_tap_at(p, tap, layer, x);
}

/* x: what a block reads of the streams, and how its output will join them */
static kl_status collapsed(pass *p, int64_t layer, float *x, const float **h, const joint *j,
                           const hc_weights *w, const half_taps *taps)
{
    const kl_config *c = &p->model->config;
    const kl_mhc_args args = {
        .T = p->T,
        .n = c->hc.streams,
        .D = c->D,
        .iters = c->hc.passes,
        .norm_eps = c->rms_eps,
        .eps = c->hc.eps,
    };
    if (c->hc.streams == 0)
        return KL_OK;
    TRY(kl_mhc_pre(p->ctx, x, j->post, j->comb, *h, &w->fn, w->base, w->scale, &args));
    *h = x;
    TRY(kl_tap_at(p, taps->hc, layer, x));
    TRY(kl_tap_at(p, taps->post, layer, j->post));
    return kl_tap_at(p, taps->comb, layer, j->comb);
}

static kl_status normed(pass *p, int64_t layer, float *x, const float *h, const float *w,
                        kl_tap tap)
{
    const kl_config *c = &p->model->config;
    TRY(kl_rms_norm(p->ctx, x, h, w, p->T, c->D, c->rms_eps));
    return kl_tap_at(p, tap, layer, x);
}

/* x: what a block of a layer is given */
static kl_status read_stream(pass *p, int64_t layer, float *x, const stream *s, const joint *j,
                             const half_weights *w, const half_taps *taps)
{
    const float *h = sum_of(p, s);
    TRY(mixed(p, layer, x, &h, s, w->res, taps->res));
    TRY(collapsed(p, layer, x, &h, j, &w->hc, taps));
    return normed(p, layer, x, h, w->norm, taps->norm);
}

/* h += body(x), or what hyper-connections make of both; where a block of attention residuals begins, h becomes a
 * snapshot and what body gives the new h. */
static kl_status join(pass *p, int64_t layer, stream *s, const joint *j, const float *x,
                      kl_block body, bool begins)
{
    const kl_config *c = &p->model->config;
    const int64_t n = p->T * c->D;
    const size_t mark = kl_scratch_mark(p->ctx);
    if (begins) {
        s->n++;
        TRY(body(p, layer, sum_of(p, s), x));
    } else {
        NEW(out, n);
        float *h = sum_of(p, s);
        TRY(body(p, layer, out, x));
        if (c->hc.streams > 0)
            TRY(kl_mhc_post(p->ctx, h, out, h, j->post, j->comb, p->T, c->hc.streams, c->D));
        else
            TRY(kl_add(p->ctx, h, h, out, n));
    }
    kl_scratch_reset(p->ctx, mark);
    return KL_OK;
}

static kl_status run_layer(pass *p, int64_t layer, stream *s)
{
    static const kl_block mixers[] = {
        [KL_MIXER_KDA] = kl_run_kda,
        [KL_MIXER_MLA] = kl_run_mla,
        [KL_MIXER_GDN] = kl_run_gdn,
        [KL_MIXER_ATTN] = kl_run_attn,
    };
    const kl_config *c = &p->model->config;
    const kl_layer *is = &c->layers[layer];
    const layer_weights *w = &p->model->layer[layer];
    const int64_t streams = c->hc.streams;
    const size_t mark = kl_scratch_mark(p->ctx);
    NEW(x, p->T * c->D);
    NEW(post, p->T * streams);
    NEW(comb, p->T * streams * streams);
    const joint j = { post, comb };
    TRY(read_stream(p, layer, x, s, &j, &w->before_mixer, &mixer_taps));
    TRY(join(p, layer, s, &j, x, mixers[is->mixer], kl_begins_block(c, layer)));
    TRY(kl_tap_at(p, KL_TAP_MID, layer, sum_of(p, s)));
    TRY(read_stream(p, layer, x, s, &j, &w->before_ffn, &ffn_taps));
    TRY(join(p, layer, s, &j, x, is->ffn == KL_FFN_DENSE ? kl_run_dense : kl_run_moe, false));
    kl_scratch_reset(p->ctx, mark);
    return kl_tap_at(p, KL_TAP_OUT, layer, sum_of(p, s));
}

/* What enters the first layer that is run: rows of the embedding, or what the caller gives in their place. */
static kl_status enter(pass *p, stream *s)
{
    const kl_model *m = p->model;
    const kl_config *c = &m->config;
    const int64_t first = kl_first_layer(p);
    if (first > 0 && c->hc.streams > 0)
        return kl_pass_embeds(p, s->all, 1, c->hc.streams * c->D);
    const size_t mark = kl_scratch_mark(p->ctx);
    float *rows = s->all;
    if (c->hc.streams > 0)
        KL_SCRATCH(rows, p->ctx, p->T * c->D);
    if (p->args->embeds != NULL)
        TRY(kl_pass_embeds(p, rows, s->n + 1, c->D));
    else
        TRY(kl_embedding(p->ctx, rows, p->ids, &m->embed, p->T));
    if (first > 0)
        return KL_OK;
    TRY(kl_tap_at(p, KL_TAP_EMBED, -1, rows));
    if (c->hc.streams == 0)
        return KL_OK;
    TRY(kl_mhc_expand(p->ctx, s->all, rows, p->T, c->hc.streams, c->D));
    kl_scratch_reset(p->ctx, mark);
    return kl_tap_at(p, KL_TAP_STREAMS, -1, s->all);
}

kl_status kl_pass_run(pass *p)
{
    const kl_model *m = p->model;
    const kl_config *c = &m->config;
    const int64_t parts = kl_max(kl_stream_parts(c, kl_last_layer(p)), c->hc.streams);
    NEW(all, parts * p->T * c->D);
    stream s = { .all = all };
    if (c->hc.streams == 0)
        s.n = kl_stream_parts(c, kl_first_layer(p)) - 1;
    TRY(enter(p, &s));
    for (int64_t layer = kl_first_layer(p); layer < kl_last_layer(p); layer++) {
        TRY(kl_poll(p->ctx));
        TRY(run_layer(p, layer, &s));
    }
    if (kl_last_layer(p) < c->n_layers)
        return KL_OK;
    NEW(x, p->T * c->D);
    const float *h = sum_of(p, &s);
    TRY(mixed(p, -1, x, &h, &s, m->output_res, KL_TAP_OUTPUT_RES));
    if (c->hc.streams > 0) {
        TRY(kl_mhc_collapse(p->ctx, x, h, p->T, c->hc.streams, c->D));
        TRY(kl_tap_at(p, KL_TAP_COLLAPSED, -1, x));
        h = x;
    }
    TRY(normed(p, -1, x, h, m->norm, KL_TAP_NORM));
    return kl_pass_logits(p, x);
}
