/* What the threads of an op work in: a room each, of scratch that the op lays out part by part: once without a base, for
 * its size, then each thread's. Among the parts: fixed-point rows (cpu/fixed.h). */
#ifndef KL_ROOM_H
#define KL_ROOM_H

#include "../cpu/kernels.h"

/* base NULL: parts are only counted. */
typedef struct kl_room {
    void *base;
    size_t used;
} kl_room;

/* The next n values of `size` bytes, 64-byte aligned. */
static inline void *kl_take(kl_room *room, int64_t n, size_t size)
{
    void *at = room->base != NULL ? (char *)room->base + room->used : NULL;
    room->used += ((size_t)n * size + 63) / 64 * 64;
    return at;
}

static inline float *kl_take_floats(kl_room *room, int64_t n)
{
    return kl_take(room, n, sizeof(float));
}

/* Of all threads of the context; n_bytes of each. */
typedef struct kl_rooms {
    char *first;
    size_t n_bytes;
} kl_rooms;

static inline kl_status kl_take_rooms(kl_ctx *ctx, kl_rooms *rooms, size_t n_bytes)
{
    rooms->n_bytes = (n_bytes + 63) / 64 * 64;
    KL_SCRATCH(rooms->first, ctx, kl_bytes_of((int64_t)rooms->n_bytes, (size_t)ctx->threads));
    return KL_OK;
}

static inline kl_room kl_room_of(const kl_rooms *rooms, int thread)
{
    return (kl_room){ rooms->first + (size_t)thread * rooms->n_bytes, 0 };
}

/* Of n rows, one behind the other: in scratch, and in a room. */
static inline kl_status kl_scratch_running(kl_ctx *ctx, kl_running *run, int64_t n, int64_t width)
{
    run->stride = run->width = width;
    KL_SCRATCH(run->m, ctx, n);
    KL_SCRATCH(run->l, ctx, n);
    KL_SCRATCH(run->acc, ctx, n * width);
    return KL_OK;
}

static inline kl_running kl_take_running(kl_room *room, int64_t n, int64_t width)
{
    float *m = kl_take_floats(room, n), *l = kl_take_floats(room, n);
    return (kl_running){ m, l, kl_take_floats(room, n * width), width, width };
}

/* Whether attention multiplies in 16-bit fixed point: where products take narrow activations. */
static inline bool kl_attends_fixed(const kl_ctx *ctx)
{
    return ctx->activations != KL_ACTIVATIONS_FLOAT32;
}

static inline kl_fixed_lanes kl_take_lanes(kl_room *room, int64_t n, int64_t width)
{
    const int64_t stride = kl_fixed_stride(width), rows = kl_fixed_groups(n) * KL_FIXED_LANES;
    int32_t *pair = kl_take(room, rows * stride / 2, sizeof *pair);
    return (kl_fixed_lanes){ pair, kl_take_floats(room, rows), stride };
}

static inline kl_fixed_rows kl_take_rows(kl_room *room, int64_t width)
{
    const int64_t stride = kl_fixed_stride(width);
    int16_t *value = kl_take(room, KL_BLOCK * stride, sizeof *value);
    return (kl_fixed_rows){ value, kl_take_floats(room, KL_BLOCK), stride };
}

/* fixed_pairs of a block of rows */
static inline int32_t *kl_take_pairs(kl_room *room, int64_t width)
{
    return kl_take(room, KL_BLOCK / 2 * kl_fixed_pair_stride(width), sizeof(int32_t));
}

#endif
