/* Q8_0: x[i] = d * q[i]        32 values: float16 d, int8 q[32] */
#include "quant.h"

typedef struct block {
    uint8_t d[2];
    int8_t q[32];
} block;

void kl_dequantize_q8_0(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++, y += 32) {
        const float d = kl_f16_at(b->d);
        for (int j = 0; j < 32; j++)
            y[j] = d * (float)b->q[j];
    }
}

/* quantize: d = max |x| / 127; q = x / d to nearest, halves away from zero */
void kl_quantize_q8_0(void *blocks, const float *x, int64_t n)
{
    block *b = blocks;
    for (; n > 0; n--, b++, x += 32) {
        const float d = fabsf(kl_extreme(x, 32)) / 127.0f, inverse = kl_inverse(d);
        kl_store_f16(b->d, d);
        for (int j = 0; j < 32; j++)
            b->q[j] = (int8_t)kl_byte_of(roundf(x[j] * inverse));
    }
}
