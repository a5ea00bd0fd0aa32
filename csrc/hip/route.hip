/* route (ops/route.c): which k experts a token goes to, and with what weights. Both versions choose and weigh in the
 * CPU's order: the same ids and bytes. What no score may be is noted (runtime.h).
 *   v1  one thread a token, lists kept sorted by insertion, as the CPU's.
 *   v2  one team a token, scores in shared memory: k rounds for the next best, then one walk that writes them in order
 *       of id (launched up to MOST experts). */
#include "scalar.h"
#include "reduce.h"
#include "runtime.h"

namespace
{

const int BLOCK = 128, TEAMS = BLOCK / KL_TEAM, LANES = 16;
const int64_t MOST = 1024; /* experts: with as many groups 32 KiB of shared memory */

struct routing {
    kl_route_args a;
    int32_t *ids;
    float *weights;
    const float *scores, *bias;
    unsigned long long *faults;
    float *s, *value; /* v1: [T, E], [T, E + groups] */
    int32_t *chosen;  /* v1: [T, groups] */
};

__device__ __forceinline__ void check_score(const routing &p, int64_t place, float x)
{
    if (x != x || (x == INFINITY && p.a.function == KL_ROUTER_SOFTMAX))
        kl_note(p.faults + KL_FAULT_SCORES, place, x);
}
__device__ __forceinline__ void check_bias(const routing &p, int64_t t, int64_t e)
{
    if (t == 0 && p.bias != nullptr && !(p.bias[e] < INFINITY))
        kl_note(p.faults + KL_FAULT_BIAS, e, p.bias[e]);
}
/* expert of slot i of a token that comes with ids; 0 where it is none */
__device__ __forceinline__ int32_t given_id(const routing &p, int64_t t, int64_t i)
{
    const int64_t place = t * p.a.k + i;
    const int32_t e = p.ids[place];
    const bool is_expert = e >= 0 && e < p.a.E;
    if (!is_expert || (i > 0 && e <= p.ids[place - 1]))
        kl_note(p.faults + KL_FAULT_ROUTE_IDS, place, e);
    return is_expert ? e : 0;
}

__device__ __forceinline__ float scaled(const routing &p, float s, float sum)
{
    return (p.a.renormalise ? s / (sum + 1e-20f) : s) * p.a.scale;
}

/* a group's score: the sum of its two largest values, or its only one */
template <class VALUE> __device__ __forceinline__ float score_of_group(int64_t n, VALUE value)
{
    float first = value(0), second = -INFINITY;
    for (int64_t i = 1; i < n; i++) {
        const float v = value(i);
        second = v > first ? first : v > second ? v : second;
        first = v > first ? v : first;
    }
    return n == 1 ? first : first + second;
}

/* ---- v1 ---- */

/* Puts e into list, which holds the n best so far, best first; the list keeps at most k. */
__device__ int64_t keep_best(int32_t *list, int64_t n, int64_t k, const float *value, int32_t e)
{
    if (n == k && !(value[e] > value[list[k - 1]]))
        return n;
    int64_t i = n < k ? n : k - 1;
    for (; i > 0 && value[e] > value[list[i - 1]]; i--)
        list[i] = list[i - 1];
    list[i] = e;
    return n < k ? n + 1 : n;
}

__device__ void sort_ascending(int32_t *ids, int64_t n)
{
    for (int64_t i = 1; i < n; i++) {
        const int32_t e = ids[i];
        int64_t j = i;
        for (; j > 0 && ids[j - 1] > e; j--)
            ids[j] = ids[j - 1];
        ids[j] = e;
    }
}

__device__ void softmax_in_order(const routing &p, float *s, const float *x, int64_t t)
{
    float top = -INFINITY, lane[LANES] = {};
    for (int64_t e = 0; e < p.a.E; e++)
        top = kl_larger(top, x[e]);
    if (top == -INFINITY)
        kl_note(p.faults + KL_FAULT_SCORES, t * p.a.E, top);
    for (int64_t e = 0; e < p.a.E; e++) {
        s[e] = kl_exp(x[e] - top);
        lane[e % LANES] += s[e];
    }
    for (int half = LANES / 2; half >= 1; half /= 2)
        for (int l = 0; l < half; l++)
            lane[l] += lane[l + half];
    for (int64_t e = 0; e < p.a.E; e++)
        s[e] = s[e] / lane[0];
}

__device__ void choose_in_order(const routing &p, int32_t *ids, int32_t *groups, float *value)
{
    const int64_t members = p.a.E / p.a.groups;
    float *scores = value + p.a.E;
    int64_t n = 0;
    for (int64_t g = 0; g < p.a.groups; g++)
        scores[g] = score_of_group(members, [&](int64_t i) { return value[g * members + i]; });
    for (int64_t g = 0; g < p.a.groups; g++)
        n = keep_best(groups, n, p.a.top_groups, scores, static_cast<int32_t>(g));
    sort_ascending(groups, p.a.top_groups);
    n = 0;
    for (int64_t i = 0; i < p.a.top_groups; i++)
        for (int64_t e = groups[i] * members; e < (groups[i] + 1) * members; e++)
            n = keep_best(ids, n, p.a.k, value, static_cast<int32_t>(e));
    sort_ascending(ids, p.a.k);
}

__global__ void __launch_bounds__(128, 1) route_v1(routing p, int64_t first)
{
    const int64_t E = p.a.E, k = p.a.k;
    const int64_t t = first + static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x;
    if (t >= p.a.T)
        return;
    const float *x = p.scores + t * E;
    float *s = p.s + t * E, *value = p.value + t * (E + p.a.groups), *weights = p.weights + t * k;
    int32_t *ids = p.ids + t * k;
    for (int64_t e = 0; e < E; e++) {
        check_score(p, t * E + e, x[e]);
        check_bias(p, t, e);
        s[e] = p.a.function == KL_ROUTER_SIGMOID ? kl_sigmoid_of(x[e]) : x[e];
    }
    if (p.a.function == KL_ROUTER_SOFTMAX)
        softmax_in_order(p, s, x, t);
    for (int64_t e = 0; e < E; e++)
        value[e] = p.bias != nullptr ? s[e] + p.bias[e] : s[e];
    if (!p.a.given)
        choose_in_order(p, ids, p.chosen + t * p.a.groups, value);
    float sum = 0.0f;
    for (int64_t i = 0; i < k; i++) {
        weights[i] = s[p.a.given ? given_id(p, t, i) : ids[i]];
        sum += weights[i];
    }
    for (int64_t i = 0; i < k; i++)
        weights[i] = scaled(p, weights[i], sum);
}

/* ---- v2 ---- */

/* exponentials of a row and their sum, in the CPU's order: sixteen lanes, twice in a team */
__device__ __forceinline__ void team_softmax(const routing &p, kl_shared<float> s, int64_t row,
                                             bool mine)
{
    float top = -INFINITY, sum = 0.0f;
    for (int64_t e = kl_lane(); e < p.a.E; e += KL_TEAM)
        top = kl_larger(top, p.scores[row + e]);
    top = kl_team_max(top);
    if (top == -INFINITY && mine && kl_lane() == 0)
        kl_note(p.faults + KL_FAULT_SCORES, row, top);
    for (int64_t e = kl_lane(); e < p.a.E; e += KL_TEAM)
        s[e] = kl_exp(p.scores[row + e] - top);
    kl_team_barrier();
    for (int64_t e = kl_lane() % LANES; e < p.a.E; e += LANES)
        sum += s[e];
    for (int m = LANES / 2; m >= 1; m /= 2)
        sum += kl_team_swap(sum, m);
    kl_team_barrier();
    for (int64_t e = kl_lane(); e < p.a.E; e += KL_TEAM)
        s[e] = s[e] / sum;
}

/* The n-th best of `count` places, of those that stay. */
template <class VALUE, class STAYS>
__device__ __forceinline__ kl_best nth_best(int64_t n, int64_t count, VALUE value, STAYS stays)
{
    kl_best last = { INFINITY, -1 };
    for (int64_t i = 0; i < n; i++) {
        kl_best best = { -INFINITY, INT32_MAX };
        for (int64_t e = kl_lane(); e < count; e += KL_TEAM) {
            const kl_best here = { value(e), static_cast<int32_t>(e) };
            if (last.is_before(here) && here.is_before(best) && stays(e))
                best = here;
        }
        last = kl_team_best(best);
    }
    return last;
}

/* NaN, which the sum of infinities is, counts as -infinity */
__device__ __forceinline__ float number(float v) { return v == v ? v : -INFINITY; }
__device__ __forceinline__ bool is_chosen(float value, int64_t at, const kl_best &last)
{
    return !last.is_before(kl_best{ value, static_cast<int32_t>(at) });
}

/* Writes the ids, ascending, and their s as weights. */
__device__ __forceinline__ void team_choose(const routing &p, kl_shared<float> s,
                                            kl_shared<float> group_score, int64_t t, bool mine)
{
    const int64_t E = p.a.E, members = E / p.a.groups;
    const auto value = [&](int64_t e) {
        const float v = s[e];
        return number(p.bias != nullptr ? v + p.bias[e] : v);
    };
    const auto score = [&](int64_t g) {
        const float v = group_score[g];
        return number(v);
    };
    const bool all = p.a.top_groups == p.a.groups;
    for (int64_t g = kl_lane(); g < p.a.groups; g += KL_TEAM)
        group_score[g] =
            all ? 0.0f : score_of_group(members, [&](int64_t i) { return value(g * members + i); });
    kl_team_barrier();
    const kl_best last_group =
        nth_best(all ? 0 : p.a.top_groups, p.a.groups, score, [](int64_t) { return true; });
    const auto stays = [&](int64_t e) {
        return all || is_chosen(score(e / members), e / members, last_group);
    };
    const kl_best last = nth_best(p.a.k, E, value, stays);
    int64_t n = 0;
    for (int64_t e0 = 0; e0 < E; e0 += KL_TEAM) {
        const int64_t e = e0 + kl_lane();
        const int chosen = e < E && stays(e) && is_chosen(value(e), e, last);
        const int64_t at = t * p.a.k + n + kl_team_before(chosen);
        if (chosen && mine) {
            p.ids[at] = static_cast<int32_t>(e);
            p.weights[at] = s[e];
        }
        n += kl_team_total(chosen);
    }
}

__global__ void __launch_bounds__(128) route_v2(routing p, int64_t first_token)
{
    KL_DYNAMIC_SHARED(float, shared);
    const int64_t E = p.a.E, k = p.a.k;
    const int64_t at = first_token + static_cast<int64_t>(blockIdx.x) * TEAMS + kl_team();
    const kl_shared<float> s = shared + kl_team() * (E + p.a.groups), group_score = s + E;
    const bool mine = at < p.a.T; /* else: the last token, and nothing written */
    const int64_t t = mine ? at : p.a.T - 1;
    for (int64_t e = kl_lane(); e < E; e += KL_TEAM) {
        const float x = p.scores[t * E + e];
        check_score(p, t * E + e, x);
        check_bias(p, t, e);
        if (p.a.function != KL_ROUTER_SOFTMAX)
            s[e] = p.a.function == KL_ROUTER_SIGMOID ? kl_sigmoid_of(x) : x;
    }
    if (p.a.function == KL_ROUTER_SOFTMAX)
        team_softmax(p, s, t * E, mine);
    kl_team_barrier();
    if (!p.a.given)
        team_choose(p, s, group_score, t, mine);
    else
        for (int64_t i = kl_lane(); mine && i < k; i += KL_TEAM)
            p.weights[t * k + i] = s[given_id(p, t, i)];
    kl_team_barrier();
    float sum = 0.0f; /* in ascending id, by every thread */
    for (int64_t i = 0; mine && i < k; i++)
        sum += p.weights[t * k + i];
    kl_team_barrier();
    for (int64_t i = kl_lane(); mine && i < k; i += KL_TEAM)
        p.weights[t * k + i] = scaled(p, p.weights[t * k + i], sum);
}

} // namespace

