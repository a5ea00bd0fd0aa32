/* Sums and maxima over the threads of a team or a block: the only home of shuffles.
 *
 * A team is KL_TEAM = 32 threads in a row, threadIdx.x / 32: it lies inside one wave on every GPU, whether a wave
 * has 32 lanes or 64, so that no kernel asks how wide a wave is and no sum depends on it. A sum is the tree that
 * adds neighbours, then pairs of neighbours, and so on: one order, the same bytes on every device.
 * Every thread of the block must make each call; every thread gets the result. */
#ifndef KL_HIP_REDUCE_H
#define KL_HIP_REDUCE_H

#include "kl_gpu.h"

enum { KL_CHAIN = 16 }; /* terms of a chain of fma, where a sum adds such chains */

#define KL_TEAM 32

static __device__ __forceinline__ int kl_team() { return static_cast<int>(threadIdx.x) / KL_TEAM; }
static __device__ __forceinline__ int kl_lane() { return static_cast<int>(threadIdx.x) % KL_TEAM; }

/* Orders what a team's threads wrote to shared memory before what they read from it after. */
static __device__ __forceinline__ void kl_team_barrier()
{
#if defined(__HIPCC__)
    __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
    __builtin_amdgcn_wave_barrier();
#elif defined(__CUDACC__)
    __syncwarp();
#else
    kl_host::wave_barrier(KL_TEAM, KL_HOST_SITE);
#endif
}

/* the larger; NaN when one is NaN */
static __device__ __forceinline__ float kl_larger(float a, float b)
{
    return a > b || a != a ? a : b;
}

struct kl_add_of {
    static __device__ __forceinline__ float of(float a, float b) { return a + b; }
    static __device__ __forceinline__ float none() { return 0.0f; }
};
struct kl_max_of {
    static __device__ __forceinline__ float of(float a, float b) { return kl_larger(a, b); }
    static __device__ __forceinline__ float none() { return -INFINITY; }
};

/* over the first `n` lanes' worth of neighbours: n a power of two up to KL_TEAM */
template <class OF> static __device__ __forceinline__ float kl_team_reduce(float v, int n = KL_TEAM)
{
    for (int m = 1; m < n; m *= 2)
        v = OF::of(v, __shfl_xor(v, m, KL_TEAM));
    return v;
}
static __device__ __forceinline__ float kl_team_sum(float v)
{
    return kl_team_reduce<kl_add_of>(v);
}
static __device__ __forceinline__ float kl_team_max(float v)
{
    return kl_team_reduce<kl_max_of>(v);
}

/* for whole numbers and double: the same tree; the least; and the sum over the lanes before this one */
template <class T> static __device__ __forceinline__ T kl_team_total(T v)
{
    for (int m = 1; m < KL_TEAM; m *= 2)
        v += __shfl_xor(v, m, KL_TEAM);
    return v;
}
template <class T> static __device__ __forceinline__ T kl_team_least(T v)
{
    for (int m = 1; m < KL_TEAM; m *= 2) {
        const T other = __shfl_xor(v, m, KL_TEAM);
        v = other < v ? other : v;
    }
    return v;
}
template <class T> static __device__ __forceinline__ T kl_team_before(T v)
{
    T sum = v;
    for (int m = 1; m < KL_TEAM; m *= 2) {
        const T other = __shfl_up(sum, m, KL_TEAM);
        if (kl_lane() >= m)
            sum += other;
    }
    return sum - v;
}

static __device__ __forceinline__ int32_t kl_team_least(int32_t v)
{
    for (int m = 1; m < KL_TEAM; m *= 2) {
        const int32_t other = __shfl_xor(v, m, KL_TEAM);
        v = other < v ? other : v;
    }
    return v;
}

/* A place with its value; the best is the one with the largest value, the first place of equals. */
struct kl_best {
    float value;
    int32_t at;
    __device__ __forceinline__ bool is_before(const kl_best &other) const
    {
        return value > other.value || (value == other.value && at < other.at);
    }
};
static __device__ __forceinline__ kl_best kl_team_best(kl_best b)
{
    for (int m = 1; m < KL_TEAM; m *= 2) {
        const kl_best other = { __shfl_xor(b.value, m, KL_TEAM), __shfl_xor(b.at, m, KL_TEAM) };
        if (other.is_before(b))
            b = other;
    }
    return b;
}

/* the value of the lane whose number differs in the bits of `mask` */
template <class T> static __device__ __forceinline__ T kl_team_swap(T v, int mask)
{
    return __shfl_xor(v, mask, KL_TEAM);
}

/* BLOCK threads, a power of two and a multiple of KL_TEAM; `shared` has BLOCK / KL_TEAM values, free for use again
 * after the call */
template <class OF, int BLOCK>
static __device__ __forceinline__ float kl_block_reduce(float v, kl_shared<float> shared)
{
    const int teams = BLOCK / KL_TEAM;
    static_assert(BLOCK % KL_TEAM == 0 && teams <= KL_TEAM && (teams & (teams - 1)) == 0,
                  "a block is 1, 2, 4 ... 32 teams");
    v = kl_team_reduce<OF>(v);
    if (teams == 1)
        return v;
    if (kl_forget(kl_lane()) == 0)
        shared[kl_team()] = v;
    __syncthreads();
    v = shared[kl_lane() % teams];
    __syncthreads();
    return kl_team_reduce<OF>(v, teams);
}
template <int BLOCK>
static __device__ __forceinline__ float kl_block_sum(float v, kl_shared<float> shared)
{
    return kl_block_reduce<kl_add_of, BLOCK>(v, shared);
}
template <int BLOCK>
static __device__ __forceinline__ float kl_block_max(float v, kl_shared<float> shared)
{
    return kl_block_reduce<kl_max_of, BLOCK>(v, shared);
}

#endif
