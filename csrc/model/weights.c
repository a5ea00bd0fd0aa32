/* A model's tensors by role: the one place that knows their names, which are Hugging Face's. What GGUF stores
 * otherwise has names of its own, which are looked for first: self_attn.k_b_proj.weight [H, R, K] and
 * .v_b_proj.weight [H, V, R] for kv_b_proj, .rate [H] for exp(A_log), the parts of in_proj_qkvz apart, and
 * self_attention_res.weight [D] for the product of _norm and _proj, with mlp_res and output_attn_res alike. */
#include "tensors.h"

#include "../cpu/fpenv.h"

#include <stdlib.h>
#include <string.h>

/* exp(A_log) [H], or the rate itself */
static const float *load_rate(kl_loader *l, int64_t i, const char *rate, const char *A_log,
                              int64_t H)
{
    return kl_has_tensor(l, i, rate) ? kl_vector(l, i, rate, H, 1, KL_AS_IS)
                                     : kl_vector(l, i, A_log, H, 1, KL_RATE);
}

static void load_kda(kl_loader *l, int64_t i, delta_weights *w)
{
    const kl_config *c = &l->model->config;
    const int64_t H = c->delta.Hv, K = c->delta.K, W = c->delta.taps, D = c->D;
    w->q = kl_matrix(l, i, "self_attn.q_proj.weight", H * K, D);
    w->k = kl_matrix(l, i, "self_attn.k_proj.weight", H * K, D);
    w->v = kl_matrix(l, i, "self_attn.v_proj.weight", H * K, D);
    w->q_conv = kl_vector(l, i, "self_attn.q_conv1d.weight", H * K, W, KL_AS_IS);
    w->k_conv = kl_vector(l, i, "self_attn.k_conv1d.weight", H * K, W, KL_AS_IS);
    w->v_conv = kl_vector(l, i, "self_attn.v_conv1d.weight", H * K, W, KL_AS_IS);
    w->f_x = kl_matrix(l, i, "self_attn.f_a_proj.weight", K, D);
    w->f_b = kl_matrix(l, i, "self_attn.f_b_proj.weight", H * K, K);
    w->b = kl_matrix(l, i, "self_attn.b_proj.weight", H, D);
    if (c->delta.full_rank_gate) {
        w->z_x = kl_matrix(l, i, "self_attn.g_proj.weight", H * K, D);
    } else {
        w->z_x = kl_matrix(l, i, "self_attn.g_a_proj.weight", K, D);
        w->z_b = kl_matrix(l, i, "self_attn.g_b_proj.weight", H * K, K);
    }
    w->rate = load_rate(l, i, "self_attn.rate", "self_attn.A_log", H);
    w->dt_bias = kl_vector(l, i, "self_attn.dt_bias", H * K, 1, KL_AS_IS);
    w->o_norm = kl_vector(l, i, "self_attn.o_norm.weight", K, 1, KL_AS_IS);
    w->o = kl_matrix(l, i, "self_attn.o_proj.weight", D, H * K);
}

/* q, k, v and z: one matrix grouped by key head, q k v z of each group; or q, k, v of all heads and z apart */
static void load_gdn_qkvz(kl_loader *l, int64_t i, delta_weights *w)
{
    const kl_config *c = &l->model->config;
    const int64_t Hk = c->delta.Hk, K = c->delta.K, D = c->D, HV = c->delta.Hv * c->delta.V,
                  V = HV / Hk, group = 2 * K + 2 * V;
    const char *grouped = "linear_attn.in_proj_qkvz.weight";
    if (kl_has_tensor(l, i, grouped)) {
        const kl_tensor *t = kl_find_tensor(l, i, grouped, Hk * group, D);
        w->q = kl_rows_of(l, t, 0, Hk, group, K, D);
        w->k = kl_rows_of(l, t, K, Hk, group, K, D);
        w->v = kl_rows_of(l, t, 2 * K, Hk, group, V, D);
        w->z_x = kl_rows_of(l, t, 2 * K + V, Hk, group, V, D);
        return;
    }
    const kl_tensor *t = kl_find_tensor(l, i, "linear_attn.in_proj_qkv.weight", 2 * Hk * K + HV, D);
    w->q = kl_rows_of(l, t, 0, 1, 0, Hk * K, D);
    w->k = kl_rows_of(l, t, Hk * K, 1, 0, Hk * K, D);
    w->v = kl_rows_of(l, t, 2 * Hk * K, 1, 0, HV, D);
    w->z_x = kl_matrix(l, i, "linear_attn.in_proj_z.weight", HV, D);
}

