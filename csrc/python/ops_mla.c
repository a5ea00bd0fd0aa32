/* Wrappers of attention, its caches and its indexer, rotary positions, and sampling. */
#include "binding.h"

/* A cache that lies in one array of rows: sequence n has rows begin[n] .. begin[n + 1] - 1. */
static kl_cache cache_of(kl_py_call *c, void *data, int type, int64_t width, const int64_t *begin,
                         int64_t N)
{
    kl_cache cache = { .type = (kl_type)type, .row_bytes = kl_type_bytes((kl_type)type, width) };
    if (c->failed)
        return cache;
    int64_t n_pages = 0;
    for (int64_t n = 0; n < N; n++) { /* rows of width 0 may be any number */
        const int64_t rows = begin[n + 1] - begin[n];
        n_pages += rows / KL_PAGE + (rows % KL_PAGE != 0);
    }
    void **page = kl_py_pointers(c, n_pages, data, 0), **table = kl_py_pointers(c, N, data, 0);
    if (c->failed)
        return cache;
    for (int64_t n = 0, at = 0; n < N; n++) {
        table[n] = (void *)(page + at);
        for (int64_t p = 0; begin[n] + p < begin[n + 1]; p += KL_PAGE)
            page[at++] = (char *)data + (size_t)(begin[n] + p) * cache.row_bytes;
    }
    cache.page = (void *const *const *)table;
    return cache;
}

static void *cache_buffer(kl_py_call *c, PyObject *o, int type, int64_t n, const char *name,
                          bool writable)
{
    if (!c->failed && type != KL_F32 && type != KL_F16 && type != KL_Q8_0)
        kl_py_refuse(c, PyExc_TypeError, "%s has storage type %d; it must be F32, F16 or Q8_0",
                     name, type);
    const kl_py_kind kind = type == KL_F32 ? KL_PY_F32 : type == KL_F16 ? KL_PY_U16 : KL_PY_U8;
    if (type == KL_Q8_0)
        n = (int64_t)kl_type_bytes(KL_Q8_0, n);
    return writable ? kl_py_inout(c, o, kind, n, name)
                    : (void *)(uintptr_t)kl_py_in(c, o, kind, n, name);
}

/* begin is [N+1], from 0 to S, never falling */
static const int64_t *ranges_of(kl_py_call *c, PyObject *o, int64_t N, int64_t S, const char *name)
{
    const int64_t *begin = kl_py_offsets(c, o, N, name);
    bool good = !c->failed && N >= 0 && begin[0] == 0 && begin[N] == S;
    for (int64_t n = 0; good && n < N; n++)
        good = begin[n] <= begin[n + 1];
    if (!c->failed && !good)
        kl_py_refuse(c, PyExc_ValueError, "%s must rise from 0 to %lld", name, (long long)S);
    return begin;
}

/* [N]: begin[n + 1] - begin[n] */
static const int64_t *lengths_of(kl_py_call *c, const int64_t *begin, int64_t N)
{
    int64_t *length = (int64_t *)(void *)kl_py_pointers(c, N, NULL, 0);
    for (int64_t n = 0; !c->failed && n < N; n++)
        length[n] = begin[n + 1] - begin[n];
    return length;
}

static PyObject *py_cache_append(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *ocache, *ox, *ooffsets, *ostart, *obegin;
    int type;
    long long N, T, D, S;
    if (!PyArg_ParseTuple(args, "OOiOOOOLLLL:cache_append", &ctx, &ocache, &type, &ox, &ooffsets,
                          &ostart, &obegin, &N, &T, &D, &S))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t n_x = kl_py_size(&c, "x", T, D, 1, 1),
                  n_cache = kl_py_size(&c, "cache", S, D, 1, 1);
    void *data = cache_buffer(&c, ocache, type, n_cache, "cache", true);
    const float *x = kl_py_in(&c, ox, KL_PY_F32, n_x, "x");
    const int64_t *offsets = ranges_of(&c, ooffsets, N, T, "offsets");
    const int64_t *start = kl_py_in(&c, ostart, KL_PY_I64, N, "start");
    const int64_t *begin = ranges_of(&c, obegin, N, S, "kv_offsets");
    for (int64_t n = 0; !c.failed && n < N; n++)
        if (start[n] > begin[n + 1] - begin[n] - (offsets[n + 1] - offsets[n]))
            kl_py_refuse(&c, PyExc_ValueError, "start[%lld] is %lld; the rows do not fit behind it",
                         (long long)n, (long long)start[n]);
    const kl_cache cache = cache_of(&c, data, type, D, begin, N);
    if (kl_py_begin(&c, ctx))
        c.status = kl_cache_append(c.ctx, cache, x, offsets, start, N, T, D);
    return kl_py_end(&c);
}

