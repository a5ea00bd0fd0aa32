/* Q3_K: x[i] = (d (scale[i / 16] - 32)) (q[i] - 4)
 *   256 values: 3-bit q, sixteen 6-bit scales, float16 d. Rows r of 32 values: bit 2 of q[r, j]
 * is bit r of high[j]; bits 0 and 1 are bits 2 (r % 4) and on of byte j of half r / 4 of `low`.
 * Bits 0 to 3 of scale s are a nibble of byte s % 8 (low for s < 8), bits 4 and 5 are bits
 * 2 (s / 4) and on of byte 8 + s % 4. */
#include "k_quants.h"

typedef struct block {
    uint8_t high[32];
    uint8_t low[2][32];
    uint8_t scales[12];
    uint8_t d[2];
} block;

static int scale_of(const uint8_t packed[12], int s)
{
    return (packed[s % 8] >> s / 8 * 4 & 15) | (packed[8 + s % 4] >> s / 4 * 2 & 3) << 4;
}

void kl_dequantize_q3_k(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++) {
        const float d = kl_f16_at(b->d);
        for (int s = 0; s < 16; s++, y += 16) {
            const float a = d * (float)(scale_of(b->scales, s) - 32);
            const int r = s / 2, first = s % 2 * 16, pair = r % 4 * 2;
            const uint8_t *low = b->low[r / 4] + first, *high = b->high + first;
            for (int j = 0; j < 16; j++)
                y[j] = a * (float)(((low[j] >> pair & 3) | (high[j] >> r & 1) << 2) - 4);
        }
    }
}

/* quantize: kl_search_signed */
void kl_quantize_q3_k(void *blocks, const float *x, int64_t n)
{
    block *b = blocks;
    for (; n > 0; n--, b++, x += KL_K_VALUES) {
        kl_signed f;
        kl_search_signed(&f, x, KL_K_VALUES,
                         (kl_signed_format){ .width = 16, .half = 4, .top = 32 });
        memset(b, 0, sizeof *b);
        memcpy(b->d, &f.d, sizeof f.d);
        for (int s = 0; s < 16; s++) {
            const int scale = f.scale[s] + 32, r = s / 2;
            b->scales[s % 8] |= (uint8_t)((scale & 15) << s / 8 * 4);
            b->scales[8 + s % 4] |= (uint8_t)(scale >> 4 << s / 4 * 2);
            for (int j = 0; j < 16; j++) {
                const int q = f.q[16 * s + j];
                b->low[r / 4][s % 2 * 16 + j] |= (uint8_t)((q & 3) << r % 4 * 2);
                b->high[s % 2 * 16 + j] |= (uint8_t)(q >> 2 << r);
            }
        }
    }
}
