"""How far a model's own conditioning carries rounding: the reference with every tap moved by one unit."""

import numpy as np


def relative(actual, desired):
    """(rms error, largest error) over the rms of `desired`; 0 of an empty array."""
    desired = np.asarray(desired, np.float64)
    if not desired.size:
        return 0.0, 0.0
    error = np.asarray(actual, np.float64).reshape(desired.shape) - desired
    size = np.sqrt(np.mean(desired**2))
    return float(np.sqrt(np.mean(error**2)) / size), float(np.abs(error).max() / size)


def one_ulp(seed):
    """A function that moves each element up or down by one unit in the last place of float32, at random."""
    rng = np.random.default_rng(seed)

    def move(x):
        if x.dtype.kind in "iu":
            return x
        return x + np.where(rng.random(x.shape) < 0.5, -1.0, 1.0) * np.spacing(np.abs(x).astype(np.float32))

    return move


def noise(reference, tokens, exact, seeds=3):
    """What one-ulp noise on every tap does to each tap and state of the float64 model.

    Parameters
    ----------
    reference : ReferenceModel
    tokens : (T,) integers
    exact : its result without noise, with every tap

    Returns
    -------
    dict from tap or state array to (rms, largest), over the array's rms; the largest over the seeds
    """
    ids = {
        i: exact.taps[f"layers.{i}.moe.ids"]
        for i, layer in enumerate(reference.config.layers)
        if layer.ffn == "moe"
    }
    moved = dict.fromkeys((*exact.taps, *exact.state), (0.0, 0.0))
    for seed in range(seeds):
        run = reference.forward(tokens, taps="*", edit={"*": one_ulp(seed)}, expert_ids=ids)
        for name, x in (exact.taps | exact.state).items():
            far = relative((run.taps | run.state)[name], x)
            moved[name] = tuple(map(max, moved[name], far))
    return moved
