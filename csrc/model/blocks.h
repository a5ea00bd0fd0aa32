/* The blocks of a layer: mixers and feed-forwards, each from normed rows x [T, D] to what joins the stream, and what
 * their files share. Arrays are addresses in the backend's memory; nothing here reads through them. */
#ifndef KL_BLOCKS_H
#define KL_BLOCKS_H

#include "pass.h"

#include <math.h>

#define TRY KL_TRY
#define NEW(name, n)                                                                               \
    float *name;                                                                                   \
    KL_SCRATCH(name, p->ctx, n)

/* out [T, D] of x [T, D] */
typedef kl_status (*kl_block)(pass *p, int64_t layer, float *out, const float *x);

kl_status kl_run_kda(pass *p, int64_t layer, float *out, const float *x) KL_CHECKED;
kl_status kl_run_gdn(pass *p, int64_t layer, float *out, const float *x) KL_CHECKED;
kl_status kl_run_mla(pass *p, int64_t layer, float *out, const float *x) KL_CHECKED;
kl_status kl_run_attn(pass *p, int64_t layer, float *out, const float *x) KL_CHECKED;
kl_status kl_run_dense(pass *p, int64_t layer, float *out, const float *x) KL_CHECKED;
kl_status kl_run_moe(pass *p, int64_t layer, float *out, const float *x) KL_CHECKED;

static inline float inverse_sqrt(int64_t n) { return (float)(1.0 / sqrt((double)n)); }

/* y[i] = x w[i]^T */
static inline kl_status project(pass *p, float *const *y, const float *x, const kl_weight *w, int n,
                                int64_t D)
{
    return kl_linear(p->ctx, y, x, w, NULL, n, p->T, D);
}

static inline kl_status project_one(pass *p, float *y, const float *x, const kl_weight *w)
{
    return kl_linear(p->ctx, &y, x, w, NULL, 1, p->T, w->cols);
}

#endif
