/* The 4-bit float of MXFP4 and NVFP4 (E2M1, OCP Microscaling Formats 1.0), doubled, so that it is an integer;
 * the scales hold the other half. */
#ifndef KL_FP4_H
#define KL_FP4_H

#include "quant.h"

static const int8_t kl_fp4_values[16] = { 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12 };

/* Half of an E4M3 number whose sign bit is not looked at: 4 bits of exponent with bias 7, 3 of fraction.
 * 0x7f, its NaN, counts as zero. */
static inline float kl_half_e4m3(uint8_t e4m3)
{
    const int exponent = e4m3 >> 3 & 15, fraction = e4m3 & 7;
    if (e4m3 == 0x7f)
        return 0.0f;
    if (exponent == 0)
        return (float)fraction * 0x1p-10f;
    const uint32_t bits = (uint32_t)(exponent - 8 + 127) << 23 | (uint32_t)fraction << 20;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

#endif
