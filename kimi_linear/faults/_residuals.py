"""Faults of attention over depth."""

from __future__ import annotations

import numpy as np

from .. import reference
from ._fault import BOTH, CALL, RUN, Fault

FLOAT32_MAX = float(np.finfo(np.float32).max)


def candidates(call):
    return np.concatenate([call["snapshots"], call["x"][None]])


def length(v, eps):
    return np.sqrt((v * v).mean(-1) + eps)


def mixed(v, scores):
    """Of scores [n + 1, ...] their softmax over the candidates, and what it makes of v."""
    p = np.moveaxis(reference.softmax(np.moveaxis(scores, 0, -1)), -1, 0)
    return (p[..., None] * v).sum(0)


def scored(score):
    """Other scores: a function of the candidates, w, eps and the choice. Of x alone all are right."""
    def function(call, *choice):
        v = candidates(call)
        return mixed(v, score(v, call["w"], call["eps"], *choice)) if len(v) > 1 else None

    return function


def weighed(weights):
    """Other weights of the candidates, [n + 1, ...], from their scores."""
    def function(call):
        v = candidates(call)
        scores = reference.rms_norm(v, call["w"], eps=call["eps"]).sum(-1)
        return (weights(scores)[..., None] * v).sum(0) if len(v) > 1 else None

    return function


def kept(which, least=1):
    """Some of at least so many snapshots are left out."""
    def function(call):
        return call.run(snapshots=call["snapshots"][which]) if len(call["snapshots"]) >= least else None

    return function


def dot(v, w):
    return (w * v).sum(-1)


def of_normed(call):
    """What is mixed are the candidates as the score has them."""
    v = candidates(call)
    if len(v) == 1:
        return None
    scores = reference.rms_norm(v, call["w"], eps=call["eps"]).sum(-1)
    return mixed(v / length(v, call["eps"])[..., None], scores)


def without_x(call):
    v = call["snapshots"]
    return mixed(v, reference.rms_norm(v, call["w"], eps=call["eps"]).sum(-1)) if len(v) else None


def of_each_channel(call):
    """A softmax for each channel: w v / rms is not summed."""
    v = candidates(call)
    terms = reference.rms_norm(v, call["w"], eps=call["eps"])
    return mixed(v[..., None], terms)[..., 0] if len(v) > 1 else None


def other_eps(call, eps: float):
    return call.run(eps=eps) if eps != call["eps"] and len(call["snapshots"]) else None


def overflowing(v, w, eps, of):
    lost = (v * v).sum(-1) > FLOAT32_MAX
    if of == "the running sum":  # the others' norms were kept
        lost[:-1] = False
    return np.where(lost, 0.0, dot(v, w) / length(v, eps))


def over_tokens(scores):
    """The softmax along the rows."""
    e = np.exp(scores - scores.max(1, keepdims=True)) if scores.ndim > 1 and scores.size else np.ones(scores.shape)
    return e / e.sum(1, keepdims=True)


def x_twice(call):
    """x among the snapshots already, and a candidate besides."""
    return call.run(snapshots=candidates(call)) if len(call["snapshots"]) else None


def _fault(name, text, function, source="", choices=((),), use=BOTH, **named):
    return Fault(f"attn_res_{name}", text, ("attn_res",), function, choices=choices, source=source, use=use, **named)


PAPER, MLX_LM = "arXiv:2603.15031", "mlx-lm: mlx_lm/models/kimi_k3.py"

FAULTS = (
    _fault("of_normed", "the candidates are mixed after their norm; it is for the scores alone", of_normed, PAPER),
    _fault("scores_unnormed", "scores are of the candidates without their norm, w v alone",
           scored(lambda v, w, eps: dot(v, w))),
    _fault("eps_missing", "the norm of the scores has no eps", scored(lambda v, w, eps: dot(v, w) / length(v, 0.0)),
           use=CALL),
    _fault("eps_outside", "eps is outside of the root: w v / (sqrt(mean) + eps)",
           scored(lambda v, w, eps: dot(v, w) / (length(v, 0.0) + eps))),
    _fault("eps_on_sum", "eps is on the sum of squares, not on their mean",
           scored(lambda v, w, eps: dot(v, w) / length(v, eps / v.shape[-1])), use=CALL),
    _fault("eps_lost", "the norm of the scores has no eps, or has it on the sum of squares: a run does not tell which",
           scored(lambda v, w, eps: dot(v, w) / length(v, 0.0)), use=RUN),
    _fault("eps_other", "another eps in the norm of the scores", other_eps, choices=((1e-6,), (1e-5,)),
           each="eps of the scores' norm is {:g}", source="rms_norm_eps of another config"),
    _fault("l2", "scores by an L2 norm: the sum of squares in place of their mean",
           scored(lambda v, w, eps: dot(v, w) / np.sqrt((v * v).sum(-1) + eps))),
    _fault("norm_overflow", "a sum of squares overflows float32: the score is 0", scored(overflowing), MLX_LM,
           (("a candidate",), ("the running sum",)), CALL,
           each="the sum of squares of {} overflows float32: its score is 0"),
    _fault("scaled", "scores are scaled by D^-1/2, as attention's", scored(
        lambda v, w, eps: dot(v, w) / length(v, eps) * v.shape[-1] ** -0.5)),
    _fault("scores_negative", "scores have the other sign", scored(lambda v, w, eps: -dot(v, w) / length(v, eps))),
    _fault("without_x", "the running sum is no candidate: snapshots alone are mixed", without_x, PAPER),
    _fault("without_newest", "the newest snapshot is left out", kept(slice(None, -1)), wired=True,
           source="a snapshot that is appended behind the mixing"),
    _fault("without_oldest", "the oldest snapshot, the embedding, is left out", kept(slice(1, None)),
           wired=True),
    _fault("newest_alone", "of the snapshots the newest alone is a candidate", kept(slice(-1, None), 2),
           wired=True),
    _fault("mean", "no softmax: all candidates have one weight", weighed(lambda a: np.full(a.shape, 1 / len(a)))),
    _fault("sum", "no softmax: the candidates are added", weighed(np.ones_like), "ordinary residuals"),
    _fault("sigmoid", "sigmoids for the softmax: the weights do not add up to 1", weighed(reference.sigmoid)),
    _fault("over_tokens", "the softmax is over tokens, not over candidates", weighed(over_tokens), looks_ahead=True),
    _fault("of_each_channel", "scores are not summed: each channel has a softmax of its own", of_each_channel),
    _fault("missing", "there is no mixture: the running sum is handed on", lambda s: s["x"] if len(
        s["snapshots"]) else None, "output_attn_res, which has no layer, is easily left out", wired=True),
    _fault("x_twice", "the running sum is a candidate twice", x_twice,
           source="a snapshot that is appended before the mixing that it is for"),
    _fault("residual", "the running sum is added to the mixture", lambda s: s.run() + s["x"] if len(
        s["snapshots"]) else None, "ordinary residuals"),
)
