/* Q5_1: x[j] = d q[j] + m
 *   32 values: float16 d, m, 5-bit q[32]: bit 4 of q[j] is bit j of `high`, byte j of `low` holds
 * bits 0 to 3 of values j (low) and j + 16 */
#include "quant.h"

typedef struct block {
    uint8_t d[2], m[2];
    uint8_t high[4];
    uint8_t low[16];
} block;

void kl_dequantize_q5_1(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++, y += 32) {
        const float d = kl_f16_at(b->d), m = kl_f16_at(b->m);
        const int first = kl_u16_at(b->high), second = kl_u16_at(b->high + 2);
        for (int j = 0; j < 16; j++) {
            y[j] = d * (float)((b->low[j] & 15) + (first & kl_bit[j] ? 16 : 0)) + m;
            y[j + 16] = d * (float)((b->low[j] >> 4) + (second & kl_bit[j] ? 16 : 0)) + m;
        }
    }
}

/* quantize: m = min x, d = (max x - m) / 31; q = (x - m) / d to nearest, halves up */
void kl_quantize_q5_1(void *blocks, const float *x, int64_t n)
{
    block *b = blocks;
    for (; n > 0; n--, b++, x += 32) {
        float m, greatest;
        kl_range(x, 32, &m, &greatest);
        const float d = (greatest - m) / 31.0f, inverse = kl_inverse(d);
        kl_store_f16(b->d, d);
        kl_store_f16(b->m, m);
        memset(b->high, 0, sizeof b->high);
        for (int j = 0; j < 16; j++) {
            const int q0 = kl_clip_byte((x[j] - m) * inverse + 0.5f, 31);
            const int q1 = kl_clip_byte((x[j + 16] - m) * inverse + 0.5f, 31);
            b->low[j] = (uint8_t)((q0 & 15) | (q1 & 15) << 4);
            b->high[j / 8] |= (uint8_t)(q0 >> 4 << j % 8);
            b->high[2 + j / 8] |= (uint8_t)(q1 >> 4 << j % 8);
        }
    }
}
