/* From host memory to the device: large uploads through staging buffers in turns, control data through pinned memory that is
 * filled behind them, and tables that the device has already. */
#include "handle.h"

#include <string.h>

namespace
{

const size_t PIECE = 8 << 20; /* bytes of a staging buffer; an upload of more goes through them */
const size_t PUT_PIECE = 256 << 10; /* bytes of a buffer of puts; what is larger waits */

hipError_t make_pinned(kl_pinned *to, size_t n_bytes)
{
    hipError_t error = hipHostMalloc(&to->data, n_bytes);
    if (error != hipSuccess)
        return error;
    error = hipEventCreate(&to->copied);
    if (error == hipSuccess)
        return hipSuccess;
    (void)hipHostFree(to->data);
    *to = kl_pinned{};
    return error;
}

void release_pinned(kl_pinned &p)
{
    if (p.data == nullptr)
        return;
    (void)hipEventDestroy(p.copied);
    (void)hipHostFree(p.data);
    p = kl_pinned{};
}

/* ---- large uploads ---- */

/* Both staging buffers; false where there is no pinned memory left: then the driver stages. */
bool have_staging(kl_ctx *ctx)
{
    kl_handle *h = kl_handle_of(ctx);
    for (kl_pinned &p : h->staging) {
        if (p.data != nullptr)
            continue;
        if (kl_core_of->allocation_fails(ctx) || make_pinned(&p, PIECE) != hipSuccess) {
            (void)hipGetLastError();
            return false;
        }
    }
    return true;
}

/* at once; the driver reads `from` until the stream has been waited for */
kl_status upload_whole(kl_ctx *ctx, void *to, const void *from, size_t n_bytes)
{
    KL_TRY(kl_move(ctx, "upload", to, from, n_bytes, hipMemcpyHostToDevice));
    return kl_wait(ctx, "upload");
}

/* Through two pinned buffers in turns: one is filled from host memory, which may be a mapped file that is read by
 * that, while the device copies from the other. What is copied last may still be on its way. */
kl_status upload_pieces(kl_ctx *ctx, void *to, const void *from, size_t n_bytes)
{
    kl_handle *h = kl_handle_of(ctx);
    for (size_t at = 0; at < n_bytes; at += PIECE, h->turn = 1 - h->turn) {
        const kl_pinned &p = h->staging[h->turn];
        const size_t n = n_bytes - at < PIECE ? n_bytes - at : PIECE;
        KL_TRY(kl_check(ctx, "upload", hipEventSynchronize(p.copied)));
        memcpy(p.data, static_cast<const char *>(from) + at, n);
        KL_TRY(
            kl_move(ctx, "upload", static_cast<char *>(to) + at, p.data, n, hipMemcpyHostToDevice));
        KL_TRY(kl_check(ctx, "upload", hipEventRecord(p.copied, h->stream)));
    }
    return KL_OK;
}

/* ---- tables ---- */

const size_t HALF = 256 << 10; /* bytes; more than all tables of an op */
const int SLOTS = 1024;        /* of the index; at most half are taken */

/* A table that lies at `at`; of 0 bytes: none. */
struct entry {
    size_t at, n_bytes;
};

} // namespace

/* Tables on the device, and the same bytes here. One half is filled while what the other has may still be read by the op
 * that is being made ready; then they change places, and the index begins anew. */
struct kl_tables {
    char *device;
    size_t used, end; /* of the half that is being filled, from the start of the first */
    int taken;        /* entries of the index */
    entry index[SLOTS];
    alignas(8) char bytes[2 * HALF];
};

namespace
{

uint64_t hash_of(const void *from, size_t n_bytes)
{
    const char *p = static_cast<const char *>(from);
    uint64_t h = n_bytes, word;
    for (; n_bytes >= sizeof word; n_bytes -= sizeof word, p += sizeof word) {
        memcpy(&word, p, sizeof word);
        h = (h ^ word) * 0x9e3779b97f4a7c15u;
        h ^= h >> 32;
    }
    word = 0;
    memcpy(&word, p, n_bytes);
    h = (h ^ word) * 0x9e3779b97f4a7c15u;
    return h ^ h >> 32;
}

/* The entry of these bytes, or a free one. */
entry *find(kl_tables *t, const void *from, size_t n_bytes)
{
    for (uint64_t i = hash_of(from, n_bytes);; i++) {
        entry *e = &t->index[i % SLOTS];
        if (e->n_bytes == 0
            || (e->n_bytes == n_bytes && memcmp(t->bytes + e->at, from, n_bytes) == 0))
            return e;
    }
}

/* Behind a table there are ones up to a border of 16, and at least 8 bytes of them: an address read there is none. */
size_t with_ones(size_t n_bytes) { return (n_bytes + 8 + 15) / 16 * 16; }

/* for one more in the half that is being filled; in the other when it is full */
void make_room(kl_tables *t, size_t n_bytes)
{
    if (t->used + with_ones(n_bytes) <= t->end && t->taken < SLOTS / 2)
        return;
    t->used = t->end == HALF ? HALF : 0;
    t->end = t->used + HALF;
    t->taken = 0;
    memset(t->index, 0, sizeof t->index);
}

} // namespace

