/* v16: sixteen float32 lanes, the unit in which every kernel body is written. Scalar, AVX2, AVX-512 and
 * NEON do the same IEEE operations in the same order, so their results are the same bytes. A file each has what
 * they do their own way; what is built of it stands here.
 *
 * The including file defines one of KL_SCALAR, KL_AVX2, KL_AVX512, KL_NEON.
 *
 *   load, store     unaligned; the _n forms touch the first n lanes only (0 <= n <= 16; lanes past the
 *                   end read as +0), and never a byte past them
 *   fma(a, b, c)    a * b + c, rounded once
 *   sum             the fixed halving tree: lane l + lane l+8, then +4, +2, +1
 *   max, min        of lanes; the second operand where either is NaN (as x86 has it)
 *   select(m, a, b) a where the mask holds, else b
 *   lanes(m)        bit l: the mask holds in lane l
 *   compress(a, l)  the lanes named by the bits l, first to last; what follows them is undefined
 *   indices(i)      int32 i + lane, to be stored, not computed with
 *   v16d            sixteen lanes of double, to which float lanes are added
 *   load_f16, load_bf16, load_i8   exact widenings
 *   v16i            sixteen lanes of int32, or of two int16 each, the first in the low half
 *   dot(s, a, b)    s + a.low * b.low + a.high * b.high; no sum may overflow
 *   of_int          to float, rounded once
 *   store_low       the low 16 bits of each lane, as int16 */
#ifndef KL_SIMD_H
#define KL_SIMD_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

typedef int32_t __attribute__((may_alias)) v16i_couple; /* two neighbours of a row of int16 */

#if defined(KL_AVX512)
#include "simd_avx512.h"
#elif defined(KL_AVX2)
#include "simd_avx2.h"
#elif defined(KL_NEON)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif

/* ---- the same on every instruction set, from here on ---- */

#if !defined(KL_AVX512)
static inline v16 v16_load_bf16_n(const uint16_t *p, int64_t n)
{
    uint16_t lanes[16] = { 0 };
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return v16_load_bf16(lanes);
}

static inline v16 v16_load_f16_n(const uint16_t *p, int64_t n)
{
    uint16_t lanes[16] = { 0 };
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return v16_load_f16(lanes);
}

static inline v16 v16_compress(v16 a, unsigned lanes)
{
    float from[16], to[16];
    v16_store(from, a);
    v16_store(to, a);
    for (int n = 0; lanes != 0; lanes &= lanes - 1)
        to[n++] = from[__builtin_ctz(lanes)];
    return v16_load(to);
}

static inline v16 v16_indices(int32_t i)
{
    int32_t index[16];
    float as_float[16];
    for (int l = 0; l < 16; l++)
        index[l] = i + l;
    memcpy(as_float, index, sizeof index);
    return v16_load(as_float);
}

/* acc + a . *b, one couple for all lanes; in registers: the compiler would keep one sum of a tile in memory */
static inline v16i v16i_dot_each(v16i acc, v16i a, const v16i_couple *b)
{
    acc = v16i_dot(acc, a, v16i_set1(*b));
#if defined(KL_AVX2)
    __asm__("" : "+x"(acc.lo), "+x"(acc.hi));
#endif
    return acc;
}
#endif

/* v16_sum of each of n */
static inline __attribute__((always_inline)) void v16_sums(float *y, const v16 *a, const int n)
{
    int i = 0;
#if defined(KL_AVX512)
#pragma GCC unroll 16
    for (; i + 4 <= n; i += 4)
        v16_sum4(y + i, a + i);
#endif
#pragma GCC unroll 16
    for (; i < n; i++)
        y[i] = v16_sum(a[i]);
}

/* The sixteen lanes of double, by the tree of v16_sum. */
static inline double v16d_sum(v16d a)
{
    double lane[16];
    memcpy(lane, &a, sizeof lane);
    for (int half = 8; half >= 1; half /= 2)
        for (int l = 0; l < half; l++)
            lane[l] += lane[l + half];
    return lane[0];
}

/* The largest lane; NaN lanes are passed over unless all are. */
static inline float v16_reduce_max(v16 a)
{
    float lane[16];
    v16_store(lane, a);
    for (int half = 8; half >= 1; half /= 2)
        for (int l = 0; l < half; l++)
            lane[l] = lane[l] > lane[l + half] || lane[l + half] != lane[l + half] ? lane[l]
                                                                                   : lane[l + half];
    return lane[0];
}

/* exp(x - n ln2) - 1 for |x - n ln2| <= ln2/2: n ln2 in two parts (Cody and Waite), then the Taylor polynomial to
 * r^7 / 7! (remainder below 2^-27 of exp). */
static inline v16 v16_expm1_rest(v16 x, v16 n)
{
    v16 r = v16_fma(n, v16_set1(-0x1.62e4p-1f), x);
    r = v16_fma(n, v16_set1(-0x1.7f7d1cp-20f), r);
    v16 p = v16_set1(0x1.a01a02p-13f);
    p = v16_fma(p, r, v16_set1(0x1.6c16c2p-10f));
    p = v16_fma(p, r, v16_set1(0x1.111112p-7f));
    p = v16_fma(p, r, v16_set1(0x1.555556p-5f));
    p = v16_fma(p, r, v16_set1(0x1.555556p-3f));
    p = v16_fma(p, r, v16_set1(0.5f));
    return v16_fma(v16_mul(p, r), r, r);
}

