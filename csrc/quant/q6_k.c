/* Q6_K: x[i] = (d scale[i / 16]) (q[i] - 32)
 *   256 values: 6-bit q, int8 scales, float16 d. Each half of 128 values is four rows r of 32:
 * bits 0 to 3 of q[r, j] are in low[32 (r % 2) + j] (its high nibble for r > 1), bits 4 and 5 are
 * bits 2r and 2r + 1 of high[j]. */
#include "k_quants.h"

typedef struct block {
    uint8_t low[2][64];
    uint8_t high[2][32];
    int8_t scales[16];
    uint8_t d[2];
} block;

void kl_dequantize_q6_k(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++) {
        const float d = kl_f16_at(b->d);
        for (int s = 0; s < 16; s++, y += 16) {
            const int half = s / 8, r = s / 2 % 4, first = s % 2 * 16;
            const float a = d * (float)b->scales[s];
            const uint8_t *low = b->low[half] + r % 2 * 32 + first, *high = b->high[half] + first;
            const int nibble = r / 2 * 4, pair = 2 * r;
            for (int j = 0; j < 16; j++)
                y[j] = a * (float)(((low[j] >> nibble & 15) | (high[j] >> pair & 3) << 4) - 32);
        }
    }
}

/* quantize: kl_search_signed */
void kl_quantize_q6_k(void *blocks, const float *x, int64_t n)
{
    block *b = blocks;
    for (; n > 0; n--, b++, x += KL_K_VALUES) {
        kl_signed f;
        kl_search_signed(&f, x, KL_K_VALUES,
                         (kl_signed_format){ .width = 16, .half = 32, .top = 128 });
        memset(b, 0, sizeof *b);
        memcpy(b->d, &f.d, sizeof f.d);
        memcpy(b->scales, f.scale, sizeof b->scales);
        for (int i = 0; i < KL_K_VALUES; i++) {
            const int half = i / 128, r = i / 32 % 4, j = i % 32;
            b->low[half][r % 2 * 32 + j] |= (uint8_t)((f.q[i] & 15) << r / 2 * 4);
            b->high[half][j] |= (uint8_t)(f.q[i] >> 4 << 2 * r);
        }
    }
}
