/* Devices, streams, events and copies of the host build. Work is done at once, but for copies from pinned memory: such a
 * copy is late, and made when its stream, or an event behind it, is waited for, or when its stream does its next work.
 * So what does not wait reads what was there before. */
#include "settings.h"

#include <atomic>
#include <deque>
#include <set>
#include <time.h>

struct kl_host_stream {
    struct copy {
        void *to;
        const void *from;
        size_t n_bytes;
    };
    std::deque<copy> late;
    uint64_t made = 0; /* late copies, since it is there */
};

struct kl_host_event {
    timespec at;
    hipStream_t stream;
    uint64_t behind; /* this many late copies of the stream */
};

namespace
{

const int DEVICE = 0, OTHER = 1; /* a thread's device may be the other: nothing can be done on it */
thread_local int current;
std::set<hipStream_t> streams;
kl_host_stream default_stream;
std::atomic<int64_t> waits, pageable, copies;
std::atomic<int> wait_ms;

/* The handles NULL, 1 and 2 are the default stream; NULL: none that is there. */
kl_host_stream *stream_of(hipStream_t handle)
{
    if (reinterpret_cast<uintptr_t>(handle) <= 2)
        return &default_stream;
    return streams.count(handle) > 0 ? handle : nullptr;
}

void finish(kl_host_stream &s, uint64_t until = UINT64_MAX)
{
    for (; !s.late.empty() && s.made < until; s.made++) {
        memcpy(s.late.front().to, s.late.front().from, s.late.front().n_bytes);
        s.late.pop_front();
    }
}

/* what a stream does next comes behind its copies */
hipError_t come_behind(hipStream_t handle)
{
    kl_host_stream *s = stream_of(handle);
    if (s == nullptr)
        return kl_host::set_error(hipErrorInvalidHandle, "there is no such stream");
    finish(*s);
    return hipSuccess;
}

} // namespace

namespace kl_host
{

hipError_t check_device()
{
    return current == DEVICE ? hipSuccess
                             : set_error(hipErrorInvalidDevice, "the thread's device is another's");
}

void finish_all()
{
    finish(default_stream);
    for (kl_host_stream *s : streams)
        finish(*s);
}

hipError_t before_launch(hipStream_t stream)
{
    const hipError_t error = check_device();
    const std::lock_guard<std::mutex> hold(memory_lock());
    return error == hipSuccess ? come_behind(stream) : error;
}

} // namespace kl_host

using namespace kl_host;

/* ---- devices ---- */

hipError_t hipGetDeviceCount(int *count)
{
    *count = 1;
    return hipSuccess;
}

hipError_t hipGetDevice(int *device)
{
    *device = current;
    return hipSuccess;
}

hipError_t hipSetDevice(int device)
{
    if (device != DEVICE && device != OTHER)
        return set_error(hipErrorInvalidDevice, "the host build has one device, 0");
    current = device;
    return hipSuccess;
}

/* what a test asks for: the calling thread's device; before, as others of its process set it */
extern "C" __attribute__((visibility("default"))) int kl_host_device(int device)
{
    const int before = current;
    current = device;
    return before;
}

/* ---- copies ---- */

hipError_t hipMemcpyAsync(void *to, const void *from, size_t n_bytes, hipMemcpyKind kind,
                          hipStream_t stream)
{
    if (n_bytes == 0)
        return hipSuccess;
    if (const hipError_t error = check_device())
        return error;
    const std::lock_guard<std::mutex> hold(memory_lock());
    if (kind != hipMemcpyDeviceToHost && !is_device_memory(to, n_bytes))
        return set_error(hipErrorInvalidValue, "a copy goes to what is no device memory");
    if (kind != hipMemcpyHostToDevice && !is_device_memory(from, n_bytes))
        return set_error(hipErrorInvalidValue, "a copy comes from what is no device memory");
    if (kind == hipMemcpyHostToDevice && is_pinned(from) && stream_of(stream) != nullptr) {
        stream_of(stream)->late.push_back({ to, from, n_bytes });
        copies++;
        return hipSuccess;
    }
    if (const hipError_t error = come_behind(stream))
        return error;
    pageable += kind == hipMemcpyHostToDevice;
    memmove(to, from, n_bytes);
    return hipSuccess;
}
/* how many came from memory that is not pinned: a device makes them while the caller waits */
extern "C" __attribute__((visibility("default"))) int64_t kl_host_pageable() { return pageable; }
/* and how many from memory that is */
extern "C" __attribute__((visibility("default"))) int64_t kl_host_copies() { return copies; }

