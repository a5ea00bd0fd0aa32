/* Q5_K: x[s, j] = (d scale[s]) q[s, j] - dmin min[s]
 *   256 values, eight sub-blocks s of 32: float16 d, dmin, 6-bit scales and minima, 5-bit q: bit
 * s of high[j] is bit 4 of q[s, j]; byte j of group g of `low` holds bits 0 to 3 of q[2g, j]
 * (low) and q[2g + 1, j] */
#include "k_quants.h"

typedef struct block {
    uint8_t d[2], dmin[2];
    uint8_t scales[12];
    uint8_t high[32];
    uint8_t low[4][32];
} block;

void kl_dequantize_q5_k(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++) {
        const float d = kl_f16_at(b->d), dmin = kl_f16_at(b->dmin);
        for (int s = 0; s < 8; s++, y += 32) {
            uint8_t scale, min;
            kl_scale_and_min(b->scales, s, &scale, &min);
            const float a = d * (float)scale, m = dmin * (float)min;
            const uint8_t *low = b->low[s / 2];
            const int shift = s % 2 * 4;
            for (int j = 0; j < 32; j++)
                y[j] = a * (float)((low[j] >> shift & 15) | (b->high[j] >> s & 1) << 4) - m;
        }
    }
}

/* quantize: kl_search_affine */
void kl_quantize_q5_k(void *blocks, const float *x, int64_t n)
{
    block *b = blocks;
    for (; n > 0; n--, b++, x += KL_K_VALUES) {
        kl_affine f;
        kl_search_affine(&f, x, 32, 31, 63);
        memset(b, 0, sizeof *b);
        memcpy(b->d, &f.d, sizeof f.d);
        memcpy(b->dmin, &f.dmin, sizeof f.dmin);
        for (int s = 0; s < 8; s++) {
            kl_pack_scale_and_min(b->scales, s, f.scale[s], f.min[s]);
            for (int j = 0; j < 32; j++) {
                const int q = f.q[32 * s + j];
                b->low[s / 2][j] |= (uint8_t)((q & 15) << s % 2 * 4);
                b->high[j] |= (uint8_t)(q >> 4 << s);
            }
        }
    }
}