/* b and a: one matrix grouped by key head, b a of each group; or apart */
static void load_gdn_ba(kl_loader *l, int64_t i, delta_weights *w)
{
    const kl_config *c = &l->model->config;
    const int64_t Hk = c->delta.Hk, Hv = c->delta.Hv, D = c->D, n = Hv / Hk;
    const char *grouped = "linear_attn.in_proj_ba.weight";
    if (kl_has_tensor(l, i, grouped)) {
        const kl_tensor *t = kl_find_tensor(l, i, grouped, 2 * Hv, D);
        w->b = kl_rows_of(l, t, 0, Hk, 2 * n, n, D);
        w->f_x = kl_rows_of(l, t, n, Hk, 2 * n, n, D);
        return;
    }
    w->b = kl_matrix(l, i, "linear_attn.in_proj_b.weight", Hv, D);
    w->f_x = kl_matrix(l, i, "linear_attn.in_proj_a.weight", Hv, D);
}

static void load_gdn(kl_loader *l, int64_t i, delta_weights *w)
{
    const kl_config *c = &l->model->config;
    const int64_t Hv = c->delta.Hv, HK = c->delta.Hk * c->delta.K, HV = Hv * c->delta.V,
                  W = c->delta.taps;
    load_gdn_qkvz(l, i, w);
    load_gdn_ba(l, i, w);
    w->q_conv = kl_vector(l, i, "linear_attn.conv1d.weight", 2 * HK + HV, W, KL_AS_IS);
    if (w->q_conv != NULL) { /* its channels are those of q, k, v */
        w->k_conv = w->q_conv + HK * W;
        w->v_conv = w->k_conv + HK * W;
    }
    w->rate = load_rate(l, i, "linear_attn.rate", "linear_attn.A_log", Hv);
    w->dt_bias = kl_vector(l, i, "linear_attn.dt_bias", Hv, 1, KL_AS_IS);
    w->o_norm = kl_vector(l, i, "linear_attn.norm.weight", c->delta.V, 1, KL_AS_IS);
    w->o = kl_matrix(l, i, "linear_attn.out_proj.weight", c->D, HV);
}

/* w_uk and w_uv: kv_b_proj [H * (K + V), R] has each head's rows of the one, then of the other; GGUF has k_b_proj
 * [H, R, K], transposed in each head, and v_b_proj [H, V, R] */
static void load_kv_b(kl_loader *l, int64_t i, mla_weights *w)
{
    const kl_config *c = &l->model->config;
    const int64_t H = c->mla.heads, K = c->mla.nope, V = c->mla.v, R = c->mla.rank;
    if (!kl_has_tensor(l, i, "self_attn.k_b_proj.weight")) {
        const kl_tensor *kv_b = kl_find_tensor(l, i, "self_attn.kv_b_proj.weight", H * (K + V), R);
        w->w_uk = kl_rows_of(l, kv_b, 0, H, K + V, K, R);
        w->w_uv = kl_rows_of(l, kv_b, K, H, K + V, V, R);
        return;
    }
    const kl_tensor *k_b = kl_find_tensor(l, i, "self_attn.k_b_proj.weight", H * R, K);
    w->w_uk = kl_rows_of(l, k_b, 0, H, R, R, K);
    w->w_uk.rows = K;
    w->w_uk.cols = R;
    w->w_uk.transposed = 1;
    const kl_tensor *v_b = kl_find_tensor(l, i, "self_attn.v_b_proj.weight", H * V, R);
    w->w_uv = kl_rows_of(l, v_b, 0, H, V, V, R);
}

