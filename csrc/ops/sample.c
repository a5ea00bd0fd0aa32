/* sample: one token id from each row of logits [T, D], by that row's arguments.
 *   Weights w = 2^((x - max x) * scale), scale = log2(e) / temperature: softmax before its division.
 *   Ordered by x descending, then id ascending; of this order the first top_k (0: all), of these
 *   w >= min_p, of these the shortest prefix with a sum >= top_p of their sum (1: all). Drawn is the
 *   first whose running sum exceeds r times that of the prefix, r in [0, 1): 53 bits of Philox4x32-10
 *   (Salmon et al., SC 2011) with key = seed and counter = (position, sequence), low words first.
 *   Temperature 0: the largest logit, lowest id.
 * Weights are float32 by the formula in csrc/cpu/sample.inc, sums double (docs/math.md#sample).
 * NaN and +infinity are errors; -infinity masks a token, unless it masks all. */
#include "ops.h"

#include "../cpu/kernels.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum {
    BLOCK = 2048,   /* logits, at most, whose largest are taken lane by lane */
    BLOCKS = 80,    /* that many, or more where there are more logits */
    HEAD = 256,     /* likeliest tokens, or a few more, that are looked at first */
    SORTED = 2048,  /* tokens that are sorted and walked through */
    SAMPLED = 1024, /* of which bounds are guessed */
};

/* Tokens in order of id (id NULL: 0, 1, ...) or in the op's order; w NULL: of weight 1. */
typedef struct tokens {
    const float *x;
    float *w;
    int32_t *id;
    int64_t n;
    float *room; /* where x is, or may be put */
} tokens;

/* What one thread, or one row, works with. */
typedef struct desk {
    tokens all, kept, near; /* [D]: the row, its x borrowed; the first top_k; those about a bound */
    tokens head, few, list; /* [SORTED]: the likeliest; to be sorted; sorted */
    uint64_t *keys[2];      /* [SORTED] */
    const kl_kernels *k;
    float top, scale; /* of the row */
} desk;

typedef struct task {
    int32_t *ids;
    const float *logits;
    const kl_sample_args *args;
    const kl_kernels *k;
    int64_t D, block, groups;
    int64_t *bad;   /* [T]: first id with a logit that is ruled out, or -1 */
    int64_t *first; /* [T]: lowest id among the largest logits */
    float *largest; /* [T, groups]: the largest of each lane of each block */
    desk *desks;    /* one a row or one a thread, whichever is fewer */
    bool desk_a_row;
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

/* ---- floats in their order ---- */

/* Rising with x: the finite floats one by one, -0 being 0. */
static uint32_t rank_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t magnitude = bits & 0x7fffffffu;
    return bits >> 31 != 0 ? 0x80000000u - magnitude : 0x80000000u + magnitude;
}

