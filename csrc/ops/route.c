/* route: which k experts a token goes to, and with what weights.
 *   s = sigmoid or softmax of scores[t]; s' = s + bias (for the choice alone)
 *   with groups > 1: a group's score is the sum of its two largest s' (one, where it has one member), and
 *   the top_groups best groups stay; of their experts the k largest s', the lowest index among equals
 *   weights[t, i] = s[ids[t, i]], / (their sum in ascending id + 1e-20) when renormalised, * scale
 *   given: ids are an input, ascending in each row, and only their weights are computed
 *   scores [T, E], bias [E] or NULL, ids [T, k] ascending in each row, weights [T, k] in their order
 *   NaN, and what makes softmax NaN, is an error that names token and expert: no expert is picked from it.
 *   Budget of weights: sigmoid (k + 13) u |ref|, softmax as softmax (docs/math.md#route). */
#include "ops.h"

#include "../cpu/kernels.h"

#include <math.h>
#include <string.h>

typedef struct task {
    const kl_kernels *k;
    int32_t *ids;
    float *weights;
    const float *scores, *bias;
    const kl_route_args *args;
    float *s, *chosen_by; /* [E] of each thread */
    int32_t *groups;      /* [groups] of each thread */
} task;

/* Puts e into list, which holds the n best so far, best first; the list keeps at most k. */
static int64_t keep_best(int32_t *list, int64_t n, int64_t k, const float *value, int32_t e)
{
    if (n == k && !(value[e] > value[list[k - 1]]))
        return n;
    int64_t i = n < k ? n : k - 1;
    for (; i > 0 && value[e] > value[list[i - 1]]; i--)
        list[i] = list[i - 1];
    list[i] = e;
    return n < k ? n + 1 : n;
}

static void sort_ascending(int32_t *ids, int64_t n)
{
    for (int64_t i = 1; i < n; i++) {
        const int32_t e = ids[i];
        int64_t j = i;
        for (; j > 0 && ids[j - 1] > e; j--)
            ids[j] = ids[j - 1];
        ids[j] = e;
    }
}

static float group_score(const float *value, int64_t n)
{
    float first = value[0], second = -INFINITY;
    for (int64_t i = 1; i < n; i++) {
        second = value[i] > first ? first : value[i] > second ? value[i] : second;
        first = value[i] > first ? value[i] : first;
    }
    return n == 1 ? first : first + second;
}

/* ids of the groups that stay, ascending; scores: room for one float a group */
static void choose_groups(int32_t *groups, float *scores, const float *value,
                          const kl_route_args *a)
{
    const int64_t members = a->E / a->groups;
    int64_t n = 0;
    for (int64_t g = 0; g < a->groups; g++)
        scores[g] = group_score(value + g * members, members);
    for (int64_t g = 0; g < a->groups; g++)
        n = keep_best(groups, n, a->top_groups, scores, (int32_t)g);
    sort_ascending(groups, a->top_groups);
}

static void choose(int32_t *ids, const int32_t *groups, const float *value, const kl_route_args *a)
{
    const int64_t members = a->E / a->groups;
    int64_t n = 0;
    for (int64_t i = 0; i < a->top_groups; i++)
        for (int64_t e = groups[i] * members; e < (groups[i] + 1) * members; e++)
            n = keep_best(ids, n, a->k, value, (int32_t)e);
    sort_ascending(ids, a->k);
}

static void weigh(float *weights, const int32_t *ids, const float *s, const kl_route_args *a)
{
    float sum = 0.0f;
    for (int64_t i = 0; i < a->k; i++) {
        weights[i] = s[ids[i]];
        sum += weights[i];
    }
    for (int64_t i = 0; i < a->k; i++)
        weights[i] = (a->renormalise ? weights[i] / (sum + 1e-20f) : weights[i]) * a->scale;
}

static void tokens(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    const kl_route_args *args = a->args;
    const int64_t E = args->E, k = args->k;
    float *s = a->s + thread * E, *value = a->chosen_by + thread * (E + args->groups);
    int32_t *groups = a->groups + thread * args->groups;
    for (int64_t t = begin; t < end; t++) {
        if (args->function == KL_ROUTER_SIGMOID)
            a->k->sigmoid(s, a->scores + t * E, E);
        else if (args->function == KL_ROUTER_NONE)
            memcpy(s, a->scores + t * E, (size_t)E * sizeof *s);
        else
            a->k->softmax(s, a->scores + t * E, E);
        for (int64_t e = 0; e < E; e++)
            value[e] = a->bias != NULL ? s[e] + a->bias[e] : s[e];
        if (!args->given) {
            choose_groups(groups, value + E, value, args);
            choose(a->ids + t * k, groups, value, args);
        }
        weigh(a->weights + t * k, a->ids + t * k, s, args);
    }
}

