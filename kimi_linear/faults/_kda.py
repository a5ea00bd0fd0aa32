"""Faults of KDA: convolution, norms of q and k, gate, write rate and the delta rule."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .. import reference
from . import scene as rules
from ._fault import FAINT, LONG, RESTORED, SEVERAL, SPLIT, STRONG, Fault, carried, changed, in_blocks
from .site import Site

LOG2E = np.log2(np.e)
BLOCKS = ((8,), (16,), (32,), (64,), (128,), (256,), (512,), (1024,), (2048,))

# ---- the delta rule, token by token ----------------------------------------------------------------
# S [H, K, V]; q, scaled, and k [H, K]; v [H, V]; a = exp(g) [H, K]; b [H]. A step gives the next S and o [H, V].


def read(S, x):
    """S^T x of each head."""
    return np.einsum("hkv,hk->hv", S, x)


def write(S, k, d):
    """S + k d^T of each head."""
    return S + k[:, :, None] * d[:, None, :]


def right(S, q, k, v, a, b):
    """The formula itself."""
    S = a[:, :, None] * S
    S = write(S, k, b[:, None] * (v - read(S, k)))
    return S, read(S, q)


def decay_after(S, q, k, v, a, b):
    S = write(S, k, b[:, None] * (v - read(S, k)))
    return a[:, :, None] * S, read(a[:, :, None] * S, q)


def decay_after_correction(S, q, k, v, a, b):
    S = write(a[:, :, None] * S, k, b[:, None] * (v - read(S, k)))
    return S, read(S, q)


def decay_of_columns(S, q, k, v, a, b):
    S = a[:, None, :] * S
    S = write(S, k, b[:, None] * (v - read(S, k)))
    return S, read(S, q)


def read_rows(S, q, k, v, a, b):
    S, _ = right(S, q, k, v, a, b)
    return S, read(S.swapaxes(1, 2), q)


def read_before(S, q, k, v, a, b):
    return right(S, q, k, v, a, b)[0], read(a[:, :, None] * S, q)


def no_correction(S, q, k, v, a, b):
    S = write(a[:, :, None] * S, k, b[:, None] * v)
    return S, read(S, q)


def half_beta(S, q, k, v, a, b):
    S = a[:, :, None] * S
    S = write(S, k, b[:, None] * v - read(S, k))
    return S, read(S, q)


def narrow_state(S, q, k, v, a, b):
    S, _ = right(S, q, k, v, a, b)
    S = S.astype(ml_dtypes.bfloat16).astype(np.float64)
    return S, read(S, q)


def recurrence(q, k, v, g, beta, *, step=right, offsets=None, turned_at=()) -> np.ndarray:
    """The outputs [T, H, V] of a step over all tokens; before those of `turned_at` the state is transposed."""
    o, a, scale = np.empty(v.shape), np.exp(g), q.shape[-1] ** -0.5
    for r in reference.sequences(len(q), offsets):
        S = np.zeros((*k.shape[1:], v.shape[-1]))
        for t in range(r.start, r.stop):
            S = S.swapaxes(1, 2) if t in turned_at else S
            S, o[t] = step(S, scale * q[t], k[t], v[t], a[t], beta[t])
    return o


def stepping(step, *, square=False):
    """The fault whose step is another; `square`: only where K = V."""
    def function(site: Site):
        q, k, v, g, beta = (site[a] for a in ("q", "k", "v", "g", "beta"))
        if square and k.shape[-1] != v.shape[-1]:
            return None
        return _over_branches(site, lambda rows, skip: recurrence(*(x[rows] for x in (q, k, v, g, beta)), step=step))

    return function


def _over_branches(site, run):
    """`run`(rows, rows of the past among them) for each branch, the results of its own rows in their places."""
    out = np.empty(site["v"].shape)
    for past, own in site.scene.branches():
        out[own] = run(np.concatenate([past, own]), len(past))[len(past):]
    return out


def turned_between_calls(site: Site):
    """The state is [V, K] where a call leaves it and [K, V] where the next takes it up."""
    q, k, v, g, beta = (site[a] for a in ("q", "k", "v", "g", "beta"))
    if k.shape[-1] != v.shape[-1]:
        return None
    begins = {int(p.rows[0]) for p in site.scene.pieces if not p.first and len(p.rows)}

    def run(rows, skip):
        turned = [t for t, row in enumerate(rows) if t and int(row) in begins]
        return recurrence(*(x[rows] for x in (q, k, v, g, beta)), turned_at=turned)

    return _over_branches(site, run)


def factored_chunks(site: Site, chunk: int):
    """Chunks with exp(c_i) exp(-c_j) in place of exp(c_i - c_j), in float32: the second factor overflows."""
    q, k, v, g, beta = (site[a].astype(np.float32) for a in ("q", "k", "v", "g", "beta"))
    if not (g.min(initial=0) < -88 / chunk):
        return None
    K = q.shape[-1]

    def run(rows, skip):
        S, o = np.zeros((q.shape[1], K, v.shape[-1]), np.float32), []
        for i in range(0, len(rows), chunk):
            r = rows[i:i + chunk]
            y, S = _factored(q[r] * np.float32(K ** -0.5), k[r], v[r], g[r], beta[r], S)
            o.append(y)
        return np.concatenate(o)

    return _over_branches(site, run)


def subtracted_chunks(site: Site, chunk: int):
    """Decays within a chunk as exp(c_i - c_j) of cumulative sums in float32: a strong decay takes their last bits."""
    q, k, v, g, beta = (site[a] for a in ("q", "k", "v", "g", "beta"))

    def run(rows, skip):
        S, o = np.zeros((q.shape[1], q.shape[-1], v.shape[-1])), []
        for i in range(0, len(rows), chunk):
            r = rows[i:i + chunk]
            c = np.cumsum(g[r], axis=0).astype(np.float32)
            y, S = _subtracted(q[r] * q.shape[-1] ** -0.5, k[r], v[r], c, beta[r], S)
            o.append(y)
        return np.concatenate(o)

    return _over_branches(site, run)


def _subtracted(q, k, v, c, beta, S):
    """A chunk's outputs and the state behind it; c [n, H, K] float32."""
    up, d, o = np.exp(c.astype(np.float64)), np.zeros_like(v), np.empty_like(v)
    for i in range(len(q)):
        E = np.exp((c[i] - c[:i + 1]).astype(np.float64))
        L = beta[i] * np.einsum("hk,jhk->jh", k[i], E[:i] * k[:i])
        d[i] = beta[i][:, None] * (v[i] - read(S, up[i] * k[i])) - np.einsum("jh,jhv->hv", L, d[:i])
        o[i] = read(S, up[i] * q[i]) + np.einsum("jh,jhv->hv", np.einsum("hk,jhk->jh", q[i], E * k[:i + 1]), d[:i + 1])
    return o, up[-1][:, :, None] * S + np.einsum("jhk,jhv->hkv", E * k, d)


