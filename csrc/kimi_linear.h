/* kimi_linear: the ops and the model of the Kimi-Linear family, on arrays.
 *
 * Shape letters, used as argument names everywhere:
 *   T tokens (rows), N sequences, H heads (Hk key heads, Hv value heads), K key width, V value width,
 *   D model width, R latent rank, P width of the shared key part, C channels, W convolution taps,
 *   E experts, F inner width of a feed-forward.
 * Arrays are row-major with the last axis contiguous, float32 unless a type says otherwise.
 *
 * Conventions
 *   Every call that can fail returns kl_status and leaves one sentence in the context (kl_ctx_error).
 *   Arguments are checked before anything is written: sizes, counts, enums, values; of pointers, that
 *   one is NULL where its comment does not allow it is the caller's to know.
 *   Ragged batches: the tokens of N sequences lie one after another; offsets [N+1] rises from 0 to T.
 *   Arrays of numbers are addresses in the memory of the context's backend; ids of tokens, offsets
 *   and other control data are host arrays.
 *   Argument order: context, outputs, inputs, weights, state, dimensions, scalars.
 *   The library keeps no pointer after a call, except the weights of a model.
 *   Same bytes for any number of threads, any instruction set and any batch: see docs/math.md#sums. */
#ifndef KIMI_LINEAR_H
#define KIMI_LINEAR_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define KL_API __attribute__((visibility("default")))
#define KL_CHECKED __attribute__((warn_unused_result))
#else
#define KL_API
#define KL_CHECKED
#endif

#define KL_VERSION "0.1.0"
/* KL_VERSION of the library that runs. While it begins with 0 the structs of two versions may differ: a program that
 * finds its shared library at run time compares the two first. */
KL_API const char *kl_library_version(void);

typedef enum kl_status {
    KL_OK = 0,
    KL_ERR_ARG,         /* a value that the contract rules out */
    KL_ERR_SHAPE,       /* sizes that do not fit each other */
    KL_ERR_DTYPE,       /* a storage type that the op does not take */
    KL_ERR_MEMORY,      /* out of memory: the sentence says how much was wanted */
    KL_ERR_UNSUPPORTED, /* right, but not built: the sentence says what is */
    KL_ERR_FORMAT,      /* a file that is not what it says */
    KL_ERR_DEVICE,      /* the device failed or is not there */
    KL_ERR_IO,          /* a file could not be read or written */
    KL_ERR_STATE,       /* a state that does not belong to this model, or is in use */
    KL_ERR_INTERRUPTED, /* cancelled from outside */
} kl_status;

/* Storage types carry ggml's ids, so that a file's id is ours. */
typedef enum kl_type {
    KL_F32 = 0,
    KL_F16 = 1,
    KL_Q4_0 = 2,
    KL_Q4_1 = 3,
    KL_Q5_0 = 6,
    KL_Q5_1 = 7,
    KL_Q8_0 = 8,
    KL_Q2_K = 10,
    KL_Q3_K = 11,
    KL_Q4_K = 12,
    KL_Q5_K = 13,
    KL_Q6_K = 14,
    KL_IQ2_XXS = 16,
    KL_IQ2_XS = 17,
    KL_IQ3_XXS = 18,
    KL_IQ1_S = 19,
    KL_IQ4_NL = 20,
    KL_IQ3_S = 21,
    KL_IQ2_S = 22,
    KL_IQ4_XS = 23,
    KL_IQ1_M = 29,
    KL_BF16 = 30,
    KL_TQ1_0 = 34,
    KL_TQ2_0 = 35,
    KL_MXFP4 = 39,
    KL_NVFP4 = 40,
    KL_Q1_0 = 41,
    KL_Q2_0 = 42,
    KL_TYPE_END, /* above every id */
} kl_type;

/* Values of a block: 1 for F32, F16 and BF16; 0 where the type is unknown. */
KL_API int64_t kl_type_block(kl_type type);
/* Bytes of n values of a type, whole blocks; 0 where the type is unknown, or n is negative or 2^60 or more. */
KL_API size_t kl_type_bytes(kl_type type, int64_t n_values);
KL_API const char *kl_type_name(kl_type type);

