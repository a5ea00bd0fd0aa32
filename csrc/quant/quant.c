/* The table of storage types, and float16 in plain C. */
#include "quant.h"

#define QUANTIZE_WRITTEN(body) kl_quantize_##body
#define QUANTIZE_READ_ONLY(body) NULL

static const kl_block_type table[] = {
#define KL_BLOCK_TYPE(name, body, id, values, bytes, access)                                       \
    { #name, KL_##name, values, bytes, kl_dequantize_##body, QUANTIZE_##access(body) },
#include "types.def"
#undef KL_BLOCK_TYPE
};

#define KL_BLOCK_TYPE(name, body, id, values, bytes, access)                                       \
    _Static_assert((int)KL_##name == (id), "kl_type and types.def disagree on " #name);
#include "types.def"
#undef KL_BLOCK_TYPE

#define NAME_WRITTEN(name) " " #name
#define NAME_READ_ONLY(name)
#define KL_BLOCK_TYPE(name, body, id, values, bytes, access) NAME_##access(name)
const char kl_written_types[] =
#include "types.def"
    ;
#undef KL_BLOCK_TYPE

const kl_block_type *kl_block_type_of(kl_type type)
{
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
        if (table[i].id == type)
            return &table[i];
    return NULL;
}

int64_t kl_type_block(kl_type type)
{
    if (type == KL_F32 || type == KL_F16 || type == KL_BF16)
        return 1;
    const kl_block_type *t = kl_block_type_of(type);
    return t != NULL ? t->values : 0;
}

size_t kl_type_bytes(kl_type type, int64_t n_values)
{
    if (n_values < 0
        || n_values >> 60 > 0) /* more than any memory, and than 64 bits of bytes hold */
        return 0;
    if (type == KL_F32)
        return (size_t)n_values * 4;
    if (type == KL_F16 || type == KL_BF16)
        return (size_t)n_values * 2;
    const kl_block_type *t = kl_block_type_of(type);
    return t != NULL ? (size_t)(n_values / t->values) * t->bytes : 0;
}

const char *kl_type_name(kl_type type)
{
    if (type == KL_F32)
        return "F32";
    if (type == KL_F16)
        return "F16";
    if (type == KL_BF16)
        return "BF16";
    const kl_block_type *t = kl_block_type_of(type);
    return t != NULL ? t->name : "unknown";
}

float kl_f16_at(const void *p)
{
    uint16_t h;
    memcpy(&h, p, sizeof h);
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    uint32_t bits;
    float f;
    if (magnitude >= 0x7c00u) { /* infinity, NaN */
        bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
    } else if (magnitude >= 0x400u) {
        bits = sign | ((magnitude << 13) + (112u << 23));
    } else { /* subnormal: magnitude * 2^-24 */
        f = (float)magnitude * 0x1p-24f;
        memcpy(&bits, &f, sizeof bits);
        bits |= sign;
    }
    memcpy(&f, &bits, sizeof f);
    return f;
}

uint16_t kl_f16_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) /* 65520 and above */
        return (uint16_t)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) { /* below 2^-14: steps of 2^-24 */
        float f;
        memcpy(&f, &magnitude, sizeof f);
        f += 0.5f; /* the sum rounds to a multiple of 2^-24, to nearest even */
        memcpy(&magnitude, &f, sizeof f);
        return (uint16_t)(sign | (magnitude - 0x3f000000u));
    }
    magnitude += 0xfffu + (magnitude >> 13 & 1u);
    return (uint16_t)(sign | (magnitude - (112u << 23)) >> 13);
}

void kl_store_f16(uint8_t *p, float x)
{
    const uint16_t h = kl_f16_of(x);
    memcpy(p, &h, sizeof h);
}
