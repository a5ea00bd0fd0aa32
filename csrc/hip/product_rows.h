/* What the kernels over a kl_product ask of it: which work a block has, where its rows lie, where a result goes. */
#ifndef KL_HIP_PRODUCT_ROWS_H
#define KL_HIP_PRODUCT_ROWS_H

#include "product.h"

#include "scalar.h"

static __device__ __forceinline__ kl_matrix kl_product_matrix(const kl_matrices &w, int64_t which)
{
    const char *data = w.table != nullptr ? w.table[which] : w.first + which * w.step;
    return kl_matrix{ kl_global(data), w.row_bytes, w.rows, 0, w.type };
}

/* by sizes: group j is matrix j % n, so that blocks that run together read the same rows of x */
static __device__ __forceinline__ kl_row_group kl_product_group(const kl_product &p, int64_t j,
                                                                int most)
{
    if (p.groups != nullptr)
        return p.groups[j];
    const int64_t begin = j / p.w.n * most, left = p.T - begin;
    return kl_row_group{ static_cast<int32_t>(j % p.w.n), static_cast<int32_t>(begin),
                         static_cast<int32_t>(left < most ? left : most) };
}

static __device__ __forceinline__ int64_t kl_product_groups(const kl_product &p)
{
    return p.groups != nullptr ? *p.n_groups : p.most_groups;
}

static __device__ __forceinline__ const float *kl_product_row(const kl_product &p, int64_t t,
                                                              int64_t which)
{
    return p.x + (p.index != nullptr ? p.index[t] : t) * p.x_row + which * p.x_step;
}

/* output r of matrix `which` for row t */
static __device__ __forceinline__ void kl_product_put(const kl_product &p, int64_t t, int64_t which,
                                                      int64_t r, float sum)
{
    const int64_t at = t * p.y_row + which * p.y_step + r;
    if (p.bias != nullptr)
        sum = sum + p.bias[which * p.w.rows + r];
    p.y[at] = p.gate != nullptr ? kl_swiglu_of(p.gate[at], sum, p.limit) : sum;
}

/* the product that a block's task is of; `task` is then one of its own */
template <kl_type TYPE>
static __device__ __forceinline__ int kl_product_of(const kl_products &a, int64_t &task)
{
    int i = 0;
    while (TYPE != KL_RARE && i + 1 < KL_TOGETHER && task >= a.end[i]) /* rare types go alone */
        i++;
    task -= i > 0 ? a.end[i - 1] : 0;
    return i;
}

/* n products for one launch, of blocks that take `rows` of w; GATED: the first one's blocks take the second, too */
static inline kl_products kl_products_of(const kl_product *p, int n, bool gated, int rows)
{
    kl_products a = {};
    int64_t tasks = 0;
    for (int i = 0; i < KL_TOGETHER; i++) {
        if (i < n)
            a.of[i] = p[i];
        if (i < (gated ? 1 : n))
            tasks += p[i].most_groups * kl_ceil_div(p[i].w.rows, rows);
        a.end[i] = tasks;
    }
    return a;
}

#endif
