/* A call cut into passes, each a transaction: everything is taken at entry, and a pass that fails leaves the
 * states where it found them. */
#include "pass.h"

#include "../cpu/fpenv.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- passes ------------------------------------------------------------------------------------ */

/* New tokens of a sequence up to the end of the piece in which its next checkpoint is due. */
static int64_t to_checkpoint(const pass *p, int64_t s, int64_t done)
{
    const kl_state *state = p->args->states[s];
    /* while measuring, earlier passes have not moved the state */
    const int64_t at = state->position + (p->ctx->arena.measuring ? done : 0);
    const int64_t due = kl_state_next_checkpoint(state, at);
    return due == INT64_MAX ? due : kl_ceil_div(due - at, KL_PIECE) * KL_PIECE;
}

/* Fills the pass with the next tokens: sequences in order, cut only at multiples of KL_PIECE of each sequence's
 * own new tokens, and where a checkpoint is due. done [N] counts the new tokens of each sequence that earlier
 * passes took, all of them whole pieces. */
static void fill(pass *p, const int64_t *done, int64_t room)
{
    const kl_forward_args *a = p->args;
    p->N = p->T = 0;
    for (int64_t s = 0; s < a->N && room > 0; s++) {
        const int64_t left = a->offsets[s + 1] - a->offsets[s] - done[s];
        int64_t n = kl_min(left, room);
        if (n < left)
            n -= n % KL_PIECE;
        n = kl_min(n, to_checkpoint(p, s, done[s]));
        if (n <= 0)
            continue;
        p->segment[p->N] = (segment){ s, done[s], n };
        p->offsets[p->N++] = p->T;
        p->T += n;
        room -= n;
    }
    p->offsets[p->N] = p->T;
}

/* Tables of a pass of up to N sequences and T tokens. */
static kl_status new_pass(pass *p, int64_t N, int64_t T)
{
    p->segment = malloc((size_t)N * sizeof *p->segment + 1);
    p->offsets = malloc((size_t)(N + 1) * sizeof *p->offsets);
    p->start = malloc((size_t)N * sizeof *p->start + 1);
    p->end = malloc((size_t)N * sizeof *p->end + 1);
    p->fixed = malloc((size_t)N * sizeof *p->fixed + 1);
    p->page = malloc((size_t)N * sizeof *p->page + 1);
    p->ids = malloc((size_t)T * sizeof *p->ids + 1);
    p->positions = malloc((size_t)T * sizeof *p->positions + 1);
    if (!p->segment || !p->offsets || !p->start || !p->end || !p->fixed || !p->page || !p->ids
        || !p->positions)
        return kl_fail(p->ctx, KL_ERR_MEMORY, "out of memory: pass of %lld tokens", (long long)T);
    return KL_OK;
}

static void free_pass(pass *p)
{
    kl_edit_end(p);
    free(p->segment);
    free(p->offsets);
    free(p->start);
    free(p->end);
    free(p->fixed);
    free(p->page);
    free(p->ids);
    free(p->positions);
}

static void bind(pass *p)
{
    const kl_forward_args *a = p->args;
    for (int64_t n = 0; n < p->N; n++) {
        const kl_state *state = a->states[p->segment[n].sequence];
        /* while measuring, earlier passes have not moved the state */
        p->start[n] = state->position + (p->ctx->arena.measuring ? p->segment[n].first : 0);
        p->end[n] = p->start[n] + p->segment[n].n;
        p->fixed[n] = state->fixed;
        p->page[n] = state->page;
        p->cache_type = state->cache_type;
        if (a->ids != NULL)
            memcpy(p->ids + p->offsets[n], a->ids + kl_call_row(p, n),
                   (size_t)p->segment[n].n * sizeof *p->ids);
        for (int64_t t = 0; t < p->segment[n].n; t++)
            p->positions[p->offsets[n] + t] = p->start[n] + t;
    }
}

/* A pass that can be interrupted (some sequence has several tokens) or that what the caller gave can fail has its states
 * copied first, and put back when it fails. Another step of one token a sequence runs to its end; if it fails all the
 * same, its states are lost and say so. */
