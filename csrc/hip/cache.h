/* Caches in pages, as kernels take them. */
#ifndef KL_HIP_CACHE_H
#define KL_HIP_CACHE_H

#include "ragged.h"
#include "reduce.h"
#include "scalar.h"
#include "stored.h"

/* kl_cache with its table of pages on the device: [N, pages] addresses. */
struct kl_cached {
    void *const *page;
    int64_t pages;
    size_t offset, row_bytes;
    kl_type type;
};

/* positions(n): how many of sequence n may be touched; 0: its pages are not looked at. Pages of all sequences go
 * together: each alone would take as long. */
template <class COUNT>
static inline kl_status kl_put_cache(kl_ctx *ctx, kl_cached *to, const kl_cache &from, int64_t N,
                                     COUNT positions)
{
    int64_t most = 0;
    for (int64_t n = 0; n < N; n++)
        most = positions(n) > most ? positions(n) : most;
    const int64_t pages = kl_ceil_div(most, KL_PAGE);
    *to = kl_cached{ nullptr, pages, from.offset, from.row_bytes, from.type };
    return kl_put_made(ctx, &to->page, N * pages, [&](int64_t i) {
        const int64_t n = i / pages, page = i % pages;
        return page * KL_PAGE < positions(n) ? from.page[n][page] : nullptr;
    });
}

/* row `position` of sequence n */
static __device__ __forceinline__ char *kl_cached_row(const kl_cached &c, int64_t n,
                                                      int64_t position)
{
    return kl_global(static_cast<char *>(c.page[n * c.pages + position / KL_PAGE])) + c.offset
           + static_cast<size_t>(position % KL_PAGE) * c.row_bytes;
}

/* value k of a row; Q8_0: 32 values are a float16 scale and their int8 */
template <kl_type TYPE>
static __device__ __forceinline__ float kl_cached_at(const char *row, int64_t k)
{
    if (TYPE != KL_Q8_0)
        return kl_stored<(TYPE == KL_F16 ? KL_F16 : KL_F32)>::at(row, k);
    const char *block = row + k / 32 * 34;
    const float d = kl_stored<KL_F16>::at(block, 0);
    return d * static_cast<float>(static_cast<signed char>(block[2 + k % 32]));
}
static __device__ __forceinline__ float kl_cached_value(kl_type type, const char *row, int64_t k)
{
    return type == KL_Q8_0  ? kl_cached_at<KL_Q8_0>(row, k)
           : type == KL_F16 ? kl_cached_at<KL_F16>(row, k)
                            : kl_cached_at<KL_F32>(row, k);
}

/* ---- storing ---- */

/* The size from which on a finite value cannot be stored (ops/cache_append.c). */
static inline float kl_cache_limit_of(kl_type type)
{
    return type == KL_Q8_0 ? 127.0f * 65520.0f : type == KL_F16 ? 65520.0f : INFINITY;
}

/* value d of a row in float32 or float16 */
static __device__ __forceinline__ void kl_put_value(kl_type type, char *row, int64_t d, float x)
{
    if (type == KL_F16) {
        const uint16_t bits = kl_to_f16(x);
        memcpy(__builtin_assume_aligned(row + 2 * d, 2), &bits, sizeof bits);
    } else {
        memcpy(__builtin_assume_aligned(row + 4 * d, 4), &x, sizeof x);
    }
}

/* A block of Q8_0: what is made of the largest of 32 sizes. A block that is not finite is NaN; one whose scale has
 * no inverse is zeros. */
struct kl_q8_0_scale {
    uint16_t bits;
    float inverse;
};
static __device__ __forceinline__ kl_q8_0_scale kl_q8_0_scale_of(float largest)
{
    if (!(largest < INFINITY))
        return kl_q8_0_scale{ 0x7e00, 0.0f };
    if (largest < 0x1p-120f)
        return kl_q8_0_scale{ 0, 0.0f };
    const float d = largest / 127.0f;
    return kl_q8_0_scale{ kl_to_f16(d), 1.0f / d };
}
static __device__ __forceinline__ char kl_q8_0_byte(float x, const kl_q8_0_scale &s)
{
    const float q = s.inverse != 0.0f ? x * s.inverse : 0.0f;
    const float down = floorf(fabsf(q)), size = fabsf(q) - down >= 0.5f ? down + 1.0f : down;
    return static_cast<char>(static_cast<int>(q < 0.0f ? -size : size));
}

#endif
