/* IQ4_XS: x[s, j] = (d (scale[s] - 32)) v(q[s, j])
 *   256 values, eight sub-blocks s of 32: float16 d, 6-bit scales (nibbles in `low`, then two
 * bits each in `high`), 4-bit q: byte j of a sub-block holds values j (low) and j + 16; v:
 * iq4.h */
#include "iq4.h"
#include "search.h"

typedef struct block {
    uint8_t d[2];
    uint8_t high[2];
    uint8_t low[4];
    uint8_t q[8][16];
} block;

void kl_dequantize_iq4_xs(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++) {
        const float d = kl_f16_at(b->d);
        const int high = kl_u16_at(b->high);
        for (int s = 0; s < 8; s++, y += 32) {
            const int scale = (b->low[s / 2] >> s % 2 * 4 & 15) | (high >> 2 * s & 3) << 4;
            const float a = d * (float)(scale - 32);
            for (int j = 0; j < 16; j++) {
                y[j] = a * (float)kl_iq4_values[b->q[s][j] & 15];
                y[j + 16] = a * (float)kl_iq4_values[b->q[s][j] >> 4];
            }
        }
    }
}

/* quantize: kl_search_signed */
void kl_quantize_iq4_xs(void *blocks, const float *x, int64_t n)
{
    block *b = blocks;
    for (; n > 0; n--, b++, x += KL_K_VALUES) {
        kl_signed f;
        kl_search_signed(&f, x, KL_K_VALUES,
                         (kl_signed_format){ .width = 32, .half = 0, .top = 32 });
        memset(b, 0, sizeof *b);
        memcpy(b->d, &f.d, sizeof f.d);
        for (int s = 0; s < 8; s++) {
            const int scale = f.scale[s] + 32;
            const uint8_t *q = f.q + 32 * s;
            b->low[s / 2] |= (uint8_t)((scale & 15) << s % 2 * 4);
            b->high[s / 4] |= (uint8_t)(scale >> 4 << s % 4 * 2);
            for (int j = 0; j < 16; j++)
                b->q[s][j] = (uint8_t)(q[j] | q[j + 16] << 4);
        }
    }
}
