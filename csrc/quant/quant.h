/* Block types: a row of weights is a row of blocks, each of `values` values in `bytes` bytes, as ggml lays
 * them out. One file a type; quant/types.def is the list. */
#ifndef KL_QUANT_H
#define KL_QUANT_H

#include "../internal.h"

#include <math.h>
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

extern const char kl_written_types[]; /* names of the types that have quantize, for messages */

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
void kl_store_f16(uint8_t *p, float x);

/* x toward zero, its low eight bits; 0 for what no int32 holds and for NaN */
static inline uint8_t kl_byte_of(float x)
{
    return x > -0x1p31f && x < 0x1p31f ? (uint8_t)((int32_t)x & 255) : 0;
}

static inline int kl_clip_byte(float x, int top)
{
    const int q = kl_byte_of(x);
    return q < top ? q : top;
}

/* 1 / d, or 0; infinite where d is below 2^-128 */
static inline float kl_inverse(float d) { return d != 0.0f ? 1.0f / d : 0.0f; }

/* of n values: the one farthest from zero, the first of equals; the least and the greatest */
static inline float kl_extreme(const float *x, int n)
{
    float extreme = x[0];
    for (int j = 1; j < n; j++)
        if (fabsf(x[j]) > fabsf(extreme))
            extreme = x[j];
    return extreme;
}

static inline void kl_range(const float *x, int n, float *least, float *greatest)
{
    *least = *greatest = x[0];
    for (int j = 1; j < n; j++) {
        *least = x[j] < *least ? x[j] : *least;
        *greatest = x[j] > *greatest ? x[j] : *greatest;
    }
}

#endif
