/* _core.DeviceMemory: memory of a device, of a context or borrowed from another library by DLPack or by address.
 * kl.DeviceArray (kimi_linear/device_array.py) gives it a shape and a type. */
#include "device_memory.h"

#include <stdlib.h>
#include <string.h>

/* ---- DLPack 0.x, whose tensor every later producer still gives where none is asked for: the layout is the
 * specification's, dmlc.github.io/dlpack ---- */

typedef struct dl_tensor {
    void *data;
    int32_t device_type, device_id;
    int32_t n_dims;
    uint8_t code, bits; /* code: 0 int, 1 unsigned, 2 float, 4 bfloat, 6 bool */
    uint16_t lanes;
    int64_t *shape, *strides; /* strides in items; NULL: contiguous */
    uint64_t byte_offset;
} dl_tensor;

typedef struct dl_managed {
    dl_tensor tensor;
    void *manager;
    void (*deleter)(struct dl_managed *self);
} dl_managed;

enum { DL_CUDA = 2, DL_CUDA_MANAGED = 13 };

static const char FRESH[] = "dltensor", USED[] = "used_dltensor"; /* names of its capsule */

/* ---- life ---- */

static kl_py_memory *new_memory(void)
{
    PyObject *module = PyImport_ImportModule("kimi_linear._core");
    PyObject *type = module != NULL ? PyObject_GetAttrString(module, "DeviceMemory") : NULL;
    kl_py_memory *self = NULL;
    if (type != NULL)
        self = kl_py_new((PyTypeObject *)type);
    Py_XDECREF(type);
    Py_XDECREF(module);
    return self;
}

static void memory_dealloc(PyObject *o)
{
    kl_py_memory *self = (kl_py_memory *)o;
    if (self->owned && self->data != NULL) {
        kl_ctx *ctx = self->context->ctx;
        PyThreadState *thread = PyEval_SaveThread(); /* it waits for the device */
        ctx->backend->release(ctx, self->data, self->n_bytes);
        PyEval_RestoreThread(thread);
    }
    dl_managed *managed = self->managed;
    if (managed != NULL && managed->deleter != NULL)
        managed->deleter(managed);
    Py_XDECREF(self->owner);
    Py_XDECREF((PyObject *)self->context);
    kl_py_free(o);
}

kl_py_memory *kl_py_memory_of(PyObject *o)
{
    if (PyType_GetSlot(Py_TYPE(o), Py_tp_dealloc) == (void *)memory_dealloc)
        return (kl_py_memory *)o;
    PyErr_Format(PyExc_TypeError, "memory must be a _core.DeviceMemory, not %R",
                 (PyObject *)Py_TYPE(o));
    return NULL;
}

