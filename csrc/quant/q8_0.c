/* Q8_0: x[i] = d * q[i]        32 values: float16 d, int8 q[32] */
#include "quant.h"

#include <math.h>

typedef struct block {
    uint8_t d[2];
    int8_t q[32];
} block;

void kl_dequantize_q8_0(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (int64_t i = 0; i < n; i++, y += 32) {
        const float d = kl_f16_at(b[i].d);
        for (int j = 0; j < 32; j++)
            y[j] = d * (float)b[i].q[j];
    }
}

/* d = max |x| / 127; q = x / d to nearest, halves away from zero */
void kl_quantize_q8_0(void *blocks, const float *x, int64_t n)
{
    block *b = blocks;
    for (int64_t i = 0; i < n; i++, x += 32) {
        float largest = 0.0f;
        for (int j = 0; j < 32; j++)
            largest = fmaxf(largest, fabsf(x[j]));
        const float d = largest / 127.0f, inverse = d != 0.0f ? 1.0f / d : 0.0f;
        const uint16_t stored = kl_f16_of(d);
        memcpy(b[i].d, &stored, sizeof stored);
        for (int j = 0; j < 32; j++)
            b[i].q[j] = (int8_t)roundf(x[j] * inverse);
    }
}
