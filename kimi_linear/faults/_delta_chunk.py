"""Faults of the delta rule's chunked form: the formulas of docs/math.md#chunked in float64, a switch at each term."""

from __future__ import annotations

import numpy as np

from ..reference_delta import of_value_heads, states_from
from ._fault import BOTH, CALL, CHUNKS, CHUNKS_SPLIT, STRONG, Fault
from .site import Site

__all__ = ["FAULTS", "TERMS", "Chunked", "Chunks", "longest"]

FORGETS = -1000.0  # nats: exp of it is 0 in float64, and unlike -infinity it can be subtracted from itself
FACTORS = 600.0    # nats: up to here exp(c_i) exp(-c_j) has all its digits
BLOCK = 8          # rows in which each pair has its own exponential
BLOCKS = 16        # rows of a block of L or P, in any port
LONGEST = 128      # tokens of a chunk, in any port
VISIBLE = 1e-6     # of a result's rms: a term that changes less is told from no rounding

# ---- the chunked form with its faults ------------------------------------------------------------------


def longest(x):
    """Tokens of the longest sequence of the arguments `x`."""
    return len(x["q"]) if x.get("offsets") is None else max(map(int, np.diff(x["offsets"])), default=0)


class Chunks:
    """The arguments `x` of `reference.delta_rule` for the chunked form; what its faults share is kept."""

    def __init__(self, x):
        q, k = (np.asarray(x[n], np.float64) for n in "qk")
        if x.get("l2_norm"):
            q, k = (a / np.sqrt((a * a).sum(-1, keepdims=True) + x.get("l2_eps", 1e-6)) for a in (q, k))
        self.v, self.beta = (np.asarray(x[n], np.float64) for n in ("v", "beta"))
        (T, H, V), K = self.v.shape, q.shape[-1]
        self.scale = K**-0.5 if x.get("scale") is None else x["scale"]
        self.q, self.k, g = of_value_heads(q, k, x.get("g"), H, self.scale, x.get("head_map", "grouped"))
        self.g = np.maximum(g, FORGETS)
        self.ragged = x.get("offsets") is not None
        self.offsets = [int(n) for n in x["offsets"]] if self.ragged else [0, T]
        self.states = states_from(x.get("initial_state"), (len(self.offsets) - 1, H, K, V))
        self.longest = longest(x)
        self.kept = {}

    def _keep(self, make, *key):
        """``make(*key)``, once for each key."""
        if (make, *key) not in self.kept:
            self.kept[make, *key] = make(self, *key)
        return self.kept[make, *key]

    def wrong(self, terms, C=None):
        """(o, state) with some terms wrong in chunks of C, by default a chunk that no sequence fills; None where that
        changes nothing."""
        results = self.results(C, **terms)
        return results if any(map(_differ, results, self._keep(Chunks.results, 16))) else None

    def results(self, C=None, **terms):
        """(o, state) with some terms wrong in chunks of C, by default a chunk that no sequence fills."""
        return self._results(self.longest + 1 if C is None else min(C, self.longest + 1), **terms)

    def _results(self, C, *, early="", sums=None, q_start=None, k_start=None, L_rows=None, P_rows=None, L_blocks=None,
                 P_blocks=None, columns=None, end=None, total=None, padded=False, L_beta="row", W_beta=1, U_beta=1,
                 inverse=None, above=False, d=None, inter=None, intra=None, write=None, scale=None, tail=None):
        """(o, state) of chunks of C; the switches are named after the terms, and by default all is right."""
        p = self._keep(_Parts, C, early)
        q, k, v, beta, c = p.q, p.k, p.v, p.beta, p.sums(sums)
        T = self._keep(Chunks._inverse, C, early, sums, L_rows, L_blocks, columns, L_beta, inverse)
        start, behind = p.start(c, k_start), k_start == "behind T"
        W = (start if behind else 1) * _of_inverse(T, beta, W_beta, k if behind else start * k)
        U = _of_inverse(T, beta, U_beta, v)
        P = self._keep(Chunks._pairs, C, early, "q", sums, P_rows, P_blocks, columns, above)
        P = P * {"inter alone": 1 / self.scale if self.scale else 1.0, "twice on P": self.scale}.get(scale, 1.0)
        q_start = p.start(c, q_start) * (q / self.scale if scale == "intra alone" else q)
        k_end = p.end(c, end, padded) * k
        decay = p.total(c, total, padded)

        o, states = np.zeros(self.v.shape), self.states.copy()
        for n, sequence in enumerate(p.of_sequence):
            S = states[n]
            for m in sequence:
                rows, short = p.rows[m], tail if len(p.rows[m]) < C else None
                S = np.zeros_like(S) if short == "from zero" else S
                WS = W[m] @ S
                d_m = {None: U[m] - WS, "not corrected": U[m], "added": U[m] + WS}[d]
                y = P[m] @ (U[m] if intra == "U for d" else d_m) if intra != "missing" else 0
                written = {None: d_m, "U for d": U[m], "with beta": beta[m][..., None] * d_m}[write]
                after = decay[m][..., None] * S + k_end[m].swapaxes(1, 2) @ written
                if inter != "missing":
                    y = y + q_start[m] @ (after if inter == "state behind" else S)
                if short not in ("left out", "not in o"):
                    n_rows = len(rows) - (short == "last row not in o")
                    o[rows[:n_rows]] = y.swapaxes(0, 1)[:n_rows]
                S = S if short in ("left out", "not in the state") else after
            states[n] = S
        return o, states if self.ragged else states[0]

    def _pairs(self, C, early, of, sums, rows, blocks, columns, above):
        """<x_i, E_ij k_j> for j <= i, of x = q or k; where `above`, for all i and j."""
        if blocks is not None:
            return self._in_blocks(C, of, blocks)
        p = self._keep(_Parts, C, early)
        x, c = p.q if of == "q" else p.k, p.sums(sums)
        r, s = {"missing": (0 * c, 0 * c), "start": (c, 0 * c), "exclusive": (p.exclusive(c), c)}.get(rows, (c, c))
        if columns is not None:
            s = p.exclusive(c) if columns == "exclusive" else np.maximum(c, -columns)
        if max(-r.min(initial=0), -s.min(initial=0)) < FACTORS:
            y = (x * np.exp(r)) @ (p.k * np.exp(-s)).swapaxes(-1, -2)
            return y if above else np.tril(y)
        y = np.zeros((*c.shape[:-1], C))
        if above:
            _paired(y, x, p.k, r, s)
        else:
            _cut(y, x, p.k, r, s)
        return y

    def _in_blocks(self, C, of, blocks):
        """The same, made in blocks of 16 rows: what is between two blocks is zero, or that between two that are no
        neighbours is not decayed, or not by the gates of the blocks between them."""
        p, y = self._keep(_Parts, C, ""), self._keep(Chunks._pairs, C, "", of, None, None, None, None, False)
        i = np.arange(C) // BLOCKS
        if blocks == "forgotten":
            return np.where(i[:, None] == i, y, 0)
        r = s = 0 * p.c
        if blocks == "not by those between":
            before = np.concatenate([0 * p.c[..., :1, :], p.c], axis=2)
            r, s = p.c - before[..., i * BLOCKS, :], p.c - before[..., np.minimum((i + 1) * BLOCKS, C), :]
        far = (p.q if of == "q" else p.k) * np.exp(r) @ (p.k * np.exp(-s)).swapaxes(-1, -2)
        return np.where(i[:, None] > i + 1, far, y)

    def _inverse(self, C, early, sums, rows, blocks, columns, of_beta, inverse):
        """T = (I + L)^-1, or what is taken for it; the whole number n for the first n powers of its series."""
        beta, I = self._keep(_Parts, C, early).beta, np.eye(C)
        L = self._keep(Chunks._pairs, C, early, "k", sums, rows, blocks, columns, False)
        row, column = beta[..., :, None], beta[..., None, :]
        L = L * {"row": row, "column": column, "both": row * column, "missing": 1}[of_beta]
        L = L if inverse == "diagonal" else np.tril(L, -2 if inverse == "no neighbours" else -1)
        if not np.isfinite(L).all():
            return np.full(L.shape, np.nan)
        if isinstance(inverse, int):
            T = I + 0 * L
            for _ in range(inverse):
                T = I - L @ T
            return T
        if inverse == "not taken":
            return I + L
        T = np.linalg.inv(I - L if inverse == "sign" else I + L)
        return {"transposed": T.swapaxes(-1, -2), "no identity": T - I}.get(inverse, T)