/* softmax is a number where the largest score is one */
static kl_status check_softmax_row(kl_ctx *ctx, const float *x, int64_t t, int64_t E)
{
    int64_t top = 0;
    for (int64_t e = 1; e < E; e++)
        top = x[e] > x[top] ? e : top;
    if (!isinf(x[top]))
        return KL_OK;
    return kl_fail(ctx, KL_ERR_ARG,
                   "route: scores[%lld, %lld] is %g, the largest of its token; with softmax that "
                   "must be finite",
                   (long long)t, (long long)top, (double)x[top]);
}

static kl_status check_values(kl_ctx *ctx, const float *scores, const float *bias,
                              const kl_route_args *a)
{
    for (int64_t t = 0; t < a->T; t++) {
        const float *x = scores + t * a->E;
        for (int64_t e = 0; e < a->E; e++)
            if (isnan(x[e]))
                return kl_fail(ctx, KL_ERR_ARG,
                               "route: scores[%lld, %lld] (token, expert) is NaN; scores must be "
                               "numbers",
                               (long long)t, (long long)e);
        if (a->function == KL_ROUTER_SOFTMAX)
            KL_TRY(check_softmax_row(ctx, x, t, a->E));
    }
    for (int64_t e = 0; bias != NULL && e < a->E; e++)
        if (!(bias[e] < INFINITY))
            return kl_fail(ctx, KL_ERR_ARG,
                           "route: bias[%lld] is %g; it must be a number below infinity",
                           (long long)e, (double)bias[e]);
    return KL_OK;
}

static kl_status check_ids(kl_ctx *ctx, const int32_t *ids, const kl_route_args *a)
{
    for (int64_t i = 0; a->given && i < a->T * a->k; i++)
        if (ids[i] < 0 || ids[i] >= a->E || (i % a->k > 0 && ids[i] <= ids[i - 1]))
            return kl_fail(
                ctx, KL_ERR_ARG,
                "route: ids[%lld, %lld] is %d; ids of a token must rise within 0 to %lld",
                (long long)(i / a->k), (long long)(i % a->k), (int)ids[i], (long long)a->E - 1);
    return KL_OK;
}

kl_status cpu_route(kl_ctx *ctx, int32_t *ids, float *weights, const float *scores,
                    const float *bias, const kl_route_args *args)
{
    task a = { ctx->k, ids, weights, scores, bias, args, NULL, NULL, NULL };
    KL_SCRATCH(a.s, ctx, ctx->threads * args->E);
    KL_SCRATCH(a.chosen_by, ctx, ctx->threads * (args->E + args->groups));
    KL_SCRATCH(a.groups, ctx, ctx->threads * args->groups);
    if (ctx->arena.measuring)
        return KL_OK;
    KL_TRY(check_values(ctx, scores, bias, args));
    KL_TRY(check_ids(ctx, ids, args));
    return kl_for(ctx, args->T, kl_row_grain(args->E * 4), tokens, &a);
}

static kl_status check_args(kl_ctx *ctx, const kl_route_args *a)
{
    if (a->E > INT32_MAX)
        return kl_fail(ctx, KL_ERR_SHAPE, "route: scores have %lld experts; ids are int32",
                       (long long)a->E);
    if (a->groups < 1 || a->E % a->groups != 0)
        return kl_fail(ctx, KL_ERR_ARG, "route: groups is %lld; it must divide the %lld experts",
                       (long long)a->groups, (long long)a->E);
    if (a->top_groups < 1 || a->top_groups > a->groups)
        return kl_fail(ctx, KL_ERR_ARG,
                       "route: top_groups is %lld; it must be 1 <= top_groups <= groups = %lld",
                       (long long)a->top_groups, (long long)a->groups);
    if (a->k < 1 || a->k > a->E / a->groups * a->top_groups)
        return kl_fail(ctx, KL_ERR_ARG,
                       "route: k is %lld; it must be 1 <= k <= %lld, the experts of top_groups "
                       "groups",
                       (long long)a->k, (long long)(a->E / a->groups * a->top_groups));
    if (a->function != KL_ROUTER_SIGMOID && a->function != KL_ROUTER_SOFTMAX
        && a->function != KL_ROUTER_NONE)
        return kl_fail(ctx, KL_ERR_ARG,
                       "route: function is %d; it must be KL_ROUTER_SIGMOID, _SOFTMAX or _NONE",
                       (int)a->function);
    if (!isfinite(a->scale))
        return kl_fail(ctx, KL_ERR_ARG, "route: scale is %g; it must be finite", (double)a->scale);
    return KL_OK;
}

kl_status kl_route(kl_ctx *ctx, int32_t *ids, float *weights, const float *scores,
                   const float *bias, const kl_route_args *args)
{
    KL_TRY(kl_check_rows(ctx, "route", "scores", args->T, args->E));
    KL_TRY(check_args(ctx, args));
    return KL_RUN(route, 4 * args->T * args->E, 4 * args->T * (args->E + 2 * args->k), ctx, ids,
                  weights, scores, bias, args);
}
