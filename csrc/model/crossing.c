/* What crosses between a pass and its caller: taps and their edits, given embeddings and experts, logits. */
#include "pass.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { LOGIT_ROWS = 128 };

/* ---- taps ------------------------------------------------------------------------------------- */

static kl_status fail_not_finite(pass *p, const char *name, int64_t layer, const float *x,
                                 int64_t width, int64_t n)
{
    int64_t i = 0;
    while (isfinite(x[i]))
        i++;
    char where[32] = "";
    if (layer >= 0)
        snprintf(where, sizeof where, "layers.%lld.", (long long)layer);
    return kl_fail(p->ctx, KL_ERR_ARG, "%s%s: token %lld of sequence %lld, channel %lld is %g",
                   where, name, (long long)(p->segment[n].first + i / width),
                   (long long)p->segment[n].sequence, (long long)(i % width), (double)x[i]);
}

static bool all_finite(const float *x, int64_t n)
{
    float zero = 0.0f;
    for (int64_t i = 0; i < n; i++)
        zero += x[i] * 0.0f; /* NaN as soon as one is not finite */
    return zero == 0.0f;
}

/* Rows of segment n, on the host: at to, or in a buffer of the check. */
static kl_status check_rows(pass *p, const char *name, int64_t layer, const char *rows,
                            int64_t width, int64_t n)
{
    const int64_t values = p->segment[n].n * width;
    float *host = malloc((size_t)values * sizeof *host + 1);
    if (host == NULL)
        return kl_fail(p->ctx, KL_ERR_MEMORY, "out of memory: check of %s", name);
    kl_status status =
        p->model->backend->download(p->ctx, host, rows, (size_t)values * sizeof *host);
    if (status == KL_OK && !all_finite(host, values))
        status = fail_not_finite(p, name, layer, host, width, n);
    free(host);
    return status;
}

static size_t tap_index(const pass *p, kl_tap tap, int64_t layer)
{
    return (size_t)(layer < 0 ? p->model->config.n_layers : layer) * KL_TAP_COUNT + tap;
}

int kl_pass_edits(const pass *p, kl_tap tap, int64_t layer)
{
    return p->args->edit != NULL && p->args->edited[tap_index(p, tap, layer)];
}

int kl_pass_wants(const pass *p, kl_tap tap, int64_t layer)
{
    return kl_pass_edits(p, tap, layer)
           || (p->args->taps != NULL && p->args->taps[tap_index(p, tap, layer)] != NULL);
}

/* Values a row of a tap; 0 where the layer has no such tap. */
static int64_t tap_width(const kl_config *c, kl_tap tap, int64_t layer, const char **name,
                         int *is_int32)
{
    int64_t shape[2] = { 1, 1 };
    int n_dims = 0;
    if (!kl_tap_shape(c, tap, layer, name, shape, &n_dims, is_int32))
        return 0;
    return n_dims == 2 ? shape[0] * shape[1] : shape[0];
}

kl_status kl_edit_begin(pass *p, int64_t T)
{
    const kl_config *c = &p->model->config;
    int64_t widest = 0;
    for (int64_t layer = -1; p->args->edit != NULL && layer < c->n_layers; layer++)
        for (int tap = 0; tap < KL_TAP_COUNT; tap++) {
            const char *name;
            int is_int32;
            if (kl_pass_edits(p, (kl_tap)tap, layer))
                widest = kl_max(widest, tap_width(c, (kl_tap)tap, layer, &name, &is_int32));
        }
    if (widest == 0)
        return KL_OK;
    p->staging_bytes = (size_t)(T * widest) * 4;
    p->staging = kl_allocate(p->ctx, p->staging_bytes);
    return p->staging != NULL ? KL_OK : KL_ERR_MEMORY;
}

void kl_edit_end(pass *p)
{
    if (p->staging != NULL)
        kl_release(p->ctx, p->staging, p->staging_bytes);
    p->staging = NULL;
}

/* Rows of segment n to the host, through the caller's edit, and back. */
static kl_status edit_rows(pass *p, kl_tap tap, int64_t layer, char *rows, int64_t width, int64_t n)
{
    const int64_t count = p->segment[n].n;
    const size_t bytes = (size_t)(count * width) * 4;
    KL_TRY(p->model->backend->download(p->ctx, p->staging, rows, bytes));
    KL_TRY(p->args->edit(p->args->edit_user, p->ctx, tap, layer, kl_call_row(p, n), count, width,
                         p->staging));
    return p->model->backend->upload(p->ctx, rows, p->staging, bytes);
}