kl_status kl_open_uploads(kl_ctx *ctx, kl_handle *h)
{
    void *device = nullptr;
    for (kl_pinned &p : h->puts)
        KL_TRY(kl_check(ctx, "device: pinned memory", make_pinned(&p, PUT_PIECE)));
    h->tables = static_cast<kl_tables *>(calloc(1, sizeof *h->tables));
    if (h->tables == nullptr)
        return kl_core_of->fail(ctx, KL_ERR_MEMORY, "out of memory: context");
    KL_TRY(kl_check(ctx, "device: memory", hipMalloc(&device, sizeof h->tables->bytes)));
    h->tables->device = static_cast<char *>(device);
    return KL_OK;
}

void kl_close_uploads(kl_handle *h)
{
    for (kl_pinned &p : h->staging)
        release_pinned(p);
    for (kl_pinned &p : h->puts)
        release_pinned(p);
    if (h->tables != nullptr)
        (void)hipFree(h->tables->device);
    free(h->tables);
}

/* Many tensors one after another: of smaller ones, too, one is read while the other is copied. */
kl_status kl_stage(kl_ctx *ctx, void *to, const void *from, size_t n_bytes)
{
    return n_bytes > PUT_PIECE && have_staging(ctx) ? upload_pieces(ctx, to, from, n_bytes)
                                                    : upload_whole(ctx, to, from, n_bytes);
}

kl_status kl_upload(kl_ctx *ctx, void *to, const void *from, size_t n_bytes)
{
    if (n_bytes <= PIECE || !have_staging(ctx))
        return upload_whole(ctx, to, from, n_bytes);
    KL_TRY(upload_pieces(ctx, to, from, n_bytes));
    return kl_wait(ctx, "upload");
}

/* From a copy in pinned memory: a device copies from other memory while the caller waits, and from the caller's own
 * pinned memory when it has already been changed. */
kl_status kl_put(kl_ctx *ctx, void *to, const void *from, size_t n_bytes)
{
    kl_handle *h = kl_handle_of(ctx);
    if (n_bytes > PUT_PIECE)
        return upload_whole(ctx, to, from, n_bytes);
    if (h->put_bytes + n_bytes > PUT_PIECE) {
        KL_TRY(kl_check(ctx, "upload", hipEventRecord(h->puts[h->put].copied, h->stream)));
        h->put = (h->put + 1) % KL_PUTS;
        h->put_bytes = 0;
        KL_TRY(kl_check(ctx, "upload", hipEventSynchronize(h->puts[h->put].copied)));
    }
    void *room = static_cast<char *>(h->puts[h->put].data) + h->put_bytes;
    h->put_bytes += (n_bytes + 15) / 16 * 16;
    memcpy(room, from, n_bytes);
    return kl_move(ctx, "upload", to, room, n_bytes, hipMemcpyHostToDevice);
}

kl_status kl_table(kl_ctx *ctx, const void **to, const void *from, size_t n_bytes)
{
    kl_tables *t = kl_handle_of(ctx)->tables;
    entry *e = find(t, from, n_bytes);
    if (e->n_bytes == 0) {
        make_room(t, n_bytes);
        e = find(t, from, n_bytes);
        char *bytes = t->bytes + t->used;
        memcpy(bytes, from, n_bytes);
        memset(bytes + n_bytes, 0xff, with_ones(n_bytes) - n_bytes);
        KL_TRY(kl_put(ctx, t->device + t->used, bytes, with_ones(n_bytes)));
        *e = entry{ t->used, n_bytes };
        t->used += with_ones(n_bytes);
        t->taken++;
    }
    *to = t->device + e->at;
    return KL_OK;
}
