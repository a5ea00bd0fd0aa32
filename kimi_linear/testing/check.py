"""`check_op`: a callable through an op's cases and laws, each beside the float64 reference."""

import hashlib
import importlib
import inspect
import re
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np

from .. import reference
from .._arrays import BFLOAT16, as_array, as_tuple
from .._scalars import as_finite
from ..conventions import convention
from ..diff.budgets import budget
from ..diff.compare import bounded, judge
from ..diff.metrics import axis_names, coordinates, unit_of
from ..errors import first_line
from .cards import Card, Row
from .explain import NEAR, Failure, explain
from .spec import Law, NotOffered, WrongResult, select, spec

__all__ = ["check_op"]

#: Bounds that an error may reach. The bound counts the roundings of our order of sums; any other order of the sums
#: over K has at most twice as many, and a chunked form has its triangular sums besides.
FACTOR = 4
#: On inputs as a model has them, besides: rms error over the rms of the result, and in one element so many times that.
USUAL_RMS, USUAL_LARGEST = 1e-6, 20
#: Types that a callable may take, and u of those that are narrow.
TYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16, "float16": np.dtype(np.float16)}

GUARD = 64, 1 << 14  # values before and after each input: as many times its own, and at most so many


def check_op(op, fn, *, conventions="ours", dtype="float32", cases="all", without=(), arrays=None, form=None,
             factor=FACTOR):
    """Run a callable over the cases of an op, and say which hold, how far off it is, and why.

    Parameters
    ----------
    op : str
        One of `specs()`.
    fn : callable
        Takes the op's arguments by name, in the conventions named, and returns its results.
    conventions : str or Convention
        Whose names, layouts and units `fn` has: a key of `kimi_linear.conventions`, or an entry of it with ``but``.
    dtype : {"float32", "bfloat16", "float16"}
        What `fn` computes in. In a narrow type it is given values that the type holds, as the reference is, and may
        round to it what docs/math.md#narrow says: its results, and each operand of a product once. Gates, routing
        weights and states stay float32.
    cases : str or list of str
        "all", or patterns of names and groups; the laws are a group.
    without : list of str
        What the callable does not have, as "offsets", "initial state", "T = 0": cases that need it are listed as not
        offered. NotImplementedError says the same, and so does the TypeError of a keyword that `fn` does not have (or
        that what it hands its ``**options`` on to does not have).
    arrays : str or callable, optional
        What `fn` takes: "numpy", "torch", "torch:cuda", "mlx", or a function of a NumPy array; by default as the
        convention says. Results may be NumPy, torch on any device, or have ``__array__`` or ``__dlpack__``.
    form : str, optional
        The form whose bound is taken, where the op has several: "recurrent", "chunked".
    factor : int
        Times the bound of docs/math.md that an element's error may be.

    Returns
    -------
    Card

    Raises
    ------
    ValueError
        If there is no such op, convention, type, case, lack or form, the op has nothing narrow, or `factor` is not > 0.
    TypeError
        If `fn` is not callable, or an argument is of another type.
    ImportError
        If the package of `arrays` is not there.
    """
    if not callable(fn):
        raise TypeError(f"fn is a {type(fn).__name__}; it must be callable, with the arguments of {op}")
    if not as_finite(factor, "factor") > 0:
        raise ValueError(f"factor is {factor}; it must be > 0")
    the = spec(op)
    how = convention(conventions, op)
    chosen = select((*the.cases, *the.laws), cases)
    lacks = lacks_of(the, without)
    if form is not None and form not in the.forms:
        raise ValueError(f"form is {form!r}; {op} has {', '.join(the.forms) or 'one form alone'}")
    form = {} if form is None else {"form": form}
    return Run(the, how, fn, _maker(arrays or how.arrays), lacks, form, factor, narrow_type(the, dtype)).card(chosen)


