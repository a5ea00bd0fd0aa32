/* v16: sixteen float32 lanes, the unit in which every kernel body is written. Scalar, AVX2 and AVX-512
 * do the same IEEE operations in the same order, so their results are the same bytes.
 *
 * The including file defines one of KL_SCALAR, KL_AVX2, KL_AVX512.
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
 *   load_f16, load_bf16, load_i8   exact widenings */
#ifndef KL_SIMD_H
#define KL_SIMD_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#if defined(KL_AVX512) || defined(KL_AVX2)
#include <immintrin.h>
#endif

#if defined(KL_AVX512)

typedef __m512 v16;
typedef __mmask16 v16_mask;

static inline __mmask16 v16_first(int64_t n) { return (__mmask16)((1u << n) - 1u); }

static inline v16 v16_zero(void) { return _mm512_setzero_ps(); }
static inline v16 v16_set1(float x) { return _mm512_set1_ps(x); }
static inline v16 v16_load(const float *p) { return _mm512_loadu_ps(p); }
static inline v16 v16_load_n(const float *p, int64_t n)
{
    return _mm512_maskz_loadu_ps(v16_first(n), p);
}
static inline void v16_store(float *p, v16 a) { _mm512_storeu_ps(p, a); }
static inline void v16_store_n(float *p, v16 a, int64_t n)
{
    _mm512_mask_storeu_ps(p, v16_first(n), a);
}
static inline v16 v16_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
static inline v16 v16_sub(v16 a, v16 b) { return _mm512_sub_ps(a, b); }
static inline v16 v16_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
static inline v16 v16_div(v16 a, v16 b) { return _mm512_div_ps(a, b); }
static inline v16 v16_fma(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); }
static inline v16 v16_max(v16 a, v16 b) { return _mm512_max_ps(a, b); }
static inline v16 v16_min(v16 a, v16 b) { return _mm512_min_ps(a, b); }
static inline v16 v16_neg(v16 a)
{
    return _mm512_castsi512_ps(
        _mm512_xor_si512(_mm512_castps_si512(a), _mm512_set1_epi32(INT32_MIN)));
}
static inline v16 v16_abs(v16 a)
{
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(INT32_MAX)));
}
static inline v16_mask v16_lt(v16 a, v16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline v16 v16_select(v16_mask m, v16 a, v16 b) { return _mm512_mask_blend_ps(m, b, a); }
static inline unsigned v16_lanes(v16_mask m) { return m; }
static inline v16 v16_compress(v16 a, unsigned lanes)
{
    return _mm512_maskz_compress_ps((__mmask16)lanes, a);
}
static inline v16 v16_indices(int32_t i)
{
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_set1_epi32(i), lane));
}
/* 2^n for n given as the float n + 1.5 * 2^23, -126 <= n <= 127 */
static inline v16 v16_exp2_of_magic(v16 magic)
{
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(magic), 23),
                                                _mm512_set1_epi32(0x3f800000)));
}
static inline float v16_sum(v16 a)
{
    const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}
