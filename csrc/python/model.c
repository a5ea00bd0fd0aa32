/* _core.Model: made of a config and tensors, it holds the buffers that its weights lie in. */
#include "model.h"

#include <stdlib.h>

/* ---- config: a dict of numbers, and the layers as a list of (mixer, ffn) ---- */

static bool number(PyObject *dict, const char *key, double *as_double, int64_t *as_int)
{
    PyObject *value = PyDict_GetItemString(dict, key); /* borrowed */
    if (value == NULL) {
        PyErr_Format(PyExc_ValueError, "config: %s is missing", key);
        return false;
    }
    if (as_double != NULL)
        *as_double = PyFloat_AsDouble(value);
    else
        *as_int = PyLong_AsLongLong(value);
    return !PyErr_Occurred();
}

static const char *const layers_problem = "config: layers must be a list of (mixer, ffn)";

static bool parse_pairs(PyObject *pairs, py_model *self)
{
    const Py_ssize_t n = PyTuple_Size(pairs);
    if (n < 1) {
        PyErr_SetString(PyExc_TypeError, layers_problem);
        return false;
    }
    self->layers = calloc((size_t)n + 1, sizeof *self->layers);
    if (self->layers == NULL) {
        PyErr_NoMemory();
        return false;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        int mixer, ffn;
        PyObject *pair = PyTuple_GetItem(pairs, i);
        if (!PyTuple_Check(pair) || !PyArg_ParseTuple(pair, "ii", &mixer, &ffn)
            || mixer < KL_MIXER_KDA || mixer > KL_MIXER_ATTN
            || (ffn != KL_FFN_DENSE && ffn != KL_FFN_MOE)) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_TypeError, layers_problem);
            return false;
        }
        self->layers[i] = (kl_layer){ (kl_mixer)mixer, (kl_ffn)ffn };
    }
    self->config.layers = self->layers;
    self->config.n_layers = n;
    return true;
}

static bool parse_layers(PyObject *list, py_model *self)
{
    PyObject *pairs = kl_py_items(list, layers_problem);
    const bool ok = pairs != NULL && parse_pairs(pairs, self);
    Py_XDECREF(pairs);
    return ok;
}

