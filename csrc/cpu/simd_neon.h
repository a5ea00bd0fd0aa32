/* v16 (simd.h) in four registers of NEON. */
#ifndef KL_SIMD_NEON_H
#define KL_SIMD_NEON_H

#include <arm_neon.h>

typedef struct {
    float32x4_t q[4];
} v16;
typedef struct {
    uint32x4_t q[4];
} v16_mask;

/* lanes at .. at + 3 of n, which may end before them */
static inline float32x4_t v16_quarter_n(const float *p, int64_t at, int64_t n)
{
    float32x4_t a = vdupq_n_f32(0.0f);
    if (at + 4 <= n)
        return vld1q_f32(p + at);
    if (at < n)
        a = vld1q_lane_f32(p + at, a, 0);
    if (at + 1 < n)
        a = vld1q_lane_f32(p + at + 1, a, 1);
    if (at + 2 < n)
        a = vld1q_lane_f32(p + at + 2, a, 2);
    return a;
}
static inline void v16_store_quarter_n(float *p, float32x4_t a, int64_t at, int64_t n)
{
    if (at + 4 <= n) {
        vst1q_f32(p + at, a);
        return;
    }
    if (at < n)
        vst1q_lane_f32(p + at, a, 0);
    if (at + 1 < n)
        vst1q_lane_f32(p + at + 1, a, 1);
    if (at + 2 < n)
        vst1q_lane_f32(p + at + 2, a, 2);
}

static inline v16 v16_set1(float x)
{
    const float32x4_t a = vdupq_n_f32(x);
    return (v16){ { a, a, a, a } };
}
static inline v16 v16_zero(void) { return v16_set1(0.0f); }
static inline v16 v16_load(const float *p)
{
    return (v16){ { vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12) } };
}
static inline v16 v16_load_n(const float *p, int64_t n)
{
    return (v16){ { v16_quarter_n(p, 0, n), v16_quarter_n(p, 4, n), v16_quarter_n(p, 8, n),
                    v16_quarter_n(p, 12, n) } };
}
static inline void v16_store(float *p, v16 a)
{
    vst1q_f32(p, a.q[0]);
    vst1q_f32(p + 4, a.q[1]);
    vst1q_f32(p + 8, a.q[2]);
    vst1q_f32(p + 12, a.q[3]);
}
static inline void v16_store_n(float *p, v16 a, int64_t n)
{
    v16_store_quarter_n(p, a.q[0], 0, n);
    v16_store_quarter_n(p, a.q[1], 4, n);
    v16_store_quarter_n(p, a.q[2], 8, n);
    v16_store_quarter_n(p, a.q[3], 12, n);
}
#define V16_BINARY(name, op)                                                                       \
    static inline v16 v16_##name(v16 a, v16 b)                                                     \
    {                                                                                              \
        return (v16){ { op(a.q[0], b.q[0]), op(a.q[1], b.q[1]), op(a.q[2], b.q[2]),                \
                        op(a.q[3], b.q[3]) } };                                                    \
    }
