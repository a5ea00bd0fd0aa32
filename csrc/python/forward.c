/* _core.Model.forward: a call borrows lists of states, of taps and of expert ids, and calls the function of an edit back. */
#include "model.h"

#include <stdlib.h>
#include <string.h>

/* The arrays of a list, held until the call has ended: nobody can resize one meanwhile. */
typedef struct views {
    Py_buffer *of;
    Py_ssize_t n;
} views;

/* What a forward call borrows besides its buffers, and the objects that it borrows from. */
typedef struct tables {
    kl_state **states;
    void **taps;
    const int32_t **experts;
    PyObject *state_items;
    views tap_views, expert_views;
} tables;

static void release_views(views *v)
{
    for (Py_ssize_t i = 0; i < v->n; i++)
        PyBuffer_Release(&v->of[i]);
    free(v->of);
}

static void free_tables(tables *t)
{
    free(t->states);
    free(t->taps);
    free((void *)t->experts);
    release_views(&t->tap_views);
    release_views(&t->expert_views);
    Py_XDECREF(t->state_items);
}

static bool parse_states(kl_py_call *c, tables *t, PyObject *list, int64_t *N)
{
    c->failed = true;
    t->state_items = kl_py_items(list, "states must be a list");
    if (t->state_items == NULL)
        return false;
    *N = PyTuple_Size(t->state_items);
    t->states = calloc((size_t)*N + 1, sizeof *t->states);
    if (t->states == NULL)
        return PyErr_NoMemory() != NULL;
    for (int64_t n = 0; n < *N; n++) {
        t->states[n] = kl_py_state_of(PyTuple_GetItem(t->state_items, n));
        if (t->states[n] == NULL)
            return false;
    }
    c->failed = false;
    return true;
}

static const char *const arrays_problem =
    "taps and expert_ids must be lists of (layer, tap, array)";

/* (layer, tap, array): a host array of T rows of a tap, held in v and entered into the table. */
static bool parse_array(PyObject *item, const kl_config *config, int64_t T, tables *t, views *v)
{
    const bool taps = v == &t->tap_views;
    long long layer;
    int tap, n_dims, is_int32;
    const char *name;
    int64_t shape[2];
    PyObject *array;
    if (!PyTuple_Check(item)) {
        PyErr_SetString(PyExc_TypeError, arrays_problem);
        return false;
    }
    if (!PyArg_ParseTuple(item, "LiO", &layer, &tap, &array))
        return false;
    if (!kl_tap_shape(config, (kl_tap)tap, layer, &name, shape, &n_dims, &is_int32)
        || (!taps && tap != KL_TAP_MOE_IDS)) {
        PyErr_Format(PyExc_ValueError, "layer %lld has no tap %d", layer, tap);
        return false;
    }
    Py_buffer *view = &v->of[v->n];
    if (PyObject_GetBuffer(array, view, PyBUF_C_CONTIGUOUS | (taps ? PyBUF_WRITABLE : 0)) < 0)
        return false;
    v->n++;
    const int64_t values = T * shape[0] * (n_dims == 2 ? shape[1] : 1);
    if (view->len != values * 4) {
        PyErr_Format(PyExc_ValueError,
                     "%s of layer %lld: the array has %lld bytes; it must have %lld", name, layer,
                     (long long)view->len, (long long)values * 4);
        return false;
    }
    if (taps)
        t->taps[(layer < 0 ? config->n_layers : layer) * KL_TAP_COUNT + tap] = view->buf;
    else
        t->experts[layer] = view->buf;
    return true;
}

/* [(layer, tap, array)]: one host array for each tap that is wanted, or for the expert ids of each layer. */
static bool parse_arrays(kl_py_call *c, PyObject *list, const kl_config *config, int64_t T,
                         tables *t, bool taps)
{
    const int64_t rows = config->n_layers + 1;
    views *v = taps ? &t->tap_views : &t->expert_views;
    c->failed = true;
    PyObject *items = kl_py_items(list, arrays_problem);
    if (items == NULL)
        return false;
    const Py_ssize_t n = PyTuple_Size(items);
    v->of = calloc((size_t)n + 1, sizeof *v->of);
    if (taps)
        t->taps = calloc((size_t)(rows * KL_TAP_COUNT), sizeof *t->taps);
    else
        t->experts = calloc((size_t)rows, sizeof *t->experts);
    bool ok = v->of != NULL && (taps ? (void *)t->taps : (void *)t->experts) != NULL;
    if (!ok)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; ok && i < n; i++)
        ok = parse_array(PyTuple_GetItem(items, i), config, T, t, v);
    Py_DECREF(items);
    c->failed = !ok;
    return ok;
}

/* What the callback of an edit needs, and the table of taps it is called for. */
typedef struct edits {
    PyObject *function;
    unsigned char *table;
} edits;

