/* IQ3_S: x[s, r, j] = (d (2 scale[s] + 1)) sign grid[r, j]
 *   256 values, eight sub-blocks s of eight codebook rows r of four: float16 d, row numbers of 9
 * bits (8 in `row`, one in `high`), a sign bit a value, 4-bit scales. */
#include "iq_grids.h"

typedef struct block {
    uint8_t d[2];
    uint8_t row[8][8];
    uint8_t high[8];
    uint8_t signs[8][4];
    uint8_t scales[4];
} block;

static const uint8_t *row_of(const block *b, int s, int r)
{
    return kl_iq3_s_grid[b->row[s][r] | (b->high[s] >> r & 1) << 8];
}

void kl_dequantize_iq3_s(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++) {
        const float d = kl_f16_at(b->d);
        for (int s = 0; s < 8; s++) {
            const float a = d * (float)(2 * (b->scales[s / 2] >> s % 2 * 4 & 15) + 1);
            for (int r = 0; r < 8; r += 2, y += 8)
                kl_grid_rows(y, a, row_of(b, s, r), row_of(b, s, r + 1), b->signs[s][r / 2]);
        }
    }
}
