/* IQ4_NL: x[j] = d v(q[j])
 *   32 values: float16 d, 4-bit q: byte j holds values j (low) and j + 16; v: iq4.h */
#include "iq4.h"
#include "search.h"

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

/* quantize: kl_search_signed */
void kl_quantize_iq4_nl(void *blocks, const float *x, int64_t n)
{
    block *b = blocks;
    for (; n > 0; n--, b++, x += 32) {
        kl_signed f;
        kl_search_signed(&f, x, 32, (kl_signed_format){ .width = 32, .half = 0, .top = 1 });
        memcpy(b->d, &f.d, sizeof f.d);
        for (int j = 0; j < 16; j++)
            b->q[j] = (uint8_t)(f.q[j] | f.q[j + 16] << 4);
    }
}