hipError_t hipMemsetAsync(void *to, int value, size_t n_bytes, hipStream_t stream)
{
    if (n_bytes == 0)
        return hipSuccess;
    if (const hipError_t error = check_device())
        return error;
    const std::lock_guard<std::mutex> hold(memory_lock());
    if (!is_device_memory(to, n_bytes))
        return set_error(hipErrorInvalidValue, "what is to be filled is no device memory");
    if (const hipError_t error = come_behind(stream))
        return error;
    memset(to, value, n_bytes);
    return hipSuccess;
}

/* ---- streams and events ---- */

hipError_t hipStreamCreate(hipStream_t *stream)
{
    if (const hipError_t error = check_device())
        return error;
    const std::lock_guard<std::mutex> hold(memory_lock());
    *stream = new kl_host_stream();
    streams.insert(*stream);
    return hipSuccess;
}

hipError_t hipStreamDestroy(hipStream_t stream)
{
    const std::lock_guard<std::mutex> hold(memory_lock());
    if (streams.erase(stream) == 0)
        return set_error(hipErrorInvalidHandle, "there is no such stream");
    finish(*stream);
    delete stream;
    return hipSuccess;
}

hipError_t hipStreamSynchronize(hipStream_t stream)
{
    waits++;
    const timespec more = { wait_ms / 1000, wait_ms % 1000 * 1000000L };
    if (wait_ms > 0)
        nanosleep(&more, nullptr);
    const std::lock_guard<std::mutex> hold(memory_lock());
    return come_behind(stream);
}
/* how often a stream was waited for, so that a test can count */
extern "C" __attribute__((visibility("default"))) int64_t kl_host_waits() { return waits; }
/* how long each takes at least, in milliseconds */
extern "C" __attribute__((visibility("default"))) void kl_host_slow(int ms) { wait_ms = ms; }

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

hipError_t hipEventRecord(hipEvent_t event, hipStream_t stream)
{
    if (const hipError_t error = check_device())
        return error;
    const std::lock_guard<std::mutex> hold(memory_lock());
    const kl_host_stream *s = stream_of(stream);
    if (s == nullptr)
        return set_error(hipErrorInvalidHandle, "there is no such stream");
    clock_gettime(CLOCK_MONOTONIC, &event->at);
    event->stream = stream;
    event->behind = s->made + s->late.size();
    return hipSuccess;
}

hipError_t hipEventSynchronize(hipEvent_t event)
{
    const std::lock_guard<std::mutex> hold(memory_lock());
    if (kl_host_stream *s = stream_of(event->stream))
        finish(*s, event->behind);
    return hipSuccess;
}

hipError_t hipEventElapsedTime(float *milliseconds, hipEvent_t from, hipEvent_t to)
{
    const double seconds = static_cast<double>(to->at.tv_sec - from->at.tv_sec)
                           + 1e-9 * static_cast<double>(to->at.tv_nsec - from->at.tv_nsec);
    *milliseconds = static_cast<float>(1e3 * seconds);
    return hipSuccess;
}

/* what a test asks for, in the place of another library: a stream of its own (or the default one) on which n bytes are
 * on their way to device memory; NULL where that failed */
extern "C" __attribute__((visibility("default"))) void *
kl_host_produce(void *to, const void *from, size_t n_bytes, int by_default)
{
    hipStream_t stream = reinterpret_cast<hipStream_t>(uintptr_t(1));
    void *data = nullptr;
    if ((!by_default && hipStreamCreate(&stream) != hipSuccess)
        || hipHostMalloc(&data, n_bytes) != hipSuccess)
        return nullptr;
    memcpy(data, from, n_bytes); /* it stays, as the stream does: tests are few */
    const hipError_t error = hipMemcpyAsync(to, data, n_bytes, hipMemcpyHostToDevice, stream);
    return error == hipSuccess ? stream : nullptr;
}
