/* Runs a grid on the CPU: see gpu.h. One launch at a time in a process; the threads of a block are fibres on stacks
 * of their own. A fibre runs until it waits or ends; when none can run, either a whole wave or the whole block
 * waits at one place and is released, or the launch has failed. */
#include "gpu.h"

#include "settings.h"
#include "switch.h"

#include <mutex>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <vector>

namespace kl_host
{

thread_view now;
settings chosen = settings_from_environment();
moment here;

namespace
{

enum {
    MAX_THREADS = 1024,
    STACK_BYTES = 128 * 1024,
    PAGE_BYTES = 4096,
};

enum class state { ready, at_barrier, at_wave, at_shuffle, ended };

struct fibre {
    void *sp;
    char *stack;
    uint3 index;
    state is;
    site where;
    int width, source;     /* of the shuffle or wave barrier that it waits at */
    uint64_t bits, result; /* given, received */
    uint32_t team_epoch;   /* wave barriers passed */
};

struct engine {
    std::mutex lock;
    fibre fibres[MAX_THREADS];
    int order[MAX_THREADS];
    int n_threads, stacks;
    void *scheduler;
    void (*body)(void *);
    void *arguments;
    const char *kernel;
    bool failed;
    uint64_t random;
    size_t dynamic_bytes;
    int64_t launches;
};

engine e;
thread_local hipError_t last_error;
thread_local char sentence[512];

uint64_t next_random()
{
    e.random ^= e.random << 13;
    e.random ^= e.random >> 7;
    e.random ^= e.random << 17;
    return e.random;
}

fibre &me() { return e.fibres[here.thread]; }

void suspend() { kl_fibre_switch(&me().sp, e.scheduler); }

} // namespace

void stop()
{
    for (;;) {
        me().is = state::ended;
        suspend();
    }
}

void fail(const char *format, ...)
{
    if (e.failed)
        return;
    e.failed = true;
    int n = snprintf(sentence, sizeof sentence, "kernel %s: ", e.kernel);
    va_list args;
    va_start(args, format);
    vsnprintf(sentence + n, sizeof sentence - static_cast<size_t>(n), format, args);
    va_end(args);
    last_error = hipErrorLaunchFailure;
}

namespace
{

const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash != nullptr ? slash + 1 : path;
}

void entry()
{
    e.body(e.arguments);
    stop();
}

bool make_stacks(int n)
{
    for (; e.stacks < n; e.stacks++) {
        void *p = mmap(nullptr, STACK_BYTES + PAGE_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED)
            return false;
        mprotect(p, PAGE_BYTES, PROT_NONE); /* a stack that overflows ends here */
        e.fibres[e.stacks].stack = static_cast<char *>(p) + PAGE_BYTES;
    }
    return true;
}

void resume(int i)
{
    here.thread = i;
    here.team_epoch = e.fibres[i].team_epoch;
    now.thread = e.fibres[i].index;
    kl_fibre_switch(&e.scheduler, e.fibres[i].sp);
}

/* ---- releasing what waits ---- */

const char *what(const fibre &f)
{
    switch (f.is) {
    case state::at_barrier: return "waits at the barrier";
    case state::at_wave: return "waits at the wave barrier";
    case state::at_shuffle: return "waits at the shuffle";
    case state::ended: return "has left";
    case state::ready: break;
    }
    return "runs";
}

void fail_divergent(int a, int b)
{
    const fibre &f = e.fibres[a], &g = e.fibres[b];
    char place[128] = "";
    if (g.is != state::ended)
        snprintf(place, sizeof place, " of %s:%d", base_name(g.where.file), g.where.line);
    fail("block (%u, %u, %u): thread %d %s of %s:%d, thread %d %s%s; every thread must reach every "
         "barrier "
         "and shuffle",
         now.block.x, now.block.y, now.block.z, a, what(f), base_name(f.where.file), f.where.line,
         b, what(g), place);
}

bool same_place(const fibre &f, const fibre &g)
{
    return f.is == g.is && f.where.line == g.where.line && f.where.file == g.where.file
           && (f.is == state::at_barrier || f.width == g.width);
}

/* the segment of lanes that thread i waits with: all at one place, or -1 and the first that is not */
int odd_one_out(int begin, int end, int i)
{
    for (int j = begin; j < end; j++)
        if (!same_place(e.fibres[i], e.fibres[j]))
            return j;
    return -1;
}

void segment_of(int i, int *begin, int *end)
{
    const int wave = i / chosen.wave * chosen.wave, lane = i - wave, width = e.fibres[i].width;
    *begin = wave + lane / width * width;
    *end = *begin + width < e.n_threads ? *begin + width : e.n_threads;
}

void release_segment(int begin, int end)
{
    for (int j = begin; j < end; j++) {
        fibre &f = e.fibres[j];
        if (f.is == state::at_shuffle)
            f.result = f.source < 0 ? f.bits : e.fibres[begin + f.source].bits;
        else
            f.team_epoch++;
    }
    for (int j = begin; j < end; j++)
        e.fibres[j].is = state::ready;
}

/* true when a thread can run again; false at the end of the block or when it failed */
bool release()
{
    bool released = false, waiting = false;
    int stuck = -1, with = -1;
    for (int i = 0; i < e.n_threads; i++) {
        const fibre &f = e.fibres[i];
        if (f.is == state::ready) {
            released = true;
        } else if (f.is == state::at_shuffle || f.is == state::at_wave) {
            int begin, end;
            segment_of(i, &begin, &end);
            const int odd = odd_one_out(begin, end, i);
            if (odd < 0) {
                release_segment(begin, end);
                released = true;
            } else if (stuck < 0 && e.fibres[odd].is != state::ready) {
                stuck = i;
                with = odd;
            }
        }
        waiting = waiting || f.is == state::at_barrier;
    }
    if (released)
        return true;
    if (stuck >= 0) {
        fail_divergent(stuck, with);
        return false;
    }
    if (!waiting)
        return false;
    int first = 0;
    while (e.fibres[first].is != state::at_barrier)
        first++;
    const int odd = odd_one_out(0, e.n_threads, first);
    if (odd >= 0) {
        fail_divergent(first, odd);
        return false;
    }
    for (int i = 0; i < e.n_threads; i++)
        e.fibres[i].is = state::ready;
    here.epoch++;
    return true;
}

/* ---- a block, a grid ---- */

void shuffle_order()
{
    for (int i = e.n_threads - 1; i > 0; i--) {
        const int j = static_cast<int>(next_random() % static_cast<uint64_t>(i + 1));
        const int t = e.order[i];
        e.order[i] = e.order[j];
        e.order[j] = t;
    }
}

void run_block(dim3 block)
{
    here.block++;
    here.first_epoch = ++here.epoch;
    empty_shared(e.dynamic_bytes);
    int i = 0;
    for (unsigned z = 0; z < block.z; z++)
        for (unsigned y = 0; y < block.y; y++)
            for (unsigned x = 0; x < block.x; x++, i++) {
                fibre &f = e.fibres[i];
                f.sp = kl_fibre_start(f.stack + STACK_BYTES, entry);
                f.index = uint3{ x, y, z };
                f.is = state::ready;
                f.team_epoch = 0;
                e.order[i] = i;
            }
    do {
        if (chosen.seed != 0)
            shuffle_order();
        for (int j = 0; j < e.n_threads && !e.failed; j++)
            if (e.fibres[e.order[j]].is == state::ready)
                resume(e.order[j]);
    } while (!e.failed && release());
}

int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

void run_grid(dim3 grid, dim3 block)
{
    const int64_t n = int64_t(grid.x) * grid.y * grid.z;
    const int64_t first = chosen.last > 0 && chosen.last < n ? n - chosen.last : 0;
    int64_t at = 0, step = 1;
    if (chosen.seed != 0) {
        e.random = chosen.seed * 0x9e3779b97f4a7c15u | 1;
        at = static_cast<int64_t>(next_random() >> 33) % n;
        do
            step = static_cast<int64_t>(next_random() >> 33) % n + 1;
        while (gcd(step, n) != 1);
    }
    now.block_size = block;
    now.grid_size = grid;
    now.wave_size = chosen.wave;
    for (int64_t i = 0; i < n && !e.failed; i++, at = (at + step) % n) {
        if (at < first)
            continue;
        now.block =
            uint3{ static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                   static_cast<unsigned>(at / grid.x / grid.y) };
        run_block(block);
    }
}

} // namespace

