/* decay_cumsum: c_i = g_0 + .. + g_i over the tokens of a sequence, afresh in each chunk of it
 *   g, c [T, D], c may be g     chunk: tokens, counted from a sequence's first; 0: the whole sequence
 *   One addition a token, in rising order; -inf stays. Subnormals are kept.
 *   Budget: i u / (1 - i u) |ref| at the i-th token of a chunk, for g of one sign (docs/math.md#decay_cumsum). */
#include "ops.h"

#include "../cpu/kernels.h"

#include <string.h>

enum { BLOCK = 256 }; /* channels a task */

typedef struct task {
    const kl_kernels *k;
    float *c;
    const float *g;
    const int64_t *offsets;
    int64_t D, chunk, n_blocks;
} task;

/* n channels of one sequence */
static void sums(const task *a, int64_t sequence, int64_t channel, int64_t n)
{
    const int64_t begin = a->offsets[sequence], T = a->offsets[sequence + 1] - begin;
    for (int64_t t = 0; t < T; t++) {
        const int64_t at = (begin + t) * a->D + channel;
        if (t == 0 || (a->chunk > 0 && t % a->chunk == 0))
            memmove(a->c + at, a->g + at, (size_t)n * sizeof *a->c);
        else
            a->k->add(a->c + at, a->c + at - a->D, a->g + at, n);
    }
}

static void blocks(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const int64_t channel = i % a->n_blocks * BLOCK;
        sums(a, i / a->n_blocks, channel, kl_min(BLOCK, a->D - channel));
    }
}

kl_status cpu_decay_cumsum(kl_ctx *ctx, float *c, const float *g, const int64_t *offsets, int64_t N,
                           int64_t T, int64_t D, int64_t chunk)
{
    task a = { ctx->k, c, g, offsets, D, chunk, kl_ceil_div(D, BLOCK) };
    const int64_t values = kl_min(D, BLOCK) * kl_ceil_div(T, kl_max(N, 1)); /* a task, on average */
    return kl_for(ctx, N * a.n_blocks, kl_row_grain(values), blocks, &a);
}

kl_status kl_decay_cumsum(kl_ctx *ctx, float *c, const float *g, const int64_t *offsets, int64_t N,
                          int64_t T, int64_t D, int64_t chunk)
{
    int64_t tasks;
    KL_TRY(kl_check_rows(ctx, "decay_cumsum", "g", T, D));
    KL_TRY(kl_check_offsets(ctx, "decay_cumsum", offsets, N, T));
    if (!kl_mul(&tasks, N, D))
        return kl_fail(ctx, KL_ERR_SHAPE,
                       "decay_cumsum: g of %lld sequences, %lld wide, is too large", (long long)N,
                       (long long)D);
    if (chunk < 0)
        return kl_fail(ctx, KL_ERR_ARG,
                       "decay_cumsum: chunk is %lld; it must be >= 1, or 0 for none",
                       (long long)chunk);
    if (kl_is_measured(ctx))
        return KL_OK;
    return KL_RUN(decay_cumsum, T * D, 8 * T * D, ctx, c, g, offsets, N, T, D, chunk);
}
