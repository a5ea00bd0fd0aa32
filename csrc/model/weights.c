/* From a checkpoint's tensors, by their Hugging Face names, to weights by role. Matrices are borrowed;
 * vectors are widened into one block of the backend's memory. What GGUF stores otherwise has names of
 * its own, which are looked for first: self_attn.k_b_proj.weight [H, R, K] and .v_b_proj.weight [H, V, R]
 * for kv_b_proj, self_attn.rate [H] for exp(A_log). */
#include "model.h"

#include "../ops/product.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { REST = 96, NAME = 160 }; /* bytes of a name below its layer, and of a whole one */

typedef struct loader {
    kl_ctx *ctx;
    kl_model *model;
    const kl_tensor **sorted; /* by name */
    int64_t n;
    size_t vector_values, vector_capacity; /* of the model's vectors, in float32 */
    size_t address_capacity;
    float *staging; /* host copy of the vectors; NULL in the pass that only counts */
    kl_status status;
} loader;

static int by_name(const void *a, const void *b)
{
    return strcmp((*(const kl_tensor *const *)a)->name, (*(const kl_tensor *const *)b)->name);
}

static const kl_tensor *find(const loader *l, const char *name)
{
    const kl_tensor key = { .name = name }, *p = &key;
    const kl_tensor **hit = bsearch(&p, l->sorted, (size_t)l->n, sizeof *l->sorted, by_name);
    return hit != NULL ? *hit : NULL;
}

static void fail(loader *l, kl_status status, const char *format, ...)
{
    char sentence[400];
    if (l->status != KL_OK)
        return;
    va_list args;
    va_start(args, format);
    vsnprintf(sentence, sizeof sentence, format, args);
    va_end(args);
    l->status = kl_fail(l->ctx, status, "%s", sentence);
}

/* The tensor of that name with exactly rows x cols values (any grouping of them into axes that keeps the
 * last), or NULL with the failure set. */
static const kl_tensor *tensor(loader *l, const char *name, int64_t rows, int64_t cols)
{
    const kl_tensor *t = find(l, name);
    if (t == NULL) {
        fail(l, KL_ERR_FORMAT, "checkpoint: %s is missing", name);
        return NULL;
    }
    int64_t values = 1;
    bool fits = t->n_dims >= 1 && t->n_dims <= 4;
    for (int i = 0; fits && i < t->n_dims; i++)
        fits = kl_mul(&values, values, t->shape[i]);
    if (!fits || values != rows * cols || (cols > 1 && t->shape[t->n_dims - 1] != cols)) {
        fail(l, KL_ERR_FORMAT, "checkpoint: %s has %lld values; it must be [%lld, %lld]", name,
             (long long)values, (long long)rows, (long long)cols);
        return NULL;
    }
    const int64_t block = kl_type_block(t->type);
    if (block == 0) {
        fail(l, KL_ERR_DTYPE, "checkpoint: %s has storage type %d, which is not known here", name,
             (int)t->type);
        return NULL;
    }
    if (t->shape[t->n_dims - 1] % block != 0) {
        fail(l, KL_ERR_FORMAT,
             "checkpoint: %s has rows of %lld values; %s needs a multiple of %lld", name,
             (long long)t->shape[t->n_dims - 1], kl_type_name(t->type), (long long)block);
        return NULL;
    }
    if (t->data == NULL && !l->model->planning) {
        fail(l, KL_ERR_ARG, "checkpoint: %s has no data", name);
        return NULL;
    }
    return t;
}

static const void **take_addresses(loader *l, size_t n)
{
    const void **p =
        l->model->addresses != NULL ? l->model->addresses + l->model->n_addresses : NULL;
    l->model->n_addresses += n;
    return p;
}

