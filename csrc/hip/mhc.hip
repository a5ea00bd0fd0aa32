/* mhc_pre and mhc_post (ops/mhc_pre.c, ops/mhc_post.c). The product with fn is product.hip's, in float32; then of mhc_pre
 *   v1  one thread a token, in the CPU's order: the same bytes.
 *   v2  one block a token: the sum of squares is a tree, a thread has a row or a column of comb (launched).
 * Both are made for each of KL_KERNEL_TYPES: a token whose squares leave float32 has its product again here.
 * Of mhc_post, whose terms are added in one order, and out may be x:
 *   v1  a value of each stream a thread, read into shared memory before one is written.
 *   v2  the same of four streams, in registers (launched where there are four). */
#include "product.h"
#include "reduce.h"
#include "scalar.h"

namespace
{

const int BLOCK = 256, TEAMS = BLOCK / KL_TEAM, POST = 64;
/* rows of x at a time: a kl_row_group counts them in 32 bits */
const int64_t PASS = INT64_C(1) << 30;

struct weighing {
    float *y, *post, *comb;
    const float *x, *base, *scale;
    float *m; /* [T, (2 + n) n]: products, then logits */
    kl_matrix fn;
    int n, iters;
    float norm_eps, eps;
    int64_t T, D;
};

__device__ __forceinline__ float length_of(const weighing &p, float sq, float s)
{
    return sqrtf(sq / static_cast<float>(p.n * p.D) + p.norm_eps * s * s);
}

/* of product i of a token */
__device__ __forceinline__ float logit(const weighing &p, float dot, float length, int i)
{
    const float scale = p.scale[i < p.n ? 0 : i < 2 * p.n ? 1 : 2];
    return fmaf(dot / length, scale, p.base[i]);
}

/* A value of the stream that the block reads. A sum that begins at +0 would lose -0. */
__device__ __forceinline__ float collapsed(const weighing &p, const float *x, const float *pre,
                                           int64_t d)
{
    float acc = pre[0] * x[d];
    for (int i = 1; i < p.n; i++)
        acc = fmaf(pre[i], x[i * p.D + d], acc);
    return acc;
}

template <class C> __device__ __forceinline__ void normalise_column(C c, int n, int j, float eps)
{
    float sum = 0.0f;
    for (int i = 0; i < n; i++)
        sum += c[i * n + j];
    sum += eps;
    for (int i = 0; i < n; i++)
        c[i * n + j] = c[i * n + j] / sum;
}

/* ---- v1 ---- */

__device__ float halved(float *lane)
{
    for (int half = 8; half >= 1; half /= 2)
        for (int l = 0; l < half; l++)
            lane[l] += lane[l + half];
    return lane[0];
}

__device__ float squares_in_order(const float *x, int64_t K, float s)
{
    float lane[16] = {};
    for (int64_t k = 0; k < K; k++)
        lane[k % 16] = fmaf(x[k] * s, x[k] * s, lane[k % 16]);
    return halved(lane);
}

template <kl_type TYPE>
__device__ float product_in_order(const weighing &p, const float *x, int row, float s)
{
    float lane[16] = {};
    for (int64_t k = 0; k < p.n * p.D; k++)
        lane[k % 16] = fmaf(x[k] * s, (kl_matrix_at<TYPE, false>(p.fn, row, k)), lane[k % 16]);
    return halved(lane);
}

__device__ float sum_in_order(const float *row, int n)
{
    float lane[16] = {};
    for (int j = 0; j < n; j++)
        lane[j % 16] += row[j];
    return halved(lane);
}

__device__ void softmax_in_order(float *row, int n)
{
    float top = -INFINITY;
    for (int j = 0; j < n; j++)
        top = kl_larger(top, row[j]);
    for (int j = 0; j < n; j++)
        row[j] = kl_exp(row[j] - top);
    const float total = sum_in_order(row, n);
    for (int j = 0; j < n; j++)
        row[j] = row[j] / total;
}

__device__ void balance_in_order(float *c, const weighing &a)
{
    for (int i = 0; i < a.n; i++) {
        softmax_in_order(c + i * a.n, a.n);
        for (int j = 0; j < a.n; j++)
            c[i * a.n + j] += a.eps;
    }
    for (int pass = 0; pass < a.iters; pass++) {
        for (int i = 0; i < a.n && pass > 0; i++) {
            const float sum = sum_in_order(c + i * a.n, a.n) + a.eps;
            for (int j = 0; j < a.n; j++)
                c[i * a.n + j] = c[i * a.n + j] / sum;
        }
        for (int j = 0; j < a.n; j++)
            normalise_column(c, a.n, j, a.eps);
    }
}

template <kl_type TYPE> __device__ void weigh_in_order(const weighing &p, int64_t t)
{
    const int n = p.n, rows = (2 + n) * n;
    const int64_t K = n * p.D;
    const float *x = p.x + t * K;
    float *pre = p.m + t * rows, *post = p.post + t * n, *comb = p.comb + t * n * n;
    float sq = squares_in_order(x, K, 1.0f);
    const float s = kl_scale_after(sq, p.norm_eps);
    if (s != 1.0f) {
        sq = squares_in_order(x, K, s);
        for (int i = 0; i < rows; i++)
            pre[i] = product_in_order<TYPE>(p, x, i, s);
    }
    const float length = length_of(p, sq, s);
    for (int i = 0; i < n * n; i++)
        comb[i] = logit(p, pre[2 * n + i], length, 2 * n + i);
    for (int i = 0; i < n; i++) {
        post[i] = kl_sigmoid_of(logit(p, pre[n + i], length, n + i)) * 2.0f;
        pre[i] = kl_sigmoid_of(logit(p, pre[i], length, i)) + p.eps;
    }
    balance_in_order(comb, p);
    for (int64_t d = 0; d < p.D; d++)
        p.y[t * p.D + d] = collapsed(p, x, pre, d);
}

template <kl_type TYPE>
__global__ void __launch_bounds__(256, 1) mhc_pre_v1(weighing p, int64_t first)
{
    const int64_t t = first + static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x;
    if (t < p.T)
        weigh_in_order<TYPE>(p, t);
}

__global__ void __launch_bounds__(POST)
    mhc_post_v1(float *out, const float *y, const float *x, const float *post, const float *comb,
                int64_t T, int64_t n, int64_t D)
{
    KL_SHARED(float, stream, [KL_MHC_STREAMS][POST]);
    const int64_t step = static_cast<int64_t>(gridDim.x) * POST;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * POST + threadIdx.x; at < T * D;
         at += step) {
        const int64_t t = at / D, d = at % D;
        for (int64_t i = 0; i < n; i++)
            stream[i][threadIdx.x] = x[(t * n + i) * D + d];
        for (int j = 0; j < n; j++) {
            float acc = post[t * n + j] * y[at];
            for (int64_t i = 0; i < n; i++) {
                const float value = stream[i][threadIdx.x];
                acc = fmaf(comb[(t * n + i) * n + j], value, acc);
            }
            out[(t * n + j) * D + d] = acc;
        }
    }
}