kl_status kl_tap_at(pass *p, kl_tap tap, int64_t layer, void *x)
{
    const kl_forward_args *args = p->args;
    if ((args->taps == NULL && args->edit == NULL && !args->check_finite)
        || p->ctx->arena.measuring)
        return KL_OK;
    const char *name = "";
    int is_int32 = 0;
    const int64_t width = tap_width(&p->model->config, tap, layer, &name, &is_int32);
    if (width == 0)
        return KL_OK;
    char *to = args->taps != NULL ? args->taps[tap_index(p, tap, layer)] : NULL;
    const int edited = kl_pass_edits(p, tap, layer);
    for (int64_t n = 0; n < p->N; n++) {
        char *rows = (char *)x + p->offsets[n] * width * 4;
        if (edited)
            KL_TRY(edit_rows(p, tap, layer, rows, width, n));
        if (args->check_finite && !is_int32)
            KL_TRY(check_rows(p, name, layer, rows, width, n));
        if (to != NULL)
            KL_TRY(p->model->backend->download(p->ctx, to + kl_call_row(p, n) * width * 4, rows,
                                               (size_t)(p->segment[n].n * width) * 4));
    }
    return KL_OK;
}

/* ---- what the caller gives --------------------------------------------------------------------- */

/* This pass' rows, `width` numbers of four bytes each, of those of the call. */
static kl_status upload_rows(pass *p, void *to, const void *from, int64_t width)
{
    for (int64_t n = 0; n < p->N && !p->ctx->arena.measuring; n++)
        KL_TRY(p->model->backend->upload(p->ctx, (char *)to + p->offsets[n] * width * 4,
                                         (const char *)from + kl_call_row(p, n) * width * 4,
                                         (size_t)(p->segment[n].n * width) * 4));
    return KL_OK;
}

kl_status kl_pass_embeds(pass *p, float *to, int64_t n, int64_t width)
{
    const int64_t T = p->args->offsets[p->args->N];
    for (int64_t i = 0; !p->ctx->arena.measuring && i < n; i++)
        KL_TRY(upload_rows(p, to + i * p->T * width, p->args->embeds + i * T * width, width));
    return KL_OK;
}

int kl_pass_has_experts(const pass *p, int64_t layer)
{
    return p->args->expert_ids != NULL && p->args->expert_ids[layer] != NULL;
}

kl_status kl_pass_experts(pass *p, int64_t layer, int32_t *ids)
{
    return upload_rows(p, ids, p->args->expert_ids[layer], p->model->config.ffn.k);
}

/* ---- logits ------------------------------------------------------------------------------------ */

/* First index whose row is >= row. */
static int64_t lower_bound(const int64_t *rows, int64_t n, int64_t row)
{
    int64_t low = 0, high = n;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (rows[middle] < row)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The wanted rows of segment n, [*first, *last) of logit_rows. */
static void wanted_rows(const pass *p, int64_t n, int64_t *first, int64_t *last)
{
    const kl_forward_args *a = p->args;
    const int64_t row = kl_call_row(p, n);
    *first = lower_bound(a->logit_rows, a->n_logits, row);
    *last = lower_bound(a->logit_rows, a->n_logits, row + p->segment[n].n);
}

static kl_status logits_of(pass *p, const float *h, const int32_t *rows, const int64_t *to,
                           int64_t n)
{
    const kl_model *m = p->model;
    const int64_t D = m->config.D, vocab = m->config.vocab;
    const void *address = h;
    const kl_weight table = { &address, 1, p->T, D, (size_t)D * sizeof(float), KL_F32, 0 };
    float *gathered, *logits;
    const size_t mark = kl_scratch_mark(p->ctx);
    KL_SCRATCH(gathered, p->ctx, n * D);
    KL_SCRATCH(logits, p->ctx, n * vocab);
    KL_TRY(kl_embedding(p->ctx, gathered, rows, &table, n));
    KL_TRY(kl_linear(p->ctx, &logits, gathered, &m->head, NULL, 1, n, D));
    for (int64_t i = 0, run; i < n && !p->ctx->arena.measuring; i += run) {
        for (run = 1; i + run < n && to[i + run] == to[i] + run; run++) {
        }
        KL_TRY(m->backend->download(p->ctx, p->args->logits + to[i] * vocab, logits + i * vocab,
                                    (size_t)(run * vocab) * sizeof(float)));
    }
    kl_scratch_reset(p->ctx, mark);
    return KL_OK;
}

kl_status kl_pass_logits(pass *p, const float *h)
{
    int32_t rows[LOGIT_ROWS];
    int64_t to[LOGIT_ROWS], n = 0;
    for (int64_t s = 0; s < p->N; s++) {
        int64_t first, last;
        wanted_rows(p, s, &first, &last);
        for (int64_t i = first; i < last; i++) {
            rows[n] = (int32_t)(p->offsets[s] + p->args->logit_rows[i] - kl_call_row(p, s));
            to[n++] = i;
            if (n == LOGIT_ROWS) {
                KL_TRY(logits_of(p, h, rows, to, n));
                n = 0;
            }
        }
    }
    return n > 0 ? logits_of(p, h, rows, to, n) : KL_OK;
}
