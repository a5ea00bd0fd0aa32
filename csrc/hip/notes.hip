/* Wrong values that only the device sees: where kernels note the first of each kind (kl_note), and its sentence. */
#include "handle.h"

#include <string.h>

namespace
{

const size_t NOTED_BYTES = KL_FAULTS * sizeof(unsigned long long);

/* how wide the rows are in which a place is counted */
int64_t width_of(const kl_handle *h, int kind)
{
    if (kind < KL_CACHES)
        return h->caches[kind].D;
    if (kind == KL_FAULT_BIAS)
        return INT64_MAX;
    if (kind == KL_FAULT_SELECT)
        return h->select_width;
    return kind == KL_FAULT_SCORES ? h->E : h->k;
}

kl_status sentence_of(kl_ctx *ctx, const kl_handle *h, int kind, unsigned long long noted)
{
    const int64_t place = static_cast<int64_t>(noted >> 32), cols = width_of(h, kind);
    const uint32_t bits = static_cast<uint32_t>(noted);
    const long long row = place / cols, col = place % cols;
    float value;
    int32_t id;
    memcpy(&value, &bits, sizeof value);
    memcpy(&id, &bits, sizeof id);
    if (kind < KL_CACHES) {
        const bool half = h->caches[kind].type == KL_F16;
        return kl_core_of->fail(
            ctx, KL_ERR_ARG,
            "%s[%lld, %lld] is %g, too large for a %s cache (%s at most); use a float32 cache",
            h->caches[kind].what, row, col, static_cast<double>(value), half ? "float16" : "q8_0",
            half ? "65504" : "8319008");
    }
    if (kind == KL_FAULT_BIAS)
        return kl_core_of->fail(ctx, KL_ERR_ARG,
                                "route: bias[%lld] is %g; it must be a number below infinity", col,
                                static_cast<double>(value));
    if (kind == KL_FAULT_SELECT)
        return kl_core_of->fail(
            ctx, KL_ERR_ARG,
            "latent_attention: select[%lld, %lld] (query, entry) is %d; it must be a position "
            "that the query sees, after the one before it, or -1 behind the last",
            row, col, static_cast<int>(id));
    if (kind == KL_FAULT_SCORES && value != value)
        return kl_core_of->fail(
            ctx, KL_ERR_ARG,
            "route: scores[%lld, %lld] (token, expert) is NaN; scores must be numbers", row, col);
    if (kind == KL_FAULT_SCORES)
        return kl_core_of->fail(ctx, KL_ERR_ARG,
                                "route: scores[%lld, %lld] is %g, the largest of its token; with "
                                "softmax that must be finite",
                                row, col, static_cast<double>(value));
    return kl_core_of->fail(
        ctx, KL_ERR_ARG,
        "%s: ids[%lld, %lld] (token, slot) is %d; ids of a token must rise within 0 to %lld",
        kind == KL_FAULT_MOE_IDS ? "moe" : "route", row, col, static_cast<int>(id),
        static_cast<long long>(h->E) - 1);
}

kl_status forget(kl_ctx *ctx, kl_handle *h)
{
    return kl_check(ctx, "clear", hipMemsetAsync(h->faults, 0xff, NOTED_BYTES, h->stream));
}

} // namespace

kl_status kl_open_notes(kl_ctx *ctx, kl_handle *h)
{
    void *noted = nullptr;
    KL_TRY(kl_check(ctx, "device: memory", hipMalloc(&noted, NOTED_BYTES)));
    h->faults = static_cast<unsigned long long *>(noted);
    return forget(ctx, h);
}

void kl_close_notes(kl_handle *h) { (void)hipFree(h->faults); }

kl_status kl_look_at_notes(kl_ctx *ctx)
{
    kl_handle *h = kl_handle_of(ctx);
    unsigned long long noted[KL_FAULTS];
    if (!h->noting)
        return KL_OK;
    h->noting = false;
    h->n_caches = 0;
    KL_TRY(kl_move(ctx, "download", noted, h->faults, NOTED_BYTES, hipMemcpyDeviceToHost));
    KL_TRY(kl_wait(ctx, "download"));
    for (int kind = 0; kind < KL_FAULTS; kind++)
        if (noted[kind] != ~0ULL) {
            KL_TRY(forget(ctx, h));
            return sentence_of(ctx, h, kind, noted[kind]);
        }
    return KL_OK;
}

kl_status kl_faults_of(kl_ctx *ctx, unsigned long long **faults, int64_t E, int64_t k)
{
    kl_handle *h = kl_handle_of(ctx);
    if (h->noting && (h->E != E || h->k != k)) /* notes of another shape: looked at first */
        KL_TRY(kl_look_at_notes(ctx));
    h->noting = true;
    h->E = E;
    h->k = k;
    *faults = h->faults;
    return KL_OK;
}

kl_status kl_select_fault_of(kl_ctx *ctx, unsigned long long **fault, int64_t width)
{
    kl_handle *h = kl_handle_of(ctx);
    if (h->noting && h->select_width != 0 && h->select_width != width)
        KL_TRY(kl_look_at_notes(ctx));
    h->noting = true;
    h->select_width = width;
    *fault = h->faults + KL_FAULT_SELECT;
    return KL_OK;
}

kl_status kl_cache_fault_of(kl_ctx *ctx, unsigned long long **fault, const char *what, int64_t D,
                            kl_type type)
{
    kl_handle *h = kl_handle_of(ctx);
    int i = 0;
    while (i < h->n_caches
           && (h->caches[i].what != what || h->caches[i].D != D || h->caches[i].type != type))
        i++;
    if (i == KL_CACHES) {
        KL_TRY(kl_look_at_notes(ctx));
        i = 0;
    }
    h->noting = true;
    h->caches[i].what = what;
    h->caches[i].D = D;
    h->caches[i].type = type;
    h->n_caches = i < h->n_caches ? h->n_caches : i + 1;
    *fault = h->faults + KL_FAULT_CACHE + i;
    return KL_OK;
}
