"""The cases of `delta_rule`: shapes, what is carried, and the rim of its inputs."""

import functools
import zlib

import numpy as np

from ..plain import SAME_TWICE, causal, filled, given_outputs, halved
from ..spec import Case, Law

__all__ = ["CASES", "LAWS", "real"]

TOKENS = ("q", "k", "v", "g", "beta")  # arguments with a row a token
#: Gates of the rim, in nats: from no decay to all of it.
GATES = (-0.0, -1e-30, -1e-3, -5.0, -100.0, -1e4, -np.inf)


# ---- inputs --------------------------------------------------------------------------------------------


def inputs(rng, T, H=2, K=16, V=None, *, Hk=None, kind="channel", carried=False, N=None, weakest=1e-3, strongest=1.6):
    """q, k, v, g, beta as a layer has them: unit keys; decays from `weakest` to `strongest` nats, evenly in the
    logarithm, by default those with which training begins (flash-linear-attention, fla/layers/kda.py)."""
    Hk, V = Hk or H, V or K
    unit = rng.standard_normal((2, T, Hk, K))
    unit /= np.sqrt((unit**2).sum(-1, keepdims=True)) + 1e-30
    g = -np.exp(rng.uniform(np.log(weakest), np.log(strongest), (T, H, K)))
    x = dict(q=unit[0], k=unit[1], v=rng.standard_normal((T, H, V)), g=_of_kind(g, kind), beta=rng.random((T, H)))
    if carried:
        x["initial_state"] = rng.standard_normal((H, K, V) if N is None else (N, H, K, V))
    return {n: None if a is None else np.ascontiguousarray(a, np.float32) for n, a in x.items()}


def _of_kind(g, kind):
    """A gate of every channel as one of another kind."""
    return g if kind == "channel" else g[..., 0] if kind == "head" else None


def _rng(name):
    return np.random.default_rng(zlib.crc32(name.encode()))


def _case(name, group, T, *, change=None, needs=(), usual=False, steps=None, says="", pinned=None, extra=None, **shape):
    """A Case of `inputs`, changed by ``change(x, rng)``; `extra` are more arguments, `pinned` the one kind of gate."""
    def make(kind):
        rng = _rng(name)
        x = inputs(rng, T, kind=kind if pinned is None else pinned[0], **shape)
        if change is not None:
            change(x, rng)
        return x | dict(extra or {})

    needs = set(needs) | ({"initial state"} if shape.get("carried") else set())
    return Case(name, group, make, frozenset(needs), usual, steps, says)


# ---- lengths, carried states, shapes -------------------------------------------------------------------


def split(*cuts):
    """Steps of a case: calls that end at `cuts`, each taking up the state of the one before."""
    def steps(x, call):
        parts, state = [], x.get("initial_state")
        T = len(x["q"])
        for a, b in zip((0, *cuts), (*cuts, T), strict=True):
            piece = {n: v[a:b] if n in TOKENS and v is not None else v for n, v in x.items()}
            o, state = call(piece | ({} if state is None else {"initial_state": np.ascontiguousarray(state)}))
            parts.append(o)
        return np.concatenate(parts), state

    return steps


def _lengths():
    yield _case("plain", "lengths", 24, usual=True, says="24 tokens, 2 heads, K = V = 16, no initial state")
    for T in (1, 7, 16, 63, 64, 65, 200):
        yield _case(f"length-{T}", "lengths", T, usual=T > 1)
    yield _case("length-0", "lengths", 0, needs={"T = 0"})


def _carried():
    for T in (1, 7, 16, 64, 65):
        yield _case(f"carried-{T}", "carried", T, carried=True, usual=True, says="from an initial state")
    yield _case("carried-0", "carried", 0, carried=True, needs={"T = 0"}, says="no token: the state is handed on")
    for cuts in ((64,), (37,), (1, 17, 80)):
        yield _case("split-" + "-".join(map(str, cuts)), "carried", 130, usual=True, steps=split(*cuts),
                    needs={"initial state"}, says="in calls that end at these tokens, the state carried")


