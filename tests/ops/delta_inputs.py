"""What the tests of the delta rule and of its halves are run on."""

import numpy as np

import kimi_linear as kl

RIM_GATES = np.array([-0.0, -1e-30, -1e-3, -0.3, -5, -100, -1e4, -np.inf], np.float32)


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


def same(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))
