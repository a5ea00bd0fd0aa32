"""Faults of the delta rule: one float64 recurrence with a switch for each, and the list of them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ..reference_delta import decays, key_heads
from . import _l2
from ._fault import BOTH, CALL, CHUNKS, CHUNKS_SPLIT, STRONG, WHOLE, Fault
from .site import Call, Site

__all__ = ["FAULTS", "Switched", "acts", "that_act", "wrong"]

LOG2_E = np.float32(np.log2(np.e))
LOSSY = 20.0  # nats: a float32 sum of gates beyond is rounded by more than a budget allows

# ---- the recurrence with its faults --------------------------------------------------------------------


def wrong(x, *, l2=None, heads=None, scale=None, gate=None, axis=None, beta=None, order=None, read=None, stored=None,
          initial=None, final=None, border=None, padding=None, ragged=None, sums=None, turned=None, exchanged=None,
          rolled=None, backwards=None, inputs=None, results=None):
    """`reference.delta_rule` of the arguments `x` with faults, all None: none. Takes gates above 0, too."""
    q, k, v, b = (np.asarray(x[n], np.float64) for n in ("q", "k", "v", "beta"))
    q, k, v = (_rounded(a, inputs) for a in ((k, q, v) if exchanged else (q, k, v)))
    (T, Hk, K), (Hv, V) = q.shape, v.shape[1:]
    if x.get("l2_norm"):
        q, k = _norms(q, k, l2, x.get("l2_eps", 1e-6))
    kinds = {"grouped": "tiled", "tiled": "grouped"}
    given = x.get("head_map", "grouped")
    index = key_heads(Hk, Hv, kinds[given] if heads == "other" else given)
    q, k = _scales(q[:, index], k[:, index], K**-0.5 if x.get("scale") is None else x["scale"], V, scale)
    g = np.zeros((T, Hv)) if x.get("g") is None else np.asarray(x["g"], np.float64)
    g = np.broadcast_to(g[..., None] if g.ndim == 2 else g, (T, Hv, K))
    q, k, v, g, b = _rolled(q, k, v, g, b, index, *rolled or ())
    b, b_read = _betas(b, beta)

    offsets = [0, T] if x.get("offsets") is None else [int(n) for n in x["offsets"]]
    shape = (len(offsets) - 1, Hv, K, V)
    S0 = np.zeros(shape)
    if x.get("initial_state") is not None and initial != "ignored":
        S0 = np.asarray(x["initial_state"], np.float64).reshape(shape)
    if initial in ("next", "one before"):
        S0 = np.roll(S0, -1 if initial == "next" else 1, axis=0)
    if initial == "first head":
        S0 = np.broadcast_to(S0[:, :1], shape)
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
            o[first:last], S, states[n] = _sequence(*rows, S, gate, axis, order, read, stored, final, border,
                                                            padding, turned)
    if final == "swapped":
        states = states.swapaxes(-1, -2)
    if final == "zero":
        states[np.diff(offsets) == 0] = 0
    if final in ("next", "one before"):
        states = np.roll(states, -1 if final == "next" else 1, axis=0)
    if backwards:
        o, states = o[:, ::-1], states if backwards == "o" else states[:, ::-1]
    o, states = _rounded(o, results), _rounded(states, results)
    return o, states if x.get("offsets") is not None else states[0]


def _rolled(q, k, v, g, b, key_head, what=None, whose=""):
    """The arguments, each head's gates or another of them taken from another head."""
    H = np.arange(len(key_head))
    index = {"next": np.roll(H, -1), "one before": np.roll(H, 1), "first": 0 * H}.get(whose, key_head)
    names = "key head", "key head", "values", "gates", "beta"
    return [a[:, index] if name == what else a for a, name in zip((q, k, v, g, b), names)]


def _rounded(x, kind):
    """x as a narrower type has it, in float64; x itself for None."""
    return x if kind is None else x.astype(getattr(ml_dtypes, kind, kind)).astype(np.float64)


ACTS_ON = {"l2": "l2_norm", "gate": "g", "axis": "g", "sums": "g", "initial": "initial_state", "ragged": "offsets"}