def _shapes():
    for K in (1, 2, 33, 64, 128, 130):
        yield _case(f"width-{K}", "widths", 6, H=1 if K > 64 else 2, K=K, carried=True)
    for K, V in ((1, 130), (130, 1), (7, 16), (16, 40), (128, 64)):
        yield _case(f"width-{K}x{V}", "widths", 6, H=1, K=K, V=V, carried=True, needs={"K != V"}, says="K x V")
    for Hk, H in ((1, 4), (2, 6)):
        shape = dict(Hk=Hk, H=H, K=8, usual=True, carried=True)
        yield _case(f"grouped-{Hk}-{H}", "heads", 12, **shape, needs={"grouped heads"},
                    says="value head h reads key head h // (Hv / Hk)")
        if Hk > 1:
            yield _case(f"tiled-{Hk}-{H}", "heads", 12, **shape, needs={"tiled heads"}, extra={"head_map": "tiled"},
                        says="value head h reads key head h % Hk")
    yield _case("grouped-one-token", "heads", 1, Hk=2, H=6, K=8, carried=True, needs={"grouped heads"},
                says="decoding is a kernel of its own in many ports")
    offsets = np.array([0, 0, 1, 2, 2, 70, 83], np.int64)
    for carried in (False, True):
        yield _case("ragged-carried" if carried else "ragged", "ragged", 83, carried=carried, N=6, usual=True,
                    needs={"offsets"}, extra={"offsets": offsets},
                    says="sequences of 0, 1, 1, 0, 68 and 13 tokens, one after another")
    yield _case("one-token-each", "ragged", 5, carried=True, N=5, needs={"offsets"},
                extra={"offsets": np.arange(6)}, says="a batch that decodes")
    for scale in (1.0, 0.37):
        yield _case(f"scale-{scale:g}", "scale", 9, needs={"scale"}, usual=True, extra={"scale": scale})


# ---- gates ---------------------------------------------------------------------------------------------


def _fill(value):
    def change(x, rng):
        if x["g"] is not None:
            x["g"][...] = value
    return change


def _mixed(*values):
    def change(x, rng):
        if x["g"] is not None:
            x["g"][...] = rng.choice(np.array(values, np.float32), x["g"].shape)
    return change


def _strong_then_weak(x, rng):
    """One token of -1e4 in each channel early in the chunk, then -1e-3."""
    if x["g"] is not None:
        x["g"][...] = -1e-3
        x["g"][3] = -1e4
        x["g"][20, :] = -100.0


def _strong_and_unwritten(x, rng):
    """One token of -30, the others of 0, and nothing written that could hide what is left of the state."""
    x["beta"][...] = 0
    if x["g"] is not None:
        x["g"][...] = 0
        x["g"][3] = -30.0


def _one_inf(x, rng):
    if x["g"] is not None:
        x["g"][20] = -np.inf


def _gates():
    for kind, words in (("channel", "gate per channel"), ("head", "gate per head"), (None, "no gate")):
        yield _case(f"gate-{kind or 'none'}", "gates", 40, pinned=(kind,), usual=True, carried=True, needs={words})
    yield _case("gate-mild", "gates", 70, carried=True, weakest=1e-3, strongest=0.1, usual=True)
    for value in GATES:
        needs = {"-inf"} if np.isinf(value) else set()
        yield _case(f"gate{value:g}", "rim gates", 40, change=_fill(value), carried=True, needs=needs,
                    says="one gate everywhere")
    yield _case("gate-wide", "rim gates", 130, carried=True, weakest=1e-5, strongest=200.0,
                says="from -1e-5 to -200, as in trained layers")
    yield _case("gate-5-long", "rim gates", 130, change=_fill(-5.0), carried=True)
    yield _case("strong-then-weak", "rim gates", 130, change=_strong_then_weak, carried=True,
                says="-1e4, then -1e-3, and once -100: later decays are lost where sums are subtracted")
    yield _case("gate-30-unwritten", "rim gates", 12, change=_strong_and_unwritten, carried=True,
                says="-30 at token 3, and beta 0: what is left of the state is all there is")
    yield _case("some-100", "rim gates", 130, change=_mixed(-1e-3, -0.1, -0.5, -100.0), carried=True)
    yield _case("some-1e4", "rim gates", 130, change=_mixed(-1e-3, -0.1, -0.5, -1e4), carried=True)
    yield _case("one-inf", "rim gates", 70, change=_one_inf, carried=True, needs={"-inf"},
                says="-inf at token 20: what was is forgotten")
    for n in (65, 130):
        yield _case(f"every-gate-{n}", "rim gates", n, change=_mixed(*GATES), carried=True, needs={"-inf"})
    yield _case("every-finite-gate", "rim gates", 130, change=_mixed(*GATES[:-1]), carried=True)


# ---- beta, keys, NaN -----------------------------------------------------------------------------------


def _mild_then(change):
    def both(x, rng):
        if x["g"] is not None:
            x["g"] /= 32
        change(x, rng)
    return both


def _equal(x, rng):
    x["k"][...] = x["k"][0]


