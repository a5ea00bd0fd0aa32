/* The object behind _core.DeviceMemory. */
#ifndef KL_PY_DEVICE_MEMORY_H
#define KL_PY_DEVICE_MEMORY_H

#include "binding.h"

typedef struct kl_py_memory {
    PyObject_HEAD void *data;
    size_t n_bytes;
    int device_type, device_id; /* DLPack's; type 0: not known */
    bool owned;                 /* it is the context's, and freed with this object */
    bool read_only;
    /* owned: whose memory it is. Borrowed: the first context that has used it; NULL before */
    kl_py_context *context;
    /* borrowed: the stream whose work is waited for before it is read, and what keeps the memory */
    bool waits;
    void *stream;
    struct dl_managed *managed;
    PyObject *owner;
} kl_py_memory;

/* NULL with TypeError when it is none */
kl_py_memory *kl_py_memory_of(PyObject *o);

/* New memory of a context whose lock is held; NULL with the exception. */
kl_py_memory *kl_py_memory_new(kl_py_context *context, size_t n_bytes);

#endif
