/* moe (ops/moe.c): y[t] = sum_i weights[t, i] E(x[t]), e = ids[t, i], then + shared. A pair is a token and one of its
 * experts. Its hidden values, and its result before the weight, are rows of scratch; a token's pairs are added by fma
 * from +0 in ascending id: the CPU's bytes. A pass is PASS tokens at most.
 *   v1  pairs by token, each output by itself.
 *   v2  pairs by expert, then token, and products over all rows of an expert (product.hip): a team an expert counts
 *       its pairs and puts them in their places; no atomics, no copy to the host (launched). The pairs of a few tokens
 *       are put there by one block, a thread a pair.
 * SwiGLU is in the product that reads up; SiTU is a launch behind both, on hidden values and those of up.
 * An id that is no expert, or does not rise, is noted (runtime.h), and its pair left out. */
#include "product.h"

#include "reduce.h"

namespace
{

const int BLOCK = 256, TEAMS = BLOCK / KL_TEAM;
const int64_t PASS = 1024;

struct pairs {
    const int32_t *ids;    /* [n] */
    int64_t n, k, E, rows; /* rows of a group */
    int64_t before;        /* pairs of earlier passes */
    int32_t *place;        /* [n] row of scratch of each pair; -1: left out */
    int32_t *token;        /* [n] of each row of scratch */
    int32_t *count;        /* [E] pairs of each expert */
    kl_row_group *groups;
    int32_t *n_groups;
    unsigned long long *fault;
};

/* the expert of pair i; -1: none */
__device__ __forceinline__ int32_t checked(const pairs &p, int64_t i)
{
    const int32_t e = p.ids[i];
    const bool is_expert = e >= 0 && e < p.E;
    if (!is_expert || (i % p.k > 0 && e <= p.ids[i - 1]))
        kl_note(p.fault, p.before + i, e);
    return is_expert ? e : -1;
}

/* every pair at its own place: what v1 goes by, and what v2 writes over */
__global__ void __launch_bounds__(256) moe_check(pairs p)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; i < p.n; i += step)
        p.place[i] = checked(p, i) >= 0 ? static_cast<int32_t>(i) : -1;
}

/* All of v2's grouping, of up to BLOCK pairs: a pair counts those before it, by expert, then token. */
__global__ void __launch_bounds__(256) moe_group_few(pairs p)
{
    KL_SHARED(int32_t, expert, [BLOCK]);
    KL_SHARED(bool, leads, [BLOCK]); /* is the first of its group */
    const int n = static_cast<int>(p.n), i = static_cast<int>(threadIdx.x),
              rows = static_cast<int>(p.rows);
    const int32_t e = i < n ? checked(p, i) : -1;
    expert[i] = e;
    __syncthreads();
    int32_t begin = 0, own = 0,
            all = 0; /* pairs of lesser experts; of this one: before i, in all */
    for (int j = 0; j < n; j++) {
        begin += expert[j] >= 0 && expert[j] < e;
        own += expert[j] == e && j < i;
        all += expert[j] == e;
    }
    leads[i] = e >= 0 && own % rows == 0;
    __syncthreads();
    int32_t group = 0, groups = 0;
    for (int j = 0; j < n; j++) {
        group += leads[j] && (expert[j] < e || (expert[j] == e && j < i));
        groups += leads[j];
    }
    if (i < n)
        p.place[i] = e >= 0 ? begin + own : -1;
    if (e >= 0)
        p.token[begin + own] = static_cast<int32_t>(i / p.k);
    if (leads[i])
        p.groups[group] = kl_row_group{ e, begin + own, all - own < rows ? all - own : rows };
    if (i == 0)
        *p.n_groups = groups;
}

__global__ void __launch_bounds__(256) moe_count(pairs p)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * TEAMS;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * TEAMS; first < p.E; first += step) {
        const int64_t e = first + kl_team();
        int32_t n = 0;
        for (int64_t i = kl_lane(); e < p.E && i < p.n; i += KL_TEAM)
            n += p.ids[i] == e;
        n = kl_team_total(n);
        if (e < p.E && kl_lane() == 0)
            p.count[e] = n;
    }
}

