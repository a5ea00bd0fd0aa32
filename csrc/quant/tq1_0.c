/* TQ1_0: x[i] = d (q[i] - 1)
 *   256 values: three-valued q, five to a byte (four in the last four bytes), float16 d. A byte
 * is a fraction of 256 whose digits in base 3 are the values: digit k of byte b is (b 3^k mod
 * 256) 3 / 256. Bytes 0 to 31 hold rows of 32 values, digit by digit; bytes 32 to 47 rows of 16;
 * bytes 48 to 51 rows of 4. */
#include "quant.h"

typedef struct block {
    uint8_t q[52];
    uint8_t d[2];
} block;

static const int powers_of_3[5] = { 1, 3, 9, 27, 81 };

/* digits 0 .. digits - 1 of n bytes */
static float *rows(float *restrict y, const uint8_t *q, int n, int digits, float d)
{
    for (int k = 0; k < digits; k++, y += n)
        for (int j = 0; j < n; j++)
            y[j] = d * (float)(((q[j] * powers_of_3[k] & 255) * 3 >> 8) - 1);
    return y;
}

void kl_dequantize_tq1_0(float *restrict y, const void *blocks, int64_t n)
{
    const block *b = blocks;
    for (; n > 0; n--, b++) {
        const float d = kl_f16_at(b->d);
        y = rows(y, b->q, 32, 5, d);
        y = rows(y, b->q + 32, 16, 5, d);
        y = rows(y, b->q + 48, 4, 4, d);
    }
}

/* quantize: d = max |x|; q = x / d + 1 to nearest, halves away from zero */
static const float *pack_rows(uint8_t *q, const float *x, int n, int digits, float inverse)
{
    for (int j = 0; j < n; j++) {
        int number = 0; /* of five digits, from the highest; a missing one is 0 */
        for (int k = 0; k < 5; k++)
            number = number * 3
                     + (k < digits ? (kl_byte_of(roundf(x[k * n + j] * inverse)) + 1) % 256 : 0);
        q[j] = (uint8_t)((number * 256 + 242) / 243);
    }
    return x + n * digits;
}

void kl_quantize_tq1_0(void *blocks, const float *x, int64_t n)
{
    block *b = blocks;
    for (; n > 0; n--, b++) {
        const float d = fabsf(kl_extreme(x, 256)), inverse = kl_inverse(d);
        kl_store_f16(b->d, d);
        x = pack_rows(b->q, x, 32, 5, inverse);
        x = pack_rows(b->q + 32, x, 16, 5, inverse);
        x = pack_rows(b->q + 48, x, 4, 4, inverse);
    }
}
