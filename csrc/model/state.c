/* The state of one sequence: a fixed block (convolution histories and delta states of all KDA layers) and a
 * cache in pages of KL_PAGE positions (all MLA layers in each page), so that growing moves nothing. */
#include "model.h"

#include <stdlib.h>
#include <string.h>

size_t kl_state_page_bytes(const kl_state *state)
{
    return kl_type_bytes(state->cache_type, (int64_t)state->model->state.page_values);
}

static void release_pages(kl_ctx *ctx, kl_state *state)
{
    for (int64_t i = 0; i < state->n_pages; i++)
        state->model->backend->release(ctx, state->page[i], kl_state_page_bytes(state));
    state->n_pages = 0;
}

kl_status kl_state_grow(kl_ctx *ctx, kl_state *state, int64_t n)
{
    const size_t bytes = kl_state_page_bytes(state);
    const int64_t wanted = bytes > 0 ? kl_ceil_div(n, KL_PAGE) : 0;
    if (wanted > state->page_capacity) {
        const int64_t capacity = kl_max(wanted, 2 * state->page_capacity);
        void **page = realloc(state->page, (size_t)capacity * sizeof *page);
        if (page == NULL)
            return kl_fail(ctx, KL_ERR_MEMORY, "out of memory: page table of %lld pages",
                           (long long)capacity);
        state->page = page;
        state->page_capacity = capacity;
    }
    while (state->n_pages < wanted) {
        void *page = state->model->backend->allocate(ctx, bytes);
        if (page == NULL)
            return kl_fail(ctx, KL_ERR_MEMORY, "out of memory: cache page %lld of %zu bytes",
                           (long long)state->n_pages, bytes);
        state->page[state->n_pages++] = page;
    }
    return KL_OK;
}

kl_status kl_state_create(kl_ctx *ctx, kl_state **out, const kl_model *model, kl_type cache_type,
                          int64_t context)
{
    *out = NULL;
    if (cache_type != KL_F32 && cache_type != KL_F16)
        return kl_fail(ctx, KL_ERR_DTYPE, "cache is of type %d; it must be F32 or F16",
                       (int)cache_type);
    if (context < 0)
        return kl_fail(ctx, KL_ERR_ARG, "context is %lld; it must be >= 0", (long long)context);
    kl_state *state = calloc(1, sizeof *state);
    if (state == NULL)
        return kl_fail(ctx, KL_ERR_MEMORY, "out of memory: state");
    state->model = model;
    state->cache_type = cache_type;
    state->context = context;
    state->fixed = model->backend->allocate(ctx, model->state.fixed_bytes);
    kl_status status = state->fixed != NULL
                           ? model->backend->clear(ctx, state->fixed, model->state.fixed_bytes)
                           : kl_fail(ctx, KL_ERR_MEMORY, "out of memory: state of %zu bytes",
                                     model->state.fixed_bytes);
    if (status == KL_OK)
        status = kl_state_grow(ctx, state, context);
    if (status != KL_OK)
        kl_state_destroy(ctx, state);
    else
        *out = state;
    return status;
}

void kl_state_destroy(kl_ctx *ctx, kl_state *state)
{
    if (state == NULL)
        return;
    release_pages(ctx, state);
    if (state->fixed != NULL)
        state->model->backend->release(ctx, state->fixed, state->model->state.fixed_bytes);
    free(state->page);
    free(state);
}

int64_t kl_state_position(const kl_state *state) { return state->position; }

size_t kl_state_bytes(const kl_state *state)
{
    return state->model->state.fixed_bytes + (size_t)state->n_pages * kl_state_page_bytes(state);
}

void kl_state_reset(kl_ctx *ctx, kl_state *state)
{
    (void)state->model->backend->clear(ctx, state->fixed, state->model->state.fixed_bytes);
    state->position = 0;
    state->lost = 0;
}

/* ---- parts ---- */

kl_status kl_state_shape(kl_ctx *ctx, const kl_state *state, int64_t layer, kl_state_part part,
                         int64_t shape[3], int *n_dims, kl_type *type)
{
    const kl_config *c = &state->model->config;
    const bool cache = part == KL_STATE_LATENT || part == KL_STATE_K_SHARED;
    if (layer < 0 || layer >= c->n_layers || (int)part < 0 || part > KL_STATE_K_SHARED
        || (c->layers[layer].mixer == KL_MIXER_MLA) != cache)
        return kl_fail(ctx, KL_ERR_ARG, "state: layer %lld of %lld has no part %d",
                       (long long)layer, (long long)c->n_layers, (int)part);
    *type = cache ? state->cache_type : KL_F32;
    *n_dims = part == KL_STATE_DELTA ? 3 : 2;
    if (part == KL_STATE_DELTA) {
        shape[0] = c->kda.heads;
        shape[1] = shape[2] = c->kda.width;
    } else if (cache) {
        shape[0] = state->position;
        shape[1] = part == KL_STATE_LATENT ? c->mla.rank : c->mla.rope;
    } else {
        shape[0] = c->kda.taps - 1;
        shape[1] = c->kda.heads * c->kda.width;
    }
    return KL_OK;
}

static size_t fixed_offset(const layer_layout *at, kl_state_part part)
{
    switch (part) {
    case KL_STATE_DELTA: return at->delta;
    case KL_STATE_Q_HISTORY: return at->q_history;
    case KL_STATE_K_HISTORY: return at->k_history;
    default: return at->v_history;
    }
}

typedef kl_status (*mover)(kl_ctx *ctx, void *to, const void *from, size_t n_bytes);

/* Moves a part between its place and a host array; out: from the state to the host. */
static kl_status move_part(kl_ctx *ctx, const kl_state *state, int64_t layer, kl_state_part part,
                           char *host, bool out)
{
    int64_t shape[3] = { 0, 0, 1 };
    int n_dims;
    kl_type type;
    KL_TRY(kl_state_shape(ctx, state, layer, part, shape, &n_dims, &type));
    const layer_layout *at = &state->model->layout[layer];
    const mover move = out ? state->model->backend->download : state->model->backend->upload;
    if (part != KL_STATE_LATENT && part != KL_STATE_K_SHARED) {
        char *place = state->fixed + fixed_offset(at, part);
        const size_t bytes =
            (size_t)(shape[0] * shape[1] * (n_dims == 3 ? shape[2] : 1)) * sizeof(float);
        return out ? move(ctx, host, place, bytes) : move(ctx, place, host, bytes);
    }
    const size_t offset =
        kl_type_bytes(type, (int64_t)(part == KL_STATE_LATENT ? at->latent : at->k_shared));
    const size_t row = kl_type_bytes(type, shape[1]);
    for (int64_t i = 0; i * KL_PAGE < shape[0]; i++) {
        char *place = (char *)state->page[i] + offset;
        const size_t bytes = (size_t)kl_min(KL_PAGE, shape[0] - i * KL_PAGE) * row;
        char *mine = host + (size_t)(i * KL_PAGE) * row;
        KL_TRY(out ? move(ctx, mine, place, bytes) : move(ctx, place, mine, bytes));
    }
    return KL_OK;
}

kl_status kl_state_read(kl_ctx *ctx, const kl_state *state, int64_t layer, kl_state_part part,
                        void *to)
{
    return move_part(ctx, state, layer, part, to, true);
}

kl_status kl_state_write(kl_ctx *ctx, kl_state *state, int64_t layer, kl_state_part part,
                         const void *from)
{
    return move_part(ctx, state, layer, part, (char *)(uintptr_t)from, false);
}
