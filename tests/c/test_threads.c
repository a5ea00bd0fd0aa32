/* Two threads share a model, each with its own context and states: both get the bytes that one alone gets. */
#define _POSIX_C_SOURCE 200809L
#include "small_model.h"

#include <pthread.h>

enum { THREADS = 2, CALLS = 5, LENGTH = 90 };

typedef struct reader {
    const kl_model *model;
    int number, pool;
    float logits[CALLS][VOCAB];
    int failures;
} reader;

/* Calls of 70, 1, 1, 17 and 1 tokens, the last logits of each. */
static void *read_all(void *arg)
{
    static const int64_t lengths[CALLS] = { 70, 1, 1, 17, 1 };
    reader *r = arg;
    const kl_ctx_options options = { .threads = r->pool };
    kl_ctx *ctx;
    kl_state *state;
    if (kl_ctx_create(&ctx, &options) != KL_OK
        || kl_state_create(ctx, &state, r->model, KL_F32, 0) != KL_OK) {
        r->failures++;
        return NULL;
    }
    for (int call = 0; call < CALLS; call++) {
        int32_t ids[LENGTH];
        const int64_t offsets[] = { 0, lengths[call] }, rows[] = { lengths[call] - 1 };
        for (int64_t t = 0; t < lengths[call]; t++)
            ids[t] = (int32_t)((t * 5 + call * 3 + r->number) % VOCAB);
        const kl_forward_args args = { .ids = ids,
                                       .offsets = offsets,
                                       .N = 1,
                                       .states = &state,
                                       .logits = r->logits[call],
                                       .logit_rows = rows,
                                       .n_logits = 1 };
        r->failures += kl_forward(ctx, r->model, &args) != KL_OK;
    }
    kl_state_destroy(ctx, state);
    kl_ctx_destroy(ctx);
    return NULL;
}

/* A state that two calls want at once: one of them is refused, and the state is as after the other. */
typedef struct wanted {
    const kl_model *model;
    kl_state *state;
    int read, refused, other;
} wanted;

static void *want_state(void *arg)
{
    wanted *w = arg;
    kl_ctx *ctx;
    if (kl_ctx_create(&ctx, NULL) != KL_OK) {
        w->other++;
        return NULL;
    }
    for (int call = 0; call < 20; call++) {
        const int32_t ids[] = { 1, 2, 3 };
        const int64_t offsets[] = { 0, 3 };
        const kl_forward_args args = {
            .ids = ids, .offsets = offsets, .N = 1, .states = &w->state
        };
        const kl_status status = kl_forward(ctx, w->model, &args);
        w->read += status == KL_OK;
        w->refused += status == KL_ERR_STATE && strstr(kl_ctx_error(ctx), "in use") != NULL;
    }
    kl_ctx_destroy(ctx);
    return NULL;
}

static void test_one_state(kl_ctx *ctx, const kl_model *model)
{
    kl_state *state;
    pthread_t thread[THREADS];
    wanted w[THREADS];
    int read = 0;
    CHECK(kl_state_create(ctx, &state, model, KL_F32, 200) == KL_OK);
    for (int i = 0; i < THREADS; i++) {
        w[i] = (wanted){ .model = model, .state = state };
        CHECK(pthread_create(&thread[i], NULL, want_state, &w[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++) {
        CHECK(pthread_join(thread[i], NULL) == 0);
        CHECK(w[i].read + w[i].refused == 20 && w[i].other == 0);
        read += w[i].read;
    }
    CHECK(kl_state_position(state) == 3 * read);
    kl_state_destroy(ctx, state);
}

static void *cancel(void *arg)
{
    kl_ctx_cancel(arg);
    return NULL;
}

/* Cancelled from another thread, some time in a call or before it: the call is stopped, or the next one is. */
static void test_cancel(kl_ctx *ctx, const kl_model *model)
{
    kl_state *state;
    pthread_t thread;
    int32_t ids[512] = { 0 };
    const int64_t offsets[] = { 0, 512 };
    CHECK(kl_state_create(ctx, &state, model, KL_F32, 0) == KL_OK);
    const kl_forward_args args = {
        .ids = ids, .offsets = offsets, .N = 1, .states = &state, .pass_tokens = 64
    };
    int stopped = 0;
    CHECK(pthread_create(&thread, NULL, cancel, ctx) == 0);
    for (int call = 0; call < 3; call++)
        stopped += kl_forward(ctx, model, &args) == KL_ERR_INTERRUPTED;
    CHECK(pthread_join(thread, NULL) == 0);
    stopped += kl_forward(ctx, model, &args) == KL_ERR_INTERRUPTED;
    CHECK(stopped == 1 && kl_state_position(state) % 64 == 0);
    kl_state_destroy(ctx, state);
}

int main(void)
{
    static reader alone[THREADS], together[THREADS];
    const kl_config c = config();
    pthread_t thread[THREADS];
    kl_ctx *ctx;
    kl_model *model;
    make_checkpoint();
    CHECK(kl_ctx_create(&ctx, NULL) == KL_OK);
    CHECK(kl_model_create(ctx, &model, &c, tensors, n_tensors, 0) == KL_OK);
    for (int pool = 1; pool <= 3; pool++) {
        for (int i = 0; i < THREADS; i++) {
            alone[i] = (reader){ .model = model, .number = i, .pool = 1 };
            read_all(&alone[i]);
        }
        for (int i = 0; i < THREADS; i++) {
            together[i] = (reader){ .model = model, .number = i, .pool = pool };
            CHECK(pthread_create(&thread[i], NULL, read_all, &together[i]) == 0);
        }
        for (int i = 0; i < THREADS; i++) {
            CHECK(pthread_join(thread[i], NULL) == 0);
            CHECK(alone[i].failures == 0 && together[i].failures == 0);
            CHECK(memcmp(alone[i].logits, together[i].logits, sizeof alone[i].logits) == 0);
        }
    }
    test_one_state(ctx, model);
    test_cancel(ctx, model);
    kl_model_destroy(ctx, model);
    kl_ctx_destroy(ctx);
    free_checkpoint();
    printf("%s: %s\n", __FILE__, failures == 0 ? "ok" : "failed");
    return failures != 0;
}
