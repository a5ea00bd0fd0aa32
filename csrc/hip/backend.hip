/* The HIP backend: memory, copies, streams, the op table, and what the core asks a device library. One text
 * for AMD, NVIDIA and the host build. */
#include "handle.h"
#include "pointer.h"
#include "stored.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const kl_core *kl_core_of;

namespace
{

bool waits()
{
    const char *text = getenv("KL_GPU_SYNC");
    return text != nullptr && *text != 0 && strcmp(text, "0") != 0;
}

/* The calling thread's device while this lives; then it has its former one again, which others of the process count on. */
class on_device
{
    int former_ = -1; /* -1: nothing to put back */

  public:
    hipError_t error;
    explicit on_device(int device) : error(hipGetDevice(&former_))
    {
        if (error != hipSuccess || former_ == device)
            former_ = -1;
        else
            error = hipSetDevice(device);
    }
    ~on_device()
    {
        if (former_ >= 0)
            (void)hipSetDevice(former_);
    }
    on_device(const on_device &) = delete;
    on_device &operator=(const on_device &) = delete;
};

/* An entry of the table, run on the context's device. An error that another library of the process has left unread is
 * read away: kl_launched would take it for a launch's. */
template <class ENTRY, ENTRY CALL> struct present;
template <class... A, kl_status (*CALL)(kl_ctx *, A...)>
struct present<kl_status (*)(kl_ctx *, A...), CALL> {
    static kl_status entry(kl_ctx *ctx, A... a)
    {
        const on_device here(kl_handle_of(ctx)->device);
        KL_TRY(kl_check(ctx, "device", here.error));
        (void)hipGetLastError();
        const kl_status status = CALL(ctx, a...);
        kl_call_ends();
        return status;
    }
};

/* ---- a context's part ---- */

/* A library has code for the architectures that it was compiled for. Without it each launch would fail, and name an op. */
kl_status check_code(kl_ctx *ctx, int device)
{
    char arch[64];
    hipDeviceProp_t p;
    const hipError_t error = kl_look_for_code();
    if (error != hipErrorNoBinaryForGpu && error != hipErrorInvalidDeviceFunction) {
        (void)hipGetLastError(); /* what else is wrong the next call tells */
        return KL_OK;
    }
    const char *why = hipGetErrorString(error);
    KL_TRY(kl_check(ctx, "device", hipGetDeviceProperties(&p, device)));
    (void)hipGetLastError();
#if defined(__CUDACC__)
    snprintf(arch, sizeof arch, "%d%d", p.major, p.minor);
#else
    snprintf(arch, sizeof arch, "%.*s", static_cast<int>(strcspn(p.gcnArchName, ":")),
             p.gcnArchName);
#endif
    return kl_core_of->fail(ctx, KL_ERR_DEVICE,
                            "device: the library has no kernels for %s, which is a %s (%s); "
                            "" KL_GPU_BUILD "%s builds them",
                            p.name, arch, why, arch);
}

kl_status open_device(kl_ctx *ctx, int device, void **to)
{
    hipStream_t stream;
    *to = nullptr;
    const on_device here(device);
    KL_TRY(kl_check(ctx, "device", here.error));
    KL_TRY(check_code(ctx, device));
    KL_TRY(kl_check(ctx, "device: stream", hipStreamCreate(&stream)));
    kl_handle *h = static_cast<kl_handle *>(malloc(sizeof *h));
    if (h == nullptr) {
        (void)hipStreamDestroy(stream);
        return kl_core_of->fail(ctx, KL_ERR_MEMORY, "out of memory: context");
    }
    *h = kl_handle{};
    h->device = device;
    h->stream = stream;
    *to = h;
    KL_TRY(kl_open_notes(ctx, h));
    return kl_open_uploads(ctx, h);
}

void close_device(kl_ctx *, void *opened)
{
    kl_handle *h = static_cast<kl_handle *>(opened);
    if (h == nullptr)
        return;
    const on_device here(h->device);
    (void)hipStreamSynchronize(h->stream);
    (void)hipStreamDestroy(h->stream);
    kl_close_notes(h);
    kl_close_uploads(h);
    if (h->mark != nullptr)
        (void)hipEventDestroy(h->mark);
    free(h);
}

/* ---- memory ---- */

void *allocate(kl_ctx *ctx, size_t n_bytes)
{
    void *p = nullptr;
    const on_device here(kl_handle_of(ctx)->device);
    if (!kl_core_of->allocation_fails(ctx) && here.error == hipSuccess
        && hipMalloc(&p, n_bytes > 0 ? n_bytes : 1) != hipSuccess)
        p = nullptr;
    if (p == nullptr) {
        size_t free_bytes = 0, total = 0;
        (void)hipGetLastError();
        (void)hipMemGetInfo(&free_bytes, &total);
        (void)kl_core_of->fail(ctx, KL_ERR_MEMORY,
                               "out of device memory: %zu bytes were wanted, %zu of %zu are free",
                               n_bytes, free_bytes, total);
    }
    return p;
}

void release(kl_ctx *ctx, void *p, size_t)
{
    if (p == nullptr)
        return;
    const on_device here(kl_handle_of(ctx)->device);
    (void)hipStreamSynchronize(kl_handle_of(ctx)->stream);
    (void)hipFree(p);
}

kl_status download(kl_ctx *ctx, void *to, const void *from, size_t n_bytes)
{
    KL_TRY(kl_look_at_notes(ctx));
    KL_TRY(kl_move(ctx, "download", to, from, n_bytes, hipMemcpyDeviceToHost));
    return kl_wait(ctx, "download");
}

kl_status copy(kl_ctx *ctx, void *to, const void *from, size_t n_bytes)
{
    return kl_move(ctx, "copy", to, from, n_bytes, hipMemcpyDeviceToDevice);
}

kl_status clear(kl_ctx *ctx, void *to, size_t n_bytes)
{
    return kl_check(ctx, "clear", hipMemsetAsync(to, 0, n_bytes, kl_stream(ctx)));
}

/* ---- streams and memory of others ---- */

void *stream_of(const kl_ctx *ctx) { return kl_handle_of(ctx)->stream; }

kl_status wait_for(kl_ctx *ctx, void *stream)
{
    KL_TRY(kl_check(ctx, "wait", hipStreamSynchronize(static_cast<hipStream_t>(stream))));
    return stream == stream_of(ctx) ? kl_look_at_notes(ctx) : KL_OK;
}

void where(const kl_ctx *ctx, int *type, int *number)
{
    *type = KL_DLPACK_DEVICE;
    *number = kl_handle_of(ctx)->device;
}

/* Every allocation that the bytes lie in is looked at: memory that was freed shows where the runtime has taken it back. */
kl_status has(kl_ctx *ctx, const char *name, const void *p, size_t n_bytes)
{
    const int mine = kl_handle_of(ctx)->device;
    const char *at = static_cast<const char *>(p), *begin = nullptr;
    for (size_t left = n_bytes, there = 0; left > 0; left -= there, at += there) {
        int device;
        KL_TRY(kl_check(ctx, name, kl_memory_at(at, &device, &begin, &there)));
        if (device >= 0 && device != mine)
            return kl_core_of->fail(ctx, KL_ERR_ARG,
                                    "%s is memory of device %d; the context computes on device %d",
                                    name, device, mine);
        if (device < 0 || at < begin || at >= begin + there)
            return kl_core_of->fail(
                ctx, KL_ERR_ARG,
                "%s: the %zu bytes from %p are not memory of the device: they are the "
                "host's, or were freed",
                name, n_bytes, p);
        there -= static_cast<size_t>(at - begin);
        there = there < left ? there : left;
    }
    return KL_OK;
}

/* ---- time ---- */

kl_status tick(kl_ctx *ctx, double *seconds)
{
    kl_handle *h = kl_handle_of(ctx);
    hipEvent_t now;
    float ms = 0.0f;
    KL_TRY(kl_check(ctx, "tick", hipEventCreate(&now)));
    hipError_t error = hipEventRecord(now, h->stream);
    if (error == hipSuccess)
        error = hipEventSynchronize(now);
    if (error == hipSuccess && h->mark != nullptr)
        error = hipEventElapsedTime(&ms, h->mark, now);
    if (h->mark != nullptr)
        (void)hipEventDestroy(h->mark);
    h->mark = now;
    *seconds = 1e-3 * static_cast<double>(ms);
    return kl_check(ctx, "tick", error);
}

/* ---- the op table ---- */

/* an op without kernels: it says so */
template <int ID, class ENTRY> struct missing;
template <int ID, class... A> struct missing<ID, kl_status (*)(kl_ctx *, A...)> {
    static kl_status entry(kl_ctx *ctx, A...)
    {
        static const char *const names[] = {
#define KL_OP(name, parameters) #name,
            KL_OPS(KL_OP)
#undef KL_OP
        };
        return kl_core_of->fail(ctx, KL_ERR_UNSUPPORTED,
                                "%s: there is no kernel for it yet on hip; use device='cpu'",
                                names[ID]);
    }
};

kl_backend make_backend()
{
    kl_backend b = {};
    b.name = "hip (" KL_GPU_PLATFORM ")";
    b.open = open_device;
    b.close = close_device;
    b.allocate = allocate;
    b.release = release;
    b.stream = stream_of;
    b.where = where;
#define KL_ON_DEVICE(name, call) b.name = present<decltype(b.name), call>::entry
    KL_ON_DEVICE(upload, kl_upload);
    KL_ON_DEVICE(download, download);
    KL_ON_DEVICE(copy, copy);
    KL_ON_DEVICE(clear, clear);
    KL_ON_DEVICE(stage, kl_stage);
    KL_ON_DEVICE(wait, wait_for);
    KL_ON_DEVICE(has, has);
    KL_ON_DEVICE(tick, tick);
    KL_ON_DEVICE(roof_read, hip_roof_read);
    KL_ON_DEVICE(roof_fma, hip_roof_fma);
#define KL_OP(name, parameters) b.name = missing<KL_OP_##name, decltype(b.name)>::entry;
    KL_OPS(KL_OP)
#undef KL_OP
#define KL_HAVE(name) KL_ON_DEVICE(name, hip_##name);
#include "ops.def"
#undef KL_HAVE
#undef KL_ON_DEVICE
    return b;
}

/* ---- devices ---- */

int count_devices(char *reason, size_t n)
{
    int count = 0;
    const hipError_t error = hipGetDeviceCount(&count);
    if (error == hipSuccess && count > 0)
        return count;
    (void)hipGetLastError();
    snprintf(reason, n, "no " KL_GPU_PLATFORM " GPU: %s",
             error != hipSuccess ? hipGetErrorString(error) : "none found");
    return 0;
}

int describe(int device, kl_device_info *to)
{
    hipDeviceProp_t p;
    if (hipGetDeviceProperties(&p, device) != hipSuccess) {
        (void)hipGetLastError();
        return 0;
    }
    snprintf(to->description, sizeof to->description, "%s", p.name);
    to->memory_bytes = static_cast<int64_t>(p.totalGlobalMem);
    return 1;
}

} // namespace

