/* The list of ops, from which the op table, the profile and the names are made. */
#ifndef KL_OPS_LIST_H
#define KL_OPS_LIST_H

#include "../kimi_linear.h"

/* One line an op: name, then its parameters after the context. */
#define KL_OPS(OP)                                                                                 \
    OP(add, (kl_ctx *, float *, const float *, const float *, int64_t))                            \
    OP(sigmoid, (kl_ctx *, float *, const float *, int64_t))                                       \
    OP(swiglu, (kl_ctx *, float *, const float *, const float *, int64_t, float))                  \
    OP(situ, (kl_ctx *, float *, const float *, const float *, int64_t, const kl_situ_betas *))    \
    OP(sigmoid_gate, (kl_ctx *, float *, const float *, const float *, int64_t, int64_t, int64_t)) \
    OP(softmax, (kl_ctx *, float *, const float *, int64_t, int64_t))                              \
    OP(rms_norm, (kl_ctx *, float *, const float *, const float *, int64_t, int64_t, float))       \
    OP(layer_norm,                                                                                 \
       (kl_ctx *, float *, const float *, const float *, const float *, int64_t, int64_t, float))  \
    OP(gated_rms_norm, (kl_ctx *, float *, const float *, const float *, const float *, int64_t,   \
                        int64_t, float, kl_activation))                                            \
    OP(l2_norm, (kl_ctx *, float *, const float *, int64_t, int64_t, float))                       \
    OP(attn_res, (kl_ctx *, float *, const float *, const float *, const float *, int64_t,         \
                  int64_t, int64_t, float))                                                        \
    OP(mhc_expand, (kl_ctx *, float *, const float *, int64_t, int64_t, int64_t))                  \
    OP(mhc_collapse, (kl_ctx *, float *, const float *, int64_t, int64_t, int64_t))                \
    OP(mhc_pre, (kl_ctx *, float *, float *, float *, const float *, const kl_weight *,            \
                 const float *, const float *, const kl_mhc_args *))                               \
    OP(mhc_post, (kl_ctx *, float *, const float *, const float *, const float *, const float *,   \
                  int64_t, int64_t, int64_t))                                                      \
    OP(embedding, (kl_ctx *, float *, const int32_t *, const kl_weight *, int64_t))                \
    OP(quantize, (kl_ctx *, void *, const float *, kl_type, int64_t, int64_t))                     \
    OP(dequantize, (kl_ctx *, float *, const void *, kl_type, int64_t, int64_t))                   \
    OP(linear, (kl_ctx *, float *const *, const float *, const kl_weight *, const float *const *,  \
                int, int64_t, int64_t))                                                            \
    OP(route, (kl_ctx *, int32_t *, float *, const float *, const float *, const kl_route_args *)) \
    OP(moe, (kl_ctx *, float *, const float *, const int32_t *, const float *, const kl_weight *,  \
             const kl_weight *, const kl_weight *, const float *, int64_t, int64_t, int64_t,       \
             int64_t, const kl_situ_betas *, float))                                               \
    OP(short_conv, (kl_ctx *, float *, kl_slots, const float *, const float *, kl_slots,           \
                    const int64_t *, int64_t, int64_t, int64_t, int64_t, kl_activation))           \
    OP(decay_gate, (kl_ctx *, float *, const float *, const float *, const float *, int64_t,       \
                    int64_t, int64_t, float))                                                      \
    OP(delta_rule, (kl_ctx *, float *, kl_slots, const float *, const float *, const float *,      \
                    const float *, const float *, kl_slots, const kl_delta_rule_args *))           \
    OP(decay_cumsum,                                                                               \
       (kl_ctx *, float *, const float *, const int64_t *, int64_t, int64_t, int64_t, int64_t))    \
    OP(delta_rule_intra,                                                                           \
       (kl_ctx *, float *, float *, float *, float *, float *, const float *, const float *,       \
        const float *, const float *, const float *, const kl_delta_rule_args *))                  \
    OP(delta_rule_inter,                                                                           \
       (kl_ctx *, float *, kl_slots, float *, const float *, const float *, const float *,         \
        const float *, const float *, const float *, kl_slots, const kl_delta_rule_args *))        \
    OP(cache_append, (kl_ctx *, kl_cache, const float *, const int64_t *, const int64_t *,         \
                      int64_t, int64_t, int64_t))                                                  \
    OP(index_pool, (kl_ctx *, kl_cache, kl_cache, kl_cache, const float *, const int64_t *,        \
                    const int64_t *, int64_t, int64_t, int64_t, int64_t))                          \
    OP(index_scores,                                                                               \
       (kl_ctx *, float *, const float *, kl_cache, const float *, const kl_index_args *))         \
    OP(index_select,                                                                               \
       (kl_ctx *, int32_t *, const float *, kl_cache, const float *, const kl_index_args *))       \
    OP(latent_attention, (kl_ctx *, float *, const float *, kl_cache, kl_cache, const kl_weight *, \
                          const kl_weight *, const kl_latent_attention_args *))                    \
    OP(rope, (kl_ctx *, float *, const float *, const int64_t *, int64_t, int64_t, int64_t,        \
              int64_t, double))                                                                    \
    OP(attention,                                                                                  \
       (kl_ctx *, float *, const float *, kl_cache, kl_cache, const kl_attention_args *))          \
    OP(sample, (kl_ctx *, int32_t *, const float *, const kl_sample_args *, int64_t, int64_t))

typedef enum kl_op_id {
#define KL_OP(name, parameters) KL_OP_##name,
    KL_OPS(KL_OP)
#undef KL_OP
        KL_OP_COUNT
} kl_op_id;

#endif
