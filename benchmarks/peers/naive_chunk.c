/* What a first program for the chunked delta rule looks like: chunks of 64, decays as exponentials of
 * differences of cumulative sums, plain loops; and the rate of the memory that a step is held against.
 *
 *   naive_chunk: q, k [T, H, K]  v, o [T, H, V]  g [T, H, K] (channel) or [T, H]  beta [T, H]
 *                initial, state [H, K, V]. K and V at most 256. Heads are dealt to the threads.
 *   read_write:  x[i] *= 1, each value read and written where it lies.
 *
 * With G the sums of g from the chunk's first row, for rows j <= i:
 *   L_ij = beta_i <k_i, exp(G_i - G_j) k_j>    P_ij = <scale q_i, exp(G_i - G_j) k_j>
 *   d_i = beta_i (v_i - (exp(G_i) k_i)^T S) - sum_{j<i} L_ij d_j
 *   o_i = (exp(G_i) scale q_i)^T S + sum_{j<=i} P_ij d_j
 *   S = Diag(exp(G_last)) S + sum_j (exp(G_last - G_j) k_j) d_j^T */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

enum { CHUNK = 64, WIDEST = 256, MOST_THREADS = 64 };

typedef struct job {
    float *o, *state;
    const float *q, *k, *v, *g, *beta, *initial;
    int64_t T, H, K, V;
    int channel;
    int64_t head, step; /* first head of this thread, and how many it goes on by */
} job;

/* One chunk of a head: where its rows begin, and what is made of them. */
typedef struct chunk {
    const job *a;
    const float *q, *k, *v, *g, *beta;
    float *o, *S;
    int n;
    float sums[CHUNK][WIDEST], d[CHUNK][WIDEST], L[CHUNK][CHUNK], P[CHUNK][CHUNK];
} chunk;

/* exp(G_i - G_j) of a channel; exp(G_i) for j = -1 */
static float decay(const chunk *p, int i, int j, int64_t c)
{
    if (!p->a->channel)
        c = 0;
    return expf(j < 0 ? p->sums[i][c] : p->sums[i][c] - p->sums[j][c]);
}

static void cumulative_sums(chunk *p)
{
    const int64_t width = p->a->channel ? p->a->K : 1, row = p->a->H * width;
    for (int i = 0; i < p->n; i++)
        for (int64_t c = 0; c < width; c++)
            p->sums[i][c] = p->g[i * row + c] + (i > 0 ? p->sums[i - 1][c] : 0.0f);
}

static void triangles(chunk *p)
{
    const int64_t K = p->a->K, H = p->a->H;
    const float scale = 1.0f / sqrtf((float)K);
    for (int i = 0; i < p->n; i++)
        for (int j = 0; j <= i; j++) {
            const float *qi = p->q + i * H * K, *ki = p->k + i * H * K, *kj = p->k + j * H * K;
            const float head = p->a->channel ? 1.0f : decay(p, i, j, 0);
            float l = 0.0f, r = 0.0f;
            for (int64_t c = 0; c < K; c++) {
                const float x = p->a->channel ? kj[c] * decay(p, i, j, c) : kj[c];
                l += ki[c] * x;
                r += qi[c] * x;
            }
            p->L[i][j] = l * head * p->beta[i * H];
            p->P[i][j] = r * head * scale;
        }
}

/* d by forward substitution, and o */
static void outputs(chunk *p)
{
    const int64_t K = p->a->K, V = p->a->V, H = p->a->H;
    const float scale = 1.0f / sqrtf((float)K);
    for (int i = 0; i < p->n; i++) {
        float *d = p->d[i], *o = p->o + i * H * V;
        memcpy(d, p->v + i * H * V, (size_t)V * sizeof *d);
        memset(o, 0, (size_t)V * sizeof *o);
        for (int64_t c = 0; c < K; c++) {
            const float a = decay(p, i, -1, c);
            const float k = a * p->k[i * H * K + c], q = a * p->q[i * H * K + c] * scale;
            for (int64_t x = 0; x < V; x++) {
                d[x] -= k * p->S[c * V + x];
                o[x] += q * p->S[c * V + x];
            }
        }
        for (int64_t x = 0; x < V; x++)
            d[x] *= p->beta[i * H];
        for (int j = 0; j < i; j++)
            for (int64_t x = 0; x < V; x++)
                d[x] -= p->L[i][j] * p->d[j][x];
        for (int j = 0; j <= i; j++)
            for (int64_t x = 0; x < V; x++)
                o[x] += p->P[i][j] * p->d[j][x];
    }
}

