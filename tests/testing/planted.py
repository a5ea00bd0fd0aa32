"""Kernels to be judged: the delta rule in float32 NumPy, right and with planted bugs, in the conventions of others.

Each bug is a change of a line or two, as people make them; none of it uses the package.
"""

import numpy as np

F = np.float32
BUGS = {}  # name -> what the card must say


def bug(name, says):
    """Registers the name of a planted bug, and the words by which the card must name it."""
    BUGS[name] = says
    return name


# ---- one sequence, one token after another -------------------------------------------------------------

TRANSPOSED = bug("final state transposed", "K and V swapped")
BOTH = bug("state [V, K] in and out", "the state lies as [V, K]")
NO_SCALE = bug("no scale", "scale is missing")
SCALE_TWICE = bug("scale twice", "scale is applied twice")
SCALE_K = bug("scale on k", "scale is on k instead of q")
UPDATE_FIRST = bug("update, then decay", "update comes before the decay")
UNDECAYED = bug("reads the undecayed state", "prediction reads the state before its decay")
NO_DECAY = bug("no decay", "decay is missing")
LOG2 = bug("exp2 of nats", "taken as log2")
LOG2E = bug("exp of log2 units", "multiplied by log2(e)")
EXP_TWICE = bug("exp twice", "exp is taken twice")
CLAMP5 = bug("clamped at -5", "clamped at -5")
CLAMP20 = bug("clamped at -20", "clamped at -20")
BEFORE = bug("output before the update", "output is read before the update")
NO_BETA = bug("no beta", "beta is missing")
SIGMOID = bug("sigmoid of beta", "beta goes through a sigmoid again")
BETA_K = bug("beta on k alone", "beta is on what is read back alone")
IGNORED = bug("initial state ignored", "initial state is ignored")
EARLY = bug("state before the last token", "final state is that before the last token")
INTERLEAVED = bug("heads the other way", "key heads are found the other way")
EPS_OUTSIDE = bug("eps outside of the root", "eps outside of the root")
EPS_MEAN = bug("eps on the mean", "eps on the mean")
OVERFLOW = bug("squares overflow", "overflows float32")
RAGGED = bug("offsets ignored", "sequences run into each other")
VALUES = bug("decay along the values", "decay is along the values")
RESET = bug("state lost at 64", "state is lost at the border of chunks of 64")
NEXT = bug("gate of the next token", "gate of the next")
FIRST_GATE = bug("first gate of a chunk", "first gate of each chunk is left out, chunks of 16")
PAD_REPEATS = bug("padding repeats", "padding repeats the last token and reaches the state, chunks of 16")
PAST_END = bug("reads past the end", "reads past the ends of its inputs")
FACTORED = bug("factored chunk", "NaN from a positive exponent")
SUMS = bug("subtracted sums", "subtracting float32 sums of g over chunks of 64")
SUMS_LOG2 = bug("subtracted sums in log2", "subtracting float32 sums of g, in log2, over chunks of 64")
WRITES = bug("changes its input", "its input k was changed")
PAIR = bug("transposed, and no scale", "the final state equals ours with K and V swapped; and the scale is missing")


def norm(x, what=None):
    s = np.float32(1e-6)
    big = np.abs(x).max(-1, keepdims=True) > 1e18
    with np.errstate(over="ignore", under="ignore"):
        y = x * np.where(big & (what != OVERFLOW), F(2.0**-64), F(1))
        squares = (y * y).sum(-1, keepdims=True, dtype=F)
        if what == EPS_OUTSIDE:
            return y / (np.sqrt(squares) + s)
        if what == EPS_MEAN:
            s *= x.shape[-1]
        return y / np.sqrt(squares + np.where(big, F(0), s))


def decay(g, what):
    """exp(g), float32."""
    if what == CLAMP5:
        g = np.maximum(g, F(-5))
    if what == CLAMP20:
        g = np.maximum(g, F(-20))
    if what == LOG2:
        return np.exp2(g)
    if what == LOG2E:
        return np.exp(g * F(1.4426950))
    if what == EXP_TWICE:
        return np.exp(np.exp(g))
    return np.exp(g)


