/* What the attention kernel works on: queries, and one block of positions of the cache. */
#ifndef KL_ATTENTION_H
#define KL_ATTENTION_H

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { KL_BLOCK = 64 }; /* positions a block; blocks are aligned to position 0 of a sequence */
enum { KL_Q8_0_VALUES = 32, KL_Q8_0_BYTES = 34 }; /* of a block */

/* rows of float32, from one to the next; of float16 where half is not NULL, which is then in data's place */
typedef struct kl_rows {
    const float *data;
    int64_t stride, width;
    const uint16_t *half;
} kl_rows;

/* The running softmax of n rows: m the largest score so far, l the sum of exp(score - m), acc the
 * sum of exp(score - m) v. Empty is m = -infinity, l = 0, acc = 0. */
typedef struct kl_running {
    float *m, *l, *acc;
    int64_t stride, width; /* of acc */
} kl_running;

/* From row number `row` on. */
static inline kl_running kl_running_from(kl_running run, int64_t row)
{
    run.m += row;
    run.l += row;
    run.acc += row * run.stride;
    return run;
}

/* Empties n rows. */
static inline void kl_running_clear(kl_running run, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        run.m[i] = -INFINITY;
        run.l[i] = 0.0f;
        memset(run.acc + i * run.stride, 0, (size_t)run.width * sizeof *run.acc);
    }
}

/* Stored rows that will be read next, n of them: a hint. */
typedef struct kl_ahead {
    const char *rows;
    int64_t n, stride, bytes; /* bytes: of a row */
} kl_ahead;

/* n_queries queries on one block. A query and a key are two parts side by side (widths agree part by part; the second
 * may be empty). Both k[0] and v may be of float16, the others not. Query i sees the first min(n, first + i * step)
 * positions of the block, of kl_attend at least one: step 1 for queries of successive positions, 0 for heads of one token. */
typedef struct kl_attend {
    kl_rows q[2], k[2], v;
    kl_running run;
    kl_ahead ahead[2];
    int64_t n_queries, n, first, step;
    float scale;
} kl_attend;

#endif
