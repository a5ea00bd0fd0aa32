/* Views of a checkpoint's tensors, and copies of its vectors: tensors.h. */
#include "tensors.h"

#include "../ops/product.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAME = 160, MAX_AXES = 4 };

static int by_name(const void *a, const void *b)
{
    return strcmp((*(const kl_tensor *const *)a)->name, (*(const kl_tensor *const *)b)->name);
}

kl_status kl_loader_begin(kl_loader *l, const kl_tensor *tensors, int64_t n)
{
    if (n < 0)
        return kl_fail(l->ctx, KL_ERR_ARG, "n_tensors is %lld; it must be >= 0", (long long)n);
    l->tensors = tensors;
    l->n = n;
    l->sorted = malloc(((size_t)n + 1) * sizeof *l->sorted);
    if (!l->model->backend->reads_host_memory)
        l->uploaded = calloc((size_t)n + 1, sizeof *l->uploaded);
    if (l->sorted == NULL || (l->uploaded == NULL && !l->model->backend->reads_host_memory))
        return kl_fail(l->ctx, KL_ERR_MEMORY, "out of memory: %lld tensors", (long long)n);
    for (int64_t i = 0; i < n; i++)
        l->sorted[i] = &tensors[i];
    qsort(l->sorted, (size_t)n, sizeof *l->sorted, by_name);
    return KL_OK;
}

void kl_loader_end(kl_loader *l)
{
    free(l->sorted);
    free(l->uploaded);
    free(l->staging);
}

static void name_of(char name[NAME], int64_t layer, const char *rest)
{
    if (layer < 0)
        snprintf(name, NAME, "%s", rest);
    else
        snprintf(name, NAME, "model.layers.%lld.%s", (long long)layer, rest);
}

static const kl_tensor *find(const kl_loader *l, const char *name)
{
    const kl_tensor key = { .name = name }, *p = &key;
    const kl_tensor **hit = bsearch(&p, l->sorted, (size_t)l->n, sizeof *l->sorted, by_name);
    return hit != NULL ? *hit : NULL;
}

static void fail(kl_loader *l, kl_status status, const char *format, ...)
{
    char sentence[400];
    if (l->status != KL_OK)
        return;
    va_list args;
    va_start(args, format);
    vsnprintf(sentence, sizeof sentence, format, args);
    va_end(args);
    l->status = kl_fail(l->ctx, status, "%s", sentence);
}

bool kl_has_tensor(const kl_loader *l, int64_t layer, const char *rest)
{
    char name[NAME];
    name_of(name, layer, rest);
    return find(l, name) != NULL;
}

static const kl_tensor *checked(kl_loader *l, const char *name, int64_t rows, int64_t cols)
{
    const kl_tensor *t = find(l, name);
    if (t == NULL) {
        fail(l, KL_ERR_FORMAT, "checkpoint: %s is missing", name);
        return NULL;
    }
    if (t->n_dims < 1 || t->n_dims > MAX_AXES) {
        fail(l, KL_ERR_FORMAT, "checkpoint: %s has n_dims %d; it must be 1 to %d", name, t->n_dims,
             MAX_AXES);
        return NULL;
    }
    int64_t values = 1, wanted;
    bool fits = true;
    for (int i = 0; fits && i < t->n_dims; i++)
        fits = kl_mul(&values, values, t->shape[i]);
    if (!fits || !kl_mul(&wanted, rows, cols) || values != wanted
        || (cols > 1 && t->shape[t->n_dims - 1] != cols)) {
        char shape[MAX_AXES * 24] = "";
        for (int i = 0, n = 0; i < t->n_dims; i++)
            n += snprintf(shape + n, sizeof shape - (size_t)n, "%s%lld", i > 0 ? ", " : "",
                          (long long)t->shape[i]);
        fail(l, KL_ERR_FORMAT, "checkpoint: %s is [%s]; it must be [%lld, %lld]", name, shape,
             (long long)rows, (long long)cols);
        return NULL;
    }
    const int64_t block = kl_type_block(t->type);
    if (block == 0) {
        fail(l, KL_ERR_DTYPE, "checkpoint: %s has storage type %d, which is not known here", name,
             (int)t->type);
        return NULL;
    }
    if (t->shape[t->n_dims - 1] % block != 0) {
        fail(l, KL_ERR_FORMAT,
             "checkpoint: %s has rows of %lld values; %s needs a multiple of %lld", name,
             (long long)t->shape[t->n_dims - 1], kl_type_name(t->type), (long long)block);
        return NULL;
    }
    if (t->data == NULL && !l->model->planning) {
        fail(l, KL_ERR_ARG, "checkpoint: %s has no data", name);
        return NULL;
    }
    return t;
}

const kl_tensor *kl_find_tensor(kl_loader *l, int64_t layer, const char *rest, int64_t rows,
                                int64_t cols)
{
    char name[NAME];
    name_of(name, layer, rest);
    const kl_tensor *t = checked(l, name, rows, cols);
    if (t != NULL)
        l->model->weight_bytes += kl_type_bytes(t->type, rows * cols);
    return t;
}

