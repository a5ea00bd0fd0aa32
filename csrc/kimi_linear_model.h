/* The model: a config, borrowed weights, one state a sequence, and the forward pass. Included by
 * kimi_linear.h, whose conventions hold. */
#ifndef KIMI_LINEAR_H
#include "kimi_linear.h"
#elif !defined(KIMI_LINEAR_MODEL_H)
#define KIMI_LINEAR_MODEL_H

/* KDA and GDN are delta nets, with a decay for each key channel and for each head; MLA attends over a latent a
 * token, ATTN over keys and values that groups of query heads share. */
typedef enum kl_mixer {
    KL_MIXER_KDA = 0,
    KL_MIXER_MLA = 1,
    KL_MIXER_GDN = 2,
    KL_MIXER_ATTN = 3,
} kl_mixer;
typedef enum kl_ffn { KL_FFN_DENSE = 0, KL_FFN_MOE = 1 } kl_ffn;

/* What a layer is made of. A model is a list of these. */
typedef struct kl_layer {
    kl_mixer mixer;
    kl_ffn ffn;
} kl_layer;

/* The names after "in sentences" are those that a failure gives a member, and that Python's Config has. */
typedef struct kl_config {
    int64_t vocab, D, n_layers; /* in sentences vocab_size, hidden_size, n_layers */
    const kl_layer *layers;     /* [n_layers] */
    float rms_eps;              /* of every norm but the latent's; in sentences rms_norm_eps */
    float latent_eps;           /* of the norms inside MLA (latent, low-rank q) */
    float l2_eps;      /* of the L2 norms of q and k in a delta net, under the root of the sum */
    int norm_plus_one; /* 1: norms are stored as w and multiply by 1 + w (but the delta net's own) */
    int tied;          /* 1: the head is the embedding */
    int64_t
        attn_res_block; /* layers to a snapshot of attention residuals; 0: residuals are added */
    struct {
        /* In sentences streams, stream_passes, stream_eps */
        int64_t
            streams; /* residual streams of hyper-connections; 0: there is one, which is added to */
        int64_t passes; /* of Sinkhorn's normalisation */
        float eps;
    } hc;
    kl_activations activations;
    struct {
        /* KDA: Hk = Hv and K = V; convolution of taps. In sentences kda_heads, kda_head_dim; gdn_k_heads, gdn_v_heads,
         * gdn_k_dim, gdn_v_dim; conv_width, gate_lower_bound */
        int64_t Hk, Hv, K, V, taps;
        float lower_bound;    /* 0: softplus gate; below 0: bounded gate */
        int full_rank_gate;   /* KDA, 1: its output gate is one projection, not two of low rank */
        kl_head_map head_map; /* which key head a value head uses */
    } delta;
    struct {
        /* q_rank 0: plain q. In sentences mla_heads, nope_dim, rope_dim, v_head_dim, kv_rank, q_rank */
        int64_t heads, nope, rope, v, rank, q_rank;
        int gated; /* 1: the output times the sigmoid of a projection of x */
    } mla;
    struct {
        /* What chooses the positions that MLA attends to; pool divides KL_PAGE, topk and width. In sentences index_heads,
         * index_dim, index_topk, index_pool, index_eps */
        int64_t heads, width; /* heads 0: it attends to all */
        int64_t topk, pool;   /* positions chosen, in pools of so many */
        float eps;            /* of the norm of keys */
    } index;
    struct {
        /* width of query, key and value alike. In sentences attn_heads, attn_kv_heads, attn_head_dim, rotary_dim */
        int64_t heads, kv_heads, width;
        int64_t rotary; /* leading values of a head that are rotated; 0: none */
        double rope_base;
    } attn;
    struct {
        /* In sentences ffn_size; n_experts, experts_per_token, moe_size, expert_latent, shared_size, n_groups,
         * top_groups, router, routed_scale; situ_beta, situ_linear_beta */
        int64_t dense;             /* inner width of a dense layer */
        int64_t experts, k, width; /* routed experts, used a token, inner width of each */
        int64_t latent;            /* width that routed experts read and write; 0: D */
        int latent_norm;           /* 1: their sum is normed before it goes up to D again */
        kl_situ_betas situ;        /* the activation of every feed-forward; beta 0: swiglu */
        float limit;               /* of swiglu's inputs; 0: none. In sentences swiglu_limit */
        int64_t shared;            /* inner width of the shared experts, side by side; 0: none */
        int shared_gated;          /* 1: times the sigmoid of a score of their own */
        int64_t groups, top_groups;
        kl_router router;
        int renormalise;
        float scale;
    } ffn;
} kl_config;

