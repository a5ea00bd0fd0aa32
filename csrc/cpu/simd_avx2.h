/* v16 (simd.h) in two registers of AVX2, with FMA and F16C. */
#ifndef KL_SIMD_AVX2_H
#define KL_SIMD_AVX2_H

#include <immintrin.h>

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
static inline v16 v16_load_bf16(const uint16_t *p)
{
    const __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
    const __m256i hi =
        _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(p + 8)));
    return (v16){ _mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
                  _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16)) };
}
static inline v16 v16_load_f16(const uint16_t *p)
{
    return (v16){ _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p)),
                  _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(p + 8))) };
}
static inline void v16_store_f16_n(uint16_t *p, v16 a, int64_t n)
{
    uint16_t lanes[16];
    _mm_storeu_si128((__m128i *)(void *)lanes,
                     _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128((__m128i *)(void *)(lanes + 8),
                     _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    memcpy(p, lanes, (size_t)n * sizeof *p);
}

typedef struct {
    __m256i lo, hi;
} v16i;
static inline v16i v16i_zero(void)
{
    return (v16i){ _mm256_setzero_si256(), _mm256_setzero_si256() };
}
static inline v16i v16i_load(const int32_t *p)
{
    return (v16i){ _mm256_loadu_si256((const __m256i *)(const void *)p),
                   _mm256_loadu_si256((const __m256i *)(const void *)(p + 8)) };
}
static inline v16i v16i_set1(int32_t x)
{
    return (v16i){ _mm256_set1_epi32(x), _mm256_set1_epi32(x) };
}
static inline v16i v16i_dot(v16i acc, v16i a, v16i b)
{
#if defined(KL_AVXVNNI)
    return (v16i){ _mm256_dpwssd_epi32(acc.lo, a.lo, b.lo),
                   _mm256_dpwssd_epi32(acc.hi, a.hi, b.hi) };
#else
    return (v16i){ _mm256_add_epi32(acc.lo, _mm256_madd_epi16(a.lo, b.lo)),
                   _mm256_add_epi32(acc.hi, _mm256_madd_epi16(a.hi, b.hi)) };
#endif
}
static inline v16 v16_of_int(v16i a)
{
    return (v16){ _mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi) };
}
static inline void v16_store_low(int16_t *p, v16 a)
{
    const __m256i low =
        _mm256_set1_epi32(0xffff); /* the pack saturates: nothing above 16 bits may reach it */
    const __m256i packed = _mm256_packus_epi32(_mm256_and_si256(_mm256_castps_si256(a.lo), low),
                                               _mm256_and_si256(_mm256_castps_si256(a.hi), low));
    _mm256_storeu_si256((__m256i *)(void *)p, _mm256_permute4x64_epi64(packed, 0xd8));
}

#endif