/* ---- views ---- */

static size_t bytes_of(const kl_tensor *t)
{
    int64_t values = 1;
    for (int i = 0; i < t->n_dims; i++)
        values *= t->shape[i];
    return kl_type_bytes(t->type, values);
}

/* Where a tensor's values are in the backend's memory; NULL while they are only counted. */
static const char *values_of(kl_loader *l, const kl_tensor *t)
{
    if (l->uploaded == NULL || t->data == NULL)
        return t->data;
    const char **at = &l->uploaded[t - l->tensors];
    char *const begin = l->model->matrices;
    if (*at == NULL) {
        *at = begin != NULL ? begin + l->upload_bytes : t->data;
        if (begin != NULL && l->status == KL_OK)
            l->status =
                l->model->backend->stage(l->ctx, begin + l->upload_bytes, t->data, bytes_of(t));
        l->upload_bytes += (bytes_of(t) + 63) / 64 * 64;
    }
    return begin != NULL ? *at : NULL;
}

static const void **take_addresses(kl_loader *l, int64_t n)
{
    const void **p =
        l->model->addresses != NULL ? l->model->addresses + l->model->n_addresses : NULL;
    l->model->n_addresses += (size_t)n;
    return p;
}

kl_weight kl_rows_of(kl_loader *l, const kl_tensor *t, int64_t first, int64_t n, int64_t step,
                     int64_t rows, int64_t cols)
{
    const void **matrix = take_addresses(l, n);
    kl_weight w = { .n = n, .rows = rows, .cols = cols };
    if (t == NULL)
        return w;
    w.type = t->type;
    w.row_bytes = kl_type_bytes(t->type, cols);
    w.matrix = matrix;
    const char *values = values_of(l, t);
    for (int64_t i = 0; matrix != NULL && values != NULL && i < n; i++)
        matrix[i] = values + (size_t)(first + i * step) * w.row_bytes;
    return w;
}

kl_weight kl_matrix(kl_loader *l, int64_t layer, const char *rest, int64_t rows, int64_t cols)
{
    return kl_rows_of(l, kl_find_tensor(l, layer, rest, rows, cols), 0, 1, 0, rows, cols);
}

kl_weight kl_matrices(kl_loader *l, int64_t layer, const char *format, int64_t n, int64_t rows,
                      int64_t cols)
{
    const void **matrix = take_addresses(l, n);
    kl_weight w = { .n = n, .rows = rows, .cols = cols, .matrix = matrix };
    for (int64_t i = 0; i < n && l->status == KL_OK; i++) {
        char rest[NAME];
        const char *number = strchr(format, '#');
        snprintf(rest, sizeof rest, "%.*s%lld%s", (int)(number - format), format, (long long)i,
                 number + 1);
        const kl_tensor *t = kl_find_tensor(l, layer, rest, rows, cols);
        if (t == NULL)
            return w;
        if (i == 0) {
            w.type = t->type;
            w.row_bytes = kl_type_bytes(t->type, cols);
        } else if (t->type != w.type) {
            fail(l, KL_ERR_FORMAT,
                 "checkpoint: %s is %s and number 0 is %s; they must be of one type", t->name,
                 kl_type_name(t->type), kl_type_name(w.type));
        }
        const char *values = values_of(l, t);
        if (matrix != NULL)
            matrix[i] = values;
    }
    return w;
}

/* ---- vectors ---- */

const float *kl_vector(kl_loader *l, int64_t layer, const char *rest, int64_t rows, int64_t cols,
                       kl_convert how)
{
    const kl_tensor *t = kl_find_tensor(l, layer, rest, rows, cols);
    const int64_t n = rows * cols;
    const size_t begin = l->vector_values;
    l->vector_values += ((size_t)n + 15) / 16 * 16; /* 64-byte aligned */
    if (t == NULL || l->staging == NULL)
        return NULL;
    float *values = l->staging + begin;
    if (t->data != NULL)
        kl_widen(l->ctx, values, t->data, t->type, n);
    for (int64_t i = 0; how == KL_RATE && i < n; i++)
        values[i] = (float)exp((double)values[i]);
    for (int64_t i = 0; how == KL_PLUS_ONE && i < n; i++)
        values[i] = (float)(1.0 + (double)values[i]);
    return l->model->vectors + begin;
}

const float *kl_vector_product(kl_loader *l, int64_t layer, const char *a, const char *b, int64_t n)
{
    const float *product = kl_vector(l, layer, a, n, 1, KL_AS_IS);
    const kl_tensor *t = kl_find_tensor(l, layer, b, 1, n);
    if (product == NULL || t == NULL || t->data == NULL)
        return product;
    float *values = l->staging + (product - l->model->vectors);
    float *other = malloc((size_t)n * sizeof *other);
    if (other == NULL) {
        fail(l, KL_ERR_MEMORY, "out of memory: %lld values of a vector", (long long)n);
        return product;
    }
    kl_widen(l->ctx, other, t->data, t->type, n);
    for (int64_t i = 0; i < n; i++)
        values[i] = (float)((double)values[i] * (double)other[i]);
    free(other);
    return product;
}
