/* Buffers in, statuses out. */
#include "../ops/ops.h"
#include "device_memory.h"
#include "model.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* `aligned`: what an address on a device must be a multiple of. Bytes are blocks, whose words have two. */
static const struct {
    const char *formats, *name;
    Py_ssize_t size, aligned;
} kinds[] = {
    [KL_PY_F32] = { "f", "float32", 4, 4 }, [KL_PY_I32] = { "i", "int32", 4, 4 },
    [KL_PY_I64] = { "lq", "int64", 8, 8 },  [KL_PY_U16] = { "H", "uint16", 2, 2 },
    [KL_PY_U8] = { "B", "uint8", 1, 2 },
};

enum { MOST_MATRICES = 1 << 20, LOCK_MICROSECONDS = 50000 };

/* what is done with the values of an array when the context is of a device */
enum { MOVE_NONE = 0, MOVE_IN = 1, MOVE_OUT = 2 };

static bool is_on_device(const kl_py_call *c)
{
    return c->context != NULL && c->context->ctx->device != NULL;
}

/* The address of the last view in the memory of the device; NULL with an exception. */
static void *place(kl_py_call *c, unsigned moves)
{
    kl_ctx *ctx = c->context->ctx;
    const int last = c->n_views - 1;
    const Py_buffer *view = &c->view[last];
    for (int i = 0; i < last; i++)
        if (c->on_device[i] != NULL && c->view[i].buf == view->buf && c->view[i].len == view->len) {
            if (c->moves[i] & MOVE_OUT && moves & MOVE_IN)
                c->moves[i] |= MOVE_IN; /* an output that is an input, too */
            else if (moves & MOVE_OUT)
                c->moves[i] |= MOVE_OUT;
            return c->on_device[i];
        }
    void *p = ctx->backend->allocate(ctx, (size_t)view->len);
    if (p == NULL) {
        (void)kl_py_raise(KL_ERR_MEMORY, ctx->error);
        return NULL;
    }
    c->on_device[last] = p;
    c->moves[last] = (uint8_t)moves;
    return p;
}

static bool has_format(kl_py_kind kind, const char *format, Py_ssize_t size)
{
    return size == kinds[kind].size && format[0] != 0 && format[1] == 0
           && strchr(kinds[kind].formats, format[0]) != NULL;
}

/* ---- arrays that lie on a device ---- */

/* The memory of a kl.DeviceArray, a new reference; NULL with an exception, also where `o` is none. What is to be written
 * and has no memory yet gets it. */
static kl_py_memory *memory_of(kl_py_call *c, PyObject *o, size_t n_bytes, bool writable)
{
    PyObject *held = PyObject_GetAttrString(o, "_memory");
    if (held == Py_None && writable) {
        Py_DECREF(held);
        held = (PyObject *)kl_py_memory_new(c->context, n_bytes);
        if (held != NULL && PyObject_SetAttrString(o, "_memory", held) < 0)
            Py_CLEAR(held);
    }
    kl_py_memory *memory = held != NULL ? kl_py_memory_of(held) : NULL;
    if (memory == NULL)
        Py_XDECREF(held);
    return memory;
}

static bool has_memory(PyObject *o)
{
    PyObject *held = PyObject_GetAttrString(o, "_memory");
    const bool has = held != NULL && held != Py_None;
    Py_XDECREF(held);
    PyErr_Clear();
    return has;
}

static bool has_format_of(PyObject *o, kl_py_kind kind, const char *name)
{
    PyObject *text = PyObject_GetAttrString(o, "_format");
    const char *format = text != NULL ? PyUnicode_AsUTF8AndSize(text, NULL) : NULL;
    const bool fits = format != NULL && has_format(kind, format, kinds[kind].size);
    if (format != NULL && !fits)
        PyErr_Format(PyExc_TypeError, "%s has items of format '%s'; it must be %s", name, format,
                     kinds[kind].name);
    Py_XDECREF(text);
    return fits;
}

