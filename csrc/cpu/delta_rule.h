/* One head of the delta rule over a block of tokens, for some columns of its state: what
 * kernel_delta_rule_strip takes. */
#ifndef KL_DELTA_RULE_H
#define KL_DELTA_RULE_H

#include <stdint.h>

enum {
    KL_DELTA_BLOCK = 64,   /* tokens whose factors are computed at once */
    KL_DELTA_COLUMNS = 32, /* columns of the state that stay in the first cache: [K, 32] */
};

typedef struct kl_delta_strip {
    int64_t T, K, columns;
    float *o;           /* [T, columns], rows o_step apart; may be v */
    float *to;          /* [K, columns], rows state_step apart: the state after the last token */
    const float *from;  /* the same before the first; may be to; NULL: zeros */
    const float *alpha; /* [T, K]: exp(g) */
    const float *q;     /* [T, K], scaled */
    const float *k;     /* [T, K] */
    const float *v;     /* [T, columns], rows o_step apart */
    const float *beta;  /* [T], beta_step apart */
    int64_t o_step, state_step, beta_step;
    float *scratch; /* [K, KL_DELTA_COLUMNS] */
} kl_delta_strip;

#endif
