/* Rows of x in what the context's activations are, for the weights that take them: int8 as cpu/int8.h defines it, or rounded to
 * bfloat16 and held in float32, so that the products are those of float32 rows. */
#include "product.h"

#include "../cpu/int8.h"
#include "reduce.h"
#include "scalar.h"

#include <math.h>

namespace
{

const int BLOCK = 256, EACH = 4; /* values of a thread */

/* QUADS threads a block of 32. Beside a NaN or an infinity all bits of a magnitude are large: the scale is NaN then. */
const int QUADS = 32 / EACH;
__global__ void __launch_bounds__(256)
    int8_quantize(kl_int8_x to, const float *x, int64_t T, int64_t D)
{
    const int64_t across = to.groups * (KL_INT8_VALUES / EACH), n = T * across,
                  step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < n; i += step) {
        const int64_t k = i % across * EACH; /* a block of 32 is there, or is not */
        float v[EACH];
        uint32_t largest = 0;
        KL_UNROLL
        for (int j = 0; j < EACH; j++) {
            v[j] = k < D ? x[i / across * D + k + j] : 0.0f;
            const uint32_t magnitude = kl_bits_of(v[j]) & 0x7fffffffu;
            largest = magnitude > largest ? magnitude : largest;
        }
        for (int m = QUADS / 2; m >= 1; m /= 2) {
            const uint32_t other = kl_team_swap(largest, m);
            largest = other > largest ? other : largest;
        }
        const float most = kl_float_of(largest);
        const bool finite = largest < 0x7f800000u, zero = most < KL_INT8_SMALLEST;
        const float inverse = !finite || zero ? 0.0f : 127.0f / most;
        uint32_t packed = 0;
        int sum = 0;
        KL_UNROLL
        for (int j = 0; j < EACH; j++) {
            const int q = finite ? static_cast<int>(rintf(v[j] * inverse)) : 0;
            packed |= static_cast<uint32_t>(q & 255) << 8 * j;
            sum += q;
        }
        to.q[i] = packed;
        sum += kl_team_swap(sum, 1);
        sum += kl_team_swap(sum, 2);
        const int other = kl_team_swap(sum, 4); /* of the other half of the block */
        if (i % QUADS == 0)
            to.scale[i / QUADS] =
                kl_int8_scale{ !finite ? NAN
                               : zero  ? 0.0f
                                       : most / 127.0f,
                               { static_cast<int16_t>(sum), static_cast<int16_t>(other) } };
    }
}

/* to the nearest, of two the even one; what is subnormal then becomes zero; NaN stays NaN */
__global__ void __launch_bounds__(256) bfloat16_round(float *to, const float *x, int64_t n)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < n; i += step) {
        const uint32_t bits = kl_bits_of(x[i]), even = bits >> 16 & 1u,
                       nearest = (bits + 0x7fffu + even) & 0xffff0000u;
        to[i] = (bits & 0x7fffffffu) > 0x7f800000u      ? NAN
                : (nearest & 0x7fffffffu) < 0x00800000u ? 0.0f
                                                        : kl_float_of(nearest);
    }
}

} // namespace

bool kl_is_narrow(kl_ctx *ctx, const kl_weight *w)
{
    const kl_activations asked = kl_core_of->activations(ctx);
    return !w->transposed
           && ((asked == KL_ACTIVATIONS_INT8 && kl_takes_int8(w->type))
               || (asked == KL_ACTIVATIONS_BFLOAT16 && w->type == KL_BF16));
}

kl_status kl_operand_room(kl_ctx *ctx, kl_operand *to, const kl_weight *w, int n, int64_t T,
                          int64_t D)
{
    *to = {};
    to->D = D;
    bool narrow = false;
    for (int i = 0; i < n; i++)
        narrow = narrow || kl_is_narrow(ctx, &w[i]);
    if (!narrow)
        return KL_OK;
    if (kl_core_of->activations(ctx) == KL_ACTIVATIONS_BFLOAT16) {
        KL_SCRATCH_OF(to->rounded, ctx, T * D);
        return KL_OK;
    }
    to->int8.groups = kl_ceil_div(D, KL_INT8_VALUES);
    KL_SCRATCH_OF(to->int8.q, ctx, T * to->int8.groups * (KL_INT8_VALUES / 4));
    KL_SCRATCH_OF(to->int8.scale, ctx, T * to->int8.groups * KL_INT8_BLOCKS);
    return KL_OK;
}

void kl_operand_make(kl_ctx *ctx, kl_operand *to, const float *x, int64_t T)
{
    to->x = x;
    const int64_t n =
        to->rounded != nullptr ? T * to->D : T * to->int8.groups * (KL_INT8_VALUES / EACH);
    if (n == 0)
        return;
    const unsigned grid = kl_grid(kl_ceil_div(n, BLOCK));
    if (to->rounded != nullptr)
        KL_LAUNCH(bfloat16_round, grid, BLOCK, 0, kl_stream(ctx), to->rounded, x, n);
    else
        KL_LAUNCH(int8_quantize, grid, BLOCK, 0, kl_stream(ctx), to->int8, x, T, to->D);
}

void kl_operand_of(kl_ctx *ctx, kl_product *p, const kl_operand &x, int64_t first,
                   const kl_weight *w)
{
    const bool narrow = kl_is_narrow(ctx, w);
    const int64_t groups = first * x.int8.groups;
    p->D = p->x_row = x.D;
    p->x = (narrow && x.rounded != nullptr ? x.rounded : x.x) + first * x.D;
    p->int8 = {};
    if (narrow && x.int8.q != nullptr)
        p->int8 = { x.int8.q + groups * (KL_INT8_VALUES / 4),
                    x.int8.scale + groups * KL_INT8_BLOCKS, x.int8.groups };
}
