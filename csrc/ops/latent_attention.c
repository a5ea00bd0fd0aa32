/* latent_attention: softmax attention over a latent cache. Head h of a query has, for each position
 * s that it sees, the key [ w_uk_h c_s | k_shared_s ] and the value v_s = w_uv_h c_s:
 *   o = sum_s p_s v_s,   p = softmax_s( scale * q . k_s )
 *   o [T, H, V]     q [T, H, K + P]     c, k_shared: caches of rows R and P wide
 *   w_uk [H of K x R]     w_uv [H of V x R]
 * Query i of a sequence's L sees the first positions - L + i + 1; where it has a row of select, the sum is over the
 * positions of the row alone, and 0 over none.
 *
 * Two forms of the same (docs/math.md#latent_attention): expanded computes keys and values, once
 * for all the queries of a call; absorbed moves w_uk to the query and w_uv behind the sum and works
 * on the latents. Which one a token takes is decided by the length of its piece of the call alone; with a row of select
 * it is absorbed.
 * Both stream over blocks of 64 positions, aligned to position 0, with a running maximum; positions
 * not seen are left out by loop bounds. Budget: kimi_linear/diff/budgets. */
#include "latent_attention.h"

static kl_status check_row(kl_ctx *ctx, const int32_t *row, int64_t width, int64_t t, int64_t seen)
{
    for (int64_t i = 0; i < width; i++) {
        const long long at[2] = { (long long)t, (long long)i };
        const int s = (int)row[i];
        if (s < -1)
            return kl_fail(ctx, KL_ERR_ARG,
                           "latent_attention: select[%lld, %lld] (query, entry) is %d; it must be "
                           "a position, or -1 behind the last",
                           at[0], at[1], s);
        if (s >= seen)
            return kl_fail(ctx, KL_ERR_ARG,
                           "latent_attention: select[%lld, %lld] (query, entry) is %d; the query "
                           "sees positions 0 to %lld",
                           at[0], at[1], s, (long long)seen - 1);
        if (i > 0 && s >= 0 && s <= row[i - 1])
            return kl_fail(ctx, KL_ERR_ARG,
                           "latent_attention: select[%lld, %lld] (query, entry) is %d after %d; "
                           "the positions of a query must rise",
                           at[0], at[1], s, (int)row[i - 1]);
        if (i > 0 && s >= 0 && row[i - 1] < 0)
            return kl_fail(ctx, KL_ERR_ARG,
                           "latent_attention: select[%lld, %lld] (query, entry) is %d after -1; "
                           "behind the last position all must be -1",
                           at[0], at[1], s);
    }
    return KL_OK;
}

static kl_status check_rows(kl_ctx *ctx, const kl_latent_attention_args *a)
{
    for (int64_t n = 0; kl_mla_selects(a) && n < a->N; n++)
        for (int64_t i = 0, t = a->offsets[n]; t < a->offsets[n + 1]; i++, t++)
            if (kl_mla_has_row(a, n, i))
                KL_TRY(check_row(ctx, a->select + t * a->select_width, a->select_width, t,
                                 kl_mla_seen(a, n, i)));
    return KL_OK;
}

kl_status cpu_latent_attention(kl_ctx *ctx, float *o, const float *q, kl_cache latent,
                               kl_cache k_shared, const kl_weight *w_uk, const kl_weight *w_uv,
                               const kl_latent_attention_args *args)
{
    const kl_mla a = { ctx, o, q, latent, k_shared, w_uk, w_uv, args };
    kl_expanded expanded = { 0 };
    kl_absorbed absorbed = { 0 };
    KL_TRY(kl_expanded_prepare(&expanded, &a));
    KL_TRY(kl_absorbed_prepare(&absorbed, &a));
    if (ctx->arena.measuring)
        return KL_OK;
    KL_TRY(check_rows(ctx, args));
    KL_TRY(kl_expanded_run(&expanded));
    return kl_absorbed_run(&absorbed);
}

static kl_status check_sizes(kl_ctx *ctx, const kl_latent_attention_args *a)
{
    int64_t n, widest = kl_max(kl_max(a->K, a->P), kl_max(a->V, a->R));
    const bool low = a->T < 0 || a->H < 1 || a->K < 1 || a->P < 0 || a->V < 1 || a->R < 1;
    if (low || widest > INT32_MAX || !kl_mul(&n, a->T, a->H) || !kl_mul(&n, n, 2 * widest))
        return kl_fail(
            ctx, KL_ERR_SHAPE,
            "latent_attention: T, H, K, P, V, R are %lld, %lld, %lld, %lld, %lld, %lld%s",
            (long long)a->T, (long long)a->H, (long long)a->K, (long long)a->P, (long long)a->V,
            (long long)a->R,
            low ? "; T and P must be >= 0, the others >= 1" : ", which is too large");
    if (!(a->scale - a->scale == 0.0f))
        return kl_fail(ctx, KL_ERR_ARG, "latent_attention: scale is %g; it must be finite",
                       (double)a->scale);
    return KL_OK;
}