/* not vmaxq, vminq: of NaN they make NaN, whichever operand it is */
#define V16_MAX(a, b) vbslq_f32(vcgtq_f32(a, b), a, b)
#define V16_MIN(a, b) vbslq_f32(vcltq_f32(a, b), a, b)
V16_BINARY(add, vaddq_f32)
V16_BINARY(sub, vsubq_f32)
V16_BINARY(mul, vmulq_f32)
V16_BINARY(div, vdivq_f32)
V16_BINARY(max, V16_MAX)
V16_BINARY(min, V16_MIN)
#undef V16_BINARY
#undef V16_MAX
#undef V16_MIN
static inline v16 v16_fma(v16 a, v16 b, v16 c)
{
    return (v16){ { vfmaq_f32(c.q[0], a.q[0], b.q[0]), vfmaq_f32(c.q[1], a.q[1], b.q[1]),
                    vfmaq_f32(c.q[2], a.q[2], b.q[2]), vfmaq_f32(c.q[3], a.q[3], b.q[3]) } };
}
/* of the bits of each lane */
#define V16_BITS(name, op)                                                                         \
    static inline float32x4_t v16_quarter_##name(float32x4_t a)                                    \
    {                                                                                              \
        const uint32x4_t bits = vreinterpretq_u32_f32(a);                                          \
        return vreinterpretq_f32_u32(op);                                                          \
    }                                                                                              \
    static inline v16 v16_##name(v16 a)                                                            \
    {                                                                                              \
        return (v16){ { v16_quarter_##name(a.q[0]), v16_quarter_##name(a.q[1]),                    \
                        v16_quarter_##name(a.q[2]), v16_quarter_##name(a.q[3]) } };                \
    }
V16_BITS(neg, veorq_u32(bits, vdupq_n_u32(0x80000000u)))
V16_BITS(abs, vandq_u32(bits, vdupq_n_u32(0x7fffffffu)))
V16_BITS(exp2_of_magic, vaddq_u32(vshlq_n_u32(bits, 23), vdupq_n_u32(0x3f800000u)))
#undef V16_BITS
static inline v16_mask v16_lt(v16 a, v16 b)
{
    return (v16_mask){ { vcltq_f32(a.q[0], b.q[0]), vcltq_f32(a.q[1], b.q[1]),
                         vcltq_f32(a.q[2], b.q[2]), vcltq_f32(a.q[3], b.q[3]) } };
}
static inline v16 v16_select(v16_mask m, v16 a, v16 b)
{
    return (v16){ { vbslq_f32(m.q[0], a.q[0], b.q[0]), vbslq_f32(m.q[1], a.q[1], b.q[1]),
                    vbslq_f32(m.q[2], a.q[2], b.q[2]), vbslq_f32(m.q[3], a.q[3], b.q[3]) } };
}
static inline unsigned v16_lanes(v16_mask m)
{
    const uint8x8_t bit = vcreate_u8(0x8040201008040201u);
    const uint8x8_t lo = vmovn_u16(vcombine_u16(vmovn_u32(m.q[0]), vmovn_u32(m.q[1])));
    const uint8x8_t hi = vmovn_u16(vcombine_u16(vmovn_u32(m.q[2]), vmovn_u32(m.q[3])));
    return vaddv_u8(vand_u8(lo, bit)) | (unsigned)vaddv_u8(vand_u8(hi, bit)) << 8;
}
static inline float v16_sum(v16 a)
{
    const float32x4_t b = vaddq_f32(vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3]));
    return vpadds_f32(vadd_f32(vget_low_f32(b), vget_high_f32(b)));
}
typedef struct {
    float64x2_t part[8];
} v16d;
static inline v16d v16d_zero(void)
{
    const float64x2_t zero = vdupq_n_f64(0.0);
    return (v16d){ { zero, zero, zero, zero, zero, zero, zero, zero } };
}
static inline v16d v16d_add(v16d a, v16 b)
{
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        a.part[2 * i] = vaddq_f64(a.part[2 * i], vcvt_f64_f32(vget_low_f32(b.q[i])));
        a.part[2 * i + 1] = vaddq_f64(a.part[2 * i + 1], vcvt_high_f64_f32(b.q[i]));
    }
    return a;
}
static inline v16 v16_load_i8(const int8_t *p)
{
    const int8x16_t v = vld1q_s8(p);
    const int16x8_t lo = vmovl_s8(vget_low_s8(v)), hi = vmovl_high_s8(v);
    return (v16){ { vcvtq_f32_s32(vmovl_s16(vget_low_s16(lo))), vcvtq_f32_s32(vmovl_high_s16(lo)),
                    vcvtq_f32_s32(vmovl_s16(vget_low_s16(hi))),
                    vcvtq_f32_s32(vmovl_high_s16(hi)) } };
}
static inline v16 v16_load_bf16(const uint16_t *p)
{
    const uint16x8_t lo = vld1q_u16(p), hi = vld1q_u16(p + 8);
    return (v16){ { vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(lo), 16)),
                    vreinterpretq_f32_u32(vshll_high_n_u16(lo, 16)),
                    vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(hi), 16)),
                    vreinterpretq_f32_u32(vshll_high_n_u16(hi, 16)) } };
}
static inline v16 v16_load_f16(const uint16_t *p)
{
    const float16x8_t lo = vreinterpretq_f16_u16(vld1q_u16(p)),
                      hi = vreinterpretq_f16_u16(vld1q_u16(p + 8));
    return (v16){ { vcvt_f32_f16(vget_low_f16(lo)), vcvt_high_f32_f16(lo),
                    vcvt_f32_f16(vget_low_f16(hi)), vcvt_high_f32_f16(hi) } };
}
/* FPCR as fpenv.h sets it: round to nearest even, overflow to infinity */
static inline void v16_store_f16_n(uint16_t *p, v16 a, int64_t n)
{
    uint16_t lanes[16];
    const float16x8_t lo = vcvt_high_f16_f32(vcvt_f16_f32(a.q[0]), a.q[1]);
    const float16x8_t hi = vcvt_high_f16_f32(vcvt_f16_f32(a.q[2]), a.q[3]);
    vst1q_u16(lanes, vreinterpretq_u16_f16(lo));
    vst1q_u16(lanes + 8, vreinterpretq_u16_f16(hi));
    memcpy(p, lanes, (size_t)n * sizeof *p);
}

typedef struct {
    int32x4_t q[4];
} v16i;
static inline v16i v16i_set1(int32_t x)
{
    const int32x4_t all = vdupq_n_s32(x);
    return (v16i){ { all, all, all, all } };
}
static inline v16i v16i_zero(void) { return v16i_set1(0); }
static inline v16i v16i_load(const int32_t *p)
{
    return (v16i){ { vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12) } };
}
static inline v16i v16i_dot(v16i acc, v16i a, v16i b)
{
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const int16x8_t x = vreinterpretq_s16_s32(a.q[i]), y = vreinterpretq_s16_s32(b.q[i]);
        const int32x4_t first = vmull_s16(vget_low_s16(x), vget_low_s16(y));
        acc.q[i] = vaddq_s32(acc.q[i], vpaddq_s32(first, vmull_high_s16(x, y)));
    }
    return acc;
}
static inline v16 v16_of_int(v16i a)
{
    return (v16){ { vcvtq_f32_s32(a.q[0]), vcvtq_f32_s32(a.q[1]), vcvtq_f32_s32(a.q[2]),
                    vcvtq_f32_s32(a.q[3]) } };
}
static inline void v16_store_low(int16_t *p, v16 a)
{
    int32x4_t bits[4];
    for (int i = 0; i < 4; i++)
        bits[i] = vreinterpretq_s32_f32(a.q[i]);
    vst1q_s16(p, vmovn_high_s32(vmovn_s32(bits[0]), bits[1]));
    vst1q_s16(p + 8, vmovn_high_s32(vmovn_s32(bits[2]), bits[3]));
}

#endif