/* n matrices [rows, cols] that begin step bytes apart behind one address */
static kl_weight view(loader *l, const kl_tensor *t, size_t first_byte, int64_t n, size_t step,
                      int64_t rows, int64_t cols)
{
    const void **matrix = take_addresses(l, (size_t)n);
    kl_weight w = { .n = n, .rows = rows, .cols = cols };
    if (t == NULL)
        return w;
    w.type = t->type;
    w.row_bytes = kl_type_bytes(t->type, cols);
    w.matrix = matrix;
    for (int64_t i = 0; matrix != NULL && t->data != NULL && i < n; i++)
        matrix[i] = (const char *)t->data + first_byte + (size_t)i * step;
    return w;
}

static void count(loader *l, const kl_tensor *t, int64_t values)
{
    if (t != NULL)
        l->model->weight_bytes += kl_type_bytes(t->type, values);
}

static void layer_name(char name[NAME], int64_t layer, const char *rest)
{
    snprintf(name, NAME, "model.layers.%lld.%s", (long long)layer, rest);
}

static kl_weight named_matrix(loader *l, const char *name, int64_t rows, int64_t cols)
{
    const kl_tensor *t = tensor(l, name, rows, cols);
    count(l, t, rows * cols);
    return view(l, t, 0, 1, 0, rows, cols);
}

static kl_weight matrix(loader *l, int64_t layer, const char *rest, int64_t rows, int64_t cols)
{
    char name[NAME];
    layer_name(name, layer, rest);
    return named_matrix(l, name, rows, cols);
}

/* separate experts: one tensor each, of one type */
static kl_weight experts(loader *l, int64_t layer, const char *part, int64_t E, int64_t rows,
                         int64_t cols)
{
    const void **address = take_addresses(l, (size_t)E);
    kl_weight w = { .n = E, .rows = rows, .cols = cols, .matrix = address };
    for (int64_t e = 0; e < E && l->status == KL_OK; e++) {
        char rest[REST], name[NAME];
        snprintf(rest, sizeof rest, "block_sparse_moe.experts.%lld.%s.weight", (long long)e, part);
        layer_name(name, layer, rest);
        const kl_tensor *t = tensor(l, name, rows, cols);
        if (t == NULL)
            return w;
        count(l, t, rows * cols);
        if (e == 0) {
            w.type = t->type;
            w.row_bytes = kl_type_bytes(t->type, cols);
        } else if (t->type != w.type) {
            fail(l, KL_ERR_FORMAT,
                 "checkpoint: %s is %s and expert 0 is %s; experts must be of one type", name,
                 kl_type_name(t->type), kl_type_name(w.type));
        }
        if (address != NULL)
            address[e] = t->data;
    }
    return w;
}

typedef enum convert { AS_IS, RATE } convert; /* RATE: exp(A_log), in double, rounded once */

static const float *named_vector(loader *l, const char *name, int64_t rows, int64_t cols,
                                 convert how)
{
    const kl_tensor *t = tensor(l, name, rows, cols);
    const int64_t n = rows * cols;
    const size_t begin = l->vector_values;
    l->vector_values += ((size_t)n + 15) / 16 * 16; /* 64-byte aligned */
    count(l, t, n);
    if (t == NULL || l->staging == NULL)
        return NULL;
    float *values = l->staging + begin;
    if (t->data != NULL)
        kl_widen(l->ctx, values, t->data, t->type, n);
    for (int64_t i = 0; how == RATE && i < n; i++)
        values[i] = (float)exp((double)values[i]);
    return l->model->vectors + begin;
}

static const float *vector(loader *l, int64_t layer, const char *rest, int64_t n)
{
    char name[NAME];
    layer_name(name, layer, rest);
    return named_vector(l, name, n, 1, AS_IS);
}

static const float *taps(loader *l, int64_t layer, const char *rest, int64_t channels,
                         int64_t width)
{
    char name[NAME];
    layer_name(name, layer, rest);
    return named_vector(l, name, channels, width, AS_IS);
}

