/* Devices: "cpu" is in the library; the others are libraries of their own, beside the file that this code is in (or in
 * the folder KL_DEVICE_PATH), opened when they are first asked for and kept. What is missing is a sentence. */
#define _GNU_SOURCE /* dladdr */
#include "device.h"

#include "ops/ops.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { REASON = 256 };

static const struct {
    const char *file, *build; /* and what makes it */
} libraries[] = {
    { "_hip_host.so", "make hip-host" },
    { "_hip_amd.so", "make hip" },
    { "_hip_nvidia.so", "make hip-nvidia" },
};
enum { HOST = 0, FIRST_GPU = 1, LIBRARIES = 3 };

/* ---- what a device library sees of the core ---- */

static void *handle_of(const kl_ctx *ctx) { return ctx->device; }
static int is_measuring(const kl_ctx *ctx) { return ctx->arena.measuring; }
static kl_activations activations_of(const kl_ctx *ctx) { return ctx->activations; }
static kl_form delta_rule_of(const kl_ctx *ctx) { return ctx->delta_rule; }

static const kl_core core = {
    .fail = kl_fail,
    .scratch = kl_scratch,
    .scratch_mark = kl_scratch_mark,
    .scratch_reset = kl_scratch_reset,
    .measuring = is_measuring,
    .handle = handle_of,
    .activations = activations_of,
    .delta_rule = delta_rule_of,
    .allocation_fails = kl_allocation_fails,
};

/* ---- libraries ---- */

static void path_of(char *path, size_t n, const char *file)
{
    const char *folder = getenv("KL_DEVICE_PATH");
    Dl_info here;
    if (folder != NULL && *folder != 0) {
        snprintf(path, n, "%s/%s", folder, file);
        return;
    }
    const char *mine = dladdr((const void *)&core, &here) != 0 ? here.dli_fname : NULL;
    const char *slash = mine != NULL ? strrchr(mine, '/') : NULL;
    snprintf(path, n, "%.*s%s", slash != NULL ? (int)(slash + 1 - mine) : 0,
             slash != NULL ? mine : "", file);
}

/* NULL, and why. A library stays open: dlopen counts, and gives the same one again. */
static const kl_device_library *open_library(int which, char *reason)
{
    char path[4096];
    const char *file = libraries[which].file;
    path_of(path, sizeof path, file);
    FILE *there = fopen(path, "rb");
    if (there == NULL) {
        snprintf(reason, REASON, "%s is not there (%s builds it)", file, libraries[which].build);
        return NULL;
    }
    fclose(there);
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        snprintf(reason, REASON, "%s cannot be opened: %s", file, dlerror());
        return NULL;
    }
    kl_hip_library_fn *entry = NULL;
    *(void **)&entry = dlsym(library, KL_HIP_LIBRARY);
    const kl_device_library *made = entry != NULL ? entry(&core) : NULL;
    if (made == NULL || strcmp(made->version, KL_VERSION) != 0) {
        snprintf(reason, REASON, "%s is of version %s, and this is " KL_VERSION "; %s", file,
                 made != NULL ? made->version : "unknown", libraries[which].build);
        return NULL;
    }
    if (made->backend_bytes != KL_BACKEND_BYTES) {
        snprintf(reason, REASON, "%s was built with other sources of " KL_VERSION "; %s", file,
                 libraries[which].build);
        return NULL;
    }
    return made;
}

/* ---- by name ---- */

/* The library that has GPU number `device`, counted over all of them; its own number of it. */
static const kl_device_library *find_gpu(int *device, char *reasons, size_t n)
{
    int before = 0;
    size_t used = 0;
    for (int i = FIRST_GPU; i < LIBRARIES; i++) {
        char reason[REASON] = "";
        const kl_device_library *library = open_library(i, reason);
        const int count = library != NULL ? library->count(reason, sizeof reason) : 0;
        if (*device < before + count) {
            *device -= before;
            return library;
        }
        before += count;
        if (count == 0 && used < n)
            used +=
                (size_t)snprintf(reasons + used, n - used, "%s%s", used > 0 ? "; " : "", reason);
    }
    if (before > 0)
        snprintf(reasons, n, "this machine has %d", before);
    return NULL;
}

/* -1: not of the form "hip" or "hip:N" */
static int number_of(const char *name)
{
    char *end;
    if (strcmp(name, "hip") == 0)
        return 0;
    if (strncmp(name, "hip:", 4) != 0 || name[4] < '0' || name[4] > '9')
        return -1;
    const long n = strtol(name + 4, &end, 10);
    return *end == 0 && n < 1024 ? (int)n : -1;
}

kl_status kl_device_choose(kl_ctx *ctx, const char *name)
{
    char reason[2 * REASON] = "";
    int device = 0;
    const kl_device_library *library;
    if (name == NULL || strcmp(name, "cpu") == 0)
        return KL_OK;
    if (strcmp(name, "hip-host") == 0) {
        library = open_library(HOST, reason);
    } else {
        device = number_of(name);
        if (device < 0)
            return kl_fail(ctx, KL_ERR_ARG,
                           "device is '%s'; it must be 'cpu', 'hip', 'hip:N' or 'hip-host'", name);
        library = find_gpu(&device, reason, sizeof reason);
    }
    if (library == NULL)
        return kl_fail(ctx, KL_ERR_DEVICE, "device '%s' is not there: %s", name, reason);
    ctx->backend = library->backend; /* which closes what a failed opening leaves */
    ctx->device_number = device;
    return library->backend->open(ctx, device, &ctx->device);
}

/* ---- the list ---- */

int kl_device_list(kl_device_info *to, int capacity)
{
    int n = 0, gpus = 0;
    if (capacity > n)
        to[n] = (kl_device_info){ .name = "cpu", .available = 1, .description = "this processor" };
    n++;
    for (int i = 0; i < LIBRARIES; i++) {
        kl_device_info row = { .name = "hip-host" };
        const kl_device_library *library = open_library(i, row.reason);
        const int count = library != NULL ? library->count(row.reason, sizeof row.reason) : 0;
        for (int device = 0; device < (count > 0 ? count : 1); device++, n++) {
            row.available = count > 0 && library->describe(device, &row);
            if (i >= FIRST_GPU && count > 0)
                snprintf(row.name, sizeof row.name, "hip:%d", gpus++);
            else if (i >= FIRST_GPU)
                snprintf(row.name, sizeof row.name, "hip (%s)", i == FIRST_GPU ? "amd" : "nvidia");
            if (n < capacity)
                to[n] = row;
        }
    }
    return n;
}
