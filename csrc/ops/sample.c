/* sample: one token id from each row of logits [T, D], by that row's arguments.
 *   p = softmax(logits / temperature), ordered by p descending, then id ascending; of this order
 *   the first top_k (0: all), of these p >= min_p * max p, of these, renormalised, the shortest
 *   prefix with a sum >= top_p (1: all). Drawn is the first whose running sum, renormalised,
 *   exceeds r in [0, 1): 53 bits of Philox4x32-10 (Salmon et al., SC 2011) with key = seed and
 *   counter = (position, sequence), low words first.
 *   Temperature 0: the largest logit, lowest id. All in double.
 * NaN and +infinity are errors; -infinity masks a token, unless it masks all. */
#include "ops.h"

#include "../cpu/kernels.h"

#include <math.h>

typedef struct candidate {
    double p;
    int64_t id;
} candidate;

typedef struct task {
    const kl_kernels *k;
    int32_t *ids;
    const float *logits;
    const kl_sample_args *args;
    int64_t D;
    int64_t *bad;     /* [T]: first id with a logit that is ruled out, or -1 */
    int64_t *largest; /* [T]: lowest id among the largest logits */
    candidate *heap;  /* [rows or threads, D], whichever is fewer */
    bool heap_a_row;
} task;

/* ---- random numbers ---- */

static void philox4x32_10(uint32_t c[4], uint32_t k0, uint32_t k1)
{
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
        const uint32_t c1 = c[1], c3 = c[3];
        c[0] = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c[1] = (uint32_t)b;
        c[2] = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c[3] = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

static double uniform(const kl_sample_args *a)
{
    uint32_t c[4] = { (uint32_t)a->position, (uint32_t)(a->position >> 32), (uint32_t)a->sequence,
                      (uint32_t)(a->sequence >> 32) };
    philox4x32_10(c, (uint32_t)a->seed, (uint32_t)(a->seed >> 32));
    return (double)((uint64_t)c[0] << 21 | c[1] >> 11) * 0x1p-53;
}

/* ---- a heap with the next of the order on top: largest p, then lowest id ---- */

static bool before(candidate a, candidate b) { return a.p > b.p || (a.p == b.p && a.id < b.id); }

static void sift_down(candidate *heap, int64_t n, int64_t i)
{
    const candidate moved = heap[i];
    for (int64_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && before(heap[child + 1], heap[child]))
            child++;
        if (!before(heap[child], moved))
            break;
        heap[i] = heap[child];
    }
    heap[i] = moved;
}

static void make_heap(candidate *heap, int64_t n)
{
    for (int64_t i = n / 2 - 1; i >= 0; i--)
        sift_down(heap, n, i);
}

/* Takes the top of n away; heap[n - 1] is free then. */
static candidate pop(candidate *heap, int64_t n)
{
    const candidate top = heap[0];
    heap[0] = heap[n - 1];
    sift_down(heap, n - 1, 0);
    return top;
}

/* ---- one row ---- */

enum { BLOCK = 1024 };

/* The lowest index among the largest values of a row; refused: some are NaN or +inf. */
static int64_t largest(const kl_kernels *k, const float *x, int64_t D, bool *refused)
{
    float best = -INFINITY;
    int64_t at = 0;
    *refused = false;
    for (int64_t i = 0; i < D; i += BLOCK) {
        int bad;
        const float top = k->largest(x + i, kl_min(BLOCK, D - i), &bad);
        *refused = *refused || bad;
        if (top > best) {
            best = top;
            at = i;
        }
    }
    while (at + 1 < D && x[at] != best)
        at++;
    return at;
}

/* Candidates in order, brought there as far as they are asked for. Each part is a heap with what
 * was taken from it behind it, first to last from the end. The near part holds the p >= max p *
 * NEAR: small as a rule, and mostly all that is asked for. */
typedef struct part {
    candidate *heap;
    int64_t n, taken; /* taken -1: not a heap yet */
} part;
typedef struct ordered {
    part near, far;
} ordered;

static const double NEAR = 0x1p-12;

/* Probabilities of a row; those below min_p * max are left out. */
static ordered candidates(candidate *at, const float *x, int64_t largest_id, int64_t D,
                          double temperature, double min_p)
{
    const double top = (double)x[largest_id] / temperature;
    double sum = 0.0;
    for (int64_t i = 0; i < D; i++) {
        const double distance = (double)x[i] / temperature - top;
        at[i].p = distance < -746.0 ? 0.0 : exp(distance); /* exp(-746) is 0 in double */
        sum += at[i].p;
    }
    const double most = 1.0 / sum;
    int64_t n = 0, near = 0;
    for (int64_t i = 0; i < D; i++) {
        const candidate c = { at[i].p / sum, i };
        if (c.p < min_p * most)
            continue;
        at[n++] = c;
        if (c.p >= NEAR * most) {
            at[n - 1] = at[near];
            at[near++] = c;
        }
    }
    return (ordered){ { at, near, -1 }, { at + near, n - near, -1 } };
}

