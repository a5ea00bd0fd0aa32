/* Q2_K: x[i] = (d scale[i / 16]) q[i] - dmin min[i / 16]
 *   256 values: 4-bit scales (low) and minima in one byte, 2-bit q, float16 d, dmin. Each half of
 * 128 values is four rows r of 32: q[r, j] is bits 2r and 2r + 1 of byte j. */
#include "k_quants.h"

typedef struct block {
    uint8_t scales[16];
    uint8_t q[2][32];
    uint8_t d[2], dmin[2];
} block;

void kl_dequantize_q2_k(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++) {
        const float d = kl_f16_at(b->d), dmin = kl_f16_at(b->dmin);
        for (int s = 0; s < 16; s++, y += 16) {
            const float a = d * (float)(b->scales[s] & 15), m = dmin * (float)(b->scales[s] >> 4);
            const uint8_t *q = b->q[s / 8] + s % 2 * 16;
            const int pair = s / 2 % 4 * 2;
            for (int j = 0; j < 16; j++)
                y[j] = a * (float)(q[j] >> pair & 3) - m;
        }
    }
}

/* quantize: kl_search_affine */
void kl_quantize_q2_k(void *blocks, const float *x, int64_t n)
{
    block *b = blocks;
    for (; n > 0; n--, b++, x += KL_K_VALUES) {
        kl_affine f;
        kl_search_affine(&f, x, 16, 3, 15);
        memset(b, 0, sizeof *b);
        memcpy(b->d, &f.d, sizeof f.d);
        memcpy(b->dmin, &f.dmin, sizeof f.dmin);
        for (int s = 0; s < 16; s++) {
            b->scales[s] = (uint8_t)(f.scale[s] | f.min[s] << 4);
            for (int j = 0; j < 16; j++)
                b->q[s / 8][s % 2 * 16 + j] |= (uint8_t)(f.q[16 * s + j] << s / 2 % 4 * 2);
        }
    }
}
