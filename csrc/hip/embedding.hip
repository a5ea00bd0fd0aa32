/* embedding (ops/embedding.c): exact, so that both versions give the same bytes.
 *   v1  one value a thread, its row by a division.
 *   v2  one block a row: no division, the id is read once (launched). */
#include "ragged.h"
#include "stored.h"

namespace
{

const int BLOCK = 256;

template <kl_type TYPE>
__global__ void __launch_bounds__(256)
    embedding_v1(float *y, const int32_t *ids, kl_matrix table, int64_t T)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK, n = T * table.cols;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < n; i += step)
        y[i] = kl_matrix_at<TYPE, false>(table, ids[i / table.cols], i % table.cols);
}

template <kl_type TYPE>
__global__ void __launch_bounds__(256, 1)
    embedding_v2(float *y, const int32_t *ids, kl_matrix table, int64_t T)
{
    for (int64_t t = blockIdx.x; t < T; t += gridDim.x) {
        const int64_t id = ids[t];
        for (int64_t d = threadIdx.x; d < table.cols; d += BLOCK)
            y[t * table.cols + d] = kl_matrix_at<TYPE, false>(table, id, d);
    }
}

template <kl_type TYPE>
void launch(kl_ctx *ctx, float *y, const int32_t *ids, const kl_matrix &table, int64_t T)
{
    if (kl_version() == 1)
        KL_LAUNCH((embedding_v1<TYPE>), kl_grid(kl_ceil_div(T * table.cols, BLOCK)), BLOCK, 0,
                  kl_stream(ctx), y, ids, table, T);
    else
        KL_LAUNCH((embedding_v2<TYPE>), kl_grid(T), BLOCK, 0, kl_stream(ctx), y, ids, table, T);
}

} // namespace

kl_status hip_embedding(kl_ctx *ctx, float *y, const int32_t *ids, const kl_weight *table,
                        int64_t T)
{
    const int32_t *device_ids;
    KL_TRY(kl_put_table(ctx, &device_ids, ids, T));
    if (kl_core_of->measuring(ctx) || T == 0)
        return KL_OK;
    const kl_matrix w = kl_matrix_of(table, 0);
    switch (kl_kernel_type(table->type)) {
#define CASE(TYPE)                                                                                 \
    case TYPE: launch<TYPE>(ctx, y, device_ids, w, T); break;
        KL_KERNEL_TYPES(CASE)
#undef CASE
    default: return kl_no_type(ctx, "embedding", "table", table->type);
    }
    return kl_launched(ctx, "embedding");
}
