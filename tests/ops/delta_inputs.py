"""What the tests of delta_rule share: inputs of the model's range and of its rim, and a run that is judged."""

import numpy as np
from judge import everywhere, guarded, judge

import kimi_linear as kl

RIM_GATES = np.array([-0.0, -1e-30, -1e-3, -0.3, -5, -100, -1e4, -np.inf], np.float32)
FORMS = [dict(form="recurrent"), dict(form="auto"),
         *(dict(form="chunked", chunk=c) for c in (1, 5, 48, 64, 256))]


def inputs(T, H=2, K=16, V=16, *, Hk=None, gate="channel", seed=0, decay=1.0):
    """What the model has: unit keys and queries, gates of many sizes, write rates in [0, 1)."""
    rng = np.random.default_rng([seed, T, H, K, V])
    Hk = Hk or H

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    shape = {"channel": (T, H, K), "head": (T, H)}
    g = None if gate is None else (-decay * np.exp(2 * normal(*shape[gate]) - 2)).astype(np.float32)
    return dict(q=kl.ops.l2_norm(normal(T, Hk, K)), k=kl.ops.l2_norm(normal(T, Hk, K)), v=normal(T, H, V),
                g=g, beta=rng.random((T, H)).astype(np.float32))


def state_for(x, n=(), seed=5):
    """A state [*n, Hv, K, V] that fits the inputs."""
    shape = (*n, x["v"].shape[1], x["q"].shape[2], x["v"].shape[2])
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def rim(T, H=2, K=16, V=16, *, keys="mixed", gate="channel", seed=0):
    """Every decay in one chunk and channel, beta 0, 1 and 2; keys zero, equal, orthogonal or random, or all of them."""
    x = inputs(T, H, K, V, gate=gate, seed=seed)
    rng = np.random.default_rng([seed, T, H])
    if gate is not None:
        x["g"] = rng.choice(RIM_GATES, x["g"].shape)
    x["beta"] = rng.choice(np.array([0, 1, 2], np.float32), (T, H))
    if keys == "reflect":  # equal keys, each a reflection: no error fades but by decay
        x["beta"][:] = 2
    kinds = {"zero": np.zeros_like(x["k"]), "equal": np.broadcast_to(x["k"][:1], x["k"].shape),
             "orthogonal": np.broadcast_to(np.eye(K, dtype=np.float32)[np.arange(T) % K, None], x["k"].shape),
             "random": x["k"]}
    kind = dict(mixed=rng.integers(4, size=(T, 1, 1))).get(keys, list(kinds).index(keys) if keys in kinds else 1)
    x["k"] = np.choose(kind, list(kinds.values()))
    return x


def run_and_judge(x, **kw):
    """Guarded, NaN-filled outputs on every instruction set and thread count; the result is judged."""
    n = () if kw.get("offsets") is None else (len(kw["offsets"]) - 1,)
    shape = (*n, x["v"].shape[1], x["q"].shape[2], x["v"].shape[2])
    given = {name: a for name, a in {**x, **kw}.items() if isinstance(a, np.ndarray)}
    before = {name: np.copy(a) for name, a in given.items()}

    def run(ctx):
        (o, check_o), (state, check_state) = guarded(x["v"].shape), guarded(shape)
        got = kl.ops.delta_rule(**x, **kw, out=(o, state), ctx=ctx)
        check_o()
        check_state()
        return tuple(a.copy() for a in got)

    got = everywhere(run)
    judge("delta_rule", got, kl.reference.delta_rule(**x, **kw), **x, **kw)
    for name, a in given.items():
        assert np.array_equal(before[name], a, equal_nan=True), f"delta_rule changed its input {name}"
    return got


def same(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def scaled(name, scale):
    """Inputs and an initial state of which one is scaled: the state whole, else one token in five, between which the
    state lives on; of keys above length 1 the last alone."""
    x = inputs(20, 2, 12, 18)
    x["initial_state"] = state_for(x)
    x[name] = x[name].copy()
    part = x[name] if name == "initial_state" else x[name][2::5]
    if name == "k" and scale > 1:
        part = x["k"][-1:]
    part *= np.float32(scale)
    return x