static PyObject *py_latent_attention(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oo, *oq, *olatent, *oshared, *ouk, *ouv, *ooffsets, *obegin, *oselect;
    int latent_type, shared_type, form;
    long long N, T, S, H, K, P, V, R, W, from;
    double scale;
    if (!PyArg_ParseTuple(args, "OOOOiOiOOOOO(LLLLLLLLLL)di:latent_attention", &ctx, &oo, &oq,
                          &olatent, &latent_type, &oshared, &shared_type, &ouk, &ouv, &ooffsets,
                          &obegin, &oselect, &N, &T, &S, &H, &K, &P, &V, &R, &W, &from, &scale,
                          &form))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t n_o = kl_py_size(&c, "out", T, H, V, 1),
                  width = K >= 0 && P >= 0 && K <= INT32_MAX && P <= INT32_MAX ? K + P : -1;
    const int64_t n_q = kl_py_size(&c, "q", T, H, width, 1);
    const int64_t n_latent = kl_py_size(&c, "latent", S, R, 1, 1),
                  n_shared = kl_py_size(&c, "k_shared", S, P, 1, 1),
                  n_select = kl_py_size(&c, "select", T, W, 1, 1);
    float *o = kl_py_out(&c, oo, KL_PY_F32, n_o, "out");
    const float *q = kl_py_in(&c, oq, KL_PY_F32, n_q, "q");
    void *latent = cache_buffer(&c, olatent, latent_type, n_latent, "latent", false);
    void *shared = cache_buffer(&c, oshared, shared_type, n_shared, "k_shared", false);
    const int32_t *select = kl_py_in_opt(&c, oselect, KL_PY_I32, n_select, "select");
    const kl_weight w_uk = kl_py_weight(&c, ouk, "w_uk"), w_uv = kl_py_weight(&c, ouv, "w_uv");
    const int64_t *offsets = ranges_of(&c, ooffsets, N, T, "offsets");
    const int64_t *begin = ranges_of(&c, obegin, N, S, "kv_offsets");
    const kl_cache latent_cache = cache_of(&c, latent, latent_type, R, begin, N);
    const kl_cache shared_cache = cache_of(&c, shared, shared_type, P, begin, N);
    const int64_t *positions = lengths_of(&c, begin, N);
    const kl_latent_attention_args a = {
        .offsets = offsets,
        .positions = positions,
        .N = N,
        .T = T,
        .H = H,
        .K = K,
        .P = P,
        .V = V,
        .R = R,
        .scale = (float)scale,
        .form = (kl_form)form,
        .select = select,
        .select_width = W,
        .select_from = from,
    };
    if (kl_py_begin(&c, ctx))
        c.status = kl_latent_attention(c.ctx, o, q, latent_cache, shared_cache, &w_uk, &w_uv, &a);
    return kl_py_end(&c);
}

/* [N+1]: where each sequence's whole pools begin, in positions. */
static const int64_t *pools_of(kl_py_call *c, const int64_t *positions, int64_t N, int64_t pool)
{
    int64_t *begin = (int64_t *)(void *)kl_py_pointers(c, N + 1, NULL, 0);
    if (!c->failed && pool < 1)
        kl_py_refuse(c, PyExc_ValueError, "pool is %lld; it must be >= 1", (long long)pool);
    for (int64_t n = 0; !c->failed && n < N; n++) {
        if (positions[n] < 0 || positions[n] > KL_MAX_TOKENS)
            kl_py_refuse(c, PyExc_ValueError, "positions[%lld] is %lld; it must be 0 to 2^40",
                         (long long)n, (long long)positions[n]);
        else
            begin[n + 1] = begin[n] + positions[n] / pool * pool;
    }
    return begin;
}