/* What is not the context's own is looked at, and waited for. */
static bool admit(kl_py_call *c, kl_py_memory *memory, kl_py_kind kind, const char *name)
{
    kl_ctx *ctx = c->ctx;
    int type, number;
    if (memory->n_bytes == 0 || (memory->owned && memory->context == c->context))
        return true;
    ctx->backend->where(ctx, &type, &number);
    if (memory->device_type != 0 && memory->device_type != type) {
        PyErr_Format(PyExc_ValueError,
                     "%s lies on a device of DLPack's type %d; the context computes on type %d",
                     name, memory->device_type, type);
        return false;
    }
    if ((uintptr_t)memory->data % (uintptr_t)kinds[kind].aligned != 0) {
        PyErr_Format(PyExc_ValueError,
                     "%s begins at %p on the device; the address must be a multiple of %zd", name,
                     memory->data, kinds[kind].aligned);
        return false;
    }
    const kl_status status = ctx->backend->has(ctx, name, memory->data, memory->n_bytes);
    if (status != KL_OK) {
        (void)kl_py_raise(status, ctx->error);
        return false;
    }
    if (memory->device_type == 0) { /* known now */
        memory->device_type = type;
        memory->device_id = number;
    }
    c->foreign = true;
    if (memory->owned)
        c->streams[c->n_streams++] = ctx->backend->stream(memory->context->ctx);
    else if (memory->waits)
        c->streams[c->n_streams++] = memory->stream;
    if (memory->context == NULL)
        memory->context = (kl_py_context *)Py_NewRef((PyObject *)c->context);
    return true;
}

static void *hold_memory(kl_py_call *c, PyObject *o, kl_py_kind kind, int64_t n, const char *name,
                         bool writable, unsigned moves)
{
    const size_t n_bytes = (size_t)n * (size_t)kinds[kind].size;
    if (moves == MOVE_NONE || kind == KL_PY_I64) {
        PyErr_Format(PyExc_TypeError, "%s lies on a device; it must be in host memory", name);
        return NULL;
    }
    if (!is_on_device(c)) {
        PyErr_Format(PyExc_ValueError,
                     "%s lies on a device and the context computes on the CPU; give "
                     "ctx=kl.Context(device=...), or a copy in host memory",
                     has_memory(o) ? name : "an input"); /* whose result is made like it */
        return NULL;
    }
    if (n > INT64_MAX / 16) {
        PyErr_Format(PyExc_ValueError, "%s: %lld values are too many", name, (long long)n);
        return NULL;
    }
    kl_py_memory *memory = memory_of(c, o, n_bytes, writable);
    if (memory == NULL)
        return NULL;
    c->memory[c->n_memory++] = (PyObject *)memory;
    if (!has_format_of(o, kind, name))
        return NULL;
    if (memory->n_bytes != n_bytes) {
        PyErr_Format(PyExc_ValueError, "%s has %zu bytes; the sizes of the call say %zu", name,
                     memory->n_bytes, n_bytes);
        return NULL;
    }
    if (writable && memory->read_only) {
        PyErr_Format(PyExc_ValueError, "%s is read-only", name);
        return NULL;
    }
    return admit(c, memory, kind, name) ? memory->data : NULL;
}

/* ---- arrays of the host ---- */

static void *hold(kl_py_call *c, PyObject *o, kl_py_kind kind, int64_t n, const char *name,
                  int flags, unsigned moves)
{
    if (c->failed)
        return NULL;
    c->failed = true;
    if (c->n_views + c->n_memory == KL_PY_MAX_BUFFERS) {
        PyErr_SetString(PyExc_SystemError, "too many arrays in one call");
        return NULL;
    }
    if (!PyObject_CheckBuffer(o) && PyObject_HasAttrString(o, "_memory")) {
        void *data = hold_memory(c, o, kind, n, name, (flags & PyBUF_WRITABLE) != 0, moves);
        c->failed = PyErr_Occurred() != NULL;
        return data;
    }
    Py_buffer *view = &c->view[c->n_views];
    if (PyObject_GetBuffer(o, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | flags) < 0) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s must be a C-contiguous%s buffer of %s", name,
                     flags & PyBUF_WRITABLE ? " writable" : "", kinds[kind].name);
        return NULL;
    }
    c->n_views++;
    const char *format = view->format != NULL ? view->format : "B";
    if (!has_format(kind, format, view->itemsize)) {
        PyErr_Format(PyExc_TypeError, "%s has items of format '%s'; it must be %s", name, format,
                     kinds[kind].name);
        return NULL;
    }
    if (view->len / view->itemsize != n) {
        PyErr_Format(PyExc_ValueError, "%s has %lld values; the sizes of the call say %lld", name,
                     (long long)(view->len / view->itemsize), (long long)n);
        return NULL;
    }
    void *p = view->buf;
    if (moves != MOVE_NONE && kind != KL_PY_I64 && is_on_device(c)) {
        p = place(c, moves);
        if (p == NULL)
            return NULL;
    }
    c->failed = false;
    return p;
}