/* A tensor of a checkpoint, by its Hugging Face name or one of those that stand in its place (model/weights.c). data is
 * borrowed until the model is destroyed; in F32, F16 and BF16 it is aligned to its values, in blocks it need not be. */
typedef struct kl_tensor {
    const char *name;
    const void *data;
    kl_type type;
    int n_dims;
    int64_t shape[4];
} kl_tensor;

typedef struct kl_model kl_model;
typedef struct kl_state kl_state;

/* Matrices stay where they lie; vectors and convolution taps become float32 in memory of the model.
 * planning 1: data may be NULL, and the model can only be planned with. A config's numbers are checked here: sizes, and
 * what an op would refuse, such as an eps below 0. */
KL_API kl_status kl_model_create(kl_ctx *ctx, kl_model **model, const kl_config *config,
                                 const kl_tensor *tensors, int64_t n_tensors,
                                 int planning) KL_CHECKED;
KL_API void kl_model_destroy(kl_ctx *ctx, kl_model *model);

/* ---- state ---- */

/* An empty sequence. context 0: the cache grows as tokens come; above 0, to 2^40: it is taken at once for that many
 * tokens, and more are refused. cache_type: KL_F32, KL_F16, or KL_Q8_0 where 32 divides the width of the latent,
 * or of a position's keys. */
KL_API kl_status kl_state_create(kl_ctx *ctx, kl_state **state, const kl_model *model,
                                 kl_type cache_type, int64_t context) KL_CHECKED;
KL_API void kl_state_destroy(kl_ctx *ctx, kl_state *state);
KL_API int64_t kl_state_position(const kl_state *state); /* tokens read */
KL_API size_t kl_state_bytes(const kl_state *state);     /* now held */
/* An empty sequence again; memory and settings stay. Not while a call uses the state. */
KL_API void kl_state_reset(kl_ctx *ctx, kl_state *state);

/* Of a new state: takes the memory of keep checkpoints, each plan.state_fixed bytes. From now on a copy of what
 * does not grow (convolution histories, delta states) is made at the first end of a piece, or of a call, at or
 * behind each multiple of every; the newest keep stay. No other byte changes. */
KL_API kl_status kl_state_keep(kl_ctx *ctx, kl_state *state, int64_t every,
                               int64_t keep) KL_CHECKED;
/* Makes a checkpoint here and now, of a state that keeps some (kl_state_keep). */
KL_API kl_status kl_state_checkpoint(kl_ctx *ctx, kl_state *state) KL_CHECKED;
/* The same as one after n tokens, for a state that was filled in: its arrays are written as they were then, and
 * once more behind the last checkpoint. n is at the newest checkpoint or behind it, and at most the position. */
KL_API kl_status kl_state_checkpoint_at(kl_ctx *ctx, kl_state *state, int64_t n) KL_CHECKED;
/* Positions of the checkpoints, oldest first, to at [keep]; gives how many. */
KL_API int64_t kl_state_checkpoints(const kl_state *state, int64_t *at);
/* Back to the newest checkpoint at or before n, whose position is told; cache rows behind it are dropped. The
 * empty sequence is a checkpoint as long as none has been given up. */
KL_API kl_status kl_state_truncate(kl_ctx *ctx, kl_state *state, int64_t n,
                                   int64_t *position) KL_CHECKED;
