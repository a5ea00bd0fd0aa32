/* Calls that run out of memory or are cancelled, at every site and in every region: the states stand at the end of
 * a whole pass, and what is read after that is what would have been read. */
#include "small_model.h"

#include <stdatomic.h>

/* ---- a heap that fails ---- */

static atomic_long heap_calls_left; /* 0: it does not fail */

/* Sanitizers have a heap of their own. */
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define HEAP_CAN_FAIL 1

void *__libc_malloc(size_t n_bytes);
void *__libc_calloc(size_t n, size_t n_bytes);
void *__libc_realloc(void *p, size_t n_bytes);

static int heap_fails(void)
{
    return atomic_load(&heap_calls_left) > 0 && atomic_fetch_sub(&heap_calls_left, 1) == 1;
}

void *malloc(size_t n_bytes) { return heap_fails() ? NULL : __libc_malloc(n_bytes); }
void *calloc(size_t n, size_t n_bytes) { return heap_fails() ? NULL : __libc_calloc(n, n_bytes); }
void *realloc(void *p, size_t n_bytes) { return heap_fails() ? NULL : __libc_realloc(p, n_bytes); }
#else
#define HEAP_CAN_FAIL 0
#endif

static void heap_fail_at(kl_ctx *ctx, int64_t nth)
{
    (void)ctx;
    atomic_store(&heap_calls_left, (long)nth);
}

/* ---- the calls ---- */

enum { N = 3, LONGEST = 200, PASS = 64, PART_VALUES = 4096 };

/* new tokens of each sequence, after the first BEFORE tokens that its state has read */
static const int64_t lengths[N] = { 70, 1, LONGEST };
static const int64_t before[N] = { 5, 3, 70 };

/* Everything of the states that a later call can see. */
typedef struct outcome {
    float logits[N][VOCAB];
    int64_t position[N];
    float part[N][6][PART_VALUES];
} outcome;

typedef struct run {
    kl_ctx *ctx;
    kl_model *model;
    kl_state *state[N];
} run;

static int32_t token(int64_t sequence, int64_t position)
{
    return (int32_t)((position * 7 + sequence * 11) % VOCAB);
}

static void look(run *r, outcome *o)
{
    for (int n = 0; n < N; n++) {
        o->position[n] = kl_state_position(r->state[n]);
        for (int part = 0; part < 6; part++) {
            const int64_t layer = part >= KL_STATE_LATENT;
            int64_t shape[3] = { 0, 0, 1 };
            int dims;
            kl_type type;
            CHECK(
                kl_state_shape(r->ctx, r->state[n], layer, (kl_state_part)part, shape, &dims, &type)
                == KL_OK);
            const int64_t values = shape[0] * shape[1] * (dims == 3 ? shape[2] : 1);
            CHECK(values <= PART_VALUES);
            memset(o->part[n][part], 0, sizeof o->part[n][part]);
            CHECK(kl_state_read(r->ctx, r->state[n], layer, (kl_state_part)part, o->part[n][part])
                  == KL_OK);
        }
    }
}

/* Reads tokens up to position to[n] of each sequence; logits are of each one's last. */
static kl_status read_to(run *r, const int64_t *to, float *logits, int64_t *done)
{
    int32_t ids[N * LONGEST];
    int64_t offsets[N + 1] = { 0 }, rows[N], n_rows = 0;
    for (int n = 0; n < N; n++) {
        offsets[n + 1] = offsets[n];
        for (int64_t p = kl_state_position(r->state[n]); p < to[n]; p++)
            ids[offsets[n + 1]++] = token(n, p);
        if (offsets[n + 1] > offsets[n])
            rows[n_rows++] = offsets[n + 1] - 1;
    }
    const kl_forward_args args = { .ids = ids,
                                   .offsets = offsets,
                                   .N = N,
                                   .states = r->state,
                                   .logits = logits,
                                   .logit_rows = rows,
                                   .n_logits = logits != NULL ? n_rows : 0,
                                   .pass_tokens = PASS,
                                   .done = done };
    return kl_forward(r->ctx, r->model, &args);
}

static void start(run *r, const kl_ctx_options *options)
{
    const kl_config c = config();
    CHECK(kl_ctx_create(&r->ctx, options) == KL_OK);
    CHECK(kl_model_create(r->ctx, &r->model, &c, tensors, n_tensors, 0) == KL_OK);
    for (int n = 0; n < N; n++)
        CHECK(kl_state_create(r->ctx, &r->state[n], r->model, KL_F32, 0) == KL_OK);
    CHECK(read_to(r, before, NULL, NULL) == KL_OK);
}

static void end(run *r)
{
    for (int n = 0; n < N; n++)
        kl_state_destroy(r->ctx, r->state[n]);
    kl_model_destroy(r->ctx, r->model);
    kl_ctx_destroy(r->ctx);
}

static void targets(int64_t *to)
{
    for (int n = 0; n < N; n++)
        to[n] = before[n] + lengths[n];
}

