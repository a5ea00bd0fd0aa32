/* The host build of kl_gpu.h: HIP's names over an emulator (emulate.cpp; shared memory: shared.cpp). Blocks run one
 * after another, the threads of a block as fibres that switch at barriers and shuffles. What it finds, it reports as a
 * failed launch whose hipGetErrorString is a sentence:
 *     - a thread that leaves, or waits elsewhere, while others wait at a barrier or a shuffle;
 *     - a read or write past the end of an array in shared memory;
 *     - a read of shared memory that nobody wrote;
 *     - two threads at one place of shared memory, one of them writing, with no barrier between;
 *     - a shuffle from a lane that the wave does not have;
 *     - a pointer argument that is no device memory, a member of a struct that is the host's, a write next to an
 *       allocation or past an array of scratch. */
#ifndef KL_HOST_GPU_H
#define KL_HOST_GPU_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

/* ---- runtime -------------------------------------------------------------------------------- */

enum hipError_t {
    hipSuccess = 0,
    hipErrorInvalidValue = 1,
    hipErrorOutOfMemory = 2,
    hipErrorInvalidDeviceFunction = 98,
    hipErrorInvalidDevice = 101,
    hipErrorNoBinaryForGpu = 209,
    hipErrorInvalidHandle = 400,
    hipErrorLaunchFailure = 719
};
enum hipMemcpyKind { hipMemcpyHostToDevice, hipMemcpyDeviceToHost, hipMemcpyDeviceToDevice };
typedef struct kl_host_stream *hipStream_t;
typedef struct kl_host_event *hipEvent_t;
struct hipDeviceProp_t {
    char name[256], gcnArchName[256];
    size_t totalGlobalMem, sharedMemPerBlock;
    int warpSize, multiProcessorCount, major, minor;
};
struct hipFuncAttributes {
    int maxThreadsPerBlock;
};

hipError_t hipGetLastError();
const char *hipGetErrorString(hipError_t error);
hipError_t hipGetDeviceCount(int *count);
hipError_t hipGetDevice(int *device);
hipError_t hipSetDevice(int device);
hipError_t hipGetDeviceProperties(hipDeviceProp_t *properties, int device);
hipError_t hipFuncGetAttributes(hipFuncAttributes *attributes, const void *kernel);
hipError_t hipMemGetInfo(size_t *free_bytes, size_t *total);
hipError_t hipMalloc(void **p, size_t n_bytes);
hipError_t hipFree(void *p);
hipError_t hipHostMalloc(void **p, size_t n_bytes);
hipError_t hipHostFree(void *p);
hipError_t kl_memory_at(const void *p, int *device, const char **begin,
                        size_t *n_bytes); /* as for GPUs: pointer.h */
hipError_t hipMemcpyAsync(void *to, const void *from, size_t n_bytes, hipMemcpyKind kind,
                          hipStream_t stream);
hipError_t hipMemsetAsync(void *to, int value, size_t n_bytes, hipStream_t stream);
hipError_t hipStreamCreate(hipStream_t *stream);
hipError_t hipStreamDestroy(hipStream_t stream);
hipError_t hipStreamSynchronize(hipStream_t stream);
hipError_t hipEventCreate(hipEvent_t *event);
hipError_t hipEventDestroy(hipEvent_t event);
hipError_t hipEventRecord(hipEvent_t event, hipStream_t stream);
hipError_t hipEventSynchronize(hipEvent_t event);
hipError_t hipEventElapsedTime(float *milliseconds, hipEvent_t from, hipEvent_t to);

namespace kl_host
{
/* An array of scratch, behind which GUARD_OF_SCRATCH bytes are its own: filled with NaN, the guard looked at after each
 * launch until forget_scratch. NULL: none. */
enum { GUARD_OF_SCRATCH = 64 };
void guard_scratch(void *p, size_t n_bytes);
void forget_scratch();
} // namespace kl_host

/* ---- inside a kernel ------------------------------------------------------------------------ */