typedef enum kl_activation { KL_NONE = 0, KL_SIGMOID = 1, KL_SILU = 2 } kl_activation;

/* ---- context -------------------------------------------------------------------------------- */

/* One handle for threads, scratch memory, kernels and the last error. It serves one call at a time;
 * two threads use two contexts. */
typedef struct kl_ctx kl_ctx;

/* Ways to one result, of the ops that have several. */
typedef enum kl_form {
    KL_FORM_AUTO = 0,
    KL_FORM_RECURRENT = 1, /* delta_rule */
    KL_FORM_CHUNKED = 2,
    KL_FORM_ABSORBED = 3, /* latent_attention */
    KL_FORM_EXPANDED = 4,
} kl_form;

/* What a product makes of its float32 activations first. Weights of other types than named take float32, and so do
 * those that are stored transposed. Where this is not float32 attention on the CPU multiplies in 16-bit fixed point:
 * latent_attention always, attention in pieces of more than 16 new tokens; on a device it is float32. */
typedef enum kl_activations {
    KL_ACTIVATIONS_FLOAT32 = 0, /* nothing: the dequantised weight times float32 */
    KL_ACTIVATIONS_INT8 = 1,    /* weights in blocks: int8, a scale for each 32 values */
    KL_ACTIVATIONS_BFLOAT16 = 2 /* weights in bfloat16: bfloat16, subnormals flushed */
} kl_activations;

typedef enum kl_gemm { KL_GEMM_OWN = 0, KL_GEMM_BLAS = 1 } kl_gemm;

typedef struct kl_ctx_options {
    int threads;     /* 0: one for each processor that this process may use */
    const char *isa; /* one of kl_isa_list; NULL: the best that runs here */
    kl_gemm gemm; /* KL_GEMM_BLAS: float32 products by OpenBLAS, within a budget, not byte-equal */
    kl_form delta_rule;         /* of kl_delta_rule where a call says KL_FORM_AUTO */
    kl_activations activations; /* of products in every op; a model has its own */
    const char *device;         /* "cpu" or NULL, "hip", "hip:N", "hip-host": docs/hip.md */
} kl_ctx_options;

/* options NULL: all zero. On failure *ctx holds the sentence and serves kl_ctx_error and kl_ctx_destroy
 * alone; it is NULL, which both take, where there was no memory for it. */
KL_API kl_status kl_ctx_create(kl_ctx **ctx, const kl_ctx_options *options) KL_CHECKED;
KL_API void kl_ctx_destroy(kl_ctx *ctx);
KL_API const char *kl_ctx_error(const kl_ctx *ctx); /* the last failure, one sentence */
KL_API const char *kl_ctx_isa(const kl_ctx *ctx);
KL_API int kl_ctx_threads(const kl_ctx *ctx);
/* On failure the threads stay. */
KL_API kl_status kl_ctx_set_threads(kl_ctx *ctx, int threads) KL_CHECKED;
KL_API const char *kl_blas_name(void); /* provider and version, or "none" */

/* Instruction sets that this build has and this machine runs, best last; returns their number. "scalar"; on x86-64
 * "avx2", "avxvnni", "avx512", "avx512bf16"; on aarch64 "neon", "neon_dotprod". */
KL_API int kl_isa_list(const char *names[], int capacity);

/* Devices that a context can be made for, and those that are not there with the reason. Returns their number;
 * fills in the first `capacity`. Opens the libraries of the devices. */
typedef struct kl_device_info {
    char name[32]; /* for kl_ctx_options.device */
    int available;
    char description[256], reason[256];
    int64_t memory_bytes; /* 0: the host's */
} kl_device_info;
KL_API int kl_device_list(kl_device_info *list, int capacity);
/* "cpu", "hip (host)", "hip (amd)", "hip (nvidia)" */
KL_API const char *kl_ctx_device(const kl_ctx *ctx);

/* Stops the call in flight from another thread: it returns KL_ERR_INTERRUPTED at the end of a task, on a device of
 * a layer. Where none is, the next. */
KL_API void kl_ctx_cancel(kl_ctx *ctx);

/* poll is called by the calling thread some twenty times a second during long calls; a value other
 * than 0 cancels the call. NULL: none. */
