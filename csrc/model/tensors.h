/* From a checkpoint's tensors, by name, to weights that are views of them and vectors in float32. What weights.c
 * says of the model's names is said with these. */
#ifndef KL_TENSORS_H
#define KL_TENSORS_H

#include "model.h"

/* The first problem is kept in status; after it nothing is read. */
typedef struct kl_loader {
    kl_ctx *ctx;
    kl_model *model;
    const kl_tensor *tensors, **sorted; /* sorted: by name */
    int64_t n;
    /* Of a backend that does not read host memory: where each tensor that views are of was uploaded to, and the bytes
     * of all of them; in the pass that only counts, a mark. */
    const char **uploaded;
    size_t upload_bytes;
    size_t vector_values; /* of the model's vectors, in float32 */
    float *staging;       /* host copy of the vectors; NULL in the pass that only counts */
    kl_status status;
} kl_loader;

kl_status kl_loader_begin(kl_loader *l, const kl_tensor *tensors, int64_t n) KL_CHECKED;
void kl_loader_end(kl_loader *l);

/* Names are "model.layers.<layer>.<rest>", or rest alone where layer is -1. */

bool kl_has_tensor(const kl_loader *l, int64_t layer, const char *rest);

/* The tensor with exactly rows x cols values (any grouping of them into axes that keeps the last), or NULL with the
 * failure set. Counts its bytes. */
const kl_tensor *kl_find_tensor(kl_loader *l, int64_t layer, const char *rest, int64_t rows,
                                int64_t cols);

/* n matrices [rows, cols] of a tensor's rows; the first begins at row first, the next each step rows on. Nothing of
 * NULL. */
kl_weight kl_rows_of(kl_loader *l, const kl_tensor *t, int64_t first, int64_t n, int64_t step,
                     int64_t rows, int64_t cols);

/* A tensor as one matrix. */
kl_weight kl_matrix(kl_loader *l, int64_t layer, const char *rest, int64_t rows, int64_t cols);

/* Tensors of one type as matrices of one weight; their number stands for '#' in format. */
kl_weight kl_matrices(kl_loader *l, int64_t layer, const char *format, int64_t n, int64_t rows,
                      int64_t cols);

/* RATE: exp(A_log); PLUS_ONE: 1 + w. In double, rounded once. */
typedef enum kl_convert { KL_AS_IS, KL_RATE, KL_PLUS_ONE } kl_convert;

/* A tensor's values in float32, in the backend's memory once that is there. */
const float *kl_vector(kl_loader *l, int64_t layer, const char *rest, int64_t rows, int64_t cols,
                       kl_convert how);

/* a * b, element by element, in double, rounded once */
const float *kl_vector_product(kl_loader *l, int64_t layer, const char *a, const char *b,
                               int64_t n);

#endif
