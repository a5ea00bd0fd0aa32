/* The 4-bit float of MXFP4 and NVFP4 (E2M1, OCP Microscaling Formats 1.0), doubled, so that it is an integer;
 * the scales hold the other half. */
#ifndef KL_FP4_H
#define KL_FP4_H

#include "quant.h"

static const int8_t kl_fp4_values[16] = { 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12 };

#endif