static void load_index(kl_loader *l, int64_t i, index_weights *w)
{
    const kl_config *c = &l->model->config;
    const int64_t H = c->index.heads, D = c->index.width;
    w->q = kl_matrix(l, i, "self_attn.indexer.wq_b.weight", H * D, c->mla.q_rank);
    w->k = kl_matrix(l, i, "self_attn.indexer.wk.weight", D, c->D);
    w->gate = kl_matrix(l, i, "self_attn.indexer.index_kpool_compress_gate", D, c->D);
    w->weights = kl_matrix(l, i, "self_attn.indexer.weights_proj.weight", H, c->D);
    w->k_norm = kl_vector(l, i, "self_attn.indexer.k_norm.weight", D, 1, KL_AS_IS);
    w->k_bias = kl_vector(l, i, "self_attn.indexer.k_norm.bias", D, 1, KL_AS_IS);
    w->ape =
        kl_vector(l, i, "self_attn.indexer.index_kpool_compress_ape", c->index.pool, D, KL_AS_IS);
}

static void load_mla(kl_loader *l, int64_t i, mla_weights *w)
{
    const kl_config *c = &l->model->config;
    const int64_t H = c->mla.heads, K = c->mla.nope, P = c->mla.rope, V = c->mla.v, R = c->mla.rank;
    if (c->mla.q_rank > 0) {
        w->q_a = kl_matrix(l, i, "self_attn.q_a_proj.weight", c->mla.q_rank, c->D);
        w->q_a_norm = kl_vector(l, i, "self_attn.q_a_layernorm.weight", c->mla.q_rank, 1, KL_AS_IS);
        w->q = kl_matrix(l, i, "self_attn.q_b_proj.weight", H * (K + P), c->mla.q_rank);
    } else {
        w->q = kl_matrix(l, i, "self_attn.q_proj.weight", H * (K + P), c->D);
    }
    const kl_tensor *kv_a =
        kl_find_tensor(l, i, "self_attn.kv_a_proj_with_mqa.weight", R + P, c->D);
    w->latent = kl_rows_of(l, kv_a, 0, 1, 0, R, c->D);
    w->k_shared = kl_rows_of(l, kv_a, R, 1, 0, P, c->D);
    w->latent_norm = kl_vector(l, i, "self_attn.kv_a_layernorm.weight", R, 1, KL_AS_IS);
    load_kv_b(l, i, w);
    if (c->mla.gated)
        w->gate = kl_matrix(l, i, "self_attn.g_proj.weight", H * V, c->D);
    if (c->index.heads > 0)
        load_index(l, i, &w->index);
    w->o = kl_matrix(l, i, "self_attn.o_proj.weight", c->D, H * V);
}

static kl_convert norm_of(const kl_loader *l)
{
    return l->model->config.norm_plus_one ? KL_PLUS_ONE : KL_AS_IS;
}

/* q_proj [H * 2K, D]: each head's rows of the query, then of the gate */
static void load_attn(kl_loader *l, int64_t i, attn_weights *w)
{
    const kl_config *c = &l->model->config;
    const int64_t H = c->attn.heads, HK = c->attn.kv_heads * c->attn.width, K = c->attn.width;
    const kl_tensor *q = kl_find_tensor(l, i, "self_attn.q_proj.weight", H * 2 * K, c->D);
    w->q = kl_rows_of(l, q, 0, H, 2 * K, K, c->D);
    w->gate = kl_rows_of(l, q, K, H, 2 * K, K, c->D);
    w->k = kl_matrix(l, i, "self_attn.k_proj.weight", HK, c->D);
    w->v = kl_matrix(l, i, "self_attn.v_proj.weight", HK, c->D);
    w->q_norm = kl_vector(l, i, "self_attn.q_norm.weight", K, 1, norm_of(l));
    w->k_norm = kl_vector(l, i, "self_attn.k_norm.weight", K, 1, norm_of(l));
    w->o = kl_matrix(l, i, "self_attn.o_proj.weight", c->D, H * K);
}

static void load_mixer(kl_loader *l, int64_t i, layer_weights *w)
{
    switch (l->model->config.layers[i].mixer) {
    case KL_MIXER_KDA: load_kda(l, i, &w->delta); break;
    case KL_MIXER_GDN: load_gdn(l, i, &w->delta); break;
    case KL_MIXER_MLA: load_mla(l, i, &w->mla); break;
    case KL_MIXER_ATTN: load_attn(l, i, &w->attn); break;
    }
}

/* gate, up and down of width F; names are theirs */
static void load_mlp(kl_loader *l, int64_t i, mlp_weights *w, const char *const names[3], int64_t F)
{
    const int64_t D = l->model->config.D;
    w->gate = kl_matrix(l, i, names[0], F, D);
    w->up = kl_matrix(l, i, names[1], F, D);
    w->down = kl_matrix(l, i, names[2], D, F);
}

