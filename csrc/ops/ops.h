/* The op table. A public op (ops/<op>.c) checks its arguments and calls the entry of the context's
 * backend; a backend fills in the table and knows nothing else. The CPU's entries stand beside the
 * checks in ops/<op>.c, under the name cpu_<op>. */
#ifndef KL_OPS_H
#define KL_OPS_H

#include "../internal.h"

/* One line an op: name, then its parameters after the context. */
#define KL_OPS(OP)                                                                                 \
    OP(add, (kl_ctx *, float *, const float *, const float *, int64_t))                            \
    OP(sigmoid, (kl_ctx *, float *, const float *, int64_t))                                       \
    OP(swiglu, (kl_ctx *, float *, const float *, const float *, int64_t))                         \
    OP(softmax, (kl_ctx *, float *, const float *, int64_t, int64_t))                              \
    OP(rms_norm, (kl_ctx *, float *, const float *, const float *, int64_t, int64_t, float))       \
    OP(gated_rms_norm, (kl_ctx *, float *, const float *, const float *, const float *, int64_t,   \
                        int64_t, float, kl_activation))                                            \
    OP(l2_norm, (kl_ctx *, float *, const float *, int64_t, int64_t, float))                       \
    OP(embedding, (kl_ctx *, float *, const int32_t *, const kl_weight *, int64_t))                \
    OP(linear, (kl_ctx *, float *const *, const float *, const kl_weight *, const float *const *,  \
                int, int64_t, int64_t))                                                            \
    OP(route, (kl_ctx *, int32_t *, float *, const float *, const float *, const kl_route_args *)) \
    OP(moe, (kl_ctx *, float *, const float *, const int32_t *, const float *, const kl_weight *,  \
             const kl_weight *, const kl_weight *, const float *, int64_t, int64_t, int64_t,       \
             int64_t))                                                                             \
    OP(short_conv, (kl_ctx *, float *, kl_slots, const float *, const float *, kl_slots,           \
                    const int64_t *, int64_t, int64_t, int64_t, int64_t, kl_activation))           \
    OP(decay_gate, (kl_ctx *, float *, const float *, const float *, const float *, int64_t,       \
                    int64_t, int64_t, float))                                                      \
    OP(delta_rule, (kl_ctx *, float *, kl_slots, const float *, const float *, const float *,      \
                    const float *, const float *, kl_slots, const kl_delta_rule_args *))           \
    OP(cache_append, (kl_ctx *, kl_cache, const float *, const int64_t *, const int64_t *,         \
                      int64_t, int64_t, int64_t))                                                  \
    OP(latent_attention, (kl_ctx *, float *, const float *, kl_cache, kl_cache, const kl_weight *, \
                          const kl_weight *, const kl_latent_attention_args *))                    \
    OP(sample, (kl_ctx *, int32_t *, const float *, const kl_sample_args *, int64_t, int64_t))

struct kl_backend {
    const char *name;
    /* memory of the backend, 64-byte aligned; NULL when there is none left */
    void *(*allocate)(kl_ctx *ctx, size_t n_bytes);
    void (*release)(kl_ctx *ctx, void *p, size_t n_bytes);
    /* copies between its memory and the host's, in order with the ops */
    kl_status (*upload)(kl_ctx *ctx, void *to, const void *from, size_t n_bytes);
    kl_status (*download)(kl_ctx *ctx, void *to, const void *from, size_t n_bytes);
    kl_status (*copy)(kl_ctx *ctx, void *to, const void *from, size_t n_bytes);
    kl_status (*clear)(kl_ctx *ctx, void *to, size_t n_bytes);
#define KL_OP(name, parameters) kl_status(*name) parameters;
    KL_OPS(KL_OP)
#undef KL_OP
};

#define KL_OP(name, parameters) kl_status cpu_##name parameters;
KL_OPS(KL_OP)
#undef KL_OP

extern const kl_backend kl_cpu_backend; /* cpu/backend.c */

#endif
