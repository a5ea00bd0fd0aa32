/* Q1_0: x[j] = d (2 q[j] - 1), so d or -d, and never 0 beside a d that is not
 *   128 values: float16 d, a bit each: q[j] is bit j % 8 of byte j / 8 */
#include "quant.h"

typedef struct block {
    uint8_t d[2];
    uint8_t q[16];
} block;

void kl_dequantize_q1_0(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++) {
        const float d = kl_f16_at(b->d);
        for (int i = 0; i < 16; i++, y += 8)
            for (int j = 0; j < 8; j++)
                y[j] = d * (float)((b->q[i] & kl_bit[j]) != 0 ? 1 : -1);
    }
}

/* quantize: d = sum |x| / 128, summed in the order of the values; q = x >= 0, zeros of both signs among them */
void kl_quantize_q1_0(void *blocks, const float *x, int64_t n)
{
    block *b = blocks;
    for (; n > 0; n--, b++) {
        float sum = 0.0f;
        for (int j = 0; j < 128; j++)
            sum += fabsf(x[j]);
        kl_store_f16(b->d, sum / 128.0f);
        memset(b->q, 0, sizeof b->q);
        for (int i = 0; i < 16; i++, x += 8)
            for (int j = 0; j < 8; j++)
                b->q[i] |= (uint8_t)(x[j] >= 0.0f ? kl_bit[j] : 0);
    }
}