static void load_dense(kl_loader *l, int64_t i, mlp_weights *w)
{
    static const char *const names[] = { "mlp.gate_proj.weight", "mlp.up_proj.weight",
                                         "mlp.down_proj.weight" };
    load_mlp(l, i, w, names, l->model->config.ffn.dense);
}

/* The spellings of a mixture's tensors. */
typedef struct moe_names {
    const char *router, *bias, *expert[3], *latent[3], *shared[3], *shared_gate;
} moe_names;

static const moe_names moe_spellings[] = {
    { "block_sparse_moe.gate.weight",
      "block_sparse_moe.gate.e_score_correction_bias",
      { "block_sparse_moe.experts.#.w1.weight", "block_sparse_moe.experts.#.w3.weight",
        "block_sparse_moe.experts.#.w2.weight" },
      { "block_sparse_moe.routed_expert_down_proj.weight",
        "block_sparse_moe.routed_expert_norm.weight",
        "block_sparse_moe.routed_expert_up_proj.weight" },
      { "block_sparse_moe.shared_experts.gate_proj.weight",
        "block_sparse_moe.shared_experts.up_proj.weight",
        "block_sparse_moe.shared_experts.down_proj.weight" },
      "block_sparse_moe.shared_expert_gate.weight" },
    { "mlp.gate.weight",
      "mlp.gate.e_score_correction_bias",
      { "mlp.experts.#.gate_proj.weight", "mlp.experts.#.up_proj.weight",
        "mlp.experts.#.down_proj.weight" },
      { "mlp.routed_expert_down_proj.weight", "mlp.routed_expert_norm.weight",
        "mlp.routed_expert_up_proj.weight" },
      { "mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight",
        "mlp.shared_expert.down_proj.weight" },
      "mlp.shared_expert_gate.weight" },
};

/* GLM's shared experts, whose tensors are otherwise spelled as the second. */
static const char *const shared_plural[] = { "mlp.shared_experts.gate_proj.weight",
                                             "mlp.shared_experts.up_proj.weight",
                                             "mlp.shared_experts.down_proj.weight" };

static void load_moe(kl_loader *l, int64_t i, moe_weights *w)
{
    const kl_config *c = &l->model->config;
    const int64_t E = c->ffn.experts, F = c->ffn.width, D = c->D,
                  L = c->ffn.latent > 0 ? c->ffn.latent : D;
    const moe_names *names = &moe_spellings[kl_has_tensor(l, i, moe_spellings[1].router)];
    const char *const *shared =
        kl_has_tensor(l, i, shared_plural[0]) ? shared_plural : names->shared;
    w->router = kl_matrix(l, i, names->router, E, D);
    w->bias =
        kl_has_tensor(l, i, names->bias) ? kl_vector(l, i, names->bias, E, 1, KL_AS_IS) : NULL;
    if (c->ffn.latent > 0) {
        w->latent_down = kl_matrix(l, i, names->latent[0], L, D);
        w->latent_norm =
            c->ffn.latent_norm ? kl_vector(l, i, names->latent[1], L, 1, KL_AS_IS) : NULL;
        w->latent_up = kl_matrix(l, i, names->latent[2], D, L);
    }
    w->gate = kl_matrices(l, i, names->expert[0], E, F, L);
    w->up = kl_matrices(l, i, names->expert[1], E, F, L);
    w->down = kl_matrices(l, i, names->expert[2], E, L, F);
    w->shared = (mlp_weights){ 0 };
    w->shared_gate = (kl_weight){ 0 };
    if (c->ffn.shared > 0)
        load_mlp(l, i, &w->shared, shared, c->ffn.shared);
    if (c->ffn.shared > 0 && c->ffn.shared_gated)
        w->shared_gate = kl_matrix(l, i, names->shared_gate, 1, D);
}

/* What scores residuals [D]: the weight of a norm times a projection to one value, or that product itself. */
static const float *load_score(kl_loader *l, int64_t i, const char *score, const char *norm,
                               const char *proj)
{
    const int64_t D = l->model->config.D;
    if (l->model->config.attn_res_block == 0)
        return NULL;
    if (kl_has_tensor(l, i, score))
        return kl_vector(l, i, score, D, 1, KL_AS_IS);
    return kl_vector_product(l, i, norm, proj, D);
}