class _Parts:
    """Rows of all chunks, [N, H, C, ..], zeros behind the end of a chunk that is not full."""

    def __init__(self, chunks, C, early):
        """`early`: which argument's rows begin one row early, behind a sequence's first chunk."""
        self.rows, self.of_sequence = [], []
        for a, b in zip(chunks.offsets, chunks.offsets[1:]):
            first = len(self.rows)
            self.rows += [np.arange(t, min(t + C, b)) for t in range(a, b, C)]
            self.of_sequence.append(range(first, len(self.rows)))
        index = np.full((len(self.rows), C), len(chunks.q))
        for i, rows in zip(index, self.rows):
            i[:len(rows)] = rows
        self.filling = (index == len(chunks.q))[:, None, :, None]
        moved = index - (~self.filling[:, 0, :, 0] & ~np.isin(index[:, :1], chunks.offsets))
        self.q, self.k, self.v, self.g, self.beta = (
            np.concatenate([a, np.zeros((1, *a.shape[1:]))])[moved if name == early else index].swapaxes(1, 2)
            for name, a in (("q", chunks.q), ("k", chunks.k), ("v", chunks.v), ("g", chunks.g), ("beta", chunks.beta)))
        self.c = np.cumsum(self.g, axis=2)

    def sums(self, how):
        """c, the sums of gates from the chunk's start; a number is the one below which they are held."""
        if how == "of the sequence":
            c = self.c.copy()
            for sequence in self.of_sequence:
                for m in sequence[1:]:
                    c[m] += c[m - 1][:, -1:]
            return c
        return self.c if how is None else self.exclusive(self.c) if how == "exclusive" else np.maximum(self.c, -how)

    def exclusive(self, c):
        """c without the row's own gate."""
        return c - self.g

    def start(self, c, how):
        """start_i."""
        return 1.0 if how == "missing" else np.exp(self.exclusive(c) if how == "exclusive" else c)

    def end(self, c, how, padded):
        """end_j."""
        if how == "missing":
            return 1.0
        if how == "start":
            return np.exp(c)
        last = self._last(c, how == "row before", padded)
        if how == "total":
            return np.exp(last)[..., None, :]
        to = last[..., None, :] - (self.exclusive(c) if how == "own gate" else c)
        return np.exp(np.where(self.filling, 0.0, to))

    def total(self, c, how, padded):
        """start of the chunk's last row."""
        last = self._last(c, how == "row before", padded)
        if how in ("missing", "lost"):
            return np.full(last.shape, float(how == "missing"))
        return np.exp({"twice": 2 * last, "first row": c[:, :, 0]}.get(how, last))

    def _last(self, c, before, padded):
        """c of the chunk's last row, or of the row before it; `padded`: rows of zeros are counted."""
        at = np.array([c.shape[2] if padded else len(rows) for rows in self.rows], int) - 1 - before
        return np.where(at[:, None, None] < 0, 0.0, c[np.arange(len(at)), :, at])


