/* Which form of latent_attention a token takes, on the CPU and on a device. Also C++. */
#ifndef KL_PIECES_H
#define KL_PIECES_H

#include "../kimi_linear.h"

#include <stdbool.h>

/* New tokens of a sequence are cut into pieces of KL_PIECE, from the first of the call; a piece of
 * up to KL_ABSORBED_PIECE tokens is absorbed, a longer one expanded. */
enum { KL_PIECE = 64, KL_ABSORBED_PIECE = 16 };

/* Leading ones of L new tokens whose pieces are long. */
static inline int64_t kl_long_pieces(int64_t L)
{
    return L % KL_PIECE > KL_ABSORBED_PIECE ? L : L - L % KL_PIECE;
}

/* Whether queries attend to what rows of select list. While measuring select has no address. */
static inline bool kl_mla_selects(const kl_latent_attention_args *args)
{
    return args->select_width > 0;
}

/* Positions that new token i of sequence n sees. */
static inline int64_t kl_mla_seen(const kl_latent_attention_args *args, int64_t n, int64_t i)
{
    return args->positions[n] - (args->offsets[n + 1] - args->offsets[n]) + i + 1;
}

/* Whether it attends to its row of select alone: it sees more positions than all may. */
static inline bool kl_mla_has_row(const kl_latent_attention_args *args, int64_t n, int64_t i)
{
    return kl_mla_selects(args) && kl_mla_seen(args, n, i) > args->select_from;
}

/* The form's leading new tokens of L, whatever is selected. */
static inline int64_t kl_mla_long_tokens(const kl_latent_attention_args *args, int64_t L)
{
    if (args->form == KL_FORM_ABSORBED)
        return 0;
    return args->form == KL_FORM_EXPANDED ? L : kl_long_pieces(L);
}

/* Leading new tokens of sequence n that are expanded: none of them has a row of select. The rest is absorbed. */
static inline int64_t kl_mla_expanded_tokens(const kl_latent_attention_args *args, int64_t n)
{
    const int64_t L = args->offsets[n + 1] - args->offsets[n], longs = kl_mla_long_tokens(args, L);
    if (!kl_mla_selects(args))
        return longs;
    const int64_t before = args->positions[n] - L,
                  rowless = args->select_from > before ? args->select_from - before : 0;
    return longs < rowless ? longs : rowless;
}

/* A plan measures at the deepest context alone, where tokens have rows that have none before: the most and the least
 * tokens that are expanded at any depth. */
static inline int64_t kl_mla_expanded_most(const kl_latent_attention_args *args, int64_t n)
{
    const int64_t longs = kl_mla_long_tokens(args, args->offsets[n + 1] - args->offsets[n]);
    return kl_mla_selects(args) && longs > args->select_from ? args->select_from : longs;
}
static inline int64_t kl_mla_expanded_least(const kl_latent_attention_args *args, int64_t n)
{
    return kl_mla_selects(args) ? 0 : kl_mla_expanded_tokens(args, n);
}

/* The most positions that an absorbed token of sequence n attends to. */
static inline int64_t kl_mla_attended_most(const kl_latent_attention_args *args, int64_t n)
{
    const int64_t all = args->positions[n];
    if (!kl_mla_selects(args))
        return all;
    const int64_t most =
        args->select_width > args->select_from ? args->select_width : args->select_from;
    return most < all ? most : all;
}

#endif
