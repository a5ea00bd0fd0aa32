/* Codebooks of the IQ1, IQ2 and IQ3 types: constants of the format, rows of eight values (IQ3: four). */
#ifndef KL_IQ_GRIDS_H
#define KL_IQ_GRIDS_H

#include "quant.h"

extern const int8_t kl_iq1_grid[2048][8]; /* IQ1_S, IQ1_M: -1, 0, 1 */
extern const uint8_t kl_iq2_xxs_grid[256][8], kl_iq2_xs_grid[512][8], kl_iq2_s_grid[1024][8];
extern const uint8_t kl_iq3_xxs_grid[256][4], kl_iq3_s_grid[512][4];

/* The same rows as iq_rows.h numbers them. The last element is 0: four bytes may be read at any row. */
extern const uint16_t kl_iq1_codes[2048 + 1];
extern const uint16_t kl_iq2_xxs_codes[256 + 1], kl_iq2_xs_codes[512 + 1], kl_iq2_s_codes[1024 + 1];
extern const uint16_t kl_iq3_xxs_codes[256 + 1], kl_iq3_s_codes[512 + 1];

/* Seven sign bits, and an eighth that makes their number even. */
static inline unsigned kl_even_signs(unsigned seven)
{
    return seven | (unsigned)__builtin_parity(seven) << 7;
}

/* y[j] = d grid[j], negated where bit j of signs is set; eight values */
static inline void kl_grid_row(float *restrict y, float d, const uint8_t *grid, unsigned signs)
{
    for (int j = 0; j < 8; j++) {
        const int negative = -(((int)signs & kl_bit[j]) == kl_bit[j]); /* 0 or -1: all bits */
        y[j] = d * (float)(((int)grid[j] ^ negative) - negative);
    }
}

/* the same of two rows of four */
static inline void kl_grid_rows(float *restrict y, float d, const uint8_t *grid0,
                                const uint8_t *grid1, unsigned signs)
{
    uint8_t grid[8];
    memcpy(grid, grid0, 4);
    memcpy(grid + 4, grid1, 4);
    kl_grid_row(y, d, grid, signs);
}

#endif
