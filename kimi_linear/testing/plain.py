"""What the ops but the delta rule share: cases, laws, calls in the conventions of others, and what is tried.

A module of an op has CASES, and where it needs them LAWS and FORMS; `plain` makes its `SPEC`.
"""

import functools
import inspect
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .. import dataflow, reference
from .._arrays import as_tuple
from ..diff.budgets import budget
from ..diff.metrics import unit_of
from ..faults import Call, mistakes
from .check import FACTOR
from .spec import Case, Explanation, Law, NotOffered, Plan, Spec, WrongResult, given
from .spec import defaults as defaults_of

__all__ = ["DROPPED", "LOST", "SAME_TWICE", "Form", "allowances", "alone", "causal", "drawn", "f32", "faint", "filled",
           "gates", "given_outputs", "halved", "lone_rows", "maker", "nan_spread", "nans", "plain", "rows_apart"]

#: What is said of NaN that a result should have.
LOST = "NaN is lost: there are numbers where it belongs"
#: What a `Form` gives for an argument that is not passed.
DROPPED = object()
#: Arguments whose second axis is that of tokens, not the first.
_TOKENS_SECOND = {"snapshots"}


# ---- cases -----------------------------------------------------------------------------------------


def f32(**arrays):
    """Arguments; arrays of reals as float32."""
    return {n: np.ascontiguousarray(a, np.float32) if isinstance(a, np.ndarray) and a.dtype.kind not in "iu" else a
            for n, a in arrays.items()}


def maker(op, inputs):
    """``case(name, group, *sizes, change=..., needs=..., usual=..., steps=..., says=..., **more)`` of an op.

    ``inputs(rng, *sizes, **more)`` makes the arguments of a case, ``change(x, rng)`` changes them in place. What the
    case does not name has the values that the convention fixes.
    """
    def case(name, group, *sizes, change=None, needs=(), usual=False, steps=None, says="", **more):
        def make(kind):
            rng = np.random.default_rng(zlib.crc32(f"{op} {name}".encode()))
            x = given(op, f32(**inputs(rng, *sizes, **more)))
            x |= {n: value for n, value in (kind or {}).items() if n in defaults_of(op) and n not in more}
            if change is not None:
                change(x, rng)
            return x

        return Case(name, group, make, frozenset(needs), usual, steps, says)

    return case


def nans(case, *sizes, **places):
    """A case with one NaN for each argument, at a place."""
    for name, at in places.items():
        def change(x, rng, name=name, at=at):
            x[name][at] = np.nan

        yield case(f"nan-{name}", "nan", *sizes, change=change, needs={"NaN"},
                   says="NaN in one value: NaN where it goes, nowhere else")


def filled(name, value):
    """A change of a case: an argument full of one value."""
    def change(x, rng):
        x[name][...] = value

    return change


def drawn(name, values, rows=slice(None)):
    """A change of a case: an argument, or some rows of it, of values drawn from some."""
    def change(x, rng):
        part = x[name][rows]
        part[...] = rng.choice(np.float32(values), part.shape)

    return change


def faint(name, factor=1e-39):
    """A change of a case: every other row of an argument is next to nothing."""
    def change(x, rng):
        x[name][1::2] *= np.float32(factor)

    return change


def gates(case, name):
    """Cases of a gate at the rim of its sigmoid."""
    yield case("saturated", "rim", 6, change=drawn(name, [-80, -20, -1e-20, 0, 1e-20, 20, 88, 100, 1e4]),
               says="gates from -80 to 1e4, and zeros")
    yield case("vanishing", "rim", 6, change=drawn(name, [-1e4, -200, -100, -92, -88], rows=slice(1, None, 2)),
               needs={"subnormals"}, says="gates from -88 to -1e4, in every other row")


# ---- laws ------------------------------------------------------------------------------------------


def _same_twice(x, call):
    for a, b in zip(call(x), call(x), strict=True):
        if a.tobytes() != b.tobytes():
            return f"two calls on the same inputs differ in {int((a != b).sum())} values"
    return None


SAME_TWICE = Law("same-bytes-twice", "two calls on the same inputs give the same bytes", _same_twice)


def given_outputs(names):
    """out= is filled for these results, and nothing beside it."""
    def check(x, call):
        guard, kept, wanted = 32, [], call(x)
        for a in wanted:
            whole = np.full(a.size + 2 * guard, 7, a.dtype)
            kept.append((whole, whole[guard:guard + a.size].reshape(a.shape)))
        views = tuple(view for _, view in kept)
        call(x, out=views if len(views) > 1 else views[0])
        for (whole, view), a, name in zip(kept, wanted, names, strict=True):
            if (whole[:guard] != 7).any() or (whole[guard + a.size:] != 7).any():
                return f"it wrote outside of its output {name}"
            if a.size and (view == 7).all():
                return f"out= is taken, and its {name} is left as it was"
            if not np.array_equal(view, a, equal_nan=True):
                return f"out= has other values of {name} than a new array gets"
        return None

    return Law("out", "out= is filled, and nothing beside it is written", check, frozenset({"out"}), ("out",))


