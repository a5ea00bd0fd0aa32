/* What the kernels of the delta rule take. All are of one head; ops/delta_forms.c puts them together.
 * Rows of factors are ld apart, ld = K rounded up to 16; the padding of q and k is 0. */
#ifndef KL_DELTA_RULE_H
#define KL_DELTA_RULE_H

#include <stdbool.h>
#include <stdint.h>

enum {
    KL_DELTA_STEP = 64,  /* tokens whose factors the recurrence computes at once */
    KL_DELTA_BLOCK = 16, /* rows of a chunk that are solved together */
    KL_DELTA_CHUNK_MAX = 256,
    KL_DELTA_COLUMNS = 32, /* columns of the state that stay in the first cache: [K, 32] */
};

/* Asks for n floats before they are wanted. A row of an array of the caller's may begin inside a cache line: then it
 * ends in one more, which no step of 64 bytes meets. */
static inline void kl_delta_ask(const float *row, int64_t n)
{
    for (int64_t i = 0; i < n; i += 16)
        __builtin_prefetch(row + i);
    __builtin_prefetch(row + n - 1);
}

/* Some columns of the state, token by token. */
typedef struct kl_delta_strip {
    int64_t T, K, columns;
    float *o;           /* [T, columns], rows o_step apart; may be v */
    float *to;          /* [K, columns], rows state_step apart: the state after the last token */
    const float *from;  /* the same before the first; may be to; NULL: zeros */
    const float *alpha; /* [T, ld]: exp(g) */
    const float *q;     /* [T, ld], scaled */
    const float *k;     /* [T, ld] */
    const float *v;     /* [T, columns], rows v_step apart */
    const float *beta;  /* [T], beta_step apart */
    int64_t ld, o_step, v_step, state_step, beta_step;
    float *scratch; /* [K, KL_DELTA_COLUMNS] */
} kl_delta_strip;

/* What n tokens do to a head, whatever its state is. i and j are rows, the tokens of the chunk;
 * [s .. i] is the product of the decays of tokens s to i. */
typedef struct kl_delta_chunk {
    int64_t n, rows; /* rows: n rounded up to KL_DELTA_BLOCK */
    int64_t K, ld;
    bool by_channel;    /* else the decays of a token are one number */
    const float *alpha; /* [n, ld]: exp(g) */
    const float *q, *k; /* [n, ld], q scaled */
    float *start;       /* [2 rows, ld]: [0 .. i] k_i, then [0 .. i] q_i; 0 from row n on */
    float *end;         /* [n, ld]: [j + 1 .. n - 1] k_j */
    float *decay;       /* [ld]: [0 .. n - 1] */
    float *minus_kk;    /* [rows, rows]: -beta_i <k_i, [j + 1 .. i] k_j>, j < i */
    float *qk;          /* [rows, rows]: <q_i, [j + 1 .. i] k_j>, j <= i */
    const float *beta;  /* [n], beta_step apart */
    int64_t beta_step;
    float *scratch; /* [2 KL_DELTA_BLOCK + 1, ld] */
} kl_delta_chunk;

/* The same tokens, for at most KL_DELTA_COLUMNS columns of the state. */
typedef struct kl_delta_columns {
    int64_t columns;
    float *state;   /* [K, KL_DELTA_COLUMNS], in place; columns past the end are padding, finite */
    float *o;       /* [n, columns], rows o_step apart; may be v */
    const float *v; /* [n, columns], rows v_step apart */
    int64_t o_step, v_step;
    const float *const *ask; /* rows of ask_values floats that are wanted soon: fetched meanwhile */
    int64_t n_ask, ask_values;
    float *scratch; /* [2 rows, KL_DELTA_COLUMNS] */
} kl_delta_columns;

#endif
