/* Tiles of a product in shared memory. The arithmetic on tiles is in two functions here, plain fma; a body for
 * matrix instructions (MFMA, WMMA, mma) takes their place behind the same names. */
#ifndef KL_HIP_TILE_H
#define KL_HIP_TILE_H

#include "reduce.h"
#include "stored.h"

/* ---- a block of 256 threads makes 64 x 64 outputs, 4 x 4 a thread ---- */

enum {
    KL_TILE = 64,       /* rows of x, and of w, a block */
    KL_TILE_K = 16,     /* inputs at a time */
    KL_TILE_OWN = 4,    /* rows of each a thread */
    KL_TILE_BLOCK = 256 /* threads: 16 x 16 */
};
/* [KL_TILE_K][KL_TILE + 1]: inputs outside, so that a thread's four rows lie together; one more, so that rows
 * written by neighbours fall into different banks */
#define KL_TILE_EXTENTS [KL_TILE_K][KL_TILE + 1]

/* tile[k][i] = at(i, k) for the 64 rows i and 16 inputs k of a step; `at` gives 0 outside. Neighbouring threads take
 * neighbouring k, or neighbouring i where ALONG_ROWS says that those lie together. */
template <bool ALONG_ROWS, class TILE, class AT>
static __device__ __forceinline__ void kl_tile_load(TILE &tile, AT at)
{
    for (int j = static_cast<int>(threadIdx.x); j < KL_TILE * KL_TILE_K; j += KL_TILE_BLOCK) {
        const int i = ALONG_ROWS ? j % KL_TILE : j / KL_TILE_K;
        const int k = ALONG_ROWS ? j / KL_TILE : j % KL_TILE_K;
        tile[k][i] = at(i, k);
    }
}

/* acc[a][b] += sum over the step's 16 inputs: a chain of fma from 0 by rising k, then one addition */
template <class TILE>
static __device__ __forceinline__ void kl_tile_fma(float (&acc)[KL_TILE_OWN][KL_TILE_OWN],
                                                   const TILE &x, const TILE &w)
{
    const int x0 = static_cast<int>(threadIdx.x) / 16 * KL_TILE_OWN;
    const int w0 = static_cast<int>(threadIdx.x) % 16 * KL_TILE_OWN;
    float step[KL_TILE_OWN][KL_TILE_OWN] = {};
    for (int k = 0; k < KL_TILE_K; k++) {
        float xs[KL_TILE_OWN], ws[KL_TILE_OWN];
        for (int i = 0; i < KL_TILE_OWN; i++) {
            xs[i] = x[k][x0 + i];
            ws[i] = w[k][w0 + i];
        }
        for (int a = 0; a < KL_TILE_OWN; a++)
            for (int b = 0; b < KL_TILE_OWN; b++)
                step[a][b] = fmaf(xs[a], ws[b], step[a][b]);
    }
    for (int a = 0; a < KL_TILE_OWN; a++)
        for (int b = 0; b < KL_TILE_OWN; b++)
            acc[a][b] += step[a][b];
}

#endif
