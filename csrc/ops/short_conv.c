/* short_conv: y[t,c] = act(sum_{j=0..W-1} w[c,j] x[t-W+1+j, c]),   act SiLU or none
 *   x, y [T, C], y is not x     w [C, W], the last tap on the current token, 1 <= W <= 8
 *   history [W-1, C] a sequence: the inputs before its first token, oldest first; NULL in: zeros, NULL
 *   out: not kept; history_out may be history_in, and is no other sequence's. Kept values are copies of
 *   x, bit by bit.
 *   Sum: fma in rising j from +0, so any split of a sequence gives the same bytes.
 *   Subnormals are flushed: read as 0, and results below 2^-126 become 0.
 *   Budget: W u sum_j |w x|, times 1.1 by SiLU's slope, + 6 u |ref|, + what is flushed
 *   (docs/math.md#short_conv). */
#include "ops.h"

#include "../cpu/fpenv.h"
#include "../cpu/kernels.h"

#include <string.h>

enum { MAX_TAPS = 8, MAX_BLOCK = 256 };

typedef struct task {
    const kl_kernels *k;
    float *y;
    const float *x, *w;
    kl_slots history_out, history_in;
    const int64_t *offsets;
    int64_t C, W, block, n_blocks; /* channels a task, tasks a sequence */
    kl_activation activation;
} task;

static const float zeros[MAX_BLOCK];

/* The inputs of channel c that token t of a sequence sees at its tap 0 (t counts from -(W-1)). */
static const float *input(const task *a, const float *history, int64_t begin, int64_t t, int64_t c)
{
    if (t >= 0)
        return a->x + (begin + t) * a->C + c;
    return history != NULL ? history + (a->W - 1 + t) * a->C + c : zeros;
}

/* The last W-1 inputs become the history; rows are written in the order in which they are read. */
static void keep(const task *a, float *to, const float *history, int64_t begin, int64_t T,
                 int64_t c, int64_t n)
{
    for (int64_t i = 0; i < a->W - 1; i++)
        memmove(to + i * a->C + c, input(a, history, begin, T - (a->W - 1) + i, c),
                (size_t)n * sizeof *to);
}

static void convolve(const task *a, int64_t sequence, int64_t c, int64_t n)
{
    const int64_t begin = a->offsets[sequence], T = a->offsets[sequence + 1] - begin, W = a->W;
    const float *history = kl_slot_of(a->history_in, sequence);
    float *history_out = kl_slot_of(a->history_out, sequence);
    float taps[MAX_TAPS * MAX_BLOCK];
    const float *x[MAX_TAPS];

    if (T > 0)
        a->k->short_conv_taps(taps, a->w + c * W, n, W);
    for (int64_t t = 0; t < T; t++) {
        for (int64_t j = 0; j < W; j++)
            x[j] = input(a, history, begin, t - W + 1 + j, c);
        a->k->short_conv(a->y + (begin + t) * a->C + c, x, taps, n, W, a->activation);
    }
    if (history_out != NULL)
        keep(a, history_out, history, begin, T, c, n);
}

static void blocks(void *arg, int64_t begin, int64_t end, int thread)
{
    const task *a = arg;
    (void)thread;
    const kl_fp saved = kl_fp_flush();
    for (int64_t i = begin; i < end; i++) {
        const int64_t c = i % a->n_blocks * a->block;
        convolve(a, i / a->n_blocks, c, kl_min(a->block, a->C - c));
    }
    kl_fp_restore(saved);
}

/* Channels a task: 256, fewer where there would be less than four tasks a thread. */
static int64_t block_of(const kl_ctx *ctx, int64_t N, int64_t C)
{
    const int64_t wanted = kl_ceil_div(4 * ctx->threads, kl_max(N, 1));
    return kl_max(16, kl_min(MAX_BLOCK, kl_ceil_div(C, wanted) / 16 * 16));
}

kl_status cpu_short_conv(kl_ctx *ctx, float *y, kl_slots history_out, const float *x,
                         const float *w, kl_slots history_in, const int64_t *offsets, int64_t N,
                         int64_t T, int64_t C, int64_t W, kl_activation activation)
{
    const int64_t block = block_of(ctx, N, C), n_blocks = kl_ceil_div(C, block);
    task a = {
        ctx->k, y, x, w, history_out, history_in, offsets, C, W, block, n_blocks, activation
    };
    const int64_t values = block * kl_ceil_div(T, kl_max(N, 1)); /* a task, on average */
    return kl_for(ctx, N * n_blocks, kl_row_grain(values * 8), blocks, &a);
}

kl_status kl_short_conv(kl_ctx *ctx, float *y, kl_slots history_out, const float *x, const float *w,
                        kl_slots history_in, const int64_t *offsets, int64_t N, int64_t T,
                        int64_t C, int64_t W, kl_activation activation)
{
    KL_TRY(kl_check_rows(ctx, "short_conv", "x", T, C));
    KL_TRY(kl_check_offsets(ctx, "short_conv", offsets, N, T));
    if (W < 1 || W > MAX_TAPS)
        return kl_fail(ctx, KL_ERR_UNSUPPORTED, "short_conv: w has %lld taps; there may be 1 to %d",
                       (long long)W, MAX_TAPS);
    if (activation != KL_NONE && activation != KL_SILU)
        return kl_fail(ctx, KL_ERR_ARG,
                       "short_conv: activation is %d; it must be KL_NONE or KL_SILU",
                       (int)activation);
    if (kl_is_measured(ctx))
        return KL_OK;
    return KL_RUN(short_conv, 2 * T * C * W, 8 * T * C, ctx, y, history_out, x, w, history_in,
                  offsets, N, T, C, W, activation);
}