static void load_kda(loader *l, int64_t i, kda_weights *w)
{
    const kl_config *c = &l->model->config;
    const int64_t H = c->kda.heads, K = c->kda.width, W = c->kda.taps, D = c->D;
    char name[NAME];
    w->q = matrix(l, i, "self_attn.q_proj.weight", H * K, D);
    w->k = matrix(l, i, "self_attn.k_proj.weight", H * K, D);
    w->v = matrix(l, i, "self_attn.v_proj.weight", H * K, D);
    w->q_conv = taps(l, i, "self_attn.q_conv1d.weight", H * K, W);
    w->k_conv = taps(l, i, "self_attn.k_conv1d.weight", H * K, W);
    w->v_conv = taps(l, i, "self_attn.v_conv1d.weight", H * K, W);
    w->f_a = matrix(l, i, "self_attn.f_a_proj.weight", K, D);
    w->f_b = matrix(l, i, "self_attn.f_b_proj.weight", H * K, K);
    w->b = matrix(l, i, "self_attn.b_proj.weight", H, D);
    w->g_a = matrix(l, i, "self_attn.g_a_proj.weight", K, D);
    w->g_b = matrix(l, i, "self_attn.g_b_proj.weight", H * K, K);
    layer_name(name, i, "self_attn.rate");
    if (find(l, name) != NULL) {
        w->rate = named_vector(l, name, H, 1, AS_IS);
    } else {
        layer_name(name, i, "self_attn.A_log");
        w->rate = named_vector(l, name, H, 1, RATE);
    }
    w->dt_bias = vector(l, i, "self_attn.dt_bias", H * K);
    w->o_norm = vector(l, i, "self_attn.o_norm.weight", K);
    w->o = matrix(l, i, "self_attn.o_proj.weight", D, H * K);
}

/* kv_b_proj [H * (K + V), R]: each head's rows of w_uk, then of w_uv */
static void load_heads(loader *l, int64_t i, mla_weights *w)
{
    const kl_config *c = &l->model->config;
    const int64_t H = c->mla.heads, K = c->mla.nope, V = c->mla.v, R = c->mla.rank;
    char name[NAME];
    layer_name(name, i, "self_attn.kv_b_proj.weight");
    const kl_tensor *kv_b = tensor(l, name, H * (K + V), R);
    count(l, kv_b, H * (K + V) * R);
    const size_t head = kv_b != NULL ? kl_type_bytes(kv_b->type, (K + V) * R) : 0;
    w->w_uk = view(l, kv_b, 0, H, head, K, R);
    w->w_uv = view(l, kv_b, kv_b != NULL ? kl_type_bytes(kv_b->type, K * R) : 0, H, head, V, R);
}

/* The same as GGUF has it: k_b_proj [H, R, K], transposed in each head, and v_b_proj [H, V, R] */
static void load_split_heads(loader *l, int64_t i, mla_weights *w)
{
    const kl_config *c = &l->model->config;
    const int64_t H = c->mla.heads, K = c->mla.nope, V = c->mla.v, R = c->mla.rank;
    char name[NAME];
    layer_name(name, i, "self_attn.k_b_proj.weight");
    const kl_tensor *k_b = tensor(l, name, H * R, K);
    count(l, k_b, H * R * K);
    w->w_uk = view(l, k_b, 0, H, k_b != NULL ? kl_type_bytes(k_b->type, R * K) : 0, K, R);
    w->w_uk.transposed = 1;
    w->w_uk.row_bytes = k_b != NULL ? kl_type_bytes(k_b->type, K) : 0;
    layer_name(name, i, "self_attn.v_b_proj.weight");
    const kl_tensor *v_b = tensor(l, name, H * V, R);
    count(l, v_b, H * V * R);
    w->w_uv = view(l, v_b, 0, H, v_b != NULL ? kl_type_bytes(v_b->type, V * R) : 0, V, R);
}