KL_API void kl_ctx_set_poll(kl_ctx *ctx, int (*poll)(void *user), void *user);

/* While a model's weights go to a device (kl_model_create), report is called by the calling thread after those outside
 * the layers and after each layer, with the bytes so far and of all; a value other than 0 ends it. */
KL_API void kl_ctx_set_progress(kl_ctx *ctx, int (*report)(void *user, int64_t done, int64_t all),
                                void *user);

/* What the context allocates for values goes through these: scratch, pages and states, vectors of weights (not tables,
 * nor what a call writes down of itself); allocate returns NULL when it fails. Set before models and states are made:
 * these are given back to the allocator of the context at hand, so contexts that share them have one allocator. It is
 * called on the thread of the call. NULL: the C library's. */
typedef struct kl_allocator {
    void *(*allocate)(void *user, size_t n_bytes); /* 64-byte aligned */
    void (*release)(void *user, void *p, size_t n_bytes);
    void *user;
} kl_allocator;
KL_API kl_status kl_ctx_set_allocator(kl_ctx *ctx, const kl_allocator *allocator);

/* Bytes now held by the context's scratch, and the number of allocations since it was made. */
KL_API size_t kl_ctx_scratch_bytes(const kl_ctx *ctx);
KL_API int64_t kl_ctx_allocations(const kl_ctx *ctx);
/* Gives the scratch memory back; the next call takes what it needs again. */
KL_API void kl_ctx_trim(kl_ctx *ctx);

/* Faults for tests. The nth allocation of the context from now on fails, once (1: the next; 0: none). */
KL_API void kl_ctx_fail_at(kl_ctx *ctx, int64_t nth);
/* The nth parallel region or layer from now on cancels its call, as kl_ctx_cancel would at that moment. */
KL_API void kl_ctx_cancel_at(kl_ctx *ctx, int64_t nth);

/* ---- measuring ------------------------------------------------------------------------------- */

/* While profiling is on, each op books its calls, wall seconds, floating-point operations and the bytes of
 * its arrays and weights; on a device it is waited for. Switching it on starts from zero. */
typedef struct kl_profile_row {
    int64_t calls;
    double seconds, flops, bytes;
} kl_profile_row;
KL_API void kl_ctx_profile(kl_ctx *ctx, int on);
/* Row index 0, 1, ...; returns 0 behind the last. */
KL_API int kl_ctx_profile_row(const kl_ctx *ctx, int index, const char **name, kl_profile_row *row);

/* What the machine does at most, with the context's threads: reading memory once in order, and
 * multiply-adds in registers. */
KL_API kl_status kl_roof_read(kl_ctx *ctx, const void *data, int64_t n_bytes,
                              double *bytes_per_second) KL_CHECKED;
KL_API kl_status kl_roof_fma(kl_ctx *ctx, double *flops_per_second) KL_CHECKED;

/* ---- arguments that several ops share -------------------------------------------------------- */

/* n matrices of one shape, by address: a single matrix, separate or stacked experts, or the heads'
 * parts of one matrix are all views. rows is the output width, cols the input width. */
typedef struct kl_weight {
    const void *const *matrix; /* [n] addresses */
    int64_t n, rows, cols;
    size_t row_bytes; /* from one stored row to the next */
    kl_type type;
    int transposed; /* 1: stored [cols, rows] */
} kl_weight;

/* One address a sequence, and an offset in bytes that is the same for all (a layer's place in each
 * sequence's state). base NULL: no state; read as zeros, not written. */
typedef struct kl_slots {
    void *const *base;
    size_t offset;
} kl_slots;

/* A cache of rows, one a position, in pages of KL_PAGE positions, of at most 2^40: row i of sequence n begins at
 * page[n][i / KL_PAGE] + offset + (i % KL_PAGE) * row_bytes. row_bytes is that of whole values or blocks. */
#define KL_PAGE 512
typedef struct kl_cache {
    void *const *const *page;
    size_t offset, row_bytes;
    kl_type type; /* KL_F32, KL_F16 or KL_Q8_0 (rows of whole blocks) */
} kl_cache;

/* Formulas, and what their error is: csrc/ops/<op>.c, docs/math.md. */

