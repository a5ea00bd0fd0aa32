/* IQ2_XXS: x[s, r, j] = (d (scale[s] + 0.5) / 4) sign grid[r, j]
 *   256 values, eight sub-blocks s of four codebook rows r of eight: float16 d; a sub-block is
 * four row numbers of 8 bits, four times 7 sign bits, a 4-bit scale. */
#include "iq_grids.h"

typedef struct block {
    uint8_t d[2];
    struct {
        uint8_t row[4];
        uint8_t signs_and_scale[4];
    } sub[8];
} block;

void kl_dequantize_iq2_xxs(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++) {
        const float d = kl_f16_at(b->d);
        for (int s = 0; s < 8; s++) {
            const uint32_t packed = kl_u32_at(b->sub[s].signs_and_scale);
            const float a = d * (0.5f + (float)(packed >> 28)) * 0.25f;
            for (int r = 0; r < 4; r++, y += 8)
                kl_grid_row(y, a, kl_iq2_xxs_grid[b->sub[s].row[r]],
                            kl_even_signs(packed >> 7 * r & 127));
        }
    }
}
