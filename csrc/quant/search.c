/* The searches of search.h. For each sub-block several inverse scales are tried: x is rounded to levels, and the
 * scale (and minimum) that fit these levels best are the solution of a linear system. Then all sub-blocks share
 * d (and dmin), whose multiples near each fit are tried; d and dmin are fitted to what was chosen, and that once
 * more. */
#include "search.h"

#include "iq4.h"

enum {
    LANES = 4,
    STRIDE = 16, /* values at a time of a loop without sums */
    WIDTH = 32,  /* of the widest sub-block */
    ROUNDS = 2,  /* of choosing scales for d */
    STEPS_BELOW = 8,
    STEPS_ABOVE = 8,
    SIGNED_STEPS = 9,
    LEVEL_STEPS = 5,
};

static const float STEP = 0.125f, SIGNED_STEP = 0.1f, LEVEL_STEP = 4.0f;
static const float ROUND = 0x1.8p23f; /* x + ROUND - ROUND: x to nearest even, |x| < 2^22 */
static const float F16_MAX = 65504.0f, F16_MIN = 0x1p-24f;

/* four lanes, as the compiler has them: every processor adds in the same order */
typedef float lanes __attribute__((vector_size(16)));

static inline lanes at(const float *x)
{
    lanes v;
    memcpy(&v, x, sizeof v);
    return v;
}

static inline float sum(lanes v) { return (v[0] + v[2]) + (v[1] + v[3]); }

static float clamp(float x, float low, float high)
{
    x = x > low ? x : low; /* NaN: low */
    return x < high ? x : high;
}

static float to_nearest(float x) { return (x + ROUND) - ROUND; }

/* a scale that is not zero, within float16 */
static float bounded(float d)
{
    if (d != 0.0f && fabsf(d) < F16_MIN)
        return d < 0.0f ? -F16_MIN : F16_MIN;
    return clamp(d, -F16_MAX, F16_MAX);
}

/* ---- affine: a q - m ---------------------------------------------------------------------------- */

/* q = (x + m) / a to nearest in 0 .. levels */
static void to_levels(float *restrict q, const float *restrict x, int n, float inverse, float m,
                      float levels)
{
    for (int i = 0; i < n; i += STRIDE)
        for (int j = 0; j < STRIDE; j++)
            q[i + j] = to_nearest(clamp((x[i + j] + m) * inverse, 0.0f, levels));
}

static float error_of(const float *restrict x, const float *restrict q, int n, float a, float m)
{
    lanes error = { 0.0f };
    for (int i = 0; i < n; i += LANES) {
        const lanes e = (a * at(q + i) - m) - at(x + i);
        error += e * e;
    }
    return sum(error);
}

static float power(const float *x, int n)
{
    lanes s = { 0.0f };
    for (int i = 0; i < n; i += LANES)
        s += at(x + i) * at(x + i);
    return sum(s);
}

/* the a and m >= 0 that fit these q best */
static void affine_fit(const float *restrict x, const float *restrict q, int n, float *a, float *m)
{
    lanes sx = { 0.0f }, sq = sx, sqq = sx, sxq = sx;
    for (int i = 0; i < n; i += LANES) {
        const lanes u = at(x + i), v = at(q + i);
        sx += u;
        sq += v;
        sqq += v * v;
        sxq += u * v;
    }
    const float X = sum(sx), Q = sum(sq), QQ = sum(sqq), XQ = sum(sxq), N = (float)n;
    const float determinant = N * QQ - Q * Q;
    if (determinant <= 0.0f)
        return;
    *a = (N * XQ - X * Q) / determinant;
    *m = (*a * Q - X) / N;
    if (*m < 0.0f) {
        *m = 0.0f;
        *a = XQ / QQ;
    }
}

/* the a and m >= 0 whose levels 0 .. levels come closest to x */
static void affine_search(const float *x, int n, float levels, float *a, float *m)
{
    float least, greatest, q[WIDTH];
    kl_range(x, n, &least, &greatest);
    least = least < 0.0f ? least : 0.0f;
    *m = -least;
    *a = (greatest - least) / levels;
    if (!(*a > 0.0f)) {
        *a = 0.0f;
        return;
    }
    to_levels(q, x, n, 1.0f / *a, *m, levels);
    float error = error_of(x, q, n, *a, *m);
    for (int step = -STEPS_BELOW; step <= STEPS_ABOVE; step++) {
        const float inverse = (levels + STEP * (float)step) / (greatest - least);
        float b = 0.0f, p = 0.0f;
        to_levels(q, x, n, inverse, -least, levels);
        affine_fit(x, q, n, &b, &p);
        if (!(b > 0.0f))
            continue;
        to_levels(q, x, n, 1.0f / b, p, levels);
        affine_fit(x, q, n, &b, &p);
        const float e = error_of(x, q, n, b, p);
        if (e < error) {
            error = e;
            *a = b;
            *m = p;
        }
    }
}