hipStream_t kl_stream(kl_ctx *ctx) { return kl_handle_of(ctx)->stream; }

kl_status kl_check(kl_ctx *ctx, const char *what, hipError_t error)
{
    if (error == hipSuccess)
        return KL_OK;
    (void)hipGetLastError();
    return kl_core_of->fail(ctx, error == hipErrorOutOfMemory ? KL_ERR_MEMORY : KL_ERR_DEVICE,
                            "%s: %s", what, hipGetErrorString(error));
}

kl_status kl_move(kl_ctx *ctx, const char *what, void *to, const void *from, size_t n_bytes,
                  hipMemcpyKind kind)
{
    return kl_check(ctx, what, hipMemcpyAsync(to, from, n_bytes, kind, kl_stream(ctx)));
}

kl_status kl_wait(kl_ctx *ctx, const char *what)
{
    return kl_check(ctx, what, hipStreamSynchronize(kl_stream(ctx)));
}

int kl_version()
{
    const char *text = getenv("KL_GPU_VERSION");
    return text != nullptr && *text != 0 ? atoi(text) : 99;
}

kl_status kl_launched(kl_ctx *ctx, const char *op)
{
    hipError_t error = hipGetLastError();
    if (error == hipSuccess && waits())
        error = hipStreamSynchronize(kl_stream(ctx));
    return kl_check(ctx, op, error);
}

kl_status kl_no_type(kl_ctx *ctx, const char *op, const char *name, kl_type type)
{
    static const char types[] =
#define NAME(TYPE) " " #TYPE
        KL_STORED_TYPES(NAME)
#undef NAME
        ;
    return kl_core_of->fail(ctx, KL_ERR_UNSUPPORTED,
                            "%s: %s has storage type %d, which has no kernel on hip; these have:%s",
                            op, name, static_cast<int>(type), types);
}

kl_status kl_get(kl_ctx *ctx, void *to, const void *from, size_t n_bytes)
{
    return download(ctx, to, from, n_bytes);
}

extern "C" KL_API const kl_device_library *kl_hip_library(const kl_core *core)
{
    static const kl_backend backend = make_backend();
    static const kl_device_library library = { KL_VERSION, KL_BACKEND_BYTES, &backend,
                                               count_devices, describe };
    kl_core_of = core;
    return &library;
}
