/* Sizes that the kernels of dot.inc and their callers agree on. They change no result. */
#ifndef KL_DOT_H
#define KL_DOT_H

enum {
    KL_DOT_DIRECT = 6,    /* most rows of x that dot_direct is meant for */
    KL_DOT_TILE_M = 6,    /* most rows of x in a tile of dot_panel */
    KL_DOT_BLOCK_K = 768, /* values of K in a block: 18 KiB of x and 12 KiB of weights stay in L1 */
    KL_DOT_ROWS_STEP = 12, /* a multiple of every tile's width */
    KL_BFLOAT16_STEP =
        32 /* values; rows of x in bfloat16 are filled up with zeros to whole steps */
};

/* floats of scratch for dot_panel with up to `rows` rows of weights */
#define KL_DOT_SCRATCH(rows) (KL_DOT_TILE_M * (KL_DOT_BLOCK_K + 16 * (rows)))

#endif
