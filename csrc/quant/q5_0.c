/* Q5_0: x[j] = d (q[j] - 16)
 *   32 values: float16 d, 5-bit q[32]: bit 4 of q[j] is bit j of `high`, byte j of `low` holds
 * bits 0 to 3 of values j (low) and j + 16 */
#include "quant.h"

typedef struct block {
    uint8_t d[2];
    uint8_t high[4];
    uint8_t low[16];
} block;

void kl_dequantize_q5_0(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++, y += 32) {
        const float d = kl_f16_at(b->d);
        const int first = kl_u16_at(b->high), second = kl_u16_at(b->high + 2);
        for (int j = 0; j < 16; j++) {
            y[j] = d * (float)((b->low[j] & 15) - (first & kl_bit[j] ? 0 : 16));
            y[j + 16] = d * (float)((b->low[j] >> 4) - (second & kl_bit[j] ? 0 : 16));
        }
    }
}
