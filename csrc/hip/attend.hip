/* attend: softmax attention with a running maximum, in blocks of 64 positions, segments of 512 merged in rising order
 * (docs/math.md#attention). What a query does not see is left out by loop bounds.
 *   v1  one thread a query and head: the largest score, then weights and values position by position.
 *   v2  one block ROWS queries times heads that share a key head: a block of keys is read once for all of them, in
 *       tiles through shared memory; a thread has a column or two of the values for all rows. With few rows and a long
 *       cache segments are tasks of their own and a second launch merges them: the same bytes.
 * Where positions are chosen a token's list stands for them: segments and blocks are of its entries, a tile of one token.
 * Launched: v2 for values of up to 512 and one storage type, else v1. */
#include "attend.h"
#include "reduce.h"

namespace
{

const int BLOCK = 256, ROWS = 16, POSITIONS = 64, SEGMENT = KL_PAGE, STEP = KL_CHAIN;
const int64_t MOST_SPLIT = 255; /* tiles whose segments are tasks of their own */
const int PAD = 4; /* to a row of weights or queries: they begin on 16 bytes, in different banks */
static_assert(STEP == ROWS && BLOCK == STEP * ROWS && KL_PAGE % POSITIONS == 0, "score");

/* What a token attends to: the positions of a list, or, where that is NULL, the first `count`. */
struct attended {
    const int32_t *list;
    int64_t count;
};

/* of token t, in sequence n */
template <bool SELECT>
__device__ __forceinline__ attended attended_by(const kl_attend &a, int64_t n, int64_t t)
{
    const int64_t seen = a.positions[n] - a.offsets[n + 1] + t + 1;
    if (!SELECT)
        return attended{ nullptr, seen };
    const int32_t *row = seen > a.select_from ? a.select + t * a.select_width : nullptr;
    return attended{ row, a.entries[t - a.from] };
}
__device__ __forceinline__ int64_t position_of(const int32_t *list, int64_t i)
{
    return list != nullptr ? list[i] : i;
}

/* ---- v1 ---- */

__device__ __forceinline__ float key_of(const kl_attend_part &k, int64_t n, int64_t position,
                                        int64_t column)
{
    return kl_cached_value(k.cache.type, kl_cached_row(k.cache, n, position), column);
}

__device__ float score_of(const kl_attend &a, int64_t n, int64_t t, int64_t h, int64_t position)
{
    const int64_t c = h / (a.H / a.Hkv);
    float sum = 0.0f;
    for (int part = 0; part < 2; part++) {
        const kl_attend_part &k = a.key[part];
        const float *q = k.q + (t - k.first) * k.token + h * k.head;
        for (int64_t d = 0; d < k.width; d += STEP) {
            float chain = 0.0f;
            for (int64_t e = d; e < d + STEP && e < k.width; e++)
                chain = fmaf(q[e], key_of(k, n, position, c * k.width + e), chain);
            sum += chain;
        }
    }
    return sum * a.scale;
}

__global__ void __launch_bounds__(256, 1) attend_v1(kl_attend a, int64_t first)
{
    const int64_t i = (first + blockIdx.x) * BLOCK + threadIdx.x;
    if (i >= (a.to - a.from) * a.H)
        return;
    const int64_t t = a.from + i / a.H, h = i % a.H, c = h / (a.H / a.Hkv);
    const int64_t n = kl_sequence_of(a.offsets, a.N, t);
    const attended by =
        a.select_width > 0 ? attended_by<true>(a, n, t) : attended_by<false>(a, n, t);
    const int64_t seen = by.count;
    float *o = a.o + i * a.V, m = -INFINITY, l = 0.0f;
    for (int64_t p = 0; p < seen; p++) {
        const float score = score_of(a, n, t, h, position_of(by.list, p));
        m = score > m ? score : m; /* not where it is NaN */
    }
    const float shift = m == -INFINITY ? 0.0f : m;
    for (int64_t d = 0; d < a.V; d++)
        o[d] = 0.0f;
    for (int64_t p0 = 0; p0 < seen; p0 += POSITIONS) {
        float sum = 0.0f;
        for (int64_t p = p0; p < seen && p < p0 + POSITIONS; p++) {
            const int64_t at = position_of(by.list, p);
            const float weight = kl_exp(score_of(a, n, t, h, at) - shift);
            const char *row = kl_cached_row(a.values, n, at);
            sum += weight;
            for (int64_t d = 0; d < a.V; d++)
                o[d] = fmaf(weight, kl_cached_value(a.values.type, row, c * a.V + d), o[d]);
        }
        l += sum;
    }
    if (a.l != nullptr)
        a.l[i] = l;
    for (int64_t d = 0; d < a.V && a.l == nullptr; d++)
        o[d] = o[d] / l;
}

/* ---- v2: tiles ---- */

/* Rows of one sequence and key head: row i of it is query first + (i0 + i) / group, head (i0 + i) % group of c. */
struct tile {
    int64_t n, c, first, i0, rows, group, seen0; /* rows: there are so many, from i0 on */
    const int32_t *list;                         /* of the token, where a tile is of one */
};

__host__ __device__ __forceinline__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ __forceinline__ int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Rows of sequence n, of one key head, that the call computes. */
__host__ __device__ __forceinline__ int64_t rows_of(const int64_t *offsets, int64_t n,
                                                    const kl_attend &a)
{
    const int64_t tokens = least(offsets[n + 1], a.to) - most(offsets[n], a.from);
    return most(tokens, 0) * (a.H / a.Hkv);
}

/* Tile i of a call with chosen positions, all of the heads of one token. */
__device__ __forceinline__ tile tile_of_token(const kl_attend &a, int64_t i)
{
    const int64_t tiles = (a.H + ROWS - 1) / ROWS, t = a.from + i / tiles;
    tile b;
    b.n = kl_sequence_of(a.offsets, a.N, t);
    b.c = 0;
    b.first = t;
    b.group = a.H;
    b.i0 = i % tiles * ROWS;
    b.rows = least(a.H - b.i0, ROWS);
    const attended by = attended_by<true>(a, b.n, t);
    b.seen0 = by.count;
    b.list = by.list;
    return b;
}

template <bool SELECT> __device__ __forceinline__ tile tile_of(const kl_attend &a, int64_t i)
{
    if (SELECT)
        return tile_of_token(a, i);
    tile b;
    b.list = nullptr;
    b.c = i % a.Hkv;
    b.group = a.H / a.Hkv;
    b.n = 0;
    int64_t at = i / a.Hkv;
    for (;; b.n++) {
        b.rows = rows_of(a.offsets, b.n, a);
        const int64_t tiles = (b.rows + ROWS - 1) / ROWS;
        if (at < tiles)
            break;
        at -= tiles;
    }
    b.first = most(a.offsets[b.n], a.from);
    b.i0 = at * ROWS;
    b.rows = least(b.rows - b.i0, ROWS);
    b.seen0 = a.positions[b.n] - a.offsets[b.n + 1] + b.first + 1;
    return b;
}
__device__ __forceinline__ int64_t token_of(const tile &b, int64_t r)
{
    return b.first + (b.i0 + r) / b.group;
}
__device__ __forceinline__ int64_t head_of(const tile &b, int64_t r)
{
    return b.c * b.group + (b.i0 + r) % b.group;
}
/* positions that row r sees; a row that is not there: none */
__device__ __forceinline__ int64_t seen_by(const tile &b, int64_t r)
{
    return r < b.rows ? b.seen0 + (b.i0 + r) / b.group : 0;
}

/* What a block has in shared memory. */
struct room {
    kl_shared<float> keys;   /* [STEP][POSITIONS + 1] */
    kl_shared<float> q;      /* [STEP][ROWS + PAD] */
    kl_shared<float> weight; /* [POSITIONS][ROWS + PAD]: scores, then weights */
    kl_shared<float> keep;   /* [ROWS]: what acc so far is multiplied by */
    kl_shared<float> add; /* [ROWS]: by what a segment is, when it is merged; below 0: it is not */
    kl_shared<float> sum; /* [ROWS]: l, at the end */
    kl_shared<int> seen;  /* [ROWS]: positions of the block that a row sees */
};

/* A running softmax. m and l of row threadIdx.x / 16; acc of all rows, columns threadIdx.x + 256 j. */
template <int WIDE> struct running {
    float m, l, acc[WIDE][ROWS];
};
template <int WIDE> __device__ __forceinline__ void clear(running<WIDE> &x)
{
    x.m = -INFINITY;
    x.l = 0.0f;
    KL_UNROLL
    for (int j = 0; j < WIDE; j++)
        KL_UNROLL
    for (int r = 0; r < ROWS; r++)
        x.acc[j][r] = 0.0f;
}

/* weight[p][r] = scale q_r . k_p for the n positions from p0 on, which lie in one page or are those of a list: a thread
 * has one position and four rows. It brings value e of row `own` of the queries, and of each sixteenth position; behind
 * the last row that there is another again, whose scores nobody reads. */
template <kl_type TYPE, bool SELECT>
__device__ __forceinline__ void score(const room &s, const kl_attend &a, const tile &b, int64_t p0,
                                      int n)
{
    const int p = static_cast<int>(threadIdx.x) % POSITIONS,
              r0 = static_cast<int>(threadIdx.x) / POSITIONS * 4;
    const int e = static_cast<int>(threadIdx.x) % STEP, own = static_cast<int>(threadIdx.x) / STEP;
    const int64_t asks = own < b.rows ? own : 0, token = token_of(b, asks), head = head_of(b, asks);
    float sum[4] = {};
    for (int part = 0; part < 2; part++) {
        const kl_attend_part &k = a.key[part];
        if (k.width == 0)
            continue;
        const char *keys = SELECT ? nullptr : kl_cached_row(k.cache, b.n, p0);
        const char *chosen[POSITIONS / ROWS];
        KL_UNROLL
        for (int j = 0; SELECT && j < POSITIONS / ROWS; j++)
            chosen[j] =
                kl_cached_row(k.cache, b.n, position_of(b.list, p0 + least(own + j * ROWS, n - 1)));
        const float *q = k.q + (token - k.first) * k.token + head * k.head;
        for (int64_t d = e; d - e < k.width; d += STEP) {
            const bool inside = d < k.width;
            const int64_t column = inside ? d : 0;
            KL_UNROLL
            for (int j = 0; j < POSITIONS / ROWS; j++) {
                const int at = own + j * ROWS;
                const char *row =
                    SELECT ? chosen[j]
                           : keys + static_cast<size_t>(at < n ? at : n - 1) * k.cache.row_bytes;
                const float x = kl_cached_at<TYPE>(row, b.c * k.width + column);
                s.keys[e * (POSITIONS + 1) + at] = inside ? x : 0.0f;
            }
            s.q[e * (ROWS + PAD) + own] = inside ? q[column] : 0.0f;
            __syncthreads();
            float chain[4] = {};
            for (int i = 0; i < STEP; i++) {
                const float key = s.keys[i * (POSITIONS + 1) + p];
                KL_UNROLL
                for (int j = 0; j < 4; j++)
                    chain[j] = fmaf(s.q[i * (ROWS + PAD) + r0 + j], key, chain[j]);
            }
            KL_UNROLL
            for (int j = 0; j < 4; j++)
                sum[j] += chain[j];
            __syncthreads();
        }
    }
    KL_UNROLL
    for (int j = 0; j < 4; j++)
        s.weight[p * (ROWS + PAD) + r0 + j] = sum[j] * a.scale;
    __syncthreads();
}

/* Scores to weights; brings m and l up to date. 16 threads a row, each every sixteenth position. */
template <int WIDE>
__device__ __forceinline__ void weigh(const room &s, const tile &b, running<WIDE> &x, int64_t p0,
                                      int n)
{
    const int r = static_cast<int>(threadIdx.x) / 16, lane = static_cast<int>(threadIdx.x) % 16;
    const int64_t seen = seen_by(b, r) - p0;
    float z[POSITIONS / 16], top = -INFINITY, sum = 0.0f;
    KL_UNROLL
    for (int j = 0; j < POSITIONS / 16; j++) {
        const int p = lane + 16 * j;
        z[j] = s.weight[p * (ROWS + PAD) + r];
        top = p < n && p < seen && z[j] > top ? z[j] : top; /* not where it is NaN */
    }
    top = kl_team_reduce<kl_max_of>(top, 16);
    const float now = top > x.m ? top : x.m, shift = now == -INFINITY ? 0.0f : now;
    KL_UNROLL
    for (int j = 0; j < POSITIONS / 16; j++) {
        const int p = lane + 16 * j;
        z[j] = p < n && p < seen ? kl_exp(z[j] - shift) : 0.0f;
        s.weight[p * (ROWS + PAD) + r] = z[j];
        sum += z[j];
    }
    sum = kl_team_reduce<kl_add_of>(sum, 16);
    const float keep = seen > 0 ? kl_exp(x.m - shift) : 1.0f;
    x.l = fmaf(x.l, keep, sum);
    x.m = seen > 0 ? now : x.m;
    if (lane == 0) {
        s.keep[r] = keep;
        s.seen[r] = static_cast<int>(least(most(seen, 0), n));
    }
    __syncthreads();
}

/* acc += weight x value for the n positions from p0 on; ALL: every row sees them */
template <bool ALL, kl_type TYPE, int WIDE, bool SELECT>
__device__ __forceinline__ void add_positions(const room &s, const kl_attend &a, const tile &b,
                                              running<WIDE> &x, int64_t p0, int n)
{
    const char *row = SELECT ? nullptr : kl_cached_row(a.values, b.n, p0);
    for (int p = 0; p < n; p++, row += SELECT ? 0 : a.values.row_bytes) {
        if (SELECT)
            row = kl_cached_row(a.values, b.n, position_of(b.list, p0 + p));
        float value[WIDE], weight[ROWS];
        KL_UNROLL
        for (int j = 0; j < WIDE; j++) {
            const int64_t column = static_cast<int>(threadIdx.x) + BLOCK * j;
            value[j] = column < a.V ? kl_cached_at<TYPE>(row, b.c * a.V + column) : 0.0f;
        }
        KL_UNROLL
        for (int r = 0; r < ROWS; r++)
            weight[r] = s.weight[p * (ROWS + PAD) + r];
        KL_UNROLL
        for (int r = 0; r < ROWS; r++)
            if (ALL || p < s.seen[r])
                KL_UNROLL
        for (int j = 0; j < WIDE; j++)
            x.acc[j][r] = fmaf(weight[r], value[j], x.acc[j][r]);
    }
}

template <kl_type TYPE, int WIDE, bool SELECT>
__device__ __forceinline__ void add_values(const room &s, const kl_attend &a, const tile &b,
                                           running<WIDE> &x, int64_t p0, int n)
{
    KL_UNROLL
    for (int j = 0; j < WIDE; j++)
        KL_UNROLL
    for (int r = 0; r < ROWS; r++)
        x.acc[j][r] *= s.keep[r];
    if (s.seen[0] == n) /* rows see more and more; nobody reads those behind the last */
        add_positions<true, TYPE, WIDE, SELECT>(s, a, b, x, p0, n);
    else
        add_positions<false, TYPE, WIDE, SELECT>(s, a, b, x, p0, n);
    __syncthreads();
}

template <kl_type TYPE, int WIDE, bool SELECT>
__device__ __forceinline__ void attend_segment(const room &s, const kl_attend &a, const tile &b,
                                               running<WIDE> &x, int64_t segment)
{
    const int64_t end = least((segment + 1) * SEGMENT, seen_by(b, b.rows - 1));
    clear(x);
    for (int64_t p = segment * SEGMENT; p < end; p += POSITIONS) {
        const int n = static_cast<int>(least(POSITIONS, end - p));
        score<TYPE, SELECT>(s, a, b, p, n);
        weigh(s, b, x, p, n);
        add_values<TYPE, WIDE, SELECT>(s, a, b, x, p, n);
    }
}

/* How two running softmaxes become one: both are brought to the larger m. */
struct merging {
    float m, keep, add;
};
__device__ __forceinline__ merging merging_of(float m, float m_later)
{
    const float now = m_later > m ? m_later : m, shift = now == -INFINITY ? 0.0f : now;
    return merging{ now, kl_exp(m - shift), kl_exp(m_later - shift) };
}

/* Adds a later segment, in the rows that see any of it. */
template <int WIDE>
__device__ __forceinline__ void merge(const room &s, const tile &b, running<WIDE> &x,
                                      const running<WIDE> &later, int64_t segment)
{
    const int r = static_cast<int>(threadIdx.x) / 16;
    const bool sees = seen_by(b, r) > segment * SEGMENT;
    const merging by = merging_of(x.m, later.m);
    if (sees) {
        x.m = by.m;
        x.l = fmaf(x.l, by.keep, later.l * by.add);
    }
    if (threadIdx.x % 16 == 0) {
        s.keep[r] = by.keep;
        s.add[r] = sees ? by.add : -1.0f;
    }
    __syncthreads();
    KL_UNROLL
    for (int i = 0; i < ROWS; i++) {
        const float keep = s.keep[i], add = s.add[i];
        KL_UNROLL
        for (int j = 0; j < WIDE; j++)
            if (!(add < 0.0f))
                x.acc[j][i] = fmaf(x.acc[j][i], keep, later.acc[j][i] * add);
    }
    __syncthreads();
}

/* a.part_acc NULL: a task is a tile, all its segments; else a segment of a tile. A block is task first + blockIdx.x: a
 * loop over tasks would keep in registers what is the same for all of them. */
template <kl_type TYPE, int WIDE, bool SELECT>
__global__ void __launch_bounds__(256, 1) attend_v2(kl_attend a, int64_t first)
{
    KL_SHARED(float, keys, [STEP * (POSITIONS + 1)]);
    KL_SHARED(float, q, [STEP * (ROWS + PAD)]);
    KL_SHARED(float, weight, [POSITIONS * (ROWS + PAD)]);
    KL_SHARED(float, keep, [ROWS]);
    KL_SHARED(float, add, [ROWS]);
    KL_SHARED(float, sum, [ROWS]);
    KL_SHARED(int, visible, [ROWS]);
    const room s = { keys, q, weight, keep, add, sum, visible };
    const bool split = a.part_acc != nullptr;
    const int64_t i = first + blockIdx.x;
    const tile b = tile_of<SELECT>(a, split ? i / a.segments : i);
    const int64_t seen = seen_by(b, b.rows - 1), segment = split ? i % a.segments : 0;
    if (segment > 0
        && segment * SEGMENT >= seen) /* in every thread; the first may be of no position */
        return;
    running<WIDE> x;
    attend_segment<TYPE, WIDE, SELECT>(s, a, b, x, segment);
    for (int64_t later = 1; !split && later * SEGMENT < seen; later++) {
        running<WIDE> y;
        attend_segment<TYPE, WIDE, SELECT>(s, a, b, y, later);
        merge(s, b, x, y, later);
    }
    const int mine = static_cast<int>(threadIdx.x) / 16;
    if (threadIdx.x % 16 == 0) {
        s.sum[mine] = x.l;
        if (split) {
            a.part_m[i * ROWS + mine] = x.m;
            a.part_l[i * ROWS + mine] = x.l;
        } else if (a.l != nullptr && mine < b.rows) {
            a.l[(token_of(b, mine) - a.from) * a.H + head_of(b, mine)] = x.l;
        }
    }
    __syncthreads();
    KL_UNROLL
    for (int r = 0; r < ROWS; r++) {
        const float l = s.sum[r];
        KL_UNROLL
        for (int j = 0; j < WIDE; j++) {
            const int64_t column = static_cast<int>(threadIdx.x) + BLOCK * j;
            if (column < a.V && split)
                a.part_acc[(i * ROWS + r) * a.V + column] = x.acc[j][r];
            else if (column < a.V && r < b.rows)
                a.o[((token_of(b, r) - a.from) * a.H + head_of(b, r)) * a.V + column] =
                    a.l == nullptr ? x.acc[j][r] / l : x.acc[j][r];
        }
    }
}

/* The segments of a row, merged in rising order; a block a row of a tile. */
template <bool SELECT>
__global__ void __launch_bounds__(256) attend_v2_merge(kl_attend a, int64_t tiles)
{
    for (int64_t i = blockIdx.x; i < tiles * ROWS; i += gridDim.x) {
        const tile b = tile_of<SELECT>(a, i / ROWS);
        const int64_t r = i % ROWS, first = i / ROWS * a.segments * ROWS + r;
        const int64_t row = (token_of(b, r) - a.from) * a.H + head_of(b, r);
        for (int64_t d = threadIdx.x; r < b.rows && d < a.V; d += BLOCK) {
            float m = a.part_m[first], l = a.part_l[first], acc = a.part_acc[first * a.V + d];
            for (int64_t k = 1; k * SEGMENT < seen_by(b, r); k++) {
                const int64_t part = first + k * ROWS;
                const merging by = merging_of(m, a.part_m[part]);
                m = by.m;
                l = fmaf(l, by.keep, a.part_l[part] * by.add);
                acc = fmaf(acc, by.keep, a.part_acc[part * a.V + d] * by.add);
            }
            a.o[row * a.V + d] = a.l == nullptr ? acc / l : acc;
            if (a.l != nullptr && d == 0)
                a.l[row] = l;
        }
    }
}

template <kl_type TYPE, bool SELECT> void launch_of(kl_ctx *ctx, const kl_attend &a, int64_t tiles)
{
    const int64_t tasks = tiles * (a.part_acc != nullptr ? a.segments : 1);
    for (int64_t first = 0; first < tasks; first += kl_grid(tasks - first))
        if (a.V <= BLOCK)
            KL_LAUNCH((attend_v2<TYPE, 1, SELECT>), kl_grid(tasks - first), BLOCK, 0,
                      kl_stream(ctx), a, first);
        else
            KL_LAUNCH((attend_v2<TYPE, 2, SELECT>), kl_grid(tasks - first), BLOCK, 0,
                      kl_stream(ctx), a, first);
    if (a.part_acc != nullptr)
        KL_LAUNCH(attend_v2_merge<SELECT>, kl_grid(tiles * ROWS), BLOCK, 0, kl_stream(ctx), a,
                  tiles);
}

template <kl_type TYPE> void launch(kl_ctx *ctx, const kl_attend &a, int64_t tiles)
{
    if (a.select_width > 0)
        launch_of<TYPE, true>(ctx, a, tiles);
    else
        launch_of<TYPE, false>(ctx, a, tiles);
}

} // namespace

