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

/* quantize: e = floor(log2(max |x|)) + 125, in eight bits; q: the nearest value, the first of equals */
void kl_quantize_mxfp4(void *blocks, const float *x, int64_t n)
{
    block *b = blocks;
    for (; n > 0; n--, b++, x += 32) {
        const float largest = fabsf(kl_extreme(x, 32));
        /* log2 rounds to float32 before the floor: the last floats below a power of two count as it */
        b->e = largest > 0.0f ? kl_byte_of(floorf((float)log2((double)largest)) + 125.0f) : 0;
        const float d = scale_of(b->e);
        int32_t q[32] = { 0 };
        float best[32];
        for (int j = 0; j < 32; j++)
            best[j] = fabsf(x[j]);
        for (int v = 1; v < 16; v++) {
            const float level = d * (float)kl_fp4_values[v];
            for (int j = 0; j < 32; j++) {
                const float error = fabsf(level - x[j]);
                const int32_t closer = error < best[j];
                q[j] += closer * (v - q[j]);
                best[j] = error < best[j] ? error : best[j];
            }
        }
        for (int j = 0; j < 16; j++)
            b->q[j] = (uint8_t)(q[j] | q[j + 16] << 4);
    }
}