def _of_inverse(T, beta, power, x):
    """T Diag(beta) x, of a power of beta, or Diag(beta) T x where it is "behind T"."""
    return beta[..., None] * (T @ x) if power == "behind T" else (T * beta[..., None, :]**power) @ x


def _cut(y, x, k, r, s):
    """Fills the lower triangle of y with <x_i, exp(r_i - s_j) k_j>: what is below the middle by factors that are cut
    there, so that neither overflows, the two triangles in the same way."""
    n, b = y.shape[-1], y.shape[-1] // 2
    if n <= BLOCK:
        _paired(y, x, k, r, s)
        y[...] = np.tril(y)
        return
    low, high, m = np.s_[..., b:, :], np.s_[..., :b, :], s[..., b - 1:b, :]
    y[..., b:, :b] = (x[low] * np.exp(r[low] - m)) @ (k[high] * np.exp(m - s[high])).swapaxes(-1, -2)
    _cut(y[..., :b, :b], x[high], k[high], r[high], s[high])
    _cut(y[..., b:, b:], x[low], k[low], r[low], s[low])


def _paired(y, x, k, r, s):
    """Fills y with <x_i, exp(r_i - s_j) k_j>."""
    E = np.exp(r[..., :, None, :] - s[..., None, :, :])
    y[...] = ((E * k[..., None, :, :]) @ x[..., None])[..., 0]


def _differ(a, b):
    """Whether a change is more than rounding."""
    with np.errstate(all="ignore"):
        size = np.sqrt(np.mean(b * b)) if b.size else 0.0
        return bool((~(np.abs(a - b) <= VISIBLE * size) & ~((a == b) | np.isnan(b))).any())


# ---- faults of it --------------------------------------------------------------------------------------