namespace kl_host
{

struct site {
    const char *file;
    int line;
};

/* what a running thread sees of itself; set by the scheduler when it resumes the thread */
struct thread_view {
    uint3 thread, block;
    dim3 block_size, grid_size;
    int wave_size;
};
extern thread_view now;

void barrier(site where);
void wave_barrier(int width, site where);
/* the bits that lane `source` of the caller's segment of `width` lanes gave; -1: the caller's own */
uint64_t shuffle(uint64_t bits, int source, int width, site where);
int lane_of(int width);

/* ---- shared memory ---- */

/* an array in shared memory: its bytes, and for each 4 of them who touched them last */
struct cell;
struct region {
    const char *name;
    unsigned char *data;
    cell *cells;
    size_t n_bytes;
};
struct slot { /* of one declaration in a kernel: the block that took it last, and what it got */
    uint64_t block;
    region *taken;
};
region *take(slot *of, const char *name, size_t n_bytes);
region *take_dynamic(const char *name);
[[noreturn]] void out_of_bounds(const region *r, int64_t index, int64_t n);
void note_read(const region *r, const void *p, size_t n_bytes);
void note_write(const region *r, const void *p, size_t n_bytes);
void note_atomic(const region *r, const void *p, size_t n_bytes);

template <class T> class shared;

/* one element: reading and writing it are noted */
template <class T> class element
{
    const region *r_;
    T *p_;

  public:
    element(const region *r, T *p) : r_(r), p_(p) {}
    operator T() const
    {
        note_read(r_, p_, sizeof(T));
        return *p_;
    }
    element &operator=(T value)
    {
        note_write(r_, p_, sizeof(T));
        *p_ = value;
        return *this;
    }
    element &operator=(const element &other) { return *this = static_cast<T>(other); }
    element(const element &) = default;
    element &operator+=(T v) { return *this = static_cast<T>(*this) + v; }
    element &operator-=(T v) { return *this = static_cast<T>(*this) - v; }
    element &operator*=(T v) { return *this = static_cast<T>(*this) * v; }
    shared<T> operator&() const { return shared<T>(r_, p_); }
    T atomic_add(T v) const
    {
        note_atomic(r_, p_, sizeof(T));
        const T before = *p_;
        *p_ = before + v;
        return before;
    }
};

/* a pointer into an array */
template <class T> class shared
{
    const region *r_ = nullptr;
    T *p_ = nullptr;

  public:
    shared() = default;
    shared(const region *r, T *p) : r_(r), p_(p) {}
    element<T> operator[](int64_t i) const
    {
        const int64_t n = static_cast<int64_t>(r_->n_bytes / sizeof(T)),
                      at = p_ - reinterpret_cast<T *>(r_->data) + i;
        if (at < 0 || at >= n)
            out_of_bounds(r_, at, n);
        return element<T>(r_, p_ + i);
    }
    element<T> operator*() const { return (*this)[0]; }
    shared operator+(int64_t i) const { return shared(r_, p_ + i); }
};

/* an array of N, which may be of arrays */
template <class T, size_t N> class shared<T[N]>
{
    const region *r_;
    T *p_;

  public:
    shared(const region *r, T *p) : r_(r), p_(p) {}
    auto operator[](int64_t i) const
    {
        if (i < 0 || i >= static_cast<int64_t>(N))
            out_of_bounds(r_, i, N);
        if constexpr (std::is_array_v<T>)
            return shared<T>(r_, p_[i]);
        else
            return element<T>(r_, p_ + i);
    }
    operator shared<std::remove_all_extents_t<T>>() const
    {
        using value = std::remove_all_extents_t<T>;
        return shared<value>(r_, reinterpret_cast<value *>(p_));
    }
    auto operator+(int64_t i) const
    {
        return static_cast<shared<std::remove_all_extents_t<T>>>(*this) + i;
    }
};

template <class A> shared<A> array_in(const region *r)
{
    return shared<A>(r, reinterpret_cast<std::remove_extent_t<A> *>(r->data));
}

/* ---- launch ---- */

hipError_t before_launch(hipStream_t stream);
void begin_launch(const char *name);
void check_pointer(int argument, const void *p);
void check_words(int argument, const void *p,
                 size_t n_bytes); /* none may be an address of the host's */
void run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void *), void *arguments);

template <class T, class = void> struct has_data : std::false_type {};
template <class T> struct has_data<T, std::void_t<decltype(T::data)>> : std::true_type {};

