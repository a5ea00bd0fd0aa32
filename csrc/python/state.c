/* _core.State: a sequence's state, which holds its model. */
#include "model.h"

#include "../model/model.h"

#include <stdlib.h>

typedef struct py_state {
    PyObject_HEAD kl_state *state;
    py_model *model;
} py_state;

static PyObject *state_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    (void)kwargs;
    kl_py_call c = { 0 };
    PyObject *context, *model;
    int cache;
    long long length, every = 0, keep = 0;
    if (!PyArg_ParseTuple(args, "OOiL|LL:State", &context, &model, &cache, &length, &every, &keep))
        return NULL;
    py_model *owner = kl_py_model_of(model);
    if (owner == NULL)
        return NULL;
    py_state *self = kl_py_new(type);
    if (self == NULL)
        return NULL;
    self->model = (py_model *)Py_NewRef(model);
    if (kl_py_begin(&c, context))
        c.status = kl_state_create(c.ctx, &self->state, owner->model, (kl_type)cache, length);
    if (c.thread != NULL && c.status == KL_OK && (every != 0 || keep != 0))
        c.status = kl_state_keep(c.ctx, self->state, every, keep);
    if (!kl_py_done(&c))
        Py_CLEAR(self);
    return (PyObject *)self;
}

static void state_dealloc(PyObject *o)
{
    py_state *self = (py_state *)o;
    if (self->model != NULL) {
        PyThreadState *thread = PyEval_SaveThread(); /* a device is waited for */
        kl_state_destroy(self->model->context->ctx, self->state);
        PyEval_RestoreThread(thread);
    }
    Py_XDECREF((PyObject *)self->model);
    kl_py_free(o);
}

kl_state *kl_py_state_of(PyObject *o)
{
    if (PyType_GetSlot(Py_TYPE(o), Py_tp_dealloc) == (void *)state_dealloc)
        return ((py_state *)o)->state;
    PyErr_Format(PyExc_TypeError, "a state must be a _core.State, not %R", (PyObject *)Py_TYPE(o));
    return NULL;
}

static PyObject *state_position(PyObject *o, void *closure)
{
    (void)closure;
    return PyLong_FromLongLong(kl_state_position(((py_state *)o)->state));
}

static PyObject *state_bytes(PyObject *o, void *closure)
{
    (void)closure;
    return PyLong_FromSize_t(kl_state_bytes(((py_state *)o)->state));
}

static PyObject *state_reset(PyObject *o, PyObject *args)
{
    kl_py_call c = { 0 };
    PyObject *context;
    if (!PyArg_ParseTuple(args, "O:reset", &context))
        return NULL;
    kl_state *state = ((py_state *)o)->state;
    if (kl_py_begin(&c, context)) {
        c.status = kl_state_acquire(c.ctx, state, "reset");
        if (c.status == KL_OK) {
            kl_state_reset(c.ctx, state);
            kl_state_release(state);
        }
    }
    return kl_py_end(&c);
}

static PyObject *state_checkpoint(PyObject *o, PyObject *args)
{
    kl_py_call c = { 0 };
    PyObject *context;
    long long n = 0;
    if (!PyArg_ParseTuple(args, "O|L:checkpoint", &context, &n))
        return NULL;
    kl_state *state = ((py_state *)o)->state;
    if (kl_py_begin(&c, context))
        c.status = PyTuple_Size(args) < 2 ? kl_state_checkpoint(c.ctx, state)
                                          : kl_state_checkpoint_at(c.ctx, state, n);
    return kl_py_end(&c);
}

/* positions, oldest first */
static PyObject *state_checkpoints(PyObject *o, void *closure)
{
    (void)closure;
    const kl_state *state = ((py_state *)o)->state;
    int64_t *at = calloc((size_t)state->keep + 1, sizeof *at);
    const int64_t n = at != NULL ? kl_state_checkpoints(state, at) : 0;
    PyObject *list = at != NULL ? PyList_New(0) : PyErr_NoMemory();
    for (int64_t i = 0; list != NULL && i < n; i++)
        kl_py_append(&list, PyLong_FromLongLong(at[i]));
    free(at);
    return list;
}

/* the position it went back to, at or before n */
static PyObject *state_truncate(PyObject *o, PyObject *args)
{
    kl_py_call c = { 0 };
    PyObject *context;
    long long n;
    int64_t position = 0;
    if (!PyArg_ParseTuple(args, "OL:truncate", &context, &n))
        return NULL;
    if (kl_py_begin(&c, context))
        c.status = kl_state_truncate(c.ctx, ((py_state *)o)->state, n, &position);
    return kl_py_done(&c) ? PyLong_FromLongLong(position) : NULL;
}

static PyObject *state_copy_from(PyObject *o, PyObject *args)
{
    kl_py_call c = { 0 };
    PyObject *context, *other;
    if (!PyArg_ParseTuple(args, "OO:copy_from", &context, &other))
        return NULL;
    kl_state *from = kl_py_state_of(other);
    if (from == NULL)
        return NULL;
    if (kl_py_begin(&c, context))
        c.status = kl_state_copy(c.ctx, ((py_state *)o)->state, from);
    return kl_py_end(&c);
}

