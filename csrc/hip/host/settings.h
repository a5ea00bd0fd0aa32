/* What the parts of the host build share. */
#ifndef KL_HOST_SETTINGS_H
#define KL_HOST_SETTINGS_H

#include "gpu.h"

#include <mutex>
#include <stdlib.h>

namespace kl_host
{

struct settings {
    int wave;      /* KL_GPU_WAVE: 32 or 64 */
    uint64_t seed; /* KL_GPU_SEED: order of threads and blocks; 0: rising */
    bool checks;   /* KL_GPU_CHECKS=0: shared memory is poisoned, but who touches it is not kept */
    size_t shared_bytes; /* of a block */
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
                     64 * 1024 };
}

/* memory.cpp; both are called with the lock held */
bool is_device_memory(const void *p, size_t n_bytes);
const char *damaged_guard(); /* a sentence when something wrote next to an allocation; once */

/* emulate.cpp */
hipError_t set_error(hipError_t error, const char *text);
std::mutex &memory_lock();

} // namespace kl_host

#endif
