/* One spelling, HIP's, for three compilers: hipcc (AMD), nvcc (NVIDIA: names are mapped here), and a C++
 * compiler (hip/host/ runs blocks and threads on the CPU). docs/hip.md tells how kernels are written.
 *
 * What differs from plain HIP, so that the host build can check it:
 *     KL_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)    parentheses around a<b, c>
 *     KL_SHARED(float, tile, [M][N]);               __shared__ float tile[M][N]
 *     KL_DYNAMIC_SHARED(float, values);             the launch's shared_bytes, as float values[]
 *     kl_shared<float> p                            a pointer into shared memory, as a parameter
 *     KL_UNROLL                                     before a loop whose index names registers
 *     KL_NO_UNROLL                                  before a loop whose body takes many
 *     kl_forget(v)                                  v; what is computed from it is computed here
 * An element of shared memory is read into a variable of a named type, never into `auto`. */
#ifndef KL_GPU_H
#define KL_GPU_H

#include <stddef.h>
#include <stdint.h>

#if defined(__HIPCC__)

#include <hip/hip_runtime.h>
#define KL_GPU_PLATFORM "amd"
#define KL_GPU_BUILD "make hip AMD_ARCHS="
#define KL_DLPACK_DEVICE 10 /* DLPack: kDLROCM */

#elif defined(__CUDACC__)

#include <cuda_runtime.h>
#define KL_GPU_PLATFORM "nvidia"
#define KL_GPU_BUILD "make hip-nvidia NVIDIA_ARCHS="
#define KL_DLPACK_DEVICE 2 /* kDLCUDA */

#define hipError_t cudaError_t
#define hipSuccess cudaSuccess
#define hipErrorOutOfMemory cudaErrorMemoryAllocation
#define hipErrorInvalidDeviceFunction cudaErrorInvalidDeviceFunction
#define hipErrorNoBinaryForGpu cudaErrorNoKernelImageForDevice
#define hipGetLastError cudaGetLastError
#define hipGetErrorString cudaGetErrorString
#define hipGetDeviceCount cudaGetDeviceCount
#define hipGetDevice cudaGetDevice
#define hipSetDevice cudaSetDevice
#define hipDeviceProp_t cudaDeviceProp
#define hipGetDeviceProperties cudaGetDeviceProperties
#define hipFuncAttributes cudaFuncAttributes
#define hipFuncGetAttributes cudaFuncGetAttributes
#define hipMemGetInfo cudaMemGetInfo
#define hipMalloc cudaMalloc
#define hipFree cudaFree
#define hipHostMalloc cudaMallocHost
#define hipHostFree cudaFreeHost
#define hipMemcpyAsync cudaMemcpyAsync
#define hipMemcpyKind cudaMemcpyKind
#define hipMemcpyHostToDevice cudaMemcpyHostToDevice
#define hipMemcpyDeviceToHost cudaMemcpyDeviceToHost
#define hipMemcpyDeviceToDevice cudaMemcpyDeviceToDevice
#define hipMemsetAsync cudaMemsetAsync
#define hipStream_t cudaStream_t
#define hipStreamCreate cudaStreamCreate
#define hipStreamDestroy cudaStreamDestroy
#define hipStreamSynchronize cudaStreamSynchronize
#define hipEvent_t cudaEvent_t
#define hipEventCreate cudaEventCreate
#define hipEventDestroy cudaEventDestroy
#define hipEventRecord cudaEventRecord
#define hipEventSynchronize cudaEventSynchronize
#define hipEventElapsedTime cudaEventElapsedTime

#define __shfl(value, lane, width) __shfl_sync(0xffffffffu, value, lane, width)
#define __shfl_xor(value, mask, width) __shfl_xor_sync(0xffffffffu, value, mask, width)
#define __shfl_up(value, delta, width) __shfl_up_sync(0xffffffffu, value, delta, width)
#define __shfl_down(value, delta, width) __shfl_down_sync(0xffffffffu, value, delta, width)

#else

#include "host/gpu.h"
#define KL_GPU_PLATFORM "host"
#define KL_GPU_BUILD "make hip-host HOST_ARCHS=" /* there is no such: a test alone sees it */
#define KL_DLPACK_DEVICE 12                      /* kDLExtDev */

#endif

