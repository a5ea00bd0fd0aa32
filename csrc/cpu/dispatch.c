/* Which kernel tables this machine can run, and the choice of one. */
#include "kernels.h"

#include "../system.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#if defined(__x86_64__)
/* __builtin_cpu_supports also asks the operating system whether it saves the wide registers */
static bool runs_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
           && __builtin_cpu_supports("f16c");
}

/* a bit of leaf 7.1, which not every compiler's __builtin_cpu_supports knows */
static bool runs_avxvnni(void)
{
    unsigned a, b, c, d;
    return runs_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1) != 0;
}

static bool runs_avx512(void)
{
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
           && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
           && __builtin_cpu_supports("avx512vnni");
}

static bool runs_avx512bf16(void) { return runs_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

enum { TABLES = 5 };
static kl_kernels table[TABLES]; /* [n_tables] that run here, the best last */
static int n_tables;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void add(const kl_kernels *kernels) { table[n_tables++] = *kernels; }

/* Those of a table, but for those of an extension. */
static void add_extended(kl_kernels kernels, const kl_kernels *extension)
{
    kernels.name = extension->name;
#define KL_KERNEL(kernel, type, parameters)                                                        \
    if (extension->kernel != NULL)                                                                 \
        kernels.kernel = extension->kernel;
#include "kernels.def"
#undef KL_KERNEL
    add(&kernels);
}

static void find_tables(void)
{
    add(&kl_kernels_scalar);
#if defined(__x86_64__)
    if (runs_avx2())
        add(&kl_kernels_avx2);
    if (runs_avxvnni())
        add_extended(kl_kernels_avx2, &kl_kernels_avxvnni);
    else if (runs_avx512())
        add_extended(kl_kernels_avx2, &kl_kernels_avxvnni_evex);
    if (runs_avx512())
        add(&kl_kernels_avx512);
    if (runs_avx512bf16())
        add_extended(kl_kernels_avx512, &kl_kernels_avx512bf16);
#elif defined(__aarch64__)
    add(&kl_kernels_neon);
    if (kl_has_sdot())
        add_extended(kl_kernels_neon, &kl_kernels_neon_dotprod);
#endif
}

int kl_isa_list(const char *names[], int capacity)
{
    pthread_once(&once, find_tables);
    for (int i = 0; i < n_tables && i < capacity; i++)
        names[i] = table[i].name;
    return n_tables;
}

kl_status kl_kernels_choose(kl_ctx *ctx, const char *isa)
{
    char names[128] = "";
    size_t used = 0;
    pthread_once(&once, find_tables);
    for (int i = n_tables - 1; i >= 0; i--)
        if (isa == NULL || strcmp(isa, table[i].name) == 0) {
            ctx->k = &table[i];
            return KL_OK;
        }
    for (int i = 0; i < n_tables; i++)
        used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", i > 0 ? ", " : "",
                                 table[i].name);
    return kl_fail(ctx, KL_ERR_UNSUPPORTED, "isa is \"%s\"; here it must be one of: %s", isa,
                   names);
}