/* Where an expert begins is the sum over those before it, of pairs and of groups. */
__global__ void __launch_bounds__(256) moe_place(pairs p)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * TEAMS;
    const int32_t rows = static_cast<int32_t>(p.rows);
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * TEAMS; first < p.E; first += step) {
        const int64_t e = first + kl_team();
        const int32_t n = e < p.E ? p.count[e] : 0;
        int32_t begin = 0, group = 0;
        for (int64_t j = kl_lane(); e < p.E && j < e; j += KL_TEAM) {
            begin += p.count[j];
            group += (p.count[j] + rows - 1) / rows;
        }
        begin = kl_team_total(begin);
        group = kl_team_total(group);
        const int32_t groups = (n + rows - 1) / rows;
        for (int32_t i = kl_lane(); i < groups; i += KL_TEAM) {
            const int32_t left = n - i * rows;
            p.groups[group + i] = kl_row_group{ static_cast<int32_t>(e), begin + i * rows,
                                                left < rows ? left : rows };
        }
        if (e == p.E - 1 && kl_lane() == 0)
            *p.n_groups = group + groups;
        for (int64_t i0 = 0; i0 < p.n; i0 += KL_TEAM) {
            const int64_t i = i0 + kl_lane();
            const int32_t mine = n > 0 && i < p.n && p.ids[i] == e;
            const int32_t at = begin + kl_team_before(mine);
            if (mine) {
                p.place[i] = at;
                p.token[at] = static_cast<int32_t>(i / p.k);
            }
            begin += kl_team_total(mine);
        }
    }
}

__global__ void __launch_bounds__(256)
    moe_add(float *y, const float *out, const int32_t *place, const float *weights,
            const float *shared, int64_t T, int64_t D, int64_t k)
{
    for (int64_t t = blockIdx.x; t < T; t += gridDim.x)
        for (int64_t d = threadIdx.x; d < D; d += BLOCK) {
            float sum = 0.0f;
            for (int64_t i = 0; i < k; i++) {
                const int64_t row = place[t * k + i];
                if (row >= 0)
                    sum = fmaf(weights[t * k + i], out[row * D + d], sum);
            }
            y[t * D + d] = shared != nullptr ? sum + shared[t * D + d] : sum;
        }
}

/* what a pass works with */
struct pass {
    pairs p;
    bool by_itself;        /* v1 */
    kl_operand of_x, of_h; /* [T, D]; h: [pairs, F] */
    float *h, *out;        /* [pairs, F], [pairs, D] */
    float *up_h;           /* [pairs, F], where the activation is SiTU */
    const kl_situ_betas *situ;
    float limit; /* SwiGLU's */
    kl_matrices gate, up, down;
    int64_t T, most_groups;
};

void group_pairs(kl_ctx *ctx, const pairs &p, bool by_itself)
{
    if (!by_itself && p.n <= BLOCK) {
        KL_LAUNCH(moe_group_few, 1, BLOCK, 0, kl_stream(ctx), p);
        return;
    }
    KL_LAUNCH(moe_check, kl_grid(kl_ceil_div(p.n, BLOCK)), BLOCK, 0, kl_stream(ctx), p);
    if (by_itself)
        return;
    const unsigned teams = kl_grid(kl_ceil_div(p.E, TEAMS));
    KL_LAUNCH(moe_count, teams, BLOCK, 0, kl_stream(ctx), p);
    KL_LAUNCH(moe_place, teams, BLOCK, 0, kl_stream(ctx), p);
}

/* a product for each pair: of rows of x, or of rows of h */
kl_product product_of(kl_ctx *ctx, const pass &a, const kl_weight *weight, const kl_matrices &w,
                      bool of_x)
{
    kl_product p = {};
    kl_operand_of(ctx, &p, of_x ? a.of_x : a.of_h, 0, weight);
    p.w = w;
    p.y_row = w.rows;
    p.T = a.T;
    p.y = of_x ? a.h : a.out;
    if (a.by_itself) {
        p.T = a.p.n;
        p.ids = a.p.ids;
        p.per_row = of_x ? a.p.k : 1;
        return p;
    }
    p.index = of_x ? a.p.token : nullptr;
    p.groups = a.p.groups;
    p.n_groups = a.p.n_groups;
    p.most_groups = a.most_groups;
    return p;
}

kl_status launch_both(kl_ctx *ctx, const kl_product &gate, const kl_product &up,
                      const kl_weight *w_gate, const kl_weight *w_up)
{
    const kl_product both[] = { gate, up };
    if (kl_go_together(w_gate, w_up))
        return kl_launch_products(ctx, both, 2, w_gate, "moe", "w_gate");
    KL_TRY(kl_launch_product(ctx, &gate, w_gate, "moe", "w_gate"));
    return kl_launch_product(ctx, &up, w_up, "moe", "w_up");
}

