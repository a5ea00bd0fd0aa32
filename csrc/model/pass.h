/* A pass: up to pass_tokens new tokens of one or more sequences, through the whole model at once. */
#ifndef KL_PASS_H
#define KL_PASS_H

#include "../ops/pieces.h"
#include "model.h"

enum { KL_PASS_TOKENS = 512 };

/* Tokens first..first+n-1 of one sequence's new ones. */
typedef struct segment {
    int64_t sequence, first, n;
} segment;

typedef struct pass {
    kl_ctx *ctx;
    const kl_model *model;
    const kl_forward_args *args;

    int64_t T, N;
    segment *segment;   /* [N] */
    int64_t *offsets;   /* [N+1] in the pass */
    int64_t *start;     /* [N] positions before the pass */
    int64_t *end;       /* [N] positions after it */
    void **fixed;       /* [N] fixed block of each sequence's state */
    void *const **page; /* [N] page table of each */
    kl_type cache_type;
    int32_t *ids;       /* [T] */
    int64_t *positions; /* [T] of each token in its sequence */
    void *staging;      /* on the host, for rows that are edited; NULL where none are */
    size_t staging_bytes;
} pass;

/* Where an intermediate is made: x [T, ...] is edited, checked and handed to whoever asked for it.
 * layer -1: the model's own. */
kl_status kl_tap_at(pass *p, kl_tap tap, int64_t layer, void *x);

/* Whether the call edits a tap, and whether it edits it or asks for it. */
int kl_pass_edits(const pass *p, kl_tap tap, int64_t layer);
int kl_pass_wants(const pass *p, kl_tap tap, int64_t layer);

/* Takes the staging of edits for passes of up to T tokens; kl_edit_end gives it back. */
kl_status kl_edit_begin(pass *p, int64_t T);
void kl_edit_end(pass *p);

/* The rows of this pass of n arrays that the caller gives in place of embeddings, to `to` [n, T, width]. */
kl_status kl_pass_embeds(pass *p, float *to, int64_t n, int64_t width);

/* Routing that the caller gives: whether there is any for the layer, and its ids [T, k] of this pass. */
int kl_pass_has_experts(const pass *p, int64_t layer);
kl_status kl_pass_experts(pass *p, int64_t layer, int32_t *ids);

/* The head over the rows of this pass whose logits are wanted, h [T, D] normed, to the host. */
kl_status kl_pass_logits(pass *p, const float *h);

/* Row of the call that holds row 0 of segment n. */
static inline int64_t kl_call_row(const pass *p, int64_t n)
{
    return p->args->offsets[p->segment[n].sequence] + p->segment[n].first;
}

/* Layers first..last-1 are run. */
static inline int64_t kl_first_layer(const pass *p) { return p->args->start; }
static inline int64_t kl_last_layer(const pass *p)
{
    return p->args->stop > 0 ? p->args->stop : p->model->config.n_layers;
}

/* Bytes of scratch that the call would take; its states need no memory. */
kl_status kl_call_scratch(kl_ctx *ctx, const kl_model *model, const kl_forward_args *args,
                          size_t *bytes);

/* forward.c: the model itself */
kl_status kl_pass_run(pass *p);

#endif
