/* Checks of a config, and the shapes of its taps. */
#include "model.h"

#include <float.h>
#include <math.h>

enum { MIXERS = KL_MIXER_ATTN + 1, FFNS = KL_FFN_MOE + 1 };

/* Each layer's parts are among those there are. */
static kl_status check_layers(kl_ctx *ctx, const kl_config *c)
{
    if (c->layers == NULL)
        return kl_fail(ctx, KL_ERR_ARG, "config: layers is NULL; it must be [n_layers]");
    for (int64_t i = 0; i < c->n_layers; i++) {
        const int mixer = (int)c->layers[i].mixer, ffn = (int)c->layers[i].ffn;
        if (mixer < 0 || mixer >= MIXERS)
            return kl_fail(ctx, KL_ERR_ARG, "config: layer %lld has mixer %d; it must be 0 to %d",
                           (long long)i, mixer, MIXERS - 1);
        if (ffn < 0 || ffn >= FFNS)
            return kl_fail(ctx, KL_ERR_ARG, "config: layer %lld has ffn %d; it must be 0 to %d",
                           (long long)i, ffn, FFNS - 1);
    }
    return KL_OK;
}

/* What route wants of groups. */
static kl_status check_groups(kl_ctx *ctx, const kl_config *c)
{
    const int64_t E = c->ffn.experts, groups = c->ffn.groups, top = c->ffn.top_groups;
    if (E % groups != 0)
        return kl_fail(ctx, KL_ERR_ARG, "config: n_groups is %lld; it must divide n_experts, %lld",
                       (long long)groups, (long long)E);
    if (c->ffn.k > E / groups * top)
        return kl_fail(ctx, KL_ERR_ARG,
                       "config: experts_per_token is %lld; %lld groups of %lld experts have fewer",
                       (long long)c->ffn.k, (long long)top, (long long)(E / groups));
    return KL_OK;
}

/* How the heads of a mixer fit each other. */
static kl_status check_heads(kl_ctx *ctx, const kl_config *c, bool kda, bool gdn, bool attn)
{
    if (kda && gdn)
        return kl_fail(ctx, KL_ERR_UNSUPPORTED,
                       "config: layers are both kda and gdn; a model has delta nets of one kind");
    if (kda && (c->delta.Hv != c->delta.Hk || c->delta.V != c->delta.K))
        return kl_fail(ctx, KL_ERR_ARG,
                       "config: kda has key and value heads of one number and width");
    if (gdn && c->delta.Hv % c->delta.Hk != 0)
        return kl_fail(ctx, KL_ERR_ARG,
                       "config: gdn_v_heads is %lld; it must be a multiple of gdn_k_heads, %lld",
                       (long long)c->delta.Hv, (long long)c->delta.Hk);
    if (attn && c->attn.heads % c->attn.kv_heads != 0)
        return kl_fail(ctx, KL_ERR_ARG,
                       "config: attn_heads is %lld; it must be a multiple of attn_kv_heads, %lld",
                       (long long)c->attn.heads, (long long)c->attn.kv_heads);
    if (attn && c->attn.rotary % 2 != 0)
        return kl_fail(ctx, KL_ERR_ARG, "config: rotary_dim is %lld; it must be even",
                       (long long)c->attn.rotary);
    return KL_OK;
}

/* A stream is mixed in one way. */
static kl_status check_streams(kl_ctx *ctx, const kl_config *c)
{
    if (c->hc.streams > 0 && c->attn_res_block > 0)
        return kl_fail(ctx, KL_ERR_UNSUPPORTED,
                       "config: streams is %lld and attn_res_block %lld; one of them must be 0",
                       (long long)c->hc.streams, (long long)c->attn_res_block);
    return KL_OK;
}

