/* Q2_0: x[j] = d (q[j] - 1), so -d, 0, d or 2 d
 *   64 values: float16 d, 2-bit q[64]: q[j] is bits 2 (j % 4) and the next of byte j / 4 */
#include "quant.h"

typedef struct block {
    uint8_t d[2];
    uint8_t q[16];
} block;

void kl_dequantize_q2_0(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++) {
        const float d = kl_f16_at(b->d);
        for (int i = 0; i < 16; i++, y += 4)
            for (int j = 0; j < 4; j++)
                y[j] = d * (float)((b->q[i] >> 2 * j & 3) - 1);
    }
}

/* quantize: d = max |x|; q = x / d + 1 to nearest, halves away from zero: never 3 */
void kl_quantize_q2_0(void *blocks, const float *x, int64_t n)
{
    block *b = blocks;
    for (; n > 0; n--, b++) {
        const float d = fabsf(kl_extreme(x, 64)), inverse = kl_inverse(d);
        kl_store_f16(b->d, d);
        for (int i = 0; i < 16; i++, x += 4) {
            int four = 0;
            for (int j = 0; j < 4; j++) {
                const int q = (int8_t)kl_byte_of(roundf(x[j] * inverse)) + 1;
                four |= q << 2 * j;
            }
            b->q[i] = (uint8_t)four;
        }
    }
}