/* ---- v2 ---- */

__device__ __forceinline__ float squares_of_block(const float *x, int64_t K, float s,
                                                  kl_shared<float> parts)
{
    float sq = 0.0f;
    for (int64_t k = threadIdx.x; k < K; k += BLOCK)
        sq = fmaf(x[k] * s, x[k] * s, sq);
    return kl_block_sum<BLOCK>(sq, parts);
}

/* Products of a token times s, in place of those in m. */
template <kl_type TYPE>
__device__ __forceinline__ void products_of_block(const weighing &p, const float *x, float *m,
                                                  float s, kl_shared<float> parts)
{
    for (int row = 0; row < (2 + p.n) * p.n; row++) {
        float dot = 0.0f;
        for (int64_t k = threadIdx.x; k < p.n * p.D; k += BLOCK)
            dot = fmaf(x[k] * s, (kl_matrix_at<TYPE, false>(p.fn, row, k)), dot);
        dot = kl_block_sum<BLOCK>(dot, parts);
        if (threadIdx.x == 0)
            m[row] = dot;
    }
    __syncthreads();
}

__device__ __forceinline__ void normalise_row(kl_shared<float> c, int n, int i, float eps)
{
    float sum = 0.0f;
    for (int j = 0; j < n; j++)
        sum += c[i * n + j];
    sum += eps;
    for (int j = 0; j < n; j++)
        c[i * n + j] = c[i * n + j] / sum;
}

