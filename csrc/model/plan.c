/* Memory before it is taken. Scratch is measured by running the passes with ops that only count, so the plan
 * cannot drift from the code. */
#include "pass.h"

#include <stdlib.h>

/* ODD short pieces fill a batch of absorbed tokens */
enum { ODD = 4 };

/* Scratch of one call of one pass: N sequences, sequence i with n[i] new tokens up to position context, all
 * logits of them. */
static kl_status call_scratch(kl_ctx *ctx, const kl_model *m, kl_type cache_type, int64_t context,
                              int64_t N, const int64_t *n, int64_t pass_tokens, size_t *bytes)
{
    kl_state *states = calloc((size_t)N + 1, sizeof *states);
    kl_state **list = calloc((size_t)N + 1, sizeof *list);
    int64_t *offsets = calloc((size_t)N + 1, sizeof *offsets);
    int64_t *rows = calloc((size_t)pass_tokens + 1, sizeof *rows);
    int32_t *ids = calloc((size_t)pass_tokens + 1, sizeof *ids);
    kl_status status =
        kl_fail(ctx, KL_ERR_MEMORY, "out of memory: plan of %lld sequences", (long long)N);
    if (states != NULL && list != NULL && offsets != NULL && rows != NULL && ids != NULL) {
        for (int64_t i = 0; i < N; i++) {
            states[i] =
                (kl_state){ .model = m, .cache_type = cache_type, .position = context - n[i] };
            list[i] = &states[i];
            offsets[i + 1] = offsets[i] + n[i];
        }
        for (int64_t t = 0; t < offsets[N]; t++)
            rows[t] = t;
        const kl_forward_args args = {
            .ids = ids,
            .offsets = offsets,
            .N = N,
            .states = list,
            .logit_rows = rows,
            .n_logits = offsets[N],
            .pass_tokens = pass_tokens,
        };
        status = kl_call_scratch(ctx, m, &args, bytes);
    }
    free(states);
    free(list);
    free(offsets);
    free(rows);
    free(ids);
    return status;
}

/* A pass of N sequences in which the first take what they can and the others at least few tokens each. The last
 * piece of the first odd ones is as long as the recurrent and absorbed forms take, so that both forms run.
 * Returns false where there is no such pass. */
static bool deal(int64_t *n, int64_t N, int64_t few, int64_t odd, int64_t context,
                 int64_t pass_tokens)
{
    int64_t left = pass_tokens - N * few;
    if (few > context || left < 0 || odd > N)
        return false;
    for (int64_t i = 0; i < N; i++) {
        const int64_t more = kl_min(left, context - few);
        n[i] = few + more;
        left -= more;
    }
    for (int64_t i = 0; i < odd; i++)
        if (n[i] > KL_ABSORBED_PIECE)
            n[i] -= (n[i] - KL_ABSORBED_PIECE) % KL_PIECE;
    return true;
}

/* The most that a pass of up to N sequences takes. What grows with a pass: the copies that make it a
 * transaction with its sequences, intermediates with its tokens, attention with its longest sequence and with
 * its absorbed tokens. So the widest pass is full, of all sequences or of few, and one sequence is long. */
static kl_status widest_pass(kl_ctx *ctx, const kl_model *m, kl_type cache_type, int64_t context,
                             int64_t sequences, int64_t pass_tokens, size_t *bytes)
{
    static const int64_t few[] = { 1, 2, 4, 8, KL_ABSORBED_PIECE };
    const int64_t most = kl_min(sequences, pass_tokens);
    int64_t *n = calloc((size_t)most, sizeof *n);
    if (n == NULL)
        return kl_fail(ctx, KL_ERR_MEMORY, "out of memory: plan");
    kl_status status = KL_OK;
    *bytes = 0;
    for (int64_t N = 1; N <= most && status == KL_OK; N = N < 6 || N == most ? N + 1 : most) {
        for (size_t i = 0; i < sizeof few / sizeof few[0]; i++) {
            for (int64_t odd = 0; odd <= ODD && status == KL_OK; odd++) {
                size_t taken = 0;
                if (!deal(n, N, few[i], odd, context, pass_tokens))
                    continue;
                status = call_scratch(ctx, m, cache_type, context, N, n, pass_tokens, &taken);
                *bytes = taken > *bytes ? taken : *bytes;
            }
        }
    }
    free(n);
    return status;
}

kl_status kl_plan_make(kl_ctx *ctx, kl_plan *plan, const kl_model *m, kl_type cache_type,
                       int64_t context, int64_t sequences, int64_t pass_tokens)
{
    int64_t state, all;
    if (context < 1 || context > KL_MAX_TOKENS || sequences < 1)
        return kl_fail(ctx, KL_ERR_ARG,
                       "plan: context is %lld and sequences is %lld; both must be >= 1, context at "
                       "most 2^%d",
                       (long long)context, (long long)sequences, KL_MAX_TOKENS_LOG2);
    if (pass_tokens < 0)
        return kl_fail(ctx, KL_ERR_ARG, "plan: pass_tokens is %lld; it must be >= 0",
                       (long long)pass_tokens);
    KL_TRY(kl_cache_check(ctx, m, cache_type));
    const int64_t pages = kl_ceil_div(context, KL_PAGE);
    *plan = (kl_plan){
        .weights = m->weight_bytes,
        .vectors = m->vector_bytes,
        .state_fixed = m->fixed_bytes,
        .state_page = kl_cache_page_bytes(m, cache_type),
    };
    if (!kl_mul(&state, pages, (int64_t)plan->state_page)
        || !kl_mul(&all, sequences, state + (int64_t)plan->state_fixed))
        return kl_fail(ctx, KL_ERR_ARG,
                       "plan: the states of %lld sequences of %lld tokens do not fit 2^62 bytes",
                       (long long)sequences, (long long)context);
    plan->state = (size_t)all;
    return widest_pass(ctx, m, cache_type, context, sequences,
                       pass_tokens > 0 ? pass_tokens : KL_PASS_TOKENS, &plan->scratch);
}