static kl_status check_select(kl_ctx *ctx, const kl_latent_attention_args *a)
{
    int64_t n;
    if (a->select_width == 0 && a->select == NULL)
        return KL_OK;
    if (a->select_width < 1 || !kl_mul(&n, a->T, a->select_width) || !kl_mul(&n, n, 4))
        return kl_fail(ctx, KL_ERR_SHAPE,
                       "latent_attention: select is [T, W] = [%lld, %lld]; W must be >= 1, and T W "
                       "not too large",
                       (long long)a->T, (long long)a->select_width);
    if (a->select == NULL && a->T > 0 && !ctx->arena.measuring)
        return kl_fail(ctx, KL_ERR_ARG,
                       "latent_attention: select is NULL and its width %lld; it must be 0",
                       (long long)a->select_width);
    if (a->select_from < 0)
        return kl_fail(ctx, KL_ERR_ARG, "latent_attention: select_from is %lld; it must be >= 0",
                       (long long)a->select_from);
    if (a->form == KL_FORM_EXPANDED)
        return kl_fail(
            ctx, KL_ERR_ARG,
            "latent_attention: form is expanded and select is given; it must be auto or absorbed");
    return KL_OK;
}

/* Operations of the form that each sequence's new tokens mostly take, and the bytes of caches and queries. */
static void count_work(const kl_ctx *ctx, const kl_latent_attention_args *a, const kl_cache *latent,
                       const kl_cache *k_shared, int64_t *flops, int64_t *bytes)
{
    *flops = *bytes = 0;
    if (ctx->arena.measuring) /* a plan's context may be longer than any work that can be counted */
        return;
    *bytes = 4 * a->T * a->H * (a->K + a->P + a->V);
    for (int64_t n = 0; n < a->N; n++) {
        const int64_t L = a->offsets[n + 1] - a->offsets[n], S = a->positions[n];
        const int64_t seen = kl_min(L * (S - L) + L * (L + 1) / 2, L * kl_mla_attended_most(a, n));
        const bool expanded = a->form == KL_FORM_EXPANDED
                              || (a->form == KL_FORM_AUTO && kl_mla_expanded_tokens(a, n) > 0);
        *flops += expanded ? 2 * a->H * (seen * (a->K + a->P + a->V) + S * a->R * (a->K + a->V))
                           : 2 * a->H * (seen * (2 * a->R + a->P) + L * a->R * (a->K + a->V));
        *bytes += kl_min(S, L * kl_mla_attended_most(a, n))
                  * (int64_t)(latent->row_bytes + k_shared->row_bytes);
    }
}

kl_status kl_latent_attention(kl_ctx *ctx, float *o, const float *q, kl_cache latent,
                              kl_cache k_shared, const kl_weight *w_uk, const kl_weight *w_uv,
                              const kl_latent_attention_args *args)
{
    KL_TRY(check_sizes(ctx, args));
    KL_TRY(check_select(ctx, args));
    KL_TRY(kl_check_offsets(ctx, "latent_attention", args->offsets, args->N, args->T));
    KL_TRY(kl_check_positions(ctx, "latent_attention", args->positions, args->offsets, args->N));
    KL_TRY(kl_check_cache(ctx, "latent_attention", "latent", &latent, args->R));
    KL_TRY(kl_check_cache(ctx, "latent_attention", "k_shared", &k_shared, args->P));
    KL_TRY(kl_check_weight(ctx, "latent_attention", "w_uk", w_uk, args->H, args->K, args->R));
    KL_TRY(kl_check_weight(ctx, "latent_attention", "w_uv", w_uv, args->H, args->V, args->R));
    if (args->form != KL_FORM_AUTO && args->form != KL_FORM_ABSORBED
        && args->form != KL_FORM_EXPANDED)
        return kl_fail(ctx, KL_ERR_ARG,
                       "latent_attention: form is %d; it must be auto, absorbed or expanded",
                       (int)args->form);
    int64_t flops, bytes;
    count_work(ctx, args, &latent, &k_shared, &flops, &bytes);
    return KL_RUN(latent_attention, flops, bytes, ctx, o, q, latent, k_shared, w_uk, w_uv, args);
}