/* One more token of each sequence, so that logits, too, come from the state. */
static void step(run *r, outcome *o)
{
    int64_t to[N];
    for (int n = 0; n < N; n++)
        to[n] = kl_state_position(r->state[n]) + 1;
    CHECK(read_to(r, to, o->logits[0], NULL) == KL_OK);
    look(r, o);
}

/* After a call that failed: positions are those of whole passes, and going on gives the same bytes. */
static void check_continues(run *r, const int64_t *done, const outcome *want)
{
    static outcome got;
    int64_t to[N];
    targets(to);
    for (int n = 0; n < N; n++) {
        CHECK(kl_state_position(r->state[n]) == before[n] + done[n]);
        CHECK(done[n] == lengths[n] || done[n] % 64 == 0);
    }
    CHECK(read_to(r, to, NULL, NULL) == KL_OK);
    step(r, &got);
    CHECK(memcmp(&got, want, sizeof got) == 0);
}

typedef void (*fault)(kl_ctx *ctx, int64_t nth);

/* The fault at each of its places in turn, until the call has none left; returns how many there were. */
static int64_t test_each(int threads, fault set, kl_status expected, const char *sentence,
                         const outcome *want)
{
    const kl_ctx_options options = { .threads = threads };
    for (int64_t nth = 1; nth < 10000; nth++) {
        run r;
        int64_t to[N], done[N];
        start(&r, &options);
        targets(to);
        kl_ctx_trim(r.ctx); /* scratch is taken anew */
        set(r.ctx, nth);
        const kl_status status = read_to(&r, to, NULL, done);
        set(r.ctx, 0);
        CHECK(status == KL_OK || status == expected);
        CHECK(status == KL_OK || strstr(kl_ctx_error(r.ctx), sentence) != NULL);
        check_continues(&r, done, want);
        end(&r);
        if (status == KL_OK)
            return nth - 1;
    }
    return -1;
}

/* A step of one token each runs to its end; who cancels it stops the next call, before it reads anything. */
static void test_a_step_is_whole(void)
{
    static outcome want, got;
    run r, other;
    start(&r, NULL);
    start(&other, NULL);
    step(&r, &want);
    kl_ctx_cancel_at(other.ctx, 3);
    step(&other, &got);
    CHECK(memcmp(&got, &want, sizeof got) == 0);
    int64_t to[N], done[N];
    targets(to);
    CHECK(read_to(&other, to, NULL, done) == KL_ERR_INTERRUPTED);
    for (int n = 0; n < N; n++)
        CHECK(done[n] == 0 && kl_state_position(other.state[n]) == before[n] + 1);
    CHECK(read_to(&r, to, NULL, NULL) == KL_OK && read_to(&other, to, NULL, NULL) == KL_OK);
    look(&r, &want);
    look(&other, &got);
    CHECK(memcmp(want.part, got.part, sizeof want.part) == 0);
    end(&r);
    end(&other);
}

/* A pool that cannot be had: the context keeps the one that it has. */
static void test_threads_stay(void)
{
    const kl_ctx_options options = { .threads = 2 };
    const float x[4] = { 1.0f, 2.0f, 3.0f, 4.0f };
    float y[4];
    kl_ctx *ctx;
    CHECK(kl_ctx_create(&ctx, &options) == KL_OK);
    heap_fail_at(ctx, HEAP_CAN_FAIL ? 1 : 0);
    const kl_status status = kl_ctx_set_threads(ctx, 3);
    heap_fail_at(ctx, 0);
    CHECK(status == (HEAP_CAN_FAIL ? KL_ERR_MEMORY : KL_OK));
    CHECK(kl_ctx_threads(ctx) == (HEAP_CAN_FAIL ? 2 : 3));
    CHECK(kl_add(ctx, y, x, x, 4) == KL_OK && y[3] == 8.0f);
    kl_ctx_destroy(ctx);
}

int main(void)
{
    static outcome want;
    run r;
    int64_t to[N];
    make_checkpoint();
    start(&r, NULL);
    targets(to);
    CHECK(read_to(&r, to, NULL, NULL) == KL_OK);
    step(&r, &want);
    end(&r);

    for (int threads = 1; threads <= 3; threads += 2) {
        /* the scratch; positions stay within the first page */
        CHECK(test_each(threads, kl_ctx_fail_at, KL_ERR_MEMORY, "out of memory", &want) >= 1);
        /* tables of the call and its passes */
        CHECK(test_each(threads, heap_fail_at, KL_ERR_MEMORY, "out of memory", &want)
              >= (HEAP_CAN_FAIL ? 9 : 0));
        /* 5 passes of 2 layers, several regions each */
        CHECK(test_each(threads, kl_ctx_cancel_at, KL_ERR_INTERRUPTED, "interrupted", &want) > 50);
    }
    test_a_step_is_whole();
    test_threads_stay();
    free_checkpoint();
    printf("%s: %s\n", __FILE__, failures == 0 ? "ok" : "failed");
    return failures != 0;
}