__device__ __forceinline__ void softmax_row(kl_shared<float> c, int n, int i, float eps)
{
    float top = -INFINITY;
    for (int j = 0; j < n; j++)
        top = kl_larger(top, c[i * n + j]);
    for (int j = 0; j < n; j++)
        c[i * n + j] = kl_exp(c[i * n + j] - top);
    normalise_row(c, n, i, 0.0f);
    for (int j = 0; j < n; j++)
        c[i * n + j] += eps;
}

/* thread i has row i, then column i */
__device__ __forceinline__ void balance_in_block(kl_shared<float> c, const weighing &a)
{
    const int i = static_cast<int>(threadIdx.x);
    if (i < a.n)
        softmax_row(c, a.n, i, a.eps);
    __syncthreads();
    for (int pass = 0; pass < a.iters; pass++) {
        if (i < a.n && pass > 0)
            normalise_row(c, a.n, i, a.eps);
        __syncthreads();
        if (i < a.n)
            normalise_column(c, a.n, i, a.eps);
        __syncthreads();
    }
}

template <kl_type TYPE>
__global__ void __launch_bounds__(256, 1) mhc_pre_v2(weighing p, int64_t first)
{
    KL_SHARED(float, parts, [TEAMS]);
    KL_DYNAMIC_SHARED(float, c);
    const int n = p.n, rows = (2 + n) * n;
    const int64_t K = n * p.D, t = first + blockIdx.x;
    const float *x = p.x + t * K;
    float *m = p.m + t * rows;
    float sq = squares_of_block(x, K, 1.0f, parts);
    const float s = kl_scale_after(sq, p.norm_eps);
    if (s != 1.0f) { /* the same in every thread */
        sq = squares_of_block(x, K, s, parts);
        products_of_block<TYPE>(p, x, m, s, parts);
    }
    const float length = length_of(p, sq, s);
    for (int i = static_cast<int>(threadIdx.x); i < rows; i += BLOCK) {
        const float l = logit(p, m[i], length, i);
        if (i < n)
            m[i] = kl_sigmoid_of(l) + p.eps;
        else if (i < 2 * n)
            p.post[t * n + i - n] = kl_sigmoid_of(l) * 2.0f;
        else
            c[i - 2 * n] = l;
    }
    __syncthreads();
    balance_in_block(c, p);
    for (int i = static_cast<int>(threadIdx.x); i < n * n; i += BLOCK)
        p.comb[t * n * n + i] = c[i];
    for (int64_t d = threadIdx.x; d < p.D; d += BLOCK)
        p.y[t * p.D + d] = collapsed(p, x, m, d);
}

__global__ void __launch_bounds__(256)
    mhc_post_v2(float *out, const float *y, const float *x, const float *post, const float *comb,
                int64_t T, int64_t D)
{
    const int N = 4;
    for (int64_t t = blockIdx.x; t < T; t += gridDim.x)
        for (int64_t d = threadIdx.x; d < D; d += BLOCK) {
            float stream[N];
            KL_UNROLL
            for (int i = 0; i < N; i++)
                stream[i] = x[(t * N + i) * D + d];
            KL_UNROLL
            for (int j = 0; j < N; j++) {
                float acc = post[t * N + j] * y[t * D + d];
                KL_UNROLL
                for (int i = 0; i < N; i++)
                    acc = fmaf(comb[(t * N + i) * N + j], stream[i], acc);
                out[(t * N + j) * D + d] = acc;
            }
        }
}