/* ---- ops: element by element, norms ----------------------------------------------------------- */

/* x, y, z [T, D]; w, b [D]; the first three are of n values. y may be an input. */

KL_API kl_status kl_add(kl_ctx *ctx, float *y, const float *a, const float *b,
                        int64_t n) KL_CHECKED;
KL_API kl_status kl_sigmoid(kl_ctx *ctx, float *y, const float *x, int64_t n) KL_CHECKED;
/* limit: gate is cut above it, up on both sides; > 0 and finite, or 0 for none. NaN stays NaN. */
KL_API kl_status kl_swiglu(kl_ctx *ctx, float *y, const float *gate, const float *up, int64_t n,
                           float limit) KL_CHECKED;
/* Where SiTU's factors level off: gate at beta, up at linear_beta (0: up as it is). Both are finite. */
typedef struct kl_situ_betas {
    float beta, linear_beta;
} kl_situ_betas;
KL_API kl_status kl_situ(kl_ctx *ctx, float *y, const float *gate, const float *up, int64_t n,
                         const kl_situ_betas *betas) KL_CHECKED;
/* x, y [T, D]; gate [T, G] before its sigmoid, each for D / G values; y may be x. */
KL_API kl_status kl_sigmoid_gate(kl_ctx *ctx, float *y, const float *x, const float *gate,
                                 int64_t T, int64_t D, int64_t G) KL_CHECKED;
KL_API kl_status kl_softmax(kl_ctx *ctx, float *y, const float *x, int64_t T, int64_t D) KL_CHECKED;
KL_API kl_status kl_rms_norm(kl_ctx *ctx, float *y, const float *x, const float *w, int64_t T,
                             int64_t D, float eps) KL_CHECKED;
KL_API kl_status kl_layer_norm(kl_ctx *ctx, float *y, const float *x, const float *w,
                               const float *b, int64_t T, int64_t D, float eps) KL_CHECKED;
KL_API kl_status kl_gated_rms_norm(kl_ctx *ctx, float *y, const float *x, const float *z,
                                   const float *w, int64_t T, int64_t D, float eps,
                                   kl_activation activation) KL_CHECKED;
KL_API kl_status kl_l2_norm(kl_ctx *ctx, float *y, const float *x, int64_t T, int64_t D,
                            float eps) KL_CHECKED;
/* x, y [T, D]; snapshots [n, T, D], NULL where n is 0; w [D], the product of the norm's weight and the projection's;
 * y may be x, and shares no memory with the others. */
KL_API kl_status kl_attn_res(kl_ctx *ctx, float *y, const float *snapshots, const float *x,
                             const float *w, int64_t n, int64_t T, int64_t D, float eps) KL_CHECKED;

/* Hyper-connections of n streams, up to KL_MHC_STREAMS, of width D. norm_eps is the model's of its norms, eps the
 * connections' own; iters normalisations of columns, 1 to KL_MHC_ITERS, with one of rows between each two. */
enum { KL_MHC_STREAMS = 64, KL_MHC_ITERS = 1000 };
typedef struct kl_mhc_args {
    int64_t T, n, D;
    float norm_eps, eps;
    int64_t iters;
} kl_mhc_args;
/* x [T, n, D]; y [T, D], post [T, n], comb [T, n, n], which overlap nothing; fn one matrix [(2 + n) n, n D] in any
 * storage type, not transposed; base [(2 + n) n]; scale [3], of pre, post and comb. The product with fn is in float32
 * whatever the context's activations. */
KL_API kl_status kl_mhc_pre(kl_ctx *ctx, float *y, float *post, float *comb, const float *x,
                            const kl_weight *fn, const float *base, const float *scale,
                            const kl_mhc_args *args) KL_CHECKED;
/* out, x [T, n, D], out may be x; y [T, D]; post [T, n]; comb [T, n, n]: row i is where stream i goes */
KL_API kl_status kl_mhc_post(kl_ctx *ctx, float *out, const float *y, const float *x,
                             const float *post, const float *comb, int64_t T, int64_t n,
                             int64_t D) KL_CHECKED;