def _factored(q, k, v, g, beta, S):
    c = np.cumsum(g, axis=0)
    up, down = np.exp(c), np.exp(-c)
    L = np.tril(np.einsum("ihk,jhk->hij", k * up, k * down), -1) * beta.T[:, :, None]
    P = np.tril(np.einsum("ihk,jhk->hij", q * up, k * down))
    d = np.zeros_like(v)
    for i in range(len(q)):
        d[i] = beta[i][:, None] * (v[i] - read(S, up[i] * k[i])) - np.einsum("hj,jhv->hv", L[:, i, :i], d[:i])
    o = np.einsum("ihk,hkv->ihv", q * up, S) + np.einsum("hij,jhv->ihv", P, d)
    return o, up[-1][:, :, None] * S + np.einsum("jhk,jhv->hkv", up[-1] * down * k, d)


# ---- convolution -----------------------------------------------------------------------------------


def delayed(site: Site, n: int):
    """Reads n tokens earlier (later, where n < 0) than it should."""
    x, T = site["x"], site.scene.T
    moved = np.zeros_like(x)
    for past, own in site.scene.branches():
        rows = np.concatenate([past, own])
        to, of = (rows[n:], rows[:-n]) if n > 0 else (rows[:n], rows[-n:])
        if len(rows) > abs(n):
            moved[to] = x[of]
    return site.run(x=moved) if T > abs(n) else None