/* k and gate [T, D] are appended to rows, k | gate, behind the first start[n] positions of each sequence; then the pools
 * that they complete are computed. */
static PyObject *py_index_pool(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *opooled, *orows, *ok, *ogate, *oape, *ooffsets, *ostart, *obegin;
    int pooled_type, rows_type;
    long long N, T, S, D, P;
    if (!PyArg_ParseTuple(args, "OOiOiOOOOOO(LLLLL):index_pool", &ctx, &opooled, &pooled_type,
                          &orows, &rows_type, &ok, &ogate, &oape, &ooffsets, &ostart, &obegin, &N,
                          &T, &S, &D, &P))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t n_k = kl_py_size(&c, "k", T, D, 1, 1), n_ape = kl_py_size(&c, "ape", P, D, 1, 1),
                  n_rows = kl_py_size(&c, "rows", S, 2, D, 1);
    const int64_t *offsets = ranges_of(&c, ooffsets, N, T, "offsets");
    const int64_t *start = kl_py_in(&c, ostart, KL_PY_I64, N, "start");
    const int64_t *begin = ranges_of(&c, obegin, N, S, "kv_offsets");
    for (int64_t n = 0; !c.failed && n < N; n++)
        if (start[n] < 0 || start[n] > begin[n + 1] - begin[n] - (offsets[n + 1] - offsets[n]))
            kl_py_refuse(&c, PyExc_ValueError, "start[%lld] is %lld; the rows do not fit behind it",
                         (long long)n, (long long)start[n]);
    const int64_t *pools = pools_of(&c, lengths_of(&c, begin, N), N, P);
    const int64_t n_pooled = c.failed ? 0 : kl_py_size(&c, "pooled", pools[N] / P, D, 1, 1);
    void *pooled = cache_buffer(&c, opooled, pooled_type, n_pooled, "pooled", true),
         *rows = cache_buffer(&c, orows, rows_type, n_rows, "rows", true);
    const float *k = kl_py_in(&c, ok, KL_PY_F32, n_k, "k"),
                *gate = kl_py_in(&c, ogate, KL_PY_F32, n_k, "gate"),
                *ape = kl_py_in(&c, oape, KL_PY_F32, n_ape, "ape");
    const kl_cache to = cache_of(&c, pooled, pooled_type, c.failed ? 0 : D / P, pools, N),
                   keys = cache_of(&c, rows, rows_type, c.failed ? 0 : 2 * D, begin, N);
    kl_cache gates = keys;
    gates.offset = kl_type_bytes((kl_type)rows_type, D);
    if (kl_py_begin(&c, ctx)) {
        c.status = kl_cache_append(c.ctx, keys, k, offsets, start, N, T, D);
        if (c.status == KL_OK)
            c.status = kl_cache_append(c.ctx, gates, gate, offsets, start, N, T, D);
        if (c.status == KL_OK)
            c.status = kl_index_pool(c.ctx, to, keys, gates, ape, offsets, start, N, T, D, P);
    }
    return kl_py_end(&c);
}

/* index_scores and index_select: what both are called with, but for the result. */
typedef struct indexed {
    PyObject *ctx, *out, *q, *keys, *weights, *offsets, *positions;
    int keys_type;
    long long N, T, H, D, pool;
    kl_cache cache;
    const float *query, *weight;
    kl_index_args args;
} indexed;

static void borrow_indexed(kl_py_call *c, indexed *x)
{
    const int64_t n_q = kl_py_size(c, "q", x->T, x->H, x->D, 1),
                  n_weights = kl_py_size(c, "weights", x->T, x->H, 1, 1);
    const int64_t *offsets = ranges_of(c, x->offsets, x->N, x->T, "offsets");
    const int64_t *positions = kl_py_in(c, x->positions, KL_PY_I64, x->N, "positions");
    const int64_t *pools = pools_of(c, positions, x->N, x->pool);
    const int64_t n_keys = c->failed ? 0 : kl_py_size(c, "keys", pools[x->N] / x->pool, x->D, 1, 1);
    void *keys = cache_buffer(c, x->keys, x->keys_type, n_keys, "keys", false);
    x->query = kl_py_in(c, x->q, KL_PY_F32, n_q, "q");
    x->weight = kl_py_in(c, x->weights, KL_PY_F32, n_weights, "weights");
    x->cache = cache_of(c, keys, x->keys_type, c->failed ? 0 : x->D / x->pool, pools, x->N);
    x->args = (kl_index_args){ offsets, positions, x->N, x->T, x->H, x->D, x->pool, 0, 0.0f };
}

