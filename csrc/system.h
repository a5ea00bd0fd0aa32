/* What Linux and macOS call by different names: all of it is here and in system.c (and kl_now_ns, in internal.h). */
#ifndef KL_SYSTEM_H
#define KL_SYSTEM_H

#include <stdbool.h>
#include <stdint.h>

/* Processors that threads should share the work on, >= 1: on Linux those that this process may run on, on macOS the fast
 * ones of a processor that has slow ones, too. */
int kl_processors(void);

/* Bytes of memory that the machine has; INT64_MAX where it does not say. */
int64_t kl_memory(void);

#if defined(__aarch64__)
bool kl_has_sdot(void);
#endif

#endif
