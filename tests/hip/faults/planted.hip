/* Copies of a block sum, each with one fault that kernels really have. y[i] = the sum of x[0..BLOCK) in every thread.
 * `sound` has none. kl_fault_run launches one by name: the host build must name the fault or, for the two that only
 * compute something else, the result must be wrong. */
#include "kl_gpu.h"
#include "reduce.h"

#include <stdio.h>
#include <string.h>

namespace
{

const int BLOCK = 128;

/* ---- without a fault ---- */

__global__ void sound(float *y, const float *x)
{
    KL_SHARED(float, s, [BLOCK]);
    const int i = static_cast<int>(threadIdx.x);
    s[i] = x[i];
    __syncthreads();
    for (int half = BLOCK / 2; half > 0; half /= 2) {
        if (i < half)
            s[i] += s[i + half];
        __syncthreads();
    }
    y[i] = s[0];
}

__global__ void sound_with_teams(float *y, const float *x)
{
    KL_SHARED(float, s, [BLOCK / KL_TEAM]);
    y[threadIdx.x] = kl_block_sum<BLOCK>(x[threadIdx.x], s);
}

__global__ void sound_with_team_barriers(float *y, const float *x)
{
    KL_SHARED(float, s, [BLOCK]);
    const int i = static_cast<int>(threadIdx.x), first = i - kl_lane();
    float sum = 0.0f;
    s[i] = x[i];
    kl_team_barrier();
    for (int j = 0; j < KL_TEAM; j++)
        sum += s[first + j];
    kl_team_barrier();
    s[i] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int j = 0; j < BLOCK; j += KL_TEAM)
        sum += s[j];
    y[i] = sum;
}

__global__ void sound_with_atomics(float *y, const float *x)
{
    KL_SHARED(float, s, [1]);
    if (threadIdx.x == 0)
        s[0] = 0.0f;
    __syncthreads();
    atomicAdd(&s[0], x[threadIdx.x]);
    __syncthreads();
    y[threadIdx.x] = s[0];
}

/* ---- a fault each ---- */

__global__ void missing_barrier(float *y, const float *x)
{
    KL_SHARED(float, s, [BLOCK]);
    const int i = static_cast<int>(threadIdx.x);
    s[i] = x[i];
    for (int half = BLOCK / 2; half > 0; half /= 2) { /* none before the first step */
        if (i < half)
            s[i] += s[i + half];
        __syncthreads();
    }
    y[i] = s[0];
}

__global__ void reused_too_soon(float *y, const float *x)
{
    KL_SHARED(float, s, [BLOCK]);
    const int i = static_cast<int>(threadIdx.x);
    float sum = 0.0f;
    for (int round = 0; round < 2; round++) {
        s[i] = (round == 0 ? 0.25f : 0.75f) * x[i];
        __syncthreads();
        for (int j = 0; j < BLOCK; j++)
            sum += s[j]; /* none behind, before the next round writes */
    }
    y[i] = sum;
}

__global__ void lock_step(float *y, const float *x)
{
    KL_SHARED(float, s, [BLOCK]);
    const int i = static_cast<int>(threadIdx.x);
    s[i] = x[i];
    __syncthreads();
    for (int half = BLOCK / 2; half > 0; half /= 2) {
        if (i < half)
            s[i] += s[i + half];
        if (half > KL_TEAM) /* "a wave needs no barrier" */
            __syncthreads();
    }
    __syncthreads();
    y[i] = s[0];
}

__global__ void wrong_mask(float *y, const float *x)
{
    float v = x[threadIdx.x];
    for (int m = 1; m <= KL_TEAM; m *= 2) /* one step too many: lane 32 of 32 */
        v += __shfl_xor(v, m, KL_TEAM);
    y[threadIdx.x] = v;
}

__global__ void past_the_end(float *y, const float *x)
{
    KL_SHARED(float, s, [BLOCK]);
    const int i = static_cast<int>(threadIdx.x);
    s[i] = x[i];
    __syncthreads();
    float sum = 0.0f;
    for (int j = 0; j <= BLOCK; j++)
        sum += s[j];
    y[i] = sum;
}