def swapped_histories(site: Site, other: str):
    """Behind the start of a call lies the history of another of q, k and v."""
    own, x = site.node.tap[-6], site.sibling(f"kda.{other}_proj")
    if own == other or x is None or x.shape != site["x"].shape:
        return None
    return _between_calls(site, x)


def activated_history(site: Site):
    """The history holds outputs of the convolution, where its inputs belong."""
    y = site.run()
    return _between_calls(site, y)


def _between_calls(site, x):
    branches = [rules.Branch(np.concatenate([b.past, b.own])[:i], p.rows) for p, b, i in _starts(site.scene)]
    return site.run(branches=branches, past={"x": x})


def _starts(scene):
    """(piece, its branch, rows of the branch before it)."""
    for p in scene.pieces:
        for b in scene.branches():
            if len(p.rows) and p.rows[0] in b.own:
                yield p, b, len(b.past) + int(np.flatnonzero(b.own == p.rows[0])[0])


# ---- norms of q and k, gate --------------------------------------------------------------------------


def l2(outside):
    """x over a function of its length and eps."""
    def function(site, *choice):
        x = site["x"]
        length = np.sqrt((x * x).sum(-1, keepdims=True))
        return x / outside(length, *choice)

    return function


def a_log(site):
    return np.log(site["rate"])


def bounded(site: Site):
    if site["lower_bound"] is not None:
        return None
    return site.run(lower_bound=-5.0)


def no_softplus(site: Site):
    if site["lower_bound"] is not None:
        return None
    return -site["rate"][:, None] * (site["f"] + _bias(site))


def rate_inside(site: Site):
    return -reference.softplus(site["rate"][:, None] * (site["f"] + _bias(site)))


def _bias(site):
    return site["dt_bias"].reshape(site["f"].shape[1:])


def a_log_as_decay(site: Site):
    """g = exp(A_log) softplus(f + dt_bias), a growth."""
    return -site.run()


def clamped(site: Site, bound: float):
    if site.node.op == "delta_rule":
        return site.run(g=np.maximum(site["g"], bound))
    return np.maximum(site.run(), bound)


DELTA, CONV, GATE, L2 = ("delta_rule",), ("short_conv",), ("decay_gate",), ("l2_norm",)
KDA, FLA, GGML = "arXiv:2510.26692, equation 1", "flash-linear-attention", "llama.cpp"

