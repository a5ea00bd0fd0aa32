/* The HIP backend: memory, copies, streams, the op table, and what the core asks a device library. One text
 * for AMD, NVIDIA and the host build. */
#include "pointer.h"
#include "runtime.h"
#include "stored.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const kl_core *kl_core_of;

namespace
{

/* Host memory that the device copies from by itself, and when it has. */
struct pinned {
    void *data;
    hipEvent_t copied;
};

const size_t PIECE = 8 << 20; /* bytes of a staging buffer; an upload of more goes through them */
const int PUTS = 4;
const size_t PUT_PIECE = KL_PUT_MOST; /* bytes of each; what is larger waits */

struct handle {
    int device;
    hipStream_t stream;
    pinned staging[2];          /* of large uploads, taken in turns; NULL until there is one */
    int turn;                   /* the one that is taken next */
    pinned puts[PUTS];          /* of tables and control data, taken in turns */
    int put;                    /* the one that is being filled, */
    size_t put_bytes;           /* and how far */
    hipEvent_t mark;            /* of tick; NULL before the first */
    unsigned long long *faults; /* [KL_FAULTS] place << 32 | bits; all bits: none */
    bool noting;                /* kernels that may note were launched since they were looked at */
    int64_t E, k;               /* of the call that they belong to */
    struct {
        int64_t D;
        kl_type type;
    } caches[KL_CACHES]; /* that may have been noted since, */
    int n_caches;        /* and how many */
};

const size_t FAULT_BYTES = KL_FAULTS * sizeof(unsigned long long);

handle *handle_of(const kl_ctx *ctx) { return static_cast<handle *>(kl_core_of->handle(ctx)); }

bool waits()
{
    const char *text = getenv("KL_GPU_SYNC");
    return text != nullptr && *text != 0 && strcmp(text, "0") != 0;
}

kl_status check(kl_ctx *ctx, const char *what, hipError_t error)
{
    if (error == hipSuccess)
        return KL_OK;
    (void)hipGetLastError();
    return kl_core_of->fail(ctx, error == hipErrorOutOfMemory ? KL_ERR_MEMORY : KL_ERR_DEVICE,
                            "%s: %s", what, hipGetErrorString(error));
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
        const on_device here(handle_of(ctx)->device);
        KL_TRY(check(ctx, "device", here.error));
        (void)hipGetLastError();
        const kl_status status = CALL(ctx, a...);
        kl_call_ends();
        return status;
    }
};

/* ---- a context's part ---- */

hipError_t make_pinned(pinned *to, size_t n_bytes)
{
    hipError_t error = hipHostMalloc(&to->data, n_bytes);
    if (error != hipSuccess)
        return error;
    error = hipEventCreate(&to->copied);
    if (error == hipSuccess)
        return hipSuccess;
    (void)hipHostFree(to->data);
    *to = pinned{};
    return error;
}

void release_pinned(pinned &p)
{
    if (p.data == nullptr)
        return;
    (void)hipEventDestroy(p.copied);
    (void)hipHostFree(p.data);
    p = pinned{};
}

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
    KL_TRY(check(ctx, "device", hipGetDeviceProperties(&p, device)));
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
    KL_TRY(check(ctx, "device", here.error));
    KL_TRY(check_code(ctx, device));
    KL_TRY(check(ctx, "device: stream", hipStreamCreate(&stream)));
    handle *h = static_cast<handle *>(malloc(sizeof *h));
    if (h == nullptr) {
        (void)hipStreamDestroy(stream);
        return kl_core_of->fail(ctx, KL_ERR_MEMORY, "out of memory: context");
    }
    *h = handle{};
    h->device = device;
    h->stream = stream;
    *to = h;
    void *faults = nullptr;
    KL_TRY(check(ctx, "device: memory", hipMalloc(&faults, FAULT_BYTES)));
    h->faults = static_cast<unsigned long long *>(faults);
    for (pinned &p : h->puts)
        KL_TRY(check(ctx, "device: pinned memory", make_pinned(&p, PUT_PIECE)));
    return check(ctx, "device: memory", hipMemsetAsync(faults, 0xff, FAULT_BYTES, stream));
}

