/* The state of one sequence: a fixed block (convolution histories and delta states of all delta nets) and a
 * cache in pages of KL_PAGE positions (all layers of attention in each page), so that growing moves nothing. */
#include "../system.h"
#include "model.h"

#include <stdlib.h>
#include <string.h>

static size_t page_bytes(const kl_state *state)
{
    return kl_cache_page_bytes(state->model, state->cache_type);
}

/* ---- memory ---- */

static void release_pages(kl_ctx *ctx, kl_state *state)
{
    for (int64_t i = 0; i < state->n_pages; i++)
        state->model->backend->release(ctx, state->page[i], page_bytes(state));
    state->n_pages = 0;
}

kl_status kl_state_grow(kl_ctx *ctx, kl_state *state, int64_t n)
{
    const size_t bytes = page_bytes(state);
    const int64_t wanted = bytes > 0 ? kl_ceil_div(n, KL_PAGE) : 0;
    int64_t all = 0;
    /* the system would promise more than it has, and end the process when it is used */
    if (wanted > state->n_pages && state->model->backend == &kl_cpu_backend
        && (!kl_mul(&all, wanted, (int64_t)bytes) || all > kl_memory()))
        return kl_fail(ctx, KL_ERR_MEMORY,
                       "out of memory: a cache of %lld positions has %lld pages of %zu bytes; this "
                       "machine has %lld bytes",
                       (long long)n, (long long)wanted, bytes, (long long)kl_memory());
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
    KL_TRY(kl_model_check_ctx(ctx, model, "state"));
    KL_TRY(kl_cache_check(ctx, model, cache_type));
    if (context < 0 || context > KL_MAX_TOKENS)
        return kl_fail(ctx, KL_ERR_ARG, "context is %lld; it must be 0 to 2^%d", (long long)context,
                       KL_MAX_TOKENS_LOG2);
    kl_state *state = calloc(1, sizeof *state);
    if (state == NULL)
        return kl_fail(ctx, KL_ERR_MEMORY, "out of memory: state");
    state->model = model;
    state->cache_type = cache_type;
    state->context = context;
    state->fixed = model->backend->allocate(ctx, model->fixed_bytes);
    kl_status status =
        state->fixed != NULL
            ? model->backend->clear(ctx, state->fixed, model->fixed_bytes)
            : kl_fail(ctx, KL_ERR_MEMORY, "out of memory: state of %zu bytes", model->fixed_bytes);
    if (status == KL_OK)
        status = kl_state_grow(ctx, state, context);
    if (status == KL_OK)
        status = kl_settle(ctx);
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
        state->model->backend->release(ctx, state->fixed, state->model->fixed_bytes);
    if (state->checkpoint != NULL)
        state->model->backend->release(ctx, state->checkpoint,
                                       (size_t)state->keep * state->model->fixed_bytes);
    free(state->checkpoint_at);
    free(state->page);
    free(state);
}

int64_t kl_state_position(const kl_state *state) { return state->position; }

size_t kl_state_bytes(const kl_state *state)
{
    return (size_t)(1 + state->keep) * state->model->fixed_bytes
           + (size_t)state->n_pages * page_bytes(state);
}

void kl_state_reset(kl_ctx *ctx, kl_state *state)
{
    (void)state->model->backend->clear(ctx, state->fixed, state->model->fixed_bytes);
    state->position = 0;
    state->lost = 0;
    state->n_checkpoints = state->oldest = 0;
    state->past_start = 0;
}

kl_status kl_state_acquire(kl_ctx *ctx, kl_state *state, const char *who)
{
    KL_TRY(kl_model_check_ctx(ctx, state->model, who));
    if (atomic_exchange(&state->busy, 1))
        return kl_fail(ctx, KL_ERR_STATE, "%s: the state is in use by another call", who);
    return KL_OK;
}

void kl_state_release(kl_state *state) { atomic_store(&state->busy, 0); }

