/* delta_rule: for every sequence and value head, with a = exp(g[t]) and S the state [K, V]
 *     S' = Diag(a) S     d = beta (v - S'^T k)     S = S' + k d^T     o = S^T (scale q)
 *   q, k [T, Hk, K]     v, o [T, Hv, V], o may be v     beta [T, Hv], in [0, 2]
 *   g <= 0, log-decay in nats: [T, Hv, K], [T, Hv] or none by gate; -inf forgets, exactly
 *   value head h reads key head h / (Hv / Hk) (grouped) or h % Hk (tiled)
 *   states [Hv, K, V] a sequence; state_in NULL: zeros; state_out NULL: not kept; state_out may be
 *   state_in, and is no other sequence's state_in.
 *   A sequence of no tokens hands its state on as it is.
 *   l2_norm: q and k are first normed, to the bytes of the op l2_norm. Checkpoints: states on the way, each the
 *   bytes of the final state of a call that ends there; no other byte depends on them.
 *   No clamp: the values are the recurrence's at any decay, NaN and infinity where it has them.
 *   Subnormals are flushed: read as 0, and results below 2^-126 become 0.
 *   Budget: a running bound beside the recurrence (docs/math.md#delta-budgets).
 *
 * Forms, all on the CPU in delta_forms.c; orders of sums in docs/math.md.
 *   recurrent  token by token: any split of a sequence gives the same bytes
 *   chunked    chunks of `chunk` tokens, counted from the first of the call: a split at a multiple of it does
 *   auto       chunks of 16, the rest token by token: a split at a multiple of 16 does; or the context's form */
#include "delta.h"

static kl_status check_sizes(kl_ctx *ctx, const char *op, const kl_delta_rule_args *a)
{
    int64_t n;
    if (a->Hk < 1 || a->Hv < 1 || a->K < 1 || a->V < 1)
        return kl_fail(ctx, KL_ERR_SHAPE,
                       "%s: Hk, Hv, K, V are %lld, %lld, %lld, %lld; each must be >= 1", op,
                       (long long)a->Hk, (long long)a->Hv, (long long)a->K, (long long)a->V);
    if (a->Hv % a->Hk != 0)
        return kl_fail(ctx, KL_ERR_SHAPE,
                       "%s: v has %lld heads for %lld heads of q and k; it must be a multiple", op,
                       (long long)a->Hv, (long long)a->Hk);
    if (!kl_mul(&n, a->Hv, a->K) || !kl_mul(&n, n, a->V) || !kl_mul(&n, n, kl_max(a->N, 1))
        || !kl_mul(&n, n, 1024)
        || !kl_mul(&n, a->K, 1 << 26)) /* room for sizes in bytes, and for scratch */
        return kl_fail(ctx, KL_ERR_SHAPE, "%s: states of [%lld, %lld, %lld, %lld] are too large",
                       op, (long long)a->N, (long long)a->Hv, (long long)a->K, (long long)a->V);
    KL_TRY(kl_check_rows(ctx, op, "q", a->T, a->Hk * a->K));
    KL_TRY(kl_check_rows(ctx, op, "v", a->T, a->Hv * a->V));
    KL_TRY(kl_check_rows(ctx, op, "g", a->T, a->Hv * a->K));
    return kl_check_offsets(ctx, op, a->offsets, a->N, a->T);
}

kl_status kl_delta_check(kl_ctx *ctx, const char *op, const kl_delta_rule_args *args)
{
    KL_TRY(check_sizes(ctx, op, args));
    if (!(args->scale - args->scale == 0.0f))
        return kl_fail(ctx, KL_ERR_ARG, "%s: scale is %g; it must be finite", op,
                       (double)args->scale);
    if (args->gate < KL_GATE_NONE || args->gate > KL_GATE_CHANNEL)
        return kl_fail(ctx, KL_ERR_ARG, "%s: gate is %d; it must be none, head or channel", op,
                       (int)args->gate);
    if (args->head_map != KL_HEADS_GROUPED && args->head_map != KL_HEADS_TILED)
        return kl_fail(ctx, KL_ERR_ARG, "%s: head_map is %d; it must be grouped or tiled", op,
                       (int)args->head_map);
    return KL_OK;
}

/* Token counts that rise within each sequence, from 0 to its tokens. */
static kl_status check_checkpoints(kl_ctx *ctx, const kl_delta_rule_args *a)
{
    if (a->checkpoints != NULL && (a->checkpoint_offsets == NULL || a->kept == NULL))
        return kl_fail(
            ctx, KL_ERR_ARG,
            "delta_rule: checkpoints are given; checkpoint_offsets and kept must be, too");
    for (int64_t n = 0; n <= a->N && a->checkpoints != NULL; n++) { /* all, before a mark is read */
        const int64_t least = n > 0 ? a->checkpoint_offsets[n - 1] : 0;
        if (a->checkpoint_offsets[n] < least)
            return kl_fail(
                ctx, KL_ERR_ARG,
                "delta_rule: checkpoint_offsets[%lld] is %lld; it must not be below %lld",
                (long long)n, (long long)a->checkpoint_offsets[n], (long long)least);
    }
    for (int64_t n = 0; n < a->N && a->checkpoints != NULL; n++) {
        const int64_t begin = a->checkpoint_offsets[n], end = a->checkpoint_offsets[n + 1];
        for (int64_t i = begin; i < end; i++) {
            const int64_t at = a->checkpoints[i], least = i > begin ? a->checkpoints[i - 1] + 1 : 0;
            const int64_t tokens = a->offsets[n + 1] - a->offsets[n];
            if (at < least || at > tokens)
                return kl_fail(ctx, KL_ERR_ARG,
                               "delta_rule: checkpoints[%lld] is %lld; it must be %lld to %lld",
                               (long long)i, (long long)at, (long long)least, (long long)tokens);
        }
    }
    return KL_OK;
}

kl_status kl_delta_rule(kl_ctx *ctx, float *o, kl_slots state_out, const float *q, const float *k,
                        const float *v, const float *g, const float *beta, kl_slots state_in,
                        const kl_delta_rule_args *args)
{
    KL_TRY(kl_delta_check(ctx, "delta_rule", args));
    if (args->form != KL_FORM_AUTO && args->form != KL_FORM_RECURRENT
        && args->form != KL_FORM_CHUNKED)
        return kl_fail(ctx, KL_ERR_ARG,
                       "delta_rule: form is %d; it must be auto, recurrent or chunked",
                       (int)args->form);
    if (args->chunk < 0 || args->chunk > KL_DELTA_CHUNK_MAX)
        return kl_fail(ctx, KL_ERR_ARG, "delta_rule: chunk is %lld; it must be 1 to %d",
                       (long long)args->chunk, KL_DELTA_CHUNK_MAX);
    if (args->l2_norm && !(args->l2_eps >= 0.0f))
        return kl_fail(ctx, KL_ERR_ARG, "delta_rule: l2_eps is %g; it must be >= 0",
                       (double)args->l2_eps);
    KL_TRY(check_checkpoints(ctx, args));
    return KL_RUN(delta_rule, 7 * args->T * args->Hv * args->K * args->V,
                  8 * args->N * args->Hv * args->K * args->V
                      + 4 * args->T * (2 * args->Hk * args->K + args->Hv * (args->K + 2 * args->V)),
                  ctx, o, state_out, q, k, v, g, beta, state_in, args);
}
