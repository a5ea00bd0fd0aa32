/* TQ2_0: x[i] = d (q[i] - 1)
 *   256 values: 2-bit q, float16 d. Each half of 128 values is four rows r of 32: q[r, j] is bits
 * 2r and 2r + 1 of byte j. */
#include "quant.h"

typedef struct block {
    uint8_t q[2][32];
    uint8_t d[2];
} block;

void kl_dequantize_tq2_0(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++) {
        const float d = kl_f16_at(b->d);
        for (int r = 0; r < 8; r++, y += 32)
            for (int j = 0; j < 32; j++)
                y[j] = d * (float)((b->q[r / 4][j] >> r % 4 * 2 & 3) - 1);
    }
}

/* quantize: d = max |x|; q = x / d + 1 to nearest, halves away from zero */
void kl_quantize_tq2_0(void *blocks, const float *x, int64_t n)
{
    block *b = blocks;
    for (; n > 0; n--, b++) {
        const float d = fabsf(kl_extreme(x, 256)), inverse = kl_inverse(d);
        kl_store_f16(b->d, d);
        memset(b->q, 0, sizeof b->q);
        for (int r = 0; r < 8; r++, x += 32)
            for (int j = 0; j < 32; j++) {
                const int q = kl_byte_of(roundf(x[j] * inverse)) + 1;
                b->q[r / 4][j] |= (uint8_t)(q << r % 4 * 2);
            }
    }
}
