/* IQ2_S: x[r, j] = (d (scale[r / 2] + 0.5) / 4) sign grid[r, j]
 *   256 values, 32 codebook rows r of eight: float16 d, row numbers of 10 bits (8 in `row`, 2 in
 * `high`), 8 sign bits a row, sixteen 4-bit scales. */
#include "iq_grids.h"

typedef struct block {
    uint8_t d[2];
    uint8_t row[32];
    uint8_t signs[32];
    uint8_t high[8];
    uint8_t scales[8];
} block;

void kl_dequantize_iq2_s(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++) {
        const float d = kl_f16_at(b->d);
        for (int r = 0; r < 32; r++, y += 8) {
            const int row = b->row[r] | (b->high[r / 4] >> r % 4 * 2 & 3) << 8;
            const int scale = b->scales[r / 4] >> r / 2 % 2 * 4 & 15;
            const float a = d * (0.5f + (float)scale) * 0.25f;
            kl_grid_row(y, a, kl_iq2_s_grid[row], b->signs[r]);
        }
    }
}
