"""`delta_rule` in the conventions of others: arguments there, results back."""

import numpy as np

from ..spec import NotOffered, Plan, WrongResult
from .mistakes import SWAPPED

__all__ = ["kinds", "layout_of", "plan_of"]

_GATE = {"channel": "gate per channel", "head": "gate per head", None: "no gate"}


def kinds(how):
    """Kinds of gate that a convention has, its usual one first."""
    return how.gates


def plan_of(how, x):
    """The Plan of a call with our arguments `x` in the convention `how`.

    Raises
    ------
    NotOffered
        If it has no way to ask for something in `x`.
    """
    (T, Hk, K), (Hv, V) = x["q"].shape, x["v"].shape[1:]
    _check(how, x, Hk, Hv, K, V)
    exact, given = dict(x), {name: x[name] for name in ("q", "k", "v", "beta")}
    if x.get("g") is not None:
        given["g"], exact["g"] = _gate(x["g"], how.gate)
    elif "g" in how.names and how.project == "ours":
        given["g"] = None
    if how.scale == "caller":
        given["q"] = exact["q"] = (x["q"] * np.float32(x.get("scale", K**-0.5))).astype(x["q"].dtype)
        exact["scale"] = 1.0
    arguments = {how.names[name]: layout_of(how, name, a) for name, a in given.items()}

    ragged = "offsets" in x
    lead = (len(x["offsets"]) - 1,) if ragged else (1,) if how.axes != "THK" else ()
    _state_in(how, x.get("initial_state"), arguments, (*lead, Hv, K, V))
    for name in ("scale", "offsets", "head_map"):
        if name in x and name in how.names:
            arguments[how.names[name]] = np.asarray(x[name], np.int64) if name == "offsets" else x[name]
    if how.l2_norm is not None and (x.get("l2_norm") or how.project != "ours"):
        arguments[how.l2_norm] = bool(x.get("l2_norm", False))
    sizes = dict(T=T, H=Hv, K=K, V=V)
    return Plan(arguments | dict(how.always), exact, lambda result: _read(how, result, sizes, lead, ragged))


def _check(how, x, Hk, Hv, K, V):
    gate = None if x.get("g") is None else "channel" if x["g"].ndim == 3 else "head"
    heads = "equal" if Hk == Hv else x.get("head_map", "grouped")
    lacks = {
        _GATE[gate]: gate not in how.gates,
        f"{heads} heads": heads not in how.heads,
        "K != V": how.square and K != V,
        "scale": "scale" in x and how.scale == "inside",
        "l2_norm": bool(x.get("l2_norm")) and how.l2_norm is None,
        "offsets": "offsets" in x and "offsets" not in how.names,
    }
    for words, lacking in lacks.items():
        if lacking:
            raise NotOffered(words)


def _gate(g, form):
    """The gate in their form, and the g in nats that it is, in float64."""
    with np.errstate(all="ignore"):
        if form == "exp":
            a = np.exp(g)
            return a, np.log(a.astype(np.float64))
        if form == "log2":
            g2 = (g.astype(np.float64) / np.log(2)).astype(np.float32)
            return g2, g2.astype(np.float64) * np.log(2)
    return g, g


def layout_of(how, name, a):
    """q, k, v [T, H, n], g [T, H, K] or [T, H], beta [T, H] in the axes of the convention."""
    if a is None:
        return None
    if (name == "beta" and how.beta_axis) or (name == "g" and a.ndim == 2 and how.gate_axis):
        a = a[..., None]
    if how.axes == "THK":
        return a
    return np.ascontiguousarray(a[None] if how.axes == "BTHK" else np.swapaxes(a, 0, 1)[None])


def _state_in(how, state, arguments, shape):
    name = how.names.get("initial_state")
    if state is None:
        if how.no_state == "omit":
            return
        state = None if how.no_state == "none" else np.zeros(shape, np.float32)
    elif name is None:
        raise NotOffered("initial state")
    if state is not None:
        state = state.reshape(shape)
        state = np.ascontiguousarray(np.swapaxes(state, -1, -2)) if how.state == "VK" else state
    arguments[name] = state


def _read(how, result, sizes, lead, ragged):
    """(o [T, H, V], state) of their result, in our layout."""
    T, H, K, V = (sizes[n] for n in "THKV")
    o_shape = {"THK": (T, H, V), "BTHK": (1, T, H, V), "BHTK": (1, H, T, V)}[how.axes]
    s_shape = (*lead, H, K, V) if how.state == "KV" else (*lead, H, V, K)
    if how.returns == "packed" and len(result) == 1:
        flat, n = result[0].reshape(-1), T * H * V
        if flat.size != n + H * K * V:
            raise WrongResult(f"the result holds {flat.size} values; o and the state have {n} and {H * K * V}")
        result = flat[:n].reshape(o_shape), flat[n:].reshape(s_shape)
    if len(result) != 2:
        raise WrongResult(f"it gave {len(result)} result{'s' * (len(result) != 1)}; it must give two, o and the state")
    o, state = result
    if (o.shape, state.shape) == (s_shape, o_shape) != (o_shape, s_shape):
        raise WrongResult("it gave the state and o; it must give o, then the state", "the state is given before o")
    if o.shape != o_shape:
        raise WrongResult(f"o has shape {list(o.shape)}; it must be {list(o_shape)}")
    if state.shape != s_shape:
        swapped = state.shape == (*s_shape[:-2], s_shape[-1], s_shape[-2])
        raise WrongResult(f"the state has shape {list(state.shape)}; it must be {list(s_shape)}", SWAPPED * swapped)
    o = o[0] if how.axes == "BTHK" else np.swapaxes(o[0], 0, 1) if how.axes == "BHTK" else o
    state = np.swapaxes(state, -1, -2) if how.state == "VK" else state
    return o, state if ragged or not lead else state[0]
