/* sample (ops/sample.c): one token id from each row of logits. A token's key has its logit's rank, falling, above its id:
 * the op's order is that of rising keys, and what top_k, min_p and top_p leave is all keys up to a last one. Sums are
 * double; they are added in another order than the CPU's, which decides no id (docs/math.md#sample).
 *   v1  one thread a row: walks from key to next key, each found by a pass over the row. The definition.
 *   v2  one block a row: a key is found four bits at a time. A pass adds the weights of the keys that agree so far, by
 *       their next four bits; the sums say which of the sixteen it is (launched). */
#include "scalar.h"
#include "reduce.h"
#include "ragged.h"

#include <float.h>
#include <math.h>

namespace
{

const int BLOCK = 512, TEAMS = BLOCK / KL_TEAM, DIGITS = 16;

/* of a row, on the device */
struct order {
    double r;     /* in [0, 1) */
    double top_p; /* 1 or more: all */
    int64_t top_k;
    float scale, least; /* log2(e) / temperature; the smallest t = (x - top) scale that is left */
    int greedy;
};
struct drawn {
    int32_t id;
    int32_t bad; /* first id with a logit that is ruled out, or -1 */
    float value; /* of it */
};

/* ---- a row ---- */

struct row {
    const float *x;
    int64_t D;
    float top, scale, least;
    uint64_t last; /* the largest key that is left */
};

/* rising with x, -0 being 0 */
__device__ __forceinline__ uint32_t rank_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t magnitude = bits & 0x7fffffffu;
    return bits >> 31 != 0 ? 0x80000000u - magnitude : 0x80000000u + magnitude;
}
__device__ __forceinline__ uint64_t key_of(float x, int64_t id)
{
    return static_cast<uint64_t>(~rank_of(x)) << 32 | static_cast<uint64_t>(id);
}

__device__ __forceinline__ float place_of(const row &a, float x) { return (x - a.top) * a.scale; }

/* by min_p, and by key: a weight above 0 */
__device__ __forceinline__ bool is_left(const row &a, float x, uint64_t key)
{
    return x > -INFINITY && key <= a.last && place_of(a, x) >= a.least;
}

/* 2^t, operation by operation as csrc/cpu/sample.inc */
__device__ __forceinline__ float weight_of(const row &a, float x)
{
    const float magic = 0x1.8p23f, place = place_of(a, x), t = place > -127.0f ? place : -127.0f;
    const float n_magic = t + magic, f = t - (n_magic - magic);
    float p = 0x1.417a9cp-13f;
    p = fmaf(p, f, 0x1.5f0948p-10f);
    p = fmaf(p, f, 0x1.3b2dd2p-7f);
    p = fmaf(p, f, 0x1.c6af7ap-5f);
    p = fmaf(p, f, 0x1.ebfbdcp-3f);
    p = fmaf(p, f, 0x1.62e43p-1f);
    p = fmaf(p, f, 1.0f);
    return p * kl_exp2_of_magic(n_magic);
}

/* What a search adds up until it reaches its aim. */
struct aim {
    double sum;
    bool exceed; /* or only meet */
    bool count;  /* tokens instead of weights */
    __device__ __forceinline__ bool reached(double s) const { return exceed ? s > sum : s >= sum; }
    __device__ __forceinline__ double of(const row &a, float x) const
    {
        return count ? 1.0 : static_cast<double>(weight_of(a, x));
    }
};
/* a token, and the sum up to and with it */
struct found {
    uint64_t key;
    double sum;
};

/* The token at which the running sum reaches the aim; the last one where roundings hide it. SEARCH(row, aim) */
template <class SEARCH>
__device__ __forceinline__ int32_t draw(row a, const order &o, SEARCH search)
{
    if (o.top_k > 0 && o.top_k < a.D)
        a.last = search(a, aim{ static_cast<double>(o.top_k), false, true }).key;
    double total = search(a, aim{ static_cast<double>(INFINITY), false, false }).sum;
    if (o.top_p < 1.0) {
        const found end = search(a, aim{ o.top_p * total, false, false });
        a.last = end.key;
        total = end.sum;
    }
    return static_cast<int32_t>(search(a, aim{ o.r * total, true, false }).key & 0xffffffffu);
}

/* ---- v1 ---- */

__device__ found walk(const row &a, const aim &to)
{
    found at = { 0, 0.0 };
    for (bool begun = false;; begun = true) {
        uint64_t next = ~static_cast<uint64_t>(0);
        for (int64_t i = 0; i < a.D; i++) {
            const uint64_t key = key_of(a.x[i], i);
            if (is_left(a, a.x[i], key) && (!begun || key > at.key) && key < next)
                next = key;
        }
        if (next == ~static_cast<uint64_t>(0))
            return at;
        at = found{ next, at.sum + to.of(a, a.x[next & 0xffffffffu]) };
        if (to.reached(at.sum))
            return at;
    }
}

