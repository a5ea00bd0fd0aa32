/* Block types: a row of weights is a row of blocks, each of `values` values in `bytes` bytes, as ggml lays
 * them out. One file a type; quant/types.def is the list. */
#ifndef KL_QUANT_H
#define KL_QUANT_H

#include "../internal.h"

#include <string.h>

typedef struct kl_block_type {
    const char *name;
    kl_type id;
    int64_t values;
    size_t bytes;
    /* n blocks to n * values floats; the bytes need no alignment. Sums and products round one by one, in the
     * order of the type's formula: no fma, no flushing. */
    void (*dequantize)(float *y, const void *blocks, int64_t n);
    void (*quantize)(void *blocks, const float *x, int64_t n); /* NULL: the type can only be read */
} kl_block_type;

/* NULL where the type is no block type */
const kl_block_type *kl_block_type_of(kl_type type);

#define KL_BLOCK_TYPE(name, body, id, values, bytes, access)                                       \
    void kl_dequantize_##body(float *y, const void *blocks, int64_t n);                            \
    void kl_quantize_##body(void *blocks, const float *x, int64_t n);
#include "types.def"
#undef KL_BLOCK_TYPE

/* little-endian words at any address */
static inline uint16_t kl_u16_at(const uint8_t *p)
{
    uint16_t u;
    memcpy(&u, p, sizeof u);
    return u;
}

static inline uint32_t kl_u32_at(const uint8_t *p)
{
    uint32_t u;
    memcpy(&u, p, sizeof u);
    return u;
}

/* bit j: a table, for loops that test a bit a lane */
static const int kl_bit[16] = {
    1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
    1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15
};

/* float16 at any address, widened exactly; and rounded to nearest even */
float kl_f16_at(const void *p);
uint16_t kl_f16_of(float x);

#endif