static PyObject *py_index_scores(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    indexed x = { 0 };
    double scale;
    if (!PyArg_ParseTuple(args, "OOOOiOOO(LLLLL)d:index_scores", &x.ctx, &x.out, &x.q, &x.keys,
                          &x.keys_type, &x.weights, &x.offsets, &x.positions, &x.N, &x.T, &x.H,
                          &x.D, &x.pool, &scale))
        return NULL;
    kl_py_on(&c, x.ctx);
    borrow_indexed(&c, &x);
    int64_t most = 0;
    for (int64_t n = 0; !c.failed && n < x.N; n++)
        most = kl_max(most, x.args.positions[n] / x.pool);
    const int64_t n_scores = kl_py_size(&c, "out", x.T, most, 1, 1);
    float *scores = kl_py_out(&c, x.out, KL_PY_F32, n_scores, "out");
    x.args.scale = (float)scale;
    if (kl_py_begin(&c, x.ctx))
        c.status = kl_index_scores(c.ctx, scores, x.query, x.cache, x.weight, &x.args);
    return kl_py_end(&c);
}

static PyObject *py_index_select(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    indexed x = { 0 };
    long long topk;
    if (!PyArg_ParseTuple(args, "OOOOiOOO(LLLLL)L:index_select", &x.ctx, &x.out, &x.q, &x.keys,
                          &x.keys_type, &x.weights, &x.offsets, &x.positions, &x.N, &x.T, &x.H,
                          &x.D, &x.pool, &topk))
        return NULL;
    kl_py_on(&c, x.ctx);
    borrow_indexed(&c, &x);
    const bool good = !c.failed && topk >= 0 && topk <= INT32_MAX && x.pool <= INT32_MAX;
    const int64_t n_ids = kl_py_size(&c, "out", x.T, good ? topk + x.pool - 1 : -1, 1, 1);
    int32_t *ids = kl_py_out(&c, x.out, KL_PY_I32, n_ids, "out");
    x.args.topk = topk;
    if (kl_py_begin(&c, x.ctx))
        c.status = kl_index_select(c.ctx, ids, x.query, x.cache, x.weight, &x.args);
    return kl_py_end(&c);
}

static PyObject *py_rope(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oy, *ox, *opositions;
    long long T, H, K, rotary;
    double base;
    if (!PyArg_ParseTuple(args, "OOOOLLLLd:rope", &ctx, &oy, &ox, &opositions, &T, &H, &K, &rotary,
                          &base))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t n = kl_py_size(&c, "x", T, H, K, 1);
    float *y = kl_py_out(&c, oy, KL_PY_F32, n, "out");
    const float *x = kl_py_in(&c, ox, KL_PY_F32, n, "x");
    const int64_t *positions = kl_py_in(&c, opositions, KL_PY_I64, T, "positions");
    if (kl_py_begin(&c, ctx))
        c.status = kl_rope(c.ctx, y, x, positions, T, H, K, rotary, base);
    return kl_py_end(&c);
}