#if defined(__HIPCC__) || defined(__CUDACC__)

#define KL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                  \
    kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
#define KL_SHARED(type, name, extents) __shared__ __align__(16) type name extents
#define KL_DYNAMIC_SHARED(type, name)                                                              \
    extern __shared__ __align__(16) unsigned char kl_dynamic_shared[];                             \
    type *name = reinterpret_cast<type *>(kl_dynamic_shared)
template <class T> using kl_shared = T *;
#define KL_UNROLL _Pragma("unroll")
#define KL_NO_UNROLL _Pragma("unroll 1")
#else
#define KL_UNROLL
#define KL_NO_UNROLL

#endif

/* v, of which the compiler forgets what it knew: what is computed from it is computed here, anew, and not kept in
 * registers from before a loop (docs/hip.md#registers). It costs no instruction. */
static __device__ __forceinline__ int kl_forget(int v)
{
#if defined(__HIP_DEVICE_COMPILE__)
    asm volatile("" : "+v"(v));
#elif defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(v));
#endif
    return v;
}
/* the same for what is one value for the block */
template <class T> static __device__ __forceinline__ const T *kl_forget(const T *p)
{
#if defined(__HIP_DEVICE_COMPILE__)
    asm volatile("" : "+s"(p));
#elif defined(__CUDA_ARCH__)
    asm volatile("" : "+l"(p));
#endif
    return p;
}

/* p, of which the compiler learns that it is no shared memory: an address that was itself read could be any. */
template <class T> static __device__ __forceinline__ T *kl_global(T *p)
{
#if defined(__HIP_DEVICE_COMPILE__)
    typedef __attribute__((address_space(1))) T *in_global;
    return (T *)(in_global) reinterpret_cast<uintptr_t>(p);
#elif defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(p));
#endif
    return p;
}

/* GPUs without an instruction for it: Vega 10 and what is made of it, the first of RDNA, NVIDIA's before sm_61 */
#if defined(__GFX8__) || defined(__gfx900__) || defined(__gfx902__) || defined(__gfx904__)         \
    || defined(__gfx909__) || defined(__gfx90c__) || defined(__gfx1010__) || defined(__gfx1013__)  \
    || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 610)
#define KL_NO_DOT4
#endif

/* sum + the products of four bytes of a with those of b, signed */
static __device__ __forceinline__ int32_t kl_dot4(uint32_t a, uint32_t b, int32_t sum)
{
#if defined(__HIP_DEVICE_COMPILE__) && (defined(__GFX11__) || defined(__GFX12__))
    return __builtin_amdgcn_sudot4(true, static_cast<int>(a), true, static_cast<int>(b), sum,
                                   false);
#elif defined(__HIP_DEVICE_COMPILE__) && !defined(KL_NO_DOT4)
    return __builtin_amdgcn_sdot4(static_cast<int>(a), static_cast<int>(b), sum, false);
#elif defined(__CUDA_ARCH__) && !defined(KL_NO_DOT4)
    return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
#else
    for (int i = 0; i < 32; i += 8)
        sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
    return sum;
#endif
}

/* Byte i of it: byte `nibble i of which` of eight, those of low, then those of high. Nibbles are below 8. */
static __device__ __forceinline__ uint32_t kl_bytes_of(uint32_t low, uint32_t high, uint32_t which)
{
#if defined(__CUDA_ARCH__)
    return __byte_perm(low, high, which);
#else
    const uint64_t all = static_cast<uint64_t>(high) << 32 | low;
    uint32_t picked = 0;
    for (int i = 0; i < 4; i++)
        picked |= static_cast<uint32_t>(all >> 8 * (which >> 4 * i & 7u) & 255u) << 8 * i;
    return picked;
#endif
}

/* byte i of it: byte at[i] of `table`, at[i] below 8 */
static __device__ __forceinline__ uint32_t kl_pick4(uint64_t table, uint32_t at)
{
    const auto low = static_cast<uint32_t>(table), high = static_cast<uint32_t>(table >> 32);
#if defined(__HIP_DEVICE_COMPILE__)
    return __builtin_amdgcn_perm(high, low, at);
#else
    at |= at >> 4; /* a nibble each, in the lower half */
    return kl_bytes_of(low, high, (at & 0xffu) | (at >> 8 & 0xff00u));
#endif
}

#endif
