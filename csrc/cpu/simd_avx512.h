/* v16 (simd.h) in one register of AVX-512. */
#ifndef KL_SIMD_AVX512_H
#define KL_SIMD_AVX512_H

#include <immintrin.h>

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
/* v16_sum of four, by the same tree */
static inline void v16_sum4(float *y, const v16 *a)
{
    const v16 low = _mm512_add_ps(_mm512_shuffle_f32x4(a[0], a[1], 0x44),
                                  _mm512_shuffle_f32x4(a[0], a[1], 0xEE));
    const v16 high = _mm512_add_ps(_mm512_shuffle_f32x4(a[2], a[3], 0x44),
                                   _mm512_shuffle_f32x4(a[2], a[3], 0xEE));
    const v16 c =
        _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD));
    const v16 d = _mm512_add_ps(c, _mm512_permute_ps(c, 0xEE));
    const v16 sums = _mm512_add_ps(d, _mm512_permute_ps(d, 0x55));
    const __m512i first = _mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12));
    _mm_storeu_ps(y, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, sums)));
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

typedef __m512i v16i;
static inline v16i v16i_zero(void) { return _mm512_setzero_si512(); }
static inline v16i v16i_load(const int32_t *p) { return _mm512_loadu_si512(p); }
/* acc + a . *b, one couple for all lanes. As the instruction it is: of the intrinsics in a tile of 16 gcc 12 makes two
 * moves and half a reload of a sum each. */
static inline v16i v16i_dot_each(v16i acc, v16i a, const v16i_couple *b)
{
    __asm__("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(a), "m"(*b));
    return acc;
}
static inline v16 v16_of_int(v16i a) { return _mm512_cvtepi32_ps(a); }
static inline void v16_store_low(int16_t *p, v16 a)
{
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16(_mm512_castps_si512(a)));
}

#endif