/* Makes `to` an independent copy of `from`, with the newest of its checkpoints that fit. Both are of one model and
 * one cache type. On failure `to` is as it was, or lost where a device failed in the middle. */
KL_API kl_status kl_state_copy(kl_ctx *ctx, kl_state *to, kl_state *from) KL_CHECKED;
/* Makes an empty state one of n tokens, whose arrays are then written. */
KL_API kl_status kl_state_fill(kl_ctx *ctx, kl_state *state, int64_t n) KL_CHECKED;

typedef enum kl_state_part {
    KL_STATE_DELTA = 0,     /* [Hv, K, V] float32 */
    KL_STATE_Q_HISTORY = 1, /* [W-1, Hk*K] float32, oldest first; k alike, v [W-1, Hv*V] */
    KL_STATE_K_HISTORY = 2,
    KL_STATE_V_HISTORY = 3,
    KL_STATE_LATENT = 4,   /* [position, R] in the cache's type */
    KL_STATE_K_SHARED = 5, /* [position, P] alike; F16 where that is Q8_0 and P no whole blocks */
    KL_STATE_KEYS = 6,     /* [position, Hkv*K] in the cache's type; values alike */
    KL_STATE_VALUES = 7,
    KL_STATE_INDEX_K =
        8, /* [position, D_i]: keys of the indexer, and what pools weigh them by; as k_shared */
    KL_STATE_INDEX_GATE = 9,
    KL_STATE_POOL = 10, /* [position / pool, D_i] alike: a key for each whole pool */
} kl_state_part;

/* Shape (1 behind its last dimension) and type of a part of a layer's state; KL_ERR_ARG where the layer has no such part. */
KL_API kl_status kl_state_shape(kl_ctx *ctx, const kl_state *state, int64_t layer,
                                kl_state_part part, int64_t shape[3], int *n_dims,
                                kl_type *type) KL_CHECKED;
/* Copies it to the host, or from the host. Not while a call uses the state; of a lost one it fails. */
KL_API kl_status kl_state_read(kl_ctx *ctx, const kl_state *state, int64_t layer,
                               kl_state_part part, void *to) KL_CHECKED;
/* The same of checkpoint i, 0 the oldest: of a part that a checkpoint holds, not the cache. */
KL_API kl_status kl_state_read_checkpoint(kl_ctx *ctx, const kl_state *state, int64_t i,
                                          int64_t layer, kl_state_part part, void *to) KL_CHECKED;
KL_API kl_status kl_state_write(kl_ctx *ctx, kl_state *state, int64_t layer, kl_state_part part,
                                const void *from) KL_CHECKED;

/* ---- taps ---- */

/* MOE_SCORES, the router's sigmoid or softmax, is made only where a call asks for it or edits it.
 *
 * Every intermediate, named once: KL_TAP(id, name, where, first axis, second axis, type). The shape is
 * [T, first] or, where the second is not 0, [T, first, second]; c is the config. */