kl_status kl_attend_run(kl_ctx *ctx, kl_attend a, const int64_t *offsets, const int64_t *positions)
{
    const bool one_type = a.key[0].cache.type == a.values.type
                          && (a.key[1].width == 0 || a.key[1].cache.type == a.values.type);
    int64_t tiles = 0, longest = 0;
    for (int64_t n = 0; n < a.N; n++)
        if (rows_of(offsets, n, a) > 0) {
            tiles += kl_ceil_div(rows_of(offsets, n, a), ROWS) * a.Hkv;
            longest = most(longest, positions[n]);
        }
    if (tiles == 0)
        return KL_OK;
    if (a.select_width > 0) {
        tiles = (a.to - a.from) * kl_ceil_div(a.H, ROWS);
        longest = least(longest, most(a.select_width, a.select_from));
    }
    if (kl_version() == 1 || a.V > 2 * BLOCK || !one_type) {
        const int64_t tasks = kl_ceil_div((a.to - a.from) * a.H, BLOCK);
        if (kl_core_of->measuring(ctx))
            return KL_OK;
        for (int64_t first = 0; first < tasks; first += kl_grid(tasks - first))
            KL_LAUNCH(attend_v1, kl_grid(tasks - first), BLOCK, 0, kl_stream(ctx), a, first);
        return KL_OK;
    }
    a.segments = kl_ceil_div(longest, SEGMENT);
    /* with lists fewer tokens may take more: a plan reckons with the most that are split */
    const bool planned = a.select_width > 0 && kl_core_of->measuring(ctx);
    const int64_t split = planned ? least(tiles, MOST_SPLIT) : tiles;
    if (a.segments > 1 && split <= MOST_SPLIT && split * a.segments <= 4096) {
        const int64_t parts = split * a.segments * ROWS;
        KL_SCRATCH_OF(a.part_m, ctx, parts);
        KL_SCRATCH_OF(a.part_l, ctx, parts);
        KL_SCRATCH_OF(a.part_acc, ctx, parts * a.V);
    }
    if (kl_core_of->measuring(ctx))
        return KL_OK;
    if (a.values.type == KL_Q8_0)
        launch<KL_Q8_0>(ctx, a, tiles);
    else if (a.values.type == KL_F16)
        launch<KL_F16>(ctx, a, tiles);
    else
        launch<KL_F32>(ctx, a, tiles);
    return KL_OK;
}