kl_py_memory *kl_py_memory_new(kl_py_context *context, size_t n_bytes)
{
    kl_ctx *ctx = context->ctx;
    kl_py_memory *self = new_memory();
    if (self == NULL)
        return NULL;
    self->data = ctx->backend->allocate(ctx, n_bytes);
    self->n_bytes = n_bytes;
    self->owned = true;
    self->context = (kl_py_context *)Py_NewRef((PyObject *)context);
    if (self->data == NULL) {
        (void)kl_py_raise(KL_ERR_MEMORY, ctx->error);
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    ctx->backend->where(ctx, &self->device_type, &self->device_id);
    return self;
}

/* a context whose arrays lie on a device */
static bool takes(kl_py_call *c, PyObject *context)
{
    kl_py_on(c, context);
    if (!c->failed && c->ctx->device == NULL)
        kl_py_refuse(c, PyExc_ValueError,
                     "ctx computes on the CPU; a DeviceArray needs one of a device, as "
                     "kl.Context(device='hip')");
    return !c->failed;
}

/* allocate(ctx, n_bytes) */
static PyObject *memory_allocate(PyObject *type, PyObject *args)
{
    (void)type;
    kl_py_call c = { 0 };
    PyObject *context;
    long long n_bytes;
    if (!PyArg_ParseTuple(args, "OL:allocate", &context, &n_bytes))
        return NULL;
    kl_py_memory *self = NULL;
    if (takes(&c, context) && kl_py_size(&c, "n_bytes", n_bytes, 1, 1, 1) >= 0 && !c.failed) {
        self = kl_py_memory_new(c.context, (size_t)n_bytes);
        c.failed = self == NULL;
    }
    return kl_py_done(&c) ? (PyObject *)self : NULL;
}

/* ---- from others ---- */

static bool is_contiguous(const dl_tensor *t)
{
    int64_t step = 1;
    for (int i = t->n_dims - 1; t->strides != NULL && i >= 0; i--) {
        if (t->shape[i] != 1 && t->strides[i] != step)
            return false;
        step *= t->shape[i];
    }
    return true;
}

/* (memory, code, bits, shape), or NULL with the exception */
static PyObject *take_tensor(dl_managed *managed, const char *name)
{
    const dl_tensor *t = &managed->tensor;
    int64_t n = 1, n_bytes;
    bool fits = t->n_dims >= 0 && t->n_dims <= 64 && t->lanes == 1 && t->bits % 8 == 0;
    for (int i = 0; fits && i < t->n_dims; i++)
        fits = kl_mul(&n, n, t->shape[i]);
    if (!fits || !kl_mul(&n_bytes, n, t->bits / 8)) {
        PyErr_Format(PyExc_TypeError, "%s: its DLPack has items of %d x %d bits, or too many", name,
                     t->lanes, t->bits);
        return NULL;
    }
    if (n > 0 && !is_contiguous(t)) {
        PyErr_Format(PyExc_ValueError, "%s is strided; on a device it must be contiguous", name);
        return NULL;
    }
    kl_py_memory *self = new_memory();
    PyObject *shape = PyTuple_New(t->n_dims);
    for (int i = 0; shape != NULL && i < t->n_dims; i++)
        if (PyTuple_SetItem(shape, i, PyLong_FromLongLong(t->shape[i])) < 0)
            Py_CLEAR(shape);
    if (self == NULL || shape == NULL) {
        Py_XDECREF((PyObject *)self);
        Py_XDECREF(shape);
        return NULL;
    }
    self->data = (char *)t->data + t->byte_offset;
    self->n_bytes = (size_t)n_bytes;
    self->device_type = t->device_type == DL_CUDA_MANAGED ? DL_CUDA : t->device_type;
    self->device_id = t->device_id;
    self->waits = true; /* the producer was asked for the default stream */
    PyObject *result = Py_BuildValue("(NiiN)", (PyObject *)self, t->code, t->bits, shape);
    if (result != NULL)
        self->managed = managed;
    return result;
}

/* from_dlpack(capsule, name) */
static PyObject *memory_from_dlpack(PyObject *type, PyObject *args)
{
    (void)type;
    PyObject *capsule;
    const char *name;
    if (!PyArg_ParseTuple(args, "Os:from_dlpack", &capsule, &name))
        return NULL;
    if (!PyCapsule_IsValid(capsule, FRESH)) {
        PyErr_Format(PyExc_TypeError, "%s: its __dlpack__ gives %R, not a fresh capsule 'dltensor'",
                     name, capsule);
        return NULL;
    }
    dl_managed *managed = PyCapsule_GetPointer(capsule, FRESH);
    PyObject *result = take_tensor(managed, name);
    if (result != NULL) /* it is this object's to delete now */
        (void)PyCapsule_SetName(capsule, USED);
    return result;
}

/* borrow(address, n_bytes, read_only, stream or None, owner) */
static PyObject *memory_borrow(PyObject *type, PyObject *args)
{
    (void)type;
    unsigned long long address;
    long long n_bytes;
    int read_only;
    PyObject *stream, *owner;
    if (!PyArg_ParseTuple(args, "KLpOO:borrow", &address, &n_bytes, &read_only, &stream, &owner))
        return NULL;
    void *handle = stream == Py_None ? NULL : PyLong_AsVoidPtr(stream);
    if (PyErr_Occurred())
        return NULL;
    if (n_bytes < 0) {
        PyErr_Format(PyExc_ValueError, "n_bytes is %lld; it must be >= 0", n_bytes);
        return NULL;
    }
    kl_py_memory *self = new_memory();
    if (self == NULL)
        return NULL;
    self->data = (void *)(uintptr_t)address;
    self->n_bytes = (size_t)n_bytes;
    self->read_only = read_only != 0;
    self->waits = stream != Py_None;
    self->stream = handle;
    self->owner = Py_NewRef(owner);
    return (PyObject *)self;
}

/* ---- to others ---- */

/* what an exported tensor holds */
typedef struct exported {
    dl_managed managed;
    PyObject *memory;
    int64_t shape[];
} exported;

static void delete_exported(dl_managed *managed)
{
    exported *e = managed->manager;
    if (Py_IsInitialized()) { /* any thread may be the last to need it */
        const PyGILState_STATE gil = PyGILState_Ensure();
        Py_DECREF(e->memory);
        PyGILState_Release(gil);
    }
    free(e);
}

static void close_capsule(PyObject *capsule)
{
    if (!PyCapsule_IsValid(capsule, FRESH))
        return; /* taken: its taker deletes it */
    dl_managed *managed = PyCapsule_GetPointer(capsule, FRESH);
    managed->deleter(managed);
}

/* to_dlpack(code, bits, shape): a capsule; what was launched must have been waited for */
static PyObject *memory_to_dlpack(PyObject *o, PyObject *args)
{
    kl_py_memory *self = (kl_py_memory *)o;
    int code, bits;
    PyObject *shape;
    if (!PyArg_ParseTuple(args, "iiO!:to_dlpack", &code, &bits, &PyTuple_Type, &shape))
        return NULL;
    const Py_ssize_t n = PyTuple_Size(shape);
    exported *e = calloc(1, sizeof *e + 2 * (size_t)n * sizeof e->shape[0]);
    if (e == NULL)
        return PyErr_NoMemory();
    int64_t step = 1;
    for (Py_ssize_t i = n - 1; i >= 0; i--) {
        e->shape[i] = PyLong_AsLongLong(PyTuple_GetItem(shape, i));
        e->shape[n + i] = step;
        step *= e->shape[i];
    }
    e->managed = (dl_managed){ .tensor = { .data = self->data,
                                           .device_type = self->device_type,
                                           .device_id = self->device_id,
                                           .n_dims = (int32_t)n,
                                           .code = (uint8_t)code,
                                           .bits = (uint8_t)bits,
                                           .lanes = 1,
                                           .shape = e->shape,
                                           .strides = e->shape + n },
                               .manager = e,
                               .deleter = delete_exported };
    PyObject *capsule = PyErr_Occurred() ? NULL : PyCapsule_New(&e->managed, FRESH, close_capsule);
    if (capsule == NULL) {
        free(e);
        return NULL;
    }
    e->memory = Py_NewRef(o);
    return capsule;
}

/* ---- to and from the host ---- */

/* The context that copies: the one whose memory it is, or that has used it. */
static bool opened(kl_py_call *c, kl_py_memory *self)
{
    if (self->context != NULL)
        return takes(c, (PyObject *)self->context);
    return kl_py_refuse(c, PyExc_ValueError,
                        "no context has used this memory yet; give it to an op");
}

/* upload(buffer), download(buffer): all of its bytes */
static PyObject *copy(PyObject *o, PyObject *args, const char *format, bool to_host)
{
    kl_py_memory *self = (kl_py_memory *)o;
    kl_py_call c = { 0 };
    Py_buffer view;
    if (!PyArg_ParseTuple(args, format, &view))
        return NULL;
    if (opened(&c, self) && view.len != (Py_ssize_t)self->n_bytes)
        kl_py_refuse(&c, PyExc_ValueError, "the buffer has %zd bytes; the memory has %zu", view.len,
                     self->n_bytes);
    if (!c.failed && kl_py_begin(&c, (PyObject *)self->context)) {
        const kl_backend *b = c.ctx->backend;
        c.status = to_host ? b->download(c.ctx, view.buf, self->data, self->n_bytes)
                           : b->upload(c.ctx, self->data, view.buf, self->n_bytes);
    }
    PyObject *none = kl_py_end(&c);
    PyBuffer_Release(&view);
    return none;
}

static PyObject *memory_upload(PyObject *o, PyObject *args)
{
    return copy(o, args, "y*:upload", false);
}

static PyObject *memory_download(PyObject *o, PyObject *args)
{
    return copy(o, args, "w*:download", true);
}

/* wait(): until all is done that its context launched */
static PyObject *memory_wait(PyObject *o, PyObject *args)
{
    kl_py_memory *self = (kl_py_memory *)o;
    kl_py_call c = { 0 };
    (void)args;
    if (self->context == NULL)
        Py_RETURN_NONE;
    if (takes(&c, (PyObject *)self->context) && kl_py_begin(&c, (PyObject *)self->context))
        c.status = c.ctx->backend->wait(c.ctx, c.ctx->backend->stream(c.ctx));
    return kl_py_end(&c);
}

/* ---- what it is ---- */

static PyObject *get_address(PyObject *o, void *closure)
{
    (void)closure;
    return PyLong_FromVoidPtr(((kl_py_memory *)o)->data);
}

static PyObject *get_bytes(PyObject *o, void *closure)
{
    (void)closure;
    return PyLong_FromSize_t(((kl_py_memory *)o)->n_bytes);
}

static PyObject *get_read_only(PyObject *o, void *closure)
{
    (void)closure;
    return PyBool_FromLong(((kl_py_memory *)o)->read_only);
}

static PyObject *get_device(PyObject *o, void *closure)
{
    const kl_py_memory *self = (kl_py_memory *)o;
    (void)closure;
    return Py_BuildValue("(ii)", self->device_type, self->device_id);
}

static PyGetSetDef memory_getset[] = {
    { "address", get_address, NULL, "of its first byte", NULL },
    { "nbytes", get_bytes, NULL, "bytes", NULL },
    { "read_only", get_read_only, NULL, "whether its owner lets nobody write", NULL },
    { "device", get_device, NULL, "DLPack's type and number of its device; (0, 0): unknown", NULL },
    { NULL, NULL, NULL, NULL, NULL },
};
static PyMethodDef memory_methods[] = {
    { "allocate", memory_allocate, METH_VARARGS | METH_STATIC, NULL },
    { "from_dlpack", memory_from_dlpack, METH_VARARGS | METH_STATIC, NULL },
    { "borrow", memory_borrow, METH_VARARGS | METH_STATIC, NULL },
    { "to_dlpack", memory_to_dlpack, METH_VARARGS, NULL },
    { "upload", memory_upload, METH_VARARGS, NULL },
    { "download", memory_download, METH_VARARGS, NULL },
    { "wait", memory_wait, METH_NOARGS, NULL },
    { NULL, NULL, 0, NULL },
};
static PyType_Slot memory_slots[] = {
    { Py_tp_dealloc, memory_dealloc },
    { Py_tp_getset, memory_getset },
    { Py_tp_methods, memory_methods },
    { 0, NULL },
};
PyType_Spec kl_py_memory_spec = {
    .name = "kimi_linear._core.DeviceMemory",
    .basicsize = sizeof(kl_py_memory),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = memory_slots,
};
