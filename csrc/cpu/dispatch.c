/* Which kernel tables this machine can run, and the choice of one. */
#include "kernels.h"

#include "../system.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
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

static int available(const kl_kernels *tables[TABLES])
{
    int n = 0;
    tables[n++] = &kl_kernels_scalar;
#if defined(__x86_64__)
    if (runs_avx2())
        tables[n++] = &kl_kernels_avx2;
    if (runs_avxvnni())
        tables[n++] = &kl_kernels_avxvnni;
    else if (runs_avx512())
        tables[n++] = &kl_kernels_avxvnni_evex;
    if (runs_avx512())
        tables[n++] = &kl_kernels_avx512;
    if (runs_avx512bf16())
        tables[n++] = &kl_kernels_avx512bf16;
#elif defined(__aarch64__)
    tables[n++] = &kl_kernels_neon;
    if (kl_has_sdot())
        tables[n++] = &kl_kernels_neon_dotprod;
#endif
    return n;
}

int kl_isa_list(const char *names[], int capacity)
{
    const kl_kernels *tables[TABLES];
    const int n = available(tables);
    for (int i = 0; i < n && i < capacity; i++)
        names[i] = tables[i]->name;
    return n;
}

kl_status kl_kernels_choose(kl_ctx *ctx, const char *isa)
{
    const kl_kernels *tables[TABLES];
    const int n = available(tables);
    ctx->k = tables[n - 1];
    if (isa == NULL)
        return KL_OK;
    for (int i = 0; i < n; i++)
        if (strcmp(isa, tables[i]->name) == 0) {
            ctx->k = tables[i];
            return KL_OK;
        }
    char names[128] = "";
    for (int i = 0; i < n; i++) {
        const size_t used = strlen(names);
        snprintf(names + used, sizeof names - used, "%s%s", i > 0 ? ", " : "", tables[i]->name);
    }
    return kl_fail(ctx, KL_ERR_UNSUPPORTED, "isa is \"%s\"; here it must be one of: %s", isa,
                   names);
}
