/* IQ1_M: x[r, j] = (d (2 scale[r / 2] + 1)) (grid[r, j] + delta[r])
 *   256 values, 32 codebook rows r of eight: row numbers of 11 bits (8 in `row`, 3 in a nibble of
 * `high`, whose fourth bit is the sign of delta = 1/8), sixteen 3-bit scales, four in the low 12
 * bits of each 16; the four top nibbles are the float16 d. */
#include "iq_grids.h"

typedef struct block {
    uint8_t row[32];
    uint8_t high[16];
    uint8_t scales[4][2];
} block;

static float scale_of(const block *b)
{
    uint32_t d = 0;
    for (int i = 0; i < 4; i++)
        d |= (uint32_t)(b->scales[i][1] >> 4) << 4 * i;
    const uint8_t bytes[2] = { (uint8_t)(d & 255), (uint8_t)(d >> 8) };
    return kl_f16_at(bytes);
}

void kl_dequantize_iq1_m(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++) {
        const float d = scale_of(b);
        for (int r = 0; r < 32; r++, y += 8) {
            const int high = b->high[r / 2] >> r % 2 * 4 & 15;
            const int scale = kl_u16_at(b->scales[r / 8]) >> r / 2 % 4 * 3 & 7;
            const float a = d * (float)(2 * scale + 1), delta = high & 8 ? -0.125f : 0.125f;
            const int8_t *grid = kl_iq1_grid[b->row[r] | (high & 7) << 8];
            for (int j = 0; j < 8; j++)
                y[j] = a * ((float)grid[j] + delta);
        }
    }
}
