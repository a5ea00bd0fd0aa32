/* How a superblock of 256 values is written where the format leaves the choice of scales open (Q2_K to Q6_K,
 * IQ4_NL, IQ4_XS): a search for those that lose least in the mean square. One thread, plain float32, so that a
 * row has the same bytes everywhere. A scale beyond float16 is its largest value. */
#ifndef KL_SEARCH_H
#define KL_SEARCH_H

#include "quant.h"

enum { KL_K_VALUES = 256, KL_K_SUB_BLOCKS = 16 };

/* x[s, j] = (d scale[s]) q[s, j] - dmin min[s] */
typedef struct kl_affine {
    uint16_t d, dmin; /* float16 */
    uint8_t scale[KL_K_SUB_BLOCKS], min[KL_K_SUB_BLOCKS];
    uint8_t q[KL_K_VALUES];
} kl_affine;

/* sub-blocks of `width` values (16 or 32), q = 0 .. levels, scales and minima 0 .. top */
void kl_search_affine(kl_affine *found, const float *x, int width, int levels, int top);

/* x[s, j] = (d scale[s]) v(q[s, j]) with levels v on both sides of zero */
typedef struct kl_signed {
    uint16_t d; /* float16 */
    int8_t scale[KL_K_SUB_BLOCKS];
    uint8_t q[KL_K_VALUES];
} kl_signed;

/* v(q) = q - half, q = 0 .. 2 half - 1; half 0: the sixteen levels of iq4.h */
typedef struct kl_signed_format {
    int width; /* of a sub-block, 16 or 32 */
    int half;
    int top; /* scales -top .. top - 1; 1: no scale, d alone */
} kl_signed_format;

void kl_search_signed(kl_signed *found, const float *x, int n, kl_signed_format format);

#endif