static void new_state(chunk *p)
{
    const int64_t K = p->a->K, V = p->a->V, H = p->a->H;
    const int last = p->n - 1;
    for (int64_t c = 0; c < K; c++) {
        float *S = p->S + c * V;
        const float kept = decay(p, last, -1, c);
        for (int64_t x = 0; x < V; x++)
            S[x] *= kept;
        for (int j = 0; j < p->n; j++) {
            const float k = p->k[j * H * K + c] * decay(p, last, j, c);
            for (int64_t x = 0; x < V; x++)
                S[x] += k * p->d[j][x];
        }
    }
}

static void run_chunk(const job *a, int64_t h, int64_t t, int n)
{
    static _Thread_local chunk p;
    const int64_t head = t * a->H + h;
    p.a = a;
    p.q = a->q + head * a->K;
    p.k = a->k + head * a->K;
    p.v = a->v + head * a->V;
    p.g = a->g + head * (a->channel ? a->K : 1);
    p.beta = a->beta + head;
    p.o = a->o + head * a->V;
    p.S = a->state + h * a->K * a->V;
    p.n = n;
    cumulative_sums(&p);
    triangles(&p);
    outputs(&p);
    new_state(&p);
}

static void *heads(void *arg)
{
    const job *a = arg;
    const int64_t size = a->K * a->V;
    for (int64_t h = a->head; h < a->H; h += a->step) {
        memcpy(a->state + h * size, a->initial + h * size, (size_t)size * sizeof *a->state);
        for (int64_t t = 0; t < a->T; t += CHUNK)
            run_chunk(a, h, t, (int)(a->T - t < CHUNK ? a->T - t : CHUNK));
    }
    return NULL;
}

/* Runs the jobs, the first in the calling thread; 0, or an error of pthread_create. */
static int run(void *(*work)(void *), void *jobs, size_t size, int threads)
{
    pthread_t started[MOST_THREADS];
    int error = 0, n = 1;
    for (; n < threads && error == 0; n++)
        error = pthread_create(&started[n], NULL, work, (char *)jobs + (size_t)n * size);
    if (error != 0)
        n--;
    work(jobs);
    for (int i = 1; i < n; i++)
        pthread_join(started[i], NULL);
    return error;
}

int naive_chunk(float *o, float *state, const float *q, const float *k, const float *v,
                const float *g, const float *beta, const float *initial, int64_t T, int64_t H,
                int64_t K, int64_t V, int channel, int threads)
{
    job jobs[MOST_THREADS];
    if (K > WIDEST || V > WIDEST || threads < 1 || threads > MOST_THREADS)
        return -1;
    for (int i = 0; i < threads; i++)
        jobs[i] = (job){ o, state, q, k, v, g, beta, initial, T, H, K, V, channel, i, threads };
    return run(heads, jobs, sizeof *jobs, threads);
}

typedef struct piece {
    float *x;
    int64_t n;
    float factor;
} piece;

static void *scale_piece(void *arg)
{
    const piece *a = arg;
    for (int64_t i = 0; i < a->n; i++)
        a->x[i] *= a->factor;
    return NULL;
}

int read_write(float *x, int64_t n, float factor, int threads)
{
    piece pieces[MOST_THREADS];
    if (threads < 1 || threads > MOST_THREADS)
        return -1;
    for (int i = 0; i < threads; i++) {
        const int64_t begin = n * i / threads;
        pieces[i] = (piece){ x + begin, n * (i + 1) / threads - begin, factor };
    }
    return run(scale_piece, pieces, sizeof *pieces, threads);
}
