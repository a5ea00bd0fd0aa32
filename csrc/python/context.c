/* _core.Context: a kl_ctx and its lock. */
#include "model.h"

static int poll_signals(void *user)
{
    (void)user;
    const PyGILState_STATE gil = PyGILState_Ensure();
    const int raised = PyErr_CheckSignals();
    PyGILState_Release(gil);
    return raised;
}

static PyObject *context_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {
        "threads", "isa", "gemm", "delta_rule", "activations", "device", NULL
    };
    kl_ctx_options options = { 0 };
    int gemm = 0, delta_rule = KL_FORM_AUTO, activations = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|iziiiz:Context", names, &options.threads,
                                     &options.isa, &gemm, &delta_rule, &activations,
                                     &options.device))
        return NULL;
    options.gemm = gemm ? KL_GEMM_BLAS : KL_GEMM_OWN;
    options.delta_rule = (kl_form)delta_rule;
    options.activations = (kl_activations)activations;
    kl_py_context *self = kl_py_new(type);
    if (self == NULL)
        return NULL;
    self->lock = PyThread_allocate_lock();
    const kl_status status = kl_ctx_create(&self->ctx, &options);
    if (status != KL_OK || self->lock == NULL) {
        (void)kl_py_raise(status != KL_OK ? status : KL_ERR_MEMORY, kl_ctx_error(self->ctx));
        Py_DECREF(self);
        return NULL;
    }
    kl_ctx_set_poll(self->ctx, poll_signals, NULL);
    return (PyObject *)self;
}

static void context_dealloc(PyObject *o)
{
    kl_py_context *self = (kl_py_context *)o;
    kl_ctx_destroy(self->ctx);
    if (self->lock != NULL)
        PyThread_free_lock(self->lock);
    kl_py_free(o);
}

static PyObject *get_isa(PyObject *o, void *closure)
{
    (void)closure;
    return PyUnicode_FromString(kl_ctx_isa(((kl_py_context *)o)->ctx));
}

static PyObject *get_threads(PyObject *o, void *closure)
{
    (void)closure;
    return PyLong_FromLong(kl_ctx_threads(((kl_py_context *)o)->ctx));
}

static PyObject *get_scratch(PyObject *o, void *closure)
{
    (void)closure;
    return PyLong_FromSize_t(kl_ctx_scratch_bytes(((kl_py_context *)o)->ctx));
}

static PyObject *get_allocations(PyObject *o, void *closure)
{
    (void)closure;
    return PyLong_FromLongLong(kl_ctx_allocations(((kl_py_context *)o)->ctx));
}

static PyObject *context_set_threads(PyObject *o, PyObject *args)
{
    kl_py_call c = { 0 };
    int threads;
    if (!PyArg_ParseTuple(args, "i:set_threads", &threads))
        return NULL;
    if (kl_py_begin(&c, o))
        c.status = kl_ctx_set_threads(c.ctx, threads);
    return kl_py_end(&c);
}

static PyObject *context_trim(PyObject *o, PyObject *args)
{
    kl_py_call c = { 0 };
    (void)args;
    if (kl_py_begin(&c, o))
        kl_ctx_trim(c.ctx);
    return kl_py_end(&c);
}

static PyObject *context_profile(PyObject *o, PyObject *args)
{
    kl_py_call c = { 0 };
    int on;
    if (!PyArg_ParseTuple(args, "p:profile", &on))
        return NULL;
    if (kl_py_begin(&c, o))
        kl_ctx_profile(c.ctx, on);
    return kl_py_end(&c);
}

/* [(op, calls, seconds, flops, bytes)] of the ops that were called */
static PyObject *context_profile_result(PyObject *o, PyObject *args)
{
    (void)args;
    const char *name;
    kl_profile_row row;
    PyObject *list = PyList_New(0);
    for (int i = 0; list != NULL && kl_ctx_profile_row(((kl_py_context *)o)->ctx, i, &name, &row);
         i++) {
        if (row.calls == 0)
            continue;
        kl_py_append(&list, Py_BuildValue("(sLddd)", name, (long long)row.calls, row.seconds,
                                          row.flops, row.bytes));
    }
    return list;
}

static PyObject *context_roof_read(PyObject *o, PyObject *args)
{
    kl_py_call c = { 0 };
    PyObject *data;
    double roof = 0;
    if (!PyArg_ParseTuple(args, "O:roof_read", &data))
        return NULL;
    kl_py_on(&c, o);
    const Py_ssize_t n = PyObject_Size(data); /* uint8: bytes */
    c.failed |= n < 0;
    const void *p = kl_py_in(&c, data, KL_PY_U8, n, "data");
    if (kl_py_begin(&c, o))
        c.status = kl_roof_read(c.ctx, p, n, &roof);
    return kl_py_done(&c) ? PyFloat_FromDouble(roof) : NULL;
}