/* ---- parts ---- */

static bool is_cache(kl_state_part part) { return part >= KL_STATE_LATENT; }

/* Whether a layer has the part. */
static bool has_part(const kl_config *c, int64_t layer, kl_state_part part)
{
    switch (c->layers[layer].mixer) {
    case KL_MIXER_KDA:
    case KL_MIXER_GDN: return !is_cache(part);
    case KL_MIXER_MLA:
        return part == KL_STATE_LATENT || part == KL_STATE_K_SHARED
               || (c->index.heads > 0 && part >= KL_STATE_INDEX_K);
    case KL_MIXER_ATTN: return part == KL_STATE_KEYS || part == KL_STATE_VALUES;
    }
    return false;
}

/* Positions that share a row of a part of the cache. */
static int64_t positions_of_row(const kl_config *c, kl_state_part part)
{
    return part == KL_STATE_POOL ? c->index.pool : 1;
}

kl_status kl_state_shape(kl_ctx *ctx, const kl_state *state, int64_t layer, kl_state_part part,
                         int64_t shape[3], int *n_dims, kl_type *type)
{
    const kl_config *c = &state->model->config;
    if (layer < 0 || layer >= c->n_layers || (int)part < 0 || part > KL_STATE_POOL
        || !has_part(c, layer, part))
        return kl_fail(ctx, KL_ERR_ARG, "state: layer %lld of %lld has no part %d",
                       (long long)layer, (long long)c->n_layers, (int)part);
    *type = KL_F32;
    *n_dims = 2;
    shape[2] = 1;
    if (part == KL_STATE_DELTA) {
        *n_dims = 3;
        shape[0] = c->delta.Hv;
        shape[1] = c->delta.K;
        shape[2] = c->delta.V;
    } else if (is_cache(part)) {
        *type = kl_cache_of(state->model, state->cache_type, layer, part).type;
        const int64_t pool = positions_of_row(c, part);
        shape[0] = state->position / pool;
        shape[1] = kl_cache_width(state->model, layer, part) * pool;
    } else {
        shape[0] = c->delta.taps - 1;
        shape[1] = part == KL_STATE_V_HISTORY ? c->delta.Hv * c->delta.V : c->delta.Hk * c->delta.K;
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

/* Moves a part between its place, in a fixed block or the cache, and a host array; out: to the host. */
static kl_status move_part(kl_ctx *ctx, const kl_state *state, char *fixed, int64_t layer,
                           kl_state_part part, char *host, bool out)
{
    int64_t shape[3];
    int n_dims;
    kl_type type;
    KL_TRY(kl_model_check_ctx(ctx, state->model, "state"));
    KL_TRY(kl_state_shape(ctx, state, layer, part, shape, &n_dims, &type));
    const layer_layout *at = &state->model->layout[layer];
    const mover move = out ? state->model->backend->download : state->model->backend->upload;
    if (!is_cache(part)) {
        char *place = fixed + fixed_offset(at, part);
        const size_t bytes = (size_t)(shape[0] * shape[1] * shape[2]) * sizeof(float);
        return out ? move(ctx, host, place, bytes) : move(ctx, place, host, bytes);
    }
    const kl_cache cache = kl_cache_of(state->model, state->cache_type, layer, part);
    const int64_t positions = shape[0] * positions_of_row(&state->model->config, part);
    for (int64_t i = 0; i * KL_PAGE < positions; i++) {
        char *place = (char *)state->page[i] + cache.offset;
        const size_t bytes = (size_t)kl_min(KL_PAGE, positions - i * KL_PAGE) * cache.row_bytes;
        char *mine = host + (size_t)(i * KL_PAGE) * cache.row_bytes;
        KL_TRY(out ? move(ctx, mine, place, bytes) : move(ctx, place, mine, bytes));
    }
    return KL_OK;
}

static kl_status fail_lost(kl_ctx *ctx, const kl_state *state, const char *who)
{
    return kl_fail(ctx, KL_ERR_STATE,
                   "%s: the state was lost when a step failed after token %lld; reset it", who,
                   (long long)state->position);
}

kl_status kl_state_read(kl_ctx *ctx, const kl_state *state, int64_t layer, kl_state_part part,
                        void *to)
{
    if (state->lost)
        return fail_lost(ctx, state, "read");
    return move_part(ctx, state, state->fixed, layer, part, to, true);
}

kl_status kl_state_write(kl_ctx *ctx, kl_state *state, int64_t layer, kl_state_part part,
                         const void *from)
{
    return move_part(ctx, state, state->fixed, layer, part, (char *)(uintptr_t)from, false);
}

/* ---- checkpoints ---- */

kl_status kl_state_keep(kl_ctx *ctx, kl_state *state, int64_t every, int64_t keep)
{
    const size_t bytes = state->model->fixed_bytes;
    int64_t total;
    KL_TRY(kl_model_check_ctx(ctx, state->model, "state"));
    if (every < 1 || every > KL_MAX_TOKENS || keep < 1)
        return kl_fail(
            ctx, KL_ERR_ARG,
            "state: a checkpoint every %lld tokens, of which %lld are kept; both must be "
            ">= 1, the first at most 2^%d",
            (long long)every, (long long)keep, KL_MAX_TOKENS_LOG2);
    if (state->position != 0 || state->keep != 0)
        return kl_fail(ctx, KL_ERR_STATE,
                       "state: checkpoints are asked for once, before the first token");
    if (kl_mul(&total, keep, (int64_t)bytes))
        state->checkpoint_at = calloc((size_t)keep, sizeof *state->checkpoint_at);
    if (state->checkpoint_at != NULL)
        state->checkpoint = state->model->backend->allocate(ctx, (size_t)total);
    if (state->checkpoint == NULL) {
        free(state->checkpoint_at);
        state->checkpoint_at = NULL;
        return kl_fail(ctx, KL_ERR_MEMORY, "out of memory: %lld checkpoints of %zu bytes",
                       (long long)keep, bytes);
    }
    state->every = every;
    state->keep = keep;
    return KL_OK;
}

static int64_t slot(const kl_state *state, int64_t i) { return (state->oldest + i) % state->keep; }

static char *checkpoint_data(const kl_state *state, int64_t i)
{
    return state->checkpoint + (size_t)slot(state, i) * state->model->fixed_bytes;
}

kl_status kl_state_read_checkpoint(kl_ctx *ctx, const kl_state *state, int64_t i, int64_t layer,
                                   kl_state_part part, void *to)
{
    if (i < 0 || i >= state->n_checkpoints || is_cache(part))
        return kl_fail(ctx, KL_ERR_ARG, "state: checkpoint %lld of %lld has no part %d",
                       (long long)i, (long long)state->n_checkpoints, (int)part);
    return move_part(ctx, state, checkpoint_data(state, i), layer, part, to, true);
}

int64_t kl_state_checkpoints(const kl_state *state, int64_t *at)
{
    for (int64_t i = 0; i < state->n_checkpoints; i++)
        at[i] = state->checkpoint_at[slot(state, i)];
    return state->n_checkpoints;
}

int64_t kl_state_next_checkpoint(const kl_state *state, int64_t position)
{
    return state->every > 0 ? (position / state->every + 1) * state->every : INT64_MAX;
}

/* Copies the fixed block to the ring's newest place; a second checkpoint of one position replaces the first. */
static kl_status push(kl_ctx *ctx, kl_state *state, int64_t position)
{
    const int64_t n = state->n_checkpoints;
    if (n > 0 && state->checkpoint_at[slot(state, n - 1)] == position)
        state->n_checkpoints--;
    else if (n == state->keep) {
        state->oldest = slot(state, 1);
        state->n_checkpoints--;
        state->past_start = 1;
    }
    KL_TRY(state->model->backend->copy(ctx, checkpoint_data(state, state->n_checkpoints),
                                       state->fixed, state->model->fixed_bytes));
    state->checkpoint_at[slot(state, state->n_checkpoints)] = position;
    state->n_checkpoints++;
    return KL_OK;
}

void kl_state_advance(kl_ctx *ctx, kl_state *state, int64_t end)
{
    const bool due = end >= kl_state_next_checkpoint(state, state->position);
    state->position = end;
    if (due)
        (void)push(ctx, state, end);
}

kl_status kl_state_checkpoint(kl_ctx *ctx, kl_state *state)
{
    return kl_state_checkpoint_at(ctx, state, state->position);
}

kl_status kl_state_checkpoint_at(kl_ctx *ctx, kl_state *state, int64_t n)
{
    if (state->keep == 0)
        return kl_fail(ctx, KL_ERR_STATE, "checkpoint: the state was made to keep none");
    KL_TRY(kl_state_acquire(ctx, state, "checkpoint"));
    const int64_t last = state->n_checkpoints - 1;
    const int64_t newest = last >= 0 ? state->checkpoint_at[slot(state, last)] : 0;
    kl_status status;
    if (state->lost)
        status = fail_lost(ctx, state, "checkpoint");
    else if (n < newest || n > state->position)
        status = kl_fail(ctx, KL_ERR_ARG, "checkpoint: n is %lld; it must be %lld to %lld",
                         (long long)n, (long long)newest, (long long)state->position);
    else
        status = push(ctx, state, n);
    if (status == KL_OK)
        status = kl_settle(ctx);
    kl_state_release(state);
    return status;
}

static kl_status truncate_to(kl_ctx *ctx, kl_state *state, int64_t n)
{
    int64_t i = state->n_checkpoints;
    while (i > 0 && state->checkpoint_at[slot(state, i - 1)] > n)
        i--;
    if (n == 0 || (i == 0 && state->keep > 0 && !state->past_start)) {
        kl_state_reset(ctx, state);
        return KL_OK;
    }
    if (state->keep == 0)
        return kl_fail(
            ctx, KL_ERR_ARG,
            "truncate: n is %lld and the state keeps no checkpoints; it can stay at %lld or go "
            "back to 0",
            (long long)n, (long long)state->position);
    if (i == 0)
        return kl_fail(
            ctx, KL_ERR_ARG,
            "truncate: n is %lld; the oldest position that the state can go back to is %lld, "
            "but for 0",
            (long long)n,
            (long long)(state->n_checkpoints > 0 ? state->checkpoint_at[slot(state, 0)]
                                                 : state->position));
    KL_TRY(state->model->backend->copy(ctx, state->fixed, checkpoint_data(state, i - 1),
                                       state->model->fixed_bytes));
    state->n_checkpoints = i;
    state->position = state->checkpoint_at[slot(state, i - 1)];
    state->lost = 0;
    return KL_OK;
}

kl_status kl_state_truncate(kl_ctx *ctx, kl_state *state, int64_t n, int64_t *position)
{
    KL_TRY(kl_state_acquire(ctx, state, "truncate"));
    kl_status status = KL_OK;
    if (n < 0 || n > state->position)
        status = kl_fail(ctx, KL_ERR_ARG, "truncate: n is %lld; it must be 0 to %lld", (long long)n,
                         (long long)state->position);
    else if (n < state->position || state->lost)
        status = truncate_to(ctx, state, n);
    if (status == KL_OK)
        status = kl_settle(ctx);
    *position = state->position;
    kl_state_release(state);
    return status;
}

/* ---- copies ---- */

static kl_status check_copy(kl_ctx *ctx, const kl_state *to, const kl_state *from)
{
    if (to->model != from->model)
        return kl_fail(ctx, KL_ERR_STATE, "copy: the states belong to two models");
    if (to->cache_type != from->cache_type)
        return kl_fail(ctx, KL_ERR_STATE, "copy: one state has a cache of %s, the other of %s",
                       kl_type_name(to->cache_type), kl_type_name(from->cache_type));
    if (from->lost)
        return fail_lost(ctx, from, "copy");
    if (to->context > 0 && from->position > to->context)
        return kl_fail(ctx, KL_ERR_STATE,
                       "copy: %lld tokens were read; the state was made for a context of %lld",
                       (long long)from->position, (long long)to->context);
    return KL_OK;
}

static kl_status copy_checkpoints(kl_ctx *ctx, kl_state *to, const kl_state *from)
{
    const size_t bytes = from->model->fixed_bytes;
    const int64_t n = kl_min(to->keep, from->n_checkpoints), skip = from->n_checkpoints - n;
    to->oldest = to->n_checkpoints = 0;
    to->past_start = from->past_start || skip > 0 || (from->keep == 0 && from->position > 0);
    for (int64_t i = 0; i < n; i++) {
        KL_TRY(from->model->backend->copy(ctx, checkpoint_data(to, i),
                                          checkpoint_data(from, skip + i), bytes));
        to->checkpoint_at[i] = from->checkpoint_at[slot(from, skip + i)];
        to->n_checkpoints++;
    }
    return KL_OK;
}

static kl_status copy_all(kl_ctx *ctx, kl_state *to, const kl_state *from)
{
    const kl_backend *backend = from->model->backend;
    const int64_t n_pages = page_bytes(from) > 0 ? kl_ceil_div(from->position, KL_PAGE) : 0;
    KL_TRY(check_copy(ctx, to, from));
    KL_TRY(kl_state_grow(ctx, to, from->position));
    KL_TRY(kl_settle(ctx));
    to->lost = 1; /* until all of it is there: a device's copy may fail in the middle */
    KL_TRY(backend->copy(ctx, to->fixed, from->fixed, from->model->fixed_bytes));
    for (int64_t i = 0; i < n_pages; i++)
        KL_TRY(backend->copy(ctx, to->page[i], from->page[i], page_bytes(from)));
    KL_TRY(copy_checkpoints(ctx, to, from));
    KL_TRY(kl_settle(ctx));
    to->position = from->position;
    to->lost = 0;
    return KL_OK;
}

kl_status kl_state_copy(kl_ctx *ctx, kl_state *to, kl_state *from)
{
    KL_TRY(kl_state_acquire(ctx, from, "copy"));
    kl_status status = kl_state_acquire(ctx, to, "copy");
    if (status == KL_OK) {
        status = copy_all(ctx, to, from);
        kl_state_release(to);
    }
    kl_state_release(from);
    return status;
}

static kl_status fill(kl_ctx *ctx, kl_state *state, int64_t n)
{
    if (n > KL_MAX_TOKENS)
        return kl_fail(ctx, KL_ERR_ARG, "state: %lld tokens are to be filled in; there may be 2^%d",
                       (long long)n, KL_MAX_TOKENS_LOG2);
    if (state->position != 0 || n < 0)
        return kl_fail(
            ctx, KL_ERR_STATE,
            "state: %lld tokens are to be filled in and %lld were read; it must be empty",
            (long long)n, (long long)state->position);
    if (state->context > 0 && n > state->context)
        return kl_fail(ctx, KL_ERR_STATE,
                       "state: %lld tokens were read; the state was made for a context of %lld",
                       (long long)n, (long long)state->context);
    KL_TRY(kl_state_grow(ctx, state, n));
    state->position = n;
    state->past_start = 1;
    return KL_OK;
}

kl_status kl_state_fill(kl_ctx *ctx, kl_state *state, int64_t n)
{
    KL_TRY(kl_state_acquire(ctx, state, "state"));
    const kl_status status = fill(ctx, state, n);
    kl_state_release(state);
    return status;
}
