/* Which form of latent_attention a token takes, on the CPU and on a device. Also C++. */
#ifndef KL_PIECES_H
#define KL_PIECES_H

#include "../kimi_linear.h"

/* New tokens of a sequence are cut into pieces of KL_PIECE, from the first of the call; a piece of
 * up to KL_ABSORBED_PIECE tokens is absorbed, a longer one expanded. */
enum { KL_PIECE = 64, KL_ABSORBED_PIECE = 16 };

/* Leading ones of L new tokens whose pieces are long. */
static inline int64_t kl_long_pieces(int64_t L)
{
    return L % KL_PIECE > KL_ABSORBED_PIECE ? L : L - L % KL_PIECE;
}

/* Leading new tokens of sequence n that are expanded; the rest is absorbed. */
static inline int64_t kl_mla_expanded_tokens(const kl_latent_attention_args *args, int64_t n)
{
    const int64_t L = args->offsets[n + 1] - args->offsets[n];
    if (args->form == KL_FORM_ABSORBED)
        return 0;
    return args->form == KL_FORM_EXPANDED ? L : kl_long_pieces(L);
}

/* Positions that new token i of sequence n sees. */
static inline int64_t kl_mla_seen(const kl_latent_attention_args *args, int64_t n, int64_t i)
{
    return args->positions[n] - (args->offsets[n + 1] - args->offsets[n]) + i + 1;
}

#endif