/* Scale and minimum of a sub-block: of the integers around a / d and m / dmin, and zeros, those that lose least.
 * Leaves q and returns the error. */
static float affine_choose(const float *x, int n, float levels, float top, float d, float dmin,
                           float a, float m, float *scale, float *min, float *q)
{
    const float s0 = d > 0.0f ? to_nearest(clamp(a / d, 0.0f, top)) : 0.0f;
    const float m0 = dmin > 0.0f ? to_nearest(clamp(m / dmin, 0.0f, top)) : 0.0f;
    float p[WIDTH];
    *scale = *min = 0.0f;
    memset(q, 0, (size_t)n * sizeof *q);
    float best = power(x, n);
    for (float s = s0 - 1.0f; s <= s0 + 1.0f; s += 1.0f)
        for (float t = m0 - 1.0f; t <= m0 + 1.0f; t += 1.0f) {
            if (s < 0.0f || s > top || t < 0.0f || t > top)
                continue;
            to_levels(p, x, n, kl_inverse(d * s), dmin * t, levels);
            const float e = error_of(x, p, n, d * s, dmin * t);
            if (e < best) {
                best = e;
                *scale = s;
                *min = t;
                memcpy(q, p, (size_t)n * sizeof *p);
            }
        }
    return best;
}

/* d and dmin that fit what was chosen: x = d u - dmin t with u = scale q, t = min */
static void affine_refit(const float *x, int width, const float *q, const float *scale,
                         const float *min, float *d, float *dmin)
{
    double uu = 0.0, ut = 0.0, tt = 0.0, xu = 0.0, xt = 0.0;
    for (int i = 0; i < KL_K_VALUES; i++) {
        const double u = (double)(scale[i / width] * q[i]), t = (double)min[i / width];
        uu += u * u;
        ut += u * t;
        tt += t * t;
        xu += (double)x[i] * u;
        xt += (double)x[i] * t;
    }
    const double determinant = uu * tt - ut * ut;
    if (tt == 0.0 && uu > 0.0)
        *d = (float)(xu / uu);
    else if (determinant > 0.0) {
        const double a = (xu * tt - xt * ut) / determinant, m = (xu * ut - xt * uu) / determinant;
        if (a > 0.0 && m > 0.0) {
            *d = (float)a;
            *dmin = (float)m;
        }
    }
}

void kl_search_affine(kl_affine *found, const float *x, int width, int levels, int top)
{
    const int n = KL_K_VALUES / width;
    float best = power(x, KL_K_VALUES);
    memset(found, 0, sizeof *found);
    float a[KL_K_SUB_BLOCKS], m[KL_K_SUB_BLOCKS], largest_a = 0.0f, largest_m = 0.0f;
    float scale[KL_K_SUB_BLOCKS], min[KL_K_SUB_BLOCKS], q[KL_K_VALUES];
    for (int s = 0; s < n; s++) {
        affine_search(x + s * width, width, (float)levels, &a[s], &m[s]);
        largest_a = a[s] > largest_a ? a[s] : largest_a;
        largest_m = m[s] > largest_m ? m[s] : largest_m;
    }
    float d = largest_a / (float)top, dmin = largest_m / (float)top;
    for (int round = 0; round < ROUNDS; round++) {
        const uint16_t d16 = kl_f16_of(bounded(d)), dmin16 = kl_f16_of(bounded(dmin));
        d = kl_f16_at(&d16);
        dmin = kl_f16_at(&dmin16);
        float error = 0.0f;
        for (int s = 0; s < n; s++) {
            const float *sub = x + s * width;
            float *p = q + s * width;
            error += affine_choose(sub, width, (float)levels, (float)top, d, dmin, a[s], m[s],
                                   &scale[s], &min[s], p);
        }
        if (error < best) {
            best = error;
            found->d = d16;
            found->dmin = dmin16;
            for (int s = 0; s < n; s++) {
                found->scale[s] = (uint8_t)scale[s];
                found->min[s] = (uint8_t)min[s];
            }
            for (int i = 0; i < KL_K_VALUES; i++)
                found->q[i] = (uint8_t)q[i];
        }
        affine_refit(x, width, q, scale, min, &d, &dmin);
    }
}

/* ---- signed: a v -------------------------------------------------------------------------------- */

/* v = x / a to the nearest level */
static void to_signed_levels(float *restrict v, const float *restrict x, int n, float inverse,
                             int half)
{
    if (half > 0) {
        const float low = (float)-half, high = (float)(half - 1);
        for (int i = 0; i < n; i += STRIDE)
            for (int j = 0; j < STRIDE; j++)
                v[i + j] = to_nearest(clamp(x[i + j] * inverse, low, high));
        return;
    }
    for (int i = 0; i < n; i++)
        v[i] = (float)kl_iq4_values[0];
    for (int k = 1; k < 16; k++) {
        const float low = (float)kl_iq4_values[k - 1], high = (float)kl_iq4_values[k];
        const float middle = 0.5f * (low + high), step = high - low;
        for (int i = 0; i < n; i += STRIDE)
            for (int j = 0; j < STRIDE; j++)
                v[i + j] += x[i + j] * inverse > middle ? step : 0.0f;
    }
}