static bool parse_config(PyObject *dict, py_model *self)
{
    kl_config *c = &self->config;
    int64_t router = 0, renormalise = 0, tied = 0, activations = 0, tiled = 0, shared_gated = 0,
            norm_plus_one = 0, full_rank_gate = 0, mla_gated = 0, latent_norm = 0;
    double rms_eps = 0, latent_eps = 0, l2_eps = 0, lower_bound = 0, scale = 0, situ_beta = 0,
           situ_linear_beta = 0, limit = 0, stream_eps = 0, index_eps = 0;
    const struct {
        const char *key;
        int64_t *to;
    } ints[] = {
        { "vocab_size", &c->vocab },
        { "hidden_size", &c->D },
        { "tied", &tied },
        { "activations", &activations },
        { "delta_k_heads", &c->delta.Hk },
        { "delta_v_heads", &c->delta.Hv },
        { "delta_k_dim", &c->delta.K },
        { "delta_v_dim", &c->delta.V },
        { "delta_tiled", &tiled },
        { "conv_width", &c->delta.taps },
        { "mla_heads", &c->mla.heads },
        { "nope_dim", &c->mla.nope },
        { "rope_dim", &c->mla.rope },
        { "v_head_dim", &c->mla.v },
        { "kv_rank", &c->mla.rank },
        { "q_rank", &c->mla.q_rank },
        { "attn_heads", &c->attn.heads },
        { "attn_kv_heads", &c->attn.kv_heads },
        { "attn_head_dim", &c->attn.width },
        { "rotary_dim", &c->attn.rotary },
        { "ffn_size", &c->ffn.dense },
        { "n_experts", &c->ffn.experts },
        { "experts_per_token", &c->ffn.k },
        { "moe_size", &c->ffn.width },
        { "expert_latent", &c->ffn.latent },
        { "expert_latent_norm", &latent_norm },
        { "attn_res_block", &c->attn_res_block },
        { "streams", &c->hc.streams },
        { "stream_passes", &c->hc.passes },
        { "index_heads", &c->index.heads },
        { "index_dim", &c->index.width },
        { "index_topk", &c->index.topk },
        { "index_pool", &c->index.pool },
        { "kda_full_rank_gate", &full_rank_gate },
        { "mla_gated", &mla_gated },
        { "shared_size", &c->ffn.shared },
        { "shared_gated", &shared_gated },
        { "norm_plus_one", &norm_plus_one },
        { "n_groups", &c->ffn.groups },
        { "top_groups", &c->ffn.top_groups },
        { "router", &router },
        { "renormalise", &renormalise },
    };
    const struct {
        const char *key;
        double *to;
    } doubles[] = { { "rms_norm_eps", &rms_eps },
                    { "latent_eps", &latent_eps },
                    { "l2_eps", &l2_eps },
                    { "gate_lower_bound", &lower_bound },
                    { "rope_base", &c->attn.rope_base },
                    { "stream_eps", &stream_eps },
                    { "index_eps", &index_eps },
                    { "swiglu_limit", &limit },
                    { "situ_beta", &situ_beta },
                    { "situ_linear_beta", &situ_linear_beta },
                    { "routed_scale", &scale } };
    if (!PyDict_Check(dict)) {
        PyErr_SetString(PyExc_TypeError, "config must be a dict");
        return false;
    }
    for (size_t i = 0; i < sizeof ints / sizeof ints[0]; i++)
        if (!number(dict, ints[i].key, NULL, ints[i].to))
            return false;
    for (size_t i = 0; i < sizeof doubles / sizeof doubles[0]; i++)
        if (!number(dict, doubles[i].key, doubles[i].to, NULL))
            return false;
    c->rms_eps = (float)rms_eps;
    c->latent_eps = (float)latent_eps;
    c->l2_eps = (float)l2_eps;
    c->hc.eps = (float)stream_eps;
    c->index.eps = (float)index_eps;
    c->ffn.limit = (float)limit;
    c->delta.lower_bound = (float)lower_bound;
    c->delta.head_map = tiled ? KL_HEADS_TILED : KL_HEADS_GROUPED;
    c->delta.full_rank_gate = full_rank_gate != 0;
    c->mla.gated = mla_gated != 0;
    c->ffn.latent_norm = latent_norm != 0;
    c->ffn.situ = (kl_situ_betas){ (float)situ_beta, (float)situ_linear_beta };
    c->norm_plus_one = norm_plus_one != 0;
    c->ffn.shared_gated = shared_gated != 0;
    c->ffn.scale = (float)scale;
    c->ffn.router = router ? KL_ROUTER_SOFTMAX : KL_ROUTER_SIGMOID;
    c->ffn.renormalise = renormalise != 0;
    c->tied = tied != 0;
    c->activations = (kl_activations)activations;
    PyObject *layers = PyDict_GetItemString(dict, "layers");
    if (layers == NULL) {
        PyErr_SetString(PyExc_ValueError, "config: layers is missing");
        return false;
    }
    return parse_layers(layers, self);
}

/* ---- tensors: (name, index of the buffer or -1, first byte, type, shape) ---- */

static bool hold_buffers(PyObject *list, py_model *self)
{
    PyObject *items = kl_py_items(list, "buffers must be a list");
    if (items == NULL)
        return false;
    const Py_ssize_t n = PyTuple_Size(items);
    bool ok = true;
    self->buffers = calloc((size_t)n + 1, sizeof *self->buffers);
    if (self->buffers == NULL)
        ok = PyErr_NoMemory() != NULL;
    while (ok && self->n_buffers < n) {
        Py_buffer *to = &self->buffers[self->n_buffers];
        ok = PyObject_GetBuffer(PyTuple_GetItem(items, self->n_buffers), to, PyBUF_SIMPLE) == 0;
        self->n_buffers += ok;
    }
    Py_DECREF(items);
    return ok;
}

