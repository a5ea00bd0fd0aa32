/* Q4_1: x[j] = d q[j] + m
 *   32 values: float16 d, m, 4-bit q[32]: byte j holds values j (low) and j + 16 */
#include "quant.h"

typedef struct block {
    uint8_t d[2], m[2];
    uint8_t q[16];
} block;

void kl_dequantize_q4_1(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++, y += 32) {
        const float d = kl_f16_at(b->d), m = kl_f16_at(b->m);
        for (int j = 0; j < 16; j++) {
            y[j] = d * (float)(b->q[j] & 15) + m;
            y[j + 16] = d * (float)(b->q[j] >> 4) + m;
        }
    }
}

/* quantize: m = min x, d = (max x - m) / 15; q = (x - m) / d to nearest, halves up */
void kl_quantize_q4_1(void *blocks, const float *x, int64_t n)
{
    block *b = blocks;
    for (; n > 0; n--, b++, x += 32) {
        float m, greatest;
        kl_range(x, 32, &m, &greatest);
        const float d = (greatest - m) / 15.0f, inverse = kl_inverse(d);
        kl_store_f16(b->d, d);
        kl_store_f16(b->m, m);
        for (int j = 0; j < 16; j++) {
            const int low = kl_clip_byte((x[j] - m) * inverse + 0.5f, 15);
            const int high = kl_clip_byte((x[j + 16] - m) * inverse + 0.5f, 15);
            b->q[j] = (uint8_t)(low | high << 4);
        }
    }
}