void close_device(kl_ctx *, void *opened)
{
    handle *h = static_cast<handle *>(opened);
    if (h == nullptr)
        return;
    const on_device here(h->device);
    (void)hipStreamSynchronize(h->stream);
    (void)hipStreamDestroy(h->stream);
    (void)hipFree(h->faults);
    for (pinned &p : h->staging)
        release_pinned(p);
    for (pinned &p : h->puts)
        release_pinned(p);
    if (h->mark != nullptr)
        (void)hipEventDestroy(h->mark);
    free(h);
}

/* ---- memory ---- */

void *allocate(kl_ctx *ctx, size_t n_bytes)
{
    void *p = nullptr;
    const on_device here(handle_of(ctx)->device);
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
    const on_device here(handle_of(ctx)->device);
    (void)hipStreamSynchronize(handle_of(ctx)->stream);
    (void)hipFree(p);
}

kl_status move(kl_ctx *ctx, const char *what, void *to, const void *from, size_t n_bytes,
               hipMemcpyKind kind)
{
    return check(ctx, what, hipMemcpyAsync(to, from, n_bytes, kind, kl_stream(ctx)));
}

kl_status wait(kl_ctx *ctx, const char *what)
{
    return check(ctx, what, hipStreamSynchronize(kl_stream(ctx)));
}

/* Both staging buffers; false where there is no pinned memory left: then the driver stages. */
bool have_staging(kl_ctx *ctx)
{
    handle *h = handle_of(ctx);
    for (pinned &p : h->staging) {
        if (p.data != nullptr)
            continue;
        if (kl_core_of->allocation_fails(ctx) || make_pinned(&p, PIECE) != hipSuccess) {
            (void)hipGetLastError();
            return false;
        }
    }
    return true;
}

/* at once; the driver reads `from` until the stream has been waited for */
kl_status upload_whole(kl_ctx *ctx, void *to, const void *from, size_t n_bytes)
{
    KL_TRY(move(ctx, "upload", to, from, n_bytes, hipMemcpyHostToDevice));
    return wait(ctx, "upload");
}

/* Through two pinned buffers in turns: one is filled from host memory, which may be a mapped file that is read by
 * that, while the device copies from the other. What is copied last may still be on its way. */
kl_status upload_pieces(kl_ctx *ctx, void *to, const void *from, size_t n_bytes)
{
    handle *h = handle_of(ctx);
    for (size_t at = 0; at < n_bytes; at += PIECE, h->turn = 1 - h->turn) {
        const pinned &p = h->staging[h->turn];
        const size_t n = n_bytes - at < PIECE ? n_bytes - at : PIECE;
        KL_TRY(check(ctx, "upload", hipEventSynchronize(p.copied)));
        memcpy(p.data, static_cast<const char *>(from) + at, n);
        KL_TRY(move(ctx, "upload", static_cast<char *>(to) + at, p.data, n, hipMemcpyHostToDevice));
        KL_TRY(check(ctx, "upload", hipEventRecord(p.copied, h->stream)));
    }
    return KL_OK;
}

/* Many tensors one after another: of smaller ones, too, one is read while the other is copied. */
kl_status stage(kl_ctx *ctx, void *to, const void *from, size_t n_bytes)
{
    return n_bytes > PUT_PIECE && have_staging(ctx) ? upload_pieces(ctx, to, from, n_bytes)
                                                    : upload_whole(ctx, to, from, n_bytes);
}

kl_status upload(kl_ctx *ctx, void *to, const void *from, size_t n_bytes)
{
    if (n_bytes <= PIECE || !have_staging(ctx))
        return upload_whole(ctx, to, from, n_bytes);
    KL_TRY(upload_pieces(ctx, to, from, n_bytes));
    return wait(ctx, "upload");
}

/* ---- what kernels noted ---- */

/* how wide the rows are in which a place is counted */
int64_t width_of(const handle *h, int kind)
{
    if (kind < KL_CACHES)
        return h->caches[kind].D;
    if (kind == KL_FAULT_BIAS)
        return INT64_MAX;
    return kind == KL_FAULT_SCORES ? h->E : h->k;
}

