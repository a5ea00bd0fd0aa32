"""A chunked delta rule as textbooks have it, in NumPy, and the slips of those who write one: each a change of its text.

None of it uses the package.
"""

import inspect

import numpy as np


def one_chunk(q, k, v, g, beta, S, scale):
    """q, k, g [H, n, K], v [H, n, V], beta [H, n, 1], S [H, K, V] -> o, S."""
    c = np.cumsum(g, axis=1)
    lower = np.tril(np.ones((c.shape[1], c.shape[1]), bool))
    E = np.exp(np.where(lower[..., None], c[:, :, None] - c[:, None], -np.inf))
    L = np.tril(beta * np.einsum("hik,hijk,hjk->hij", k, E, k), -1)
    P = scale * np.einsum("hik,hijk,hjk->hij", q, E, k)
    T = np.linalg.inv(np.eye(len(lower)) + L)
    W = T @ (beta * np.exp(c) * k)
    U = T @ (beta * v)
    d = U - W @ S
    o = scale * (np.exp(c) * q) @ S + P @ d
    last = c[:, -1]
    end = np.exp(last[:, None] - c)
    S = np.exp(last)[..., None] * S + (end * k).swapaxes(1, 2) @ d
    return o, S


def sequence(q, k, v, g, beta, S, scale, C, padded):
    """Rows [T, H, n] -> o [T, H, V], S; `padded`: the last chunk is filled up with zeros."""
    T, o = len(q), np.zeros(v.shape)
    if padded:
        q, k, v, g, beta = (np.concatenate([x, np.zeros((-T % C, *x.shape[1:]))]) for x in (q, k, v, g, beta))
    for t in range(0, T, C):
        y, S = one_chunk(*(x[t:t + C].swapaxes(0, 1) for x in (q, k, v, g, beta)), S, scale)
        o[t:t + C] = y.swapaxes(0, 1)[:T - t]
    return o, S


FOR = "    for t in range(0, T, C):"
CALL = "one_chunk(*(x[t:t + C].swapaxes(0, 1) for x in (q, k, v, g, beta)), S, scale)"