void *kl_py_out(kl_py_call *c, PyObject *o, kl_py_kind kind, int64_t n, const char *name)
{
    return hold(c, o, kind, n, name, PyBUF_WRITABLE, MOVE_OUT);
}

void *kl_py_inout(kl_py_call *c, PyObject *o, kl_py_kind kind, int64_t n, const char *name)
{
    return hold(c, o, kind, n, name, PyBUF_WRITABLE, MOVE_IN | MOVE_OUT);
}

const void *kl_py_in(kl_py_call *c, PyObject *o, kl_py_kind kind, int64_t n, const char *name)
{
    return hold(c, o, kind, n, name, 0, MOVE_IN);
}

void *kl_py_host_out(kl_py_call *c, PyObject *o, kl_py_kind kind, int64_t n, const char *name)
{
    return hold(c, o, kind, n, name, PyBUF_WRITABLE, MOVE_NONE);
}

const void *kl_py_host_in(kl_py_call *c, PyObject *o, kl_py_kind kind, int64_t n, const char *name)
{
    return hold(c, o, kind, n, name, 0, MOVE_NONE);
}

void *kl_py_out_opt(kl_py_call *c, PyObject *o, kl_py_kind kind, int64_t n, const char *name)
{
    return o == Py_None ? NULL : kl_py_out(c, o, kind, n, name);
}

const void *kl_py_in_opt(kl_py_call *c, PyObject *o, kl_py_kind kind, int64_t n, const char *name)
{
    return o == Py_None ? NULL : kl_py_in(c, o, kind, n, name);
}

int64_t kl_py_size(kl_py_call *c, const char *name, int64_t a, int64_t b, int64_t d, int64_t e)
{
    int64_t n = 0;
    if (!c->failed && !(kl_mul(&n, a, b) && kl_mul(&n, n, d) && kl_mul(&n, n, e)))
        kl_py_refuse(c, PyExc_ValueError,
                     "%s: a size is negative or too large: %lld, %lld, %lld, %lld", name,
                     (long long)a, (long long)b, (long long)d, (long long)e);
    return n;
}

const int64_t *kl_py_offsets(kl_py_call *c, PyObject *o, int64_t n, const char *name)
{
    n = kl_py_size(c, name, n, 1, 1, 1); /* the sum below fits */
    return c->failed ? NULL : kl_py_in(c, o, KL_PY_I64, n + 1, name);
}

void **kl_py_pointers(kl_py_call *c, int64_t n, const void *base, int64_t step)
{
    if (c->failed)
        return NULL;
    const bool fits = n >= 0 && n < PTRDIFF_MAX / (int64_t)sizeof(void *);
    void **p = fits ? malloc(((size_t)n + 1) * sizeof *p) : NULL;
    if (p == NULL || c->n_pointers == 8) {
        free(p);
        PyErr_NoMemory();
        c->failed = true;
        return NULL;
    }
    for (int64_t i = 0; i < n; i++)
        p[i] = (char *)(uintptr_t)base + i * step;
    c->pointers[c->n_pointers++] = p;
    return p;
}

kl_slots kl_py_slots(kl_py_call *c, const void *states, int64_t n, int64_t values)
{
    kl_slots slots = { 0 };
    if (states != NULL)
        slots.base = (void *const *)kl_py_pointers(c, n, states, values * (int64_t)sizeof(float));
    return slots;
}

