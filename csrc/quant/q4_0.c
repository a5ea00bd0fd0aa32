/* Q4_0: x[j] = d (q[j] - 8)
 *   32 values: float16 d, 4-bit q[32]: byte j holds values j (low) and j + 16 */
#include "quant.h"

typedef struct block {
    uint8_t d[2];
    uint8_t q[16];
} block;

void kl_dequantize_q4_0(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++, y += 32) {
        const float d = kl_f16_at(b->d);
        for (int j = 0; j < 16; j++) {
            y[j] = d * (float)((b->q[j] & 15) - 8);
            y[j + 16] = d * (float)((b->q[j] >> 4) - 8);
        }
    }
}

/* quantize: d = extreme / -8; q = x / d + 8 to nearest, halves up */
void kl_quantize_q4_0(void *blocks, const float *x, int64_t n)
{
    block *b = blocks;
    for (; n > 0; n--, b++, x += 32) {
        const float d = kl_extreme(x, 32) / -8.0f, inverse = kl_inverse(d);
        kl_store_f16(b->d, d);
        for (int j = 0; j < 16; j++) {
            const int low = kl_clip_byte(x[j] * inverse + 8.5f, 15);
            const int high = kl_clip_byte(x[j + 16] * inverse + 8.5f, 15);
            b->q[j] = (uint8_t)(low | high << 4);
        }
    }
}
