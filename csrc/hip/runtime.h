/* The host side of a HIP op: what its launcher needs. An op is `kl_status hip_<op>(...)`, with the parameters of
 * ops/list.h: arguments are checked already (ops/<op>.c), pointers to numbers are device memory, tables of pointers
 * and control data are host memory. It takes scratch by KL_SCRATCH_OF, returns KL_OK if the context is only measuring,
 * launches on the context's stream, and ends with `return kl_launched(ctx, "<op>")`. It allocates nothing and does
 * not wait. */
#ifndef KL_HIP_RUNTIME_H
#define KL_HIP_RUNTIME_H

#include "../ops/backend.h"
#include "kl_gpu.h"

#include <stdlib.h>

#define KL_OP(name, parameters) kl_status hip_##name parameters;
KL_OPS(KL_OP)
#undef KL_OP

extern const kl_core *kl_core_of; /* the core's functions */

/* The host build fills each array of scratch with NaN and has a guard behind it; kl_call_ends: of the op's. */
#if defined(__HIPCC__) || defined(__CUDACC__)
enum { KL_SCRATCH_GUARD = 0 };
static inline void kl_scratch_taken(void *, size_t) {}
static inline void kl_call_ends() {}
#else
enum { KL_SCRATCH_GUARD = kl_host::GUARD_OF_SCRATCH };
static inline void kl_scratch_taken(void *p, size_t n_bytes) { kl_host::guard_scratch(p, n_bytes); }
static inline void kl_call_ends() { kl_host::forget_scratch(); }
#endif

/* n values of *pointer's type in device memory */
#define KL_SCRATCH_OF(pointer, ctx, n)                                                             \
    do {                                                                                           \
        void *kl_p = nullptr;                                                                      \
        const size_t kl_bytes = static_cast<size_t>(n) * sizeof *(pointer);                        \
        KL_TRY(kl_core_of->scratch((ctx), &kl_p, kl_bytes + KL_SCRATCH_GUARD));                    \
        kl_scratch_taken(kl_p, kl_bytes);                                                          \
        (pointer) = static_cast<decltype(pointer)>(kl_p);                                          \
    } while (0)

hipStream_t kl_stream(kl_ctx *ctx);

/* The sentence of a failed launch of `op`; with KL_GPU_SYNC=1 it waits first, so that the op that failed is named. */
kl_status kl_launched(kl_ctx *ctx, const char *op) KL_CHECKED;

/* The failure of a storage type that has no kernels. */
kl_status kl_no_type(kl_ctx *ctx, const char *op, const char *name, kl_type type);

/* Host values, the caller's again when it returns, to device memory, in order with the launches; and back, when all before
 * is done. */
kl_status kl_put(kl_ctx *ctx, void *to, const void *from, size_t n_bytes) KL_CHECKED;
kl_status kl_get(kl_ctx *ctx, void *to, const void *from, size_t n_bytes) KL_CHECKED;
/* The same values on the device, up to KL_TABLE_MOST bytes, to be read by what this call of an op launches. Bytes that are
 * there from an earlier call are not copied again: offsets, addresses and positions are the same in each layer, and most
 * of them in each decoded token. */
enum { KL_TABLE_MOST = 16 << 10 };
kl_status kl_table(kl_ctx *ctx, const void **to, const void *from, size_t n_bytes) KL_CHECKED;

/* Wrong values that only the device sees. A kernel notes the first of them (kl_note), goes on with something that stays
 * inside its arrays, and the next copy to the host fails with the sentence: no op waits for its own check. */
enum kl_fault {
    KL_FAULT_CACHE, /* of up to KL_CACHES caches; first, because what they store spoils what comes after */
    KL_CACHES = 4,
    KL_FAULT_SCORES = KL_FAULT_CACHE + KL_CACHES,
    KL_FAULT_BIAS,
    KL_FAULT_ROUTE_IDS,
    KL_FAULT_MOE_IDS,
    KL_FAULT_SELECT,
    KL_FAULTS
};
/* Where the kernels of a call note: [KL_FAULTS]. Rows of scores are E wide, those of ids k. */
kl_status kl_faults_of(kl_ctx *ctx, unsigned long long **faults, int64_t E, int64_t k) KL_CHECKED;
/* Where what is wrong in rows of select, `width` entries each, is noted. */
kl_status kl_select_fault_of(kl_ctx *ctx, unsigned long long **fault, int64_t width) KL_CHECKED;
/* Where what a cache cannot hold is noted, of `what`, "op: array", whose rows are D wide: a constant. */
kl_status kl_cache_fault_of(kl_ctx *ctx, unsigned long long **fault, const char *what, int64_t D,
                            kl_type type) KL_CHECKED;

/* The highest version of a ladder that may be launched: KL_GPU_VERSION, by which a test runs the oracles. */
int kl_version();

/* Whether the library has code for the calling thread's device (roof.hip). */
hipError_t kl_look_for_code();

/* What the device gives at most (roof.hip); they wait. */
kl_status hip_roof_read(kl_ctx *ctx, const void *data, int64_t n_bytes, double *rate) KL_CHECKED;
kl_status hip_roof_fma(kl_ctx *ctx, double *rate) KL_CHECKED;

/* Blocks for n tasks: kernels walk over tasks by gridDim.x, so that any number of them fits a grid. KL_GPU_BLOCKS makes
 * grids smaller, by which a test has every kernel walk. */
static inline unsigned kl_grid(int64_t n)
{
    const char *text = getenv("KL_GPU_BLOCKS");
    const int64_t most = text != nullptr && *text != 0 ? strtol(text, nullptr, 10) : 65535;
    return static_cast<unsigned>(n < most ? n : most);
}

#endif
