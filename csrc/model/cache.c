/* Where a page keeps what: layer by layer, KL_PAGE rows of the first kind, then KL_PAGE of the second, and so on. MLA has
 * latents and shared keys, with an indexer also its keys, what pools weigh them by, and a key for each pool, which lies
 * in the rows of its positions, an equal part in each; ATTN has keys and values; a delta net caches nothing. */
#include "model.h"

typedef struct row {
    const char *name;
    int64_t width;
} row;

enum { KINDS = 5 };

static void rows_of(const kl_config *c, int64_t layer, row rows[KINDS])
{
    for (int i = 0; i < KINDS; i++)
        rows[i] = (row){ "", 0 };
    if (c->layers[layer].mixer == KL_MIXER_MLA) {
        rows[0] = (row){ "latent", c->mla.rank };
        rows[1] = (row){ "shared key", c->mla.rope };
        if (c->index.heads == 0)
            return;
        rows[2] = (row){ "index key", c->index.width };
        rows[3] = (row){ "index gate", c->index.width };
        rows[4] = (row){ "pool key", c->index.width / c->index.pool };
    } else if (c->layers[layer].mixer == KL_MIXER_ATTN) {
        rows[0] = (row){ "keys", c->attn.kv_heads * c->attn.width };
        rows[1] = (row){ "values", c->attn.kv_heads * c->attn.width };
    }
}

/* A row behind the first that whole blocks do not make up is kept in float16. */
static kl_type row_type(kl_type type, const row rows[KINDS], int which)
{
    return which == 0 || rows[which].width % kl_type_block(type) == 0 ? type : KL_F16;
}

static size_t row_bytes(kl_type type, const row rows[KINDS], int which)
{
    return kl_type_bytes(row_type(type, rows, which), rows[which].width);
}

/* of the layers before this one */
static size_t page_bytes_before(const kl_model *model, kl_type type, int64_t layer)
{
    size_t bytes = 0;
    row rows[KINDS];
    for (int64_t i = 0; i < layer; i++) {
        rows_of(&model->config, i, rows);
        for (int which = 0; which < KINDS; which++)
            bytes += KL_PAGE * row_bytes(type, rows, which);
    }
    return bytes;
}

kl_status kl_cache_check(kl_ctx *ctx, const kl_model *model, kl_type type)
{
    row rows[KINDS];
    if (type != KL_F32 && type != KL_F16 && type != KL_Q8_0)
        return kl_fail(ctx, KL_ERR_DTYPE, "cache is of type %d; it must be F32, F16 or Q8_0",
                       (int)type);
    for (int64_t i = 0; i < model->config.n_layers; i++) {
        rows_of(&model->config, i, rows);
        if (rows[0].width % kl_type_block(type) != 0)
            return kl_fail(ctx, KL_ERR_SHAPE,
                           "cache is of type %s, blocks of %lld values, which do not divide the "
                           "%s's %lld; it must be F32 or F16",
                           kl_type_name(type), (long long)kl_type_block(type), rows[0].name,
                           (long long)rows[0].width);
    }
    return KL_OK;
}

static int row_of(kl_state_part part)
{
    switch (part) {
    case KL_STATE_K_SHARED:
    case KL_STATE_VALUES: return 1;
    case KL_STATE_INDEX_K: return 2;
    case KL_STATE_INDEX_GATE: return 3;
    case KL_STATE_POOL: return 4;
    default: return 0;
    }
}

kl_cache kl_cache_of(const kl_model *model, kl_type type, int64_t layer, kl_state_part part)
{
    const int which = row_of(part);
    row rows[KINDS];
    rows_of(&model->config, layer, rows);
    size_t first = 0;
    for (int before = 0; before < which; before++)
        first += KL_PAGE * row_bytes(type, rows, before);
    return (kl_cache){ NULL, page_bytes_before(model, type, layer) + first,
                       row_bytes(type, rows, which), row_type(type, rows, which) };
}

int64_t kl_cache_width(const kl_model *model, int64_t layer, kl_state_part part)
{
    row rows[KINDS];
    rows_of(&model->config, layer, rows);
    return rows[row_of(part)].width;
}

size_t kl_cache_page_bytes(const kl_model *model, kl_type type)
{
    return page_bytes_before(model, type, model->config.n_layers);
}