#if defined(__has_builtin)
#if __has_builtin(__builtin_clear_padding)
#define KL_HOST_CLEARS_PADDING 1 /* where an old address may lie */
#endif
#endif

/* pointers; the member `data` of what is a struct, and whatever in it looks like one of the host's */
template <class T> void check_argument(int argument, T value)
{
    if constexpr (std::is_pointer_v<T>)
        check_pointer(argument, value);
    if constexpr (has_data<T>::value)
        check_pointer(argument, value.data);
#if defined(KL_HOST_CLEARS_PADDING)
    if constexpr (std::is_class_v<T> && std::is_trivially_copyable_v<T>) {
        __builtin_clear_padding(&value);
        check_words(argument, &value, sizeof value);
    }
#endif
    (void)argument, (void)value;
}

template <class... P> struct call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
    static void body(void *p)
    {
        call *self = static_cast<call *>(p);
        std::apply(self->kernel, self->arguments);
    }
};

template <class... P, class... A>
void launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
            hipStream_t stream, A... arguments)
{
    if (before_launch(stream) != hipSuccess)
        return;
    call<P...> c = { kernel, std::tuple<P...>(static_cast<P>(arguments)...) };
    begin_launch(name);
    int i = 0;
    std::apply([&i](auto... p) { (check_argument(i++, p), ...); }, c.arguments);
    (void)i;
    run(grid, block, shared_bytes, call<P...>::body, &c);
}

/* ---- shuffles ---- */

template <class T> T shuffle_value(T value, int source, int width, site where)
{
    static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = shuffle(bits, source, width, where);
    memcpy(&value, &bits, sizeof value);
    return value;
}

} // namespace kl_host

#define KL_HOST_SITE (kl_host::site{ __FILE__, __LINE__ })
#define threadIdx (kl_host::now.thread)
#define blockIdx (kl_host::now.block)
#define blockDim (kl_host::now.block_size)
#define gridDim (kl_host::now.grid_size)
inline const int &warpSize = kl_host::now.wave_size;
#define __syncthreads() kl_host::barrier(KL_HOST_SITE)
#define __shfl(value, lane, width) kl_host::shuffle_value((value), (lane), (width), KL_HOST_SITE)
#define __shfl_xor(value, mask, width)                                                             \
    kl_host::shuffle_value((value), kl_host::lane_of(width) ^ (mask), (width), KL_HOST_SITE)
/* past the end of the segment: the thread's own value */
#define __shfl_up(value, delta, width)                                                             \
    kl_host::shuffle_value(                                                                        \
        (value), kl_host::lane_of(width) < int(delta) ? -1 : kl_host::lane_of(width) - int(delta), \
        (width), KL_HOST_SITE)
#define __shfl_down(value, delta, width)                                                           \
    kl_host::shuffle_value((value),                                                                \
                           kl_host::lane_of(width) + int(delta) >= (width)                         \
                               ? -1                                                                \
                               : kl_host::lane_of(width) + int(delta),                             \
                           (width), KL_HOST_SITE)

template <class T> T atomicAdd(T *p, T v)
{
    const T before = *p;
    *p = before + v;
    return before;
}
template <class T> T atomicMin(T *p, T v)
{
    const T before = *p;
    *p = v < before ? v : before;
    return before;
}
template <class T> T atomicAdd(kl_host::shared<T> p, T v) { return (*p).atomic_add(v); }

#define KL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                  \
    kl_host::launch(#kernel, kernel, (grid), (block), (shared_bytes), (stream), __VA_ARGS__)
#define KL_SHARED(type, name, extents)                                                             \
    static kl_host::slot name##_slot;                                                              \
    const kl_host::shared<type extents> name =                                                     \
        kl_host::array_in<type extents>(kl_host::take(&name##_slot, #name, sizeof(type extents)))
#define KL_DYNAMIC_SHARED(type, name)                                                              \
    const kl_host::region *const name##_region = kl_host::take_dynamic(#name);                     \
    const kl_host::shared<type> name(name##_region, reinterpret_cast<type *>(name##_region->data))
template <class T> using kl_shared = kl_host::shared<T>;

#endif
