/* v16 (simd.h) in an array: plain C, the oracle of the others. */
#ifndef KL_SIMD_SCALAR_H
#define KL_SIMD_SCALAR_H

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
static inline v16 v16_load_f16(const uint16_t *p) { V16_EACH(v16_of_f16(p[l])); }
static inline void v16_store_f16_n(uint16_t *p, v16 a, int64_t n)
{
    for (int64_t l = 0; l < n; l++)
        p[l] = v16_to_f16(a.lane[l]);
}

typedef struct {
    int32_t lane[16];
} v16i;
static inline v16i v16i_zero(void) { return (v16i){ { 0 } }; }
static inline v16i v16i_load(const int32_t *p)
{
    v16i r;
    memcpy(r.lane, p, sizeof r.lane);
    return r;
}
static inline v16i v16i_set1(int32_t x)
{
    v16i r;
    for (int l = 0; l < 16; l++)
        r.lane[l] = x;
    return r;
}
static inline int32_t v16i_half(int32_t x, int at) { return (int16_t)((uint32_t)x >> (16 * at)); }
static inline v16i v16i_dot(v16i acc, v16i a, v16i b)
{
    for (int l = 0; l < 16; l++)
        acc.lane[l] += v16i_half(a.lane[l], 0) * v16i_half(b.lane[l], 0)
                       + v16i_half(a.lane[l], 1) * v16i_half(b.lane[l], 1);
    return acc;
}
static inline v16 v16_of_int(v16i a) { V16_EACH((float)a.lane[l]); }
static inline void v16_store_low(int16_t *p, v16 a)
{
    for (int l = 0; l < 16; l++)
        p[l] = (int16_t)v16_bits(a.lane[l]);
}
#undef V16_EACH

#endif
