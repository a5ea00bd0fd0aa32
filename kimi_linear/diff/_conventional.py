"""A recorded call in somebody's conventions, as our arguments and results: the inverse of what `check_op` does."""

from __future__ import annotations

import inspect

import numpy as np

from .. import reference
from .._names import meant
from ..conventions import Convention, DeltaRule

__all__ = ["ours", "parameters"]

#: Arguments that change nothing of the values, or are read below.
KNOWN = {
    "output_final_state", "head_first", "chunk_size", "disable_recompute", "return_intermediate_states", "safe_gate",
    "inplace_final_state", "cu_seqlens_cpu", "chunk_indices", "cp_context", "transpose_state_layout", "state_v_first",
    "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "A_log", "dt_bias", "lower_bound", "out", "ctx", "form",
}


def parameters(op):
    """Names of an op's arguments in the reference; ValueError names the ops that there are."""
    from .. import ops

    known = [n for n in ops.__all__ if hasattr(reference, n)] + ["route_weights", "silu", "softplus"]
    if op not in known:
        raise ValueError(f"op is {op!r}; it must be one of {', '.join(known)}{meant(op, known)}")
    return inspect.signature(getattr(reference, op)).parameters


def ours(op, how: Convention | None, inputs, results):
    """(arguments, results, notes) of a call under our names and in our layout.

    Raises
    ------
    ValueError
        If an argument is missing, or a shape is not what the convention says; the message names it.
    """
    taken = parameters(op)
    if isinstance(how, DeltaRule) and how.project != "ours":
        args, got, notes = _delta_rule(how, dict(inputs), list(results))
    else:
        theirs = {t: o for o, t in how.names.items()} if how is not None else {}
        args = {theirs.get(n, n): x for n, x in inputs.items()}
        got, notes = list(results), []
    unknown = [n for n in args if n not in taken]
    if op == "delta_rule" and args.get("checkpoints") is not None:
        del args["checkpoints"]
        notes.append("checkpoints are not judged")
    notes += [f"{n} was not looked at" for n in unknown if n not in KNOWN]
    args = {n: x for n, x in args.items() if n in taken}
    lacking = [n for n, p in taken.items() if p.default is p.empty and n not in args]
    if op.startswith("delta_rule") and "g" in lacking:
        lacking.remove("g")
        args["g"] = None
    if lacking:
        raise ValueError(f"the call has no {', '.join(lacking)}; {op} takes {', '.join(taken)}, and it has "
                         f"{', '.join(map(str, inputs)) or 'nothing'}")
    return args, got, notes


# ---- the delta rule ------------------------------------------------------------------------------------


def _delta_rule(how, given, results):
    if given.get("raw_g") is not None:  # vLLM's name of what fla calls g, with use_gate_in_kernel
        given |= {"g": given.pop("raw_g"), "dt_bias": given.pop("g_bias", None), "use_gate_in_kernel": True}
    notes, named = [], {o: given.pop(t) for o, t in how.names.items() if given.get(t) is not None}
    lacking = [how.names[n] for n in ("q", "k", "v") if n not in named]
    if lacking:
        raise ValueError(f"the call has no {', '.join(lacking)}; in the conventions of {how.project} delta_rule takes "
                         f"{', '.join(how.names.values())}, and it has {', '.join(map(str, given)) or 'nothing'}")
    q = named["q"]
    if q.ndim != len(how.axes):
        raise ValueError(f"q has shape {list(q.shape)}; in the conventions of {how.project} it must be "
                         f"[{', '.join(how.axes)}]")
    rows = _Rows(how, q, named["v"])
    args = {n: rows.flat(named[n], n) for n in ("q", "k", "v")}
    args["g"] = rows.flat(_squeezed(named["g"], how.gate_axis), "g") if "g" in named else None
    beta = named.get("beta")
    args["beta"] = np.ones(args["v"].shape[:2], np.float32) if beta is None else \
        rows.flat(_squeezed(beta, how.beta_axis), "beta")
    _gates(how, given, args)
    if how.scale == "caller":
        args["scale"] = 1.0
    elif named.get("scale") is not None:
        args["scale"] = float(named["scale"])
    if how.l2_norm and given.pop(how.l2_norm, False):
        args |= {"l2_norm": True, "l2_eps": how.l2_eps}
    if args["q"].shape[1] != args["v"].shape[1]:
        args["head_map"] = next((h for h in how.heads if h != "equal"), "grouped")
    transposed = (how.state == "VK") != bool(given.get("transpose_state_layout") or given.get("state_v_first"))
    offsets = named.get("offsets")
    if offsets is not None:
        args["offsets"] = np.asarray(offsets).astype(np.int64)
    elif rows.B > 1:
        args["offsets"] = np.arange(rows.B + 1) * rows.T
    args["initial_state"] = _state(named.get("initial_state"), args, transposed)
    always = set(how.always) | KNOWN
    notes += [f"{n} was not looked at" for n, x in given.items()
              if n not in always and x is not None and x is not False]
    notes += [f"result {i} was not looked at" for i, x in enumerate(results) if i > 1 and x is not None]
    return args, _results(how, results, args, rows, transposed), notes


