/* A backend: the memory that arrays of numbers lie in, and the table of ops on them. The CPU's is part of the
 * library (cpu/backend.c); a GPU's is a library of its own, opened at run time (device.c, hip/backend.hip), which
 * sees nothing of the core but this file. Also C++. */
#ifndef KL_OPS_BACKEND_H
#define KL_OPS_BACKEND_H

#include "list.h"

/* Hands a failure on. */
#define KL_TRY(call)                                                                               \
    do {                                                                                           \
        const kl_status kl_try_status = (call);                                                    \
        if (kl_try_status != KL_OK)                                                                \
            return kl_try_status;                                                                  \
    } while (0)

static inline int64_t kl_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kl_backend {
    const char *name;
    int reads_host_memory; /* 1: weights are used where they lie; 0: they are uploaded */
    /* What a context has of its own on a device (a stream); NULL where there is nothing. open leaves a
     * sentence in the context when it fails. */
    kl_status (*open)(kl_ctx *ctx, int device, void **handle);
    void (*close)(kl_ctx *ctx, void *handle);
    /* memory of the backend, 64-byte aligned; NULL when there is none left */
    void *(*allocate)(kl_ctx *ctx, size_t n_bytes);
    void (*release)(kl_ctx *ctx, void *p, size_t n_bytes);
    /* copies between its memory and the host's, in order with the ops; host memory may be changed or
     * freed when the call returns */
    kl_status (*upload)(kl_ctx *ctx, void *to, const void *from, size_t n_bytes);
    kl_status (*download)(kl_ctx *ctx, void *to, const void *from, size_t n_bytes);
    kl_status (*copy)(kl_ctx *ctx, void *to, const void *from, size_t n_bytes);
    kl_status (*clear)(kl_ctx *ctx, void *to, size_t n_bytes);
    /* as upload, but the copy may be under way when it returns; the host memory is the caller's again */
    kl_status (*stage)(kl_ctx *ctx, void *to, const void *from, size_t n_bytes);
    /* The rest is of devices only; the CPU's are NULL. */
    /* the context's stream; and until a stream has done its work. Of its own stream: also what kernels noted */
    void *(*stream)(const kl_ctx *ctx);
    kl_status (*wait)(kl_ctx *ctx, void *stream);
    /* memory of others: DLPack's type and number of the device; a failure, whose sentence begins with `name`, where
     * the bytes are not memory of it */
    void (*where)(const kl_ctx *ctx, int *type, int *number);
    kl_status (*has)(kl_ctx *ctx, const char *name, const void *p, size_t n_bytes);
    /* seconds on the device since the last call, which waits; 0 the first time */
    kl_status (*tick)(kl_ctx *ctx, double *seconds);
    /* what the device gives at most: kl_roof_read (data in its memory), kl_roof_fma */
    kl_status (*roof_read)(kl_ctx *ctx, const void *data, int64_t n_bytes, double *rate);
    kl_status (*roof_fma)(kl_ctx *ctx, double *rate);
#define KL_OP(name, parameters) kl_status(*name) parameters;
    KL_OPS(KL_OP)
#undef KL_OP
} kl_backend;

/* What the core gives a backend in a library of its own. */
typedef struct kl_core {
    /* leaves the sentence in the context, returns the status */
    kl_status (*fail)(kl_ctx *ctx, kl_status status, const char *format, ...);
    /* of the backend's memory, from the context's arena: internal.h */
    kl_status (*scratch)(kl_ctx *ctx, void **p, size_t n_bytes);
    size_t (*scratch_mark)(const kl_ctx *ctx);
    void (*scratch_reset)(kl_ctx *ctx, size_t mark);
    /* the context is measuring: scratch is counted, nothing is computed */
    int (*measuring)(const kl_ctx *ctx);
    void *(*handle)(const kl_ctx *ctx); /* what open made */
    kl_activations (*activations)(const kl_ctx *ctx);
    kl_form (*delta_rule)(const kl_ctx *ctx); /* of a call that says auto */
    /* counts an allocation; 1: a test wants this one to fail */
    int (*allocation_fails)(kl_ctx *ctx);
} kl_core;

/* What such a library exports. `core` stays valid. Version and size are of the headers that the library was compiled
 * with, KL_VERSION and KL_BACKEND_BYTES: one that differs from the core's is refused. */
#define KL_BACKEND_BYTES (sizeof(kl_backend) + sizeof(kl_core))
typedef struct kl_device_library {
    const char *version;
    size_t backend_bytes;
    const kl_backend *backend;
    int (*count)(char *reason, size_t n);            /* devices; 0: the reason, a sentence */
    int (*describe)(int device, kl_device_info *to); /* 0: it could not */
} kl_device_library;
typedef const kl_device_library *kl_hip_library_fn(const kl_core *core);
#define KL_HIP_LIBRARY "kl_hip_library"

#ifdef __cplusplus
}
#endif
#endif