kl_status hip_route(kl_ctx *ctx, int32_t *ids, float *weights, const float *scores,
                    const float *bias, const kl_route_args *args)
{
    const int64_t T = args->T, E = args->E, groups = args->groups;
    const bool alone = kl_version() == 1 || E > MOST;
    routing p = { *args, ids, weights, scores, bias, nullptr, nullptr, nullptr, nullptr };
    if (alone) {
        KL_SCRATCH_OF(p.s, ctx, T * E);
        KL_SCRATCH_OF(p.value, ctx, T * (E + groups));
        KL_SCRATCH_OF(p.chosen, ctx, T * groups);
    }
    if (kl_core_of->measuring(ctx) || T == 0)
        return KL_OK;
    KL_TRY(kl_faults_of(ctx, &p.faults, E, args->k));
    const int64_t rows = alone ? BLOCK : TEAMS; /* tokens of a block */
    for (int64_t t = 0; t < T; t += rows * kl_grid(kl_ceil_div(T - t, rows)))
        if (alone)
            KL_LAUNCH(route_v1, kl_grid(kl_ceil_div(T - t, rows)), BLOCK, 0, kl_stream(ctx), p, t);
        else
            KL_LAUNCH(route_v2, kl_grid(kl_ceil_div(T - t, rows)), BLOCK,
                      static_cast<size_t>(TEAMS * (E + groups)) * sizeof(float), kl_stream(ctx), p,
                      t);
    return kl_launched(ctx, "route");
}