#: Name -> (what the text has, what it should not have there, what the card must say).
SLIPS = {
    "exclusive sum": (
        "c = np.cumsum(g, axis=1)", "c = np.cumsum(g, axis=1) - g",
        "the cumulative sum of gates is exclusive"),
    "exclusive start": (
        "np.exp(c) *", "np.exp(c - g) *",
        "the row's own gate is missing, an exclusive sum, from start, which decays q and k"),
    "exclusive start of q": (
        "(np.exp(c) * q)", "(np.exp(c - g) * q)",
        "the row's own gate is missing, an exclusive sum, from the decay of q from the chunk's start"),
    "exclusive start of k": (
        "np.exp(c) * k", "np.exp(c - g) * k",
        "the row's own gate is missing, an exclusive sum, from the decay of k from the chunk's start"),
    "exclusive rows of P": (
        "    T = np", "    P = scale * np.einsum('hik,hijk,hjk->hij', q * np.exp(-g), E, k)\n    T = np",
        "the row's own gate is missing, an exclusive sum, from the decay of the rows q_i of P"),
    "exclusive rows of L": (
        "k, E, k), -1)", "k * np.exp(-g), E, k), -1)",
        "the row's own gate is missing, an exclusive sum, from the decay of the rows k_i of L"),
    "exclusive q": (
        "    P = scale", "    q = q * np.exp(-g)\n    P = scale",
        "the row's own gate is missing, an exclusive sum, from the decay of q, in P and in o"),
    "exclusive k": (
        "    W = T @ (beta * np.exp(c) * k)",
        "    L = np.tril(beta * np.einsum('hik,hijk,hjk->hij', k * np.exp(-g), E, k), -1)\n"
        "    T = np.linalg.inv(np.eye(len(lower)) + L)\n    W = T @ (beta * np.exp(c - g) * k)",
        "the prediction reads the state before its decay"),
    "exclusive columns": (
        "c[:, :, None] - c[:, None]", "c[:, :, None] - (c - g)[:, None]",
        "an exclusive sum decays the columns k_j of L and P"),
    "own gate at the end": (
        "last[:, None] - c", "last[:, None] - c + g", "keys are decayed by their own gate, too"),
    "end too early": (
        "end = np.exp(last[:, None]", "end = np.exp(np.pad(c, ((0, 0), (1, 0), (0, 0)))[:, -2:-1]",
        "keys are decayed to the row before the chunk's end"),
    "total too early": (
        "S = np.exp(last)", "S = np.exp(np.pad(c, ((0, 0), (1, 0), (0, 0)))[:, -2])",
        "the state is decayed to the row before the chunk's end"),
    "both too early": (
        "last = c[:, -1]", "last = np.pad(c, ((0, 0), (1, 0), (0, 0)))[:, -2]",
        "the state and the keys written to it are decayed to the row before the chunk's end"),
    "no start of q": ("(np.exp(c) * q)", "q", "q is not decayed from the chunk's start"),
    "no start of k": ("np.exp(c) * k", "k", "k is not decayed from the chunk's start, in W"),
    "no start": ("np.exp(c) *", "1 *", "neither q nor k is decayed from the chunk's start"),
    "no end": ("(end * k)", "k", "keys are not decayed to the chunk's end"),
    "no total": ("np.exp(last)[..., None] * S", "S", "between chunks, the state is not decayed"),
    "no decay in P": ("k)\n    T =", "k)\n    P = scale * np.tril(q @ k.swapaxes(1, 2))\n    T =",
                      "P has no decay between its rows"),
    "no decay in L": ("hjk->hij\", k, E, k)", "hjk->hij\", k, E >= 0, k)", "L has no decay between its rows"),
    "no decay in L and P": ("np.exp(np.where(lower[..., None], c[:, :, None] - c[:, None], -np.inf))",
                            "lower[..., None] * np.ones_like(c[:, None])", "L and P have no decay between their rows"),
    "clamped sums": (
        "c = np.cumsum(g, axis=1)", "c = np.maximum(np.cumsum(g, axis=1), -50)",
        "the cumulative sum of gates is clamped at -50"),
    "clamped columns": (
        "E = np.exp(np.where(lower[..., None], c[:, :, None] - c[:, None], -np.inf))",
        "E = lower[..., None] * np.exp(c[:, :, None]) * np.exp(np.minimum(-c[:, None], 20))",
        "the exponent of exp(-c_j) k_j in L and P is clamped at 20"),
    "beta of columns": ("np.tril(beta * np.einsum", "np.tril(beta.swapaxes(1, 2) * np.einsum",
                        "L has beta of the column, beta_j for beta_i"),
    "no beta in L": ("np.tril(beta * np.einsum", "np.tril(1 * np.einsum", "beta is missing in L"),
    "no beta in W": ("beta * np.exp(c) * k", "np.exp(c) * k", "beta is missing in W"),
    "no beta in U": ("T @ (beta * v)", "T @ v", "beta is on what is read back alone (on k), not on v"),
    "no beta behind T": ("T @ (beta * ", "T @ (1 * ", "beta is missing behind the inverse"),
    "beta twice in W": ("beta * np.exp(c) * k", "beta * beta * np.exp(c) * k", "beta is applied twice in W"),
    "beta twice in U": ("beta * v", "beta * beta * v", "beta is applied twice in U"),
    "sign of L": ("np.eye(len(lower)) + L", "np.eye(len(lower)) - L", "the sign of L is wrong: (I - L)^-1"),
    "inverse transposed": ("np.linalg.inv(np.eye(len(lower)) + L)",
                           "np.linalg.inv(np.eye(len(lower)) + L).swapaxes(1, 2)", "(I + L)^-1 is transposed"),
    "no inverse": ("np.linalg.inv(np.eye(len(lower)) + L)", "np.eye(len(lower)) + L",
                   "I + L is used where its inverse belongs"),
    "no identity": ("np.linalg.inv(np.eye(len(lower)) + L)",
                    "np.linalg.inv(np.eye(len(lower)) + L) - np.eye(len(lower))", "the identity is missing"),
    "diagonal in L": ("k), -1)", "k), 0)", "L is not strictly lower"),
    "no L": ("np.eye(len(lower)) + L", "np.eye(len(lower)) + 0 * L", "L is left out of the inverse"),
    "series of 1": ("np.linalg.inv(np.eye(len(lower)) + L)", "np.eye(len(lower)) - L", "cut short: I - L for"),
    "series of 2": ("np.linalg.inv(np.eye(len(lower)) + L)", "np.eye(len(lower)) - L + L @ L",
                    "cut short: I - L + L^2 for"),
    "series of 3": ("np.linalg.inv(np.eye(len(lower)) + L)", "np.eye(len(lower)) - L + L @ L - L @ L @ L",
                    "cut short: I - L + L^2 - L^3 for"),
    "strict P": ("P @ d", "np.tril(P, -1) @ d", "the output is read before the update"),
    "full P": ("q, E, k)", "q, np.exp(c[:, :, None] - c[:, None]), k)", "P is not cut to its lower triangle"),
    "d is U": ("U - W @ S", "U", "the state is not subtracted from the values"),
    "sign of W S": ("U - W @ S", "U + W @ S", "what the state predicts is added"),
    "o of U": ("P @ d", "P @ U", "o has P U where P d belongs"),
    "writes U": (".swapaxes(1, 2) @ d", ".swapaxes(1, 2) @ U", "the state is written with U"),
    "no inter": ("scale * (np.exp(c) * q) @ S + P @ d", "P @ d", "o lacks what it reads of the state"),
    "no intra": (" + P @ d", "", "o lacks what it reads of its own chunk"),
    "scale in inter alone": ("P = scale * ", "P = ", "the scale is on what o reads of the state alone"),
    "scale in intra alone": ("o = scale * ", "o = ", "the scale is on P alone"),
    "next state": ("    return o, S\n\n", "    return scale * (np.exp(c) * q) @ S + P @ d, S\n\n",
                   "o reads the state behind its chunk"),
    "tail": ("range(0, T, C)", "range(0, T - C + 1, C)", "the last chunk, which is not full, is left out"),
    "tail of o": ("y.swapaxes(0, 1)[:T - t]", "y.swapaxes(0, 1)[:T - t] * (t + C <= T)",
                  "rows of o in the last chunk, which is not full, are zero"),
    "tail of the state": (CALL, f"(*{CALL}, S)[slice(2) if t + C <= T else slice(0, 3, 2)]",
                          "the last chunk, which is not full, is not written to the state"),
    "tail from zero": (CALL, CALL.replace(" S,", " S * (t + C <= T),"),
                       "the last chunk, which is not full, begins with a state of zero"),
    "sums that go on": (FOR, "    g = np.where(np.arange(len(g))[:, None, None] % C, g, np.cumsum(g, 0))\n" + FOR,
                        "the cumulative sum of gates goes on over the borders of chunks"),
    "gates too early": (FOR, "    g = np.concatenate([g[:C], g[C - 1:-1]])\n" + FOR, "gates are read one row early"),
    "keys too early": (FOR, "    k = np.concatenate([k[:C], k[C - 1:-1]])\n" + FOR, "keys are read one row early"),
    "no S": ("np.exp(last)[..., None] * S +", "0 * S +", "S is left out of its update"),
    "total of the first row": ("np.exp(last)[..., None] * S", "np.exp(c[:, 0])[..., None] * S",
                               "the state is decayed by the gate of the chunk's first row alone"),
    "end of start": ("end = np.exp(last[:, None] - c)", "end = np.exp(c)",
                     "keys are decayed by start_j in place of end_j"),
    "end of total": ("S = np.exp(last)[..., None] * S + (end * k).swapaxes(1, 2) @ d",
                     "S = np.exp(last)[..., None] * (S + k.swapaxes(1, 2) @ d)",
                     "the state is decayed after the write"),
    "columns of P undecayed": ('np.einsum("hik,hijk,hjk->hij", q, E, k)',
                               "np.tril((np.exp(c) * q) @ k.swapaxes(1, 2))",
                               "P is decayed by start_i in place of E_ij"),
    "columns of L undecayed": ('np.einsum("hik,hijk,hjk->hij", k, E, k)', "((np.exp(c) * k) @ k.swapaxes(1, 2))",
                               "L is decayed by start_i in place of E_ij"),
    "beta of both in L": ("np.tril(beta * np.einsum", "np.tril(beta * beta.swapaxes(1, 2) * np.einsum",
                          "L has beta of the row and of the column"),
    "beta behind T in W": ("T @ (beta * np.exp(c) * k)", "beta * (T @ (np.exp(c) * k))", "W = Diag(beta) T (start k)"),
    "beta behind T in U": ("T @ (beta * v)", "beta * (T @ v)", "U = Diag(beta) T v"),
    "beta behind T": ("    W = T @ (beta * np.exp(c) * k)\n    U = T @ (beta * v)",
                      "    W, U = beta * (T @ (np.exp(c) * k)), beta * (T @ v)",
                      "W and U have Diag(beta) T for T Diag(beta)"),
    "start behind T": ("T @ (beta * np.exp(c) * k)", "np.exp(c) * (T @ (beta * k))",
                       "start is on the other side of the inverse"),
    "beta in the write": (".swapaxes(1, 2) @ d", ".swapaxes(1, 2) @ (beta * d)",
                          "the state is written with beta once more"),
    "L without neighbours": ("k), -1)", "k), -2)", "L is cut below its first subdiagonal"),
    "scale twice": ("P = scale * ", "P = scale * scale * ", "the scale is on P twice"),
}