kl_status run(kl_ctx *ctx, pass &a, const float *x, const kl_weight *w_gate, const kl_weight *w_up,
              const kl_weight *w_down)
{
    group_pairs(ctx, a.p, a.by_itself);
    kl_operand_make(ctx, &a.of_x, x, a.T);
    const kl_product gate = product_of(ctx, a, w_gate, a.gate, true);
    kl_product up = product_of(ctx, a, w_up, a.up, true);
    if (a.situ == nullptr) {
        up.limit = a.limit;
        KL_TRY(kl_launch_swiglu(ctx, &gate, &up, w_gate, w_up, "moe"));
    } else {
        up.y = a.up_h;
        KL_TRY(launch_both(ctx, gate, up, w_gate, w_up));
        KL_TRY(hip_situ(ctx, a.h, a.h, a.up_h, a.p.n * a.gate.rows, a.situ));
    }
    kl_operand_make(ctx, &a.of_h, a.h, a.p.n);
    const kl_product down = product_of(ctx, a, w_down, a.down, false);
    return kl_launch_product(ctx, &down, w_down, "moe", "w_down");
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

} // namespace

kl_status hip_moe(kl_ctx *ctx, float *y, const float *x, const int32_t *ids, const float *weights,
                  const kl_weight *w_gate, const kl_weight *w_up, const kl_weight *w_down,
                  const float *shared, int64_t T, int64_t D, int64_t F, int64_t k,
                  const kl_situ_betas *situ, float limit)
{
    const int64_t most_T = least(T, PASS), E = w_gate->n, n = most_T * k;
    unsigned long long *faults;
    pass a = {};
    a.p.k = k;
    a.p.E = E;
    a.situ = situ;
    a.limit = limit;
    a.most_groups = least(E, n) + n / KL_FEW;
    a.by_itself = kl_version() == 1 && kl_core_of->activations(ctx) != KL_ACTIVATIONS_INT8;
    KL_TRY(kl_check_blocks(ctx, w_gate, "moe", "w_gate"));
    KL_TRY(kl_check_blocks(ctx, w_up, "moe", "w_up"));
    KL_TRY(kl_check_blocks(ctx, w_down, "moe", "w_down"));
    const kl_weight of_x[] = { *w_gate, *w_up };
    KL_TRY(kl_operand_room(ctx, &a.of_x, of_x, 2, most_T, D));
    KL_TRY(kl_operand_room(ctx, &a.of_h, w_down, 1, n, F));
    KL_SCRATCH_OF(a.p.place, ctx, n);
    KL_SCRATCH_OF(a.p.token, ctx, n);
    KL_SCRATCH_OF(a.p.count, ctx, E);
    KL_SCRATCH_OF(a.p.groups, ctx, a.most_groups);
    KL_SCRATCH_OF(a.p.n_groups, ctx, 1);
    KL_SCRATCH_OF(a.h, ctx, n * F);
    if (situ != nullptr)
        KL_SCRATCH_OF(a.up_h, ctx, n * F);
    KL_SCRATCH_OF(a.out, ctx, n * D);
    KL_TRY(kl_matrices_of(ctx, &a.gate, w_gate));
    KL_TRY(kl_matrices_of(ctx, &a.up, w_up));
    KL_TRY(kl_matrices_of(ctx, &a.down, w_down));
    if (kl_core_of->measuring(ctx) || T == 0)
        return KL_OK;
    KL_TRY(kl_faults_of(ctx, &faults, E, k));
    a.p.fault = faults + KL_FAULT_MOE_IDS;
    for (int64_t t = 0; t < T; t += PASS) {
        a.T = least(PASS, T - t);
        a.p.ids = ids + t * k;
        a.p.n = a.T * k;
        a.p.before = t * k;
        a.p.rows = kl_rows_of_a_group(a.T);
        a.most_groups = least(a.p.n, least(E, a.p.n) + a.p.n / a.p.rows);
        KL_TRY(run(ctx, a, x + t * D, w_gate, w_up, w_down));
        KL_LAUNCH(moe_add, kl_grid(a.T), BLOCK, 0, kl_stream(ctx), y + t * D, a.out, a.p.place,
                  weights + t * k, shared != nullptr ? shared + t * D : nullptr, a.T, D, k);
    }
    return kl_launched(ctx, "moe");
}
