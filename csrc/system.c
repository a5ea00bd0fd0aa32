/* What Linux and macOS call by different names: system.h. */
#define _GNU_SOURCE /* sched_getaffinity */
#include "system.h"

#include "internal.h"

#include <time.h>
#include <unistd.h>

#if defined(__APPLE__)

#include <sys/sysctl.h>

/* A number that the system has under a name; 0 where it has none. */
static int known(const char *name)
{
    int value = 0;
    size_t n = sizeof value;
    return sysctlbyname(name, &value, &n, NULL, 0) == 0 ? value : 0;
}

int kl_processors(void)
{
    const int fast = known("hw.perflevel0.logicalcpu"); /* of Apple's own, from macOS 12 */
    const int all = known("hw.activecpu");
    return fast > 0 ? fast : all > 0 ? all : 1;
}

#define CLOCK CLOCK_UPTIME_RAW /* CLOCK_MONOTONIC counts in microseconds there */

#else

#include <sched.h>

int kl_processors(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        return CPU_COUNT(&set);
    return 1;
}

#define CLOCK CLOCK_MONOTONIC

#endif

int64_t kl_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

#if defined(__ARM_FEATURE_DOTPROD) /* taken for granted by the compiler, as on Apple silicon */
bool kl_has_sdot(void) { return true; }
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>

bool kl_has_sdot(void) { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#elif defined(__aarch64__)
bool kl_has_sdot(void) { return false; }
#endif

int64_t kl_memory(void)
{
    const long pages = sysconf(_SC_PHYS_PAGES), bytes = sysconf(_SC_PAGESIZE);
    return pages > 0 && bytes > 0 ? (int64_t)pages * bytes : INT64_MAX;
}