def _at(name, place):
    """The index of a place, some tokens, in an argument."""
    return (slice(None), place) if name in _TOKENS_SECOND else place


def halved(x, names, place):
    """The arguments with half of what some of them have at a place, in their types."""
    other = dict(x)
    for n in names:
        other[n], at = x[n].copy(), _at(n, place)
        other[n][at] = other[n][at] // 2 if x[n].dtype.kind in "iu" else other[n][at] * np.float32(0.5)
    return other


def rows_apart(*names, first=None):
    """What is done to the last row of these arguments changes no byte of another; of the `first` results, or all."""
    def check(x, call):
        for a, b in zip(call(x)[:first], call(halved(x, names, slice(-1, None)))[:first], strict=True):
            if a[:-1].tobytes() != b[:-1].tobytes():
                return f"one row changes the results of others, in {int((a[:-1] != b[:-1]).sum())} values"
        return None

    return Law("rows-apart", "a row changes no byte of another's result", check)


def causal(*names):
    """What is done to the second half of the tokens changes no byte of the first's results."""
    def check(x, call):
        t = len(x[names[0]]) // 2
        a, b = call(x)[0][:t], call(halved(x, names, slice(t, None)))[0][:t]
        if a.tobytes() != b.tobytes():
            return f"tokens change outputs before them, in {int((a != b).sum())} values"
        return None

    return Law("causal", "later tokens change no byte of an output", check)


def allowances(op, x):
    """The bound of each result, with what its type rounds."""
    ref, stored = getattr(reference, op)(**x), _stored(x)
    bounds = as_tuple(budget(op, ref, stored=stored, **x))
    return [b + stored * np.abs(r) for b, r in zip(bounds, as_tuple(ref), strict=True)]