/* number i of the order, i at most one more than the last asked for */
static candidate nth(ordered *o, int64_t i)
{
    part *p = i < o->near.n ? &o->near : &o->far;
    i -= p == &o->far ? o->near.n : 0;
    if (p->taken < 0) {
        make_heap(p->heap, p->n);
        p->taken = 0;
    }
    if (i == p->taken) {
        const candidate top = pop(p->heap, p->n - p->taken);
        p->taken++;
        p->heap[p->n - p->taken] = top;
    }
    return p->heap[p->n - 1 - i];
}

static int64_t draw(ordered order, const kl_sample_args *a)
{
    const int64_t n = order.near.n + order.far.n;
    int64_t most = a->top_k > 0 ? kl_min(a->top_k, n) : n;
    double total = 0.0, sum = 0.0;
    for (int64_t i = 0; i < most; i++)
        total += most < n ? nth(&order, i).p : order.near.heap[i].p; /* the parts adjoin */

    if (a->top_p < 1.0f) {
        int64_t kept = 0;
        do
            sum += nth(&order, kept++).p;
        while (kept < most && sum / total < (double)a->top_p);
        most = kept;
        total = sum;
        sum = 0.0;
    }

    const double r = uniform(a);
    for (int64_t i = 0; i < most; i++) {
        sum += nth(&order, i).p;
        if (sum / total > r)
            return nth(&order, i).id;
    }
    return nth(&order, most - 1).id;
}

/* ---- rows ---- */

static void check_rows(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        const float *x = a->logits + t * a->D;
        bool refused;
        a->largest[t] = largest(a->k, x, a->D, &refused);
        a->bad[t] = -1;
        for (int64_t i = 0; refused && a->bad[t] < 0; i++)
            if (!(x[i] < INFINITY))
                a->bad[t] = i;
        if (!refused && x[a->largest[t]] == -INFINITY)
            a->bad[t] = 0; /* all are masked */
    }
}

static void rows(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    for (int64_t t = begin; t < end; t++) {
        const float *x = a->logits + t * a->D;
        candidate *heap = a->heap + (a->heap_a_row ? t : thread) * a->D;
        const kl_sample_args *given = &a->args[t];
        int64_t id;
        if (given->temperature > 0.0f)
            id = draw(candidates(heap, x, a->largest[t], a->D, (double)given->temperature,
                                 (double)given->min_p),
                      given);
        else
            id = a->largest[t];
        a->ids[t] = (int32_t)id;
    }
}

kl_status cpu_sample(kl_ctx *ctx, int32_t *ids, const float *logits, const kl_sample_args *args,
                     int64_t T, int64_t D)
{
    task a = { .k = ctx->k,
               .ids = ids,
               .logits = logits,
               .args = args,
               .D = D,
               .heap_a_row = T < ctx->threads };
    KL_SCRATCH(a.bad, ctx, T);
    KL_SCRATCH(a.largest, ctx, T);
    KL_SCRATCH(a.heap, ctx, kl_min(T, ctx->threads) * D);
    if (ctx->arena.measuring)
        return KL_OK;
    KL_TRY(kl_for(ctx, T, 1, check_rows, &a));
    for (int64_t t = 0; t < T; t++)
        if (a.bad[t] >= 0)
            return kl_fail(
                ctx, KL_ERR_ARG,
                "sample: logits[%lld, %lld] is %g; logits must be finite, or -inf for some",
                (long long)t, (long long)a.bad[t], (double)logits[t * D + a.bad[t]]);
    return kl_for(ctx, T, 1, rows, &a);
}

static kl_status check_args(kl_ctx *ctx, int64_t t, const kl_sample_args *a)
{
    if (!(a->temperature >= 0.0f && a->temperature < INFINITY))
        return kl_fail(ctx, KL_ERR_ARG,
                       "sample: temperature of row %lld is %g; it must be finite and >= 0",
                       (long long)t, (double)a->temperature);
    if (a->top_k < 0)
        return kl_fail(ctx, KL_ERR_ARG, "sample: top_k of row %lld is %lld; it must be >= 0",
                       (long long)t, (long long)a->top_k);
    if (!(a->top_p > 0.0f && a->top_p <= 1.0f))
        return kl_fail(ctx, KL_ERR_ARG, "sample: top_p of row %lld is %g; it must be in (0, 1]",
                       (long long)t, (double)a->top_p);
    if (!(a->min_p >= 0.0f && a->min_p <= 1.0f))
        return kl_fail(ctx, KL_ERR_ARG, "sample: min_p of row %lld is %g; it must be in [0, 1]",
                       (long long)t, (double)a->min_p);
    return KL_OK;
}

kl_status kl_sample(kl_ctx *ctx, int32_t *ids, const float *logits, const kl_sample_args *args,
                    int64_t T, int64_t D)
{
    KL_TRY(kl_check_rows(ctx, "sample", "logits", T, D));
    if (D > INT32_MAX)
        return kl_fail(ctx, KL_ERR_SHAPE, "sample: logits are %lld wide; ids are int32",
                       (long long)D);
    for (int64_t t = 0; t < T; t++)
        KL_TRY(check_args(ctx, t, &args[t]));
    const size_t mark = kl_scratch_mark(ctx);
    return kl_done(ctx, mark, KL_RUN(sample, 4 * T * D, 4 * T * D, ctx, ids, logits, args, T, D));
}
