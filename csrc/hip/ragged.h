/* Ragged batches on the device: offsets, places in sequences, and states by address. */
#ifndef KL_HIP_RAGGED_H
#define KL_HIP_RAGGED_H

#include "runtime.h"

/* Host values to scratch of the device. */
template <class T>
static inline kl_status kl_put_table(kl_ctx *ctx, const T **to, const T *from, int64_t n)
{
    T *p;
    KL_SCRATCH_OF(p, ctx, n > 0 ? n : 1);
    *to = p;
    if (kl_core_of->measuring(ctx) || n == 0)
        return KL_OK;
    return kl_put(ctx, p, from, static_cast<size_t>(n) * sizeof *from);
}

/* kl_slots with its addresses on the device. */
struct kl_states {
    void *const *base; /* NULL: no state */
    size_t offset;
};
static inline kl_status kl_put_states(kl_ctx *ctx, kl_states *to, const kl_slots &from, int64_t N)
{
    *to = kl_states{ nullptr, from.offset };
    return from.base != nullptr ? kl_put_table(ctx, &to->base, from.base, N) : KL_OK;
}

/* of sequence n; NULL where there is no state */
static __device__ __forceinline__ float *kl_state_of(const kl_states &s, int64_t n)
{
    return s.base != nullptr ? reinterpret_cast<float *>(static_cast<char *>(s.base[n]) + s.offset)
                             : nullptr;
}

/* The sequence that token t is of: offsets [N + 1], t < offsets[N]. */
static __device__ __forceinline__ int64_t kl_sequence_of(const int64_t *offsets, int64_t N,
                                                         int64_t t)
{
    int64_t low = 0, high = N; /* offsets[low] <= t < offsets[high] */
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (offsets[middle] <= t)
            low = middle;
        else
            high = middle;
    }
    return low;
}

#endif