kl_status sentence_of(kl_ctx *ctx, const handle *h, int kind, unsigned long long noted)
{
    const int64_t place = static_cast<int64_t>(noted >> 32), cols = width_of(h, kind);
    const uint32_t bits = static_cast<uint32_t>(noted);
    const long long row = place / cols, col = place % cols;
    float value;
    int32_t id;
    memcpy(&value, &bits, sizeof value);
    memcpy(&id, &bits, sizeof id);
    if (kind < KL_CACHES) {
        const bool half = h->caches[kind].type == KL_F16;
        return kl_core_of->fail(
            ctx, KL_ERR_ARG,
            "cache_append: x[%lld, %lld] is %g, too large for a %s cache (%s at most); "
            "use a float32 cache",
            row, col, static_cast<double>(value), half ? "float16" : "q8_0",
            half ? "65504" : "8319008");
    }
    if (kind == KL_FAULT_BIAS)
        return kl_core_of->fail(ctx, KL_ERR_ARG,
                                "route: bias[%lld] is %g; it must be a number below infinity", col,
                                static_cast<double>(value));
    if (kind == KL_FAULT_SCORES && value != value)
        return kl_core_of->fail(
            ctx, KL_ERR_ARG,
            "route: scores[%lld, %lld] (token, expert) is NaN; scores must be numbers", row, col);
    if (kind == KL_FAULT_SCORES)
        return kl_core_of->fail(ctx, KL_ERR_ARG,
                                "route: scores[%lld, %lld] is %g, the largest of its token; with "
                                "softmax that must be finite",
                                row, col, static_cast<double>(value));
    return kl_core_of->fail(
        ctx, KL_ERR_ARG,
        "%s: ids[%lld, %lld] (token, slot) is %d; ids of a token must rise within 0 to %lld",
        kind == KL_FAULT_MOE_IDS ? "moe" : "route", row, col, static_cast<int>(id),
        static_cast<long long>(h->E) - 1);
}

/* the sentence of what was noted, once */
kl_status look_at_faults(kl_ctx *ctx)
{
    handle *h = handle_of(ctx);
    unsigned long long noted[KL_FAULTS];
    if (!h->noting)
        return KL_OK;
    h->noting = false;
    h->n_caches = 0;
    KL_TRY(move(ctx, "download", noted, h->faults, FAULT_BYTES, hipMemcpyDeviceToHost));
    KL_TRY(wait(ctx, "download"));
    for (int kind = 0; kind < KL_FAULTS; kind++)
        if (noted[kind] != ~0ULL) {
            KL_TRY(check(ctx, "clear", hipMemsetAsync(h->faults, 0xff, FAULT_BYTES, h->stream)));
            return sentence_of(ctx, h, kind, noted[kind]);
        }
    return KL_OK;
}

kl_status download(kl_ctx *ctx, void *to, const void *from, size_t n_bytes)
{
    KL_TRY(look_at_faults(ctx));
    KL_TRY(move(ctx, "download", to, from, n_bytes, hipMemcpyDeviceToHost));
    return wait(ctx, "download");
}

kl_status copy(kl_ctx *ctx, void *to, const void *from, size_t n_bytes)
{
    return move(ctx, "copy", to, from, n_bytes, hipMemcpyDeviceToDevice);
}

kl_status clear(kl_ctx *ctx, void *to, size_t n_bytes)
{
    return check(ctx, "clear", hipMemsetAsync(to, 0, n_bytes, kl_stream(ctx)));
}

/* ---- streams and memory of others ---- */

void *stream_of(const kl_ctx *ctx) { return handle_of(ctx)->stream; }

kl_status wait_for(kl_ctx *ctx, void *stream)
{
    KL_TRY(check(ctx, "wait", hipStreamSynchronize(static_cast<hipStream_t>(stream))));
    return stream == stream_of(ctx) ? look_at_faults(ctx) : KL_OK;
}

void where(const kl_ctx *ctx, int *type, int *number)
{
    *type = KL_DLPACK_DEVICE;
    *number = handle_of(ctx)->device;
}

