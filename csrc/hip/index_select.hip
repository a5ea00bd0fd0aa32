/* index_select (ops/index_select.c): scores by index.h, in scratch, of as many queries at a time as AT_ONCE of them are;
 * then the choice, the CPU's ids. The threshold is found by counting bytes of the ordered bits, from the highest on.
 *   v1  one thread a query, as the CPU.
 *   v2  one block a query: counts in shared memory; places by the number of the chosen before them (launched). */
#include "index.h"

namespace
{

const int64_t AT_ONCE = 1 << 24;
const int BLOCK = 256, BYTES = 256, TEAMS = BLOCK / KL_TEAM;

struct selecting {
    scoring s;
    int32_t *ids;
    const float *scores;
    int64_t topk, first, rows;
};

/* Rises with the score: NaN is above all, -0 is 0. */
__device__ __forceinline__ uint32_t rank_of(float score)
{
    const uint32_t bits = kl_bits_of(score + 0.0f);
    if (score != score)
        return UINT32_MAX;
    return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

/* A query's row of ids, and what it chooses of. */
struct query {
    const float *scores;
    int32_t *ids;
    int64_t seen, complete, k, width;
};
__device__ __forceinline__ query query_of(const selecting &a, int64_t row)
{
    const int64_t t = a.first + row, n = kl_sequence_of(a.s.offsets, a.s.N, t);
    const int64_t seen = seen_by(a.s, n, t), width = a.topk + a.s.pool - 1;
    return query{ a.scores + row * a.s.most, a.ids + t * width, seen,
                  seen / a.s.pool,           a.topk / a.s.pool, width };
}

/* The least rank that is chosen, and how many that have it. */
struct threshold {
    uint32_t rank;
    int64_t equals;
};

/* ---- v1 ---- */

__device__ threshold threshold_in_order(const query &q)
{
    uint64_t high = 0;
    int64_t k = q.k;
    for (int shift = 24; shift >= 0; shift -= 8) {
        int32_t count[BYTES] = {};
        int byte = BYTES - 1;
        for (int64_t p = 0; p < q.complete; p++) {
            const uint64_t rank = rank_of(q.scores[p]);
            if (rank >> (shift + 8) == high)
                count[rank >> shift & 255]++;
        }
        while (count[byte] < k)
            k -= count[byte--];
        high = high << 8 | static_cast<uint64_t>(byte);
    }
    return threshold{ static_cast<uint32_t>(high), k };
}

__global__ void __launch_bounds__(256) index_select_v1(selecting a)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK, pool = a.s.pool;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; row < a.rows;
         row += step) {
        const query q = query_of(a, row);
        const bool all = q.complete <= q.k;
        threshold least = all ? threshold{ 0, 0 } : threshold_in_order(q);
        int64_t at = 0;
        for (int64_t p = 0; p < q.complete; p++) {
            const uint32_t rank = all ? 1 : rank_of(q.scores[p]);
            if (rank < least.rank || (rank == least.rank && least.equals-- <= 0))
                continue;
            for (int64_t j = 0; j < pool; j++)
                q.ids[at++] = static_cast<int32_t>(p * pool + j);
        }
        for (int64_t s = q.complete * pool; s < q.seen; s++)
            q.ids[at++] = static_cast<int32_t>(s);
        while (at < q.width)
            q.ids[at++] = -1;
    }
}

/* ---- v2 ---- */

/* every thread gets it */
__device__ __forceinline__ threshold threshold_of_block(const query &q, kl_shared<int32_t> count)
{
    uint64_t high = 0;
    int64_t k = q.k;
    for (int shift = 24; shift >= 0; shift -= 8) {
        count[threadIdx.x] = 0;
        __syncthreads();
        for (int64_t p = threadIdx.x; p < q.complete; p += BLOCK) {
            const uint64_t rank = rank_of(q.scores[p]);
            if (rank >> (shift + 8) == high)
                atomicAdd(count + static_cast<int>(rank >> shift & 255), 1);
        }
        __syncthreads();
        int byte = BYTES - 1;
        for (int32_t here = count[byte]; here < k; here = count[byte]) {
            k -= here;
            byte--;
        }
        __syncthreads();
        high = high << 8 | static_cast<uint64_t>(byte);
    }
    return threshold{ static_cast<uint32_t>(high), k };
}

/* The sum of v over the threads before this one, and over all in *total. */
__device__ __forceinline__ int32_t before_in_block(int32_t v, int32_t *total,
                                                   kl_shared<int32_t> parts)
{
    const int32_t in_team = kl_team_before(v), of_team = kl_team_total(v);
    int32_t before = in_team;
    if (kl_lane() == 0)
        parts[kl_team()] = of_team;
    __syncthreads();
    *total = 0;
    for (int team = 0; team < TEAMS; team++) {
        const int32_t part = parts[team];
        before += team < kl_team() ? part : 0;
        *total += part;
    }
    __syncthreads();
    return before;
}