/* Pools are whole in a page, in what is chosen, and in the rows that keep their keys. */
static kl_status check_index(kl_ctx *ctx, const kl_config *c)
{
    const struct {
        const char *name;
        int64_t value;
    } multiples[] = { { "KL_PAGE", KL_PAGE },
                      { "index_topk", c->index.topk },
                      { "index_dim", c->index.width } };
    for (size_t i = 0; i < sizeof multiples / sizeof multiples[0]; i++)
        if (multiples[i].value % c->index.pool != 0)
            return kl_fail(ctx, KL_ERR_ARG, "config: index_pool is %lld; it must divide %s, %lld",
                           (long long)c->index.pool, multiples[i].name,
                           (long long)multiples[i].value);
    if (c->mla.q_rank == 0)
        return kl_fail(ctx, KL_ERR_ARG,
                       "config: q_rank is 0; it must be above 0 where there is an indexer, whose "
                       "queries are made of the low-rank ones");
    return KL_OK;
}

/* What a layer keeps of a sequence, a page of the cache at a time, for all layers: its bytes cannot overflow. */
static kl_status check_state_size(kl_ctx *ctx, const kl_config *c, bool delta, bool mla, bool attn)
{
    int64_t widest = 0, all;
    if (delta)
        widest = c->delta.Hv * c->delta.K * c->delta.V;
    if (mla)
        widest = kl_max(widest, KL_PAGE * (c->mla.rank + c->mla.rope + 3 * c->index.width));
    if (attn)
        widest = kl_max(widest, KL_PAGE * 2 * c->attn.kv_heads * c->attn.width);
    if (!kl_mul(&all, widest, c->n_layers) || all > INT64_C(1) << 56)
        return kl_fail(ctx, KL_ERR_ARG,
                       "config: %lld layers of a state of %lld values are more than 2^56",
                       (long long)c->n_layers, (long long)widest);
    return KL_OK;
}

/* The numbers that are no sizes, as the ops that get them have them. */
static kl_status check_reals(kl_ctx *ctx, const kl_config *c, bool delta, bool mla, bool attn,
                             bool moe)
{
    const struct {
        const char *name, *rule;
        bool used;
        double value, low, high;
    } checks[] = {
        { "rms_norm_eps", "finite and >= 0", true, (double)c->rms_eps, 0, HUGE_VAL },
        { "latent_eps", "finite and >= 0", mla, (double)c->latent_eps, 0, HUGE_VAL },
        { "l2_eps", "finite and >= 0", delta, (double)c->l2_eps, 0, HUGE_VAL },
        { "gate_lower_bound", "finite and < 0, or 0 for none", delta, (double)c->delta.lower_bound,
          -HUGE_VAL, 0 },
        { "rope_base", "finite and > 0", attn && c->attn.rotary > 0, c->attn.rope_base,
          DBL_TRUE_MIN, HUGE_VAL },
        { "routed_scale", "finite", moe, (double)c->ffn.scale, -HUGE_VAL, HUGE_VAL },
        { "stream_eps", "finite and >= 0", c->hc.streams > 0, (double)c->hc.eps, 0, HUGE_VAL },
        { "index_eps", "finite and >= 0", mla && c->index.heads > 0, (double)c->index.eps, 0,
          HUGE_VAL },
        { "swiglu_limit", "finite and > 0, or 0 for none", true, (double)c->ffn.limit, 0,
          HUGE_VAL },
        { "situ_beta", "finite and > 0, or 0 for swiglu", true, (double)c->ffn.situ.beta, 0,
          HUGE_VAL },
        { "situ_linear_beta", "finite and > 0, or 0 for none", true,
          (double)c->ffn.situ.linear_beta, 0, HUGE_VAL },
    };
    for (size_t i = 0; i < sizeof checks / sizeof checks[0]; i++) {
        const double x = checks[i].value;
        if (checks[i].used && !(isfinite(x) && x >= checks[i].low && x <= checks[i].high))
            return kl_fail(ctx, KL_ERR_ARG, "config: %s is %g; it must be %s", checks[i].name, x,
                           checks[i].rule);
    }
    return KL_OK;
}

