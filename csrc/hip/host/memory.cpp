/* Device memory of the host build: apart from the host's, filled with NaN when it is new, between guard zones that
 * are looked at after every launch. A copy checks that its device side is device memory. Streams: streams.cpp. */
#include "settings.h"

#include <atomic>
#include <iterator>
#include <map>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>

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
std::map<uintptr_t, size_t> pinned; /* bytes by address */
/* guards of the call's arrays of scratch: bytes of the array before each, by address */
std::map<uintptr_t, size_t> scratch;
std::atomic<bool> broken;
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

bool is_pinned(const void *p)
{
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    const auto next = pinned.upper_bound(at);
    return next != pinned.begin() && at - std::prev(next)->first < std::prev(next)->second;
}

void guard_scratch(void *p, size_t n_bytes)
{
    if (p == nullptr)
        return;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(p), guard = begin + n_bytes;
    const std::lock_guard<std::mutex> hold(memory_lock());
    scratch.erase(scratch.lower_bound(begin), scratch.lower_bound(guard + GUARD_OF_SCRATCH));
    scratch[guard] = n_bytes;
    memset(p, 0xff, n_bytes < POISON_BYTES ? n_bytes : 0);
    memset(static_cast<unsigned char *>(p) + n_bytes, 0xff, GUARD_OF_SCRATCH);
}

void forget_scratch()
{
    const std::lock_guard<std::mutex> hold(memory_lock());
    scratch.clear();
}

const char *damaged_guard()
{
    for (auto &s : scratch) {
        unsigned char *guard = reinterpret_cast<unsigned char *>(s.first);
        if (is_whole(guard, GUARD_OF_SCRATCH))
            continue;
        memset(guard, 0xff, GUARD_OF_SCRATCH);
        snprintf(damage, sizeof damage, "it wrote past the end of scratch of %zu bytes", s.second);
        return damage;
    }
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
    if (const hipError_t error = check_device())
        return error;
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
    finish_all();
    const size_t n_bytes = found->second.n_bytes;
    scratch.erase(scratch.lower_bound(found->first), scratch.lower_bound(found->first + n_bytes));
    allocations.erase(found);
    all_bytes -= n_bytes;
    munmap(static_cast<unsigned char *>(p) - GUARD_BYTES, mapped_bytes(n_bytes));
    return hipSuccess;
}

hipError_t hipHostMalloc(void **p, size_t n_bytes)
{
    *p = malloc(n_bytes > 0 ? n_bytes : 1);
    if (*p == nullptr)
        return set_error(hipErrorOutOfMemory, "out of memory");
    const std::lock_guard<std::mutex> hold(memory_lock());
    pinned[reinterpret_cast<uintptr_t>(*p)] = n_bytes;
    return hipSuccess;
}

hipError_t hipHostFree(void *p)
{
    const std::lock_guard<std::mutex> hold(memory_lock());
    finish_all();
    pinned.erase(reinterpret_cast<uintptr_t>(p));
    free(p);
    return hipSuccess;
}

hipError_t kl_memory_at(const void *p, int *device, const char **begin, size_t *n_bytes)
{
    *device = -1;
    if (broken)
        return set_error(hipErrorLaunchFailure, "an earlier launch has failed");
    const std::lock_guard<std::mutex> hold(memory_lock());
    if (!is_device_memory(p, 1))
        return hipSuccess;
    const auto found = std::prev(allocations.upper_bound(reinterpret_cast<uintptr_t>(p)));
    *device = 0;
    *begin = reinterpret_cast<const char *>(found->first);
    *n_bytes = found->second.n_bytes > 0 ? found->second.n_bytes : 1;
    return hipSuccess;
}

/* what a test asks for: whether every question about an address fails, as after a kernel that has failed on a GPU */
extern "C" __attribute__((visibility("default"))) void kl_host_break(int yes) { broken = yes != 0; }

hipError_t hipMemGetInfo(size_t *free_bytes, size_t *total)
{
    struct sysinfo info;
    if (sysinfo(&info) != 0)
        return set_error(hipErrorInvalidValue, "sysinfo failed");
    *total = static_cast<size_t>(info.totalram) * info.mem_unit;
    *free_bytes = static_cast<size_t>(info.freeram) * info.mem_unit;
    return hipSuccess;
}