def recurrent(q, k, v, g, beta, S, what=None):
    """q, k [T, H, K] (scaled), v [T, H, V], g [T, H, K], beta [T, H], S [H, K, V] -> o, S."""
    a, S, o = decay(g, what), S.copy(), np.empty(v.shape, F)
    if what == NEXT:
        a = np.concatenate([a[1:], np.ones_like(a[:1])])[:len(a)]
    before = S
    for t in range(len(q)):
        before = S
        if what == RESET and t and t % 64 == 0:
            S = np.zeros_like(S)
        old, at = S, a[t][:, :, None]
        if what == NO_DECAY or what == FIRST_GATE and t and t % 16 == 0:
            at = F(1)
        if what == VALUES and a.shape[2] == v.shape[2]:
            at = a[t][:, None, :]
        if what != UPDATE_FIRST:
            S = at * S
        read = np.einsum("hkv,hk->hv", old if what == UNDECAYED else S, k[t])
        b = beta[t][:, None]
        if what == NO_BETA:
            b = F(1)
        if what == SIGMOID:
            b = F(1) / (F(1) + np.exp(-b))
        d = v[t] - b * read if what == BETA_K else b * (v[t] - read)
        after = S + k[t][:, :, None] * d[:, None, :]
        if what == UPDATE_FIRST:
            after = at * after
        o[t] = np.einsum("hkv,hk->hv", S if what == BEFORE else after, q[t])
        S = after
    if what == PAD_REPEATS and len(q):
        for _ in range(-len(q) % 16):
            S = a[-1][:, :, None] * S
            d = beta[-1][:, None] * (v[-1] - np.einsum("hkv,hk->hv", S, k[-1]))
            S = S + k[-1][:, :, None] * d[:, None, :]
    return o, before if what == EARLY else S


def chunked(q, k, v, g, beta, S, what=None, C=64):
    """The same in chunks of C, each decay a product of the factors in between; those three as others have it."""
    o = np.empty(v.shape, F)
    for t in range(0, len(q), C):
        p = slice(t, t + C)
        o[p], S = one_chunk(q[p], k[p], v[p], g[p], beta[p], S, what)
    return o, S


def one_chunk(q, k, v, g, beta, S, what):
    n, a, exp = len(q), np.exp(g), np.exp
    c = np.cumsum(g, axis=0, dtype=F)
    if what == SUMS_LOG2:
        c, exp = c * F(np.log2(np.e)), np.exp2
    start, to = exp(c) if what else np.cumprod(a, axis=0, dtype=F), np.ones_like(a)
    d, o = np.empty(v.shape, F), np.empty(v.shape, F)
    for i in range(n):
        to[:i] *= a[i]
        if what == FACTORED:
            decayed, qi, ki = np.exp(-c[:i + 1]) * k[:i + 1], q[i] * start[i], k[i] * start[i]
        else:
            decayed = (exp(c[i] - c[:i + 1]) if what in (SUMS, SUMS_LOG2) else to[:i + 1]) * k[:i + 1]
            qi, ki = q[i], k[i]
        L = beta[i][:, None] * np.einsum("hk,jhk->hj", ki, decayed[:i])
        P = np.einsum("hk,jhk->hj", qi, decayed)
        r = beta[i][:, None] * (v[i] - np.einsum("hk,hkv->hv", start[i] * k[i], S))
        d[i] = r - np.einsum("hj,jhv->hv", L, d[:i])
        o[i] = np.einsum("hk,hkv->hv", start[i] * q[i], S) + np.einsum("hj,jhv->hv", P, d[:i + 1])
    end = exp(c[-1] - c) if what else to
    return o, start[-1][:, :, None] * S + np.einsum("jhk,jhv->hkv", end * k, d)


# ---- our conventions -----------------------------------------------------------------------------------


