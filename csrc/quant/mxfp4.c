/* MXFP4: x[j] = 2^(e - 128) v(q[j])
 *   32 values: exponent e, 4-bit q: byte j holds values j (low) and j + 16; v is the doubled E2M1
 * float */
#include "fp4.h"

typedef struct block {
    uint8_t e;
    uint8_t q[16];
} block;

/* 2^(e - 128), subnormal for e < 2 */
static float scale_of(uint8_t e)
{
    const uint32_t bits = e < 2 ? 0x200000u << e : (uint32_t)(e - 1) << 23;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

void kl_dequantize_mxfp4(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++, y += 32) {
        const float d = scale_of(b->e);
        for (int j = 0; j < 16; j++) {
            y[j] = d * (float)kl_fp4_values[b->q[j] & 15];
            y[j + 16] = d * (float)kl_fp4_values[b->q[j] >> 4];
        }
    }
}