/* One row into n streams, y [T, n, D] of x [T, D]; and the mean of n streams, y [T, D] of x [T, n, D]. */
KL_API kl_status kl_mhc_expand(kl_ctx *ctx, float *y, const float *x, int64_t T, int64_t n,
                               int64_t D) KL_CHECKED;
KL_API kl_status kl_mhc_collapse(kl_ctx *ctx, float *y, const float *x, int64_t T, int64_t n,
                                 int64_t D) KL_CHECKED;

/* ---- ops: matrix products --------------------------------------------------------------------- */

/* Rows of float32 [rows, cols] to rows of blocks and back; y and x share no memory. Rows must be whole
 * blocks of the type. Where a value of x is NaN or infinite, quantize fails before it writes; so it does
 * where the type can only be read. */
KL_API kl_status kl_quantize(kl_ctx *ctx, void *y, const float *x, kl_type type, int64_t rows,
                             int64_t cols) KL_CHECKED;
KL_API kl_status kl_dequantize(kl_ctx *ctx, float *y, const void *x, kl_type type, int64_t rows,
                               int64_t cols) KL_CHECKED;

/* y [T, cols of the table]; ids [T], each below the table's rows */
KL_API kl_status kl_embedding(kl_ctx *ctx, float *y, const int32_t *ids, const kl_weight *table,
                              int64_t T) KL_CHECKED;

/* y[i] [T, n * rows of w[i]] = x w[i]^T + bias[i], for n_weights weights over one x [T, D]; the matrices of a
 * weight stand one below the other. bias may be NULL, and each bias[i] may be. */
KL_API kl_status kl_linear(kl_ctx *ctx, float *const *y, const float *x, const kl_weight *w,
                           const float *const *bias, int n_weights, int64_t T,
                           int64_t D) KL_CHECKED;

/* KL_ROUTER_NONE: the scores are what the others would make of them */
typedef enum kl_router {
    KL_ROUTER_SIGMOID = 0,
    KL_ROUTER_SOFTMAX = 1,
    KL_ROUTER_NONE = 2
} kl_router;
typedef struct kl_route_args {
    int64_t T, E, k, groups, top_groups;
    kl_router function;
    int renormalise;
    float scale;
    int given; /* 1: ids are an input, ascending; only their weights are computed */
} kl_route_args;
/* ids, weights [T, k], ids rising in each row; scores [T, E]; bias [E] or NULL, for the choice alone */
KL_API kl_status kl_route(kl_ctx *ctx, int32_t *ids, float *weights, const float *scores,
                          const float *bias, const kl_route_args *args) KL_CHECKED;

/* y [T, D] = sum over a token's experts, in ascending expert id, of weights * E(x), then + shared.
 * w_gate, w_up [E of F x D], w_down [E of D x F]; shared [T, D] or NULL. An expert's activation is SwiGLU with
 * this limit (0: none), or SiTU with these betas where situ is not NULL; limit is then 0. */
KL_API kl_status kl_moe(kl_ctx *ctx, float *y, const float *x, const int32_t *ids,
                        const float *weights, const kl_weight *w_gate, const kl_weight *w_up,
                        const kl_weight *w_down, const float *shared, int64_t T, int64_t D,
                        int64_t F, int64_t k, const kl_situ_betas *situ, float limit) KL_CHECKED;

/* ---- ops: KDA --------------------------------------------------------------------------------- */

/* x, y [T, C], y is not x; w [C, W]; a history [W-1, C] a sequence, oldest first; history_out may be history_in */
KL_API kl_status kl_short_conv(kl_ctx *ctx, float *y, kl_slots history_out, const float *x,
                               const float *w, kl_slots history_in, const int64_t *offsets,
                               int64_t N, int64_t T, int64_t C, int64_t W,
                               kl_activation activation) KL_CHECKED;

/* f, g [T, H, K], g may be f; rate [H]; dt_bias [H, K].
 * lower_bound 0: -rate * softplus(f + dt_bias); below 0: lower_bound * sigmoid(rate * (f + dt_bias)). */
KL_API kl_status kl_decay_gate(kl_ctx *ctx, float *g, const float *f, const float *rate,
                               const float *dt_bias, int64_t T, int64_t H, int64_t K,
                               float lower_bound) KL_CHECKED;

