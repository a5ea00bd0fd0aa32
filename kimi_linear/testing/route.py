"""What `check_op` knows of `route`. Its faults are of the choice (`route`) or of the weights (`route_weights`)."""

import numpy as np

from .. import reference
from ..faults import Call, mistakes
from .plain import Form, lone_rows, maker, nan_spread, plain
from .spec import Explanation, defaults

__all__ = ["SPEC"]

OPS = ("route", "route_weights")


def inputs(rng, T, E=16, k=4, bias=True, scale=2.446, mean=-1.0, **more):
    """Logits [T, E] and a bias [E] that moves some choices."""
    return dict(scores=mean + rng.standard_normal((T, E)), k=k, bias=0.1 * rng.standard_normal(E) if bias else None,
                scale=scale, **more)


case = maker("route", inputs)


def _tied(x, rng):
    """Scores of few values: equals at the border of the choice."""
    x["scores"][...] = rng.choice(np.float32([-1, 0, 1]), x["scores"].shape)


def _saturated(x, rng):
    """Sigmoids of 0 and 1."""
    x["scores"][...] = np.float32(-60) + np.argsort(rng.random(x["scores"].shape)) * np.float32(5)


def _faint(x, rng):
    """Sigmoids below 2^-126."""
    x["scores"][1::2] -= np.float32(90)


def _strong_bias(x, rng):
    x["bias"] *= np.float32(20)


def _low_bias(x, rng):
    """Every score with its bias is below 0."""
    x["bias"] -= np.float32(2)


def _hidden_by_bias(x, rng):
    """Sigmoids of 1e-6 beside a bias of 12: of their sum in float32 little is theirs."""
    x["scores"] -= np.float32(12)
    x["bias"] += np.float32(12)


def cases():
    """All."""
    yield case("plain", "lengths", 12, usual=True, says="4 of 16 experts, a bias for the choice")
    for T in (1, 2, 65):
        yield case(f"length-{T}", "lengths", T, usual=True)
    yield case("length-0", "lengths", 0, needs={"T = 0"})
    for E, k in ((1, 1), (2, 1), (15, 3), (17, 17), (256, 8)):
        yield case(f"experts-{E}-{k}", "sizes", 5, E, k, says="experts, and how many are chosen")
    yield case("no-bias", "bias", 9, bias=False, usual=True, needs={"no bias"})
    yield case("strong-bias", "bias", 9, change=_strong_bias, usual=True, says="the bias decides")
    yield case("hidden-by-bias", "bias", 9, change=_hidden_by_bias, says="sigmoids of 1e-6, a bias of 12")
    for groups, top in ((4, 2), (8, 3)):
        yield case(f"groups-{groups}-{top}", "groups", 20, 32, 4, groups=groups, top_groups=top, needs={"groups"},
                   usual=True, says="groups, and how many of them stay")
    yield case("groups-below-0", "groups", 20, 32, 4, groups=4, top_groups=2, needs={"groups"}, change=_low_bias,
               says="scores with their bias are negative: 0 is no floor")
    yield case("softmax", "rule", 9, function="softmax", bias=False, needs={"softmax", "no bias"}, usual=True)
    yield case("softmax-512-10", "rule", 5, 512, 10, function="softmax", bias=False, scale=1.0,
               needs={"softmax", "no bias"}, usual=True, says="the router of Qwen3-Next")
    yield case("softmax-plain-weights", "rule", 9, function="softmax", bias=False, renormalise=False,
               needs={"softmax", "no bias", "no renormalising"}, usual=True)
    yield case("plain-weights", "rule", 9, renormalise=False, needs={"no renormalising"}, usual=True)
    yield case("scale-1", "rule", 9, scale=1.0, needs={"scale"}, usual=True)
    yield case("scale-2.5", "rule", 9, scale=2.5, needs={"scale"}, usual=True)
    yield case("ties", "rim", 24, bias=False, change=_tied, needs={"ties", "no bias"}, says="of equals the lowest id")
    yield case("vanishing", "rim", 9, bias=False, renormalise=False, change=_faint,
               needs={"no bias", "no renormalising", "subnormals"},
               says="plain sigmoids, in every other row of -90")
    yield case("saturated", "rim", 9, bias=False, change=_saturated, needs={"no bias"}, says="logits from -60 to 15")


def mistaken(x, **named):
    """`reference.route` with faults of the choice, of the weights, or both."""
    x = defaults("route") | x
    ids, _ = reference.route(**x)
    acted = not named
    for name, choice in named.items():
        if "route" in FAULTS[name].ops or "*" in FAULTS[name].ops:
            y = FAULTS[name].function(Call("route", x), *choice)
            ids, acted = (ids, acted) if y is None else (y, True)
    weights = reference.route_weights(x["scores"], ids, **{n: x[n] for n in ("function", "renormalise", "scale")})
    for name, choice in named.items():
        if "route_weights" in FAULTS[name].ops or "*" in FAULTS[name].ops:
            y = FAULTS[name].function(Call("route_weights", x | {"ids": ids}), *choice)
            weights, acted = (weights, acted) if y is None else (y, True)
    return (np.asarray(ids, np.float64), weights) if acted else None


FAULTS = {f.name: f for op in OPS for f in mistakes(op)}
EXPLANATIONS = tuple(Explanation(f.says(c), ((f.name, c),)) for f in FAULTS.values() for c in f.choices + f.more)


def _sorted(found, x):
    """By rising id."""
    order = np.argsort(found["ids"], axis=-1, kind="stable")
    return {n: np.take_along_axis(a, order, -1) for n, a in found.items()}


FORMS = {
    "hidden_states": Form(lambda x: {"hidden_states": np.zeros((len(x["scores"]), 1), np.float32)}),
    "ids in any order": Form(back=_sorted),
    "weights before ids": Form(back=lambda found, x: {"ids": found["weights"], "weights": found["ids"]}),
}

def diagnose(x, actual, ref):
    """Ids in another order hide what else is wrong."""
    if (np.diff(actual[0]) < 0).any():
        return [("the ids of a token do not rise: sort them and their weights; or, of check_op, "
                 'conventions=kl.conventions["ours"]["route"].but(forms=("ids in any order",)) does it', "")]
    return nan_spread(x, actual, ref)


SPEC = plain("route", ("ids", "weights"), cases(), lone_rows("route", "scores"), FORMS, mistaken=mistaken,
             explanations=EXPLANATIONS, diagnose=diagnose,
             narrow=("scores",), narrow_results=())
