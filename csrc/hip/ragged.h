/* Ragged batches on the device: offsets, places in sequences, and states by address. */
#ifndef KL_HIP_RAGGED_H
#define KL_HIP_RAGGED_H

#include "runtime.h"

/* Host values on the device: a table, or in scratch where they are many. */
template <class T>
static inline kl_status kl_put_table(kl_ctx *ctx, const T **to, const T *from, int64_t n)
{
    const size_t n_bytes = static_cast<size_t>(n) * sizeof *from;
    const void *there = nullptr;
    T *p = nullptr;
    if (n_bytes > KL_TABLE_MOST)
        KL_SCRATCH_OF(p, ctx, n);
    *to = p;
    if (kl_core_of->measuring(ctx) || n == 0)
        return KL_OK;
    if (p != nullptr)
        return kl_put(ctx, p, from, n_bytes);
    KL_TRY(kl_table(ctx, &there, from, n_bytes));
    *to = static_cast<const T *>(there);
    return KL_OK;
}

/* The same of n values that are made one by one: value(i). */
template <class T, class VALUE>
static inline kl_status kl_put_made(kl_ctx *ctx, const T **to, int64_t n, VALUE value)
{
    const int64_t AT_ONCE = KL_TABLE_MOST / sizeof(T);
    T made[AT_ONCE], *p = nullptr;
    if (n > AT_ONCE)
        KL_SCRATCH_OF(p, ctx, n);
    *to = p;
    for (int64_t first = 0; first < n && !kl_core_of->measuring(ctx); first += AT_ONCE) {
        const int64_t count = n - first < AT_ONCE ? n - first : AT_ONCE;
        for (int64_t i = 0; i < count; i++)
            made[i] = value(first + i);
        KL_TRY(p == nullptr
                   ? kl_put_table(ctx, to, made, count)
                   : kl_put(ctx, p + first, made, static_cast<size_t>(count) * sizeof *made));
    }
    return KL_OK;
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