__global__ void past_the_dynamic_end(float *y, const float *x)
{
    KL_DYNAMIC_SHARED(float, s);
    s[threadIdx.x] = x[threadIdx.x]; /* launched with room for all but one */
    __syncthreads();
    y[threadIdx.x] = s[0];
}

__global__ void divergent_barrier(float *y, const float *x)
{
    if (x[threadIdx.x] > 0.5f)
        __syncthreads();
    else
        __syncthreads();
    y[threadIdx.x] = x[threadIdx.x];
}

__global__ void early_return(float *y, const float *x)
{
    KL_SHARED(float, s, [BLOCK]);
    const int i = static_cast<int>(threadIdx.x);
    if (i == BLOCK - 1)
        return;
    s[i] = x[i];
    __syncthreads();
    y[i] = s[0];
}

__global__ void shuffle_in_a_branch(float *y, const float *x)
{
    float v = x[threadIdx.x];
    if (kl_lane() < KL_TEAM / 2)
        v += __shfl_xor(v, 1, KL_TEAM);
    y[threadIdx.x] = v;
}

__global__ void never_written(float *y, const float *x)
{
    KL_SHARED(float, s, [BLOCK]);
    const int i = static_cast<int>(threadIdx.x);
    if (i % 2 == 0)
        s[i] = x[i];
    __syncthreads();
    float sum = 0.0f;
    for (int j = 0; j < BLOCK; j++)
        sum += s[j];
    y[i] = sum;
}

__global__ void two_writers(float *y, const float *x)
{
    KL_SHARED(float, s, [BLOCK]);
    const int i = static_cast<int>(threadIdx.x);
    s[i / 2] = x[i];
    __syncthreads();
    y[i] = s[i / 2];
}

__global__ void past_the_output(float *y, const float *x)
{
    y[threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x == 0)
        y[BLOCK] = x[0];
}

/* y lies in scratch, as its guard says: a value past it stays in the allocation */
__global__ void past_the_scratch(float *y, const float *x)
{
    y[threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x == 0)
        y[BLOCK] = x[0];
}

/* what scratch held before was zero */
__global__ void stale_scratch(float *y, const float *x)
{
    float sum = 0.0f;
    for (int j = 0; j < BLOCK; j++)
        sum += x[j];
    y[threadIdx.x] += sum;
}

/* a wave is taken to have 32 lanes: right by chance on those that have */
__global__ void wave_of_32(float *y, const float *x)
{
    KL_SHARED(float, s, [BLOCK / 32]);
    float v = x[threadIdx.x];
    for (int m = 1; m < 32; m *= 2)
        v += __shfl_xor(v, m, warpSize);
    if (threadIdx.x % static_cast<unsigned>(warpSize)
        == 0) /* wave leaders: fewer than BLOCK / 32 of them on 64 */
        s[threadIdx.x / static_cast<unsigned>(warpSize)] = v;
    __syncthreads();
    float sum = 0.0f;
    for (int j = 0; j < BLOCK / warpSize; j++)
        sum += s[j];
    y[threadIdx.x] = sum;
}

/* only the first half of the tree: nothing that a device forbids, and the wrong sum */
__global__ void half_a_tree(float *y, const float *x)
{
    KL_SHARED(float, s, [BLOCK / KL_TEAM]);
    float v = x[threadIdx.x];
    for (int m = 1; m < KL_TEAM / 2; m *= 2)
        v += __shfl_xor(v, m, KL_TEAM);
    if (kl_lane() == 0)
        s[kl_team()] = v;
    __syncthreads();
    float sum = 0.0f;
    for (int j = 0; j < BLOCK / KL_TEAM; j++)
        sum += s[j];
    y[threadIdx.x] = sum;
}

/* a pointer of the host's: `x` was not uploaded */
__global__ void host_pointer(float *y, const float *x) { y[threadIdx.x] = x[threadIdx.x]; }

