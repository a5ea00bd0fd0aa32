/* IQ4_NL: x[j] = d v(q[j])
 *   32 values: float16 d, 4-bit q: byte j holds values j (low) and j + 16; v: iq4.h */
#include "iq4.h"

typedef struct block {
    uint8_t d[2];
    uint8_t q[16];
} block;

void kl_dequantize_iq4_nl(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++, y += 32) {
        const float d = kl_f16_at(b->d);
        for (int j = 0; j < 16; j++) {
            y[j] = d * (float)kl_iq4_values[b->q[j] & 15];
            y[j + 16] = d * (float)kl_iq4_values[b->q[j] >> 4];
        }
    }
}
