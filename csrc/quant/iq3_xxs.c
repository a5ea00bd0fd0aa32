/* IQ3_XXS: x[s, r, j] = (d (scale[s] + 0.5) / 2) sign grid[r, j]
 *   256 values, eight sub-blocks s of eight codebook rows r of four: float16 d, row numbers of 8
 * bits; a sub-block has four times 7 sign bits and a 4-bit scale. */
#include "iq_grids.h"

typedef struct block {
    uint8_t d[2];
    uint8_t row[8][8];
    uint8_t signs_and_scale[8][4];
} block;

void kl_dequantize_iq3_xxs(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++) {
        const float d = kl_f16_at(b->d);
        for (int s = 0; s < 8; s++) {
            const uint32_t packed = kl_u32_at(b->signs_and_scale[s]);
            const float a = d * (0.5f + (float)(packed >> 28)) * 0.5f;
            for (int r = 0; r < 8; r += 2, y += 8) {
                const unsigned signs = kl_even_signs(packed >> 7 * (r / 2) & 127);
                kl_grid_rows(y, a, kl_iq3_xxs_grid[b->row[s][r]], kl_iq3_xxs_grid[b->row[s][r + 1]],
                             signs);
            }
        }
    }
}
