/* index_scores (ops/index_scores.c): index.h. */
#include "index.h"

kl_status hip_index_scores(kl_ctx *ctx, float *scores, const float *q, kl_cache keys,
                           const float *weights, const kl_index_args *args)
{
    scoring s;
    KL_TRY(put_scoring(ctx, &s, q, keys, weights, args));
    for (int64_t n = 0; n < args->N; n++)
        s.most =
            args->positions[n] / args->pool > s.most ? args->positions[n] / args->pool : s.most;
    s.scale = args->scale;
    if (kl_core_of->measuring(ctx) || args->T * s.most == 0)
        return KL_OK;
    score_rows(ctx, s, scores, 0, args->T);
    return kl_launched(ctx, "index_scores");
}
