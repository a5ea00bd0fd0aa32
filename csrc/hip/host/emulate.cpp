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

namespace
{

enum {
    MAX_THREADS = 1024,
    STACK_BYTES = 128 * 1024,
    PAGE_BYTES = 4096,
    SHARED_BYTES = 64 * 1024, /* what a block has on every GPU but the newest */
    MAX_REGIONS = 64,
    TEAM = 32, /* lanes that a wave barrier of gpu.h orders */
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

} // namespace

/* Who touched 4 bytes last. Epochs count barriers, over all blocks, so that what an earlier block left
 * is older than this block's first. */
struct cell {
    uint32_t write_epoch, write_team_epoch, read_epoch, read_team_epoch;
    int16_t writer, reader; /* a thread; readers: see team_of */
    bool by_atomic;
};

namespace
{

/* who read: a thread; several of team t: -2 - t; several of several teams */
enum { SEVERAL_TEAMS = -1000 };
int team_of(int who) { return who >= 0 ? who / TEAM : who > SEVERAL_TEAMS ? -2 - who : -1; }

struct engine {
    std::mutex lock;
    fibre fibres[MAX_THREADS];
    int order[MAX_THREADS];
    int n_threads, current, stacks;
    void *scheduler;
    void (*body)(void *);
    void *arguments;
    const char *kernel;
    bool failed;
    uint64_t block; /* serial number over all launches */
    uint32_t epoch, first_epoch;
    uint64_t random;
    region regions[MAX_REGIONS];
    int n_regions;
    size_t shared_used, dynamic_bytes;
    region *dynamic;
    alignas(64) unsigned char memory[SHARED_BYTES];
    cell cells[SHARED_BYTES / 4];
};

engine e;
settings chosen = settings_from_environment();
thread_local hipError_t last_error;
thread_local char sentence[512];

uint64_t next_random()
{
    e.random ^= e.random << 13;
    e.random ^= e.random >> 7;
    e.random ^= e.random << 17;
    return e.random;
}

fibre &me() { return e.fibres[e.current]; }

void suspend() { kl_fibre_switch(&me().sp, e.scheduler); }

/* the thread's own failure: the sentence is left, the thread never goes on */
[[noreturn]] void stop()
{
    for (;;) {
        me().is = state::ended;
        suspend();
    }
}

__attribute__((format(printf, 1, 2))) void fail(const char *format, ...)
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

const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash != nullptr ? slash + 1 : path;
}

void entry()
{
    e.body(e.arguments);
    for (;;) {
        me().is = state::ended;
        suspend();
    }
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
    e.current = i;
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
    e.epoch++;
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
    e.block++;
    e.first_epoch = ++e.epoch;
    e.n_regions = 0;
    e.shared_used = 0;
    e.dynamic = nullptr;
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

static int lane_in_wave() { return e.current % chosen.wave; }

int lane_of(int width) { return lane_in_wave() % (width > 0 ? width : 1); }

static void check_width(int width, site where)
{
    if (width >= 1 && width <= chosen.wave && (width & (width - 1)) == 0)
        return;
    fail("thread %d: %s:%d has a width of %d; it must be a power of two up to the wave of %d",
         e.current, base_name(where.file), where.line, width, chosen.wave);
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
    const int lane = lane_in_wave(), begin = e.current - lane + lane / width * width;
    if (source >= width || begin + source >= e.n_threads) {
        fail("thread %d: the shuffle of %s:%d reads lane %d of %d", e.current,
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

/* ---- shared memory -------------------------------------------------------------------------- */

static region *take_bytes(const char *name, size_t n_bytes)
{
    const size_t begin = (e.shared_used + 63) / 64 * 64;
    if (begin + n_bytes > chosen.shared_bytes || e.n_regions == MAX_REGIONS) {
        fail("shared memory %s needs %zu bytes behind %zu; a block has %zu", name, n_bytes, begin,
             chosen.shared_bytes);
        stop();
    }
    region *r = &e.regions[e.n_regions++];
    *r = region{ name, e.memory + begin, e.cells + begin / 4, n_bytes };
    memset(r->data, 0xff, n_bytes); /* NaN */
    e.shared_used = begin + n_bytes;
    return r;
}

region *take(slot *of, const char *name, size_t n_bytes)
{
    if (of->block != e.block) {
        of->block = e.block;
        of->taken = take_bytes(name, n_bytes);
    }
    return of->taken;
}

region *take_dynamic(const char *name)
{
    if (e.dynamic == nullptr)
        e.dynamic = take_bytes(name, e.dynamic_bytes);
    return e.dynamic;
}

void out_of_bounds(const region *r, int64_t index, int64_t n)
{
    fail("block (%u, %u, %u), thread %d: shared memory %s[%lld] of %lld", now.block.x, now.block.y,
         now.block.z, e.current, r->name, static_cast<long long>(index), static_cast<long long>(n));
    stop();
}

namespace
{

bool is_before(uint32_t epoch, uint32_t team_epoch, bool same_team)
{
    return epoch < e.epoch || (same_team && team_epoch < me().team_epoch);
}

[[noreturn]] void fail_race(const region *r, const cell &c, const char *how, int other)
{
    char by[32] = "several threads";
    if (other >= 0)
        snprintf(by, sizeof by, "thread %d", other);
    fail("block (%u, %u, %u), thread %d %s shared memory %s + %lld bytes, which %s touched with no "
         "barrier between",
         now.block.x, now.block.y, now.block.z, e.current, how, r->name,
         4 * static_cast<long long>(&c - r->cells), by);
    stop();
}

void check_write(const region *r, const cell &c, const char *how)
{
    const int team = e.current / TEAM;
    if (c.write_epoch >= e.first_epoch && c.writer != e.current
        && !is_before(c.write_epoch, c.write_team_epoch, c.writer / TEAM == team))
        fail_race(r, c, how, c.writer);
    if (c.read_epoch < e.first_epoch || c.reader == e.current)
        return;
    if (!is_before(c.read_epoch, c.read_team_epoch, team_of(c.reader) == team))
        fail_race(r, c, how, c.reader);
}

template <class Each> void each_cell(const region *r, const void *p, size_t n_bytes, Each each)
{
    if (!chosen.checks || n_bytes < 4)
        return;
    const size_t at = static_cast<size_t>(static_cast<const unsigned char *>(p) - r->data);
    for (size_t i = at / 4; i < (at + n_bytes + 3) / 4; i++)
        each(r->cells[i]);
}

} // namespace

void note_read(const region *r, const void *p, size_t n_bytes)
{
    each_cell(r, p, n_bytes, [r](cell &c) {
        const int16_t self = static_cast<int16_t>(e.current);
        if (c.write_epoch < e.first_epoch) {
            fail("block (%u, %u, %u), thread %d reads shared memory %s + %lld bytes, which nobody "
                 "wrote",
                 now.block.x, now.block.y, now.block.z, e.current, r->name,
                 4 * static_cast<long long>(&c - r->cells));
            stop();
        }
        if (c.writer != self
            && !is_before(c.write_epoch, c.write_team_epoch, c.writer / TEAM == self / TEAM))
            fail_race(r, c, "reads", c.writer);
        const int team = self / TEAM;
        if (c.reader == self
            || is_before(c.read_epoch, c.read_team_epoch, team_of(c.reader) == team))
            c.reader = self;
        else
            c.reader = static_cast<int16_t>(team_of(c.reader) == team ? -2 - team : SEVERAL_TEAMS);
        c.read_epoch = e.epoch;
        c.read_team_epoch = me().team_epoch;
    });
}

void note_write(const region *r, const void *p, size_t n_bytes)
{
    each_cell(r, p, n_bytes, [r](cell &c) {
        check_write(r, c, "writes");
        c.writer = static_cast<int16_t>(e.current);
        c.write_epoch = e.epoch;
        c.write_team_epoch = me().team_epoch;
        c.by_atomic = false;
    });
}

/* atomics of several threads are in order among themselves */
void note_atomic(const region *r, const void *p, size_t n_bytes)
{
    each_cell(r, p, n_bytes, [r](cell &c) {
        const bool among_atomics = c.by_atomic && c.write_epoch == e.epoch;
        if (c.write_epoch < e.first_epoch) {
            fail("thread %d adds to shared memory %s + %lld bytes, which nobody wrote", e.current,
                 r->name, 4 * static_cast<long long>(&c - r->cells));
            stop();
        }
        if (!among_atomics)
            check_write(r, c, "adds to");
        c.writer = static_cast<int16_t>(e.current);
        c.write_epoch = e.epoch;
        c.write_team_epoch = me().team_epoch;
        c.by_atomic = true;
    });
}

/* ---- launch --------------------------------------------------------------------------------- */

void begin_launch(const char *name)
{
    e.lock.lock();
    e.kernel = name;
    e.failed = false;
    e.current = 0;
}

void check_pointer(int argument, const void *p)
{
    if (p != nullptr && !is_device_memory(p, 1))
        fail("argument %d is %p, which is no device memory", argument, p);
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

hipError_t hipGetLastError()
{
    const hipError_t error = kl_host::last_error;
    kl_host::last_error = hipSuccess;
    return error;
}

const char *hipGetErrorString(hipError_t error)
{
    return error == hipSuccess ? "no error" : kl_host::sentence;
}

hipError_t hipGetDeviceProperties(hipDeviceProp_t *properties, int device)
{
    if (device != 0)
        return kl_host::set_error(hipErrorInvalidDevice, "the host build has one device, 0");
    *properties = {};
    snprintf(properties->name, sizeof properties->name, "host build, wave of %d",
             kl_host::chosen.wave);
    snprintf(properties->gcnArchName, sizeof properties->gcnArchName, "host");
    properties->sharedMemPerBlock = kl_host::chosen.shared_bytes;
    properties->warpSize = kl_host::chosen.wave;
    properties->multiProcessorCount = 1;
    size_t free_bytes;
    return hipMemGetInfo(&free_bytes, &properties->totalGlobalMem);
}