/* arrays in a struct, behind whose last member lies what lay there before; where it is `x`, a pointer of the host's */
struct arrays {
    int64_t n;
    const float *x;
    float *y;
    bool twice;
};
__global__ void sum_of(arrays a)
{
    KL_SHARED(float, s, [BLOCK / KL_TEAM]);
    a.y[threadIdx.x] = kl_block_sum<BLOCK>(a.x[threadIdx.x], s);
}

typedef void kernel(float *y, const float *x);
const struct {
    const char *name;
    kernel *launch;
} planted[] = {
#define PLANTED(name) { #name, name }
    PLANTED(sound),
    PLANTED(sound_with_teams),
    PLANTED(sound_with_team_barriers),
    PLANTED(sound_with_atomics),
    PLANTED(missing_barrier),
    PLANTED(reused_too_soon),
    PLANTED(lock_step),
    PLANTED(wrong_mask),
    PLANTED(past_the_end),
    PLANTED(past_the_dynamic_end),
    PLANTED(divergent_barrier),
    PLANTED(early_return),
    PLANTED(shuffle_in_a_branch),
    PLANTED(never_written),
    PLANTED(two_writers),
    PLANTED(past_the_output),
    PLANTED(past_the_scratch),
    PLANTED(stale_scratch),
    PLANTED(wave_of_32),
    PLANTED(half_a_tree),
    PLANTED(host_pointer),
    /* NULL: sum_of */
    { "host_pointer_in_a_struct", nullptr },
    { "sound_with_a_struct", nullptr },
#undef PLANTED
};

} // namespace

/* 0: the sum is right; 1: the launch failed, with its sentence; 2: the sum is wrong; -1: no such kernel */
extern "C" __attribute__((visibility("default"))) int kl_fault_run(const char *name, char *sentence,
                                                                   size_t n)
{
    float x[BLOCK], y[BLOCK], sum = 0.0f, *device_x, *device_y;
    void *p, *q;
    const bool in_scratch = strstr(name, "scratch") != nullptr;
    const auto *k = planted;
    while (k < planted + sizeof planted / sizeof *planted && strcmp(k->name, name) != 0)
        k++;
    if (k == planted + sizeof planted / sizeof *planted || hipMalloc(&p, sizeof x) != hipSuccess
        || hipMalloc(&q, sizeof y + (in_scratch ? size_t(kl_host::GUARD_OF_SCRATCH) : 0))
               != hipSuccess)
        return -1;
    (void)hipMemsetAsync(q, 0, sizeof y, nullptr);
    if (in_scratch)
        kl_host::guard_scratch(q, sizeof y);
    device_x = static_cast<float *>(p);
    device_y = static_cast<float *>(q);
    for (int i = 0; i < BLOCK; i++) {
        x[i] = static_cast<float>(i % 7); /* sums are exact: the order changes none */
        sum += x[i];
    }
    (void)hipMemcpyAsync(device_x, x, sizeof x, hipMemcpyHostToDevice, nullptr);
    const float *given = strncmp(name, "host_pointer", strlen("host_pointer")) == 0 ? x : device_x;
    if (k->launch != nullptr) {
        kl_host::launch(name, k->launch, 3, BLOCK, (BLOCK - 1) * sizeof(float), nullptr, device_y,
                        given);
    } else {
        arrays a = { BLOCK, given, device_y, false };
        const float *stale = x;
        memcpy(&a.twice + 1, reinterpret_cast<const char *>(&stale) + 1, sizeof stale - 1);
        kl_host::launch(name, sum_of, 3, BLOCK, 0, nullptr, a);
    }
    const hipError_t error = hipGetLastError();
    snprintf(sentence, n, "%s", hipGetErrorString(error));
    (void)hipMemcpyAsync(y, device_y, sizeof y, hipMemcpyDeviceToHost, nullptr);
    int result = error == hipSuccess ? 0 : 1;
    for (int i = 0; i < BLOCK && result != 1; i++)
        if (!(y[i] == sum))
            result = 2;
    kl_host::forget_scratch();
    (void)hipFree(p);
    (void)hipFree(q);
    return result;
}