static void load_mla(loader *l, int64_t i, mla_weights *w)
{
    const kl_config *c = &l->model->config;
    const int64_t H = c->mla.heads, K = c->mla.nope, P = c->mla.rope, V = c->mla.v, R = c->mla.rank;
    char name[NAME];
    if (c->mla.q_rank > 0) {
        w->q_a = matrix(l, i, "self_attn.q_a_proj.weight", c->mla.q_rank, c->D);
        w->q_a_norm = vector(l, i, "self_attn.q_a_layernorm.weight", c->mla.q_rank);
        w->q = matrix(l, i, "self_attn.q_b_proj.weight", H * (K + P), c->mla.q_rank);
    } else {
        w->q = matrix(l, i, "self_attn.q_proj.weight", H * (K + P), c->D);
    }
    layer_name(name, i, "self_attn.kv_a_proj_with_mqa.weight");
    const kl_tensor *kv_a = tensor(l, name, R + P, c->D);
    count(l, kv_a, (R + P) * c->D);
    w->latent = view(l, kv_a, 0, 1, 0, R, c->D);
    w->k_shared =
        view(l, kv_a, kv_a != NULL ? kl_type_bytes(kv_a->type, R * c->D) : 0, 1, 0, P, c->D);
    w->latent_norm = vector(l, i, "self_attn.kv_a_layernorm.weight", R);
    layer_name(name, i, "self_attn.k_b_proj.weight");
    if (find(l, name) != NULL)
        load_split_heads(l, i, w);
    else
        load_heads(l, i, w);
    w->o = matrix(l, i, "self_attn.o_proj.weight", c->D, H * V);
}

static void load_mlp(loader *l, int64_t i, const char *prefix, mlp_weights *w, int64_t F)
{
    const int64_t D = l->model->config.D;
    char rest[REST];
    snprintf(rest, sizeof rest, "%s.gate_proj.weight", prefix);
    w->gate = matrix(l, i, rest, F, D);
    snprintf(rest, sizeof rest, "%s.up_proj.weight", prefix);
    w->up = matrix(l, i, rest, F, D);
    snprintf(rest, sizeof rest, "%s.down_proj.weight", prefix);
    w->down = matrix(l, i, rest, D, F);
}

static void load_moe(loader *l, int64_t i, moe_weights *w)
{
    const kl_config *c = &l->model->config;
    const int64_t E = c->ffn.experts, F = c->ffn.width, D = c->D;
    char name[NAME];
    w->router = matrix(l, i, "block_sparse_moe.gate.weight", E, D);
    layer_name(name, i, "block_sparse_moe.gate.e_score_correction_bias");
    w->bias = find(l, name) != NULL ? named_vector(l, name, E, 1, AS_IS) : NULL;
    w->gate = experts(l, i, "w1", E, F, D);
    w->up = experts(l, i, "w3", E, F, D);
    w->down = experts(l, i, "w2", E, D, F);
    w->shared = (mlp_weights){ 0 };
    if (c->ffn.shared > 0)
        load_mlp(l, i, "block_sparse_moe.shared_experts", &w->shared, c->ffn.shared * F);
}

/* Walks the whole model; with no staging and no addresses it only counts what they must hold. */
static void load_all(loader *l)
{
    kl_model *m = l->model;
    const kl_config *c = &m->config;
    l->vector_values = 0;
    m->n_addresses = 0;
    m->weight_bytes = 0;
    m->embed = named_matrix(l, "model.embed_tokens.weight", c->vocab, c->D);
    m->head = c->tied ? m->embed : named_matrix(l, "lm_head.weight", c->vocab, c->D);
    m->norm = named_vector(l, "model.norm.weight", c->D, 1, AS_IS);
    for (int64_t i = 0; i < c->n_layers && l->status == KL_OK; i++) {
        layer_weights *w = &m->layer[i];
        w->attn_norm = vector(l, i, "input_layernorm.weight", c->D);
        w->ffn_norm = vector(l, i, "post_attention_layernorm.weight", c->D);
        if (c->layers[i].mixer == KL_MIXER_KDA)
            load_kda(l, i, &w->kda);
        else
            load_mla(l, i, &w->mla);
        if (c->layers[i].ffn == KL_FFN_DENSE)
            load_mlp(l, i, "mlp", &w->mlp, c->ffn.dense);
        else
            load_moe(l, i, &w->moe);
    }
}