static bool parse_tensor(PyObject *item, const py_model *self, kl_tensor *t)
{
    PyObject *name, *shape;
    long long buffer, first;
    int type;
    if (!PyTuple_Check(item)) {
        PyErr_SetString(PyExc_TypeError,
                        "tensors must be tuples (name, buffer, byte, type, shape)");
        return false;
    }
    if (!PyArg_ParseTuple(item, "ULLiO!", &name, &buffer, &first, &type, &PyTuple_Type, &shape))
        return false;
    t->name = PyUnicode_AsUTF8AndSize(name, NULL);
    t->type = (kl_type)type;
    t->n_dims = (int)PyTuple_Size(shape);
    if (t->name == NULL || t->n_dims < 1 || t->n_dims > 4 || kl_type_block(t->type) == 0) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_TypeError,
                         "%U: type %d, %d axes; it must be a known type with 1 to 4 axes", name,
                         type, t->n_dims);
        return false;
    }
    int64_t values = 1;
    for (int i = 0; i < t->n_dims; i++) {
        t->shape[i] = PyLong_AsLongLong(PyTuple_GetItem(shape, i));
        if (PyErr_Occurred() || !kl_mul(&values, values, t->shape[i]) || values > INT64_MAX / 8) {
            PyErr_Format(PyExc_ValueError, "%U: a size is negative or too large", name);
            return false;
        }
    }
    t->data = NULL;
    if (buffer < 0)
        return true;
    const int64_t bytes = (int64_t)kl_type_bytes(t->type, values);
    if (buffer >= self->n_buffers || first < 0 || bytes > self->buffers[buffer].len
        || first > self->buffers[buffer].len - bytes) {
        PyErr_Format(PyExc_ValueError, "%U: its %lld bytes from byte %lld are not in buffer %lld",
                     name, (long long)bytes, first, buffer);
        return false;
    }
    t->data = (const char *)self->buffers[buffer].buf + first;
    if (kl_type_block(t->type) == 1 && (uintptr_t)t->data % kl_type_bytes(t->type, 1) != 0) {
        PyErr_Format(PyExc_ValueError, "%U: byte %lld is not aligned to its type", name, first);
        return false;
    }
    return true;
}

/* function(bytes so far, bytes of all) */
static int call_progress(void *user, int64_t done, int64_t all)
{
    const PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *result =
        PyObject_CallFunction((PyObject *)user, "LL", (long long)done, (long long)all);
    const int ends = result == NULL; /* its exception is the reason to tell */
    Py_XDECREF(result);
    PyGILState_Release(gil);
    return ends;
}

static bool create(py_model *self, PyObject *list, int planning, PyObject *progress)
{
    PyObject *items = kl_py_items(list, "tensors must be a list");
    if (items == NULL)
        return false;
    const Py_ssize_t n = PyTuple_Size(items);
    kl_tensor *tensors = calloc((size_t)n + 1, sizeof *tensors);
    kl_py_call c = { 0 };
    bool ok = tensors != NULL || PyErr_NoMemory() != NULL;
    for (Py_ssize_t i = 0; ok && i < n; i++)
        ok = parse_tensor(PyTuple_GetItem(items, i), self, &tensors[i]);
    if (ok && kl_py_begin(&c, (PyObject *)self->context)) {
        kl_ctx_set_progress(c.ctx, progress != Py_None ? call_progress : NULL, progress);
        c.status = kl_model_create(c.ctx, &self->model, &self->config, tensors, n, planning);
        kl_ctx_set_progress(c.ctx, NULL, NULL);
    }
    ok = kl_py_done(&c) && ok;
    free(tensors);
    Py_DECREF(items); /* the names lie in them */
    return ok;
}

