/* latent_attention, expanded (expand.hip): for the leading tokens of each sequence that take this form. */
#ifndef KL_HIP_EXPAND_H
#define KL_HIP_EXPAND_H

#include "cache.h"

struct kl_expansion {
    float *o;       /* [T, H, V]: of these tokens it is written */
    const float *q; /* [T, H, K + P] */
    kl_cached latent, k_shared;
    const kl_weight *w_uk, *w_uv;
    const kl_latent_attention_args *args;
};

/* Takes scratch, gives it back; launches. */
kl_status kl_expand_run(kl_ctx *ctx, const kl_expansion &e) KL_CHECKED;

#endif