static kl_status run_guarded(pass *p)
{
    kl_ctx *ctx = p->ctx;
    const size_t bytes = p->model->fixed_bytes;
    const kl_forward_args *a = p->args;
    const bool guarded =
        p->T > p->N || a->edit != NULL || a->expert_ids != NULL || a->check_finite != 0;
    char *copies = NULL;
    if (guarded)
        KL_SCRATCH(copies, ctx, (size_t)p->N * bytes);
    for (int64_t n = 0; guarded && !ctx->arena.measuring && n < p->N; n++)
        KL_TRY(p->model->backend->copy(ctx, copies + (size_t)n * bytes, p->fixed[n], bytes));
    ctx->uninterruptible = !guarded;
    kl_status status = kl_pass_run(p);
    ctx->uninterruptible = false;
    if (ctx->arena.measuring)
        return status;
    if (status == KL_OK)
        status = kl_settle(ctx);
    for (int64_t n = 0; n < p->N; n++) {
        kl_state *state = p->args->states[p->segment[n].sequence];
        if (status == KL_OK)
            kl_state_advance(ctx, state, p->end[n]);
        else if (!guarded
                 || p->model->backend->copy(ctx, p->fixed[n], copies + (size_t)n * bytes, bytes)
                        != KL_OK)
            state->lost = 1;
    }
    return status;
}

/* ---- the call ---------------------------------------------------------------------------------- */

/* Given ids are those of experts, and rise with each token. */
static kl_status check_experts(kl_ctx *ctx, const kl_config *c, const kl_forward_args *a, int64_t T)
{
    const int64_t k = c->ffn.k;
    for (int64_t l = 0; a->expert_ids != NULL && l < c->n_layers; l++) {
        const int32_t *ids = a->expert_ids[l];
        if (ids != NULL && c->layers[l].ffn != KL_FFN_MOE)
            return kl_fail(ctx, KL_ERR_ARG,
                           "forward: expert_ids of layer %lld, which has no experts", (long long)l);
        for (int64_t i = 0; ids != NULL && i < T * k; i++) {
            const int32_t least = i % k > 0 ? ids[i - 1] + 1 : 0;
            if (ids[i] < least || ids[i] >= c->ffn.experts)
                return kl_fail(ctx, KL_ERR_ARG,
                               "forward: expert_ids of layer %lld [%lld, %lld] is %d; the ids of a "
                               "token must rise, here within %d to %lld",
                               (long long)l, (long long)(i / k), (long long)(i % k), (int)ids[i],
                               (int)least, (long long)c->ffn.experts - 1);
        }
    }
    return KL_OK;
}

static kl_status check_args(kl_ctx *ctx, const kl_model *m, const kl_forward_args *a)
{
    const int64_t T = a->N >= 0 ? a->offsets[a->N] : 0;
    KL_TRY(kl_check_offsets(ctx, "forward", a->offsets, a->N, T));
    if (m->planning)
        return kl_fail(ctx, KL_ERR_STATE,
                       "forward: this model was made for planning and has no weights");
    if (a->pass_tokens < 0 || (a->pass_tokens > 0 && a->pass_tokens < KL_PIECE))
        return kl_fail(ctx, KL_ERR_ARG, "forward: pass_tokens is %lld; it must be 0 or at least %d",
                       (long long)a->pass_tokens, KL_PIECE);
    const int64_t layers = m->config.n_layers, stop = a->stop != 0 ? a->stop : layers;
    if (a->start < 0 || a->start > stop || stop > layers || (a->start == stop && stop < layers))
        return kl_fail(ctx, KL_ERR_ARG,
                       "forward: start is %lld and stop %lld; 0 <= start < stop <= %lld must hold, "
                       "or both be that",
                       (long long)a->start, (long long)stop, (long long)layers);
    if (a->start > 0 && a->embeds == NULL)
        return kl_fail(ctx, KL_ERR_ARG, "forward: start is %lld, so embeds must be given",
                       (long long)a->start);
    if (stop < layers && a->n_logits > 0)
        return kl_fail(ctx, KL_ERR_ARG,
                       "forward: stop is %lld of %lld layers, so there are no logits to give",
                       (long long)stop, (long long)layers);
    if (T > KL_MAX_TOKENS)
        return kl_fail(ctx, KL_ERR_SHAPE, "forward: offsets end at %lld; there may be 2^%d tokens",
                       (long long)T, KL_MAX_TOKENS_LOG2);
    if (a->n_logits < 0 || a->n_logits > T)
        return kl_fail(ctx, KL_ERR_ARG,
                       "forward: n_logits is %lld; it must be 0 to %lld, the tokens",
                       (long long)a->n_logits, (long long)T);
    if (a->ids == NULL && a->embeds == NULL && T > 0)
        return kl_fail(ctx, KL_ERR_ARG, "forward: ids is NULL, so embeds must be given");
    for (int64_t t = 0; a->ids != NULL && t < T; t++)
        if (a->ids[t] < 0 || a->ids[t] >= m->config.vocab)
            return kl_fail(ctx, KL_ERR_ARG, "forward: token %lld has id %d; it must be 0 to %lld",
                           (long long)t, (int)a->ids[t], (long long)m->config.vocab - 1);
    if (a->n_logits > 0 && (a->logits == NULL || a->logit_rows == NULL))
        return kl_fail(ctx, KL_ERR_ARG,
                       "forward: n_logits is %lld, so logits and logit_rows must be given",
                       (long long)a->n_logits);
    KL_TRY(check_experts(ctx, &m->config, a, T));
    for (int64_t i = 0; i < a->n_logits; i++)
        if (a->logit_rows[i] < 0 || a->logit_rows[i] >= T
            || (i > 0 && a->logit_rows[i] <= a->logit_rows[i - 1]))
            return kl_fail(ctx, KL_ERR_ARG,
                           "forward: logit row %lld is %lld; rows must rise within 0 to %lld",
                           (long long)i, (long long)a->logit_rows[i], (long long)T - 1);
    return KL_OK;
}