def between(code, says):
    """A slip before the inverse: `i`, `b` and `far` are rows, their blocks of 16, and pairs in no neighbouring ones."""
    here = "    T = np.linalg.inv(np.eye(len(lower)) + L)\n"
    blocks = "i, b = np.arange(len(lower)), np.arange(len(lower)) // 16\n    far = b[:, None] > b + 1\n    "
    return here, f"    {blocks}{code}\n{here}", says


L_ALONE, P_ALONE = (f"{x} = np.where(b[:, None] == b, {x}, 0)\n    " for x in "LP")
L_FAR = "L = np.where(far, beta * (k @ k.swapaxes(1, 2)), L)"
P_FAR = "P = np.where(far, scale * (q @ k.swapaxes(1, 2)), P)"
OWN = ("before = np.pad(c, ((0, 0), (1, 0), (0, 0)))\n    r = np.exp(c - before[:, b * 16])\n    "
       "s = np.exp(before[:, np.minimum(b * 16 + 16, len(i))] - c)\n    "
       "L = np.where(far, beta * ((r * k) @ (s * k).swapaxes(1, 2)), L)\n    ")
OWN_P = "P = np.where(far, scale * ((r * q) @ (s * k).swapaxes(1, 2)), P)"

#: The same of blocks of 16 rows, which a chunk of 16 has not.
OF_BLOCKS = {
    "L of one block": between(L_ALONE, "in L (or its inverse), what is between two blocks is zero"),
    "P of one block": between(P_ALONE, "in P, what is between two blocks is zero"),
    "L and P of one block": between(L_ALONE + P_ALONE, "in L and P, what is between two blocks is zero"),
    "L of far blocks": between(L_FAR, "in L, blocks that are no neighbours have no decay"),
    "P of far blocks": between(P_FAR, "in P, blocks that are no neighbours have no decay"),
    "L between blocks": between(OWN, "in L, blocks that are no neighbours lack the decay of the blocks between them"),
    "L and P between blocks": between(
        OWN + OWN_P, "in L and P, blocks that are no neighbours lack the decay of the blocks between them"),
}