FAULTS = (
    Fault("state_read_transposed", "the output reads the state by the wrong axis: S q for S^T q", DELTA,
          stepping(read_rows, square=True), source="ggml and MLX keep [V, K], flash-linear-attention [K, V]"),
    Fault("state_transposed_between_calls", "the state is left as [V, K] and taken up as [K, V]", DELTA,
          turned_between_calls, SPLIT, source="ggml and MLX keep [V, K], flash-linear-attention [K, V]"),
    Fault("decay_after_update", "the state decays after the update, not before", DELTA, stepping(decay_after),
          source=KDA),
    Fault("decay_after_correction", "v - S^T k is taken before the state decays", DELTA,
          stepping(decay_after_correction), source=KDA),
    Fault("decay_missing", "the state does not decay", DELTA, changed(g=lambda s: 0 * s["g"]), source=KDA),
    Fault("decay_in_log2", "exp2(g) for exp(g): the gate is in nats", DELTA, changed(g=lambda s: s["g"] / LOG2E),
          source=f"{FLA}: chunk kernels work in log2, after g log2(e)"),
    Fault("decay_scaled_to_log2", "exp(g log2(e)): scaled for exp2, then exp", DELTA,
          changed(g=lambda s: s["g"] * LOG2E), source=f"{FLA}: chunk kernels work in log2"),
    Fault("decay_on_value_axis", "the decay multiplies the columns of S, [K, V], not its rows", DELTA,
          stepping(decay_of_columns, square=True), source=KDA),
    Fault("decay_of_first_channel", "one decay for a head: that of its first channel", DELTA,
          changed(g=lambda s: np.broadcast_to(s["g"][..., :1], s["g"].shape)),
          source="arXiv:2412.06464 has a gate each head, arXiv:2510.26692 each channel"),
    Fault("decay_averaged", "one decay for a head: the mean of its channels'", DELTA,
          changed(g=lambda s: np.broadcast_to(s["g"].mean(-1, keepdims=True), s["g"].shape)),
          source="arXiv:2412.06464 has a gate each head, arXiv:2510.26692 each channel"),
    Fault("decay_clamped", "g is clamped from below", (*DELTA, *GATE), clamped, STRONG,
          choices=((-5.0,), (-20.0,)), source="a guard of chunked kernels; ggml's tests take g > -20"),
    Fault("chunk_overflow", "a chunk multiplies by exp(-c_j) alone, which overflows", DELTA, factored_chunks, STRONG,
          choices=((64,), (32,), (16,)), source="float32 exp overflows above 88.7"),
    Fault("chunk_decays_subtracted",
          "decays in a chunk are differences of float32 running sums: a strong decay makes the sums large, and small "
          "differences between them lose their last bits",
          DELTA, subtracted_chunks, STRONG, choices=((64,), (32,), (16,)),
          source="transformers and flash-linear-attention; arXiv:2510.26692, equations 2 to 9"),
    Fault("scale_missing", "q is not scaled by K^-1/2 (or scaled before its norm, which undoes it)", DELTA,
          changed(scale=lambda s: 1.0), source=f"{FLA}: l2 norm inside the kernel, then the scale"),
    Fault("scale_twice", "q is scaled by K^-1/2 twice", DELTA, changed(scale=lambda s: 1.0 / s["q"].shape[-1]),
          source=f"{FLA}: the kernel scales; so did the caller"),
    Fault("correction_missing", "S + k beta v^T: plain gated linear attention", DELTA, stepping(no_correction),
          source=KDA),
    Fault("beta_missing_in_update", "beta is taken as 1", DELTA, changed(beta=lambda s: np.ones_like(s["beta"])),
          source=KDA),
    Fault("beta_on_value_alone", "beta v - S^T k for beta (v - S^T k)", DELTA, stepping(half_beta), source=KDA),
    Fault("output_before_update", "the output reads the state before this token is written", DELTA,
          stepping(read_before), source=KDA),
    Fault("state_in_bfloat16", "the state is rounded to bfloat16 after every token", DELTA, stepping(narrow_state),
          source="vLLM makes the state's type configurable; flash-linear-attention asks for float32"),
    Fault("state_lost_between_calls", "every call begins with an empty state", (*DELTA, *CONV, "latent_attention"),
          carried(rules.lost), SPLIT, source="a port's prefill in batches"),
    Fault("state_lost_between_blocks", "every block of a call begins with an empty state",
          (*DELTA, *CONV, "latent_attention"), in_blocks, LONG, choices=BLOCKS, source=f"{GGML}: ubatch boundaries"),
    Fault("state_leaks_between_sequences", "a sequence begins with the state of the one before it",
          (*DELTA, *CONV, "latent_attention"), carried(rules.leaked), SEVERAL, source="packed batches without offsets"),
    Fault("state_not_rolled_back", "truncate leaves the state as it was", (*DELTA, *CONV, "latent_attention"),
          carried(rules.not_rolled_back), RESTORED, source=f"{GGML}: recurrent memory cannot drop single tokens"),
    Fault("snapshot_without_state", "what is put back lacks this op's state (a snapshot without conv history)",
          (*DELTA, *CONV), carried(rules.empty_after_restore), RESTORED, source="prompt caches of servers"),
    Fault("conv_taps_reversed", "the last tap is put on the oldest token", CONV, changed(w=lambda s: s["w"][:, ::-1]),
          source="torch's conv1d correlates; a convolution by the book turns the taps round"),
    Fault("conv_off_by_one", "the convolution reads one token too early, or too late", CONV, delayed,
          choices=((1,), (-1,)), source="a padding of W in place of W - 1"),
    Fault("conv_silu_missing", "no SiLU after the convolution", CONV, changed(activation=lambda s: None),
          source="arXiv:2510.26692, section 4"),
    Fault("conv_silu_twice", "SiLU after the convolution, and once more", CONV, lambda s: reference.silu(s.run()),
          source="fused kernels have the activation inside"),
    Fault("conv_histories_swapped", "the history of another of q, k and v is taken up", CONV, swapped_histories, SPLIT,
          choices=(("q",), ("k",), ("v",)), source=f"{GGML}: one buffer [q|k|v] for the three histories"),
    Fault("conv_history_of_outputs", "the history holds outputs, where inputs belong", CONV, activated_history, SPLIT,
          source="arXiv:2510.26692, section 4"),
    Fault("l2_missing", "q or k is not normalised", L2, lambda s: s["x"], source=f"{FLA}: use_qk_l2norm_in_kernel"),
    Fault("l2_eps_outside", "x / (|x| + eps): eps is added to the length, not to its square", L2,
          l2(lambda n, eps: n + eps), FAINT, choices=((1e-6,), (1e-5,)), source=FLA),
    Fault("l2_eps_as_floor", "x / max(|x|, eps)", L2, l2(lambda n, eps: np.maximum(n, eps)), FAINT,
          choices=((1e-5,), (1e-6,), (1e-12,)), source=f"{GGML}: ggml_l2_norm; torch's F.normalize"),
    Fault("l2_eps_on_mean", "an RMS norm rescaled: eps on the mean of squares, not on their sum", L2,
          lambda s: s.run(eps=1e-6 * s["x"].shape[-1]), FAINT, source="MLX"),
    Fault("l2_eps_other", "another eps than 1e-6 under the root of the sum", L2, lambda s, eps: s.run(eps=eps), FAINT,
          choices=((1e-5,), (1e-8,)), source=f"{GGML}: rms_norm_eps is passed for it"),
    Fault("dt_bias_twice", "dt_bias is added twice", GATE, changed(dt_bias=lambda s: 2 * s["dt_bias"]),
          source=f"{FLA}: the kernel adds it; so did the caller"),
    Fault("dt_bias_missing", "dt_bias is not added", GATE, changed(dt_bias=lambda s: 0 * s["dt_bias"]), source=FLA),
    Fault("a_log_raw", "A_log is used in place of exp(A_log)", GATE, changed(rate=a_log),
          source=f"{GGML}: the converter stores -exp(A_log)"),
    Fault("a_log_without_minus", "exp(A_log) softplus(...) without the minus: the state grows", GATE, a_log_as_decay,
          source=f"{GGML}: the converter stores -exp(A_log)"),
    Fault("softplus_missing", "-rate (f + dt_bias)", GATE, no_softplus, source=KDA),
    Fault("softplus_of_product", "-softplus(rate (f + dt_bias))", GATE, rate_inside, source=KDA),
    Fault("gate_bounded", "the bounded gate, -5 sigmoid(rate (f + dt_bias)), for the unbounded one", GATE, bounded,
          source=f"{FLA}: lower_bound, which Kimi K3 uses"),
    Fault("gate_exponentiated", "exp(g) is handed on where g belongs", GATE, lambda s: np.exp(s.run()),
          source="kernels differ in which of the two they take"),
    Fault("beta_without_sigmoid", "b is handed on as beta", ("sigmoid",), lambda s: s["x"],
          source=f"{FLA}: kernels take beta, or b, by a flag"),
    Fault("beta_doubled", "2 sigmoid(b)", ("sigmoid",), lambda s: 2 * s.run(), source=f"{FLA}: allow_neg_eigval"),
)