static kl_status check_states(kl_ctx *ctx, const kl_model *m, const kl_forward_args *a)
{
    for (int64_t n = 0; n < a->N; n++) {
        const kl_state *s = a->states[n];
        if (s->model != m)
            return kl_fail(ctx, KL_ERR_STATE,
                           "forward: state %lld belongs to another model, or to this one before a "
                           "weight was replaced",
                           (long long)n);
        if (s->lost)
            return kl_fail(
                ctx, KL_ERR_STATE,
                "forward: state %lld was lost when a step failed after token %lld; reset it",
                (long long)n, (long long)s->position);
        const int64_t more = a->offsets[n + 1] - a->offsets[n];
        if (s->context > 0 && s->position + more > s->context)
            return kl_fail(ctx, KL_ERR_STATE,
                           "forward: state %lld has read %lld tokens and %lld more are given; it "
                           "was made for a "
                           "context of %lld",
                           (long long)n, (long long)s->position, (long long)more,
                           (long long)s->context);
        if (s->cache_type != a->states[0]->cache_type)
            return kl_fail(ctx, KL_ERR_STATE,
                           "forward: state %lld has a cache of %s, state 0 of %s", (long long)n,
                           kl_type_name(s->cache_type), kl_type_name(a->states[0]->cache_type));
    }
    return KL_OK;
}

/* Marks the first `taken` states as in use; false where the one behind them is, or is given twice. */
static bool acquire(const kl_forward_args *a, int64_t *taken)
{
    for (*taken = 0; *taken < a->N; ++*taken)
        if (atomic_exchange(&a->states[*taken]->busy, 1))
            return false;
    return true;
}

static void release(const kl_forward_args *a, int64_t taken)
{
    for (int64_t n = 0; n < taken; n++)
        atomic_store(&a->states[n]->busy, 0);
}

static kl_status run_each(pass *p, int64_t *done, int64_t pass_tokens)
{
    for (;;) {
        fill(p, done, pass_tokens);
        if (p->T == 0)
            return KL_OK;
        bind(p);
        const size_t mark = kl_scratch_mark(p->ctx);
        const kl_status status = run_guarded(p);
        kl_scratch_reset(p->ctx, mark);
        KL_TRY(status);
        for (int64_t n = 0; n < p->N; n++)
            done[p->segment[n].sequence] += p->segment[n].n;
    }
}

static kl_status run_passes(pass *p, int64_t *done, int64_t pass_tokens)
{
    const kl_activations before = p->ctx->activations;
    p->ctx->activations = p->model->config.activations;
    const kl_status status = run_each(p, done, pass_tokens);
    p->ctx->activations = before;
    return status;
}