PyObject *kl_py_items(PyObject *list, const char *problem)
{
    if (PyList_Check(list))
        return PyList_AsTuple(list);
    PyErr_SetString(PyExc_TypeError, problem);
    return NULL;
}

kl_weight kl_py_weight(kl_py_call *c, PyObject *o, const char *name)
{
    kl_weight w = { 0 };
    PyObject *buffer;
    int type;
    long long n, rows, cols;
    if (c->failed)
        return w;
    if (!PyTuple_Check(o) || !PyArg_ParseTuple(o, "OiLLL", &buffer, &type, &n, &rows, &cols)) {
        kl_py_refuse(c, PyExc_TypeError, "%s must be a tuple (buffer, type, n, rows, cols)", name);
        return w;
    }
    const int64_t block = kl_type_block((kl_type)type);
    if (block == 0 || cols % block != 0)
        kl_py_refuse(c, PyExc_TypeError,
                     "%s has storage type %d and rows of %lld values; it must be a "
                     "known type and whole blocks",
                     name, type, cols);
    else if (n < 0 || n > MOST_MATRICES)
        kl_py_refuse(c, PyExc_ValueError, "%s has %lld matrices; it must have 0 to %d", name, n,
                     MOST_MATRICES);
    if (c->failed)
        return w;
    const int64_t one = kl_py_size(c, name, rows, cols, 1, 1), /* alone: n may be 0 */
        size = kl_py_size(c, name, n, one, 1, 1);
    const void *data =
        block == 1
            ? kl_py_in(c, buffer, type == KL_F32 ? KL_PY_F32 : KL_PY_U16, size, name)
            : kl_py_in(c, buffer, KL_PY_U8, (int64_t)kl_type_bytes((kl_type)type, size), name);
    if (c->failed)
        return w; /* the sizes may overflow */
    w.row_bytes = kl_type_bytes((kl_type)type, cols);
    w.matrix = (const void *const *)kl_py_pointers(c, n, data, (int64_t)w.row_bytes * rows);
    w.n = n;
    w.rows = rows;
    w.cols = cols;
    w.type = (kl_type)type;
    return w;
}

void kl_py_on(kl_py_call *c, PyObject *context)
{
    if (c->failed)
        return;
    c->failed = true;
    kl_py_context *taken = kl_py_context_of(context);
    if (taken == NULL)
        return;
    const unsigned long me = PyThread_get_thread_ident();
    if (atomic_load(&taken->owner) == me) {
        PyErr_SetString(PyExc_ValueError, "ctx is in use by the call that this one is made from");
        return;
    }
    PyLockStatus status = PyThread_acquire_lock_timed(taken->lock, 0, 0);
    while (status != PY_LOCK_ACQUIRED) { /* another thread's call: signals are heard meanwhile */
        if (PyErr_CheckSignals() < 0)
            return;
        PyThreadState *thread = PyEval_SaveThread();
        status = PyThread_acquire_lock_timed(taken->lock, LOCK_MICROSECONDS, 1);
        PyEval_RestoreThread(thread);
    }
    atomic_store(&taken->owner, me);
    c->fp = kl_fp_default(); /* numbers of Python become float32 */
    c->context = taken;
    c->ctx = taken->ctx;
    c->failed = false;
}

/* the last step before the op: what it reads, to the device; and what others are still making there */
static void upload(kl_py_call *c)
{
    for (int i = 0; i < c->n_streams && c->status == KL_OK; i++)
        c->status = c->ctx->backend->wait(c->ctx, c->streams[i]);
    for (int i = 0; i < c->n_views && c->status == KL_OK; i++)
        if (c->on_device[i] != NULL && c->moves[i] & MOVE_IN)
            c->status = c->ctx->backend->upload(c->ctx, c->on_device[i], c->view[i].buf,
                                                (size_t)c->view[i].len);
}

/* the first step after it: what it wrote, back; nothing when it failed. Memory of others is theirs again. */
static void download(kl_py_call *c)
{
    if (c->foreign) {
        const kl_backend *b = c->ctx->backend;
        const kl_status status = b->wait(c->ctx, b->stream(c->ctx));
        if (c->status == KL_OK)
            c->status = status;
    }
    for (int i = 0; i < c->n_views && c->status == KL_OK; i++)
        if (c->on_device[i] != NULL && c->moves[i] & MOVE_OUT)
            c->status = c->ctx->backend->download(c->ctx, c->view[i].buf, c->on_device[i],
                                                  (size_t)c->view[i].len);
}