static PyObject *state_fill(PyObject *o, PyObject *args)
{
    kl_py_call c = { 0 };
    PyObject *context;
    long long n;
    if (!PyArg_ParseTuple(args, "OL:fill", &context, &n))
        return NULL;
    if (kl_py_begin(&c, context))
        c.status = kl_state_fill(c.ctx, ((py_state *)o)->state, n);
    return kl_py_end(&c);
}

/* (shape, type id) of a part */
static PyObject *state_shape(PyObject *o, PyObject *args)
{
    kl_py_call c = { 0 };
    PyObject *context;
    long long layer;
    int part, n_dims = 0;
    int64_t shape[3] = { 0 };
    kl_type type = KL_F32;
    if (!PyArg_ParseTuple(args, "OLi:shape", &context, &layer, &part))
        return NULL;
    if (kl_py_begin(&c, context))
        c.status = kl_state_shape(c.ctx, ((py_state *)o)->state, layer, (kl_state_part)part, shape,
                                  &n_dims, &type);
    if (!kl_py_done(&c))
        return NULL;
    if (n_dims == 3)
        return Py_BuildValue("(LLL)i", (long long)shape[0], (long long)shape[1],
                             (long long)shape[2], (int)type);
    return Py_BuildValue("(LL)i", (long long)shape[0], (long long)shape[1], (int)type);
}

/* read or write a part: array of its exact size in its type (float16 as uint16); of the state, or read from a
 * checkpoint */
static PyObject *move(PyObject *o, PyObject *args, bool out)
{
    kl_py_call c = { 0 };
    PyObject *context, *array;
    long long layer, checkpoint = 0;
    int part, n_dims = 0;
    int64_t shape[3] = { 0 };
    kl_type type = KL_F32;
    kl_state *state = ((py_state *)o)->state;
    Py_buffer view;
    if (!PyArg_ParseTuple(args, out ? "OLiO|L:read" : "OLiO:write", &context, &layer, &part, &array,
                          &checkpoint))
        return NULL;
    if (PyObject_GetBuffer(array, &view, PyBUF_C_CONTIGUOUS | (out ? PyBUF_WRITABLE : 0)) < 0)
        return NULL;
    bool taken = false;
    if (kl_py_begin(&c, context)) {
        c.status = kl_state_acquire(c.ctx, state, out ? "read" : "write");
        taken = c.status == KL_OK;
        if (taken)
            c.status =
                kl_state_shape(c.ctx, state, layer, (kl_state_part)part, shape, &n_dims, &type);
        const size_t bytes = kl_type_bytes(type, shape[0] * shape[1] * shape[2]);
        if (c.status == KL_OK && (size_t)view.len != bytes)
            c.status =
                kl_fail(c.ctx, KL_ERR_SHAPE, "state: the array has %lld bytes; it must have %zu",
                        (long long)view.len, bytes);
        if (c.status == KL_OK && PyTuple_Size(args) == 5)
            c.status = kl_state_read_checkpoint(c.ctx, state, checkpoint, layer,
                                                (kl_state_part)part, view.buf);
        else if (c.status == KL_OK)
            c.status = out ? kl_state_read(c.ctx, state, layer, (kl_state_part)part, view.buf)
                           : kl_state_write(c.ctx, state, layer, (kl_state_part)part, view.buf);
    }
    if (taken)
        kl_state_release(state);
    PyObject *result = kl_py_end(&c);
    PyBuffer_Release(&view);
    return result;
}

static PyObject *state_read(PyObject *o, PyObject *args) { return move(o, args, true); }
static PyObject *state_write(PyObject *o, PyObject *args) { return move(o, args, false); }

static PyGetSetDef state_getset[] = {
    { "position", state_position, NULL, "tokens read", NULL },
    { "bytes", state_bytes, NULL, "bytes now held", NULL },
    { "checkpoints", state_checkpoints, NULL, "positions of the checkpoints, oldest first", NULL },
    { NULL, NULL, NULL, NULL, NULL },
};
static PyMethodDef state_methods[] = {
    { "reset", state_reset, METH_VARARGS, NULL },
    { "checkpoint", state_checkpoint, METH_VARARGS, NULL },
    { "truncate", state_truncate, METH_VARARGS, NULL },
    { "copy_from", state_copy_from, METH_VARARGS, NULL },
    { "fill", state_fill, METH_VARARGS, NULL },
    { "shape", state_shape, METH_VARARGS, NULL },
    { "read", state_read, METH_VARARGS, NULL },
    { "write", state_write, METH_VARARGS, NULL },
    { NULL, NULL, 0, NULL },
};
static PyType_Slot state_slots[] = {
    { Py_tp_new, state_new },
    { Py_tp_dealloc, state_dealloc },
    { Py_tp_getset, state_getset },
    { Py_tp_methods, state_methods },
    { 0, NULL },
};
PyType_Spec kl_py_state_spec = {
    .name = "kimi_linear._core.State",
    .basicsize = sizeof(py_state),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = state_slots,
};