/* Bytes of scratch of the largest pass, by running the passes with ops that only count. */
static kl_status measure(pass *p, int64_t pass_tokens, size_t *bytes)
{
    int64_t *done = calloc((size_t)p->args->N + 1, sizeof *done);
    if (done == NULL)
        return kl_fail(p->ctx, KL_ERR_MEMORY, "out of memory: plan");
    kl_measure saved;
    kl_measure_begin(p->ctx, &saved);
    const kl_status status = run_passes(p, done, pass_tokens);
    *bytes = kl_measure_end(p->ctx, &saved);
    free(done);
    return status;
}

/* Everything a call takes, taken at entry: pass tables, cache pages, scratch. */
static kl_status prepare(pass *p, int64_t pass_tokens)
{
    const kl_forward_args *a = p->args;
    size_t scratch;
    KL_TRY(new_pass(p, a->N, kl_min(pass_tokens, a->offsets[a->N])));
    KL_TRY(kl_edit_begin(p, kl_min(pass_tokens, a->offsets[a->N])));
    KL_TRY(measure(p, pass_tokens, &scratch));
    for (int64_t n = 0; n < a->N; n++)
        KL_TRY(kl_state_grow(p->ctx, a->states[n],
                             a->states[n]->position + a->offsets[n + 1] - a->offsets[n]));
    return kl_scratch_reserve(p->ctx, scratch);
}

kl_status kl_call_scratch(kl_ctx *ctx, const kl_model *model, const kl_forward_args *args,
                          size_t *bytes)
{
    const int64_t pass_tokens = args->pass_tokens > 0 ? args->pass_tokens : KL_PASS_TOKENS;
    pass p = { .ctx = ctx, .model = model, .args = args };
    kl_status status = new_pass(&p, args->N, kl_min(pass_tokens, args->offsets[args->N]));
    if (status == KL_OK)
        status = measure(&p, pass_tokens, bytes);
    free_pass(&p);
    return status;
}

/* Ends the sentence of a call that failed with what its states have read all the same. */
static void say_how_far(const pass *p, const int64_t *done)
{
    char *error = p->ctx->error;
    const size_t used = strlen(error);
    int64_t total = 0;
    for (int64_t n = 0; n < p->args->N; n++)
        total += done[n];
    if (total > 0)
        snprintf(error + used, sizeof p->ctx->error - used, "; after %lld new tokens",
                 (long long)total);
}

kl_status kl_forward(kl_ctx *ctx, const kl_model *model, const kl_forward_args *args)
{
    if (args->done != NULL && args->N > 0)
        memset(args->done, 0, (size_t)args->N * sizeof *args->done);
    KL_TRY(kl_model_check_ctx(ctx, model, "forward"));
    KL_TRY(check_args(ctx, model, args));
    int64_t taken;
    if (!acquire(args, &taken)) {
        release(args, taken);
        return kl_fail(ctx, KL_ERR_STATE, "forward: state %lld is in use, or given twice",
                       (long long)taken);
    }
    const int64_t pass_tokens = args->pass_tokens > 0 ? args->pass_tokens : KL_PASS_TOKENS;
    pass p = { .ctx = ctx, .model = model, .args = args };
    const kl_fp saved = kl_fp_default(); /* what is computed between the ops */
    int64_t *done = calloc((size_t)args->N + 1, sizeof *done);
    kl_status status = done != NULL ? check_states(ctx, model, args)
                                    : kl_fail(ctx, KL_ERR_MEMORY, "out of memory: forward");
    if (status == KL_OK)
        status = kl_settle(ctx); /* what an earlier op on a device has to tell costs no state */
    if (status == KL_OK)
        status = prepare(&p, pass_tokens);
    if (status == KL_OK)
        status = run_passes(&p, done, pass_tokens);
    if (status != KL_OK && done != NULL)
        say_how_far(&p, done);
    if (args->done != NULL && done != NULL)
        memcpy(args->done, done, (size_t)args->N * sizeof *done);
    free_pass(&p);
    free(done);
    release(args, taken);
    kl_fp_restore(saved);
    return status;
}
