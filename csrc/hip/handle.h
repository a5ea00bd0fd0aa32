/* What a context has on its device: for backend.hip, upload.hip and notes.hip alone. */
#ifndef KL_HIP_HANDLE_H
#define KL_HIP_HANDLE_H

#include "runtime.h"

/* Host memory that the device copies from by itself, and when it has. */
struct kl_pinned {
    void *data;
    hipEvent_t copied;
};

struct kl_tables; /* upload.hip */

enum { KL_PUTS = 4 };

struct kl_handle {
    int device;
    hipStream_t stream;
    hipEvent_t mark; /* of tick; NULL before the first */
    /* upload.hip */
    kl_pinned staging[2];    /* of large uploads, taken in turns; NULL until there is one */
    int turn;                /* the one that is taken next */
    kl_pinned puts[KL_PUTS]; /* of tables and control data, taken in turns */
    int put;                 /* the one that is being filled, */
    size_t put_bytes;        /* and how far */
    kl_tables *tables;
    /* notes.hip */
    unsigned long long *faults; /* [KL_FAULTS] place << 32 | bits; all bits: none */
    bool noting;                /* kernels that may note were launched since they were looked at */
    int64_t E, k;               /* of the call that they belong to */
    int64_t select_width;       /* entries of a row of select, in the last call with one */
    struct {
        const char *what;
        int64_t D;
        kl_type type;
    } caches[KL_CACHES]; /* that may have been noted since, */
    int n_caches;        /* and how many */
};

static inline kl_handle *kl_handle_of(const kl_ctx *ctx)
{
    return static_cast<kl_handle *>(kl_core_of->handle(ctx));
}

/* backend.hip: the sentence of an error of the runtime; a copy and a wait in the stream */
kl_status kl_check(kl_ctx *ctx, const char *what, hipError_t error) KL_CHECKED;
kl_status kl_move(kl_ctx *ctx, const char *what, void *to, const void *from, size_t n_bytes,
                  hipMemcpyKind kind) KL_CHECKED;
kl_status kl_wait(kl_ctx *ctx, const char *what) KL_CHECKED;

/* upload.hip: what kl_backend says of upload and stage, and what a handle has for them */
kl_status kl_upload(kl_ctx *ctx, void *to, const void *from, size_t n_bytes) KL_CHECKED;
kl_status kl_stage(kl_ctx *ctx, void *to, const void *from, size_t n_bytes) KL_CHECKED;
kl_status kl_open_uploads(kl_ctx *ctx, kl_handle *h) KL_CHECKED;
void kl_close_uploads(kl_handle *h);

/* notes.hip: the sentence of what kernels have noted since the last look, once */
kl_status kl_open_notes(kl_ctx *ctx, kl_handle *h) KL_CHECKED;
void kl_close_notes(kl_handle *h);
kl_status kl_look_at_notes(kl_ctx *ctx) KL_CHECKED;

#endif