def acts(x, **switches):
    """True where one of the switches that are on has something to act on, or none is on."""
    return not any(switches.values()) or bool(that_act(x, **switches))


def that_act(x, **switches):
    """The switches that are on and have something to act on."""
    return {name: value for name, value in switches.items() if value and _acts(x, name, value)}


def _acts(x, name, value):
    (Hk, K), (Hv, V) = x["q"].shape[1:], x["v"].shape[1:]
    given = x.get(ACTS_ON.get(name))
    if name in ACTS_ON and (given is None or given is False):
        return False
    if name in ("border", "padding"):
        return _of_chunks(x, *value)
    if name == "sums":
        return given.size > 0 and -np.nansum(given, axis=0).min() > LOSSY
    if (name, value) in (("scale", "of V"), ("heads", "other")):
        return K != V if name == "scale" else Hk not in (1, Hv)
    if (name, value) == ("final", "zero"):
        return x.get("initial_state") is not None and \
            not np.diff([0, len(x["q"])] if x.get("offsets") is None else x["offsets"]).all()
    if name == "backwards" or value == "first head":
        return Hv > 1
    if value in ("next", "one before") and name in ("initial", "final"):
        return x.get("offsets") is not None and len(x["offsets"]) > 2
    if name == "rolled":
        least = Hk if value[1] not in NEIGHBOURS else 1
        return Hv > least and (value[0] != "gates" or x.get("g") is not None) and (value[0] != "key head" or Hk > 1)
    if value in ("one channel", "mean", "reversed", "without last channel"):
        return given.ndim == 3
    if name == "axis":
        return K == V and given.ndim == 3
    return value != "rows" or K == V


def _of_chunks(x, kind, C):
    """Whether a sequence has a row at which a fault of chunks of C acts."""
    lengths = np.diff([0, len(x["q"])] if x.get("offsets") is None else x["offsets"])
    if kind in ("repeats the last token", "decays"):
        return bool((lengths % C).any())
    return bool((lengths >= C + (kind in ("reset", "no first gate"))).any())


def _norms(q, k, l2, eps):
    """q and k normed; `l2` is a fault of that op and its choice, or of which of the two it is left out."""
    if l2 in ("of q alone", "of k alone"):
        q_normed, k_normed = _norms(q, k, None, eps)
        return (q_normed, k) if "q" in l2 else (q, k_normed)
    function, choice = (Call.run, ()) if l2 is None else (_l2.BY_NAME[l2[0]].function, l2[1])
    return tuple(function(Call("l2_norm", {"x": a, "eps": eps}), *choice) for a in (q, k))


def _scales(q, k, s, V, fault):
    on_q = {None: s, "missing": 1.0, "twice": s * s, "on k": 1.0, "on both": s, "of V": V**-0.5,
            "inverse": 1 / s if s else s}
    return q * on_q[fault], k * (s if fault in ("on k", "on both") else 1.0)


def _betas(b, fault):
    """beta of the value, and of what is read back."""
    if fault == "on the read alone":
        return np.ones_like(b), b
    if fault == "on v alone":
        return b, np.ones_like(b)
    if fault == "without correction":
        return b, np.zeros_like(b)
    made = {None: b, "missing": np.ones_like(b), "sigmoid": 1 / (1 + np.exp(-b)), "squared": b * b, "doubled": 2 * b,
            "halved": b / 2}[fault]
    return made, made


def _decays(g, gate):
    """exp(g) [T, H, K] as it should be, or with a fault."""
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
        "reversed": lambda g: np.exp(g[..., ::-1]),
        "without last channel": lambda g: np.exp(np.where(np.arange(g.shape[2]) == g.shape[2] - 1, 0.0, g)),
        "twice": lambda g: np.exp(2 * g)}
    return np.broadcast_to(forms[gate](g), g.shape)


