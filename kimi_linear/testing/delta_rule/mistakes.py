"""Mistakes in `delta_rule`, each a switch of one float64 recurrence; and what NaN say of a chunked kernel."""

import numpy as np

from ...reference_delta import key_heads, with_triangles
from ..spec import Explanation

__all__ = ["EXPLANATIONS", "diagnose", "mistaken"]

SWAPPED = "the final state equals ours with K and V swapped"
LARGEST_EXPONENT = 88.72  # of exp in float32
LOSSY = 20.0  # nats: a float32 sum of gates beyond is rounded by more than a budget allows


# ---- the recurrence with its mistakes ------------------------------------------------------------------


def mistaken(x, *, l2=None, heads=None, scale=None, gate=None, axis=None, beta=None, order=None, read=None,
             initial=None, final=None, border=None, padding=None, ragged=None, sums=None):
    """`reference.delta_rule` with mistakes, all None: none; gives None where a mistake does nothing here."""
    q, k, v, b = (np.asarray(x[n], np.float64) for n in ("q", "k", "v", "beta"))
    (T, Hk, K), (Hv, V) = q.shape, v.shape[1:]
    if not _acts(x, l2_norm=l2, heads=heads, g=gate, sums=sums, axis=axis, initial_state=initial, offsets=ragged,
                 scale=scale, rest=final or beta or order or read or border or padding):
        return None
    if x.get("l2_norm"):
        q, k = _norms(q, k, l2, x.get("l2_eps", 1e-6))
    kinds = {"grouped": "tiled", "tiled": "grouped"}
    given = x.get("head_map", "grouped")
    index = key_heads(Hk, Hv, kinds[given] if heads == "other" else given)
    q, k = _scales(q[:, index], k[:, index], K**-0.5 if x.get("scale") is None else x["scale"], V, scale)
    g = np.zeros((T, Hv)) if x.get("g") is None else np.asarray(x["g"], np.float64)
    g = np.broadcast_to(g[..., None] if g.ndim == 2 else g, (T, Hv, K))
    b, b_read = _betas(b, beta)

    offsets = [0, T] if x.get("offsets") is None else [int(n) for n in x["offsets"]]
    shape = (len(offsets) - 1, Hv, K, V)
    S0 = np.zeros(shape)
    if x.get("initial_state") is not None and initial != "ignored":
        S0 = np.asarray(x["initial_state"], np.float64).reshape(shape)
    if initial == "swapped" and K == V:
        S0 = S0.swapaxes(-1, -2)
    o, states, S = np.zeros((T, Hv, V)), np.zeros(shape), None
    for n, (first, last) in enumerate(zip(offsets, offsets[1:])):
        S = S0[n] if ragged is None or n == 0 else S
        rows = [a[first:last] for a in (q, k, v, g, b, b_read)]
        if sums:
            o[first:last], S = _by_sums(*rows[:5], S, sums)
            states[n] = S
        else:
            o[first:last], S, states[n] = _sequence(*rows, S, gate, axis, order, read, final, border, padding)
    if final == "swapped":
        states = states.swapaxes(-1, -2)
    return o, states if x.get("offsets") is not None else states[0]


def _acts(x, **switches):
    """True where one of the switches that are on has something to act on, or none is on."""
    (Hk, K), (Hv, V) = x["q"].shape[1:], x["v"].shape[1:]
    g = x.get("g")
    can = {"scale": switches.get("scale") != "of V" or K != V, "heads": Hk not in (1, Hv),
           "axis": K == V and g is not None and g.ndim == 3, "rest": True,
           "sums": g is not None and g.size and -np.nansum(g, axis=0).min() > LOSSY}
    on = [name for name, value in switches.items() if value]
    return not on or any(can.get(name, x.get(name) is not None and x.get(name) is not False) for name in on)