static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    (void)kwargs;
    PyObject *context, *config, *buffers, *tensors, *progress = Py_None;
    int planning = 0;
    if (!PyArg_ParseTuple(args, "OOOO|iO:Model", &context, &config, &buffers, &tensors, &planning,
                          &progress))
        return NULL;
    if (kl_py_context_of(context) == NULL)
        return NULL;
    py_model *self = kl_py_new(type);
    if (self == NULL)
        return NULL;
    self->context = (kl_py_context *)Py_NewRef(context);
    const kl_fp saved = kl_fp_default(); /* numbers of Python become float32 */
    const bool parsed = parse_config(config, self);
    kl_fp_restore(saved);
    if (!parsed || !hold_buffers(buffers, self) || !create(self, tensors, planning, progress)) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void model_dealloc(PyObject *o)
{
    py_model *self = (py_model *)o;
    if (self->context != NULL) {
        PyThreadState *thread = PyEval_SaveThread(); /* a device is waited for */
        kl_model_destroy(self->context->ctx, self->model);
        PyEval_RestoreThread(thread);
    }
    for (Py_ssize_t i = 0; i < self->n_buffers; i++)
        PyBuffer_Release(&self->buffers[i]);
    free(self->buffers);
    free(self->layers);
    Py_XDECREF((PyObject *)self->context);
    kl_py_free(o);
}

py_model *kl_py_model_of(PyObject *o)
{
    if (PyType_GetSlot(Py_TYPE(o), Py_tp_dealloc) == (void *)model_dealloc)
        return (py_model *)o;
    PyErr_Format(PyExc_TypeError, "model must be a _core.Model, not %R", (PyObject *)Py_TYPE(o));
    return NULL;
}

/* ---- methods of a model ---- */

/* [(layer or -1, tap id, name, shape without T, is int32)] in the order of the dataflow */
static PyObject *model_taps(PyObject *o, PyObject *args)
{
    (void)args;
    const kl_config *c = &((py_model *)o)->config;
    PyObject *list = PyList_New(0);
    for (int64_t layer = -1; list != NULL && layer < c->n_layers; layer++)
        for (int tap = 0; list != NULL && tap < KL_TAP_COUNT; tap++) {
            const char *name;
            int64_t shape[2];
            int n_dims, is_int32;
            if (!kl_tap_shape(c, (kl_tap)tap, layer, &name, shape, &n_dims, &is_int32))
                continue;
            PyObject *dims = n_dims == 2
                                 ? Py_BuildValue("(LL)", (long long)shape[0], (long long)shape[1])
                                 : Py_BuildValue("(L)", (long long)shape[0]);
            kl_py_append(&list, dims == NULL ? NULL
                                             : Py_BuildValue("(LisNi)", (long long)layer, tap, name,
                                                             dims, is_int32));
        }
    return list;
}

static PyObject *model_plan(PyObject *o, PyObject *args)
{
    py_model *self = (py_model *)o;
    kl_py_call c = { 0 };
    PyObject *context;
    int cache;
    long long length, sequences, pass_tokens;
    kl_plan plan = { 0 };
    if (!PyArg_ParseTuple(args, "OiLLL:plan", &context, &cache, &length, &sequences, &pass_tokens))
        return NULL;
    if (kl_py_begin(&c, context))
        c.status =
            kl_plan_make(c.ctx, &plan, self->model, (kl_type)cache, length, sequences, pass_tokens);
    if (!kl_py_done(&c))
        return NULL;
    return Py_BuildValue(
        "{sKsKsKsKsKsK}", "weights", (unsigned long long)plan.weights, "vectors",
        (unsigned long long)plan.vectors, "state_fixed", (unsigned long long)plan.state_fixed,
        "state_page", (unsigned long long)plan.state_page, "state", (unsigned long long)plan.state,
        "scratch", (unsigned long long)plan.scratch);
}

/* ---- type ---- */

static PyMethodDef model_methods[] = {
    { "taps", model_taps, METH_NOARGS, NULL },
    { "plan", model_plan, METH_VARARGS, NULL },
    { "forward", kl_py_forward, METH_VARARGS, NULL },
    { NULL, NULL, 0, NULL },
};
static PyType_Slot model_slots[] = {
    { Py_tp_new, model_new },
    { Py_tp_dealloc, model_dealloc },
    { Py_tp_methods, model_methods },
    { 0, NULL },
};
PyType_Spec kl_py_model_spec = {
    .name = "kimi_linear._core.Model",
    .basicsize = sizeof(py_model),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = model_slots,
};