def kernel(what=None, core=None):
    """The delta rule in our conventions, with a bug or none."""
    core = core or (chunked if what in (FACTORED, SUMS, SUMS_LOG2) else recurrent)

    def delta_rule(q, k, v, g, beta, scale=None, initial_state=None, offsets=None, l2_norm=False, head_map="grouped"):
        (T, Hk, K), (Hv, V) = q.shape, v.shape[1:]
        if what == WRITES:
            k *= F(1)
            k[0, 0, 0] += F(1)
        scale = F(K**-0.5 if scale is None else scale)
        if l2_norm:
            q, k = norm(q, what), norm(k, what)
        if (head_map == "tiled") != (what == INTERLEAVED):
            index = np.arange(Hv) % Hk
        else:
            index = np.arange(Hv) // (Hv // Hk)
        q, k = q[:, index], k[:, index]
        if what == SCALE_K:
            k = scale * k
        elif what != NO_SCALE and what != PAIR:
            q = scale * (scale if what == SCALE_TWICE else F(1)) * q
        g = np.zeros((T, Hv, 1), F) if g is None else g if g.ndim == 3 else g[..., None]
        g = np.broadcast_to(g, (T, Hv, K))
        if what == PAST_END and T % 16:
            q, k, v, g, beta = past_the_end(q, k, v, g, beta)

        bounds = [0, len(q)] if offsets is None else [int(n) for n in offsets]
        shape = (len(bounds) - 1, Hv, K, V)
        S = np.zeros(shape, F) if initial_state is None or what == IGNORED else initial_state.reshape(shape).copy()
        if what == BOTH and K == V:
            S = S.swapaxes(-1, -2)
        o, left = np.empty((len(q), Hv, V), F), S[0]
        for n, (first, last) in enumerate(zip(bounds, bounds[1:])):
            rows = [a[first:last] for a in (q, k, v, g, beta)]
            o[first:last], left = core(*rows, left if what == RAGGED and n else S[n], what)
            S[n] = left
        if what in (TRANSPOSED, BOTH, PAIR):
            S = S.swapaxes(-1, -2)
        S = np.ascontiguousarray(S)
        return o[:T], S if offsets is not None else S[0]

    return delta_rule


def past_the_end(*arrays):
    """Padded to a multiple of 16 rows by zeros; but for beta, whose rows are whatever lies there."""
    *head, beta = arrays
    extra = -len(beta) % 16
    rows = [np.concatenate([a, np.zeros((extra, *a.shape[1:]), F)]) for a in head]
    return *rows, np.lib.stride_tricks.as_strided(beta, (len(beta) + extra, beta.shape[1]), beta.strides)


# ---- the conventions of others -------------------------------------------------------------------------


def fla(core=recurrent, state="KV"):
    ours = kernel(core=core)

    def kda(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
            cu_seqlens=None):
        assert output_final_state and q.shape[0] == 1
        S = initial_state if initial_state is None or state == "KV" else initial_state.swapaxes(-1, -2)
        if S is not None and cu_seqlens is None:
            S = S[0]
        o, S = ours(q[0], k[0], v[0], g[0], beta[0], scale, S, cu_seqlens, use_qk_l2norm_in_kernel)
        S = S if cu_seqlens is not None else S[None]
        return o[None], S if state == "KV" else S.swapaxes(-1, -2)

    return kda


def hf(core=recurrent):
    ours = kernel(core=core)

    def attention(query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel=False):
        S = None if initial_state is None else initial_state[0]
        o, S = ours(query[0], key[0], value[0], g[0], beta[0], None, S, None, use_qk_l2norm_in_kernel)
        return o[None], S[None]

    return attention


def ggml(q, k, v, g, beta, state):
    ours = kernel()
    assert beta.shape[-1] == 1 and q.shape[-1] == v.shape[-1]
    g = g[0, ..., 0] if g.shape[-1] == 1 and q.shape[-1] > 1 else g[0]
    o, S = ours(q[0], k[0], v[0], g, beta[0, ..., 0], None, state[0].swapaxes(-1, -2), head_map="tiled")
    return np.concatenate([o.ravel(), np.ascontiguousarray(S.swapaxes(-1, -2)).ravel()])


def mlx(q, k, v, g, beta, state):
    """The decay comes as it is, and q with its scale."""
    a = g[0] if g.ndim == 4 else g[0][..., None]
    index = np.arange(v.shape[2]) // (v.shape[2] // q.shape[2])
    S, o = state[0].swapaxes(-1, -2), np.empty(v.shape[1:], F)
    for t in range(v.shape[1]):
        S = a[t][:, :, None] * S
        d = beta[0, t][:, None] * (v[0, t] - np.einsum("hkv,hk->hv", S, k[0, t, index]))
        S = S + k[0, t, index][:, :, None] * d[:, None, :]
        o[t] = np.einsum("hkv,hk->hv", S, q[0, t, index])
    return o[None], S.swapaxes(-1, -2)[None]


def heads_first(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                use_qk_l2norm_in_kernel=False):
    """As fla once had it, [B, H, T, n], with gates in log2."""
    rows = [a[0].swapaxes(0, 1) for a in (q, k, v, g, beta)]
    rows[3] = (rows[3].astype(np.float64) * np.log(2)).astype(F)
    S = None if initial_state is None else initial_state[0]
    o, S = kernel()(*rows, scale, S, None, use_qk_l2norm_in_kernel)
    return o.swapaxes(0, 1)[None], S[None]
