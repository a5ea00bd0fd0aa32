/* Caches in pages, as kernels take them. */
#ifndef KL_HIP_CACHE_H
#define KL_HIP_CACHE_H

#include "ragged.h"
#include "reduce.h"
#include "stored.h"

/* kl_cache with its table of pages on the device: [N, pages] addresses. */
struct kl_cached {
    void *const *page;
    int64_t pages;
    size_t offset, row_bytes;
    kl_type type;
};

/* positions(n): how many of sequence n may be touched; 0: its pages are not looked at. The tables of as many sequences
 * as there is room for go in one copy: each alone would take as long. */
template <class COUNT>
static inline kl_status kl_put_cache(kl_ctx *ctx, kl_cached *to, const kl_cache &from, int64_t N,
                                     COUNT positions)
{
    int64_t most = 0;
    void **table;
    for (int64_t n = 0; n < N; n++)
        most = positions(n) > most ? positions(n) : most;
    const int64_t pages = kl_ceil_div(most, KL_PAGE);
    KL_SCRATCH_OF(table, ctx, N * pages > 0 ? N * pages : 1);
    *to = kl_cached{ table, pages, from.offset, from.row_bytes, from.type };
    if (kl_core_of->measuring(ctx) || pages == 0)
        return KL_OK;
    const int64_t room_for = KL_PUT_MOST / static_cast<int64_t>(sizeof *table) / pages;
    const int64_t at_once = room_for > 0 ? room_for : 1;
    for (int64_t first = 0; first < N; first += at_once) {
        const int64_t n = at_once < N - first ? at_once : N - first;
        const size_t n_bytes = static_cast<size_t>(n * pages) * sizeof *table;
        void *room = nullptr;
        if (room_for > 0)
            KL_TRY(kl_put_room(ctx, &room, n_bytes));
        for (int64_t i = 0; i < n; i++) {
            void *const *page = from.page[first + i];
            const size_t used = static_cast<size_t>(kl_ceil_div(positions(first + i), KL_PAGE));
            if (used > 0 && room != nullptr)
                memcpy(static_cast<void **>(room) + i * pages, page, used * sizeof *page);
            else if (used > 0)
                KL_TRY(kl_put(ctx, table + first * pages, page, used * sizeof *page));
        }
        if (room != nullptr)
            KL_TRY(kl_put_from(ctx, table + first * pages, room, n_bytes));
    }
    return KL_OK;
}

/* row `position` of sequence n */
static __device__ __forceinline__ char *kl_cached_row(const kl_cached &c, int64_t n,
                                                      int64_t position)
{
    return static_cast<char *>(c.page[n * c.pages + position / KL_PAGE]) + c.offset
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

#endif