kl_status kl_config_check(kl_ctx *ctx, const kl_config *c)
{
    bool mixer[MIXERS] = { false }, dense = false, moe = false;
    const struct {
        const char *name;
        int64_t value;
    } sizes[] = { { "vocab_size", c->vocab },
                  { "hidden_size", c->D },
                  { "n_layers", c->n_layers } };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        if (sizes[i].value < 1 || sizes[i].value > INT32_MAX)
            return kl_fail(ctx, KL_ERR_ARG, "config: %s is %lld; it must be 1 to 2^31 - 1",
                           sizes[i].name, (long long)sizes[i].value);
    KL_TRY(check_layers(ctx, c));
    for (int64_t i = 0; i < c->n_layers; i++) {
        mixer[c->layers[i].mixer] = true;
        dense |= c->layers[i].ffn == KL_FFN_DENSE;
        moe |= c->layers[i].ffn == KL_FFN_MOE;
    }
    const bool kda = mixer[KL_MIXER_KDA], mla = mixer[KL_MIXER_MLA], gdn = mixer[KL_MIXER_GDN],
               attn = mixer[KL_MIXER_ATTN], indexed = mla && c->index.heads > 0;
    const struct {
        const char *name;
        bool used;
        int64_t value, low, high;
    } checks[] = {
        { "activations", true, c->activations, 0, KL_ACTIVATIONS_BFLOAT16 },
        { "kda_heads", kda, c->delta.Hk, 1, 1 << 20 },
        { "kda_head_dim", kda, c->delta.K, 1, 1 << 20 },
        { "gdn_k_heads", gdn, c->delta.Hk, 1, 1 << 20 },
        { "gdn_v_heads", gdn, c->delta.Hv, 1, 1 << 20 },
        { "gdn_k_dim", gdn, c->delta.K, 1, 1 << 20 },
        { "gdn_v_dim", gdn, c->delta.V, 1, 1 << 20 },
        { "conv_width", kda || gdn, c->delta.taps, 1, 8 },
        { "head_map", kda || gdn, c->delta.head_map, 0, KL_HEADS_TILED },
        { "mla_heads", mla, c->mla.heads, 1, 1 << 20 },
        { "nope_dim", mla, c->mla.nope, 1, 1 << 20 },
        { "rope_dim", mla, c->mla.rope, 0, 1 << 20 },
        { "v_head_dim", mla, c->mla.v, 1, 1 << 20 },
        { "kv_rank", mla, c->mla.rank, 1, 1 << 20 },
        { "q_rank", mla, c->mla.q_rank, 0, 1 << 20 },
        { "attn_heads", attn, c->attn.heads, 1, 1 << 20 },
        { "attn_kv_heads", attn, c->attn.kv_heads, 1, 1 << 20 },
        { "attn_head_dim", attn, c->attn.width, 1, 1 << 20 },
        { "rotary_dim", attn, c->attn.rotary, 0, c->attn.width },
        { "attn_res_block", true, c->attn_res_block, 0, INT32_MAX },
        { "streams", true, c->hc.streams, 0, KL_MHC_STREAMS },
        { "stream_passes", c->hc.streams > 0, c->hc.passes, 1, KL_MHC_ITERS },
        { "index_heads", mla, c->index.heads, 0, 1 << 20 },
        { "index_dim", indexed, c->index.width, 1, 1 << 20 },
        { "index_topk", indexed, c->index.topk, 1, 1 << 28 },
        { "index_pool", indexed, c->index.pool, 1, KL_PAGE },
        { "ffn_size", dense, c->ffn.dense, 1, 1 << 24 },
        { "n_experts", moe, c->ffn.experts, 1, 1 << 20 },
        { "moe_size", moe, c->ffn.width, 1, 1 << 24 },
        { "expert_latent", moe, c->ffn.latent, 0, 1 << 24 },
        { "experts_per_token", moe, c->ffn.k, 1, c->ffn.experts },
        { "shared_size", moe, c->ffn.shared, 0, 1 << 24 },
        { "n_groups", moe, c->ffn.groups, 1, c->ffn.experts },
        { "top_groups", moe, c->ffn.top_groups, 1, c->ffn.groups },
        { "router", moe, c->ffn.router, 0, KL_ROUTER_SOFTMAX },
    };
    for (size_t i = 0; i < sizeof checks / sizeof checks[0]; i++)
        if (checks[i].used && (checks[i].value < checks[i].low || checks[i].value > checks[i].high))
            return kl_fail(ctx, KL_ERR_ARG, "config: %s is %lld; it must be %lld to %lld",
                           checks[i].name, (long long)checks[i].value, (long long)checks[i].low,
                           (long long)checks[i].high);
    KL_TRY(check_heads(ctx, c, kda, gdn, attn));
    KL_TRY(check_streams(ctx, c));
    if (indexed)
        KL_TRY(check_index(ctx, c));
    if (moe)
        KL_TRY(check_groups(ctx, c));
    KL_TRY(check_reals(ctx, c, kda || gdn, mla, attn, moe));
    return check_state_size(ctx, c, kda || gdn, mla, attn);
}