def _orthogonal(x, rng):
    x["k"][...] = np.eye(x["k"].shape[-1], dtype=np.float32)[np.arange(len(x["k"])) % x["k"].shape[-1]][:, None]


def _of_other_lengths(x, rng):
    for name, most in (("q", 3.0), ("k", 0.9)):
        x[name] *= rng.uniform(0.3, most, x[name].shape[:-1]).astype(np.float32)[..., None]


def _times(names, factor):
    def change(x, rng):
        for name in names:
            x[name] *= np.float32(factor)
    return change


def _some_beta(x, rng):
    x["beta"][...] = rng.choice(np.array([0, 1e-3, 0.5, 1, 2], np.float32), x["beta"].shape)


def _zero_keys(x, rng):
    x["k"][2::3] = 0


def _betas():
    for value in (0, 1, 2):
        yield _case(f"beta-{value}", "beta", 33, change=_mild_then(filled("beta", value)), carried=True)
    yield _case("beta-mixed", "beta", 70, change=_mild_then(_some_beta), carried=True)


def _keys():
    yield _case("keys-zero", "keys", 33, change=_zero_keys, carried=True, says="every third key is zero")
    yield _case("keys-equal", "keys", 70, change=_mild_then(_equal), carried=True, says="one key for all tokens")
    yield _case("keys-lengths", "keys", 70, change=_mild_then(_of_other_lengths), carried=True,
                says="q and k of other lengths than 1, and no norm")
    yield _case("keys-orthogonal", "keys", 70, change=_mild_then(_orthogonal), carried=True)
    norm = dict(change=_times("qk", 3.0), carried=True, usual=True, needs={"l2_norm"}, extra={"l2_norm": True})
    yield _case("norm", "l2_norm", 9, **norm)
    for name, factor, of, says in (
            ("norm-small", 1e-3, "qk", "the sum of squares is as large as eps"),
            ("norm-tiny", 1e-20, "k", "squares underflow"), ("norm-subnormal", 1e-40, "k", "subnormal keys"),
            ("norm-zero", 0.0, "k", ""), ("norm-huge", 1e15, "qk", ""),
            ("norm-overflow", 1e25, "qk", "squares overflow float32")):
        yield _case(name, "l2_norm", 9, change=_times(of, factor), carried=True, needs={"l2_norm"},
                    extra={"l2_norm": True}, says=says)
    yield _case("norm-one-token", "l2_norm", 1, **norm, says="decoding is a kernel of its own in many ports")


def _nan_at(name, t):
    def change(x, rng):
        if x[name] is not None:
            at = (t, 1, 3) if name != "initial_state" else (1, 3, 2)
            x[name][at[:x[name].ndim]] = np.nan
    return change


def _nans():
    for name, t in (("q", 20), ("k", 20), ("v", 37), ("g", 20), ("beta", 63), ("v", 69), ("initial_state", 0)):
        yield _case(f"nan-{name}-{t}" if name != "initial_state" else "nan-state", "nan", 70, carried=True,
                    change=_nan_at(name, t), needs={"NaN"}, says="NaN in one value: NaN where it goes, nowhere else")


CASES = tuple(case for part in (_lengths, _carried, _shapes, _gates, _betas, _keys, _nans) for case in part())


# ---- laws ----------------------------------------------------------------------------------------------


def _apart(x, call):
    """What is done to the last head changes nothing in the others."""
    a, b = call(x)[0][:, :-1], call(halved(x, TOKENS, np.s_[:, -1]))[0][:, :-1]
    return None if a.tobytes() == b.tobytes() else \
        f"one head changes the outputs of others, in {int((a != b).sum())} values"


LAWS = (SAME_TWICE, causal(*TOKENS), Law("heads-apart", "a head changes no byte of another's output", _apart),
        given_outputs(("o", "state")))


# ---- the packaged model --------------------------------------------------------------------------------


@functools.cache
def real():
    """q, k, v, g, beta of the packaged model's layers, on 96 tokens: {"model-layer-0": inputs, ...}."""
    from ...model import Model

    model = Model.tiny()
    text = "In the beginning God created the heaven and the earth. And the earth was without form, and void; " * 4
    ids = model.tokenizer.encode(text)[:96]
    trace = model.trace(ids, taps="layers.*.kda.*")
    found = {}
    for i, layer in enumerate(model.config.layers):
        if layer.mixer == "kda":
            taps = {"q": "q", "k": "k", "v": "v_conv", "g": "g", "beta": "beta"}
            found[f"model-layer-{i}"] = {n: np.array(trace[f"layers.{i}.kda.{tap}"]) for n, tap in taps.items()}
    return found