class _Rows:
    """Tokens of a batch one after another."""

    def __init__(self, how, q, v):
        self.axes = how.axes
        self.B, self.T = (1, len(q)) if how.axes == "THK" else (q.shape[0], q.shape[1 if how.axes == "BTHK" else 2])
        self.Hv, self.V = v.shape[2 if how.axes == "BTHK" else 1], v.shape[-1]

    def flat(self, x, name):
        """[B, T, H, ..] or as they have it -> [B * T, H, ..]."""
        x = np.asarray(x)
        if self.axes == "THK":
            return x
        x = np.swapaxes(x, 1, 2) if self.axes == "BHTK" else x
        if x.ndim < 3 or x.shape[:2] != (self.B, self.T):
            raise ValueError(f"{name} has shape {list(x.shape)}; it must begin with [{self.B}, {self.T}] as q's")
        return x.reshape(self.B * self.T, *x.shape[2:])


def _squeezed(x, has_one):
    return x[..., 0] if has_one and x.shape[-1] == 1 else x


def _gates(how, given, args):
    """g in nats and beta in 0..1, made as the kernel makes them where they are raw."""
    g = args["g"]
    if given.get("use_gate_in_kernel"):
        if given.get("A_log") is None:
            raise ValueError("use_gate_in_kernel is on and the call has no A_log; g cannot be made")
        H, K = g.shape[1:]
        bias = given.get("dt_bias")
        bias = np.zeros((H, K)) if bias is None else np.asarray(bias).reshape(H, K)
        bound = given.get("lower_bound") if given.get("safe_gate") else None
        args["g"] = reference.decay_gate(g, np.exp(reference.f64(given["A_log"])).reshape(-1), bias, lower_bound=bound)
    elif g is not None and how.gate == "exp":
        args["g"] = np.log(reference.f64(g))
    elif g is not None and how.gate == "log2":
        args["g"] = reference.f64(g) * np.log(2)
    if given.get("use_beta_sigmoid_in_kernel"):
        args["beta"] = reference.sigmoid(args["beta"])


def _state(state, args, transposed):
    """An initial state, [H, K, V], or [N, H, K, V] with offsets."""
    if state is None:
        return None
    state = np.swapaxes(np.asarray(state), -1, -2) if transposed else np.asarray(state)
    H, K, V = args["v"].shape[1], args["q"].shape[2], args["v"].shape[2]
    lead = (len(args["offsets"]) - 1,) if "offsets" in args else ()
    want = int(np.prod((*lead, H, K, V)))
    if state.size != want or state.shape[-2:] != (K, V):
        raise ValueError(f"the initial state has shape {list(state.shape)}, its last two axes in our order; it must be "
                         f"{[*lead, H, K, V]}")
    return state.reshape(*lead, H, K, V)


def _results(how, results, args, rows, transposed):
    """[o, state] in our layout; None for a state that was not given back."""
    N = rows.B * rows.T * rows.Hv * rows.V
    if how.returns == "packed" and len(results) == 1:
        flat = results[0].reshape(-1)
        K = args["q"].shape[2]
        results = [flat[:N], flat[N:].reshape(-1, rows.Hv, rows.V, K)]
    o = np.asarray(results[0])
    if o.size != N:
        raise ValueError(f"o has shape {list(o.shape)}; it must have {N} values as v does")
    o = np.swapaxes(o.reshape(rows.B, rows.Hv, rows.T, rows.V), 1, 2) if how.axes == "BHTK" else o
    got = [o.reshape(-1, rows.Hv, rows.V)]
    if len(results) > 1 and results[1] is not None:
        got.append(_state(results[1], args, transposed))
    return got
