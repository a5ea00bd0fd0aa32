/* IQ1_S: x[s, r, j] = (d (2 scale[s] + 1)) (grid[r, j] + delta[s])
 *   256 values, eight sub-blocks s of four codebook rows r of eight: float16 d, row numbers of 11
 * bits (8 in `row`, 3 in `high`), 3-bit scales, delta = 1/8 or -1/8. */
#include "iq_grids.h"

typedef struct block {
    uint8_t d[2];
    uint8_t row[8][4];
    uint8_t high[8][2]; /* 4 x 3 bits of row numbers, scale, sign of delta */
} block;

void kl_dequantize_iq1_s(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++) {
        const float d = kl_f16_at(b->d);
        for (int s = 0; s < 8; s++) {
            const int high = kl_u16_at(b->high[s]);
            const float a = d * (float)(2 * (high >> 12 & 7) + 1);
            const float delta = high & 0x8000 ? -0.125f : 0.125f;
            for (int r = 0; r < 4; r++, y += 8) {
                const int8_t *grid = kl_iq1_grid[b->row[s][r] | (high >> 3 * r & 7) << 8];
                for (int j = 0; j < 8; j++)
                    y[j] = a * ((float)grid[j] + delta);
            }
        }
    }
}