/* The spellings of what lies between the stream and a block. */
typedef struct half_names {
    const char *score, *score_norm, *score_proj, *fn, *base, *scale, *norm;
} half_names;

static const half_names mixer_names = { "self_attention_res.weight",
                                        "self_attention_res_norm.weight",
                                        "self_attention_res_proj.weight",
                                        "hc_attn_fn",
                                        "hc_attn_base",
                                        "hc_attn_scale",
                                        "input_layernorm.weight" };
static const half_names ffn_names = { "mlp_res.weight",
                                      "mlp_res_norm.weight",
                                      "mlp_res_proj.weight",
                                      "hc_ffn_fn",
                                      "hc_ffn_base",
                                      "hc_ffn_scale",
                                      "post_attention_layernorm.weight" };

static void load_half(kl_loader *l, int64_t i, half_weights *w, const half_names *names)
{
    const kl_config *c = &l->model->config;
    const int64_t n = c->hc.streams;
    w->res = load_score(l, i, names->score, names->score_norm, names->score_proj);
    if (n > 0) {
        w->hc.fn = kl_matrix(l, i, names->fn, (2 + n) * n, n * c->D);
        w->hc.base = kl_vector(l, i, names->base, (2 + n) * n, 1, KL_AS_IS);
        w->hc.scale = kl_vector(l, i, names->scale, 3, 1, KL_AS_IS);
    }
    w->norm = kl_vector(l, i, names->norm, c->D, 1, norm_of(l));
}

/* Says how much is on the device, and lets the caller end it. */
static void report(kl_loader *l)
{
    kl_ctx *ctx = l->ctx;
    if (l->uploaded == NULL || l->model->matrices == NULL || l->status != KL_OK)
        return;
    const bool ends =
        (ctx->report != NULL
         && ctx->report(ctx->report_user, (int64_t)l->upload_bytes, (int64_t)l->model->matrix_bytes)
                != 0)
        || (ctx->poll != NULL && ctx->poll(ctx->poll_user) != 0);
    if (ends)
        l->status = kl_fail(ctx, KL_ERR_INTERRUPTED,
                            "the upload of the weights was stopped after %zu of %zu bytes",
                            l->upload_bytes, l->model->matrix_bytes);
}

/* Walks the whole model; with no staging and no addresses it only counts what they must hold. */
static void load_all(kl_loader *l)
{
    kl_model *m = l->model;
    const kl_config *c = &m->config;
    l->vector_values = 0;
    m->n_addresses = 0;
    m->weight_bytes = 0;
    m->embed = kl_matrix(l, -1, "model.embed_tokens.weight", c->vocab, c->D);
    m->head = c->tied ? m->embed : kl_matrix(l, -1, "lm_head.weight", c->vocab, c->D);
    m->output_res =
        load_score(l, -1, "model.output_attn_res.weight", "model.output_attn_res_norm.weight",
                   "model.output_attn_res_proj.weight");
    m->norm = kl_vector(l, -1, "model.norm.weight", c->D, 1, norm_of(l));
    report(l);
    for (int64_t i = 0; i < c->n_layers && l->status == KL_OK; i++) {
        layer_weights *w = &m->layer[i];
        load_half(l, i, &w->before_mixer, &mixer_names);
        load_half(l, i, &w->before_ffn, &ffn_names);
        load_mixer(l, i, w);
        if (c->layers[i].ffn == KL_FFN_DENSE)
            load_dense(l, i, &w->mlp);
        else
            load_moe(l, i, &w->moe);
        report(l);
    }
}

static kl_status load(kl_loader *l)
{
    kl_ctx *ctx = l->ctx;
    kl_model *m = l->model;
    load_all(l);
    KL_TRY(l->status);
    m->vector_bytes = l->vector_values * sizeof(float);
    if (m->planning) {
        m->vectors = NULL;
        return KL_OK;
    }
    if (l->uploaded != NULL) {
        m->matrix_bytes = l->upload_bytes;
        m->matrices = m->backend->allocate(ctx, m->matrix_bytes);
        if (m->matrices == NULL)
            return KL_ERR_MEMORY; /* the backend says how much */
        memset(l->uploaded, 0, (size_t)l->n * sizeof *l->uploaded);
        l->upload_bytes = 0;
    }
    m->addresses = calloc(m->n_addresses + 1, sizeof *m->addresses);
    m->vectors = m->backend->allocate(ctx, m->vector_bytes);
    l->staging = calloc(l->vector_values + 1, sizeof *l->staging);
    if (m->addresses == NULL || m->vectors == NULL || l->staging == NULL)
        return kl_fail(ctx, KL_ERR_MEMORY, "out of memory: %zu bytes of vectors", m->vector_bytes);
    load_all(l);
    KL_TRY(l->status);
    /* which waits: every context of the device may use the weights then */
    return m->backend->upload(ctx, m->vectors, l->staging, m->vector_bytes);
}