class Chunked:
    """A fault's function: the chunked form with some of its terms wrong, in chunks of the choice.

    `any_length`: the length of chunks changes nothing.
    """

    def __init__(self, name, any_length):
        self.name, self.any_length = name, any_length

    def switches(self, chunk=None):
        """Of `kimi_linear.testing.delta_rule.mistaken`, for a choice."""
        return {"chunk": (self.name, chunk)}

    def __call__(self, call, chunk=None):
        if call.args.get("g") is not None and (call["g"] > 0).any():
            return None
        if not isinstance(call, Site):
            return call.run(by=lambda **args: Chunks(args).results(chunk, **TERMS[self.name]))
        if chunk is None and max(len(p.rows) for p in call.scene.pieces) > LONGEST:
            if not self.any_length:
                return None
            chunk = LONGEST
        return call.by_calls(lambda args: Chunks(args).results(chunk, **TERMS[self.name]))


AHEAD = ("P_above_diagonal", "inverse_transposed", "inter_of_next_state")
BLOCKWISE = f"blocks of {BLOCKS} in a chunk"
KDA = "arXiv:2510.26692, equations 2 to 9"
PADDED = "; short chunks are filled up with zeros"


#: Of borders between chunks: a chunk that no sequence fills has none.
OF_BORDERS = ("sums_not_begun_anew", "g_too_early", "k_too_early")
SHORT = (7, 15, 31)  # highest powers of L in products of 3, 4 and 5 factors; the last two show under equal keys alone
#: Name -> rows of the shortest chunk in which it is wrong.
SHOWS_FROM = {f"inverse_cut_{n}": n + 2 for n in SHORT}


def _gates():
    own = "the row's own gate is missing, an exclusive sum,"
    for name, padded, more in (("", False, ""), ("_padded", True, PADDED)):
        yield (f"sums_exclusive{name}", "in a chunk, the cumulative sum of gates is exclusive: each row's own is "
               f"missing{more}", dict(sums="exclusive", padded=padded))
        yield (f"total_too_early{name}", "between chunks, the state is decayed to the row before the chunk's end, not "
               f"to its last row{more}", dict(total="row before", padded=padded))
        yield (f"end_too_early{name}", "keys are decayed to the row before the chunk's end where they are written to "
               f"the state, not to its last row{more}", dict(end="row before", padded=padded))
        yield (f"last_row_too_early{name}", "the state and the keys written to it are decayed to the row before the "
               f"chunk's end, not to its last row{more}", dict(end="row before", total="row before", padded=padded))
    yield ("end_with_own_gate", "keys are decayed by their own gate, too, from their row to the chunk's end (end_j)",
           dict(end="own gate"))
    for name, of, terms in (
            ("start", "start, which decays q and k from the chunk's start (in o = S^T (start q) and in W)",
             dict(q_start="exclusive", k_start="exclusive")),
            ("q_start", "the decay of q from the chunk's start, in o = S^T (start q)", dict(q_start="exclusive")),
            ("k_start", "the decay of k from the chunk's start, in W = T Diag(beta) (start k)",
             dict(k_start="exclusive")),
            ("q", "the decay of q, in P and in o = S^T (start q)", dict(q_start="exclusive", P_rows="exclusive")),
            ("P", "the decay of the rows q_i of P", dict(P_rows="exclusive")),
            ("L", "the decay of the rows k_i of L", dict(L_rows="exclusive"))):
        yield f"{name}_exclusive", f"in a chunk, {own} from {of}", terms
    yield ("columns_exclusive", "in a chunk, an exclusive sum decays the columns k_j of L and P: by their own gate, "
           "too", dict(columns="exclusive"))
    for name, says, terms in (
            ("q_start", "q is not decayed from the chunk's start, in o = S^T (start q)", dict(q_start="missing")),
            ("k_start", "k is not decayed from the chunk's start, in W = T Diag(beta) (start k)",
             dict(k_start="missing")),
            ("start", "neither q nor k is decayed from the chunk's start (in o = S^T (start q) and in W)",
             dict(q_start="missing", k_start="missing")),
            ("P", "in a chunk, P has no decay between its rows", dict(P_rows="missing")),
            ("L", "in a chunk, L has no decay between its rows", dict(L_rows="missing")),
            ("L_and_P", "in a chunk, L and P have no decay between their rows",
             dict(P_rows="missing", L_rows="missing")),
            ("P_columns", "in a chunk, P is decayed by start_i in place of E_ij: its columns k_j are not",
             dict(P_rows="start")),
            ("L_columns", "in a chunk, L is decayed by start_i in place of E_ij: its columns k_j are not",
             dict(L_rows="start")),
            ("end", "keys are not decayed to the chunk's end where they are written to the state", dict(end="missing")),
            ("total", "between chunks, the state is not decayed", dict(total="missing"))):
        yield f"{name}_undecayed", says, terms
    yield "total_twice", "between chunks, the state is decayed twice", dict(total="twice")
    yield ("total_lost", "S is left out of its update: the state is what its last chunk wrote, though o reads S",
           dict(total="lost"))
    yield ("total_of_first_row", "between chunks, the state is decayed by the gate of the chunk's first row alone",
           dict(total="first row"))
    yield ("end_of_start", "keys are decayed by start_j in place of end_j where they are written to the state",
           dict(end="start"))
    yield ("end_of_total", "the state is decayed after the write, exp(c_last) (S + k^T d): keys by all of the chunk, "
           "not from their row on", dict(end="total"))
    yield ("sums_not_begun_anew", "the cumulative sum of gates goes on over the borders of chunks, where it must begin "
           "anew", dict(sums="of the sequence"))
    for name, what in (("g", "gates"), ("k", "keys")):
        yield (f"{name}_too_early", f"behind the first chunk, {what} are read one row early, that of the chunk before "
               "first", dict(early=name))
    for most in (20.0, 50.0, 80.0):
        yield (f"sums_clamped_{most:g}", f"in a chunk, the cumulative sum of gates is clamped at -{most:g}",
               dict(sums=most))
        yield (f"columns_clamped_{most:g}", "in a chunk, the exponent of exp(-c_j) k_j in L and P is clamped at "
               f"{most:g}", dict(columns=most))


