/* The CPU as a backend: its memory is the host's, its ops are cpu_<op> in ops/<op>.c. */
#include "../ops/ops.h"

#include <string.h>

static kl_status copy_bytes(kl_ctx *ctx, void *to, const void *from, size_t n_bytes)
{
    (void)ctx;
    memcpy(to, from, n_bytes);
    return KL_OK;
}

static kl_status clear_bytes(kl_ctx *ctx, void *to, size_t n_bytes)
{
    (void)ctx;
    memset(to, 0, n_bytes);
    return KL_OK;
}

const kl_backend kl_cpu_backend = { .name = "cpu",
                                    .reads_host_memory = 1,
                                    .allocate = kl_allocate,
                                    .release = kl_release,
                                    .upload = copy_bytes,
                                    .download = copy_bytes,
                                    .copy = copy_bytes,
                                    .clear = clear_bytes,
                                    .stage = copy_bytes,
#define KL_OP(name, parameters) .name = cpu_##name,
                                    KL_OPS(KL_OP)
#undef KL_OP
};