def _sequence(q, k, v, g, b, b_read, S, gate, axis, order, read, stored, final, border, padding, turned):
    """One sequence: o, the state to go on with, and the state returned."""
    a, S, o = _decays(g, gate), S.copy(), np.zeros(v.shape)
    kind, C = border or (None, len(q) + 1)
    before = S
    for t in range(len(q)):
        S = _reread(S, turned[t]) if turned and t in turned else S
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
        if stored is not None:
            written = written.astype(getattr(ml_dtypes, stored)).astype(np.float64)
        source = {None: written, "before": old, "decayed": S, "rows": written.swapaxes(1, 2)}[read]
        o[t] = np.einsum("hkv,hk->hv", source, q[t])
        S = S if kind == "no last write" and at == C - 1 else written
        if kind == "bfloat16" and at == C - 1:
            S = S.astype(ml_dtypes.bfloat16).astype(np.float64)
    end = S
    if padding and len(q):
        end = _padded(k[-1], v[-1], a[-1], b[-1], S, padding[0], -len(q) % padding[1])
    return o, end, before if final == "before the last" else end


def _reread(S, which):
    """The memory of a state [K, V] taken for [V, K], or left as [V, K] and taken for [K, V]; of K = V the same."""
    H, K, V = S.shape
    return S.swapaxes(1, 2).reshape(S.shape) if which == "left" else S.reshape(H, V, K).swapaxes(1, 2)


def _padded(k, v, a, b, S, kind, rows):
    for _ in range(rows):
        S = a[:, :, None] * S
        if kind == "repeats the last token":
            d = b[:, None] * (v - np.einsum("hkv,hk->hv", S, k))
            S = S + k[:, :, None] * d[:, None, :]
    return S


def _by_sums(q, k, v, g, b, S, how):
    """The textbook chunk with sums of g in float32, which it subtracts, everywhere or in L and P alone: rounded at each
    step, or once at the end; in log2, they are multiplied by log2(e) first."""
    rounded, C, *form = how
    alone, unit = "in L and P" in form, LOG2_E if "in log2" in form else np.float32(1)
    o, S = np.zeros(v.shape), S.copy()
    for t in range(0, len(q), C):
        p = slice(t, min(t + C, len(q)))
        c = np.cumsum(g[p].astype(np.float32), axis=0, dtype=np.float32 if rounded == "each" else np.float64)
        c = c.astype(np.float32) * unit
        start, end = decays(g[p]) if alone else (_power(c, unit), _power(c[-1] - c, unit))
        d, y = np.zeros(v[p].shape), o[p]
        for i, (q_i, k_i, v_i, b_i) in enumerate(zip(q[p], k[p], v[p], b[p][..., None])):
            to = _power(c[i] - c[:i + 1], unit) * k[p][:i + 1]
            L, P = b_i * np.einsum("hk,jhk->hj", k_i, to[:i]), np.einsum("hk,jhk->hj", q_i, to)
            d[i] = b_i * (v_i - np.einsum("hkv,hk->hv", S, start[i] * k_i)) - np.einsum("hj,jhv->hv", L, d[:i])
            y[i] = np.einsum("hkv,hk->hv", S, start[i] * q_i) + np.einsum("hj,jhv->hv", P, d[:i + 1])
        S = start[-1][:, :, None] * S + np.einsum("jhk,jhv->hkv", end * k[p], d)
    return o, S


def _power(c, unit):
    """exp(c / unit) of float32 exponents."""
    return np.exp(np.float64(c) / np.float64(unit))


# ---- faults of it --------------------------------------------------------------------------------------


class Switched:
    """A fault's function: the recurrence with switches, whose values may be functions of the choice.

    `square`: where K = V alone; `elsewhere` serves other ops that the fault can be at. Where a switch of heads, scale,
    axis or gate changes nothing, the fault cannot be.
    """

    def __init__(self, *, square=False, elsewhere=None, **switches):
        self.square, self.elsewhere, self.made = square, elsewhere, switches

    def switches(self, *choice):
        """Of `wrong`, for a choice."""
        return {n: value(*choice) if callable(value) else value for n, value in self.made.items()}

    def __call__(self, call, *choice):
        if call.op != "delta_rule":
            return self.elsewhere(call, *choice)
        if self.square and call.args["q"].shape[-1] != call.args["v"].shape[-1]:
            return None
        switches = self.switches(*choice)
        if not acts(call.args, **{n: switches[n] for n in ("heads", "scale", "axis", "gate") if n in switches}):
            return None
        if isinstance(call, Site) and {"border", "padding"} & switches.keys():
            kind = switches.get("border") or switches["padding"]
            if not any(_of_chunks({"q": p.rows}, *kind) for p in call.scene.pieces):
                return None
            return call.by_calls(lambda args: wrong(args, **switches))
        return call.run(by=lambda **args: wrong(args, **switches))