static PyObject *context_roof_fma(PyObject *o, PyObject *args)
{
    kl_py_call c = { 0 };
    double roof = 0;
    (void)args;
    if (kl_py_begin(&c, o))
        c.status = kl_roof_fma(c.ctx, &roof);
    return kl_py_done(&c) ? PyFloat_FromDouble(roof) : NULL;
}

static PyObject *context_tick(PyObject *o, PyObject *args)
{
    kl_py_call c = { 0 };
    double seconds = 0;
    (void)args;
    kl_py_on(&c, o);
    if (!c.failed && c.ctx->backend->tick == NULL)
        kl_py_refuse(&c, PyExc_ValueError, "ctx computes on the CPU; tick is of a device");
    if (kl_py_begin(&c, o))
        c.status = c.ctx->backend->tick(c.ctx, &seconds);
    return kl_py_done(&c) ? PyFloat_FromDouble(seconds) : NULL;
}

/* fail_at(n) and cancel_at(n): faults for tests */
static PyObject *context_fault(PyObject *o, PyObject *args, void (*set)(kl_ctx *ctx, int64_t nth))
{
    kl_py_call c = { 0 };
    long long nth;
    if (!PyArg_ParseTuple(args, "L:fail_at", &nth))
        return NULL;
    if (kl_py_begin(&c, o))
        set(c.ctx, nth);
    return kl_py_end(&c);
}

static PyObject *context_fail_at(PyObject *o, PyObject *args)
{
    return context_fault(o, args, kl_ctx_fail_at);
}

static PyObject *context_cancel_at(PyObject *o, PyObject *args)
{
    return context_fault(o, args, kl_ctx_cancel_at);
}

static PyObject *context_cancel(PyObject *o, PyObject *args)
{
    (void)args;
    kl_ctx_cancel(((kl_py_context *)o)->ctx); /* from another thread: takes no lock */
    Py_RETURN_NONE;
}

static PyGetSetDef context_getset[] = {
    { "isa", get_isa, NULL, "instruction set in use", NULL },
    { "threads", get_threads, NULL, "threads in use", NULL },
    { "scratch_bytes", get_scratch, NULL, "bytes of scratch now held", NULL },
    { "allocations", get_allocations, NULL, "allocations since the context was made", NULL },
    { NULL, NULL, NULL, NULL, NULL },
};
static PyMethodDef context_methods[] = {
    { "set_threads", context_set_threads, METH_VARARGS, NULL },
    { "trim", context_trim, METH_NOARGS, NULL },
    { "cancel", context_cancel, METH_NOARGS, NULL },
    { "fail_at", context_fail_at, METH_VARARGS, "The nth allocation from now on fails; 0: none." },
    { "cancel_at", context_cancel_at, METH_VARARGS,
      "The nth parallel region from now on cancels its call; 0: none." },
    { "profile", context_profile, METH_VARARGS, NULL },
    { "profile_result", context_profile_result, METH_NOARGS, NULL },
    { "roof_read", context_roof_read, METH_VARARGS, "Bytes a second of reading a buffer once." },
    { "tick", context_tick, METH_NOARGS,
      "Seconds on the device since the last tick, all that was launched done; 0 the first time." },
    { "roof_fma", context_roof_fma, METH_NOARGS, "Float32 operations a second in registers." },
    { NULL, NULL, 0, NULL },
};
static PyType_Slot context_slots[] = {
    { Py_tp_new, context_new },
    { Py_tp_dealloc, context_dealloc },
    { Py_tp_getset, context_getset },
    { Py_tp_methods, context_methods },
    { 0, NULL },
};
PyType_Spec kl_py_context_spec = {
    .name = "kimi_linear._core.Context",
    .basicsize = sizeof(kl_py_context),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = context_slots,
};

kl_py_context *kl_py_context_of(PyObject *o)
{
    /* the type's dealloc is ours alone: it tells a Context without module state */
    if (PyType_GetSlot(Py_TYPE(o), Py_tp_dealloc) == (void *)context_dealloc)
        return (kl_py_context *)o;
    PyErr_Format(PyExc_TypeError, "ctx must be a _core.Context, not %R", (PyObject *)Py_TYPE(o));
    return NULL;
}
