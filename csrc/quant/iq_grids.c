/* The codebooks, a byte a value and in bits. */
#include "iq_grids.h"

#include "iq_rows.h"

#define ROW8(v, type, g)                                                                           \
    { (type)v(g),      (type)v(g >> 2),  (type)v(g >> 4),  (type)v(g >> 6),                        \
      (type)v(g >> 8), (type)v(g >> 10), (type)v(g >> 12), (type)v(g >> 14) },
#define ROW4(v, g) { (uint8_t)v(g), (uint8_t)v(g >> 4), (uint8_t)v(g >> 8), (uint8_t)v(g >> 12) },

#define IQ1(hex) ROW8(KL_IQ1_VALUE, int8_t, 0x##hex)
#define IQ2(hex) ROW8(KL_IQ2_VALUE, uint8_t, 0x##hex)
#define IQ3_XXS(hex) ROW4(KL_IQ3_XXS_VALUE, 0x##hex)
#define IQ3_S(hex) ROW4(KL_IQ3_S_VALUE, 0x##hex)

const int8_t kl_iq1_grid[2048][8] = { KL_IQ1_ROWS(IQ1) };
const uint8_t kl_iq2_xxs_grid[256][8] = { KL_IQ2_XXS_ROWS(IQ2) };
const uint8_t kl_iq2_xs_grid[512][8] = { KL_IQ2_XS_ROWS(IQ2) };
const uint8_t kl_iq2_s_grid[1024][8] = { KL_IQ2_S_ROWS(IQ2) };
const uint8_t kl_iq3_xxs_grid[256][4] = { KL_IQ3_XXS_ROWS(IQ3_XXS) };
const uint8_t kl_iq3_s_grid[512][4] = { KL_IQ3_S_ROWS(IQ3_S) };

#define CODES(hex) 0x##hex,

const uint16_t kl_iq1_codes[] = { KL_IQ1_ROWS(CODES) 0 };
const uint16_t kl_iq2_xxs_codes[] = { KL_IQ2_XXS_ROWS(CODES) 0 };
const uint16_t kl_iq2_xs_codes[] = { KL_IQ2_XS_ROWS(CODES) 0 };
const uint16_t kl_iq2_s_codes[] = { KL_IQ2_S_ROWS(CODES) 0 };
const uint16_t kl_iq3_xxs_codes[] = { KL_IQ3_XXS_ROWS(CODES) 0 };
const uint16_t kl_iq3_s_codes[] = { KL_IQ3_S_ROWS(CODES) 0 };
