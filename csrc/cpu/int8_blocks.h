/* Block types as the int8 products see them: integers, and what they are to be multiplied with. This is the
 * definition; the tuned kernels load the same integers some other way. */
#ifndef KL_INT8_BLOCKS_H
#define KL_INT8_BLOCKS_H

#include "../quant/fp4.h"
#include "../quant/iq4.h"
#include "../quant/quant.h"
#include "int8.h"

/* 256 weights of a row. Without `fine`: w = scale[b] * q - min[b] for block b of 32. With it: of each 16
 * values i, w = d * sub[i] * q - dmin * sub_min[i]. */
typedef struct int8_weights {
    int8_t q[256];
    float scale[8], min[8];
    int sub[16], sub_min[16];
    float d, dmin;
    bool fine;
} int8_weights;

/* types whose 16 values have an integer scale of their own */
static inline bool int8_is_fine(kl_type t) { return t == KL_Q2_K || t == KL_Q3_K || t == KL_Q6_K; }

/* scales and mins of Q4_K and Q5_K: 16 numbers of 6 bits in 12 bytes */
static inline void int8_six_bits(uint8_t sc[8], uint8_t m[8], const uint8_t *p)
{
    for (int j = 0; j < 4; j++) {
        sc[j] = p[j] & 63;
        m[j] = p[j + 4] & 63;
        sc[j + 4] = (uint8_t)((p[j + 8] & 15) | p[j] >> 6 << 4);
        m[j + 4] = (uint8_t)(p[j + 8] >> 4 | p[j + 4] >> 6 << 4);
    }
}

static inline void int8_scales_k4(int8_weights *w, const uint8_t *p)
{
    const float d = kl_f16_at(p), dmin = kl_f16_at(p + 2);
    uint8_t sc[8], m[8];
    int8_six_bits(sc, m, p + 4);
    for (int b = 0; b < 8; b++) {
        w->scale[b] = d * (float)sc[b];
        w->min[b] = dmin * (float)m[b];
    }
}

static inline void int8_values_k4(int8_t *q, const uint8_t *p, bool five)
{
    const uint8_t *high = p + 16, *low = p + (five ? 48 : 16);
    for (int b = 0; b < 8; b++)
        for (int l = 0; l < 32; l++) {
            const int four = low[b / 2 * 32 + l] >> (b % 2 * 4) & 15;
            q[32 * b + l] = (int8_t)(four | (five ? (high[l] >> b & 1) << 4 : 0));
        }
}

static inline void int8_scales_q2_k(int8_weights *w, const uint8_t *p)
{
    w->d = kl_f16_at(p + 80);
    w->dmin = kl_f16_at(p + 82);
    for (int i = 0; i < 16; i++) {
        w->sub[i] = p[i] & 15;
        w->sub_min[i] = p[i] >> 4;
    }
}

static inline void int8_values_q2_k(int8_t *q, const uint8_t *p)
{
    for (int b = 0; b < 8; b++)
        for (int l = 0; l < 32; l++)
            q[32 * b + l] = (int8_t)(p[16 + b / 4 * 32 + l] >> (b % 4 * 2) & 3);
}

static inline void int8_scales_q3_k(int8_weights *w, const uint8_t *p)
{
    const uint8_t *s = p + 96;
    w->d = kl_f16_at(p + 108);
    for (int i = 0; i < 16; i++) {
        const int low = s[i % 8] >> (i / 8 * 4) & 15, high = s[8 + i % 4] >> (i / 4 * 2) & 3;
        w->sub[i] = (low | high << 4) - 32;
    }
}

static inline void int8_values_q3_k(int8_t *q, const uint8_t *p)
{
    for (int b = 0; b < 8; b++)
        for (int l = 0; l < 32; l++) {
            const int low = p[32 + b / 4 * 32 + l] >> (b % 4 * 2) & 3;
            q[32 * b + l] = (int8_t)(low - ((p[l] >> b & 1) != 0 ? 0 : 4));
        }
}

static inline void int8_scales_q6_k(int8_weights *w, const uint8_t *p)
{
    w->d = kl_f16_at(p + 208);
    for (int i = 0; i < 16; i++)
        w->sub[i] = (int8_t)p[192 + i];
}

static inline void int8_values_q6_k(int8_t *q, const uint8_t *p)
{
    for (int b = 0; b < 8; b++)
        for (int l = 0; l < 32; l++) {
            const int low = p[b / 4 * 64 + b % 2 * 32 + l] >> (b % 4 / 2 * 4) & 15;
            const int high = p[128 + b / 4 * 32 + l] >> (b % 4 * 2) & 3;
            q[32 * b + l] = (int8_t)((low | high << 4) - 32);
        }
}