typedef struct {
    __m512d part[2];
} v16d;
static inline v16d v16d_zero(void)
{
    return (v16d){ { _mm512_setzero_pd(), _mm512_setzero_pd() } };
}
static inline v16d v16d_add(v16d a, v16 b)
{
    a.part[0] = _mm512_add_pd(a.part[0], _mm512_cvtps_pd(_mm512_castps512_ps256(b)));
    a.part[1] = _mm512_add_pd(a.part[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(b, 1)));
    return a;
}
static inline v16 v16_load_i8(const int8_t *p)
{
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}
static inline v16 v16_load_bf16(const uint16_t *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p)), 16));
}
static inline v16 v16_load_bf16_n(const uint16_t *p, int64_t n)
{
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(v16_first(n), p)), 16));
}
static inline v16 v16_load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
static inline v16 v16_load_f16_n(const uint16_t *p, int64_t n)
{
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(v16_first(n), p));
}
/* round to nearest even, overflow to infinity */
static inline void v16_store_f16_n(uint16_t *p, v16 a, int64_t n)
{
    _mm256_mask_storeu_epi16(p, v16_first(n),
                             _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif defined(KL_AVX2)

typedef struct {
    __m256 lo, hi;
} v16;
typedef v16 v16_mask;

static inline __m256i v16_first8(int64_t n)
{
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lanes);
}

static inline v16 v16_zero(void) { return (v16){ _mm256_setzero_ps(), _mm256_setzero_ps() }; }
static inline v16 v16_set1(float x) { return (v16){ _mm256_set1_ps(x), _mm256_set1_ps(x) }; }
static inline v16 v16_load(const float *p)
{
    return (v16){ _mm256_loadu_ps(p), _mm256_loadu_ps(p + 8) };
}
static inline v16 v16_load_n(const float *p, int64_t n)
{
    if (n <= 8)
        return (v16){ _mm256_maskload_ps(p, v16_first8(n)), _mm256_setzero_ps() };
    return (v16){ _mm256_loadu_ps(p), _mm256_maskload_ps(p + 8, v16_first8(n - 8)) };
}
static inline void v16_store(float *p, v16 a)
{
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
static inline void v16_store_n(float *p, v16 a, int64_t n)
{
    if (n <= 8) {
        _mm256_maskstore_ps(p, v16_first8(n), a.lo);
    } else {
        _mm256_storeu_ps(p, a.lo);
        _mm256_maskstore_ps(p + 8, v16_first8(n - 8), a.hi);
    }
}
#define V16_BINARY(name, op)                                                                       \
    static inline v16 v16_##name(v16 a, v16 b) { return (v16){ op(a.lo, b.lo), op(a.hi, b.hi) }; }
V16_BINARY(add, _mm256_add_ps)
V16_BINARY(sub, _mm256_sub_ps)
V16_BINARY(mul, _mm256_mul_ps)
V16_BINARY(div, _mm256_div_ps)
V16_BINARY(max, _mm256_max_ps)
V16_BINARY(min, _mm256_min_ps)
#undef V16_BINARY
static inline v16 v16_fma(v16 a, v16 b, v16 c)
{
    return (v16){ _mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi) };
}
static inline v16 v16_neg(v16 a)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return (v16){ _mm256_xor_ps(a.lo, sign), _mm256_xor_ps(a.hi, sign) };
}
static inline v16 v16_abs(v16 a)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return (v16){ _mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi) };
}
static inline v16_mask v16_lt(v16 a, v16 b)
{
    return (v16){ _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ) };
}
static inline v16 v16_select(v16_mask m, v16 a, v16 b)
{
    return (v16){ _mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi) };
}
static inline unsigned v16_lanes(v16_mask m)
{
    return (unsigned)_mm256_movemask_ps(m.lo) | (unsigned)_mm256_movemask_ps(m.hi) << 8;
}
static inline __m256 v16_exp2_of_magic8(__m256 magic)
{
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(magic), 23),
                                                _mm256_set1_epi32(0x3f800000)));
}
static inline v16 v16_exp2_of_magic(v16 magic)
{
    return (v16){ v16_exp2_of_magic8(magic.lo), v16_exp2_of_magic8(magic.hi) };
}
static inline float v16_sum(v16 a)
{
    const __m256 b = _mm256_add_ps(a.lo, a.hi);
    const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}
typedef struct {
    __m256d part[4];
} v16d;
static inline v16d v16d_zero(void)
{
    const __m256d zero = _mm256_setzero_pd();
    return (v16d){ { zero, zero, zero, zero } };
}
static inline v16d v16d_add(v16d a, v16 b)
{
    a.part[0] = _mm256_add_pd(a.part[0], _mm256_cvtps_pd(_mm256_castps256_ps128(b.lo)));
    a.part[1] = _mm256_add_pd(a.part[1], _mm256_cvtps_pd(_mm256_extractf128_ps(b.lo, 1)));
    a.part[2] = _mm256_add_pd(a.part[2], _mm256_cvtps_pd(_mm256_castps256_ps128(b.hi)));
    a.part[3] = _mm256_add_pd(a.part[3], _mm256_cvtps_pd(_mm256_extractf128_ps(b.hi, 1)));
    return a;
}
static inline v16 v16_load_i8(const int8_t *p)
{
    const __m128i q = _mm_loadu_si128((const __m128i *)(const void *)p);
    return (v16){ _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)),
                  _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(q, 8))) };
}
static inline v16 v16_of_bf16(__m128i lo, __m128i hi)
{
    return (v16){ _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(lo), 16)),
                  _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(hi), 16)) };
}
static inline v16 v16_of_f16(__m128i lo, __m128i hi)
{
    return (v16){ _mm256_cvtph_ps(lo), _mm256_cvtph_ps(hi) };
}
#define V16_HALVES(name)                                                                           \
    static inline v16 v16_load_##name(const uint16_t *p)                                           \
    {                                                                                              \
        return v16_of_##name(_mm_loadu_si128((const __m128i *)(const void *)p),                    \
                             _mm_loadu_si128((const __m128i *)(const void *)(p + 8)));             \
    }                                                                                              \
    static inline v16 v16_load_##name##_n(const uint16_t *p, int64_t n)                            \
    {                                                                                              \
        uint16_t lanes[16] = { 0 };                                                                \
        memcpy(lanes, p, (size_t)n * sizeof *p);                                                   \
        return v16_load_##name(lanes);                                                             \
    }
