/* What the K types share: superblocks of 256 values whose sub-blocks have small integer scales. */
#ifndef KL_K_QUANTS_H
#define KL_K_QUANTS_H

#include "search.h"

/* Q4_K, Q5_K: eight 6-bit scales and minima in 12 bytes. Scale s and minimum s of the first four are the low
 * six bits of bytes s and s + 4; of the last four, byte s + 4 has the low nibbles (scale low, minimum high),
 * and the top two bits of bytes s - 4 and s are their bits 4 and 5. */
static inline void kl_scale_and_min(const uint8_t packed[12], int s, uint8_t *scale, uint8_t *min)
{
    if (s < 4) {
        *scale = packed[s] & 63;
        *min = packed[s + 4] & 63;
    } else {
        *scale = (uint8_t)((packed[s + 4] & 15) | packed[s - 4] >> 6 << 4);
        *min = (uint8_t)(packed[s + 4] >> 4 | packed[s] >> 6 << 4);
    }
}

static inline void kl_pack_scale_and_min(uint8_t packed[12], int s, uint8_t scale, uint8_t min)
{
    if (s < 4) {
        packed[s] |= scale;
        packed[s + 4] |= min;
    } else {
        packed[s + 4] |= (uint8_t)((scale & 15) | (min & 15) << 4);
        packed[s - 4] |= (uint8_t)(scale >> 4 << 6);
        packed[s] |= (uint8_t)(min >> 4 << 6);
    }
}

#endif