__global__ void __launch_bounds__(512)
    sample_v1(drawn *to, const float *logits, const order *orders, int64_t T, int64_t D)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t t = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; t < T; t += step) {
        const float *x = logits + t * D;
        int64_t top = 0, bad = -1;
        for (int64_t i = 0; i < D; i++) {
            top = x[i] > x[top] ? i : top;
            bad = bad < 0 && !(x[i] < INFINITY) ? i : bad;
        }
        if (bad < 0 && x[top] == -INFINITY)
            bad = 0;
        const order o = orders[t];
        const row a = { x, D, x[top], o.scale, o.least, ~static_cast<uint64_t>(0) };
        const int32_t id = bad < 0 && !o.greedy ? draw(a, o, walk) : static_cast<int32_t>(top);
        to[t] = drawn{ id, static_cast<int32_t>(bad), bad < 0 ? 0.0f : x[bad] };
    }
}

/* ---- v2 ---- */

/* sums[digit] over the block, in sums[0]: each thread's own in order, the team's tree, teams in order */
__device__ __forceinline__ void add_up(double (&own)[DIGITS], kl_shared<double> sums)
{
    for (int d = 0; d < DIGITS; d++) {
        const double sum = kl_team_total(own[d]);
        if (kl_lane() == d)
            sums[kl_team() * DIGITS + d] = sum;
    }
    __syncthreads();
    double sum = 0.0;
    if (threadIdx.x < DIGITS)
        for (int i = 0; i < TEAMS; i++)
            sum += sums[i * DIGITS + static_cast<int>(threadIdx.x)];
    __syncthreads();
    if (threadIdx.x < DIGITS)
        sums[static_cast<int>(threadIdx.x)] = sum;
    __syncthreads();
}

/* the digits of an id are as many as D needs */
__device__ __forceinline__ int digits_of(int64_t D)
{
    int bits = 4;
    while (bits < 32 && (D - 1) >> bits != 0)
        bits += 4;
    return bits;
}

__device__ found descend(const row &a, const aim &to, kl_shared<double> sums)
{
    found at = { 0, 0.0 };
    double whole = 0.0; /* of the keys that agree: the found one's, at the end */
    for (int shift = 60; shift >= 0; shift -= 4) {
        if (shift == 28)
            shift = digits_of(a.D) - 4;
        double own[DIGITS] = {};
        for (int64_t i = threadIdx.x; i < a.D; i += BLOCK) {
            const float x = a.x[i];
            const uint64_t key = key_of(x, i);
            /* keys agree above this digit; shifted twice, for a shift of 64 is none */
            if ((key >> shift >> 4) != (at.key >> shift >> 4) || !is_left(a, x, key))
                continue;
            const double w = to.of(a, x);
            const int digit = static_cast<int>(key >> shift & (DIGITS - 1));
            for (int d = 0; d < DIGITS; d++)
                own[d] += d == digit ? w : 0.0;
        }
        add_up(own, sums);
        int chosen = 0;
        double before = at.sum, sum = at.sum;
        whole = 0.0;
        for (int d = 0; d < DIGITS; d++) {
            const double here = sums[d];
            if (here == 0.0)
                continue;
            chosen = d;
            before = sum;
            whole = here;
            sum += here;
            if (to.reached(sum))
                break;
        }
        __syncthreads();
        at.key |= static_cast<uint64_t>(chosen) << shift;
        at.sum = before;
    }
    return found{ at.key, at.sum + whole };
}

/* the largest logit, and its lowest id; the first that is ruled out */
__device__ void look(const float *x, int64_t D, kl_best *top, int64_t *bad, kl_shared<float> values,
                     kl_shared<int32_t> places, kl_shared<int32_t> firsts)
{
    kl_best best = { -INFINITY, INT32_MAX };
    int32_t first = INT32_MAX;
    for (int64_t i = threadIdx.x; i < D; i += BLOCK) {
        const kl_best here = { x[i], static_cast<int32_t>(i) };
        if (here.is_before(best))
            best = here;
        if (!(x[i] < INFINITY) && first == INT32_MAX)
            first = static_cast<int32_t>(i);
    }
    best = kl_team_best(best);
    first = kl_team_least(first);
    if (kl_lane() == 0) {
        values[kl_team()] = best.value;
        places[kl_team()] = best.at;
        firsts[kl_team()] = first;
    }
    __syncthreads();
    for (int i = 0; i < TEAMS; i++) {
        const float value = values[i];
        const int32_t place = places[i], other = firsts[i];
        if (kl_best{ value, place }.is_before(best))
            best = kl_best{ value, place };
        first = other < first ? other : first;
    }
    __syncthreads();
    *top = best;
    *bad = first < INT32_MAX ? first : best.value == -INFINITY ? 0 : -1;
}