/* ---- called by kernels ---------------------------------------------------------------------- */

void barrier(site where)
{
    me().is = state::at_barrier;
    me().where = where;
    suspend();
}

static int lane_in_wave() { return here.thread % chosen.wave; }

int lane_of(int width) { return lane_in_wave() % (width > 0 ? width : 1); }

static void check_width(int width, site where)
{
    if (width >= 1 && width <= chosen.wave && (width & (width - 1)) == 0)
        return;
    fail("thread %d: %s:%d has a width of %d; it must be a power of two up to the wave of %d",
         here.thread, base_name(where.file), where.line, width, chosen.wave);
    stop();
}

void wave_barrier(int width, site where)
{
    check_width(width, where);
    me().is = state::at_wave;
    me().where = where;
    me().width = width;
    suspend();
}

uint64_t shuffle(uint64_t bits, int source, int width, site where)
{
    check_width(width, where);
    const int lane = lane_in_wave(), begin = here.thread - lane + lane / width * width;
    if (source >= width || begin + source >= e.n_threads) {
        fail("thread %d: the shuffle of %s:%d reads lane %d of %d", here.thread,
             base_name(where.file), where.line, source,
             begin + width <= e.n_threads ? width : e.n_threads - begin);
        stop();
    }
    fibre &f = me();
    f.is = state::at_shuffle;
    f.where = where;
    f.width = width;
    f.source = source;
    f.bits = bits;
    suspend();
    return me().result;
}

/* ---- launch --------------------------------------------------------------------------------- */

void begin_launch(const char *name)
{
    e.lock.lock();
    e.kernel = name;
    e.failed = false;
    e.launches++;
    here.thread = 0;
}

