/* Rows of a cache as values: cache_rows.h. */
#include "cache_rows.h"

#include <string.h>

static const char *stored(const kl_cache *cache, int64_t n, int64_t position, int64_t column)
{
    return (const char *)cache->page[n][position / KL_PAGE] + cache->offset
           + (size_t)(position % KL_PAGE) * cache->row_bytes + kl_type_bytes(cache->type, column);
}

kl_ahead kl_cache_ahead(const kl_cache *cache, int64_t n, int64_t position, int64_t end,
                        int64_t column, int64_t width)
{
    if (position >= end)
        return (kl_ahead){ NULL, 0, 0, 0 };
    return (kl_ahead){ stored(cache, n, position, column), kl_min(KL_BLOCK, end - position),
                       (int64_t)cache->row_bytes, (int64_t)kl_type_bytes(cache->type, width) };
}

kl_rows kl_cache_rows(const kl_kernels *k, const kl_cache *cache, int64_t n, int64_t position,
                      int64_t count, int64_t column, int64_t width, float *buffer)
{
    if (width == 0)
        return (kl_rows){ NULL, 0, 0, NULL };
    const char *first = stored(cache, n, position, column);
    if (cache->type == KL_F32)
        return (kl_rows){ (const float *)(const void *)first,
                          (int64_t)(cache->row_bytes / sizeof(float)), width, NULL };
    for (int64_t i = 0; i < count; i++) {
        const char *row = first + (size_t)i * cache->row_bytes;
        if (cache->type == KL_Q8_0)
            k->unpack_q8_0(buffer + i * width, row, width / KL_Q8_0_VALUES);
        else
            k->unpack_row(buffer + i * width, row, cache->type, width);
    }
    return (kl_rows){ buffer, width, width, NULL };
}

/* How many of the positions, from the first on, are neighbours in one page. */
static int64_t neighbours(const int32_t *position, int64_t count)
{
    int64_t n = 1;
    while (n < count && position[n] == position[0] + n && position[n] % KL_PAGE != 0)
        n++;
    return n;
}

kl_rows kl_cache_gather(const kl_kernels *k, const kl_cache *cache, int64_t n,
                        const int32_t *position, int64_t count, int64_t column, int64_t width,
                        float *buffer)
{
    if (width == 0)
        return (kl_rows){ NULL, 0, 0, NULL };
    for (int64_t i = 0, run; i < count; i += run) {
        float *to = buffer + i * width;
        run = neighbours(position + i, count - i);
        const kl_rows rows = kl_cache_rows(k, cache, n, position[i], run, column, width, to);
        if (run == count)
            return rows;
        for (int64_t row = 0; rows.data != to && row < run; row++)
            memcpy(to + row * width, rows.data + row * rows.stride, (size_t)width * sizeof *to);
    }
    return (kl_rows){ buffer, width, width, NULL };
}

kl_rows kl_cache_stored(const kl_kernels *k, const kl_cache *cache, int64_t n, int64_t position,
                        int64_t count, int64_t column, int64_t width, float *buffer)
{
    if (cache->type != KL_F16 || width == 0)
        return kl_cache_rows(k, cache, n, position, count, column, width, buffer);
    return (kl_rows){ NULL, (int64_t)(cache->row_bytes / sizeof(uint16_t)), width,
                      (const uint16_t *)(const void *)stored(cache, n, position, column) };
}