#define KL_TAPS(KL_TAP)                                                                            \
    KL_TAP(EMBED, "embed", MODEL, c->D, 0, F32)                                                    \
    KL_TAP(STREAMS, "streams", MODEL_STREAMS, c->hc.streams, c->D, F32)                            \
    KL_TAP(ATTN_RES, "attn_res", RESIDUALS, c->D, 0, F32)                                          \
    KL_TAP(ATTN_HC, "attn_hc", STREAMED, c->D, 0, F32)                                             \
    KL_TAP(ATTN_HC_POST, "attn_hc_post", STREAMED, c->hc.streams, 0, F32)                          \
    KL_TAP(ATTN_HC_COMB, "attn_hc_comb", STREAMED, c->hc.streams, c->hc.streams, F32)              \
    KL_TAP(ATTN_NORM, "attn_norm", LAYER, c->D, 0, F32)                                            \
    KL_TAP(KDA_Q_PROJ, "kda.q_proj", KDA, c->delta.Hk * c->delta.K, 0, F32)                        \
    KL_TAP(KDA_K_PROJ, "kda.k_proj", KDA, c->delta.Hk * c->delta.K, 0, F32)                        \
    KL_TAP(KDA_V_PROJ, "kda.v_proj", KDA, c->delta.Hk * c->delta.K, 0, F32)                        \
    KL_TAP(KDA_Q_CONV, "kda.q_conv", KDA, c->delta.Hk, c->delta.K, F32)                            \
    KL_TAP(KDA_K_CONV, "kda.k_conv", KDA, c->delta.Hk, c->delta.K, F32)                            \
    KL_TAP(KDA_V_CONV, "kda.v_conv", KDA, c->delta.Hk, c->delta.K, F32)                            \
    KL_TAP(KDA_Q, "kda.q", KDA, c->delta.Hk, c->delta.K, F32)                                      \
    KL_TAP(KDA_K, "kda.k", KDA, c->delta.Hk, c->delta.K, F32)                                      \
    KL_TAP(KDA_F_A, "kda.f_a", KDA, c->delta.K, 0, F32)                                            \
    KL_TAP(KDA_F, "kda.f", KDA, c->delta.Hk, c->delta.K, F32)                                      \
    KL_TAP(KDA_G, "kda.g", KDA, c->delta.Hk, c->delta.K, F32)                                      \
    KL_TAP(KDA_B, "kda.b", KDA, c->delta.Hk, 0, F32)                                               \
    KL_TAP(KDA_BETA, "kda.beta", KDA, c->delta.Hk, 0, F32)                                         \
    KL_TAP(KDA_O, "kda.o", KDA, c->delta.Hk, c->delta.K, F32)                                      \
    KL_TAP(KDA_G_A, "kda.g_a", KDA_LOW_RANK, c->delta.K, 0, F32)                                   \
    KL_TAP(KDA_Z, "kda.z", KDA, c->delta.Hk, c->delta.K, F32)                                      \
    KL_TAP(KDA_O_NORM, "kda.o_norm", KDA, c->delta.Hk, c->delta.K, F32)                            \
    KL_TAP(KDA_OUT, "kda.out", KDA, c->D, 0, F32)                                                  \
    KL_TAP(MLA_Q_A, "mla.q_a", MLA_LOW_RANK, c->mla.q_rank, 0, F32)                                \
    KL_TAP(MLA_Q_A_NORM, "mla.q_a_norm", MLA_LOW_RANK, c->mla.q_rank, 0, F32)                      \
    KL_TAP(MLA_Q, "mla.q", MLA, c->mla.heads, c->mla.nope + c->mla.rope, F32)                      \
    KL_TAP(MLA_LATENT_RAW, "mla.latent_raw", MLA, c->mla.rank, 0, F32)                             \
    KL_TAP(MLA_LATENT, "mla.latent", MLA, c->mla.rank, 0, F32)                                     \
    KL_TAP(MLA_K_SHARED, "mla.k_shared", MLA, c->mla.rope, 0, F32)                                 \
    KL_TAP(MLA_INDEX_Q, "mla.index_q", MLA_INDEXED, c->index.heads, c->index.width, F32)           \
    KL_TAP(MLA_INDEX_K_RAW, "mla.index_k_raw", MLA_INDEXED, c->index.width, 0, F32)                \
    KL_TAP(MLA_INDEX_K, "mla.index_k", MLA_INDEXED, c->index.width, 0, F32)                        \
    KL_TAP(MLA_INDEX_GATE, "mla.index_gate", MLA_INDEXED, c->index.width, 0, F32)                  \
    KL_TAP(MLA_INDEX_WEIGHTS, "mla.index_weights", MLA_INDEXED, c->index.heads, 0, F32)            \
    KL_TAP(MLA_SELECT, "mla.select", MLA_INDEXED, kl_index_width(c), 0, I32)                       \
    KL_TAP(MLA_O, "mla.o", MLA, c->mla.heads, c->mla.v, F32)                                       \
    KL_TAP(MLA_GATE, "mla.gate", MLA_GATED_OUT, c->mla.heads, c->mla.v, F32)                       \
    KL_TAP(MLA_GATED, "mla.gated", MLA_GATED_OUT, c->mla.heads, c->mla.v, F32)                     \
    KL_TAP(MLA_OUT, "mla.out", MLA, c->D, 0, F32)                                                  \
    KL_TAP(GDN_Q_PROJ, "gdn.q_proj", GDN, c->delta.Hk * c->delta.K, 0, F32)                        \
    KL_TAP(GDN_K_PROJ, "gdn.k_proj", GDN, c->delta.Hk * c->delta.K, 0, F32)                        \
    KL_TAP(GDN_V_PROJ, "gdn.v_proj", GDN, c->delta.Hv * c->delta.V, 0, F32)                        \
    KL_TAP(GDN_Q_CONV, "gdn.q_conv", GDN, c->delta.Hk, c->delta.K, F32)                            \
    KL_TAP(GDN_K_CONV, "gdn.k_conv", GDN, c->delta.Hk, c->delta.K, F32)                            \
    KL_TAP(GDN_V_CONV, "gdn.v_conv", GDN, c->delta.Hv, c->delta.V, F32)                            \
    KL_TAP(GDN_Q, "gdn.q", GDN, c->delta.Hk, c->delta.K, F32)                                      \
    KL_TAP(GDN_K, "gdn.k", GDN, c->delta.Hk, c->delta.K, F32)                                      \
    KL_TAP(GDN_A, "gdn.a", GDN, c->delta.Hv, 0, F32)                                               \
    KL_TAP(GDN_G, "gdn.g", GDN, c->delta.Hv, 0, F32)                                               \
    KL_TAP(GDN_B, "gdn.b", GDN, c->delta.Hv, 0, F32)                                               \
    KL_TAP(GDN_BETA, "gdn.beta", GDN, c->delta.Hv, 0, F32)                                         \
    KL_TAP(GDN_O, "gdn.o", GDN, c->delta.Hv, c->delta.V, F32)                                      \
    KL_TAP(GDN_Z, "gdn.z", GDN, c->delta.Hv, c->delta.V, F32)                                      \
    KL_TAP(GDN_O_NORM, "gdn.o_norm", GDN, c->delta.Hv, c->delta.V, F32)                            \
    KL_TAP(GDN_OUT, "gdn.out", GDN, c->D, 0, F32)                                                  \
    KL_TAP(ATTN_Q_PROJ, "attn.q_proj", ATTN, c->attn.heads, c->attn.width, F32)                    \
    KL_TAP(ATTN_GATE, "attn.gate", ATTN, c->attn.heads, c->attn.width, F32)                        \
    KL_TAP(ATTN_K_PROJ, "attn.k_proj", ATTN, c->attn.kv_heads, c->attn.width, F32)                 \
    KL_TAP(ATTN_V, "attn.v", ATTN, c->attn.kv_heads, c->attn.width, F32)                           \
    KL_TAP(ATTN_Q_NORM, "attn.q_norm", ATTN, c->attn.heads, c->attn.width, F32)                    \
    KL_TAP(ATTN_K_NORM, "attn.k_norm", ATTN, c->attn.kv_heads, c->attn.width, F32)                 \
    KL_TAP(ATTN_Q, "attn.q", ATTN, c->attn.heads, c->attn.width, F32)                              \
    KL_TAP(ATTN_K, "attn.k", ATTN, c->attn.kv_heads, c->attn.width, F32)                           \
    KL_TAP(ATTN_O, "attn.o", ATTN, c->attn.heads, c->attn.width, F32)                              \
    KL_TAP(ATTN_GATED, "attn.gated", ATTN, c->attn.heads, c->attn.width, F32)                      \
    KL_TAP(ATTN_OUT, "attn.out", ATTN, c->D, 0, F32)                                               \
    KL_TAP(MID, "mid", SUMMED, kl_stream_first(c), kl_stream_second(c), F32)                       \
    KL_TAP(FFN_RES, "ffn_res", RESIDUALS, c->D, 0, F32)                                            \
    KL_TAP(FFN_HC, "ffn_hc", STREAMED, c->D, 0, F32)                                               \
    KL_TAP(FFN_HC_POST, "ffn_hc_post", STREAMED, c->hc.streams, 0, F32)                            \
    KL_TAP(FFN_HC_COMB, "ffn_hc_comb", STREAMED, c->hc.streams, c->hc.streams, F32)                \
    KL_TAP(FFN_NORM, "ffn_norm", LAYER, c->D, 0, F32)                                              \
    KL_TAP(MLP_GATE, "mlp.gate", DENSE, c->ffn.dense, 0, F32)                                      \
    KL_TAP(MLP_UP, "mlp.up", DENSE, c->ffn.dense, 0, F32)                                          \
    KL_TAP(MLP_ACT, "mlp.act", DENSE, c->ffn.dense, 0, F32)                                        \
    KL_TAP(MLP_OUT, "mlp.out", DENSE, c->D, 0, F32)                                                \
    KL_TAP(MOE_LOGITS, "moe.logits", MOE, c->ffn.experts, 0, F32)                                  \
    KL_TAP(MOE_SCORES, "moe.scores", MOE, c->ffn.experts, 0, F32)                                  \
    KL_TAP(MOE_IDS, "moe.ids", MOE, c->ffn.k, 0, I32)                                              \
    KL_TAP(MOE_WEIGHTS, "moe.weights", MOE, c->ffn.k, 0, F32)                                      \
    KL_TAP(MOE_SHARED_GATE, "moe.shared_gate", MOE_SHARED, c->ffn.shared, 0, F32)                  \
    KL_TAP(MOE_SHARED_UP, "moe.shared_up", MOE_SHARED, c->ffn.shared, 0, F32)                      \
    KL_TAP(MOE_SHARED_ACT, "moe.shared_act", MOE_SHARED, c->ffn.shared, 0, F32)                    \
    KL_TAP(MOE_SHARED_OUT, "moe.shared", MOE_SHARED, c->D, 0, F32)                                 \
    KL_TAP(MOE_SHARED_G, "moe.shared_g", MOE_SHARED_GATED, 1, 0, F32)                              \
    KL_TAP(MOE_SHARED_GATED, "moe.shared_gated", MOE_SHARED_GATED, c->D, 0, F32)                   \
    KL_TAP(MOE_LATENT, "moe.latent", MOE_LATENTS, c->ffn.latent, 0, F32)                           \
    KL_TAP(MOE_ROUTED, "moe.routed", MOE_LATENTS, c->ffn.latent, 0, F32)                           \
    KL_TAP(MOE_ROUTED_NORM, "moe.routed_norm", MOE_LATENTS_NORMED, c->ffn.latent, 0, F32)          \
    KL_TAP(MOE_ROUTED_UP, "moe.routed_up", MOE_LATENTS_SHARED, c->D, 0, F32)                       \
    KL_TAP(MOE_OUT, "moe.out", MOE, c->D, 0, F32)                                                  \
    KL_TAP(OUT, "out", LAYER, kl_stream_first(c), kl_stream_second(c), F32)                        \
    KL_TAP(OUTPUT_RES, "output_res", MODEL_RESIDUALS, c->D, 0, F32)                                \
    KL_TAP(COLLAPSED, "collapsed", MODEL_STREAMS, c->D, 0, F32)                                    \
    KL_TAP(NORM, "norm", MODEL, c->D, 0, F32)