static inline void int8_scales_iq4_xs(int8_weights *w, const uint8_t *p)
{
    const float d = kl_f16_at(p);
    const int high = p[2] | p[3] << 8;
    for (int b = 0; b < 8; b++) {
        const int scale = (p[4 + b / 2] >> (b % 2 * 4) & 15) | (high >> (2 * b) & 3) << 4;
        w->scale[b] = d * (float)(scale - 32);
    }
}

static inline void int8_values_iq4_xs(int8_t *q, const uint8_t *p)
{
    for (int b = 0; b < 8; b++)
        for (int l = 0; l < 32; l++)
            q[32 * b + l] = kl_iq4_values[p[8 + 16 * b + l % 16] >> (l / 16 * 4) & 15];
}

/* 2^(e - 127), halved because kl_fp4_values is doubled */
static inline float int8_e8m0_half(uint8_t e)
{
    const uint32_t bits = e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* blocks of 32 that share a block of the type, with its scale; of types whose blocks are below 256 */
static inline int int8_sharing(kl_type t) { return t == KL_Q1_0 ? 4 : t == KL_Q2_0 ? 2 : 1; }

/* where the block of the type begins that block b of 32 is in */
static inline const uint8_t *int8_around(const uint8_t *p, kl_type type, int b)
{
    const int sharing = int8_sharing(type);
    return p + (size_t)(b / sharing) * kl_type_bytes(type, 32 * sharing);
}

/* of one block of 32 */
static inline float int8_scale_32(const uint8_t *p, kl_type type)
{
    return type == KL_MXFP4 ? int8_e8m0_half(p[0]) : kl_f16_at(p);
}

/* the nth 32 values, from 0, of the type's block at p */
static inline void int8_values_32(int8_t *q, const uint8_t *p, kl_type type, int nth)
{
    for (int l = 0; l < 32; l++) {
        const int shift = l / 16 * 4, at = l % 16;
        switch (type) {
        case KL_Q8_0: q[l] = (int8_t)p[2 + l]; break;
        case KL_Q4_0: q[l] = (int8_t)((p[2 + at] >> shift & 15) - 8); break;
        case KL_Q5_0:
            q[l] = (int8_t)(((p[6 + at] >> shift & 15) | (p[2 + l / 8] >> l % 8 & 1) << 4) - 16);
            break;
        case KL_IQ4_NL: q[l] = kl_iq4_values[p[2 + at] >> shift & 15]; break;
        case KL_Q1_0: q[l] = (p[2 + 4 * nth + l / 8] >> l % 8 & 1) != 0 ? 1 : -1; break;
        case KL_Q2_0: q[l] = (int8_t)((p[2 + 8 * nth + l / 4] >> l % 4 * 2 & 3) - 1); break;
        default: q[l] = kl_fp4_values[p[1 + at] >> shift & 15]; break; /* MXFP4 */
        }
    }
}

/* What integers are multiplied with; all else of w becomes 0. n_blocks of 32 are there, of 8 (always 8 where a block
 * of the type is 256). */
static inline void int8_load_scales(int8_weights *w, const uint8_t *p, kl_type type, int n_blocks)
{
    memset(w, 0, sizeof *w);
    w->fine = int8_is_fine(type);
    switch (type) {
    case KL_Q4_K:
    case KL_Q5_K: int8_scales_k4(w, p); break;
    case KL_Q2_K: int8_scales_q2_k(w, p); break;
    case KL_Q3_K: int8_scales_q3_k(w, p); break;
    case KL_Q6_K: int8_scales_q6_k(w, p); break;
    case KL_IQ4_XS: int8_scales_iq4_xs(w, p); break;
    default:
        for (int b = 0; b < n_blocks; b++)
            w->scale[b] = int8_scale_32(int8_around(p, type, b), type);
    }
}

static inline void int8_load_values(int8_t *q, const uint8_t *p, kl_type type, int n_blocks)
{
    switch (type) {
    case KL_Q4_K: int8_values_k4(q, p, false); break;
    case KL_Q5_K: int8_values_k4(q, p, true); break;
    case KL_Q2_K: int8_values_q2_k(q, p); break;
    case KL_Q3_K: int8_values_q3_k(q, p); break;
    case KL_Q6_K: int8_values_q6_k(q, p); break;
    case KL_IQ4_XS: int8_values_iq4_xs(q, p); break;
    default:
        for (int b = 0; b < n_blocks; b++)
            int8_values_32(q + 32 * b, int8_around(p, type, b), type, b % int8_sharing(type));
    }
}

#endif
