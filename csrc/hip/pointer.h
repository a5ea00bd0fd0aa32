/* What the runtime says of an address: kl_memory_at. The host build's is in host/memory.cpp. */
#ifndef KL_HIP_POINTER_H
#define KL_HIP_POINTER_H

#include "kl_gpu.h"

#if defined(__HIPCC__)

static inline bool kl_is_device_memory(const hipPointerAttribute_t &a)
{
#if HIP_VERSION_MAJOR >= 6
    return a.type == hipMemoryTypeDevice || a.type == hipMemoryTypeManaged;
#else
    return a.memoryType == hipMemoryTypeDevice;
#endif
}

static inline hipError_t kl_range_of(const char **begin, size_t *n_bytes, const void *p)
{
    hipDeviceptr_t base = nullptr;
    const hipError_t error = hipMemGetAddressRange(&base, n_bytes, const_cast<void *>(p));
    *begin = static_cast<const char *>(base);
    return error;
}

#elif defined(__CUDACC__)

#include <cudaTypedefs.h>

#define hipPointerAttribute_t cudaPointerAttributes
#define hipPointerGetAttributes cudaPointerGetAttributes
#define hipErrorInvalidValue cudaErrorInvalidValue
#define hipErrorNotFound cudaErrorSymbolNotFound

static inline bool kl_is_device_memory(const cudaPointerAttributes &a)
{
    return a.type == cudaMemoryTypeDevice || a.type == cudaMemoryTypeManaged;
}

/* The driver's alone has it, which is not linked: the runtime knows where it is. Error numbers of both are the same. */
static inline hipError_t kl_range_of(const char **begin, size_t *n_bytes, const void *p)
{
    void *entry = nullptr;
    CUdeviceptr base = 0;
#if CUDART_VERSION >= 12050
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", &entry, 3020,
                                                               cudaEnableDefault, &found);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuMemGetAddressRange", &entry, cudaEnableDefault);
#endif
    if (error != cudaSuccess || entry == nullptr)
        return error != cudaSuccess ? error : cudaErrorNotSupported;
    const CUresult result = reinterpret_cast<PFN_cuMemGetAddressRange_v3020>(entry)(
        &base, n_bytes, reinterpret_cast<CUdeviceptr>(p));
    *begin = reinterpret_cast<const char *>(base);
    return static_cast<cudaError_t>(result);
}

#endif

#if defined(__HIPCC__) || defined(__CUDACC__)
/* The allocation that p lies in, and the number of its device; -1: host memory, or none. */
static inline hipError_t kl_memory_at(const void *p, int *device, const char **begin,
                                      size_t *n_bytes)
{
    hipPointerAttribute_t a;
    *device = -1;
    hipError_t error = hipPointerGetAttributes(&a, p);
    const bool there = error == hipSuccess && kl_is_device_memory(a);
    if (there)
        error = kl_range_of(begin, n_bytes, p);
    if (there && error == hipSuccess)
        *device = a.device;
    if (error != hipErrorInvalidValue && error != hipErrorNotFound)
        return error;
    (void)hipGetLastError();
    return hipSuccess;
}
#endif

#endif