def narrow_type(the, dtype):
    """The dtype of a name, or of a type of another library; ValueError where there is none, or the op has no use for
    it."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    name = name.rpartition(".")[2]
    if name not in TYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be of {', '.join(TYPES)}")
    if name != "float32" and not the.narrow:
        raise ValueError(f"dtype is {name!r}; {the.op} is computed in float32 alone")
    return TYPES[name]


def lacks_of(the, without):
    """`without` as a set; ValueError where no case or law of the op needs one of its words."""
    if not np.iterable(without):
        raise TypeError(f"without is {without!r:.40}; it must be text, or a list of it")
    lacks = frozenset([without] if isinstance(without, str) else without)
    known = frozenset().union(*(c.needs for c in the.cases), *(law.needs for law in the.laws))
    for name in sorted(lacks - known):
        raise ValueError(f"without has {name!r}; it must be of {', '.join(sorted(known))}")
    return lacks


def _lacks(rows, cases):
    """What all cases that need it fail by raising, and no other case does: the callable may not have it."""
    raises = {r.name for r in rows if r.detail.startswith("raised ")}
    run = {r.name: c.needs for r, c in zip(rows, cases, strict=True) if r.status != "not offered" and r.group != "laws"}
    if not raises or any(not run.get(name) for name in raises):
        return ()
    words = sorted(frozenset().union(*(run[name] for name in raises)))
    return tuple(w for w in words if all(name in raises for name, needs in run.items() if w in needs))


def _gathered(why):
    """(sentence, its cases) of a mapping from cases to (sentence, place): the sentence of most cases first, each with
    the place of its first case."""
    found = []
    for says in dict.fromkeys(says for says, _ in why.values()):
        names = tuple(name for name, (s, _) in why.items() if s == says)
        place = why[names[0]][1]
        found.append((f"{says}: {place} ({names[0]})" if place else says, names))
    return tuple(sorted(found, key=lambda f: -len(f[1])))


class Run:
    """One callable in one convention.

    Attributes
    ----------
    u : float
        Of the type that the callable computes in; `stored` is the same, and 0 for float32.
    failures : list of Failure
        Of results that can be compared, for `explain`.
    holding : list of Failure
        The same of cases that hold.
    known : dict of str to (str, str)
        Case -> what explains its failure already, and a place or "".
    """

    def __init__(self, the, how, fn, make, lacks, form, factor, dtype=TYPES["float32"]):
        self.the, self.how, self.fn, self.make = the, how, fn, make
        self.lacks, self.form, self.factor, self.dtype = lacks, form, factor, dtype
        self.u = unit_of(dtype)
        self.stored = self.u if dtype.itemsize < 4 else 0.0
        self.usual = the.narrow_rms * self.u if self.stored else USUAL_RMS
        self.kinds = the.kinds(how)
        self.failures, self.holding, self.known = [], [], {}

    def card(self, chosen):
        """The Card of some of the op's cases and laws."""
        start = time.perf_counter()
        rows = [self.law(c) if isinstance(c, Law) else self.case(c) for c in chosen]
        if all(r.status == "not offered" for r in rows):
            return Card(self.the.op, self.how.project, (), self.factor, refused=self.refused() or rows[0].detail,
                        dtype=self.dtype.name)
        why = explain(self.the, self.failures, self.holding) | self.known
        rows = tuple(replace(r, why=", ".join(filter(None, why.get(r.name, ())))) for r in rows)
        return Card(self.the.op, self.how.project, rows, self.factor, _gathered(why), lacks=_lacks(rows, chosen),
                    seconds=time.perf_counter() - start, dtype=self.dtype.name)

    def refused(self):
        """Why the plain case is not offered; empty where it is."""
        case = self.the.cases[0]
        try:
            self.results(case, self._inputs(case))
        except NotOffered as error:
            names = ", ".join(self.the.plan(self.how, case.make(self.kinds[0])).arguments)
            return f"the plain case is not offered: {error}; it is called with {names}"
        except Exception:  # a finding of its row
            return ""
        return ""

    def _inputs(self, case):
        lacking = sorted(case.needs & self.lacks)
        if lacking:
            raise NotOffered(f"{', '.join(lacking)}")
        return self.narrowed(case.make(self.kinds[0]))

    def narrowed(self, inputs):
        """The inputs with those that may be narrow in the callable's type; NotOffered where it cannot hold them."""
        if not self.stored:
            return inputs
        narrow = {n: a for n in self.the.narrow if isinstance(a := inputs.get(n), np.ndarray)}
        with np.errstate(over="ignore"):
            held = {n: a.astype(self.dtype) for n, a in narrow.items()}
        if any((np.isfinite(narrow[n]) & ~np.isfinite(held[n])).any() for n in narrow):
            raise NotOffered(f"values beyond {self.dtype.name}")
        return inputs | held

    def results(self, case, inputs, fill=np.nan):
        """What is judged, in our layout: of one call, or of the case's steps."""
        def call(x, **more):
            return self._call(x, fill, **more)

        return call(inputs) if case.steps is None else case.steps(inputs, call)

    def _call(self, inputs, fill=np.nan, **more):
        plan = self.the.plan(self.how, inputs)
        held = {n: _Guarded(a, fill) for n, a in plan.arguments.items() if isinstance(a, np.ndarray)}
        given = {n: self.make(held[n].view) if n in held else a for n, a in plan.arguments.items()}
        try:
            result = self.fn(**given, **more)
        except NotImplementedError as error:
            raise NotOffered(first_line(error) or "NotImplementedError") from None
        except TypeError as error:
            name = _unknown_keyword(error, given | more)
            if name is None:
                raise
            raise NotOffered(f"no argument {name!r}") from None
        for name, guarded in held.items():
            changed = guarded.changed()
            if changed:
                raise WrongResult(f"its input {name} {' '.join(changed)}", f"its input {name} {changed[0]}", changed[1])
        return plan.read(tuple(map(_numpy, result)) if isinstance(result, tuple | list) else (_numpy(result),))

    def case(self, case):
        """The Row of a case."""
        try:
            inputs = self._inputs(case)
            exact = self.the.plan(self.how, inputs).inputs
            actual = self.results(case, inputs)
        except NotOffered as lack:
            return Row(case.name, case.group, "not offered", detail=str(lack))
        except WrongResult as error:
            self.known[case.name] = error.why
            return Row(case.name, case.group, "fails", detail=str(error))
        except Exception as error:  # whatever a foreign kernel throws is a finding
            detail = f"raised {type(error).__name__}: {first_line(error)}"
            self.known[case.name] = detail, ""
            return Row(case.name, case.group, "fails", detail=detail)
        ref, bounds = _reference(self.the.op, exact, self.form, self.stored)
        for name, a, r in zip(self.the.results, actual, ref, strict=True):
            if a.shape != r.shape:
                says = f"{name} has shape {list(a.shape)}; it must be {list(r.shape)}"
                self.known[case.name] = says, ""
                return Row(case.name, case.group, "fails", detail=says)
        types = [self._type(name, a) for name, a in zip(self.the.results, actual, strict=True)]
        actual = tuple(widened(a) for a in actual)
        parts = [judge(a, r, b, op=self.the.op, dtype=t) for a, r, b, t in zip(actual, ref, bounds, types, strict=True)]
        detail = self._fault(case, parts, actual, ref)
        row = Row(case.name, case.group, "fails" if detail else "holds",
                  max(p.errors.rms_relative for p in parts) / self.u,
                  max(p.errors.largest_relative for p in parts) / self.u, max(p.share for p in parts), detail)
        allowed = tuple(self.factor * p.arrays[-1] for p in parts)
        near = NEAR if not self.stored else max(NEAR, 2 * self.usual)
        found = Failure(case, exact, actual, ref, allowed, near)
        if detail:
            self._failed(case, inputs, found)
        else:
            self.holding.append(found)
        return row

    def with_storage(self, name, ref, bound):
        """The bound of a result, and what its own type may round."""
        narrow = self.stored and name in self.the.narrow_results
        return bounded(ref, bound, self.dtype) if narrow else bound

    def _type(self, name, a):
        """The type that a result may have been rounded to: where the callable is narrow the one it came in, of some
        that of the callable whatever they came in."""
        if not self.stored:
            return TYPES["float32"]
        return self.dtype if name in self.the.narrow_results else a.dtype

    def _fault(self, case, parts, actual, ref):
        """What is wrong, in a sentence that names the place; empty where the case holds."""
        for name, p, a, r in zip(self.the.results, parts, actual, ref, strict=True):
            e = p.errors
            if e.nonfinite_apart:
                at = _first_apart(a, r)
                return f"{name} is {a[at]:g} and the reference {r[at]:.3g} at {_place(at, name)}"
            if p.share > self.factor:
                return (f"{name} is {a[p.at]:.6g} and the reference {r[p.at]:.6g} at {_place(p.at, name)}: "
                        f"{p.share:.3g} times the bound")
            usual = max(self.usual, unit_of("float32") * case.usual**0.5)
            largest = USUAL_LARGEST * usual
            if case.usual and (e.rms_relative > usual or e.largest_relative > largest):
                return (f"{name} is off by {e.rms_relative:.1e} of its rms, {e.largest_relative:.1e} in one element; "
                        f"on such inputs it may be {usual:.0e} and {largest:.0e}")
        return ""

    def _failed(self, case, inputs, failure):
        """Keeps the failure for `explain`, unless it goes away where the memory around the inputs is no NaN."""
        if not failure.finite:
            with suppress(Exception):
                again = self.results(case, inputs, fill=0.0)
                again = tuple(widened(a) for a in again)
                if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(failure.actual, again, strict=True)):
                    says = "it reads past the ends of its inputs: NaN that lie there reach the results"
                    self.known[case.name] = says, ""
                    return
        self.failures.append(failure)

    def law(self, law):
        """The Row of a law."""
        lacking = sorted(law.needs & self.lacks) + [n for n in law.arguments if n not in self.how.names]
        if lacking:
            return Row(law.name, "laws", "not offered", detail=", ".join(lacking))
        try:
            broken = law.check(self.narrowed(self.the.cases[0].make(self.kinds[0])), self._call)
        except NotOffered as lack:
            return Row(law.name, "laws", "not offered", detail=str(lack))
        except WrongResult as error:
            broken, self.known[law.name] = str(error), error.why
        except Exception as error:
            broken = f"raised {type(error).__name__}: {first_line(error)}"
        if broken:
            self.known.setdefault(law.name, (broken, ""))
        return Row(law.name, "laws", "fails" if broken else "holds", detail=broken or "")