NEIGHBOURS = "next", "one before", "first"
DELTA, GATED = ("delta_rule",), ("delta_rule", "decay_gate")
KDA, FLA = "arXiv:2510.26692, equation 1", "flash-linear-attention"
LAYOUT = f"ggml and MLX keep [V, K], {FLA} [K, V]"
LENGTHS, LONGER = ((64,), (32,), (16,)), ((128,),)


def _fault(name, text, source="", *, use=CALL, scenario=WHOLE, choices=((),), more=(), each="", square=False,
           rare=False, **switches):
    return Fault(name, text, DELTA, Switched(square=square, **switches), scenario, choices=choices, source=source,
                 use=use, more=more, each=each, rare=rare)


def _clamped(call, bound):
    """decay_gate with a clamp behind it."""
    return np.maximum(call.run(), bound)


def _states():
    yield _fault("final_state_transposed", "the final state equals ours with K and V swapped", LAYOUT, final="swapped")
    yield _fault("state_transposed", "the state lies as [V, K]: initial and final state have K and V swapped", LAYOUT,
                 initial="swapped", final="swapped")
    yield _fault("initial_state_transposed", "the initial state is read with K and V swapped", LAYOUT,
                 initial="swapped")
    yield _fault("state_of_no_tokens", "a sequence without tokens gets a state of zero, not its initial one",
                 "empty slots of a batch", final="zero")
    yield _fault("initial_state_ignored", "the initial state is ignored: nothing is carried", initial="ignored")
    yield _fault("initial_states_rolled", "a sequence begins with the state of another",
                 "slots of a batch, taken one for another", choices=(("next",), ("one before",)),
                 each="each sequence begins with the state of the {}", initial=lambda whose: whose)
    yield _fault("initial_state_of_first_head", "every head begins with the initial state of the first",
                 initial="first head")
    yield _fault("final_states_rolled", "a sequence's final state is that of another",
                 "slots of a batch, taken one for another", choices=(("next",), ("one before",)),
                 each="each sequence gives the final state of the {}", final=lambda whose: whose)
    yield _fault("final_state_too_early", "the final state is that before the last token", final="before the last")
    yield _fault("state_read_transposed", "the output reads the state by the wrong axis: S q for S^T q", LAYOUT,
                 use=BOTH, square=True, read="rows")


def _scaled():
    yield _fault("scale_missing", "the scale is missing",
                 f"{FLA}: l2 norm inside the kernel, then the scale; a scale before the norm is undone", use=BOTH,
                 scale="missing")
    yield _fault("scale_twice", "the scale is applied twice", f"{FLA}: the kernel scales; so did the caller", use=BOTH,
                 scale="twice")
    yield _fault("scale_on_k", "the scale is on k instead of q", scale="on k")
    yield _fault("scale_on_both", "the scale is on k as well as q", scale="on both")
    yield _fault("scale_of_values", "the scale is V ** -0.5 instead of K ** -0.5", use=BOTH, scale="of V")
    yield _fault("scale_divides", "the scale divides", scale="inverse")


def _orders():
    yield _fault("decay_after_update", "the update comes before the decay", KDA, use=BOTH, order="update, then decay")
    yield _fault("decay_after_correction", "the prediction reads the state before its decay (in a chunk: L and W "
                 "decay k_i without the row's own gate)", KDA, use=BOTH,
                 order="reads the undecayed state")
    yield _fault("output_before_decay", "the output is read before the decay and the update", read="before")
    yield _fault("output_before_update", "the output is read before the update (in a chunk: P without its "
                 "diagonal)", KDA, use=BOTH, read="decayed")
    yield _fault("correction_missing", "the correction is missing, S + k beta v^T: plain gated linear attention", KDA,
                 use=BOTH, beta="without correction")


