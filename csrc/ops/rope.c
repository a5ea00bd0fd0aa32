/* rope: rotary positions. The pair (x[j], x[j + rotary/2]) of each head is turned by the angle
 * f = positions[t] * base^(-2j / rotary), for j < rotary/2:
 *   y[j] = x[j] cos f - x[j + rotary/2] sin f
 *   y[j + rotary/2] = x[j + rotary/2] cos f + x[j] sin f
 * and the other K - rotary values are copied.
 *   x, y [T, H, K], y may be x     positions [T], on the host, >= 0     rotary even, 0 to K
 *   f, cos f and sin f are computed in double and rounded once, for a token, not for each head.
 *   Budget: kimi_linear/diff/budgets (docs/math.md#rope). */
#include "ops.h"

#include "../cpu/fpenv.h"
#include "../cpu/kernels.h"

#include <math.h>
#include <string.h>

typedef struct task {
    const kl_kernels *k;
    float *y;
    const float *x;
    const int64_t *positions;
    int64_t H, K, rotary;
    const double *speed; /* [rotary / 2]: angle of one position */
    float *table;        /* [threads, rotary]: cosines, sines of a token */
} task;

static void turn_tokens(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    const int64_t half = a->rotary / 2, rest = a->K - a->rotary;
    float *cosine = a->table + thread * a->rotary, *sine = cosine + half;
    for (int64_t t = begin; t < end; t++) {
        for (int64_t j = 0; j < half; j++) {
            const double angle = (double)a->positions[t] * a->speed[j];
            cosine[j] = (float)cos(angle);
            sine[j] = (float)sin(angle);
        }
        for (int64_t h = 0; h < a->H; h++) {
            const float *x = a->x + (t * a->H + h) * a->K;
            float *y = a->y + (t * a->H + h) * a->K;
            a->k->rope(y, x, cosine, sine, half);
            if (y != x)
                memcpy(y + a->rotary, x + a->rotary, (size_t)rest * sizeof *y);
        }
    }
}

kl_status cpu_rope(kl_ctx *ctx, float *y, const float *x, const int64_t *positions, int64_t T,
                   int64_t H, int64_t K, int64_t rotary, double base)
{
    double *speed;
    float *table;
    KL_SCRATCH(speed, ctx, rotary / 2);
    KL_SCRATCH(table, ctx, ctx->threads * rotary);
    if (ctx->arena.measuring)
        return KL_OK;
    const kl_fp saved = kl_fp_default();
    for (int64_t j = 0; j < rotary / 2; j++)
        speed[j] = pow(base, -2.0 * (double)j / (double)rotary);
    kl_fp_restore(saved);
    task a = { ctx->k, y, x, positions, H, K, rotary, speed, table };
    return kl_for(ctx, T, kl_max(1, kl_row_grain(H * K) / 4), turn_tokens, &a);
}

static kl_status check(kl_ctx *ctx, const int64_t *positions, int64_t T, int64_t H, int64_t K,
                       int64_t rotary, double base)
{
    int64_t n;
    const bool low = T < 0 || H < 1 || K < 1;
    if (low || !kl_mul(&n, T, H) || !kl_mul(&n, n, K))
        return kl_fail(ctx, KL_ERR_SHAPE, "rope: x is [T, H, K] = [%lld, %lld, %lld]%s",
                       (long long)T, (long long)H, (long long)K,
                       low ? "; T must be >= 0, H and K must be >= 1" : ", which is too large");
    if (rotary < 0 || rotary > K || rotary % 2 != 0)
        return kl_fail(ctx, KL_ERR_ARG, "rope: rotary is %lld; it must be even, from 0 to K = %lld",
                       (long long)rotary, (long long)K);
    if (!(base > 0.0 && base < (double)INFINITY))
        return kl_fail(ctx, KL_ERR_ARG, "rope: base is %g; it must be > 0 and finite", base);
    if (!ctx->arena.measuring)
        for (int64_t t = 0; t < T; t++)
            if (positions[t] < 0)
                return kl_fail(ctx, KL_ERR_ARG, "rope: positions[%lld] is %lld; it must be >= 0",
                               (long long)t, (long long)positions[t]);
    return KL_OK;
}

kl_status kl_rope(kl_ctx *ctx, float *y, const float *x, const int64_t *positions, int64_t T,
                  int64_t H, int64_t K, int64_t rotary, double base)
{
    KL_TRY(check(ctx, positions, T, H, K, rotary, base));
    return KL_RUN(rope, 3 * T * H * rotary, 8 * T * H * K, ctx, y, x, positions, T, H, K, rotary,
                  base);
}