static PyObject *py_attention(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oo, *oq, *ok, *ov, *ooffsets, *obegin;
    int k_type, v_type;
    long long N, T, S, H, Hkv, K, V;
    double scale;
    if (!PyArg_ParseTuple(args, "OOOOiOiOO(LLLLLLL)d:attention", &ctx, &oo, &oq, &ok, &k_type, &ov,
                          &v_type, &ooffsets, &obegin, &N, &T, &S, &H, &Hkv, &K, &V, &scale))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t n_o = kl_py_size(&c, "out", T, H, V, 1), n_q = kl_py_size(&c, "q", T, H, K, 1);
    const int64_t n_k = kl_py_size(&c, "k", S, Hkv, K, 1), n_v = kl_py_size(&c, "v", S, Hkv, V, 1);
    const int64_t k_row = kl_py_size(&c, "k", Hkv, K, 1, 1),
                  v_row = kl_py_size(&c, "v", Hkv, V, 1, 1);
    float *o = kl_py_out(&c, oo, KL_PY_F32, n_o, "out");
    const float *q = kl_py_in(&c, oq, KL_PY_F32, n_q, "q");
    void *k = cache_buffer(&c, ok, k_type, n_k, "k", false),
         *v = cache_buffer(&c, ov, v_type, n_v, "v", false);
    const int64_t *offsets = ranges_of(&c, ooffsets, N, T, "offsets");
    const int64_t *begin = ranges_of(&c, obegin, N, S, "kv_offsets");
    const kl_cache keys = cache_of(&c, k, k_type, k_row, begin, N),
                   values = cache_of(&c, v, v_type, v_row, begin, N);
    const int64_t *positions = lengths_of(&c, begin, N);
    const kl_attention_args a = { offsets, positions, N, T, H, Hkv, K, V, (float)scale };
    if (kl_py_begin(&c, ctx))
        c.status = kl_attention(c.ctx, o, q, keys, values, &a);
    return kl_py_end(&c);
}

/* Every argument of a row comes from an array [T]; 64-bit words as int64 bit patterns. */
static PyObject *py_sample(PyObject *module, PyObject *args)
{
    (void)module;
    kl_py_call c = { 0 };
    PyObject *ctx, *oids, *ologits, *otemperature, *otop_k, *otop_p, *omin_p, *oseed, *osequence,
        *oposition;
    long long T, D;
    if (!PyArg_ParseTuple(args, "OOOOOOOOOOLL:sample", &ctx, &oids, &ologits, &otemperature,
                          &otop_k, &otop_p, &omin_p, &oseed, &osequence, &oposition, &T, &D))
        return NULL;
    kl_py_on(&c, ctx);
    const int64_t n = kl_py_size(&c, "logits", T, D, 1, 1),
                  rows = kl_py_size(&c, "ids", T, sizeof(kl_sample_args), 1, 1);
    int32_t *ids = kl_py_host_out(&c, oids, KL_PY_I32, T, "out");
    const float *logits = kl_py_in(&c, ologits, KL_PY_F32, n, "logits");
    const float *temperature = kl_py_host_in(&c, otemperature, KL_PY_F32, T, "temperature");
    const int64_t *top_k = kl_py_in(&c, otop_k, KL_PY_I64, T, "top_k");
    const float *top_p = kl_py_host_in(&c, otop_p, KL_PY_F32, T, "top_p"),
                *min_p = kl_py_host_in(&c, omin_p, KL_PY_F32, T, "min_p");
    const int64_t *seed = kl_py_in(&c, oseed, KL_PY_I64, T, "seed");
    const int64_t *sequence = kl_py_in(&c, osequence, KL_PY_I64, T, "sequence");
    const int64_t *position = kl_py_in(&c, oposition, KL_PY_I64, T, "position");
    kl_sample_args *a =
        (kl_sample_args *)(void *)kl_py_pointers(&c, rows / (int64_t)sizeof(void *) + 1, NULL, 0);
    for (int64_t t = 0; !c.failed && t < T; t++)
        a[t] = (kl_sample_args){ temperature[t],
                                 top_k[t],
                                 top_p[t],
                                 min_p[t],
                                 (uint64_t)seed[t],
                                 (uint64_t)sequence[t],
                                 (uint64_t)position[t] };
    if (kl_py_begin(&c, ctx))
        c.status = kl_sample(c.ctx, ids, logits, a, T, D);
    return kl_py_end(&c);
}

PyMethodDef kl_py_ops_mla[] = {
    { "cache_append", py_cache_append, METH_VARARGS, NULL },
    { "latent_attention", py_latent_attention, METH_VARARGS, NULL },
    { "index_pool", py_index_pool, METH_VARARGS, NULL },
    { "index_scores", py_index_scores, METH_VARARGS, NULL },
    { "index_select", py_index_select, METH_VARARGS, NULL },
    { "rope", py_rope, METH_VARARGS, NULL },
    { "attention", py_attention, METH_VARARGS, NULL },
    { "sample", py_sample, METH_VARARGS, NULL },
    { NULL, NULL, 0, NULL },
};