static size_t place(size_t *end, size_t n)
{
    const size_t at = *end;
    *end += (n + 15) / 16 * 16; /* float32 values to 64 bytes */
    return at;
}

/* Where each delta net's parts lie in a sequence's fixed block. */
static void lay_out(kl_model *m)
{
    const kl_config *c = &m->config;
    const size_t HK = (size_t)(c->delta.Hk * c->delta.K), HV = (size_t)(c->delta.Hv * c->delta.V);
    size_t end = 0;
    for (int64_t i = 0; i < c->n_layers; i++) {
        if (c->layers[i].mixer != KL_MIXER_KDA && c->layers[i].mixer != KL_MIXER_GDN)
            continue;
        const size_t rows = (size_t)(c->delta.taps - 1);
        layer_layout *at = &m->layout[i];
        at->q_history = place(&end, rows * HK) * sizeof(float);
        at->k_history = place(&end, rows * HK) * sizeof(float);
        at->v_history = place(&end, rows * HV) * sizeof(float);
        at->delta = place(&end, HV * (size_t)c->delta.K) * sizeof(float);
    }
    m->fixed_bytes = end * sizeof(float);
}

kl_status kl_model_create(kl_ctx *ctx, kl_model **out, const kl_config *config,
                          const kl_tensor *tensors, int64_t n_tensors, int planning)
{
    *out = NULL;
    KL_TRY(kl_config_check(ctx, config));
    const size_t n = (size_t)config->n_layers;
    kl_model *m = calloc(1, sizeof *m);
    kl_loader l = { .ctx = ctx, .model = m };
    kl_status status = kl_fail(ctx, KL_ERR_MEMORY, "out of memory: model of %zu layers", n);
    if (m == NULL)
        return status;
    m->config = *config;
    m->backend = ctx->backend;
    m->device_number = ctx->device_number;
    m->planning = planning;
    m->layers = malloc(n * sizeof *m->layers);
    m->layer = calloc(n, sizeof *m->layer);
    m->layout = calloc(n, sizeof *m->layout);
    if (m->layers == NULL || m->layer == NULL || m->layout == NULL)
        goto done;
    memcpy(m->layers, config->layers, n * sizeof *m->layers);
    m->config.layers = m->layers;
    lay_out(m);
    status = kl_loader_begin(&l, tensors, n_tensors);
    if (status == KL_OK) {
        const kl_fp saved = kl_fp_default();
        status = load(&l);
        kl_fp_restore(saved);
    }
done:
    kl_loader_end(&l);
    if (status != KL_OK)
        kl_model_destroy(ctx, m);
    else
        *out = m;
    return status;
}

kl_status kl_model_check_ctx(kl_ctx *ctx, const kl_model *model, const char *who)
{
    if (ctx->backend != model->backend)
        return kl_fail(ctx, KL_ERR_ARG, "%s: the context computes on %s and the model is on %s",
                       who, ctx->backend->name, model->backend->name);
    if (ctx->device_number != model->device_number)
        return kl_fail(
            ctx, KL_ERR_ARG, "%s: the context computes on %s:%d and the model is on %s:%d", who,
            ctx->backend->name, ctx->device_number, model->backend->name, model->device_number);
    return KL_OK;
}

void kl_model_destroy(kl_ctx *ctx, kl_model *model)
{
    if (model == NULL)
        return;
    if (model->matrices != NULL)
        model->backend->release(ctx, model->matrices, model->matrix_bytes);
    if (model->vectors != NULL)
        model->backend->release(ctx, model->vectors, model->vector_bytes);
    free(model->addresses);
    free(model->layers);
    free(model->layer);
    free(model->layout);
    free(model);
}