template <kl_type TYPE> void launch_pre(kl_ctx *ctx, const weighing &a)
{
    const bool alone = kl_version() == 1;
    const int64_t tokens = alone ? BLOCK : 1; /* of a block */
    for (int64_t t = 0; t < a.T; t += tokens * kl_grid(kl_ceil_div(a.T - t, tokens)))
        if (alone)
            KL_LAUNCH((mhc_pre_v1<TYPE>), kl_grid(kl_ceil_div(a.T - t, tokens)), BLOCK, 0,
                      kl_stream(ctx), a, t);
        else
            KL_LAUNCH((mhc_pre_v2<TYPE>), kl_grid(a.T - t), BLOCK,
                      static_cast<size_t>(a.n * a.n) * sizeof(float), kl_stream(ctx), a, t);
}

} // namespace

static kl_status products(kl_ctx *ctx, kl_product *p, const kl_weight *fn, int64_t T)
{
    for (int64_t t = 0; t < T; t += PASS) {
        p->T = PASS < T - t ? PASS : T - t;
        p->most_groups = kl_ceil_div(p->T, kl_rows_of_a_group(p->T));
        p->x += t > 0 ? PASS * p->x_row : 0;
        p->y += t > 0 ? PASS * p->y_row : 0;
        KL_TRY(kl_launch_product(ctx, p, fn, "mhc_pre", "fn"));
    }
    return KL_OK;
}

kl_status hip_mhc_pre(kl_ctx *ctx, float *y, float *post, float *comb, const float *x,
                      const kl_weight *fn, const float *base, const float *scale,
                      const kl_mhc_args *args)
{
    const int64_t n = args->n, K = n * args->D, T = args->T;
    weighing a = { y,
                   post,
                   comb,
                   x,
                   base,
                   scale,
                   nullptr,
                   {},
                   static_cast<int>(n),
                   static_cast<int>(args->iters),
                   args->norm_eps,
                   args->eps,
                   T,
                   args->D };
    kl_product p = {};
    KL_SCRATCH_OF(a.m, ctx, T * fn->rows);
    KL_TRY(kl_matrices_of(ctx, &p.w, fn));
    if (kl_core_of->measuring(ctx) || T == 0)
        return KL_OK;
    a.fn = kl_matrix_of(fn, 0);
    p.x = x;
    p.x_row = p.D = K;
    p.y = a.m;
    p.y_row = p.y_step = fn->rows;
    KL_TRY(products(ctx, &p, fn, T));
    switch (kl_kernel_type(fn->type)) {
#define CASE(TYPE)                                                                                 \
    case TYPE: launch_pre<TYPE>(ctx, a); break;
        KL_KERNEL_TYPES(CASE)
#undef CASE
    default: return kl_no_type(ctx, "mhc_pre", "fn", fn->type);
    }
    return kl_launched(ctx, "mhc_pre");
}

kl_status hip_mhc_post(kl_ctx *ctx, float *out, const float *y, const float *x, const float *post,
                       const float *comb, int64_t T, int64_t n, int64_t D)
{
    if (kl_core_of->measuring(ctx) || T == 0)
        return KL_OK;
    if (kl_version() == 1 || n != 4)
        KL_LAUNCH(mhc_post_v1, kl_grid(kl_ceil_div(T * D, POST)), POST, 0, kl_stream(ctx), out, y,
                  x, post, comb, T, n, D);
    else
        KL_LAUNCH(mhc_post_v2, kl_grid(T), BLOCK, 0, kl_stream(ctx), out, y, x, post, comb, T, D);
    return kl_launched(ctx, "mhc_post");
}