def _betas():
    yield ("beta_on_columns", "in a chunk, L has beta of the column, beta_j for beta_i", dict(L_beta="column"))
    yield "beta_missing_in_L", "in a chunk, beta is missing in L", dict(L_beta="missing")
    yield "beta_missing_in_W", "in a chunk, beta is missing in W = T Diag(beta) (start k)", dict(W_beta=0)
    yield ("beta_missing_behind_T", "in a chunk, beta is missing behind the inverse: W = T (start k) and U = T v",
           dict(W_beta=0, U_beta=0))
    yield "beta_twice_in_W", "in a chunk, beta is applied twice in W = T Diag(beta) (start k)", dict(W_beta=2)
    yield "beta_twice_in_U", "in a chunk, beta is applied twice in U = T Diag(beta) v", dict(U_beta=2)
    yield "beta_twice_in_L", "in a chunk, L has beta of the row and of the column, beta_i beta_j", dict(L_beta="both")
    for name, terms, is_ in (
            ("W", dict(W_beta="behind T"), "W = Diag(beta) T (start k)"),
            ("U", dict(U_beta="behind T"), "U = Diag(beta) T v"),
            ("W_and_U", dict(W_beta="behind T", U_beta="behind T"), "W and U have Diag(beta) T")):
        yield (f"beta_behind_T_in_{name}",
               f"in a chunk, beta is on the other side of the inverse: {is_} for T Diag(beta)", terms)
    yield ("start_behind_T", "in a chunk, start is on the other side of the inverse: W = start (T Diag(beta) k) for "
           "T Diag(beta) (start k)", dict(k_start="behind T"))
    yield ("write_with_beta", "the state is written with beta once more, k^T (beta d) for k^T d",
           dict(write="with beta"))


def _inverses():
    yield "inverse_sign", "in a chunk, the sign of L is wrong: (I - L)^-1 for (I + L)^-1", dict(inverse="sign")
    yield "inverse_transposed", "in a chunk, the inverse (I + L)^-1 is transposed", dict(inverse="transposed")
    yield "inverse_not_taken", "in a chunk, I + L is used where its inverse belongs", dict(inverse="not taken")
    yield ("inverse_without_identity", "in a chunk, the identity is missing from (I + L)^-1: its diagonal is zero",
           dict(inverse="no identity"))
    yield ("L_with_diagonal", "in a chunk, L is not strictly lower: its diagonal is in the inverse (I + L)^-1",
           dict(inverse="diagonal"))
    for n, series in enumerate(("I", "I - L", "I - L + L^2", "I - L + L^2 - L^3")):
        says = "L is left out of the inverse" if n == 0 else "the inverse is a series cut short"
        yield f"inverse_cut_{n}", f"in a chunk, {says}: {series} for (I + L)^-1", dict(inverse=n)
    for n in SHORT:
        yield (f"inverse_cut_{n}", f"in a chunk, the inverse is a series cut short (by products, (I - L)(I + L^2)..., "
               f"one is missing): up to L^{n} for (I + L)^-1", dict(inverse=n))
    yield ("L_without_neighbours", "in a chunk, L is cut below its first subdiagonal: the row before is left out",
           dict(inverse="no neighbours"))


