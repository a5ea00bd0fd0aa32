/* NVFP4: x[s, j] = u(scale[s]) / 2 v(q[s, j])
 *   64 values, four sub-blocks s of 16: E4M3 scales u, 4-bit q: byte j of a sub-block holds
 * values j (low) and j + 8; v is the doubled E2M1 float */
#include "fp4.h"

typedef struct block {
    uint8_t scales[4];
    uint8_t q[4][8];
} block;

void kl_dequantize_nvfp4(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++)
        for (int s = 0; s < 4; s++, y += 16) {
            const float d = kl_half_e4m3(b->scales[s]);
            for (int j = 0; j < 8; j++) {
                y[j] = d * (float)kl_fp4_values[b->q[s][j] & 15];
                y[j + 8] = d * (float)kl_fp4_values[b->q[s][j] >> 4];
            }
        }
}