V16_HALVES(bf16)
V16_HALVES(f16)
#undef V16_HALVES
static inline void v16_store_f16_n(uint16_t *p, v16 a, int64_t n)
{
    uint16_t lanes[16];
    _mm_storeu_si128((__m128i *)(void *)lanes,
                     _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128((__m128i *)(void *)(lanes + 8),
                     _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    memcpy(p, lanes, (size_t)n * sizeof *p);
}

#else /* scalar: the oracle of the two above */

typedef struct {
    float lane[16];
} v16;
typedef struct {
    bool lane[16];
} v16_mask;

#define V16_EACH(expression)                                                                       \
    v16 r;                                                                                         \
    for (int l = 0; l < 16; l++)                                                                   \
        r.lane[l] = (expression);                                                                  \
    return r
static inline float v16_float_of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static inline uint32_t v16_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static inline v16 v16_zero(void) { V16_EACH(0.0f); }
static inline v16 v16_set1(float x) { V16_EACH(x); }
static inline v16 v16_load(const float *p) { V16_EACH(p[l]); }
static inline v16 v16_load_n(const float *p, int64_t n) { V16_EACH(l < n ? p[l] : 0.0f); }
static inline void v16_store(float *p, v16 a) { memcpy(p, a.lane, sizeof a.lane); }
static inline void v16_store_n(float *p, v16 a, int64_t n)
{
    memcpy(p, a.lane, (size_t)n * sizeof *p);
}
static inline v16 v16_add(v16 a, v16 b) { V16_EACH(a.lane[l] + b.lane[l]); }
static inline v16 v16_sub(v16 a, v16 b) { V16_EACH(a.lane[l] - b.lane[l]); }
static inline v16 v16_mul(v16 a, v16 b) { V16_EACH(a.lane[l] * b.lane[l]); }
static inline v16 v16_div(v16 a, v16 b) { V16_EACH(a.lane[l] / b.lane[l]); }
static inline v16 v16_fma(v16 a, v16 b, v16 c) { V16_EACH(fmaf(a.lane[l], b.lane[l], c.lane[l])); }
static inline v16 v16_max(v16 a, v16 b) { V16_EACH(a.lane[l] > b.lane[l] ? a.lane[l] : b.lane[l]); }
static inline v16 v16_min(v16 a, v16 b) { V16_EACH(a.lane[l] < b.lane[l] ? a.lane[l] : b.lane[l]); }
static inline v16 v16_neg(v16 a) { V16_EACH(v16_float_of_bits(v16_bits(a.lane[l]) ^ 0x80000000u)); }
static inline v16 v16_abs(v16 a) { V16_EACH(v16_float_of_bits(v16_bits(a.lane[l]) & 0x7fffffffu)); }
static inline v16_mask v16_lt(v16 a, v16 b)
{
    v16_mask r;
    for (int l = 0; l < 16; l++)
        r.lane[l] = a.lane[l] < b.lane[l];
    return r;
}
static inline v16 v16_select(v16_mask m, v16 a, v16 b)
{
    V16_EACH(m.lane[l] ? a.lane[l] : b.lane[l]);
}
static inline unsigned v16_lanes(v16_mask m)
{
    unsigned bits = 0;
    for (int l = 0; l < 16; l++)
        bits |= (unsigned)m.lane[l] << l;
    return bits;
}
static inline v16 v16_exp2_of_magic(v16 magic)
{
    V16_EACH(v16_float_of_bits((v16_bits(magic.lane[l]) << 23) + 0x3f800000u));
}
static inline float v16_sum(v16 a)
{
    for (int half = 8; half >= 1; half /= 2)
        for (int l = 0; l < half; l++)
            a.lane[l] = a.lane[l] + a.lane[l + half];
    return a.lane[0];
}
typedef struct {
    double part[16];
} v16d;
static inline v16d v16d_zero(void) { return (v16d){ { 0.0 } }; }
static inline v16d v16d_add(v16d a, v16 b)
{
    for (int l = 0; l < 16; l++)
        a.part[l] = a.part[l] + (double)b.lane[l];
    return a;
}
static inline float v16_of_f16(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u,
                   fraction = h & 0x3ffu;
    if (exponent == 31) /* infinity; NaN, made quiet */
        return v16_float_of_bits(sign | 0x7f800000u | fraction << 13
                                 | (fraction != 0 ? 0x400000u : 0u));
    if (exponent != 0)
        return v16_float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
    const float magnitude = (float)fraction * 0x1p-24f; /* zero or subnormal: exact */
    return sign != 0 ? -magnitude : magnitude;
}
static inline uint16_t v16_to_f16(float x)
{
    const uint32_t bits = v16_bits(x), sign = (bits >> 16) & 0x8000u,
                   magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    if (magnitude >= 0x477ff000u) /* 65520 and above */
        return (uint16_t)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {                           /* below 2^-14: a multiple of 2^-24 */
        const float m = v16_float_of_bits(magnitude) + 0.5f; /* rounds to nearest even at 2^-24 */
        return (uint16_t)(sign | (v16_bits(m) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}
static inline v16 v16_load_i8(const int8_t *p) { V16_EACH((float)p[l]); }
static inline v16 v16_load_bf16(const uint16_t *p)
{
    V16_EACH(v16_float_of_bits((uint32_t)p[l] << 16));
}
static inline v16 v16_load_bf16_n(const uint16_t *p, int64_t n)
{
    V16_EACH(l < n ? v16_float_of_bits((uint32_t)p[l] << 16) : 0.0f);
}
static inline v16 v16_load_f16(const uint16_t *p) { V16_EACH(v16_of_f16(p[l])); }
static inline v16 v16_load_f16_n(const uint16_t *p, int64_t n)
{
    V16_EACH(l < n ? v16_of_f16(p[l]) : 0.0f);
}
static inline void v16_store_f16_n(uint16_t *p, v16 a, int64_t n)
{
    for (int64_t l = 0; l < n; l++)
        p[l] = v16_to_f16(a.lane[l]);
}
#undef V16_EACH

#endif

/* ---- the same on every instruction set, from here on ---- */

#if !defined(KL_AVX512)
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
#endif

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

/* exp(x - n ln2) for |x - n ln2| <= ln2/2: n ln2 in two parts (Cody and Waite), then the Taylor polynomial to
 * r^7 / 7! (remainder below 2^-27 relative). */
static inline v16 v16_exp_rest(v16 x, v16 n)
{
    v16 r = v16_fma(n, v16_set1(-0x1.62e4p-1f), x);
    r = v16_fma(n, v16_set1(-0x1.7f7d1cp-20f), r);
    v16 p = v16_set1(0x1.a01a02p-13f);
    p = v16_fma(p, r, v16_set1(0x1.6c16c2p-10f));
    p = v16_fma(p, r, v16_set1(0x1.111112p-7f));
    p = v16_fma(p, r, v16_set1(0x1.555556p-5f));
    p = v16_fma(p, r, v16_set1(0x1.555556p-3f));
    p = v16_fma(p, r, v16_set1(0.5f));
    p = v16_fma(v16_mul(p, r), r, r);
    return v16_add(p, v16_set1(1.0f));
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

/* log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), within 5 u (3.83 measured). */
static inline v16 v16_softplus(v16 x)
{
    const v16 tail = v16_log1p_unit(v16_exp(v16_neg(v16_abs(x))));
    return v16_add(v16_max(v16_zero(), x), tail); /* max hands on x where it is NaN */
}

#endif