def _blocks():
    for name, terms, says in (
            ("forgotten", "forgotten", "what is between two blocks is zero"),
            ("undecayed", "not decayed", "blocks that are no neighbours have no decay"),
            ("decayed_by_own", "not by those between",
             "blocks that are no neighbours lack the decay of the blocks between them")):
        for what, of in (("L", "L (or its inverse)" if name == "forgotten" else "L"), ("P", "P"),
                         ("L_and_P", "L and P")):
            yield (f"blocks_{name}_in_{what}", f"in {of}, {says}, {BLOCKWISE}",
                   {f"{x}_blocks": terms for x in what.split("_and_")})


def _sums():
    yield ("P_above_diagonal", "in a chunk, P is not cut to its lower triangle: rows see later tokens",
           dict(above=True))
    yield "d_without_state", "the state is not subtracted from the values: d = U for U - W S", dict(d="not corrected")
    yield "d_sign", "what the state predicts is added to the values: d = U + W S for U - W S", dict(d="added")
    yield "o_of_U", "o has P U where P d belongs, d = U - W S", dict(intra="U for d")
    yield "write_of_U", "the state is written with U where d = U - W S belongs", dict(write="U for d")
    yield "inter_missing", "o lacks what it reads of the state before the chunk, S^T (start q)", dict(inter="missing")
    yield "intra_missing", "o lacks what it reads of its own chunk, P d", dict(intra="missing")
    yield ("inter_of_next_state", "o reads the state behind its chunk, where S^T (start q) is of that before it",
           dict(inter="state behind"))
    yield ("scale_in_inter_alone", "the scale is on what o reads of the state alone, S^T (start q), not on P",
           dict(scale="inter alone"))
    yield "scale_twice_in_intra", "the scale is on P twice, once on S^T (start q)", dict(scale="twice on P")
    yield "scale_in_intra_alone", "the scale is on P alone, not on S^T (start q)", dict(scale="intra alone")


def _tails():
    yield "tail_left_out", "the last chunk, which is not full, is left out", dict(tail="left out")
    yield "tail_not_in_o", "rows of o in the last chunk, which is not full, are zero", dict(tail="not in o")
    yield ("tail_without_last_row", "the last row of o in the last chunk, which is not full, is zero",
           dict(tail="last row not in o"))
    yield ("tail_not_in_state", "the last chunk, which is not full, is not written to the state",
           dict(tail="not in the state"))
    yield "tail_from_zero", "the last chunk, which is not full, begins with a state of zero", dict(tail="from zero")


def _lengths(name):
    """Of chunks, as choices: none is a chunk that no sequence fills, and all there is where length changes nothing."""
    if name in ("q_exclusive", "beta_twice_in_U", "L_with_diagonal", "tail_without_last_row"):
        return ((),)
    lengths = ((64,), (32,), (16,), (128,))[:3 if name == "total_too_early_padded" else 4]  # no case has it at 128
    rows = SHOWS_FROM.get(name, 2 * BLOCKS if "forgotten" in name else 3 * BLOCKS if "blocks" in name else 0)
    lengths = tuple(n for n in lengths if n[0] >= rows)
    return lengths if name.endswith("too_early_padded") or name in OF_BORDERS else ((), *lengths)


def _scenario(name, terms):
    """What the last chunk of a call does to the state is seen by the next call alone."""
    of_state = terms.get("padded") or terms.get("tail") in ("left out", "not in the state")
    return CHUNKS_SPLIT if of_state else STRONG if "clamped" in name else CHUNKS


_ALL = tuple(row for part in (_gates, _betas, _inverses, _blocks, _sums, _tails) for row in part())

#: What is wrong in the chunked form, by the name of the fault: switches of `Chunks.wrong`.
TERMS = {f"chunk_{name.lower()}": terms for name, _, terms in _ALL}

FAULTS = tuple(
    Fault(fault, says, ("delta_rule",), Chunked(fault, _lengths(name) == ((),)), _scenario(name, terms),
          choices=_lengths(name), source=KDA, each=f"{says}, chunks of {{}}",
          use=CALL if terms.get("inverse") in SHORT[1:] else BOTH, looks_ahead=name in AHEAD or "tail" in terms,
          rare=True)
    for fault, (name, says, terms) in zip(TERMS, _ALL, strict=True))