typedef enum kl_gate { KL_GATE_NONE = 0, KL_GATE_HEAD = 1, KL_GATE_CHANNEL = 2 } kl_gate;
typedef enum kl_head_map { KL_HEADS_GROUPED = 0, KL_HEADS_TILED = 1 } kl_head_map;

typedef struct kl_delta_rule_args {
    const int64_t *offsets;
    int64_t N, T, Hk, Hv, K, V;
    float scale; /* on q, after the norm */
    kl_gate gate;
    kl_form form;
    kl_head_map head_map;
    int64_t chunk; /* tokens a chunk of KL_FORM_CHUNKED, at most 256; 0: 64 */
    int l2_norm;   /* q and k by kl_l2_norm first */
    float l2_eps;
    /* States to keep: after checkpoints[i] tokens of sequence n, for checkpoint_offsets[n] <= i <
     * checkpoint_offsets[n + 1], rising within a sequence; at kept + i Hv K V. NULL: none. */
    const int64_t *checkpoints, *checkpoint_offsets;
    float *kept;
} kl_delta_rule_args;

/* o [T, Hv, V]; q, k [T, Hk, K]; v [T, Hv, V]; g [T, Hv, K], [T, Hv] or NULL by args->gate;
 * beta [T, Hv]; states [Hv, K, V] a sequence; state_out may be state_in. */
KL_API kl_status kl_delta_rule(kl_ctx *ctx, float *o, kl_slots state_out, const float *q,
                               const float *k, const float *v, const float *g, const float *beta,
                               kl_slots state_in, const kl_delta_rule_args *args) KL_CHECKED;

/* The halves of its chunked form (docs/math.md#delta_rule_intra), to compare other kernels with, one by one.
 * args: chunk is 1 to 256, written out; form is not looked at; l2_norm and checkpoints are not there.
 * L, P, inverse [T, Hv, chunk]: (I + L)^-1 is `inverse`; W [T, Hv, K]; U, d, o [T, Hv, V]. */
KL_API kl_status kl_delta_rule_intra(kl_ctx *ctx, float *L, float *P, float *inverse, float *W,
                                     float *U, const float *q, const float *k, const float *v,
                                     const float *g, const float *beta,
                                     const kl_delta_rule_args *args) KL_CHECKED;
KL_API kl_status kl_delta_rule_inter(kl_ctx *ctx, float *o, kl_slots state_out, float *d,
                                     const float *q, const float *k, const float *g, const float *P,
                                     const float *W, const float *U, kl_slots state_in,
                                     const kl_delta_rule_args *args) KL_CHECKED;

/* c [T, D]: running sums of g over tokens, afresh every `chunk` tokens of a sequence (0: each sequence). */
KL_API kl_status kl_decay_cumsum(kl_ctx *ctx, float *c, const float *g, const int64_t *offsets,
                                 int64_t N, int64_t T, int64_t D, int64_t chunk) KL_CHECKED;

/* ---- ops: MLA --------------------------------------------------------------------------------- */

/* Stores rows x [T, D] behind the first start[n] positions of each sequence, in the cache's type. */
KL_API kl_status kl_cache_append(kl_ctx *ctx, kl_cache cache, const float *x,
                                 const int64_t *offsets, const int64_t *start, int64_t N, int64_t T,
                                 int64_t D) KL_CHECKED;

typedef struct kl_latent_attention_args {
    const int64_t *offsets;      /* [N+1] of the queries */
    const int64_t *positions;    /* [N] cached positions of each sequence, the new ones counted */
    int64_t N, T, H, K, P, V, R; /* K: width of a query's own part; a query is [K | P] wide */
    float scale;
    kl_form form;
    /* Sparse attention, absorbed: a query attends to the positions of its row alone, counted within its sequence, which
     * it sees; they rise, and -1 is behind the last. NULL and 0: to all that it sees. */
    const int32_t *select; /* [T, select_width] */
    int64_t select_width;
    int64_t select_from; /* a query that sees no more attends to all; its row is not read */
} kl_latent_attention_args;

/* o [T, H, V]; q [T, H, K + P]; caches of rows R and P wide; w_uk [H of K x R], w_uv [H of V x R]. A query that attends
 * to nothing gets zeros. */