def alone(op, *names, first=None):
    """Each of a few rows in a call of its own gives what the whole gave, but for twice the error allowed; in the
    `first` results, or all."""
    def check(x, call):
        whole, bounds = call(x)[:first], allowances(op, x)[:first]
        T = len(x[names[0]])
        for t in sorted({0, T // 2, T - 1}):
            lone = call(x | {n: np.ascontiguousarray(x[n][_at(n, slice(t, t + 1))]) for n in names})
            for a, b, bound in zip(whole, lone[:first], bounds, strict=True):
                if (np.abs(np.float64(a[t:t + 1]) - b) > 2 * FACTOR * bound[t:t + 1]).any():
                    return f"row {t} alone gives another result than in a batch of {T}"
        return None

    return Law("batch-alone", "a row alone gives what it gives in a batch", check)


def _stored(x):
    """u of the narrow type of some of the arguments; 0 where there is none."""
    kinds = {a.dtype for a in x.values() if isinstance(a, np.ndarray) and a.dtype.itemsize < 4}
    return max(map(unit_of, kinds), default=0.0)


def lone_rows(op, *names, first=None):
    """The two laws of an op whose rows are apart; of its `first` results, or all."""
    return rows_apart(*names, first=first), alone(op, *names, first=first)


# ---- the conventions of others ---------------------------------------------------------------------


def _nothing(x):
    return {}


@dataclass(frozen=True)
class Form:
    """One way in which a call differs from ours, by its words in `kimi_linear.conventions`.

    Attributes
    ----------
    to : callable(arguments) -> dict
        What is passed for ours, by our names; DROPPED for none, and other names as they are theirs.
    back : callable(results, inputs) -> dict
        Our results of theirs, by our names.
    exact : callable(inputs) -> dict
        Our arguments that have the values passed, where passing them rounds.
    """

    to: Callable = _nothing
    back: Callable | None = None
    exact: Callable = _nothing


def _kinds(the_op, forms, how):
    """What cases take: the values that the convention fixes. ValueError names a form that there is not."""
    for word in how.forms:
        if word not in forms:
            raise ValueError(f"{how.project} has the form {word!r} of {the_op}; there are {', '.join(forms) or 'none'}")
    return (dict(how.fixed),)


def _plan(the_op, results, forms, how, x):
    defaults = defaults_of(the_op)
    for name, value in how.fixed.items():
        if x.get(name, defaults.get(name)) != value:
            raise NotOffered(f"{name} = {x.get(name, defaults.get(name))!r}")
    x = given(the_op, x)
    passed, used = {n: a for n, a in x.items() if n not in how.fixed}, []
    for word in how.forms:
        used.append(forms[word])
        passed |= forms[word].to(passed)
    passed = {n: a for n, a in passed.items() if a is not DROPPED}
    for name in passed:
        if name in x and name not in how.names:
            raise NotOffered(name)
    exact = x
    for form in used:
        exact = exact | form.exact(exact)
    arguments = {how.names.get(n, n): a for n, a in passed.items()}

    def read(result):
        n = how.returned or len(results)
        if len(result) != n:
            raise WrongResult(f"it gave {len(result)} result{'s' * (len(result) != 1)}; it must give {n}: "
                              f"{', '.join(results[:n])}")
        found = dict(zip(results, result))
        for form in reversed(used):
            if form.back is not None:
                try:
                    found = form.back(found, x)
                except (ValueError, IndexError) as error:
                    shapes = ", ".join(f"{n} {list(a.shape)}" for n, a in found.items())
                    raise WrongResult(f"the results have the shapes {shapes}, which cannot be read: {error}") from None
        return tuple(found[n] for n in results)

    return Plan(dict(how.always) | arguments, exact, read)


# ---- what is tried ---------------------------------------------------------------------------------


def _mistaken(the_op, x, **named):
    """The reference with faults of `kimi_linear.faults`, by name and choice; None where one cannot be here."""
    wrongly = None
    for name, choice in named.items():
        wrongly = functools.partial(_all_results, _by_name(the_op)[name], choice, wrongly)
    call = Call(the_op, defaults_of(the_op) | x)
    try:
        return call.results() if wrongly is None else wrongly(call)
    except (_Idle, ValueError, KeyError, IndexError):  # the reference refuses what a fault makes of its arguments
        return None


class _Idle(Exception):
    """A fault cannot be in this call."""


@functools.cache
def _by_name(op):
    return {f.name: f for f in mistakes(op)}


def _all_results(fault, choice, within, call):
    """A fault's result, and of those that it does not give the right ones; `within`: another fault, in each call."""
    call = Call(call.op, call.args, within)
    y = fault.function(call, *choice)
    if y is None:
        raise _Idle
    y = as_tuple(y)
    return tuple(np.asarray(a, np.float64) for a in (*y, *call.results()[len(y):]))


def _explanations(op):
    return tuple(Explanation(f.says(choice), ((f.name, choice),), f.rare)
                 for f in mistakes(op) for choice in f.choices + f.more)


# ---- the packaged model ----------------------------------------------------------------------------


def _real(op, parameters, most=2):
    from ..model import Model

    model = Model.tiny()
    ids = model.tokenizer.encode("In the beginning God created the heaven and the earth. " * 2)[:24]
    wanted = [n for n in dataflow.nodes(model.config) if n.op == op][:most]
    if not wanted:
        return {}
    values = {**model.trace(ids, taps="*"), dataflow.TOKENS: np.array(ids, np.int64)}
    found = {}
    for node in wanted:
        args = dataflow.arguments(node, values, model.weights)
        args = {n: np.array(a) if isinstance(a, dataflow.Experts | np.ndarray) else a for n, a in args.items()}
        found[f"model-{node.tap}"] = given(op, f32(**{n: a for n, a in args.items() if n in parameters}))
    return found


# ---- the spec --------------------------------------------------------------------------------------


def plain(op, results, cases, laws=(), forms=None, diagnose=None, mistaken=None, explanations=None, narrow=(),
          narrow_results=None, narrow_rms=Spec.narrow_rms):
    """The Spec of an op.

    Parameters
    ----------
    op : str
    results : tuple of str
    cases : iterable of Case
    laws : iterable of Law
        Besides "same-bytes-twice" and "out".
    forms : dict of str to Form, optional
    diagnose, mistaken, explanations : optional
        As in Spec, where the faults of the op are not all.
    narrow, narrow_results, narrow_rms : optional
        As in Spec; by default all results.
    """
    parameters = inspect.signature(getattr(reference, op)).parameters
    required = tuple(n for n, p in parameters.items() if p.default is p.empty)
    laws = (SAME_TWICE, *laws, given_outputs(results))
    return Spec(op=op, results=results, required=required, forms=(), kind=None, cases=tuple(cases), laws=laws,
                explanations=_explanations(op) if explanations is None else explanations,
                kinds=functools.partial(_kinds, op, forms or {}),
                plan=functools.partial(_plan, op, results, forms or {}),
                mistaken=mistaken or functools.partial(_mistaken, op),
                diagnose=diagnose or nan_spread,
                real=functools.cache(functools.partial(_real, op, parameters)), narrow=narrow,
                narrow_results=results if narrow_results is None else narrow_results, narrow_rms=narrow_rms)


def nan_spread(x, actual, ref):
    """What NaN may mean that is in a result where it should not be, or is not where it should, with one in an input."""
    if all((np.isfinite(a) == np.isfinite(r)).all() for a, r in zip(actual, ref, strict=True)):
        return []
    if not any(isinstance(a, np.ndarray) and a.dtype.kind not in "iu" and np.isnan(a).any() for a in x.values()):
        return []
    gained = [~np.isfinite(a) & np.isfinite(r) for a, r in zip(actual, ref, strict=True)]
    if not any(map(np.any, gained)):
        return [(LOST, "")]
    rows = [np.isfinite(r).all(axis=tuple(range(1, r.ndim))) for r in ref]  # that have no NaN
    if any(a[of].any() for a, of in zip(gained, rows, strict=True)):
        return [("NaN of one row reaches others", "")]
    return [("NaN of one value reaches others of its row", "")]
