/* What the files of the extension share. An array comes as a buffer; the number of values in it is checked
 * against the sizes that the call names, so that nonsense raises and never reads or writes past an end.
 *
 * A wrapper holds its buffers, calls under the context's lock without the GIL, releases, raises:
 *
 *     kl_py_call c = { 0 };
 *     ...PyArg_ParseTuple...
 *     kl_py_on(&c, octx);
 *     float *y = kl_py_out(&c, oy, KL_PY_F32, n, "out");
 *     const float *x = kl_py_in(&c, ox, KL_PY_F32, n, "x");
 *     if (kl_py_begin(&c, octx))
 *         c.status = kl_op(c.ctx, y, x, n);
 *     return kl_py_end(&c);                        None, or NULL with the exception set */
#ifndef KL_BINDING_H
#define KL_BINDING_H

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../cpu/fpenv.h"
#include "../internal.h"

enum { KL_PY_MAX_BUFFERS = 24 };

typedef enum kl_py_kind { KL_PY_F32, KL_PY_I32, KL_PY_I64, KL_PY_U16, KL_PY_U8 } kl_py_kind;

typedef struct kl_py_call {
    Py_buffer view[KL_PY_MAX_BUFFERS];
    void *on_device[KL_PY_MAX_BUFFERS]; /* its address in the backend's memory; NULL: host memory */
    uint8_t moves[KL_PY_MAX_BUFFERS];   /* MOVE_ of buffers.c */
    int n_views;
    bool failed; /* an exception is set */
    kl_ctx *ctx;
    kl_status status;
    struct kl_py_context *context; /* locked */
    kl_fp fp;                      /* of the caller, who has it again at the end */
    PyThreadState *thread;
    /* Of the arrays that lie on the device already: held to the end; and the streams to wait for before the op. foreign:
     * one of them is not the context's own, so that the call waits for its own end, too. */
    PyObject *memory[KL_PY_MAX_BUFFERS];
    void *streams[KL_PY_MAX_BUFFERS];
    int n_memory, n_streams;
    bool foreign;
    const void *address[KL_PY_MAX_BUFFERS]; /* room for single-matrix weights */
    void **pointers[8];                     /* freed at the end */
    int n_pointers;
} kl_py_call;

/* Takes the context, and its lock, before arrays are borrowed: on a device they get addresses in its memory,
 * are uploaded by kl_py_begin and downloaded by kl_py_end. Arrays of one address share one there. */
void kl_py_on(kl_py_call *c, PyObject *context);

/* Buffers of exactly n values, C-contiguous; NULL (and c->failed) with an exception otherwise. The _opt
 * forms take None and give NULL. A kl.DeviceArray is used where it lies; as an output it gets its memory here, where it
 * has none yet. */
void *kl_py_out(kl_py_call *c, PyObject *o, kl_py_kind kind, int64_t n, const char *name);
const void *kl_py_in(kl_py_call *c, PyObject *o, kl_py_kind kind, int64_t n, const char *name);
void *kl_py_out_opt(kl_py_call *c, PyObject *o, kl_py_kind kind, int64_t n, const char *name);
const void *kl_py_in_opt(kl_py_call *c, PyObject *o, kl_py_kind kind, int64_t n, const char *name);

/* As kl_py_out, of which the op leaves a part as it was: the old values are uploaded, too. */
void *kl_py_inout(kl_py_call *c, PyObject *o, kl_py_kind kind, int64_t n, const char *name);
/* Control data, which stay in the host's memory on every device. int64 always do. */
void *kl_py_host_out(kl_py_call *c, PyObject *o, kl_py_kind kind, int64_t n, const char *name);
const void *kl_py_host_in(kl_py_call *c, PyObject *o, kl_py_kind kind, int64_t n, const char *name);

/* Offsets of n sequences: n + 1 of them. */
const int64_t *kl_py_offsets(kl_py_call *c, PyObject *o, int64_t n, const char *name);

/* The items of a list in a tuple, a new reference: what reading one calls (__index__, __bool__) may change the list.
 * NULL with a TypeError that says `problem`. */
PyObject *kl_py_items(PyObject *list, const char *problem);

/* A weight is a tuple (buffer, type id, n, rows, cols): n matrices of one shape, one behind the other. */
kl_weight kl_py_weight(kl_py_call *c, PyObject *o, const char *name);

/* An array of n pointers that lives until kl_py_end; element i is base + i * step bytes. */
void **kl_py_pointers(kl_py_call *c, int64_t n, const void *base, int64_t step);

/* Slots over an array of n states of `values` float32 each, one behind the other; none where it is NULL. */
kl_slots kl_py_slots(kl_py_call *c, const void *states, int64_t n, int64_t values);

/* product of up to four sizes; fails the call when one is negative or it does not fit */
int64_t kl_py_size(kl_py_call *c, const char *name, int64_t a, int64_t b, int64_t d, int64_t e);

/* Fails the call with an exception; returns NULL. */
void *kl_py_refuse(kl_py_call *c, PyObject *type, const char *format, ...);

/* False where the op is not to be called. It takes the context where kl_py_on has not. */
bool kl_py_begin(kl_py_call *c, PyObject *context);
/* Gives back all that the call holds: whether it did what it was to do, else the exception is set. */
bool kl_py_done(kl_py_call *c);
PyObject *kl_py_end(kl_py_call *c); /* the same as None or NULL */

/* Appends an item, whose reference it takes, to a list that it drops where it cannot, or where either is NULL. */
void kl_py_append(PyObject **list, PyObject *item);

/* An object of a heap type, zeros; and the last step of its dealloc. */
void *kl_py_new(PyTypeObject *type);
void kl_py_free(PyObject *o);

/* Sets the exception that belongs to status; returns NULL. */
PyObject *kl_py_raise(kl_status status, const char *sentence);

/* Context type (context.c) */
typedef struct kl_py_context {
    PyObject_HEAD kl_ctx *ctx;
    PyThread_type_lock lock;
    _Atomic unsigned long owner; /* thread that holds the lock; 0: nobody */
} kl_py_context;
extern PyType_Spec kl_py_context_spec, kl_py_model_spec, kl_py_state_spec, kl_py_memory_spec;
kl_py_context *kl_py_context_of(PyObject *o); /* NULL with TypeError when it is none */

/* op wrappers, one table a family */
extern PyMethodDef kl_py_ops_basic[], kl_py_ops_delta[], kl_py_ops_dense[], kl_py_ops_kda[],
    kl_py_ops_mla[], kl_py_ops_quant[];

#endif
