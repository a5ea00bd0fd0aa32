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

#define KL_BLOCK_TYPE(name, body, id, values, bytes)                                               \
    void kl_dequantize_##body(float *y, const void *blocks, int64_t n);
#include "types.def"
#undef KL_BLOCK_TYPE

/* float16 at any address, widened exactly; and rounded to nearest even */
float kl_f16_at(const void *p);
uint16_t kl_f16_of(float x);

#endif
