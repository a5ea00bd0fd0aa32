/* Rows of x times rows of matrices: what linear and moe are made of (product.hip).
 *
 *   y[t, m, r] = sum_k x[from(t), m, k] w[m][r, k]     (+ bias[m, r], or swiglu of gate[t, m, r] and it)
 *
 * Steps say how far rows and matrices are apart in x and y. Work comes as groups: rows of x that meet one matrix. linear
 * and latent_attention have them by their sizes, n matrices over all rows; moe has a list of them in device memory, one
 * or more an expert.
 * Order of a sum: the CPU's (ops/product.h; of int8 activations cpu/int8.h), so that an element has the CPU's bytes,
 * whatever the version, the number of rows, the layout of w and its storage type. */
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
    kl_type type;
};

/* `count` rows from row `begin`, all times matrix `which` */
struct kl_row_group {
    int32_t which, begin, count;
};

/* Rows of x in int8 (cpu/int8.h), whole groups of 256: of value k of row i word (256 groups i + k) / 4 has byte k % 4, and
 * each block of 32 has a scale and the sums of its halves. */
struct kl_int8_scale {
    float scale;
    int16_t sum[2];
};
struct kl_int8_x {
    uint32_t *q; /* NULL: there are none */
    kl_int8_scale *scale;
    int64_t groups; /* of a row */
};

struct kl_product {
    float *y;
    const float *x;
    kl_int8_x int8; /* of x; where they are, x is not read. Of rows, no matrix has its own. */
    kl_matrices w;
    int64_t x_row, x_step; /* values from row to row of x, and from matrix to matrix */
    int64_t y_row, y_step;
    const float *bias;    /* [w.n w.rows] or NULL */
    const float *gate;    /* as y, or NULL; may be y */
    float limit;          /* of swiglu, where there is a gate or the product is gated; 0: none */
    const int32_t *index; /* row t of a group is row index[t] of x; NULL: row t */
    const int32_t *ids;   /* v1 of moe: row t meets matrix ids[t], and is row t / per_row of x */
    int64_t per_row;
    int64_t T, D;
    /* NULL: groups by sizes. Else kl_rows_of_a_group(T) rows at most in each. */
    const kl_row_group *groups;
    const int32_t *n_groups;
    int64_t most_groups; /* for the grid */
};

/* In one launch: products of the same rows of x (x, x_row, x_step, T, D and groups), of one kernel type and one layout. */
enum { KL_TOGETHER = 6 };
struct kl_products {
    kl_product of[KL_TOGETHER];
    int64_t end[KL_TOGETHER]; /* blocks up to the last one of each */
};

/* Rows that one block takes: a few where T, the tokens of a call, is small. */
enum { KL_FEW = 8, KL_MANY = 32 };
static inline int64_t kl_rows_of_a_group(int64_t T)
{
    return T <= 1 ? 1 : T <= KL_FEW ? KL_FEW : KL_MANY;
}

/* Puts the addresses of w's matrices on the device where they are at no equal distances. */
kl_status kl_matrices_of(kl_ctx *ctx, kl_matrices *to, const kl_weight *w) KL_CHECKED;

/* ---- activations: int8.hip, narrow.hip ---- */

/* Whether the context's activations are int8 or bfloat16, and w is of the kind that takes them. */
bool kl_is_narrow(kl_ctx *ctx, const kl_weight *w);

/* Rows of x for several products: as they are and, for the weights that are narrow, in int8 or rounded to bfloat16. */
struct kl_operand {
    const float *x; /* [T, D] */
    int64_t D;
    float *rounded; /* NULL where no weight takes them */
    kl_int8_x int8;
};
/* Takes scratch for up to T rows, for products with n weights. */
kl_status kl_operand_room(kl_ctx *ctx, kl_operand *to, const kl_weight *w, int n, int64_t T,
                          int64_t D) KL_CHECKED;
/* Launches what makes it from T rows of x. */
void kl_operand_make(kl_ctx *ctx, kl_operand *to, const float *x, int64_t T);
/* Sets what p has of x: rows from `first` on, in the form that w takes. */
void kl_operand_of(kl_ctx *ctx, kl_product *p, const kl_operand &x, int64_t first,
                   const kl_weight *w);

/* Fails where w is to be multiplied in int8 and its blocks do not lie so that they are read in words. */
kl_status kl_check_blocks(kl_ctx *ctx, const kl_weight *w, const char *op,
                          const char *name) KL_CHECKED;
/* Launches n products with int8 rows of x, up to KL_TOGETHER, that may go together; gated: y of the first is
 * swiglu of x w and x of[1].w, for up to KL_FEW rows of x. */
void kl_int8_launch(kl_ctx *ctx, const kl_product *p, int n, bool gated);

/* ---- products ---- */

/* Launches; `op` and `name` are for the sentence about a storage type without kernels. */
kl_status kl_launch_product(kl_ctx *ctx, const kl_product *p, const kl_weight *w, const char *op,
                            const char *name) KL_CHECKED;
/* The same of n products, up to KL_TOGETHER, that may go together: bytes as one after the other. */
kl_status kl_launch_products(kl_ctx *ctx, const kl_product *p, int n, const kl_weight *w,
                             const char *op, const char *name) KL_CHECKED;
bool kl_go_together(const kl_weight *a, const kl_weight *b);
/* y = swiglu of x gate and x up, with up's limit; both have y. */
kl_status kl_launch_swiglu(kl_ctx *ctx, const kl_product *gate, const kl_product *up,
                           const kl_weight *w_gate, const kl_weight *w_up,
                           const char *op) KL_CHECKED;

#endif
