"""What `check_op` knows of `delta_rule_backward`: the cases of the delta rule, with gradients of what it gives."""

import functools
import zlib
from dataclasses import replace

import numpy as np

from .. import reference
from . import delta_rule
from .delta_rule.calls import kinds as forward_kinds
from .delta_rule.calls import layout_of, plan_of
from .delta_rule.cases import TOKENS
from .plain import SAME_TWICE, filled, given_outputs, halved, plain
from .spec import Law, Plan, WrongResult

__all__ = ["SPEC"]

RESULTS = ("dq", "dk", "dv", "dg", "dbeta", "dinitial_state")
#: Terms of the longest sum, that of dg over a chunk of 64 and 16 values, which a kernel may add one by one.
USUAL = 1024


# ---- cases ---------------------------------------------------------------------------------------------


def _case(forward, name="", *, change=None, says="", ends=True, steps=None, needs=()):
    """A case of the delta rule with do and, where a state is carried and `ends` is true, with dstate."""
    name = name or forward.name

    def make(kind):
        x = forward.make(kind)
        rng = np.random.default_rng(zlib.crc32(f"{name} back".encode()))
        x = {"do": rng.standard_normal(x["v"].shape).astype(np.float32)} | x
        if ends and "initial_state" in x:
            x["dstate"] = rng.standard_normal(x["initial_state"].shape).astype(np.float32)
        if change is not None:
            change(x, rng)
        return x

    return replace(forward, name=name, make=make, needs=forward.needs | set(needs), usual=USUAL * bool(forward.usual),
                   steps=steps, says=says or forward.says)


def _split(cut):
    """Steps of a case: the last tokens first, whose initial state's gradient is the first's final state's."""
    def steps(x, call):
        rows = {n: x[n] for n in ("do", *TOKENS)}
        first, last = ({n: a[r] for n, a in rows.items()} for r in (slice(cut), slice(cut, None)))
        before = {n: a for n, a in first.items() if n != "do"} | {"initial_state": x["initial_state"]}
        state = np.float32(reference.delta_rule(**before)[1])
        late = call(last | {"initial_state": state, "dstate": x["dstate"]})
        early = call(first | {"initial_state": x["initial_state"], "dstate": np.ascontiguousarray(late[5])})
        return *(np.concatenate(pair) for pair in zip(early[:5], late[:5], strict=True)), early[5]

    return steps


def _scaled(factor):
    def change(x, rng):
        for name in ("do", "dstate"):
            x[name] *= np.float32(factor)
    return change


def cases():
    """Those of the delta rule that have a gate, one call and no NaN, which no gradient is of use beside; and more."""
    known = {c.name: c for c in delta_rule.SPEC.cases}
    yield from (_case(c) for c in known.values() if not (c.steps or "NaN" in c.needs or c.name == "gate-none"))
    carried = known["carried-65"]
    yield _case(known["carried-64"], "no-dstate", ends=False, says="no gradient of the final state")
    yield _case(carried, "dstate-alone", change=filled("do", 0), says="do is zero")
    for size in (1e-12, 1e12):
        yield replace(_case(carried, f"gradients-{size:g}".replace("+", ""), change=_scaled(size), needs={"any size"},
                            says=f"do and dstate are of the size {size:g}"), usual=0)
    yield _case(known["gate-5-long"], "gate-20-long", change=lambda x, rng: x["g"] is None or x["g"].fill(-20),
                says="dg is e^-20 of what cancels in running sums")
    longer = known["split-64"]
    for cut in (64, 37):
        forward = replace(longer, make=lambda kind: _with_state(longer.make(kind)))
        yield replace(_case(forward, f"split-{cut}", steps=_split(cut)), group="carried",
                      says="in two calls, the last tokens first; dinitial_state goes on as dstate")


def _with_state(x):
    (_, H, V), K = x["v"].shape, x["q"].shape[-1]
    return x | {"initial_state": np.random.default_rng(5).standard_normal((H, K, V)).astype(np.float32)}


# ---- laws ----------------------------------------------------------------------------------------------


def _anticausal(x, call):
    t = len(x["q"]) // 2
    for a, b in zip(call(x)[:5], call(halved(x, ("do",), slice(t)))[:5], strict=True):
        if a[t:].tobytes() != b[t:].tobytes():
            return f"do of a token changes gradients of tokens behind it, in {int((a[t:] != b[t:]).sum())} values"
    return None