# ---- the reference -------------------------------------------------------------------------------------

_kept = {}  # digest of an op's inputs -> (reference, bounds): the same cases serve many callables


def _reference(op, inputs, form, stored=0.0):
    """(results, bounds) in float64, each a tuple; `form` and `stored` go to the budget."""
    key = _digest(op, inputs | form | {"stored": stored})
    if key not in _kept:
        if len(_kept) > 400:
            _kept.clear()
        with np.errstate(all="ignore"):
            ref = getattr(reference, op)(**inputs)
            bounds = budget(op, ref, stored=stored, **inputs, **form)
        ref, bounds = as_tuple(ref), as_tuple(bounds)
        if any(np.isnan(a).any() for a in inputs.values() if isinstance(a, np.ndarray)):
            bounds = tuple(np.where(np.isnan(b), np.inf, b) for b in bounds)  # beside a NaN its place alone is judged
        _kept[key] = ref, bounds
    return _kept[key]


def _digest(op, inputs):
    h = hashlib.blake2b(op.encode())
    for name, value in sorted(inputs.items()):
        a = np.asarray(value)
        h.update(f"{name} {a.dtype} {a.shape} ".encode() + np.ascontiguousarray(a).tobytes())
    return h.digest()


# ---- arrays --------------------------------------------------------------------------------------------