bool kl_py_begin(kl_py_call *c, PyObject *context)
{
    if (c->context == NULL)
        kl_py_on(c, context);
    if (c->failed)
        return false;
    c->thread = PyEval_SaveThread();
    upload(c);
    return c->status == KL_OK;
}

bool kl_py_done(kl_py_call *c)
{
    char sentence[512] = "";
    if (c->thread != NULL)
        download(c);
    if (c->context != NULL) {
        for (int i = 0; i < c->n_views; i++)
            c->ctx->backend->release(c->ctx, c->on_device[i],
                                     c->on_device[i] != NULL ? (size_t)c->view[i].len : 0);
        if (c->status != KL_OK)
            memcpy(sentence, c->ctx->error, sizeof sentence);
        kl_scratch_reset(c->ctx, 0);
        kl_fp_restore(c->fp);
        atomic_store(&c->context->owner, 0);
        PyThread_release_lock(c->context->lock);
    }
    if (c->thread != NULL)
        PyEval_RestoreThread(c->thread);
    for (int i = 0; i < c->n_views; i++)
        PyBuffer_Release(&c->view[i]);
    for (int i = 0; i < c->n_memory; i++)
        Py_DECREF(c->memory[i]);
    for (int i = 0; i < c->n_pointers; i++)
        free(c->pointers[i]);
    if (!c->failed && c->status != KL_OK)
        (void)kl_py_raise(c->status, sentence);
    return !c->failed && c->status == KL_OK;
}

PyObject *kl_py_end(kl_py_call *c) { return kl_py_done(c) ? Py_NewRef(Py_None) : NULL; }

void *kl_py_refuse(kl_py_call *c, PyObject *type, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    PyErr_FormatV(type, format, args);
    va_end(args);
    c->failed = true;
    return NULL;
}

static PyObject *own_error(const char *name)
{
    PyObject *module = PyImport_ImportModule("kimi_linear.errors");
    PyObject *type = module != NULL ? PyObject_GetAttrString(module, name) : NULL;
    Py_XDECREF(module);
    return type;
}

PyObject *kl_py_raise(kl_status status, const char *sentence)
{
    PyObject *type = NULL, *owned = NULL;
    if (status == KL_ERR_INTERRUPTED && PyErr_Occurred() == PyExc_KeyboardInterrupt)
        PyErr_Clear();    /* the sentence says more: at which token */
    if (PyErr_Occurred()) /* a signal handler raised: that is the reason to tell */
        return NULL;
    switch (status) {
    case KL_OK: type = PyExc_SystemError; break;
    case KL_ERR_ARG:
    case KL_ERR_SHAPE:
    case KL_ERR_STATE: type = PyExc_ValueError; break;
    case KL_ERR_DTYPE: type = PyExc_TypeError; break;
    case KL_ERR_MEMORY: type = PyExc_MemoryError; break;
    case KL_ERR_UNSUPPORTED: type = PyExc_NotImplementedError; break;
    case KL_ERR_IO: type = PyExc_OSError; break;
    case KL_ERR_INTERRUPTED: type = PyExc_KeyboardInterrupt; break;
    case KL_ERR_FORMAT: type = owned = own_error("FormatError"); break;
    case KL_ERR_DEVICE: type = owned = own_error("DeviceError"); break;
    }
    if (type != NULL)
        PyErr_SetString(type, sentence);
    Py_XDECREF(owned);
    return NULL;
}

void kl_py_append(PyObject **list, PyObject *item)
{
    if (*list != NULL && (item == NULL || PyList_Append(*list, item) < 0))
        Py_CLEAR(*list);
    Py_XDECREF(item);
}

void *kl_py_new(PyTypeObject *type)
{
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    return allocate(type, 0);
}

void kl_py_free(PyObject *o)
{
    PyTypeObject *type = Py_TYPE(o);
    freefunc free_object = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_object(o);
    Py_DECREF(type);
}