/* Writes the positions of the pools that are chosen; their number. */
__device__ __forceinline__ int64_t put_pools(const query &q, const threshold &least, bool all,
                                             int64_t pool, kl_shared<int32_t> parts)
{
    int64_t above = 0, equal = 0; /* in the chunks before */
    for (int64_t first = 0; first < q.complete; first += BLOCK) {
        const int64_t p = first + threadIdx.x;
        const bool mine = p < q.complete;
        const uint32_t rank = mine && !all ? rank_of(q.scores[p]) : 0;
        const bool is_above = mine && (all || rank > least.rank);
        const bool is_equal = mine && !all && rank == least.rank;
        int32_t total;
        /* two counts in one sum: a block has fewer than 2^16 of each */
        const int32_t before =
            before_in_block((is_above ? 1 : 0) + (is_equal ? 1 << 16 : 0), &total, parts);
        const int64_t equal_before = equal + (before >> 16);
        const int64_t taken = equal_before < least.equals ? equal_before : least.equals;
        const int64_t at = above + (before & 0xffff) + taken;
        if (is_above || (is_equal && equal_before < least.equals))
            for (int64_t j = 0; j < pool; j++)
                q.ids[at * pool + j] = static_cast<int32_t>(p * pool + j);
        above += total & 0xffff;
        equal += total >> 16;
    }
    return above + (equal < least.equals ? equal : least.equals);
}

__global__ void __launch_bounds__(256) index_select_v2(selecting a, int64_t first_row)
{
    KL_SHARED(int32_t, count, [BYTES]);
    KL_SHARED(int32_t, parts, [TEAMS]);
    const int64_t pool = a.s.pool;
    const query q = query_of(a, first_row + blockIdx.x);
    const bool all = q.complete <= q.k; /* the same in every thread */
    threshold least = { 0, 0 };
    if (!all)
        least = threshold_of_block(q, count);
    const int64_t chosen = put_pools(q, least, all, pool, parts) * pool;
    const int64_t tail = q.seen - q.complete * pool;
    for (int64_t i = chosen + threadIdx.x; i < q.width; i += BLOCK)
        q.ids[i] = i - chosen < tail ? static_cast<int32_t>(q.complete * pool + i - chosen) : -1;
}

/* The most pools that a query chooses of; 0 where none does. */
int64_t most_to_score(const kl_index_args *a)
{
    int64_t most = 0;
    for (int64_t n = 0; n < a->N; n++) {
        const int64_t complete = a->positions[n] / a->pool;
        if (a->offsets[n + 1] > a->offsets[n] && complete > a->topk / a->pool)
            most = complete > most ? complete : most;
    }
    return most;
}

} // namespace

kl_status hip_index_select(kl_ctx *ctx, int32_t *ids, const float *q, kl_cache keys,
                           const float *weights, const kl_index_args *args)
{
    selecting a = { {}, ids, nullptr, args->topk, 0, 0 };
    float *scores = nullptr;
    KL_TRY(put_scoring(ctx, &a.s, q, keys, weights, args));
    a.s.most = most_to_score(args);
    const int64_t fit = AT_ONCE / (a.s.most > 0 ? a.s.most : 1);
    const int64_t rows = fit < 1 ? 1 : fit < args->T ? fit : args->T;
    /* no less at any shallower depth, as a plan measures the deepest alone */
    const int64_t all = args->T * a.s.most < AT_ONCE ? args->T * a.s.most : AT_ONCE;
    KL_SCRATCH_OF(scores, ctx, a.s.most > all ? a.s.most : all);
    if (kl_core_of->measuring(ctx))
        return KL_OK;
    a.scores = scores;
    for (; a.first < args->T; a.first += a.rows) {
        a.rows = rows < args->T - a.first ? rows : args->T - a.first;
        if (a.s.most > 0)
            score_rows(ctx, a.s, scores, a.first, a.rows);
        if (kl_version() == 1)
            KL_LAUNCH(index_select_v1, kl_grid(kl_ceil_div(a.rows, BLOCK)), BLOCK, 0,
                      kl_stream(ctx), a);
        else
            for (int64_t row = 0; row < a.rows; row += kl_grid(a.rows))
                KL_LAUNCH(index_select_v2, kl_grid(a.rows - row), BLOCK, 0, kl_stream(ctx), a, row);
    }
    return kl_launched(ctx, "index_select");
}