/* sums of x v and v v */
static void signed_sums(const float *restrict x, const float *restrict v, int n, float *xv,
                        float *vv)
{
    lanes sxv = { 0.0f }, svv = sxv;
    for (int i = 0; i < n; i += LANES) {
        const lanes u = at(x + i), w = at(v + i);
        sxv += u * w;
        svv += w * w;
    }
    *xv = sum(sxv);
    *vv = sum(svv);
}

/* the a, of either sign, whose levels come closest to x */
static float signed_search(const float *x, int n, int half)
{
    const float extreme = kl_extreme(x, n), lowest = half > 0 ? (float)-half : -127.0f;
    float best = 0.0f, a = 0.0f, v[WIDTH];
    if (extreme == 0.0f)
        return 0.0f;
    const int steps = half > 0 ? SIGNED_STEPS : LEVEL_STEPS;
    const float unit = half > 0 ? SIGNED_STEP : LEVEL_STEP;
    for (int step = -steps; step <= steps; step++) {
        float xv, vv;
        to_signed_levels(v, x, n, (lowest + unit * (float)step) / extreme, half);
        signed_sums(x, v, n, &xv, &vv);
        if (vv > 0.0f && xv * xv > best * vv) { /* the error is sum x^2 - xv^2 / vv */
            best = xv * xv / vv;
            a = xv / vv;
        }
    }
    return a;
}

/* The scale of a sub-block: of the integers around a / d, and zero, the one that loses least. Leaves v and
 * returns the error. */
static float signed_choose(const float *x, int n, kl_signed_format f, float d, float a,
                           float *scale, float *v)
{
    const float low = (float)-f.top, high = (float)(f.top - 1);
    const float s0 = d != 0.0f ? to_nearest(clamp(a / d, low, high)) : 0.0f;
    float p[WIDTH];
    *scale = 0.0f;
    to_signed_levels(v, x, n, 0.0f, f.half);
    float best = power(x, n);
    for (float s = s0 - 1.0f; s <= s0 + 1.0f; s += 1.0f) {
        if (s < low || s > high)
            continue;
        to_signed_levels(p, x, n, kl_inverse(d * s), f.half);
        const float e = error_of(x, p, n, d * s, 0.0f);
        if (e < best) {
            best = e;
            *scale = s;
            memcpy(v, p, (size_t)n * sizeof *p);
        }
    }
    return best;
}

static uint8_t code_of(float v, int half)
{
    if (half > 0)
        return (uint8_t)((int)v + half);
    uint8_t q = 0;
    while (v > (float)kl_iq4_values[q])
        q++;
    return q;
}

void kl_search_signed(kl_signed *found, const float *x, int n, kl_signed_format f)
{
    const int subs = n / f.width;
    float best = power(x, n);
    memset(found, 0, sizeof *found);
    float a[KL_K_SUB_BLOCKS], extreme = 0.0f, scale[KL_K_SUB_BLOCKS], v[KL_K_VALUES];
    for (int s = 0; s < subs; s++) {
        a[s] = signed_search(x + s * f.width, f.width, f.half);
        extreme = fabsf(a[s]) > fabsf(extreme) ? a[s] : extreme;
    }
    float d = f.top > 1 ? extreme / (float)-f.top : extreme;
    for (int round = 0; round < ROUNDS; round++) {
        const uint16_t d16 = kl_f16_of(bounded(d));
        d = kl_f16_at(&d16);
        float error = 0.0f, xu = 0.0f, uu = 0.0f;
        for (int s = 0; s < subs; s++) {
            const float *sub = x + s * f.width;
            float *p = v + s * f.width, xv, vv;
            if (f.top > 1) {
                error += signed_choose(sub, f.width, f, d, a[s], &scale[s], p);
            } else {
                scale[s] = 1.0f;
                to_signed_levels(p, sub, f.width, kl_inverse(d), f.half);
                error += error_of(sub, p, f.width, d, 0.0f);
            }
            signed_sums(sub, p, f.width, &xv, &vv);
            xu += scale[s] * xv;
            uu += scale[s] * scale[s] * vv;
        }
        if (error < best) {
            best = error;
            found->d = d16;
            for (int s = 0; s < subs; s++)
                found->scale[s] = (int8_t)scale[s];
            for (int i = 0; i < n; i++)
                found->q[i] = code_of(v[i], f.half);
        }
        if (uu > 0.0f)
            d = xu / uu;
    }
}