def _gates():
    yield _fault("decay_missing", "the decay is missing", KDA, use=BOTH, gate="missing")
    yield _fault("decay_in_log2", "the gate is taken as log2: 2 ** g",
                 f"{FLA}: chunk kernels work in log2, after g log2(e)",
                 use=BOTH, gate="log2")
    yield _fault("decay_scaled_to_log2", "the gate is multiplied by log2(e), then exp instead of exp2",
                 f"{FLA}: chunk kernels work in log2", use=BOTH, gate="log2e")
    yield _fault("decay_exp_twice", "exp is taken twice of the gate", gate="exp twice")
    yield _fault("decay_without_exp", "the gate is used as the decay, without exp", gate="as it is")
    yield _fault("decay_sign", "the gate has the wrong sign: exp(-g)", gate="sign")
    yield _fault("decay_twice", "the decay is applied twice", gate="twice")
    yield Fault("decay_clamped", "the gate is clamped from below", GATED,
                Switched(gate=lambda bound: ("clamp", bound), elsewhere=_clamped), STRONG, choices=((-5.0,), (-20.0,)),
                more=((-10.0,), (-30.0,), (-50.0,), (-80.0,)), each="the gate is clamped at {:g}",
                source="a guard of chunked kernels; ggml's tests take g > -20")
    yield _fault("decay_of_next_token", "each token has the gate of the next", gate="next")
    yield _fault("decay_of_last_token", "each token has the gate of the one before", gate="previous")
    sources = "arXiv:2412.06464 has a gate each head, arXiv:2510.26692 each channel"
    yield _fault("decay_of_first_channel", "all channels have the gate of the first", sources, use=BOTH,
                 gate="one channel")
    yield _fault("decay_averaged", "all channels have the mean gate of their head", sources, use=BOTH, gate="mean")
    yield _fault("decay_of_reversed_channels", "the channels have the gates in reverse order", gate="reversed")
    yield _fault("decay_without_last_channel", "the last channel of each head is not decayed",
                 "loops that end one early", gate="without last channel")
    yield _fault("decay_on_value_axis", "the decay is along the values instead of the keys", KDA, use=BOTH, square=True,
                 axis="value")


def _betas_of():
    yield _fault("beta_missing_in_update", "beta is missing", KDA, use=BOTH, beta="missing")
    yield _fault("beta_sigmoid_again", "beta goes through a sigmoid again", beta="sigmoid")
    yield _fault("beta_on_key_alone", "beta is on what is read back alone (on k), not on v (in a "
                 "chunk: missing in U)", beta="on the read alone")
    yield _fault("beta_on_value_alone", "beta is on v alone, not on what is read back", KDA, use=BOTH,
                 beta="on v alone")
    yield _fault("beta_twice", "beta is applied twice", beta="squared")
    yield _fault("beta_times_two", "beta is doubled", beta="doubled")
    yield _fault("beta_halved", "beta is halved", beta="halved")


def _normed():
    for alone in ("of q alone", "of k alone"):
        yield _fault(f"l2_{alone.replace(' ', '_')}", f"the l2 norm is {alone}", l2=alone)
    for f in _l2.FAULTS:
        yield _fault(f"in_kernel_{f.name}", f"in its l2 norm, {f.text}", f.source, choices=f.choices + f.more,
                     each=f"in its l2 norm, {f.each}" if f.each else "",
                     l2=lambda *choice, name=f.name: (name, choice))


