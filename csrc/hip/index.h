/* The scores of pools (ops/index_scores.c), which index_scores writes and index_select chooses by: the CPU's bytes.
 *   v1  one score a thread: the dots of its heads, one after the other, sixteen running sums and the halving tree.
 *   v2  sixteen threads a score, which are the sixteen sums (launched). */
#ifndef KL_HIP_INDEX_H
#define KL_HIP_INDEX_H

#include "cache.h"

#include <math.h>

namespace
{

const int SCORE_BLOCK = 128, LANES = 16, SCORES_A_BLOCK = SCORE_BLOCK / LANES;

struct scoring {
    const float *q, *weights;
    kl_cached keys;
    const int64_t *offsets, *positions;
    int64_t N, H, D, pool, most;
    float scale;
};

__device__ __forceinline__ int64_t seen_by(const scoring &a, int64_t n, int64_t t)
{
    return a.positions[n] - a.offsets[n + 1] + t + 1;
}

/* NaN stays NaN */
__device__ __forceinline__ float above_zero(float x) { return 0.0f > x ? 0.0f : x; }

template <kl_type TYPE>
__device__ float score_in_order(const scoring &a, const char *key, int64_t t)
{
    float sum = 0.0f;
    for (int64_t h = 0; h < a.H; h++) {
        const float *q = a.q + (t * a.H + h) * a.D;
        float lane[LANES] = {};
        for (int64_t d = 0; d < a.D; d++)
            lane[d % LANES] = fmaf(q[d], kl_cached_at<TYPE>(key, d), lane[d % LANES]);
        for (int half = LANES / 2; half >= 1; half /= 2)
            for (int l = 0; l < half; l++)
                lane[l] += lane[l + half];
        sum = fmaf(a.weights[t * a.H + h], above_zero(lane[0]), sum);
    }
    return a.scale * sum;
}

/* scores [rows, most] of the queries from t0 on; -infinity where a pool is not complete */
template <kl_type TYPE>
__global__ void __launch_bounds__(128) score_v1(scoring a, float *scores, int64_t t0, int64_t rows)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * SCORE_BLOCK;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * SCORE_BLOCK + threadIdx.x;
         i < rows * a.most; i += step) {
        const int64_t t = t0 + i / a.most, p = i % a.most, n = kl_sequence_of(a.offsets, a.N, t);
        const bool complete = p < seen_by(a, n, t) / a.pool;
        scores[i] =
            complete ? score_in_order<TYPE>(a, kl_cached_row(a.keys, n, p * a.pool), t) : -INFINITY;
    }
}

template <kl_type TYPE>
__global__ void __launch_bounds__(128) score_v2(scoring a, float *scores, int64_t t0, int64_t rows)
{
    const int lane = kl_lane() % LANES;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * SCORES_A_BLOCK; first < rows * a.most;
         first += static_cast<int64_t>(gridDim.x) * SCORES_A_BLOCK) {
        const int64_t at = first + threadIdx.x / LANES;
        const bool mine = at < rows * a.most; /* else: the last score, and nothing written */
        const int64_t i = mine ? at : rows * a.most - 1;
        const int64_t t = t0 + i / a.most, p = i % a.most, n = kl_sequence_of(a.offsets, a.N, t);
        const bool complete = p < seen_by(a, n, t) / a.pool;
        const char *key = complete ? kl_cached_row(a.keys, n, p * a.pool) : nullptr;
        float sum = 0.0f;
        for (int64_t h = 0; h < a.H; h++) {
            const float *q = a.q + (t * a.H + h) * a.D;
            float dot = 0.0f;
            for (int64_t d = lane; complete && d < a.D; d += LANES)
                dot = fmaf(q[d], kl_cached_at<TYPE>(key, d), dot);
            for (int m = LANES / 2; m >= 1; m /= 2)
                dot += kl_team_swap(dot, m);
            sum = fmaf(a.weights[t * a.H + h], above_zero(dot), sum);
        }
        if (mine && lane == 0)
            scores[i] = complete ? a.scale * sum : -INFINITY;
    }
}

template <kl_type TYPE>
void launch_scores(kl_ctx *ctx, const scoring &a, float *scores, int64_t t0, int64_t rows)
{
    if (kl_version() == 1)
        KL_LAUNCH(score_v1<TYPE>, kl_grid(kl_ceil_div(rows * a.most, SCORE_BLOCK)), SCORE_BLOCK, 0,
                  kl_stream(ctx), a, scores, t0, rows);
    else
        KL_LAUNCH(score_v2<TYPE>, kl_grid(kl_ceil_div(rows * a.most, SCORES_A_BLOCK)), SCORE_BLOCK,
                  0, kl_stream(ctx), a, scores, t0, rows);
}

void score_rows(kl_ctx *ctx, const scoring &a, float *scores, int64_t t0, int64_t rows)
{
    if (a.keys.type == KL_Q8_0)
        launch_scores<KL_Q8_0>(ctx, a, scores, t0, rows);
    else if (a.keys.type == KL_F16)
        launch_scores<KL_F16>(ctx, a, scores, t0, rows);
    else
        launch_scores<KL_F32>(ctx, a, scores, t0, rows);
}

/* The caller's arguments on the device; `most` and scale are set by the op. */
kl_status put_scoring(kl_ctx *ctx, scoring *s, const float *q, const kl_cache &keys,
                      const float *weights, const kl_index_args *args)
{
    *s =
        scoring{ q, weights, {}, nullptr, nullptr, args->N, args->H, args->D, args->pool, 0, 1.0f };
    const int64_t *offsets = args->offsets, *positions = args->positions, pool = args->pool;
    KL_TRY(kl_put_table(ctx, &s->offsets, offsets, args->N + 1));
    KL_TRY(kl_put_table(ctx, &s->positions, positions, args->N));
    return kl_put_cache(ctx, &s->keys, keys, args->N, [=](int64_t n) {
        return offsets[n + 1] > offsets[n] ? positions[n] / pool * pool : 0;
    });
}

} // namespace

#endif
