/* IQ2_XS: x[r, j] = (d (scale[r / 2] + 0.5) / 4) sign grid[r, j]
 *   256 values, 32 codebook rows r of eight: float16 d, row numbers of 9 bits with 7 sign bits
 * above them, sixteen 4-bit scales. */
#include "iq_grids.h"

typedef struct block {
    uint8_t d[2];
    uint8_t row[32][2];
    uint8_t scales[8];
} block;

void kl_dequantize_iq2_xs(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++) {
        const float d = kl_f16_at(b->d);
        for (int r = 0; r < 32; r++, y += 8) {
            const unsigned row = kl_u16_at(b->row[r]);
            const int scale = b->scales[r / 4] >> r / 2 % 2 * 4 & 15;
            const float a = d * (0.5f + (float)scale) * 0.25f;
            kl_grid_row(y, a, kl_iq2_xs_grid[row & 511], kl_even_signs(row >> 9));
        }
    }
}
