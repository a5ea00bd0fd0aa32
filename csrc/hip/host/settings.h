/* What the parts of the host build share. */
#ifndef KL_HOST_SETTINGS_H
#define KL_HOST_SETTINGS_H

#include "gpu.h"

#include <mutex>
#include <stdlib.h>

namespace kl_host
{

enum : size_t {
    SHARED_BYTES = 48 * 1024
}; /* what a block has on every GPU that is not asked for more */

struct settings {
    int wave;      /* KL_GPU_WAVE: 32 or 64 */
    uint64_t seed; /* KL_GPU_SEED: order of threads and blocks; 0: rising */
    bool checks;   /* KL_GPU_CHECKS=0: shared memory is poisoned, but who touches it is not kept */
    size_t shared_bytes; /* of a block */
    int64_t last;        /* blocks of a grid that run, from its end; 0: all */
};

inline uint64_t number_from(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);
    return text != nullptr && *text != 0 ? strtoull(text, nullptr, 10) : otherwise;
}

inline settings settings_from_environment()
{
    const int wave = number_from("KL_GPU_WAVE", 32) == 64 ? 64 : 32;
    return settings{ wave, number_from("KL_GPU_SEED", 0), number_from("KL_GPU_CHECKS", 1) != 0,
                     SHARED_BYTES, 0 };
}

/* memory.cpp; all are called with the lock held */
bool is_device_memory(const void *p, size_t n_bytes);
bool is_pinned(const void *p);
const char *damaged_guard(); /* a sentence when something wrote next to an allocation; once */

/* streams.cpp */
hipError_t check_device(); /* the calling thread's must be the one that there is */
void finish_all();         /* copies of all streams; with the lock held */

/* Where the thread is that runs. Epochs count barriers, over all blocks, so that what an earlier block left is older
 * than this block's first. */
struct moment {
    int thread;
    uint64_t block; /* serial number over all launches */
    uint32_t epoch, first_epoch, team_epoch;
};

/* shared.cpp: for a block that begins */
void empty_shared(size_t dynamic_bytes);

/* emulate.cpp; fail: the launch, with its sentence; stop: the thread that runs never goes on */
extern settings chosen;
extern moment here;
__attribute__((format(printf, 1, 2))) void fail(const char *format, ...);
[[noreturn]] void stop();
hipError_t set_error(hipError_t error, const char *text);
std::mutex &memory_lock();

} // namespace kl_host

#endif
