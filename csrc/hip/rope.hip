/* rope (ops/rope.c): pairs of a head turned by the angle of their token; y may be x. Angles, cosines and sines are
 * double, rounded once.
 *   v1  one pair a thread, its cosine and sine by itself.
 *   v2  cosines and sines once a token, in a table; then the pairs (launched). */
#include "ragged.h"

#include <math.h>

namespace
{

const int BLOCK = 256;

struct turning {
    float *y;
    const float *x;
    const int64_t *positions; /* [T] */
    const double *speed;      /* [rotary / 2] angle of one position */
    float *table;             /* [T, rotary] cosines, then sines of a token */
    int64_t T, H, K, rotary;
};

__device__ __forceinline__ void angle_of(const turning &p, int64_t t, int64_t j, float *c, float *s)
{
    const double angle = static_cast<double>(p.positions[t]) * p.speed[j];
    *c = static_cast<float>(cos(angle));
    *s = static_cast<float>(sin(angle));
}

/* Value j of a head for a thread: a pair, or one of the values that are copied. */
__device__ __forceinline__ void turn(const turning &p, int64_t head, int64_t j, float c, float s)
{
    const int64_t half = p.rotary / 2, at = head * p.K;
    if (j >= half) {
        p.y[at + j + half] = p.x[at + j + half];
        return;
    }
    const float a = p.x[at + j], b = p.x[at + half + j];
    p.y[at + j] = fmaf(a, c, -(b * s));
    p.y[at + half + j] = fmaf(b, c, a * s);
}

__global__ void __launch_bounds__(256) rope_v1(turning p)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK, half = p.rotary / 2,
                  width = p.K - half, n = p.T * p.H * width;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < n; i += step) {
        const int64_t head = i / width, j = i % width;
        float c = 0.0f, s = 0.0f;
        if (j < half)
            angle_of(p, head / p.H, j, &c, &s);
        turn(p, head, j, c, s);
    }
}

__global__ void __launch_bounds__(256) rope_table(turning p)
{
    const int64_t half = p.rotary / 2;
    for (int64_t t = blockIdx.x; t < p.T; t += gridDim.x)
        for (int64_t j = threadIdx.x; j < half; j += BLOCK)
            angle_of(p, t, j, &p.table[t * p.rotary + j], &p.table[t * p.rotary + half + j]);
}

__global__ void __launch_bounds__(256) rope_v2(turning p)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK, half = p.rotary / 2,
                  width = p.K - half, n = p.T * p.H * width;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < n; i += step) {
        const int64_t head = i / width, j = i % width;
        const float *row = p.table + head / p.H * p.rotary;
        const bool turned = j < half;
        turn(p, head, j, turned ? row[j] : 0.0f, turned ? row[half + j] : 0.0f);
    }
}

} // namespace

kl_status hip_rope(kl_ctx *ctx, float *y, const float *x, const int64_t *positions, int64_t T,
                   int64_t H, int64_t K, int64_t rotary, double base)
{
    const int64_t half = rotary / 2;
    turning p = { y, x, nullptr, nullptr, nullptr, T, H, K, rotary };
    KL_SCRATCH_OF(p.table, ctx, T * rotary);
    KL_TRY(kl_put_table(ctx, &p.positions, positions, T));
    /* by the host's pow, as the CPU has them */
    KL_TRY(kl_put_made(ctx, &p.speed, half, [=](int64_t j) {
        return pow(base, -2.0 * static_cast<double>(j) / static_cast<double>(rotary));
    }));
    if (kl_core_of->measuring(ctx) || T == 0)
        return KL_OK;
    const unsigned grid = kl_grid(kl_ceil_div(T * H * (K - half), BLOCK));
    if (kl_version() == 1) {
        KL_LAUNCH(rope_v1, grid, BLOCK, 0, kl_stream(ctx), p);
    } else {
        if (half > 0)
            KL_LAUNCH(rope_table, kl_grid(T), BLOCK, 0, kl_stream(ctx), p);
        KL_LAUNCH(rope_v2, grid, BLOCK, 0, kl_stream(ctx), p);
    }
    return kl_launched(ctx, "rope");
}
