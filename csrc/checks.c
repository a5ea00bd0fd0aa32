/* Checks that several ops share. */
#include "internal.h"

#include <math.h>

kl_status kl_check_offsets(kl_ctx *ctx, const char *op, const int64_t *offsets, int64_t N,
                           int64_t T)
{
    if (N < 0)
        return kl_fail(ctx, KL_ERR_SHAPE, "%s: offsets: N is %lld; it must be >= 0", op,
                       (long long)N);
    if (offsets[0] != 0)
        return kl_fail(ctx, KL_ERR_ARG, "%s: offsets[0] is %lld; it must be 0", op,
                       (long long)offsets[0]);
    for (int64_t n = 0; n < N; n++)
        if (offsets[n + 1] < offsets[n])
            return kl_fail(ctx, KL_ERR_ARG,
                           "%s: offsets[%lld] is %lld after %lld; offsets must not fall", op,
                           (long long)n + 1, (long long)offsets[n + 1], (long long)offsets[n]);
    if (offsets[N] != T)
        return kl_fail(ctx, KL_ERR_SHAPE, "%s: offsets end at %lld; they must end at T = %lld", op,
                       (long long)offsets[N], (long long)T);
    return KL_OK;
}

kl_status kl_check_whole(kl_ctx *ctx, const char *op, const char *name, const char *parts,
                         kl_type type, int64_t width)
{
    const int64_t block = kl_type_block(type);
    if (block == 0)
        return kl_fail(ctx, KL_ERR_DTYPE, "%s: %s has storage type %d, which is not known here", op,
                       name, (int)type);
    if (width % block != 0)
        return kl_fail(ctx, KL_ERR_SHAPE,
                       "%s: %s has %s of %lld values; %s needs a multiple of %lld", op, name, parts,
                       (long long)width, kl_type_name(type), (long long)block);
    return KL_OK;
}

kl_status kl_check_weight(kl_ctx *ctx, const char *op, const char *name, const kl_weight *w,
                          int64_t n, int64_t rows, int64_t cols)
{
    KL_TRY(kl_check_whole(ctx, op, name, "rows", w->type, w->transposed ? w->rows : w->cols));
    if (w->n != n || w->rows != rows || w->cols != cols)
        return kl_fail(ctx, KL_ERR_SHAPE,
                       "%s: %s is %lld of [%lld, %lld]; it must be %lld of [%lld, %lld]", op, name,
                       (long long)w->n, (long long)w->rows, (long long)w->cols, (long long)n,
                       (long long)rows, (long long)cols);
    if (w->row_bytes < kl_type_bytes(w->type, w->transposed ? rows : cols))
        return kl_fail(ctx, KL_ERR_SHAPE, "%s: %s has %zu bytes a row; a row needs %zu", op, name,
                       w->row_bytes, kl_type_bytes(w->type, w->transposed ? rows : cols));
    return KL_OK;
}

kl_status kl_check_positions(kl_ctx *ctx, const char *op, const int64_t *positions,
                             const int64_t *offsets, int64_t N)
{
    for (int64_t n = 0; n < N; n++) {
        const int64_t queries = offsets[n + 1] - offsets[n];
        if (positions[n] < queries)
            return kl_fail(ctx, KL_ERR_ARG,
                           "%s: positions[%lld] is %lld for %lld queries; the queries' own must be "
                           "among them",
                           op, (long long)n, (long long)positions[n], (long long)queries);
        if (positions[n] > KL_MAX_TOKENS)
            return kl_fail(ctx, KL_ERR_ARG, "%s: positions[%lld] is %lld; there may be 2^%d", op,
                           (long long)n, (long long)positions[n], KL_MAX_TOKENS_LOG2);
    }
    return KL_OK;
}

kl_status kl_check_cache(kl_ctx *ctx, const char *op, const char *name, const kl_cache *cache,
                         int64_t width)
{
    if (cache->type != KL_F32 && cache->type != KL_F16 && cache->type != KL_Q8_0)
        return kl_fail(ctx, KL_ERR_DTYPE, "%s: %s has storage type %d; it must be F32, F16 or Q8_0",
                       op, name, (int)cache->type);
    KL_TRY(kl_check_whole(ctx, op, name, "rows", cache->type, width));
    if (cache->row_bytes < kl_type_bytes(cache->type, width)
        || cache->row_bytes % kl_type_bytes(cache->type, kl_type_block(cache->type)) != 0)
        return kl_fail(ctx, KL_ERR_SHAPE, "%s: %s has %zu bytes a row; a row needs %zu", op, name,
                       cache->row_bytes, kl_type_bytes(cache->type, width));
    return KL_OK;
}

kl_status kl_check_rows(kl_ctx *ctx, const char *op, const char *name, int64_t T, int64_t D)
{
    int64_t n;
    if (T < 0 || D < 1)
        return kl_fail(ctx, KL_ERR_SHAPE,
                       "%s: %s is [%lld, %lld]; the first must be >= 0, the second >= 1", op, name,
                       (long long)T, (long long)D);
    if (!kl_mul(&n, T, D))
        return kl_fail(ctx, KL_ERR_SHAPE, "%s: %s is [%lld, %lld], which is too large", op, name,
                       (long long)T, (long long)D);
    return KL_OK;
}

kl_status kl_check_streams(kl_ctx *ctx, const char *op, int64_t T, int64_t n, int64_t D)
{
    int64_t size;
    if (n < 1 || n > KL_MHC_STREAMS)
        return kl_fail(ctx, KL_ERR_SHAPE, "%s: x has %lld streams; it must have 1 to %d", op,
                       (long long)n, KL_MHC_STREAMS);
    if (T < 0 || D < 1 || !kl_mul(&size, T, (2 + n) * n) || !kl_mul(&size, n, D)
        || !kl_mul(&size, T, size))
        return kl_fail(ctx, KL_ERR_SHAPE,
                       "%s: x is [%lld, %lld, %lld]; the first must be >= 0, the last >= 1, and it "
                       "must have fewer than 2^62 values",
                       op, (long long)T, (long long)n, (long long)D);
    return KL_OK;
}

kl_status kl_check_limit(kl_ctx *ctx, const char *op, float limit)
{
    if (!(limit >= 0.0f && isfinite(limit)))
        return kl_fail(ctx, KL_ERR_ARG, "%s: limit is %g; it must be > 0 and finite, or 0 for none",
                       op, (double)limit);
    return KL_OK;
}

kl_status kl_check_betas(kl_ctx *ctx, const char *op, const kl_situ_betas *betas)
{
    if (!(betas->beta > 0.0f && isfinite(betas->beta)))
        return kl_fail(ctx, KL_ERR_ARG, "%s: beta is %g; it must be > 0 and finite", op,
                       (double)betas->beta);
    if (!(betas->linear_beta >= 0.0f && isfinite(betas->linear_beta)))
        return kl_fail(ctx, KL_ERR_ARG,
                       "%s: linear_beta is %g; it must be > 0 and finite, or 0 for none", op,
                       (double)betas->linear_beta);
    return KL_OK;
}