static float of_rank(uint32_t rank)
{
    const uint32_t bits =
        rank >= 0x80000000u ? rank - 0x80000000u : 0x80000000u | (0x80000000u - rank);
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static float above(float x) { return of_rank(rank_of(x) + 1); }
static float below(float x) { return of_rank(rank_of(x) - 1); }

/* ---- passes ---- */

static double sum_within(const desk *d, tokens s, float low, float high)
{
    if (low > high)
        return 0.0;
    if (s.w == NULL)
        return (double)d->k->sample_count(s.x, s.n, low, high);
    return d->k->sample_sum(s.x, s.w, s.n, low, high);
}

/* Copies those with low <= x <= high; false where they are more than room. */
static bool gather(const desk *d, tokens *to, int64_t room, tokens s, float low, float high)
{
    to->x = to->room;
    to->n = d->k->sample_gather(to->room, to->w, to->id, room, s.x, s.w, s.id, s.n, low, high);
    return to->n <= room;
}

/* From order of id into the op's order: by radix on their ranks, inverted, which leaves equals as they are. */
static void sort(const desk *d, tokens *to, tokens s)
{
    uint64_t *from = d->keys[0], *other = d->keys[1];
    for (int64_t i = 0; i < s.n; i++)
        from[i] = (uint64_t)~rank_of(s.x[i]) << 32 | (uint64_t)i;
    for (int shift = 32; shift < 64; shift += 8) {
        int64_t at[256] = { 0 };
        for (int64_t i = 0; i < s.n; i++)
            at[from[i] >> shift & 255]++;
        for (int64_t digit = 0, begin = 0; digit < 256; digit++) {
            const int64_t n = at[digit];
            at[digit] = begin;
            begin += n;
        }
        for (int64_t i = 0; i < s.n; i++)
            other[at[from[i] >> shift & 255]++] = from[i];
        uint64_t *const swap = from;
        from = other;
        other = swap;
    }
    to->x = to->room;
    to->n = s.n;
    for (int64_t i = 0; i < s.n; i++) {
        const uint32_t at = (uint32_t)from[i];
        to->room[i] = s.x[at];
        to->w[i] = s.w[at];
        to->id[i] = s.id[at];
    }
}

/* ---- bounds ---- */

/* The lowest finite x with (x - top) scale >= t; top, where there is none below. Both operations are
 * monotone as rounded, so all x above it pass, too. */
static float lowest_with(const desk *d, float t)
{
    uint32_t fails = rank_of(-FLT_MAX) - 1, passes = rank_of(d->top);
    while (passes - fails > 1) {
        const uint32_t middle = fails + (passes - fails) / 2;
        if ((of_rank(middle) - d->top) * d->scale >= t)
            passes = middle;
        else
            fails = middle;
    }
    return of_rank(passes);
}

/* A bound that n logits or more reach, and not many more: the n-th of the groups' largest. */
static float bound_of(const desk *d, const float *largest, int64_t groups, int64_t n)
{
    uint32_t passes = rank_of(-FLT_MAX), fails = rank_of(d->top) + 1;
    while (fails - passes > 1) {
        const uint32_t middle = passes + (fails - passes) / 2;
        if (d->k->sample_count(largest, groups, of_rank(middle), d->top) >= n)
            passes = middle;
        else
            fails = middle;
    }
    return of_rank(passes);
}

/* ---- the token at which a running sum reaches its aim ---- */

typedef struct aim {
    double sum;
    bool exceed; /* or only meet */
} aim;

/* A prefix of the order: its last token, and the sum of its weights. */
typedef struct prefix {
    float x;
    int64_t id;
    double sum;
} prefix;

static bool reaches(double sum, aim a) { return a.exceed ? sum > a.sum : sum >= a.sum; }

static bool is_longer(prefix p, prefix q) { return p.x < q.x || (p.x == q.x && p.id > q.id); }

/* Lengthens a prefix by tokens in order until it reaches the aim, or by all. */
static bool walk(tokens s, aim a, prefix *p)
{
    for (int64_t i = 0; i < s.n; i++) {
        *p = (prefix){ s.x[i], s.id[i], p->sum + (double)s.w[i] };
        if (reaches(p->sum, a))
            return true;
    }
    return false;
}

/* The same by tokens that all have the logit x, in order of id among others. */
static prefix walk_equals(const desk *d, tokens s, float x, aim a, double before)
{
    const int64_t all = d->k->sample_count(s.x, s.n, x, x);
    const double w = sum_within(d, s, x, x) / (double)all; /* floats: an exact sum */
    int64_t n = (int64_t)fmin(fmax((a.sum - before) / w, 1.0), (double)all);
    while (n > 1 && reaches(before + (double)(n - 1) * w, a))
        n--;
    while (n < all && !reaches(before + (double)n * w, a))
        n++;

    int64_t i = 0, passed = 0;
    while (i + BLOCK < s.n) {
        const int64_t here = d->k->sample_count(s.x + i, BLOCK, x, x);
        if (passed + here >= n)
            break;
        passed += here;
        i += BLOCK;
    }
    for (; passed < n; i++)
        passed += s.x[i] == x;
    return (prefix){ x, s.id != NULL ? s.id[i - 1] : i - 1, before + (double)n * w };
}

/* Narrows [*low, *high], which holds the aim, by some of the tokens: as a guess. `share` of the weight
 * within is before the aim. */
static void guess(const desk *d, tokens s, double share, float *low, float *high)
{
    tokens some = d->few, order = d->list;
    some.x = some.room;
    some.n = 0;
    for (int64_t i = 0; i < SAMPLED; i++) {
        const int64_t at = i * s.n / SAMPLED;
        if (s.x[at] < *low || s.x[at] > *high)
            continue;
        some.room[some.n] = s.x[at];
        some.w[some.n] = s.w != NULL ? s.w[at] : 1.0f;
        some.id[some.n++] = 0;
    }
    if (some.n < 16)
        return;
    sort(d, &order, some);

    double sum = 0.0, squares = 0.0, running = 0.0;
    for (int64_t i = 0; i < order.n; i++) {
        sum += (double)order.w[i];
        squares += (double)order.w[i] * (double)order.w[i];
    }
    const double spread = 3.0 * sqrt(share * (1.0 - share) * squares); /* of a sum of samples */
    float l = *low, h = *high;
    for (int64_t i = 0; i < order.n; i++) {
        running += (double)order.w[i];
        if (running < share * sum - spread)
            h = order.x[i];
        if (running > share * sum + spread) {
            l = order.x[i];
            break;
        }
    }
    if (l == *low && h == *high)
        l = h = order.x[order.n / 2]; /* leaves out a half, whatever the weights are */
    *low = l;
    *high = h;
}

/* Lengthens p, which ends above high, to the prefix that reaches the aim; inside is the sum from low to
 * high. Bounds are guessed and sums taken until few enough to sort are left; a wrong guess costs time. Where
 * roundings hide the aim it ends with the last token from low to high; with p, where there is none. */
static prefix search(desk *d, tokens s, float low, float high, double inside, prefix p, aim a)
{
    for (;;) {
        if (gather(d, &d->few, SORTED, s, low, high)) {
            sort(d, &d->list, d->few);
            (void)walk(d->list, a, &p);
            return p;
        }
        float l = low, h = high;
        guess(d, s, fmin(fmax((a.sum - p.sum) / inside, 0.0), 1.0), &l, &h);
        const double over = sum_within(d, s, above(h), high);
        if (h < high && reaches(p.sum + over, a)) {
            low = above(h);
            inside = over;
            continue;
        }
        if (l == low && h < high) { /* nothing below to leave out */
            p.sum += over;
            inside -= over;
            high = h;
            continue;
        }
        const bool moves =
            s.x != d->near.room; /* else in place, once the guess is known to be right */
        if (moves)
            (void)gather(d, &d->near, s.n, s, l, h);
        const double between = sum_within(d, moves ? d->near : s, l, h);
        p.sum += over;
        if (l > low && !reaches(p.sum + between, a)
            && d->k->sample_count(s.x, s.n, low, below(l)) > 0) {
            p.sum += between;
            inside -= over + between;
            high = below(l);
            continue;
        }
        if (l == h)
            return walk_equals(d, s, l, a, p.sum);
        if (!moves)
            (void)gather(d, &d->near, s.n, s, l, h);
        s = d->near;
        low = l;
        high = h;
        inside = between;
    }
}

/* ---- one row ---- */

/* The first tokens of the order, in order, at least n unless there are fewer from low up: d->head, and the
 * bound from which it holds all. Where very many are equal, none. */
static float take_head(desk *d, const float *largest, int64_t groups, int64_t n, float low)
{
    const float bound = fmaxf(low, bound_of(d, largest, groups, n));
    d->head.n = 0;
    if (!gather(d, &d->few, SORTED, d->all, bound, d->top))
        return above(d->top);
    sort(d, &d->head, d->few);
    (void)d->k->sample_weights(d->head.w, d->head.x, d->head.n, d->top, d->scale);
    return bound;
}

/* The first n of the order, n more than the head has, in order of id. */
static tokens first_of(desk *d, tokens s, float bound, int64_t n)
{
    const prefix head = { bound, INT64_MAX, (double)d->head.n };
    const prefix end = search(d, s, -FLT_MAX, below(bound), (double)s.n - head.sum, head,
                              (aim){ (double)n, false });
    (void)gather(d, &d->kept, s.n, s, end.x, d->top);
    tokens kept = d->kept;
    kept.n = 0;
    for (int64_t i = 0; i < d->kept.n; i++)
        if (kept.x[i] > end.x || kept.id[i] <= end.id) {
            kept.room[kept.n] = kept.x[i];
            kept.id[kept.n++] = kept.id[i];
        }
    return kept;
}

/* What a draw is made from: the head and, unless that is all, tokens in order of id, from low up. */
typedef struct choice {
    tokens s;
    float low, bound; /* the head holds all from bound up */
    double sum;       /* of the weights of all, head and others */
} choice;

/* What top_k and min_p leave. */
static choice choose(desk *d, const float *largest, int64_t groups, const kl_sample_args *a)
{
    choice c = { .s = d->all };
    c.low = lowest_with(d, fmaxf(-126.5f, (float)log2((double)a->min_p))); /* below it w is 0 */
    const int64_t most = kl_min(groups, SORTED) / 2;
    const int64_t wanted = a->top_k > 0 && a->top_k <= most ? a->top_k : HEAD;
    c.bound = take_head(d, largest, groups, wanted, c.low);
    if (a->top_k > 0 && a->top_k <= d->head.n) {
        d->head.n = a->top_k;
        c.bound = c.low;
    }
    if (c.bound == c.low) {
        for (int64_t i = 0; i < d->head.n; i++)
            c.sum += (double)d->head.w[i];
        return c;
    }

    c.s.w = NULL;
    if (a->top_k > 0 && a->top_k < c.s.n)
        c.s = first_of(d, c.s, c.bound, a->top_k);
    c.s.w = d->all.w;
    c.sum = d->k->sample_weights(c.s.w, c.s.x, c.s.n, d->top, d->scale);
    if (a->min_p > 0.0f)
        c.sum = sum_within(d, c.s, c.low, d->top);
    return c;
}

/* The prefix that reaches a share of a sum: in the head, or behind it. */
static prefix prefix_of(desk *d, const choice *c, double share, double sum, bool exceed)
{
    const aim a = { share * sum, exceed };
    prefix p = { d->top, -1, 0.0 };
    if (walk(d->head, a, &p) || c->bound == c->low)
        return p;
    return search(d, c->s, c->low, below(c->bound), c->sum - p.sum, p, a);
}

static int64_t draw(desk *d, const float *largest, int64_t groups, const kl_sample_args *a)
{
    choice c = choose(d, largest, groups, a);
    if (a->top_p >= 1.0f)
        return prefix_of(d, &c, uniform(a), c.sum, true).id;
    const prefix end = prefix_of(d, &c, (double)a->top_p, c.sum, false);
    if (end.x < c.bound && c.bound > c.low && c.s.x == d->all.x
        && gather(d, &d->kept, c.s.n / 4, c.s, end.x, d->top))
        c.s = d->kept;
    const prefix drawn = prefix_of(d, &c, uniform(a), end.sum, true);
    return is_longer(drawn, end) ? end.id : drawn.id;
}

/* ---- rows ---- */

/* The lowest id among the largest logits; *refused: some are NaN or +inf. */
static int64_t first_largest(const task *a, const float *x, float *largest, bool *refused)
{
    float best = -INFINITY;
    int64_t at = 0;
    *refused = false;
    for (int64_t i = 0; i < a->D; i += a->block, largest += 16) {
        int bad;
        a->k->sample_largest(largest, x + i, kl_min(a->block, a->D - i), &bad);
        *refused = *refused || bad;
        for (int lane = 0; lane < 16; lane++)
            if (largest[lane] > best) {
                best = largest[lane];
                at = i;
            }
    }
    while (at + 1 < a->D && x[at] != best)
        at++;
    return at;
}

static void check_rows(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        const float *x = a->logits + t * a->D;
        bool refused;
        a->first[t] = first_largest(a, x, a->largest + t * a->groups, &refused);
        a->bad[t] = -1;
        for (int64_t i = 0; refused && a->bad[t] < 0; i++)
            if (!(x[i] < INFINITY))
                a->bad[t] = i;
        if (!refused && x[a->first[t]] == -INFINITY)
            a->bad[t] = 0; /* all are masked */
    }
}