def _chunks():
    for name, says, switch in (
            ("state_lost", "the state is lost at the border of chunks of {}", dict(border=lambda C: ("reset", C))),
            ("no_first_gate", "the first gate of each chunk is left out, chunks of {}",
             dict(border=lambda C: ("no first gate", C))),
            ("no_last_gate", "the last gate of each chunk is left out, chunks of {}",
             dict(border=lambda C: ("no last gate", C))),
            ("no_last_write", "the last token of each chunk is not written, chunks of {}",
             dict(border=lambda C: ("no last write", C))),
            ("state_in_bfloat16", "the state is rounded to bfloat16 behind each chunk, chunks of {}",
             dict(border=lambda C: ("bfloat16", C))),
            ("padding_repeats", "padding repeats the last token and reaches the state, chunks of {}",
             dict(padding=lambda C: ("repeats the last token", C))),
            ("padding_decays", "padding goes on decaying the state by the last gate, chunks of {}",
             dict(padding=lambda C: ("decays", C)))):
        use = CALL if name == "state_lost" else BOTH  # a run has `state_lost_between_blocks`
        yield _fault(f"chunk_{name}", says.rpartition(" of {}")[0], choices=LENGTHS + LONGER, each=says, use=use,
                     scenario=CHUNKS_SPLIT if "padding" in name else CHUNKS, rare=True, **switch)
    says = "decays are formed by subtracting float32 sums of g over chunks of {}: digits are lost after a strong gate"
    yield _fault("chunk_sums_in_float32", "decays are formed by subtracting sums that were added up in float32",
                 choices=LENGTHS, more=LONGER, each=says, sums=lambda C: ("each", C))
    yield _fault("chunk_sums_in_L_and_P", "decays in L and P are formed by subtracting float32 sums",
                 choices=LENGTHS, more=LONGER, each=says.replace("decays", "in L and P, decays"),
                 sums=lambda C: ("each", C, "in L and P"))
    yield _fault("chunk_sums_in_log2", "decays are formed by subtracting sums that were added up in float32, in log2",
                 "flash-linear-attention, fla/ops/kda/chunk_fwd.py: chunk_local_cumsum with a scale", choices=LENGTHS,
                 each=says.replace("of g", "of g, in log2,"), sums=lambda C: ("each", C, "in log2"))
    yield _fault("chunk_decays_subtracted",
                 "decays in a chunk are differences of float32 running sums: a strong decay makes the sums large, and "
                 "small differences between them lose their last bits",
                 "transformers and flash-linear-attention; arXiv:2510.26692, equations 2 to 9", use=BOTH,
                 scenario=STRONG, choices=LENGTHS, more=LONGER, each=says, sums=lambda C: ("once", C))


def _rest():
    yield _fault("key_heads_other_way",
                 "key heads are found the other way: grouped (h // G) for tiled (h % Hk), or the "
                 "reverse", "repeat for repeat_interleave; GGUF files of Qwen3.5 have tiled value heads", use=BOTH,
                 heads="other")
    for what in ("key head", "values", "gates", "beta"):
        yield _fault(f"{what.replace(' ', '_')}_rolled", f"each value head has the {what} of another",
                     "heads counted from another one", choices=tuple((whose,) for whose in NEIGHBOURS),
                     each=f"each value head has the {what} of the {{}}", rolled=lambda whose, what=what: (what, whose))
    for what, words in (("gates", "the gate"), ("beta", "beta")):
        yield _fault(f"{what}_of_key_head", f"{words} is looked up by the number of the key head, h // (Hv / Hk) for h",
                     "gates have value heads", rolled=(what, "head with that of its key head"))
    yield _fault("heads_backwards", "heads are in reverse order", choices=(("o",), ("o and the state",)),
                 each="the heads of {} are in reverse order", backwards=lambda what: what)
    yield _fault("offsets_ignored", "sequences run into each other: the state is not begun anew at an offset",
                 ragged="one")
    yield _fault("state_in_bfloat16", "the state is rounded to bfloat16 after every token",
                 "vLLM makes the state's type configurable; flash-linear-attention asks for float32", use=BOTH,
                 stored="bfloat16")


def _types():
    kinds = ("bfloat16",), ("float16",)
    yield _fault("delta_results_rounded", "the results are rounded to a narrow type", choices=kinds,
                 each="the results are rounded to {}", results=lambda kind: kind)
    yield _fault("delta_inputs_rounded", "q, k and v are rounded to a narrow type", choices=kinds,
                 each="q, k and v are rounded to {}", inputs=lambda kind: kind)
    yield _fault("query_and_key_exchanged", "q and k are exchanged", exchanged=True)


PARTS = _states, _scaled, _orders, _gates, _betas_of, _normed, _rest, _chunks, _types
FAULTS = tuple(f for part in PARTS for f in part())