typedef enum kl_tap {
#define KL_TAP(id, name, where, first, second, type) KL_TAP_##id,
    KL_TAPS(KL_TAP)
#undef KL_TAP
        KL_TAP_COUNT
} kl_tap;

/* Name and shape [T, ...] without T; layer -1 for the model's own. 0 where this layer has no such tap. */
KL_API int kl_tap_shape(const kl_config *config, kl_tap tap, int64_t layer, const char **name,
                        int64_t shape[2], int *n_dims, int *is_int32);

/* ---- forward ---- */

/* Replaces rows of a tap: values [rows, width] on the host, float32 or int32, are rows call_row.. of the
 * call, of one sequence. Called once a pass and sequence, on the thread of the call. A status other than
 * KL_OK ends the call, which leaves the states at the end of the pass before. */
typedef kl_status (*kl_edit)(void *user, kl_ctx *ctx, kl_tap tap, int64_t layer, int64_t call_row,
                             int64_t rows, int64_t width, void *values);

typedef struct kl_forward_args {
    const int32_t *ids;     /* [T] token ids, sequence after sequence; may be NULL beside embeds */
    const int64_t *offsets; /* [N+1] */
    int64_t N;
    kl_state *const *states;   /* [N], all different */
    float *logits;             /* [n_logits, vocab] on the host */
    const int64_t *logit_rows; /* [n_logits] rising, rows of the call; logits are of these */
    int64_t n_logits;
    void *const
        *taps; /* NULL, or [n_layers + 1][KL_TAP_COUNT] host arrays [T, ...]; NULL: not wanted.
                          Row n_layers holds the model's own. */
    const int32_t *const
        *expert_ids;     /* NULL, or [n_layers] host arrays [T, k]: routing given, or NULL */
    int check_finite;    /* 1: the first tap that is not finite is an error that names it */
    int64_t pass_tokens; /* 0: 512; else 64 or more */
    int64_t *
        done; /* NULL, or [N]: new tokens of each sequence that its state has read, also on failure */
    kl_edit edit; /* NULL, or called where edited says so, before the tap is handed out */
    void *edit_user;
    const unsigned char *edited; /* [n_layers + 1][KL_TAP_COUNT], as taps: 1 where edit is called */
    const float *embeds; /* NULL, or [T, D] on the host: what enters layer start, instead of rows of
                            the embedding; more where layers hand on more */
    /* Layers start..stop-1 are run; stop 0: to the last. Short of the last there is no final norm and there
     * are no logits; start above 0 needs embeds, and start = n_layers is the final norm and the head alone. With
     * attention residuals embeds are [kl_stream_parts, T, D], with hyper-connections, above 0, [T, kl_stream_parts, D]. */
    int64_t start, stop;
} kl_forward_args;