int64_t kl_stream_parts(const kl_config *c, int64_t layer)
{
    const bool mixes = c->attn_res_block > 0 && layer > 0 && layer <= c->n_layers;
    if (c->hc.streams > 0 && layer > 0)
        return c->hc.streams;
    return 1 + (mixes ? kl_ceil_div(layer, c->attn_res_block) : 0);
}

enum {
    MODEL,
    MODEL_RESIDUALS,
    MODEL_STREAMS,
    LAYER,
    RESIDUALS,
    STREAMED,
    SUMMED,
    KDA,
    KDA_LOW_RANK,
    MLA,
    MLA_LOW_RANK,
    MLA_GATED_OUT,
    MLA_INDEXED,
    GDN,
    ATTN,
    DENSE,
    MOE,
    MOE_SHARED,
    MOE_SHARED_GATED,
    MOE_LATENTS,
    MOE_LATENTS_NORMED,
    MOE_LATENTS_SHARED,
};
enum { F32, I32 };

static bool is_at(const kl_config *c, int where, int64_t layer)
{
    if (layer < 0)
        return where == MODEL || (where == MODEL_RESIDUALS && c->attn_res_block > 0)
               || (where == MODEL_STREAMS && c->hc.streams > 0);
    if (layer >= c->n_layers)
        return false;
    const bool kda = c->layers[layer].mixer == KL_MIXER_KDA,
               mla = c->layers[layer].mixer == KL_MIXER_MLA,
               moe = c->layers[layer].ffn == KL_FFN_MOE, shared = moe && c->ffn.shared > 0,
               latents = moe && c->ffn.latent > 0;
    switch (where) {
    case LAYER: return true;
    case RESIDUALS: return c->attn_res_block > 0;
    case STREAMED: return c->hc.streams > 0;
    case SUMMED: return !kl_begins_block(c, layer);
    case KDA: return kda;
    case KDA_LOW_RANK: return kda && !c->delta.full_rank_gate;
    case MLA: return mla;
    case MLA_LOW_RANK: return mla && c->mla.q_rank > 0;
    case MLA_GATED_OUT: return mla && c->mla.gated;
    case MLA_INDEXED: return mla && c->index.heads > 0;
    case GDN: return c->layers[layer].mixer == KL_MIXER_GDN;
    case ATTN: return c->layers[layer].mixer == KL_MIXER_ATTN;
    case DENSE: return !moe;
    case MOE: return moe;
    case MOE_SHARED: return shared;
    case MOE_SHARED_GATED: return shared && c->ffn.shared_gated;
    case MOE_LATENTS: return latents;
    case MOE_LATENTS_NORMED: return latents && c->ffn.latent_norm;
    case MOE_LATENTS_SHARED: return latents && shared;
    }
    return false;
}

int kl_tap_shape(const kl_config *c, kl_tap tap, int64_t layer, const char **name, int64_t shape[2],
                 int *n_dims, int *is_int32)
{
    const struct {
        const char *name;
        int where, type;
        int64_t first, second;
    } taps[] = {
#define KL_TAP(id, tap_name, tap_where, tap_first, tap_second, tap_type)                           \
    { tap_name, tap_where, tap_type, tap_first, tap_second },
        KL_TAPS(KL_TAP)
#undef KL_TAP
    };
    if (tap < 0 || tap >= KL_TAP_COUNT || !is_at(c, taps[tap].where, layer))
        return 0;
    *name = taps[tap].name;
    shape[0] = taps[tap].first;
    shape[1] = taps[tap].second;
    *n_dims = taps[tap].second != 0 ? 2 : 1;
    *is_int32 = taps[tap].type == I32;
    return 1;
}