KL_API kl_status kl_latent_attention(kl_ctx *ctx, float *o, const float *q, kl_cache latent,
                                     kl_cache k_shared, const kl_weight *w_uk,
                                     const kl_weight *w_uv,
                                     const kl_latent_attention_args *args) KL_CHECKED;

/* ---- ops: the indexer of sparse attention ----------------------------------------------------- */

/* Keys of pools, P consecutive positions from position 0 on. k and gate have D values a position, alike in type and bytes a
 * row, and those of positions start[n] .. start[n] + the new tokens of sequence n - 1 are there; the pools whose last
 * position is one of these are computed, by softmax over gate + ape [P, D] in each channel. `pooled` has rows of D / P
 * values, one behind the other: the key of pool p is the P rows from position p P on. P divides KL_PAGE. */
KL_API kl_status kl_index_pool(kl_ctx *ctx, kl_cache pooled, kl_cache k, kl_cache gate,
                               const float *ape, const int64_t *offsets, const int64_t *start,
                               int64_t N, int64_t T, int64_t D, int64_t P) KL_CHECKED;

typedef struct kl_index_args {
    const int64_t *offsets;   /* [N+1] of the queries */
    const int64_t *positions; /* [N] positions of each sequence, the new ones counted */
    int64_t N, T, H, D, pool; /* pool: positions a key, 1 or as kl_index_pool has it */
    int64_t topk; /* kl_index_select: positions of the pools chosen, a multiple of pool */
    float scale;  /* kl_index_scores */
} kl_index_args;

/* scores [T, most pools of a sequence], q [T, H, D], keys as kl_index_pool's `pooled`, weights [T, H]. */
KL_API kl_status kl_index_scores(kl_ctx *ctx, float *scores, const float *q, kl_cache keys,
                                 const float *weights, const kl_index_args *args) KL_CHECKED;
/* ids [T, topk + pool - 1]: positions, rising, -1 behind the last. Scores are those of scale 1. */
KL_API kl_status kl_index_select(kl_ctx *ctx, int32_t *ids, const float *q, kl_cache keys,
                                 const float *weights, const kl_index_args *args) KL_CHECKED;

/* ---- ops: grouped-query attention ------------------------------------------------------------- */

/* x, y [T, H, K], y may be x; positions [T] >= 0. Values j and j + rotary / 2 of a head are turned by the
 * angle position * base^(-2j / rotary), for j < rotary / 2; the others are copied. rotary is even. */
KL_API kl_status kl_rope(kl_ctx *ctx, float *y, const float *x, const int64_t *positions, int64_t T,
                         int64_t H, int64_t K, int64_t rotary, double base) KL_CHECKED;

typedef struct kl_attention_args {
    const int64_t *offsets;     /* [N+1] of the queries */
    const int64_t *positions;   /* [N] cached positions of each sequence, the new ones counted */
    int64_t N, T, H, Hkv, K, V; /* query head h uses key head h / (H / Hkv) */
    float scale;
} kl_attention_args;

/* o [T, H, V]; q [T, H, K]; caches of rows Hkv * K and Hkv * V wide (Q8_0: K, V of whole blocks), of any two types. */
KL_API kl_status kl_attention(kl_ctx *ctx, float *o, const float *q, kl_cache keys, kl_cache values,
                              const kl_attention_args *args) KL_CHECKED;

/* ---- ops: sampling ---------------------------------------------------------------------------- */

typedef struct kl_sample_args {
    float temperature;                 /* 0: the largest logit, lowest id on ties */
    int64_t top_k;                     /* 0: all */
    float top_p, min_p;                /* in (0, 1], 1: all; in [0, 1], 0: all */
    uint64_t seed, sequence, position; /* Philox4x32-10 counter */
} kl_sample_args;
/* ids [T], one for each row of logits [T, D] with its own args[t]. */
KL_API kl_status kl_sample(kl_ctx *ctx, int32_t *ids, const float *logits,
                           const kl_sample_args *args, int64_t T, int64_t D) KL_CHECKED;

/* ---- model ------------------------------------------------------------------------------------ */

#include "kimi_linear_model.h"

#ifdef __cplusplus
}
#endif
#endif