__global__ void __launch_bounds__(512, 1)
    sample_v2(drawn *to, const float *logits, const order *orders, int64_t T, int64_t D)
{
    KL_SHARED(double, sums, [TEAMS * DIGITS]);
    KL_SHARED(float, values, [TEAMS]);
    KL_SHARED(int32_t, places, [TEAMS]);
    KL_SHARED(int32_t, firsts, [TEAMS]);
    for (int64_t t = blockIdx.x; t < T; t += gridDim.x) {
        const float *x = logits + t * D;
        const order o = orders[t];
        kl_best top;
        int64_t bad;
        look(x, D, &top, &bad, values, places, firsts);
        const row a = { x, D, top.value, o.scale, o.least, ~static_cast<uint64_t>(0) };
        int32_t id = top.at;
        if (bad < 0 && !o.greedy)
            id =
                draw(a, o, [&](const row &of, const aim &aims) { return descend(of, aims, sums); });
        if (threadIdx.x == 0)
            to[t] = drawn{ id, static_cast<int32_t>(bad), bad < 0 ? 0.0f : x[bad] };
    }
}

/* ---- the host's part ---- */

/* 53 bits of Philox4x32-10: key = seed, counter = (position, sequence), low words first */
double uniform(const kl_sample_args &a)
{
    uint32_t c[4] = { static_cast<uint32_t>(a.position), static_cast<uint32_t>(a.position >> 32),
                      static_cast<uint32_t>(a.sequence), static_cast<uint32_t>(a.sequence >> 32) };
    uint32_t k0 = static_cast<uint32_t>(a.seed), k1 = static_cast<uint32_t>(a.seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t p = 0xD2511F53ULL * c[0], q = 0xCD9E8D57ULL * c[2];
        const uint32_t c1 = c[1], c3 = c[3];
        c[0] = static_cast<uint32_t>(q >> 32) ^ c1 ^ k0;
        c[1] = static_cast<uint32_t>(q);
        c[2] = static_cast<uint32_t>(p >> 32) ^ c3 ^ k1;
        c[3] = static_cast<uint32_t>(p);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return static_cast<double>(static_cast<uint64_t>(c[0]) << 21 | c[1] >> 11) * 0x1p-53;
}

order order_of(const kl_sample_args &a)
{
    const double LOG2_E = 0x1.71547652b82fep+0, temperature = static_cast<double>(a.temperature);
    order o = {};
    o.greedy = a.temperature == 0.0f;
    o.r = uniform(a);
    o.top_p = static_cast<double>(a.top_p);
    o.top_k = a.top_k;
    o.scale = o.greedy
                  ? 1.0f
                  : static_cast<float>(fmin(LOG2_E / temperature, static_cast<double>(FLT_MAX)));
    o.least = fmaxf(-126.5f, static_cast<float>(log2(static_cast<double>(a.min_p))));
    return o;
}

} // namespace

kl_status hip_sample(kl_ctx *ctx, int32_t *ids, const float *logits, const kl_sample_args *args,
                     int64_t T, int64_t D)
{
    const int64_t STEP = 64; /* rows that the stack has room for */
    const order *orders;
    drawn *answers, got[STEP];
    KL_TRY(kl_put_made(ctx, &orders, T, [=](int64_t t) { return order_of(args[t]); }));
    KL_SCRATCH_OF(answers, ctx, T);
    if (kl_core_of->measuring(ctx) || T == 0)
        return KL_OK;
    if (kl_version() == 1)
        KL_LAUNCH(sample_v1, kl_grid(kl_ceil_div(T, BLOCK)), BLOCK, 0, kl_stream(ctx), answers,
                  logits, orders, T, D);
    else
        KL_LAUNCH(sample_v2, kl_grid(T), BLOCK, 0, kl_stream(ctx), answers, logits, orders, T, D);
    KL_TRY(kl_launched(ctx, "sample"));
    /* all are looked at before an id is written; few stay in `got` for that */
    for (int pass = 0; pass < 2; pass++)
        for (int64_t t0 = 0; t0 < T; t0 += STEP) {
            const int64_t n = T - t0 < STEP ? T - t0 : STEP;
            if (pass == 0 || T > STEP)
                KL_TRY(kl_get(ctx, got, answers + t0, static_cast<size_t>(n) * sizeof *got));
            for (int64_t t = 0; t < n && pass == 0; t++)
                if (got[t].bad >= 0)
                    return kl_core_of->fail(
                        ctx, KL_ERR_ARG,
                        "sample: logits[%lld, %lld] is %g; logits must be finite, or -inf for some",
                        static_cast<long long>(t0 + t), static_cast<long long>(got[t].bad),
                        static_cast<double>(got[t].value));
            for (int64_t t = 0; t < n && pass == 1; t++)
                ids[t0 + t] = got[t].id;
        }
    return KL_OK;
}