def _norms(q, k, l2, eps):
    def norm(a):
        s = (a * a).sum(-1, keepdims=True)
        forms = {
            None: np.sqrt(s + eps), "outside": np.sqrt(s) + eps, "max": np.maximum(np.sqrt(s), eps),
            "max 1e-5": np.maximum(np.sqrt(s), 1e-5), "max squares": np.sqrt(np.maximum(s, eps)),
            "mean": np.sqrt(s + a.shape[-1] * eps), "none": np.sqrt(s), "1e-5": np.sqrt(s + 1e-5),
            "1e-12": np.sqrt(s + 1e-12),
            "overflow": np.where(s > np.finfo(np.float32).max, np.inf, np.sqrt(s + eps))}
        return a / forms[l2]

    if l2 == "missing":
        return q, k
    if l2 in ("of q alone", "of k alone"):
        only, l2 = l2, None
        return (norm(q), k) if "q" in only else (q, norm(k))
    return norm(q), norm(k)


def _scales(q, k, s, V, mistake):
    on_q = {None: s, "missing": 1.0, "twice": s * s, "on k": 1.0, "on both": s, "of V": V**-0.5,
            "inverse": 1 / s if s else s}
    return q * on_q[mistake], k * (s if mistake in ("on k", "on both") else 1.0)


def _betas(b, mistake):
    """beta of the value, and of what is read back."""
    if mistake == "on the read alone":
        return np.ones_like(b), b
    if mistake == "on v alone":
        return b, np.ones_like(b)
    made = {None: b, "missing": np.ones_like(b), "sigmoid": 1 / (1 + np.exp(-b)), "squared": b * b, "doubled": 2 * b,
            "halved": b / 2}[mistake]
    return made, made


def _decays(g, gate):
    """exp(g) [T, H, K] as it should be, or with a mistake."""
    if isinstance(gate, tuple):
        return np.exp(np.maximum(g, gate[1]))
    if gate in ("next", "previous"):
        moved = np.zeros_like(g)
        if gate == "next":
            moved[:-1] = g[1:]
        else:
            moved[1:] = g[:-1]
        return np.exp(moved)
    forms = {
        None: np.exp, "missing": np.ones_like, "log2": np.exp2, "log2e": lambda g: np.exp(g / np.log(2)),
        "exp twice": lambda g: np.exp(np.exp(g)), "as it is": lambda g: g, "sign": lambda g: np.exp(-g),
        "one channel": lambda g: np.exp(g[..., :1]), "mean": lambda g: np.exp(g.mean(-1, keepdims=True)),
        "twice": lambda g: np.exp(2 * g)}
    return np.broadcast_to(forms[gate](g), g.shape)


def _sequence(q, k, v, g, b, b_read, S, gate, axis, order, read, final, border, padding):
    """One sequence: o, the state to go on with, and the state returned."""
    a, S, o = _decays(g, gate), S.copy(), np.zeros(v.shape)
    kind, C = border or (None, len(q) + 1)
    before = S
    for t in range(len(q)):
        before, at = S, t % C
        decay = a[t][:, None, :] if axis == "value" and a.shape[2] == v.shape[2] else a[t][:, :, None]
        if kind == "no first gate" and at == 0 and t or kind == "no last gate" and at == C - 1:
            decay = 1.0
        if kind == "reset" and at == 0 and t:
            S = np.zeros_like(S)
        old = S
        S = S if order == "update, then decay" else decay * S
        seen = old if order == "reads the undecayed state" else S
        d = b[t][:, None] * v[t] - b_read[t][:, None] * np.einsum("hkv,hk->hv", seen, k[t])
        written = S + k[t][:, :, None] * d[:, None, :]
        if order == "update, then decay":
            written = decay * written
        source = {None: written, "before": old, "decayed": S}[read]
        o[t] = np.einsum("hkv,hk->hv", source, q[t])
        S = S if kind == "no last write" and at == C - 1 else written
    end = S
    if padding and len(q):
        end = _padded(k[-1], v[-1], a[-1], b[-1], S, padding[0], -len(q) % padding[1])
    returned = {None: end, "swapped": end, "before the last": before}[final]
    return o, end, returned


def _padded(k, v, a, b, S, kind, rows):
    for _ in range(rows):
        S = a[:, :, None] * S
        if kind == "repeats the last token":
            d = b[:, None] * (v - np.einsum("hkv,hk->hv", S, k))
            S = S + k[:, :, None] * d[:, None, :]
    return S


