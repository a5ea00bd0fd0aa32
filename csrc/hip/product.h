/* Rows of x times rows of matrices: what linear and moe are made of (product.hip).
 *
 *   y[to(t), i] = sum_k x[from(t), k] w[m][r, k]     (+ bias[i], or times silu(gate[to(t), i]))
 *
 * Work comes as groups: rows of x that meet one matrix. linear has them by its sizes, n matrices over all rows, whose
 * outputs lie side by side; moe has a list of them in device memory, one or more an expert.
 * Order of a sum: the CPU's (ops/product.h), so that an element has the CPU's bytes, whatever the version, the number
 * of rows, the layout of w and its storage type. */
#ifndef KL_HIP_PRODUCT_H
#define KL_HIP_PRODUCT_H

#include "runtime.h"
#include "stored.h"

/* n matrices of one shape, in device memory */
struct kl_matrices {
    const char *first;
    const char *const *table; /* [n]; NULL: they follow each other, `step` bytes apart */
    int64_t step, n, rows;
    size_t row_bytes;
};

/* `count` rows from row `begin`, all times matrix `which` */
struct kl_row_group {
    int32_t which, begin, count;
};

struct kl_product {
    float *y;
    const float *x;
    kl_matrices w;
    const float *bias;    /* [w.n w.rows] or NULL */
    const float *gate;    /* as y, or NULL; may be y */
    const int32_t *index; /* row t of a group is row index[t] of x; NULL: row t */
    const int32_t *ids;   /* v1 of moe: row t meets matrix ids[t], and is row t / per_row of x */
    int64_t per_row;
    int64_t T, D;
    /* NULL: groups by sizes. Else kl_rows_of_a_group(T) rows at most in each. */
    const kl_row_group *groups;
    const int32_t *n_groups;
    int64_t most_groups; /* for the grid */
};

/* Rows that one block takes: a few where T, the tokens of a call, is small. */
enum { KL_FEW = 8, KL_MANY = 32 };
static inline int64_t kl_rows_of_a_group(int64_t T) { return T <= KL_FEW ? KL_FEW : KL_MANY; }

/* Puts the addresses of w's matrices on the device where they are at no equal distances. */
kl_status kl_matrices_of(kl_ctx *ctx, kl_matrices *to, const kl_weight *w) KL_CHECKED;

/* Launches; `op` and `name` are for the sentence about a storage type without kernels. */
kl_status kl_launch_product(kl_ctx *ctx, const kl_product *p, const kl_weight *w, const char *op,
                            const char *name) KL_CHECKED;

#endif