/* function(layer, tap, row of the call, rows, bytearray of the rows), whose bytes are copied back: it may be kept */
static kl_status call_edit(void *user, kl_ctx *ctx, kl_tap tap, int64_t layer, int64_t call_row,
                           int64_t rows, int64_t width, void *values)
{
    const edits *e = user;
    const PyGILState_STATE gil = PyGILState_Ensure();
    const Py_ssize_t n = (Py_ssize_t)(rows * width * 4);
    PyObject *bytes = PyByteArray_FromStringAndSize(values, n);
    PyObject *result = bytes == NULL
                           ? NULL
                           : PyObject_CallFunction(e->function, "LiLLO", (long long)layer, (int)tap,
                                                   (long long)call_row, (long long)rows, bytes);
    bool ok = result != NULL;
    if (ok && PyByteArray_Size(bytes) != n) {
        PyErr_Format(PyExc_ValueError, "edit: the function left %zd of %zd bytes",
                     PyByteArray_Size(bytes), n);
        ok = false;
    }
    if (ok)
        memcpy(values, PyByteArray_AsString(bytes), (size_t)n);
    Py_XDECREF(result);
    Py_XDECREF(bytes);
    PyGILState_Release(gil);
    return ok ? KL_OK : kl_fail(ctx, KL_ERR_ARG, "edit: the function raised an exception");
}

/* [(layer, tap)]: where the function is called */
static bool parse_edits(kl_py_call *c, PyObject *list, PyObject *function, const kl_config *config,
                        edits *e)
{
    static const char *const problem =
        "edits must be a list of (layer, tap), edit a function of five arguments";
    PyObject *pairs = kl_py_items(list, problem);
    const Py_ssize_t n = pairs != NULL ? PyTuple_Size(pairs) : 0;
    e->function = function;
    e->table = calloc((size_t)(config->n_layers + 1) * KL_TAP_COUNT, 1);
    bool ok = pairs != NULL && e->table != NULL && PyCallable_Check(function);
    if (!ok && pairs != NULL)
        PyErr_SetString(PyExc_TypeError, problem);
    for (Py_ssize_t i = 0; ok && i < n; i++) {
        PyObject *pair = PyTuple_GetItem(pairs, i);
        long long layer = -1;
        int tap, n_dims, is_int32;
        const char *name;
        int64_t shape[2];
        ok = PyTuple_Check(pair) && PyArg_ParseTuple(pair, "Li", &layer, &tap)
             && kl_tap_shape(config, (kl_tap)tap, layer, &name, shape, &n_dims, &is_int32);
        if (ok)
            e->table[(layer < 0 ? config->n_layers : layer) * KL_TAP_COUNT + tap] = 1;
        else if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "edits[%zd] is no (layer, tap) of this model", i);
    }
    Py_XDECREF(pairs);
    c->failed = !ok;
    return ok;
}

PyObject *kl_py_forward(PyObject *o, PyObject *args)
{
    py_model *self = (py_model *)o;
    kl_py_call c = { 0 };
    tables t = { 0 };
    PyObject *context, *states, *ids, *offsets, *logits, *rows, *taps, *experts, *done;
    PyObject *edited = Py_None, *edit = Py_None, *embeds = Py_None;
    long long start = 0, stop = 0;
    edits e = { 0 };
    long long T, n_logits, pass_tokens;
    int check;
    kl_forward_args a = { 0 };
    if (!PyArg_ParseTuple(args, "OOOOLOOLOOiLO|OOOLL:forward", &context, &states, &ids, &offsets,
                          &T, &logits, &rows, &n_logits, &taps, &experts, &check, &pass_tokens,
                          &done, &edited, &edit, &embeds, &start, &stop))
        return NULL;
    if (parse_states(&c, &t, states, &a.N)) {
        a.ids = kl_py_in(&c, ids, KL_PY_I32, T, "ids");
        a.offsets = kl_py_in(&c, offsets, KL_PY_I64, a.N + 1, "offsets");
        a.logits =
            kl_py_out_opt(&c, logits, KL_PY_F32,
                          kl_py_size(&c, "logits", n_logits, self->config.vocab, 1, 1), "logits");
        a.logit_rows = kl_py_in_opt(&c, rows, KL_PY_I64, n_logits, "logit_rows");
        a.done = kl_py_out_opt(&c, done, KL_PY_I64, a.N, "done");
        a.embeds = kl_py_in_opt(
            &c, embeds, KL_PY_F32,
            kl_py_size(&c, "embeds", kl_stream_parts(&self->config, start), T, self->config.D, 1),
            "embeds");
    }
    if (!c.failed && n_logits > 0 && (a.logits == NULL || a.logit_rows == NULL))
        kl_py_refuse(&c, PyExc_ValueError,
                     "logits and logit_rows must be arrays when n_logits > 0");
    if (!c.failed && a.offsets[a.N] != T)
        kl_py_refuse(&c, PyExc_ValueError, "offsets end at %lld; they must end at T = %lld",
                     (long long)a.offsets[a.N], T);
    if (!c.failed && taps != Py_None)
        (void)parse_arrays(&c, taps, &self->config, T, &t, true);
    if (!c.failed && experts != Py_None)
        (void)parse_arrays(&c, experts, &self->config, T, &t, false);
    if (!c.failed && edited != Py_None && parse_edits(&c, edited, edit, &self->config, &e)) {
        a.edit = call_edit;
        a.edit_user = &e;
        a.edited = e.table;
    }
    a.start = start;
    a.stop = stop;
    a.states = t.states;
    a.taps = t.taps;
    a.expert_ids = t.experts;
    a.n_logits = n_logits;
    a.check_finite = check;
    a.pass_tokens = pass_tokens;
    if (kl_py_begin(&c, context))
        c.status = kl_forward(c.ctx, self->model, &a);
    PyObject *result = kl_py_end(&c);
    free_tables(&t);
    free(e.table);
    return result;
}