static kl_status load(loader *l)
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
    m->addresses = calloc(m->n_addresses + 1, sizeof *m->addresses);
    m->vectors = m->backend->allocate(ctx, m->vector_bytes);
    l->staging = calloc(l->vector_values + 1, sizeof *l->staging);
    if (m->addresses == NULL || m->vectors == NULL || l->staging == NULL)
        return kl_fail(ctx, KL_ERR_MEMORY, "out of memory: %zu bytes of vectors", m->vector_bytes);
    load_all(l);
    KL_TRY(l->status);
    return m->backend->upload(ctx, m->vectors, l->staging, m->vector_bytes);
}

static size_t place(size_t *end, size_t n)
{
    const size_t at = *end;
    *end += (n + 15) / 16 * 16; /* float32 values to 64 bytes */
    return at;
}

/* Where each layer's part lies: layer_layout. */
static void lay_out(kl_model *m)
{
    const kl_config *c = &m->config;
    size_t fixed = 0, latents = 0, k_shareds = 0;
    for (int64_t i = 0; i < c->n_layers; i++) {
        layer_layout *at = &m->layout[i];
        if (c->layers[i].mixer == KL_MIXER_KDA) {
            const size_t channels = (size_t)(c->kda.heads * c->kda.width);
            const size_t history = (size_t)(c->kda.taps - 1) * channels;
            at->q_history = place(&fixed, history) * sizeof(float);
            at->k_history = place(&fixed, history) * sizeof(float);
            at->v_history = place(&fixed, history) * sizeof(float);
            at->delta = place(&fixed, channels * (size_t)c->kda.width) * sizeof(float);
        } else {
            at->latent = place(&latents, (size_t)c->mla.rank * KL_PAGE);
            at->k_shared = place(&k_shareds, (size_t)c->mla.rope * KL_PAGE);
        }
    }
    m->state = (state_layout){ fixed * sizeof(float), latents, k_shareds };
}

kl_status kl_model_create(kl_ctx *ctx, kl_model **out, const kl_config *config,
                          const kl_tensor *tensors, int64_t n_tensors, int planning)
{
    *out = NULL;
    KL_TRY(kl_config_check(ctx, config));
    const size_t n = (size_t)config->n_layers;
    kl_model *m = calloc(1, sizeof *m);
    loader l = { .ctx = ctx, .model = m, .n = n_tensors };
    kl_status status = kl_fail(ctx, KL_ERR_MEMORY, "out of memory: model of %zu layers", n);
    if (m == NULL)
        return status;
    m->config = *config;
    m->backend = ctx->backend;
    m->planning = planning;
    m->layers = malloc(n * sizeof *m->layers);
    m->layer = calloc(n, sizeof *m->layer);
    m->layout = calloc(n, sizeof *m->layout);
    l.sorted = malloc(((size_t)n_tensors + 1) * sizeof *l.sorted);
    if (m->layers == NULL || m->layer == NULL || m->layout == NULL || l.sorted == NULL)
        goto done;
    memcpy(m->layers, config->layers, n * sizeof *m->layers);
    m->config.layers = m->layers;
    for (int64_t i = 0; i < n_tensors; i++)
        l.sorted[i] = &tensors[i];
    qsort(l.sorted, (size_t)n_tensors, sizeof *l.sorted, by_name);
    lay_out(m);
    status = load(&l);
done:
    free(l.sorted);
    free(l.staging);
    if (status != KL_OK)
        kl_model_destroy(ctx, m);
    else
        *out = m;
    return status;
}

void kl_model_destroy(kl_ctx *ctx, kl_model *model)
{
    if (model == NULL)
        return;
    if (model->vectors != NULL)
        model->backend->release(ctx, model->vectors, model->vector_bytes);
    free(model->addresses);
    free(model->layers);
    free(model->layer);
    free(model->layout);
    free(model);
}
