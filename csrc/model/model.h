/* The model inside: weights by role, where each layer's state lies. */
#ifndef KL_MODEL_H
#define KL_MODEL_H

#include "../ops/ops.h"

/* A delta net. Its decay f and its output gate z are one projection of x each (GDN), or a low rank and what
 * follows it (KDA). */
typedef struct delta_weights {
    kl_weight q, k, v, b, o;
    kl_weight f_x, z_x;                    /* of x */
    kl_weight f_b, z_b;                    /* of the low rank; n = 0 where there is none */
    const float *q_conv, *k_conv, *v_conv; /* [Hk*K, W], alike, [Hv*V, W] */
    const float *rate, *dt_bias, *o_norm;  /* [Hv], [Hv*K] or [Hv], [V] */
} delta_weights;

typedef struct attn_weights {
    kl_weight q, gate; /* a matrix a head: rows of q_proj */
    kl_weight k, v, o;
    const float *q_norm, *k_norm; /* [K] */
} attn_weights;

/* What chooses the positions that MLA attends to: q of its low-rank query, the others of x. */
typedef struct index_weights {
    kl_weight q, k, gate, weights;
    const float *k_norm, *k_bias, *ape; /* [D_i], [D_i], [pool, D_i] */
} index_weights;

typedef struct mla_weights {
    kl_weight q;                /* the plain projection, or the second of two */
    kl_weight q_a;              /* low-rank q; q_a_norm NULL where q is plain */
    kl_weight latent, k_shared; /* rows of kv_a_proj_with_mqa */
    kl_weight w_uk, w_uv;       /* [H of nope x R], [H of v x R]: rows of kv_b_proj */
    kl_weight o;
    kl_weight gate; /* n = 0 where the output is not gated */
    index_weights index;
    const float *q_a_norm, *latent_norm;
} mla_weights;

typedef struct mlp_weights {
    kl_weight gate, up, down;
} mlp_weights;

typedef struct moe_weights {
    kl_weight router;
    const float *bias;        /* [E], or NULL */
    kl_weight gate, up, down; /* n = E */
    kl_weight latent_down,
        latent_up; /* around them; n = 0 where they read and write the width of the model */
    const float *latent_norm; /* NULL where there is none */
    mlp_weights shared;       /* n = 0 where there is none */
    kl_weight shared_gate;    /* [1, D]; n = 0 where the shared expert is not gated */
} moe_weights;

/* Of hyper-connections. */
typedef struct hc_weights {
    kl_weight fn;              /* [(2 + streams) streams, streams D] */
    const float *base, *scale; /* [(2 + streams) streams], [3] */
} hc_weights;

/* Between the stream and a block. */
typedef struct half_weights {
    const float *res; /* [D], of attention residuals; NULL without */
    hc_weights hc;
    const float *norm; /* [D] */
} half_weights;

typedef struct layer_weights {
    half_weights before_mixer, before_ffn;
    union {
        delta_weights delta;
        mla_weights mla;
        attn_weights attn;
    };
    union {
        mlp_weights mlp;
        moe_weights moe;
    };
} layer_weights;

/* Where a delta net's parts lie, in bytes from the start of a sequence's fixed block. */
typedef struct layer_layout {
    size_t q_history, k_history, v_history, delta;
} layer_layout;

struct kl_model {
    kl_config config;
    kl_layer *layers; /* config.layers */
    const kl_backend *backend;
    int device_number;
    kl_weight embed, head;
    const float *norm, *output_res;
    layer_weights *layer; /* [n_layers] */
    layer_layout *layout; /* [n_layers] */
    size_t fixed_bytes;   /* of one sequence's delta nets */
    size_t weight_bytes;
    char *matrices; /* all of them, where the backend does not read host memory; else NULL */
    size_t matrix_bytes;
    float *vectors; /* in the backend's memory */
    size_t vector_bytes;
    const void **addresses; /* of all matrices */
    size_t n_addresses;
    int planning;
};

struct kl_state {
    const kl_model *model;
    kl_type cache_type;
    int64_t position;
    char *fixed; /* the backend's memory */
    void **page; /* [page_capacity] addresses, the first n_pages taken */
    int64_t n_pages, page_capacity;
    int64_t context;        /* tokens it may hold; 0: no limit */
    int64_t every, keep;    /* a checkpoint at each multiple of every; 0: none */
    char *checkpoint;       /* [keep] copies of the fixed block, a ring: the backend's memory */
    int64_t *checkpoint_at; /* [keep] positions */
    int64_t n_checkpoints, oldest; /* in the ring; slot of the oldest */
    int past_start; /* a checkpoint was given up, or there was none at the start: it cannot go back to 0 */
    atomic_int busy;
    int lost; /* a step failed half-way: its arrays belong to no position */
};

/* Whether a call of who may use the model, and states of it, with this context: they are of one backend. */
kl_status kl_model_check_ctx(kl_ctx *ctx, const kl_model *model, const char *who);

/* The cache of a model in a type: whether it can be; where a layer's part lies, its page table left open;
 * bytes of a page, which holds KL_PAGE positions of every layer that caches. */
kl_status kl_cache_check(kl_ctx *ctx, const kl_model *model, kl_type type) KL_CHECKED;
kl_cache kl_cache_of(const kl_model *model, kl_type type, int64_t layer, kl_state_part part);
int64_t kl_cache_width(const kl_model *model, int64_t layer, kl_state_part part); /* values a row */
size_t kl_cache_page_bytes(const kl_model *model, kl_type type);

/* Takes the pages that positions 0..n-1 need. */
kl_status kl_state_grow(kl_ctx *ctx, kl_state *state, int64_t n);

/* One call at a time: KL_ERR_STATE, in the name of who, while another uses the state. */
kl_status kl_state_acquire(kl_ctx *ctx, kl_state *state, const char *who);
void kl_state_release(kl_state *state);
/* The first position behind `position` where the state wants a checkpoint; INT64_MAX where it wants none. */
int64_t kl_state_next_checkpoint(const kl_state *state, int64_t position);
/* Moves the state on to the end of a pass, and makes the checkpoint that is due; without it where a device does
 * not copy. */
void kl_state_advance(kl_ctx *ctx, kl_state *state, int64_t end);

kl_status kl_config_check(kl_ctx *ctx, const kl_config *config);

/* The axes of the stream between layers, behind tokens: [D], or [streams, D]. */
static inline int64_t kl_stream_first(const kl_config *c)
{
    return c->hc.streams > 0 ? c->hc.streams : c->D;
}
static inline int64_t kl_stream_second(const kl_config *c) { return c->hc.streams > 0 ? c->D : 0; }

/* Positions of a row of mla.select: those of the chosen pools, and the query's own that fill no pool yet. */
static inline int64_t kl_index_width(const kl_config *c)
{
    return c->index.topk + c->index.pool - 1;
}

/* Whether a layer of a model with attention residuals keeps what has been added up as a snapshot, and its mixer's
 * output is the first of a new sum. */
static inline bool kl_begins_block(const kl_config *c, int64_t layer)
{
    return c->attn_res_block > 0 && layer % c->attn_res_block == 0;
}

#endif