class _Guarded:
    """A copy of an array inside a larger one that is filled, before and after, with NaN (or `fill`)."""

    def __init__(self, a, fill):
        filling = fill if a.dtype.kind == "f" or a.dtype == BFLOAT16 else 0
        self.guard = min(GUARD[0] * a.size, GUARD[1]) + GUARD[0]
        self.whole = np.full(a.size + 2 * self.guard, filling, a.dtype)
        self.view = self.whole[self.guard:self.guard + a.size].reshape(a.shape)
        self.view[...] = a
        self.before = self.whole.copy()

    def changed(self):
        """What happened to it, and where; None where nothing did."""
        different = self.whole.view(np.uint8) != self.before.view(np.uint8)
        if not different.any():
            return None
        at = int(different.argmax()) // self.whole.itemsize - self.guard
        if 0 <= at < self.view.size:
            place = [int(i) for i in np.unravel_index(at, self.view.shape)]
            return "was changed", f"first at {place}"
        return "was written", "before its start" if at < 0 else "past its end"


def _maker(arrays):
    """The function that makes what the callable takes from a NumPy array."""
    if callable(arrays):
        return arrays
    package, _, device = arrays.partition(":") if isinstance(arrays, str) else (None, "", "")
    if package == "numpy":
        return lambda a: a
    if package == "torch":
        torch = imported("torch")
        return lambda a: _tensor(torch, a, device or "cpu")
    if package == "mlx":
        return imported("mlx.core").array
    raise ValueError(f'arrays is {arrays!r}; it must be "numpy", "torch", "torch:DEVICE", "mlx" or a function')