/* Every allocation that the bytes lie in is looked at: memory that was freed shows where the runtime has taken it back. */
kl_status has(kl_ctx *ctx, const char *name, const void *p, size_t n_bytes)
{
    const int mine = handle_of(ctx)->device;
    const char *at = static_cast<const char *>(p), *begin = nullptr;
    for (size_t left = n_bytes, there = 0; left > 0; left -= there, at += there) {
        int device;
        KL_TRY(check(ctx, name, kl_memory_at(at, &device, &begin, &there)));
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
    handle *h = handle_of(ctx);
    hipEvent_t now;
    float ms = 0.0f;
    KL_TRY(check(ctx, "tick", hipEventCreate(&now)));
    hipError_t error = hipEventRecord(now, h->stream);
    if (error == hipSuccess)
        error = hipEventSynchronize(now);
    if (error == hipSuccess && h->mark != nullptr)
        error = hipEventElapsedTime(&ms, h->mark, now);
    if (h->mark != nullptr)
        (void)hipEventDestroy(h->mark);
    h->mark = now;
    *seconds = 1e-3 * static_cast<double>(ms);
    return check(ctx, "tick", error);
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
    KL_ON_DEVICE(upload, upload);
    KL_ON_DEVICE(download, download);
    KL_ON_DEVICE(copy, copy);
    KL_ON_DEVICE(clear, clear);
    KL_ON_DEVICE(stage, stage);
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

hipStream_t kl_stream(kl_ctx *ctx) { return handle_of(ctx)->stream; }

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
    return check(ctx, op, error);
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

kl_status kl_faults_of(kl_ctx *ctx, unsigned long long **faults, int64_t E, int64_t k)
{
    handle *h = handle_of(ctx);
    if (h->noting && (h->E != E || h->k != k)) /* notes of another shape: looked at first */
        KL_TRY(look_at_faults(ctx));
    h->noting = true;
    h->E = E;
    h->k = k;
    *faults = h->faults;
    return KL_OK;
}

kl_status kl_cache_fault_of(kl_ctx *ctx, unsigned long long **fault, int64_t D, kl_type type)
{
    handle *h = handle_of(ctx);
    int i = 0;
    while (i < h->n_caches && (h->caches[i].D != D || h->caches[i].type != type))
        i++;
    if (i == KL_CACHES) {
        KL_TRY(look_at_faults(ctx));
        i = 0;
    }
    h->noting = true;
    h->caches[i].D = D;
    h->caches[i].type = type;
    h->n_caches = i < h->n_caches ? h->n_caches : i + 1;
    *fault = h->faults + KL_FAULT_CACHE + i;
    return KL_OK;
}

/* From a copy in pinned memory: a device copies from other memory while the caller waits, and from the caller's own
 * pinned memory when it has already been changed. */
kl_status kl_put(kl_ctx *ctx, void *to, const void *from, size_t n_bytes)
{
    void *room;
    if (n_bytes > PUT_PIECE)
        return upload_whole(ctx, to, from, n_bytes);
    KL_TRY(kl_put_room(ctx, &room, n_bytes));
    memcpy(room, from, n_bytes);
    return kl_put_from(ctx, to, room, n_bytes);
}

kl_status kl_put_room(kl_ctx *ctx, void **room, size_t n_bytes)
{
    handle *h = handle_of(ctx);
    if (h->put_bytes + n_bytes > PUT_PIECE) {
        KL_TRY(check(ctx, "upload", hipEventRecord(h->puts[h->put].copied, h->stream)));
        h->put = (h->put + 1) % PUTS;
        h->put_bytes = 0;
        KL_TRY(check(ctx, "upload", hipEventSynchronize(h->puts[h->put].copied)));
    }
    *room = static_cast<char *>(h->puts[h->put].data) + h->put_bytes;
    h->put_bytes += (n_bytes + 15) / 16 * 16;
    return KL_OK;
}

kl_status kl_put_from(kl_ctx *ctx, void *to, const void *room, size_t n_bytes)
{
    return move(ctx, "upload", to, room, n_bytes, hipMemcpyHostToDevice);
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