def _by_sums(q, k, v, g, b, S, how):
    """The textbook chunk with sums of g in float32, which it subtracts: rounded at each step, or once at the end."""
    rounded, C = how
    o, S = np.zeros(v.shape), S.copy()
    for t in range(0, len(q), C):
        p = slice(t, min(t + C, len(q)))
        c = np.cumsum(g[p].astype(np.float32), axis=0, dtype=np.float32 if rounded == "each" else np.float64)
        c, n = c.astype(np.float32), p.stop - t
        L, P = np.zeros((2, g.shape[1], n, n))
        for i in range(n):
            to = np.exp(np.float64(c[i] - c[:i + 1])) * k[p][:i + 1]
            L[:, i, :i] = b[p][i][:, None] * np.einsum("hk,jhk->hj", k[p][i], to[:i])
            P[:, i, :i + 1] = np.einsum("hk,jhk->hj", q[p][i], to)
        ends = np.exp(np.float64(c)), np.exp(np.float64(c[-1] - c))
        o[p], S = with_triangles(q[p], k[p], v[p], b[p], S, L, P, *ends)
    return o, S


# ---- what is tried -------------------------------------------------------------------------------------


def _mistake(says, *, alone=False, **switches):
    return Explanation(says, tuple(switches.items()), alone)


def _all():
    yield _mistake(SWAPPED, final="swapped")
    yield _mistake("the state lies as [V, K]: initial and final state have K and V swapped", initial="swapped",
                   final="swapped")
    yield _mistake("the initial state is read with K and V swapped", initial="swapped")
    yield _mistake("the initial state is ignored: nothing is carried", initial="ignored")
    yield _mistake("the final state is that before the last token", final="before the last")
    yield _mistake("the scale is missing", scale="missing")
    yield _mistake("the scale is applied twice", scale="twice")
    yield _mistake("the scale is on k instead of q", scale="on k")
    yield _mistake("the scale is on k as well as q", scale="on both")
    yield _mistake("the scale is V ** -0.5 instead of K ** -0.5", scale="of V")
    yield _mistake("the scale divides", scale="inverse")
    yield from _orders()
    yield from _gates()
    yield from _betas_and_norms()
    yield _mistake("key heads are found the other way: grouped (h // G) for tiled (h % Hk), or the reverse",
                   heads="other")
    yield _mistake("sequences run into each other: the state is not begun anew at an offset", ragged="one")
    yield from _chunks()


def _orders():
    yield _mistake("the update comes before the decay", order="update, then decay")
    yield _mistake("the prediction reads the state before its decay", order="reads the undecayed state")
    yield _mistake("the output is read before the decay and the update", read="before")
    yield _mistake("the output is read before the update", read="decayed")


def _gates():
    yield _mistake("the decay is missing", gate="missing")
    yield _mistake("the gate is taken as log2: 2 ** g", gate="log2")
    yield _mistake("the gate is multiplied by log2(e), then exp instead of exp2", gate="log2e")
    yield _mistake("exp is taken twice of the gate", gate="exp twice")
    yield _mistake("the gate is used as the decay, without exp", gate="as it is")
    yield _mistake("the gate has the wrong sign: exp(-g)", gate="sign")
    yield _mistake("the decay is applied twice", gate="twice")
    for bound in (-5, -10, -20, -30, -50, -80):
        yield _mistake(f"the gate is clamped at {bound}", gate=("clamp", bound))
    yield _mistake("each token has the gate of the next", gate="next")
    yield _mistake("each token has the gate of the one before", gate="previous")
    yield _mistake("all channels have the gate of the first", gate="one channel")
    yield _mistake("all channels have the mean gate of their head", gate="mean")
    yield _mistake("the decay is along the values instead of the keys", axis="value")


