/* attn_res: y[t,d] = sum_j p[j,t] v[j,t,d],   p[.,t] = softmax_j(a[.,t]),
 *       a[j,t] = (sum_d w[d] v[j,t,d]) / sqrt(mean_d(v[j,t,d]^2) + eps)
 *   v is snapshots and, last, x: n + 1 candidates of each token. Without snapshots y is x, bit for bit.
 *   x, y [T, D], y may be x     snapshots [n, T, D]     w [D]     eps in units of x^2, >= 0
 *   A score is taken of the row times 2^-96 or 2^96 where its squares leave float32 (rms_norm.c).
 *   Sums: over d 16 lanes of fma, then the halving tree; over j softmax's for p, then a product and fma
 *   in rising j. Budget: docs/math.md#attn_res. */
#include "ops.h"

#include "../cpu/kernels.h"

#include <string.h>

typedef struct task {
    const kl_kernels *k;
    float *y;
    const float *snapshots, *x, *w;
    float *p; /* [threads, room]: scores, then weights, of a token */
    int64_t room, n, T, D;
    float eps;
} task;

static void mix_token(const task *a, float *p, int64_t t)
{
    const int64_t apart = a->T * a->D;
    const float *past = a->snapshots + t * a->D, *x = a->x + t * a->D;
    for (int64_t j = 0; j < a->n; j++)
        p[j] = a->k->attn_res_score(past + j * apart, a->w, a->D, a->eps);
    p[a->n] = a->k->attn_res_score(x, a->w, a->D, a->eps);
    a->k->softmax(p, p, a->n + 1);
    a->k->attn_res_mix(a->y + t * a->D, past, apart, x, p, a->n, a->D);
}

static void mix(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    for (int64_t t = begin; t < end; t++)
        mix_token(a, a->p + thread * a->room, t);
}

static void copy(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    memcpy(a->y + begin * a->D, a->x + begin * a->D, (size_t)((end - begin) * a->D) * sizeof *a->y);
}

kl_status cpu_attn_res(kl_ctx *ctx, float *y, const float *snapshots, const float *x,
                       const float *w, int64_t n, int64_t T, int64_t D, float eps)
{
    const int64_t room =
        (n + 16) / 16 * 16; /* n + 1, and lines of the cache that threads do not share */
    task a = { ctx->k, y, snapshots, x, w, NULL, room, n, T, D, eps };
    if (T == 0 || (n == 0 && y == x))
        return KL_OK;
    if (n > 0)
        KL_SCRATCH(a.p, ctx, ctx->threads * room);
    if (ctx->arena.measuring)
        return KL_OK;
    if (n == 0)
        return kl_for(ctx, T, kl_row_grain(D), copy, &a);
    return kl_for(ctx, T, kl_row_grain((n + 1) * D), mix, &a);
}

kl_status kl_attn_res(kl_ctx *ctx, float *y, const float *snapshots, const float *x, const float *w,
                      int64_t n, int64_t T, int64_t D, float eps)
{
    int64_t size;
    KL_TRY(kl_check_rows(ctx, "attn_res", "x", T, D));
    if (n < 0 || !kl_mul(&size, n, T * D))
        return kl_fail(ctx, KL_ERR_SHAPE,
                       "attn_res: snapshots are %lld of [%lld, %lld]; there must be 0 or more, of "
                       "fewer than 2^62 values",
                       (long long)n, (long long)T, (long long)D);
    if (!(eps >= 0.0f))
        return kl_fail(ctx, KL_ERR_ARG, "attn_res: eps is %g; it must be >= 0", (double)eps);
    return KL_RUN(attn_res, 6 * (n + 1) * T * D, 4 * (n + 2) * T * D, ctx, y, snapshots, x, w, n, T,
                  D, eps);
}