def kernel(slip=None, C=64, padded=False, dtype=np.float64):
    """The delta rule in our conventions, in chunks of C, with a slip or none; a slip is a name, or (right, wrong)."""
    text = inspect.getsource(one_chunk) + "\n\n" + inspect.getsource(sequence)
    if slip is not None:
        right, wrong, *_ = (SLIPS | OF_BLOCKS)[slip] if isinstance(slip, str) else slip
        assert right in text, slip
        text = text.replace(right, wrong)
    names = {"np": np}
    exec(text, names)

    def delta_rule(q, k, v, g, beta, scale=None, initial_state=None, offsets=None, l2_norm=False, head_map="grouped"):
        (T, Hk, K), (H, V) = q.shape, v.shape[1:]
        q, k, v, beta = (x.astype(dtype) for x in (q, k, v, beta))
        g = np.zeros((T, H), dtype) if g is None else np.maximum(g.astype(dtype), -1000)
        if l2_norm:
            q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
        heads = np.arange(H) % Hk if head_map == "tiled" else np.arange(H) // (H // Hk)
        g = np.broadcast_to(g[..., None] if g.ndim == 2 else g, (T, H, K))
        rows = q[:, heads], k[:, heads], v, g, beta[..., None]
        bounds = [0, T] if offsets is None else [int(n) for n in offsets]
        S = np.zeros((len(bounds) - 1, H, K, V), dtype)
        if initial_state is not None:
            S += initial_state
        o = np.zeros(v.shape, np.float32)
        for n, (a, b) in enumerate(zip(bounds, bounds[1:])):
            o[a:b], S[n] = names["sequence"](*(x[a:b] for x in rows), S[n], K**-0.5 if scale is None else scale, C,
                                             padded)
        S = S.astype(np.float32)
        return o, S if offsets is not None else S[0]

    return delta_rule
