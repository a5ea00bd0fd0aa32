/* Shared memory of the block that runs: its arrays, and of each 4 bytes who touched them since which barrier. */
#include "settings.h"

#include <stdio.h>

namespace kl_host
{

/* Who touched 4 bytes last. */
struct cell {
    uint32_t write_epoch, write_team_epoch, read_epoch, read_team_epoch;
    int16_t writer, reader; /* a thread; readers: see team_of */
    bool by_atomic;
};

namespace
{

enum {
    MAX_REGIONS = 64,
    TEAM = 32, /* lanes that a wave barrier of gpu.h orders */
};

/* who read: a thread; several of team t: -2 - t; several of several teams */
enum { SEVERAL_TEAMS = -1000 };
int team_of(int who) { return who >= 0 ? who / TEAM : who > SEVERAL_TEAMS ? -2 - who : -1; }

struct block_memory {
    region regions[MAX_REGIONS];
    int n_regions;
    size_t used, dynamic_bytes;
    region *dynamic;
    alignas(64) unsigned char bytes[SHARED_BYTES];
    cell cells[SHARED_BYTES / 4];
};

block_memory memory;

} // namespace

void empty_shared(size_t dynamic_bytes)
{
    memory.n_regions = 0;
    memory.used = 0;
    memory.dynamic = nullptr;
    memory.dynamic_bytes = dynamic_bytes;
}

static region *take_bytes(const char *name, size_t n_bytes)
{
    const size_t begin = (memory.used + 63) / 64 * 64;
    if (begin + n_bytes > chosen.shared_bytes || memory.n_regions == MAX_REGIONS) {
        fail("shared memory %s needs %zu bytes behind %zu; a block has %zu", name, n_bytes, begin,
             chosen.shared_bytes);
        stop();
    }
    region *r = &memory.regions[memory.n_regions++];
    *r = region{ name, memory.bytes + begin, memory.cells + begin / 4, n_bytes };
    memset(r->data, 0xff, n_bytes); /* NaN */
    memory.used = begin + n_bytes;
    return r;
}

region *take(slot *of, const char *name, size_t n_bytes)
{
    if (of->block != here.block) {
        of->block = here.block;
        of->taken = take_bytes(name, n_bytes);
    }
    return of->taken;
}

region *take_dynamic(const char *name)
{
    if (memory.dynamic == nullptr)
        memory.dynamic = take_bytes(name, memory.dynamic_bytes);
    return memory.dynamic;
}

void out_of_bounds(const region *r, int64_t index, int64_t n)
{
    fail("block (%u, %u, %u), thread %d: shared memory %s[%lld] of %lld", now.block.x, now.block.y,
         now.block.z, here.thread, r->name, static_cast<long long>(index),
         static_cast<long long>(n));
    stop();
}

namespace
{

bool is_before(uint32_t epoch, uint32_t team_epoch, bool same_team)
{
    return epoch < here.epoch || (same_team && team_epoch < here.team_epoch);
}

[[noreturn]] void fail_race(const region *r, const cell &c, const char *how, int other)
{
    char by[32] = "several threads";
    if (other >= 0)
        snprintf(by, sizeof by, "thread %d", other);
    fail("block (%u, %u, %u), thread %d %s shared memory %s + %lld bytes, which %s touched with no "
         "barrier between",
         now.block.x, now.block.y, now.block.z, here.thread, how, r->name,
         4 * static_cast<long long>(&c - r->cells), by);
    stop();
}

void check_written(const region *r, const cell &c, const char *how)
{
    if (c.write_epoch >= here.first_epoch)
        return;
    fail("block (%u, %u, %u), thread %d %s shared memory %s + %lld bytes, which nobody wrote",
         now.block.x, now.block.y, now.block.z, here.thread, how, r->name,
         4 * static_cast<long long>(&c - r->cells));
    stop();
}

void put_writer(cell &c, bool by_atomic)
{
    c.writer = static_cast<int16_t>(here.thread);
    c.write_epoch = here.epoch;
    c.write_team_epoch = here.team_epoch;
    c.by_atomic = by_atomic;
}

void check_write(const region *r, const cell &c, const char *how)
{
    const int team = here.thread / TEAM;
    if (c.write_epoch >= here.first_epoch && c.writer != here.thread
        && !is_before(c.write_epoch, c.write_team_epoch, c.writer / TEAM == team))
        fail_race(r, c, how, c.writer);
    if (c.read_epoch < here.first_epoch || c.reader == here.thread)
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
        const int16_t self = static_cast<int16_t>(here.thread);
        check_written(r, c, "reads");
        if (c.writer != self
            && !is_before(c.write_epoch, c.write_team_epoch, c.writer / TEAM == self / TEAM))
            fail_race(r, c, "reads", c.writer);
        const int team = self / TEAM;
        if (c.reader == self
            || is_before(c.read_epoch, c.read_team_epoch, team_of(c.reader) == team))
            c.reader = self;
        else
            c.reader = static_cast<int16_t>(team_of(c.reader) == team ? -2 - team : SEVERAL_TEAMS);
        c.read_epoch = here.epoch;
        c.read_team_epoch = here.team_epoch;
    });
}

void note_write(const region *r, const void *p, size_t n_bytes)
{
    each_cell(r, p, n_bytes, [r](cell &c) {
        check_write(r, c, "writes");
        put_writer(c, false);
    });
}

/* atomics of several threads are in order among themselves */
void note_atomic(const region *r, const void *p, size_t n_bytes)
{
    each_cell(r, p, n_bytes, [r](cell &c) {
        const bool among_atomics = c.by_atomic && c.write_epoch == here.epoch;
        check_written(r, c, "adds to");
        if (!among_atomics)
            check_write(r, c, "adds to");
        put_writer(c, true);
    });
}

} // namespace kl_host