static void rows(void *arg, int64_t begin, int64_t end, int thread)
{
    static const double LOG2_E = 0x1.71547652b82fep+0;
    const task *a = arg;
    for (int64_t t = begin; t < end; t++) {
        const kl_sample_args *given = &a->args[t];
        if (given->temperature == 0.0f) {
            a->ids[t] = (int32_t)a->first[t];
            continue;
        }
        desk *d = &a->desks[a->desk_a_row ? t : thread];
        d->all.x = a->logits + t * a->D;
        d->top = d->all.x[a->first[t]];
        d->scale = (float)fmin(LOG2_E / (double)given->temperature, (double)FLT_MAX);
        a->ids[t] = (int32_t)draw(d, a->largest + t * a->groups, a->groups, given);
    }
}

static kl_status take_tokens(kl_ctx *ctx, tokens *s, int64_t n)
{
    KL_SCRATCH(s->w, ctx, n);
    KL_SCRATCH(s->id, ctx, n);
    KL_SCRATCH(s->room, ctx, n);
    return KL_OK;
}

static kl_status take_desk(kl_ctx *ctx, desk *d, int64_t D)
{
    desk taken = { .k = ctx->k };
    KL_SCRATCH(taken.all.w, ctx, D);
    taken.all.n = D;
    KL_TRY(take_tokens(ctx, &taken.kept, D));
    KL_TRY(take_tokens(ctx, &taken.near, D));
    KL_TRY(take_tokens(ctx, &taken.head, SORTED));
    KL_TRY(take_tokens(ctx, &taken.few, SORTED));
    KL_TRY(take_tokens(ctx, &taken.list, SORTED));
    KL_SCRATCH(taken.keys[0], ctx, SORTED);
    KL_SCRATCH(taken.keys[1], ctx, SORTED);
    if (!ctx->arena.measuring)
        *d = taken;
    return KL_OK;
}

kl_status cpu_sample(kl_ctx *ctx, int32_t *ids, const float *logits, const kl_sample_args *args,
                     int64_t T, int64_t D)
{
    const int64_t desks = kl_min(T, ctx->threads);
    task a = { .ids = ids,
               .logits = logits,
               .args = args,
               .k = ctx->k,
               .D = D,
               .block = kl_min(BLOCK, 16 * kl_ceil_div(D, 16 * BLOCKS)),
               .desk_a_row = T < ctx->threads };
    a.groups = 16 * kl_ceil_div(D, a.block);
    KL_SCRATCH(a.bad, ctx, T);
    KL_SCRATCH(a.first, ctx, T);
    KL_SCRATCH(a.largest, ctx, T * a.groups);
    KL_SCRATCH(a.desks, ctx, desks);
    for (int64_t i = 0; i < desks; i++)
        KL_TRY(take_desk(ctx, &a.desks[i], D));
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
    return KL_RUN(sample, 4 * T * D, 4 * T * D, ctx, ids, logits, args, T, D);
}
