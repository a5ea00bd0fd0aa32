/* Rows of a cache, as the attention kernel takes them. */
#ifndef KL_CACHE_ROWS_H
#define KL_CACHE_ROWS_H

#include "../cpu/kernels.h"
#include "ops.h"

/* Values column .. column + width - 1 of sequence n's rows from `position` on, `count` of them, within
 * one page: as they lie, or widened into buffer [count, width] where the cache is float16 or Q8_0
 * (column and width are then whole blocks). */
kl_rows kl_cache_rows(const kl_kernels *k, const kl_cache *cache, int64_t n, int64_t position,
                      int64_t count, int64_t column, int64_t width, float *buffer);

/* The same, but float16 as it lies. */
kl_rows kl_cache_stored(const kl_kernels *k, const kl_cache *cache, int64_t n, int64_t position,
                        int64_t count, int64_t column, int64_t width, float *buffer);

/* The same of `count` positions that rise, in whatever pages. They lie one behind another in buffer, where they are not
 * so in the cache. */
kl_rows kl_cache_gather(const kl_kernels *k, const kl_cache *cache, int64_t n,
                        const int32_t *position, int64_t count, int64_t column, int64_t width,
                        float *buffer);

/* The rows of the block at `position`, up to position end - 1 of its page, as they lie. */
kl_ahead kl_cache_ahead(const kl_cache *cache, int64_t n, int64_t position, int64_t end,
                        int64_t column, int64_t width);

/* n values as a cache has them (cache_append.c), and the size from which on a finite one cannot be stored in a type but
 * float32. */
void kl_cache_store(const kl_kernels *k, kl_type type, void *to, const float *x, int64_t n);
float kl_cache_limit(kl_type type);

/* floats of buffer that kl_cache_rows needs for one block */
static inline int64_t kl_cache_buffer(const kl_cache *cache, int64_t width)
{
    return cache->type == KL_F32 ? 0 : KL_BLOCK * width;
}

#endif