def _betas_and_norms():
    yield _mistake("beta is missing", beta="missing")
    yield _mistake("beta goes through a sigmoid again", beta="sigmoid")
    yield _mistake("beta is on what is read back alone (on k), not on v", beta="on the read alone")
    yield _mistake("beta is on v alone, not on what is read back", beta="on v alone")
    yield _mistake("beta is applied twice", beta="squared")
    yield _mistake("beta is doubled", beta="doubled")
    yield _mistake("beta is halved", beta="halved")
    yield _mistake("the l2 norm is missing", l2="missing")
    yield _mistake("the l2 norm is of q alone", l2="of q alone")
    yield _mistake("the l2 norm is of k alone", l2="of k alone")
    yield _mistake("the l2 norm has eps outside of the root: x / (sqrt(sum) + eps)", l2="outside")
    yield _mistake("the l2 norm is x / max(sqrt(sum), eps)", l2="max")
    yield _mistake("the l2 norm is x / max(sqrt(sum), 1e-5)", l2="max 1e-5")
    yield _mistake("the l2 norm is x / sqrt(max(sum, eps))", l2="max squares")
    yield _mistake("the l2 norm has eps on the mean of squares instead of the sum", l2="mean")
    yield _mistake("the l2 norm has no eps", l2="none")
    yield _mistake("the l2 norm has eps 1e-5 instead of 1e-6", l2="1e-5")
    yield _mistake("the l2 norm has eps 1e-12 instead of 1e-6", l2="1e-12")
    yield _mistake("the sum of squares of the l2 norm overflows float32", l2="overflow")


def _chunks():
    for C in (64, 32, 16):
        where = f"chunks of {C}"
        yield _mistake(f"the state is lost at the border of {where}", alone=True, border=("reset", C))
        yield _mistake(f"the first gate of each chunk is left out, {where}", alone=True, border=("no first gate", C))
        yield _mistake(f"the last gate of each chunk is left out, {where}", alone=True, border=("no last gate", C))
        yield _mistake(f"the last token of each chunk is not written, {where}", alone=True, border=("no last write", C))
        yield _mistake(f"padding repeats the last token and reaches the state, {where}",
                       alone=True, padding=("repeats the last token", C))
        yield _mistake(f"padding goes on decaying the state by the last gate, {where}", alone=True,
                       padding=("decays", C))
        for rounded in ("each", "once"):
            yield _mistake(f"decays are formed by subtracting float32 sums of g over {where}: digits are lost after a "
                           f"strong gate", alone=True, sums=(rounded, C))


EXPLANATIONS = tuple(_all())


# ---- not finite ----------------------------------------------------------------------------------------


def diagnose(x, actual, ref):
    """Of which token and exponent a chunked kernel's NaN may come: [(sentence, place), ...], the likeliest first.

    In a chunk, exp(c_i) exp(-c_j), c the running sum of g, overflows in float32 where -c_j > 88.7; and c_i - c_j is NaN
    where both are -infinity.
    """
    if any(np.isnan(a).any() for a in x.values() if isinstance(a, np.ndarray) and a.dtype.kind == "f"):
        return [("NaN of one token reaches others: those before it, or those that do not read it", "")]
    bad = np.argwhere(~np.isfinite(actual[0]) & np.isfinite(ref[0]))
    if x.get("g") is None or not len(bad):
        return []
    token, head = (int(i) for i in bad[0][:2])
    offsets = [0, len(x["q"])] if x.get("offsets") is None else [int(n) for n in x["offsets"]]
    first = max(n for n in offsets[:-1] if n <= token)
    last = min(n for n in offsets[1:] if n > token)
    g = np.asarray(x["g"], np.float64)[first:last, head].reshape(last - first, -1)
    return [found for kind in (_infinite, _overflown) if (found := _nearest(kind, g, token - first))]


def _nearest(kind, g, token):
    """(sentence, place) for the chunk length whose first row of a kind is nearest to the first bad token, or None."""
    found = []
    for C in (64, 32, 16):
        n, row = divmod(token, C)
        at, says, what = kind(g[n * C:(n + 1) * C])
        if at is not None:
            found.append((abs(at - row) + (at > row), says, f"{what}chunk {n}, row {at}, chunks of {C}"))
    return min(found, key=lambda f: f[0])[1:] if found else None


def _infinite(g):
    """(first row with a gate of -infinity or None, sentence, what)."""
    rows = np.isneginf(g).any(-1)
    says = "NaN from -infinity minus -infinity, sums of g that are subtracted"
    return int(rows.argmax()) if rows.any() else None, says, ""


def _overflown(g):
    """(first row whose sum is below -88.7 or None, sentence, what)."""
    c = np.cumsum(np.where(np.isneginf(g), 0.0, g), axis=0).min(-1)
    at = int((-c > LARGEST_EXPONENT).argmax())
    if -c[at] <= LARGEST_EXPONENT:
        return None, "", ""
    return at, "NaN from a positive exponent", f"exp({-c[at]:.0f}) where float32 ends at exp(88.7), "
