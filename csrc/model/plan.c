/* Memory before it is taken. Scratch is measured by running the passes with ops that only count, so the plan
 * cannot drift from the code. */
#include "pass.h"

#include <stdlib.h>

/* Scratch of one call: N sequences, each with n new tokens up to position context, all logits of it. */
static kl_status call_scratch(kl_ctx *ctx, const kl_model *m, kl_type cache_type, int64_t context,
                              int64_t N, int64_t n, int64_t pass_tokens, size_t *bytes)
{
    const size_t T = (size_t)(N * n);
    kl_state *states = calloc((size_t)N + 1, sizeof *states);
    kl_state **list = calloc((size_t)N + 1, sizeof *list);
    int64_t *offsets = calloc((size_t)N + 1, sizeof *offsets), *rows = calloc(T + 1, sizeof *rows);
    int32_t *ids = calloc(T + 1, sizeof *ids);
    kl_status status = kl_fail(ctx, KL_ERR_MEMORY, "out of memory: plan of %zu tokens", T);
    if (states != NULL && list != NULL && offsets != NULL && rows != NULL && ids != NULL) {
        for (int64_t i = 0; i < N; i++) {
            states[i] = (kl_state){ .model = m, .cache_type = cache_type, .position = context - n };
            list[i] = &states[i];
            offsets[i + 1] = offsets[i] + n;
        }
        for (size_t t = 0; t < T; t++)
            rows[t] = (int64_t)t;
        const kl_forward_args args = {
            .ids = ids,
            .offsets = offsets,
            .N = N,
            .states = list,
            .logit_rows = rows,
            .n_logits = (int64_t)T,
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

kl_status kl_plan_make(kl_ctx *ctx, kl_plan *plan, const kl_model *m, kl_type cache_type,
                       int64_t context, int64_t sequences, int64_t pass_tokens)
{
    if (context < 1 || sequences < 1)
        return kl_fail(ctx, KL_ERR_ARG,
                       "plan: context is %lld and sequences is %lld; both must be >= 1",
                       (long long)context, (long long)sequences);
    if (cache_type != KL_F32 && cache_type != KL_F16)
        return kl_fail(ctx, KL_ERR_DTYPE, "plan: cache is of type %d; it must be F32 or F16",
                       (int)cache_type);
    const int64_t pages = kl_ceil_div(context, KL_PAGE);
    *plan = (kl_plan){
        .weights = m->weight_bytes,
        .vectors = m->vector_bytes,
        .state_fixed = m->state.fixed_bytes,
        .state_page = kl_type_bytes(cache_type, (int64_t)m->state.page_values),
    };
    plan->state = (size_t)sequences * (plan->state_fixed + (size_t)pages * plan->state_page);
    /* the largest: a prompt of one sequence in full passes, or a step of all of them */
    const int64_t prompt = kl_min(context, pass_tokens > 0 ? pass_tokens : 512);
    size_t reading = 0, stepping = 0;
    KL_TRY(call_scratch(ctx, m, cache_type, context, 1, prompt, pass_tokens, &reading));
    KL_TRY(call_scratch(ctx, m, cache_type, context, sequences, 1, pass_tokens, &stepping));
    plan->scratch = reading > stepping ? reading : stepping;
    return KL_OK;
}
