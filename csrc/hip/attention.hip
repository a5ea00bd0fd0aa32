/* attention (ops/attention.c): grouped queries over a paged cache; the kernels are attend.hip's. */
#include "attend.h"

kl_status hip_attention(kl_ctx *ctx, float *o, const float *q, kl_cache keys, kl_cache values,
                        const kl_attention_args *args)
{
    const int64_t N = args->N, H = args->H;
    const auto positions = [=](int64_t n) { return args->positions[n]; };
    kl_attend a = {};
    a.key[0] = kl_attend_part{ q, 0, H * args->K, args->K, args->K, {} };
    a.o = o;
    a.N = N;
    a.H = H;
    a.Hkv = args->Hkv;
    a.V = args->V;
    a.to = args->T;
    a.scale = args->scale;
    if (args->T == 0)
        return KL_OK;
    KL_TRY(kl_put_table(ctx, &a.offsets, args->offsets, N + 1));
    KL_TRY(kl_put_table(ctx, &a.positions, args->positions, N));
    KL_TRY(kl_put_cache(ctx, &a.key[0].cache, keys, N, positions));
    KL_TRY(kl_put_cache(ctx, &a.values, values, N, positions));
    KL_TRY(kl_attend_run(ctx, a, args->offsets, args->positions));
    return kl_core_of->measuring(ctx) ? KL_OK : kl_launched(ctx, "attention");
}