def imported(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'no arrays of {name}: {error}; arrays="numpy" hands over NumPy\'s') from None


def _tensor(torch, a, device):
    """On the CPU over the same memory."""
    t = torch.from_numpy(a.view(np.uint16)).view(torch.bfloat16) if a.dtype == BFLOAT16 else torch.from_numpy(a)
    return t.to(device)


def _numpy(x):
    """A result as a NumPy array of its own."""
    if x is None:
        raise WrongResult("a result is None; every result must be returned, the state of a delta rule, too")
    if type(x).__module__.split(".")[0] == "torch":
        x = x.detach().cpu()
    a = as_array(x, "a result")
    if a.dtype.kind in "cSU":
        raise WrongResult(f"a result is {a.dtype}; it must be real numbers")
    if a.dtype == np.longdouble:  # of whose bytes some are padding
        return a.astype(np.float64)
    return a.copy() if a.dtype.kind in "fiu" or a.dtype == BFLOAT16 else a.astype(np.float32)  # may be written again


def widened(a):
    """A result of a narrow type in float32."""
    return a.astype(np.float32) if a.dtype.kind not in "iu" and a.dtype.itemsize < 4 else a


def _first_apart(a, r):
    """The first element in which one of the two is finite alone."""
    apart = np.isfinite(a) != np.isfinite(r)
    apart |= np.isnan(a) != np.isnan(r)
    apart |= np.isinf(a) & (a != r)
    return tuple(int(i) for i in np.argwhere(apart)[0])


#: Axes of results that are not [token, head, channel]; one that has fewer lacks the first.
_AXES = {"state": ("sequence", "head", "key", "value"), "ids": ("token", "slot"), "weights": ("token", "slot"),
         "dhistory": ("sequence", "row", "channel")}
#: The same of weights' gradients, which lack the last.
_AXES_OF_WEIGHTS = {"dw": ("channel", "tap"), "drate": ("head",), "ddt_bias": ("head", "channel")}


def _place(at, name):
    """Where, in words."""
    if name in _AXES_OF_WEIGHTS:
        return coordinates(at, _AXES_OF_WEIGHTS[name][:len(at)])
    return coordinates(at, _AXES[name][-len(at):] if name in _AXES else axis_names(at))


def _unknown_keyword(error, given):
    """The keyword of the call that the callable does not take; None where the error is one of its own.

    `error` was raised by the call in the caller's frame. Every function that it has come through must have handed the
    keyword on, as a decorator does.
    """
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if found is None or found[1] not in given:
        return None
    inner = error.__traceback__.tb_next
    while inner is not None:
        taken = inspect.getargvalues(inner.tb_frame)
        if taken.keywords is None or found[1] not in (taken.locals.get(taken.keywords) or ()):
            return None
        inner = inner.tb_next
    return found[1]