void check_pointer(int argument, const void *p)
{
    if (p != nullptr && !is_device_memory(p, 1))
        fail("argument %d is %p, which is no device memory", argument, p);
}

/* A word is taken for the host's address when there is memory and it is no device memory. Sizes are far below any. */
void check_words(int argument, const void *p, size_t n_bytes)
{
    const uint64_t lowest = UINT64_C(1) << 40, highest = UINT64_C(1) << 47;
    for (size_t i = 0; i + sizeof(uint64_t) <= n_bytes; i += sizeof(uint64_t)) {
        uint64_t word;
        unsigned char resident;
        memcpy(&word, static_cast<const char *>(p) + i, sizeof word);
        if (word < lowest || word >= highest)
            continue;
        void *at = reinterpret_cast<void *>(static_cast<uintptr_t>(word));
        void *page =
            reinterpret_cast<void *>(static_cast<uintptr_t>(word) / PAGE_BYTES * PAGE_BYTES);
        if (!is_device_memory(at, 1) && mincore(page, 1, &resident) == 0)
            fail("argument %d has %p at byte %zu, which is the host's memory", argument, at, i);
    }
}

void run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void *), void *arguments)
{
    const int64_t threads = int64_t(block.x) * block.y * block.z;
    const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
    if (blocks < 1 || grid.y > 65535 || grid.z > 65535 || threads < 1 || threads > MAX_THREADS
        || blocks * threads >= INT64_C(1) << 32)
        fail("a grid of (%u, %u, %u) blocks of (%u, %u, %u) threads cannot be launched", grid.x,
             grid.y, grid.z, block.x, block.y, block.z);
    else if (!make_stacks(static_cast<int>(threads)))
        fail("out of memory: stacks of %lld threads", static_cast<long long>(threads));
    e.n_threads = static_cast<int>(threads);
    e.dynamic_bytes = shared_bytes;
    e.body = body;
    e.arguments = arguments;
    if (!e.failed)
        run_grid(grid, block);
    if (const char *damage = e.failed ? nullptr : damaged_guard())
        fail("%s", damage);
    e.lock.unlock();
}

hipError_t set_error(hipError_t error, const char *text)
{
    last_error = error;
    snprintf(sentence, sizeof sentence, "%s", text);
    return error;
}

std::mutex &memory_lock() { return e.lock; }

} // namespace kl_host

/* what a test asks for: lanes of a wave (32 or 64), order of threads and blocks (0: rising), checks of shared memory */
extern "C" __attribute__((visibility("default"))) void kl_host_set(int wave, uint64_t seed,
                                                                   int checks)
{
    const std::lock_guard<std::mutex> hold(kl_host::e.lock);
    kl_host::chosen.wave = wave == 64 ? 64 : 32;
    kl_host::chosen.seed = seed;
    kl_host::chosen.checks = checks != 0;
}

/* of each grid only its last `blocks` run, so that a test reaches the end of an array of any size; 0: all */
extern "C" __attribute__((visibility("default"))) void kl_host_last(int64_t blocks)
{
    const std::lock_guard<std::mutex> hold(kl_host::e.lock);
    kl_host::chosen.last = blocks;
}

/* how many kernels were launched */
extern "C" __attribute__((visibility("default"))) int64_t kl_host_launches()
{
    const std::lock_guard<std::mutex> hold(kl_host::e.lock);
    return kl_host::e.launches;
}

hipError_t hipGetLastError()
{
    const hipError_t error = kl_host::last_error;
    kl_host::last_error = hipSuccess;
    return error;
}

/* what a test asks for, in the place of another library: an error of the calling thread that nobody has read */
extern "C" __attribute__((visibility("default"))) void kl_host_leave_error()
{
    kl_host::set_error(hipErrorInvalidValue, "another library's error");
}

const char *hipGetErrorString(hipError_t error)
{
    return error == hipSuccess ? "no error" : kl_host::sentence;
}

/* what a test asks for: a device that the library has no code for */
static bool codeless;
extern "C" __attribute__((visibility("default"))) void kl_host_codeless(int yes)
{
    codeless = yes != 0;
}

hipError_t hipFuncGetAttributes(hipFuncAttributes *attributes, const void *)
{
    if (codeless)
        return kl_host::set_error(hipErrorInvalidDeviceFunction, "invalid device function");
    attributes->maxThreadsPerBlock = kl_host::MAX_THREADS;
    return hipSuccess;
}

hipError_t hipGetDeviceProperties(hipDeviceProp_t *properties, int device)
{
    if (device != 0)
        return kl_host::set_error(hipErrorInvalidDevice, "the host build has one device, 0");
    *properties = {};
    snprintf(properties->name, sizeof properties->name, "host build, wave of %d",
             kl_host::chosen.wave);
    snprintf(properties->gcnArchName, sizeof properties->gcnArchName, "host:wave%d",
             kl_host::chosen.wave);
    properties->sharedMemPerBlock = kl_host::chosen.shared_bytes;
    properties->warpSize = kl_host::chosen.wave;
    properties->multiProcessorCount = 1;
    size_t free_bytes;
    return hipMemGetInfo(&free_bytes, &properties->totalGlobalMem);
}