def _apart(x, call):
    a, b = call(x)[2][:, :-1], call(halved(x, ("do", *TOKENS), np.s_[:, -1]))[2][:, :-1]
    return None if a.tobytes() == b.tobytes() else \
        f"one head changes dv of others, in {int((a != b).sum())} values"


LAWS = (SAME_TWICE, Law("anticausal", "do of a token changes no byte of a later token's gradients", _anticausal),
        Law("heads-apart", "a head changes no byte of another's dv", _apart), given_outputs(RESULTS))


# ---- calls ---------------------------------------------------------------------------------------------


def kinds(how):
    """Kinds of gate that have a gradient."""
    return tuple(kind for kind in forward_kinds(how) if kind is not None)


def plan(how, x):
    """The Plan of a call in somebody's conventions: the op's arguments there, do and dstate as its results lie."""
    forward = plan_of(how, {n: a for n, a in x.items() if n not in ("do", "dstate")})
    exact = forward.inputs | {n: x[n] for n in ("do", "dstate") if n in x}
    given = {n: forward.arguments[how.names[n]] for n in (*TOKENS, "initial_state")
             if how.names[n] in forward.arguments}
    arguments = {"do": layout_of(how, "v", x["do"])} | {how.names[n]: a for n, a in given.items()} | forward.arguments
    if "dstate" in x:
        lead = () if how.axes == "THK" or "offsets" in x else (1,)
        dstate = x["dstate"].reshape(*lead, *x["dstate"].shape)
        arguments["dstate"] = np.ascontiguousarray(dstate.swapaxes(-1, -2)) if how.state == "VK" else dstate
    wanted = [n for n, a in given.items() if a is not None]
    return Plan(arguments, exact, lambda result: _read(how, result, wanted, given, exact))


def _read(how, result, wanted, given, x):
    """The six gradients in our layout. Where there is no initial state its gradient may be left out, and is not
    judged."""
    if len(result) not in (len(wanted), len(RESULTS)):
        raise WrongResult(f"it gave {len(result)} results; it must give {', '.join(f'd{n}' for n in wanted)}")
    found = dict(zip((*TOKENS, "initial_state"), result))
    for name in wanted:
        if found[name].shape != given[name].shape:
            raise WrongResult(f"d{name} has shape {list(found[name].shape)}; it must be {list(given[name].shape)}, as "
                              f"{name}")
    shapes = {n: np.shape(x[n]) for n in TOKENS}
    grads = [_back(how, found[n]).reshape(shapes[n]) for n in TOKENS]
    grads[3] = _of_gate(how, grads[3], x["g"])
    if "initial_state" not in found:
        return *grads, np.float32(reference.delta_rule_backward(**x)[5])
    state = found["initial_state"]
    return *grads, (state.swapaxes(-1, -2) if how.state == "VK" else state).reshape(_shape_of_state(x))


def _shape_of_state(x):
    (_, H, V), K = x["v"].shape, x["q"].shape[-1]
    return (H, K, V) if x.get("offsets") is None else (len(x["offsets"]) - 1, H, K, V)


def _back(how, a):
    """[T, H, ..] of their axes."""
    if how.axes == "BHTK":
        return np.swapaxes(a[0], 0, 1)
    return a[0] if how.axes == "BTHK" else a


def _of_gate(how, dg, g):
    """The gradient of g in nats of that of what they are given."""
    if how.gate == "exp":
        return (dg * np.exp(np.float64(g))).astype(np.float32)
    return (dg / np.log(2)).astype(np.float32) if how.gate == "log2" else dg


# ---- the packaged model --------------------------------------------------------------------------------


@functools.cache
def real():
    """The inputs that `delta_rule` has of the packaged model, with gradients of the size that its outputs have."""
    found = {}
    for name, x in delta_rule.SPEC.real().items():
        do = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(x["v"].shape)
        found[name] = {"do": np.float32(do)} | x
    return found


SPEC = replace(plain("delta_rule_backward", RESULTS, cases(), LAWS, narrow=("do", "q", "k", "v"),
                     narrow_results=("dq", "dk", "dv")),
               laws=LAWS, kind="channel", forms=("recurrent", "chunked"), kinds=kinds, plan=plan, real=real,
               diagnose=delta_rule.SPEC.diagnose)