static inline v16 v16_exp_rest(v16 x, v16 n)
{
    return v16_add(v16_expm1_rest(x, n), v16_set1(1.0f));
}

/* exp(x), within 1.6 u for every float (u = 2^-24 relative; 1.51 measured over all floats), below 2^-126 within
 * 0.8 of 2^-149; 0 below -104, infinity above 88.8, NaN for NaN. x = n ln2 + r; 2^n in two exact steps. */
static inline v16 v16_exp(v16 x)
{
    const v16 magic = v16_set1(0x1.8p23f);
    const v16 low = v16_set1(-104.0f), high = v16_set1(89.0f);
    v16 c = v16_select(v16_lt(x, low), low, x); /* NaN compares false and goes through */
    c = v16_select(v16_lt(high, c), high, c);
    const v16 n = v16_sub(v16_fma(c, v16_set1(0x1.715476p+0f), magic), magic);
    const v16 p = v16_exp_rest(c, n);
    /* n = half + rest, each within [-126, 127] */
    const v16 half_magic = v16_fma(n, v16_set1(0.5f), magic);
    const v16 half = v16_sub(half_magic, magic);
    const v16 rest_magic = v16_add(v16_sub(n, half), magic);
    return v16_mul(v16_mul(p, v16_exp2_of_magic(half_magic)), v16_exp2_of_magic(rest_magic));
}

/* exp(x) for x <= 0: the bytes of v16_exp from 2^-126 up, 0 below. */
static inline v16 v16_exp_decay(v16 x)
{
    const v16 magic = v16_set1(0x1.8p23f),
              low = v16_set1(-87.33654f); /* the last above ln 2^-126 */
    const v16 c = v16_max(low, x);        /* NaN goes through */
    const v16 n_magic = v16_fma(c, v16_set1(0x1.715476p+0f), magic);
    const v16 p = v16_exp_rest(c, v16_sub(n_magic, magic));
    return v16_select(v16_lt(x, low), v16_zero(), v16_mul(p, v16_exp2_of_magic(n_magic)));
}

/* log(1 + y) for 0 <= y <= 1, within 3.3 u (2.95 measured): 2 atanh(s), s = y / (2 + y) <= 1/3, by its series in s^2 to
 * s^15 / 15 (remainder below 2^-27 relative). NaN for NaN. */
static inline v16 v16_log1p_unit(v16 y)
{
    const v16 s = v16_div(y, v16_add(v16_set1(2.0f), y));
    const v16 s2 = v16_mul(s, s);
    v16 p = v16_set1(2.0f / 15);
    p = v16_fma(p, s2, v16_set1(2.0f / 13));
    p = v16_fma(p, s2, v16_set1(2.0f / 11));
    p = v16_fma(p, s2, v16_set1(2.0f / 9));
    p = v16_fma(p, s2, v16_set1(2.0f / 7));
    p = v16_fma(p, s2, v16_set1(2.0f / 5));
    p = v16_fma(p, s2, v16_set1(2.0f / 3));
    return v16_fma(v16_mul(p, s2), s, v16_add(s, s));
}

/* 1 / (1 + exp(-x)) as e^min(x,0) / (1 + e^-|x|): no overflow, within 4 u (3.04 measured). */
static inline v16 v16_sigmoid(v16 x)
{
    const v16 one = v16_set1(1.0f);
    const v16 e = v16_exp(v16_neg(v16_abs(x)));
    return v16_div(v16_select(v16_lt(x, v16_zero()), e, one), v16_add(one, e));
}

/* tanh(x) as m / (m + 2) of m = exp(2|x|) - 1, with the sign of x: within 4.3 u (3.17 measured) for every float, small
 * and subnormal ones, too; +-1 from 9.02 on, -0 for -0, NaN for NaN. m = 2^n (p + 1) - 1 = 2^n p + (2^n - 1), where
 * nothing cancels. */
static inline v16 v16_tanh(v16 x)
{
    const v16 magic = v16_set1(0x1.8p23f), one = v16_set1(1.0f);
    const v16 a = v16_abs(x);
    const v16 c = v16_min(v16_set1(20.0f), v16_add(a, a)); /* NaN goes through */
    const v16 n_magic = v16_fma(c, v16_set1(0x1.715476p+0f), magic);
    const v16 power = v16_exp2_of_magic(n_magic);
    const v16 p = v16_expm1_rest(c, v16_sub(n_magic, magic));
    const v16 m = v16_fma(power, p, v16_sub(power, one));
    const v16 y = v16_div(m, v16_add(m, v16_set1(2.0f)));
    const v16 of_sign = v16_select(v16_lt(x, v16_zero()), v16_neg(y), y);
    return v16_select(v16_lt(v16_zero(), a), of_sign, x); /* else x is a zero or NaN */
}

/* log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), within 5 u (3.83 measured). */
static inline v16 v16_softplus(v16 x)
{
    const v16 tail = v16_log1p_unit(v16_exp(v16_neg(v16_abs(x))));
    return v16_add(v16_max(v16_zero(), x), tail); /* max hands on x where it is NaN */
}

#endif