/* Arrays [T, D] that enter a layer: 1; with attention residuals ceil(layer / attn_res_block) snapshots, oldest first,
 * before what has been added up since; with hyper-connections their streams, but 1 for layer 0. */
KL_API int64_t kl_stream_parts(const kl_config *config, int64_t layer);

KL_API kl_status kl_forward(kl_ctx *ctx, const kl_model *model,
                            const kl_forward_args *args) KL_CHECKED;

/* ---- plan ---- */

typedef struct kl_plan {
    size_t weights;     /* mapped from the checkpoint, not copied */
    size_t vectors;     /* float32 copies of vectors and convolution taps */
    size_t state_fixed; /* of one sequence: convolution histories and delta states */
    size_t state_page;  /* each KL_PAGE positions of one sequence's cache */
    size_t state;       /* all sequences at the full context */
    size_t scratch;     /* of the widest pass, whichever sequences it reads together */
} kl_plan;

/* Bytes, before anything is taken: sequences of context tokens each, passes of pass_tokens (0: 512; fewer than 64 where
 * no call has more). */
KL_API kl_status kl_plan_make(kl_ctx *ctx, kl_plan *plan, const kl_model *model, kl_type cache_type,
                              int64_t context, int64_t sequences, int64_t pass_tokens) KL_CHECKED;

#endif
