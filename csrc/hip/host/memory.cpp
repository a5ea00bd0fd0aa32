/* Device memory of the host build: apart from the host's, filled with NaN when it is new, between guard zones that
 * are looked at after every launch. A copy checks that its device side is device memory. */
#include "settings.h"

#include <atomic>
#include <map>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <time.h>

namespace kl_host
{

namespace
{

enum : size_t {
    GUARD_BYTES = 4096,       /* on both sides of an allocation */
    CHECKED_BYTES = 256,      /* of them, next to it, are filled and looked at */
    POISON_BYTES = 256 << 20, /* larger memory is not filled when it is new */
};

struct allocation {
    size_t n_bytes;
};

std::map<uintptr_t, allocation> allocations; /* by address */
size_t all_bytes;
std::atomic<int64_t> waits; /* for a stream */
char damage[160];

size_t mapped_bytes(size_t n_bytes) { return 2 * GUARD_BYTES + (n_bytes + 4095) / 4096 * 4096; }

bool is_whole(const unsigned char *guard, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (guard[i] != 0xff)
            return false;
    return true;
}

} // namespace

bool is_device_memory(const void *p, size_t n_bytes)
{
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    auto next = allocations.upper_bound(at);
    if (next == allocations.begin())
        return false;
    --next;
    return at - next->first + n_bytes <= (next->second.n_bytes > 0 ? next->second.n_bytes : 1);
}

const char *damaged_guard()
{
    for (auto &a : allocations) {
        unsigned char *begin = reinterpret_cast<unsigned char *>(a.first),
                      *end = begin + a.second.n_bytes;
        const size_t n = size_t(CHECKED_BYTES);
        const bool before = !is_whole(begin - n, n), behind = !is_whole(end, n);
        if (!before && !behind)
            continue;
        memset(begin - n, 0xff, n);
        memset(end, 0xff, n);
        snprintf(damage, sizeof damage, "it wrote %s an allocation of %zu bytes",
                 behind ? "past the end of" : "before the begin of", a.second.n_bytes);
        return damage;
    }
    return nullptr;
}

} // namespace kl_host

using namespace kl_host;

hipError_t hipMalloc(void **p, size_t n_bytes)
{
    *p = nullptr;
    void *map = n_bytes > SIZE_MAX / 2
                    ? MAP_FAILED
                    : mmap(nullptr, mapped_bytes(n_bytes), PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED)
        return set_error(hipErrorOutOfMemory, "out of memory");
    unsigned char *begin = static_cast<unsigned char *>(map) + GUARD_BYTES;
    const size_t n = CHECKED_BYTES;
    memset(begin - n, 0xff, n + (n_bytes < POISON_BYTES ? n_bytes : 0));
    memset(begin + n_bytes, 0xff, n);
    const std::lock_guard<std::mutex> hold(memory_lock());
    allocations[reinterpret_cast<uintptr_t>(begin)] = allocation{ n_bytes };
    all_bytes += n_bytes;
    *p = begin;
    return hipSuccess;
}

hipError_t hipFree(void *p)
{
    if (p == nullptr)
        return hipSuccess;
    const std::lock_guard<std::mutex> hold(memory_lock());
    const auto found = allocations.find(reinterpret_cast<uintptr_t>(p));
    if (found == allocations.end())
        return set_error(hipErrorInvalidValue, "what is freed is no device memory");
    const size_t n_bytes = found->second.n_bytes;
    allocations.erase(found);
    all_bytes -= n_bytes;
    munmap(static_cast<unsigned char *>(p) - GUARD_BYTES, mapped_bytes(n_bytes));
    return hipSuccess;
}

hipError_t hipHostMalloc(void **p, size_t n_bytes)
{
    *p = malloc(n_bytes > 0 ? n_bytes : 1);
    return *p != nullptr ? hipSuccess : set_error(hipErrorOutOfMemory, "out of memory");
}

hipError_t hipHostFree(void *p)
{
    free(p);
    return hipSuccess;
}

int kl_memory_device(const void *p)
{
    const std::lock_guard<std::mutex> hold(memory_lock());
    return is_device_memory(p, 1) ? 0 : -1;
}

hipError_t hipMemGetInfo(size_t *free_bytes, size_t *total)
{
    struct sysinfo info;
    if (sysinfo(&info) != 0)
        return set_error(hipErrorInvalidValue, "sysinfo failed");
    *total = static_cast<size_t>(info.totalram) * info.mem_unit;
    *free_bytes = static_cast<size_t>(info.freeram) * info.mem_unit;
    return hipSuccess;
}

hipError_t hipMemcpyAsync(void *to, const void *from, size_t n_bytes, hipMemcpyKind kind,
                          hipStream_t)
{
    if (n_bytes == 0)
        return hipSuccess;
    const std::lock_guard<std::mutex> hold(memory_lock());
    if (kind != hipMemcpyDeviceToHost && !is_device_memory(to, n_bytes))
        return set_error(hipErrorInvalidValue, "a copy goes to what is no device memory");
    if (kind != hipMemcpyHostToDevice && !is_device_memory(from, n_bytes))
        return set_error(hipErrorInvalidValue, "a copy comes from what is no device memory");
    memmove(to, from, n_bytes);
    return hipSuccess;
}

hipError_t hipMemsetAsync(void *to, int value, size_t n_bytes, hipStream_t)
{
    if (n_bytes == 0)
        return hipSuccess;
    const std::lock_guard<std::mutex> hold(memory_lock());
    if (!is_device_memory(to, n_bytes))
        return set_error(hipErrorInvalidValue, "what is to be filled is no device memory");
    memset(to, value, n_bytes);
    return hipSuccess;
}

/* ---- one device; streams run in order, at once ---- */

struct kl_host_event {
    timespec at;
};

hipError_t hipGetDeviceCount(int *count)
{
    *count = 1;
    return hipSuccess;
}

hipError_t hipSetDevice(int device)
{
    return device == 0 ? hipSuccess
                       : set_error(hipErrorInvalidDevice, "the host build has one device, 0");
}

hipError_t hipStreamCreate(hipStream_t *stream)
{
    *stream = nullptr;
    return hipSuccess;
}

hipError_t hipStreamDestroy(hipStream_t) { return hipSuccess; }
hipError_t hipStreamSynchronize(hipStream_t)
{
    waits++;
    return hipSuccess;
}
/* how often a stream was waited for, so that a test can count */
extern "C" __attribute__((visibility("default"))) int64_t kl_host_waits() { return waits; }

hipError_t hipEventCreate(hipEvent_t *event)
{
    *event = new kl_host_event();
    return hipSuccess;
}

hipError_t hipEventDestroy(hipEvent_t event)
{
    delete event;
    return hipSuccess;
}

hipError_t hipEventRecord(hipEvent_t event, hipStream_t)
{
    clock_gettime(CLOCK_MONOTONIC, &event->at);
    return hipSuccess;
}

hipError_t hipEventSynchronize(hipEvent_t) { return hipSuccess; }

hipError_t hipEventElapsedTime(float *milliseconds, hipEvent_t from, hipEvent_t to)
{
    const double seconds = static_cast<double>(to->at.tv_sec - from->at.tv_sec)
                           + 1e-9 * static_cast<double>(to->at.tv_nsec - from->at.tv_nsec);
    *milliseconds = static_cast<float>(1e3 * seconds);
    return hipSuccess;
}
