/* NVFP4: x[s, j] = u(scale[s]) / 2 v(q[s, j])
 *   64 values, four sub-blocks s of 16: E4M3 scales u, 4-bit q: byte j of a sub-block holds
 * values j (low) and j + 8; v is the doubled E2M1 float */
#include "fp4.h"

typedef struct block {
    uint8_t scales[4];
    uint8_t q[4][8];
} block;

/* Half of an E4M3 number whose sign bit is not looked at: 4 bits of exponent with bias 7, 3 of fraction.
 * 0x7f, its NaN, counts as zero. */
static float half_e4m3(uint8_t e4m3)
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

void kl_dequantize_nvfp4(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++)
        for (int s = 0; s < 4; s++, y += 16) {
            const float d = half_e4m3(b->scales[s]);
            for (int j = 0; j < 8; j++) {
                y[j] = d * (float)kl_fp4_values[b->q[s][j] & 15];
                y[j + 8] = d * (float)kl_fp4_values[b->q[s][j] >> 4];
            }
        }
}
