"""Why a result is wrong: the mistake that, made in the float64 reference, gives the same wrong result.

Every explanation of the op is tried on a few failing cases, those that fit on all; the one that explains most is named,
then the one that explains most of the rest. Where none fits alone, pairs are tried; what fits by chance is taken back;
then the op's `diagnose` looks at what is not finite.
"""

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np

from .._arrays import BFLOAT16
from ..diff.metrics import U, distance, unit_of

__all__ = ["Failure", "explain"]

NEAR = 2e-5     # rms distance to the mistaken reference, over its rms: float32 kernels are nearer
TIMES = 4       # and so many times nearer than to the right one
LOOSE = 1e-2    # for cases in which a mistake that is already named lets rounding grow
HUGE = 1e30     # where it leads out of float32, nothing is compared
TINY = 1e-45    # below every float32
DISTINCT = 8    # values tell of what type they are
SOME = 0.05     # of a result's elements must be finite for it to tell anything
PROBES = 6      # failing cases, of different groups, on which everything is tried
PAIR_ROWS = 40  # tokens of a case on which pairs are tried


@dataclass(frozen=True, eq=False)
class Failure:
    """One failing case: its inputs as the callable had them, what it gave, the reference, the error allowed, and the
    rms distance to a mistaken reference, over its rms, at which a mistake is the one."""

    case: object
    inputs: dict
    actual: tuple
    ref: tuple
    allowed: tuple
    near: float = NEAR

    @property
    def name(self):
        """The case's."""
        return self.case.name

    @property
    def finite(self):
        """True where what is finite is so in both."""
        return all((np.isfinite(a) == np.isfinite(r)).all() for a, r in zip(self.actual, self.ref, strict=True))


#: What is said of a kernel that leaves most of its results as they were: zeros.
EMPTY = "all results are zero, as if nothing were written"


def _is_empty(f):
    """Whether nothing but zeros came, where something else must."""
    return not any(np.any(a) for a in f.actual) and any(np.any(r) for r in f.ref)


def _wrote(held):
    return any(np.any(a) for f in held for a in f.actual)


def explain(spec, failures, held=()):
    """What explains the failures.

    Parameters
    ----------
    spec : Spec
    failures : list of Failure
    held : sequence of Failure
        The cases that hold. Where one has results other than zero, mistakes that give zeros are the reason for zeros.

    Returns
    -------
    why : dict of str to (str, str)
        Case -> sentence, and a place or "". Cases that nothing explains are left out.
    """
    singles = [(e.says, dict(e.switches)) for e in spec.explanations]
    fits = _Fits(spec)
    empty = [f for f in failures if _is_empty(f)]
    if 2 * len(empty) > len(failures) and not (
            _wrote(held) and all(any(fits(switches, f) for _, switches in singles) for f in empty)):
        rest = explain(spec, [f for f in failures if f not in empty], held) if len(empty) < len(failures) else {}
        return {f.name: (EMPTY, "") for f in empty} | rest
    why = {}
    pairs = list(_pairs([(e.says, dict(e.switches)) for e in spec.explanations if not e.alone]))
    named = _cover(fits, singles, failures, why)
    left = _loosely(fits, named, failures, why)
    if any(f.finite for f in left):
        named += (more := _cover(fits, pairs, left, why, pairs=True))
        left = _loosely(fits, more, left, why)
    left = _without_chance(spec, named, failures, left, held, why)
    found = {f.name: spec.diagnose(f.inputs, f.actual, f.ref) or _narrow(f) for f in left}
    often = Counter(says for each in found.values() for says, _ in each)
    return why | {name: max(each, key=lambda e: often[e[0]]) for name, each in found.items() if each}


class _Fits:
    """`_fits` of an op, once for all mistakes that come to the same on a case."""

    def __init__(self, spec):
        self.spec, self.known = spec, {}

    def __call__(self, switches, f, loose=False):
        start = None if loose else self.spec.start(f.inputs, switches)
        if start is not None and self._once(_fails_early, start, switches, f):
            return False
        return self._once(_fits_loosely if loose else _fits, f.inputs, switches, f)

    def _once(self, judge, inputs, switches, f):
        acting = self.spec.acting(inputs, switches)
        key = judge, f, *acting.items()
        if key not in self.known:
            self.known[key] = judge(self.spec, acting, f)
        return self.known[key]


def _loosely(fits, named, failures, why):
    """Of cases left, those whose rounding grows under a mistake that is already named, as many as it explains without
    that at most; what is still left."""
    left = [f for f in failures if f.name not in why]
    for says, switches in named:
        grown = [f for f in left if fits(switches, f, loose=True)]
        if len(grown) <= _explained(says, why):
            why |= {f.name: (says, "") for f in grown}
            left = [f for f in left if f not in grown]
    return left


def _without_chance(spec, named, failures, left, held, why):
    """Takes back what is named where more of the cases left should show it, and do not, than it explains: there it is
    chance, where different mistakes give the same; of one that acts everywhere a single case that lacks it is enough.
    What is named for its NaN alone should show in cases that hold, too: any chunk with masks of zeros spreads NaN. What
    is named for zeros alone should show in what others explain. What is left then."""
    everywhere = {e.says for e in spec.explanations if e.everywhere}
    for says, switches in named:
        explained = [f for f in failures if why.get(f.name) == (says, "")]
        others = left if any(f.finite for f in explained) else [*left, *held]
        if all(_is_empty(f) for f in explained):
            others = [*others, *(f for f in failures if f.name in why and says not in why[f.name][0])]
        against = [f for f in others if f.finite and _shows(spec, switches, f)]
        lacking = says in everywhere and any(_lacks(spec, switches, f) for f in against)
        if lacking or len(against) > _explained(says, why):
            for name in [name for name, (s, _) in why.items() if s == says]:
                del why[name]
    return [f for f in failures if f.name not in why]


def _explained(says, why):
    return sum(s == says for s, _ in why.values())


def _shows(spec, switches, f):
    """Whether the mistake, and nothing else, would fail this case."""
    with np.errstate(all="ignore"):
        wrong = _wrong(spec, switches, f, f.inputs)
        return _alike(f.ref, wrong) and not _within(wrong, f.ref, f.allowed, 0)


def _lacks(spec, switches, f):
    """Whether a case that should show the mistake is not much nearer to it than to the right result."""
    with np.errstate(all="ignore"):
        return _distance(f.actual, f.ref) < TIMES * _distance(f.actual, _wrong(spec, switches, f, f.inputs))


def _cover(fits, candidates, failures, why, pairs=False):
    """Takes the best candidate until none explains anything; those taken."""
    left, taken = list(failures), []
    while found := _best(fits, candidates, left, pairs):
        best, explained = found
        says, switches = candidates[best]
        taken.append((says, switches))
        why |= {f.name: (says, "") for f in explained}
        left = [f for f in left if f not in explained]
    return taken


def _best(fits, candidates, failures, pairs):
    """The candidate, of those that explain a probe, that explains most failures, the first among equals, and which;
    None where there is none. One that can no longer be the best is not tried further."""
    probes = _probes(failures, pairs)
    rest = [f for f in failures if f not in probes]
    found = {}
    for f in probes:
        for i, (_, switches) in enumerate(candidates):
            if fits(switches, f):
                found.setdefault(i, []).append(f)
    if not found:
        return None
    leader = min(found, key=lambda i: (-len(found[i]), i))
    found[leader] += [f for f in rest if fits(candidates[leader][1], f)]
    for n, f in enumerate(rest):
        for i in [i for i in found if i != leader]:
            if len(found[i]) + len(rest) - n < len(found[leader]) + (i > leader):
                del found[i]
            elif fits(candidates[i][1], f):
                found[i].append(f)
    return min(found.items(), key=lambda item: (-len(item[1]), item[0]))


def _probes(failures, pairs):
    """A few failures of different groups, those with more to tell first: several tokens, but few. One for pairs."""
    def rows(f):
        return len(next(iter(f.inputs.values())))

    if pairs:
        failures = [f for f in failures if rows(f) <= PAIR_ROWS and f.finite]
    order = sorted(failures, key=lambda f: (not f.finite, rows(f) < 3, rows(f) > 70, rows(f)))
    firsts = {}
    for f in order:
        firsts.setdefault(f.case.group, f)
    probes = list(firsts.values())
    return (probes + [f for f in order if f not in probes])[:1 if pairs else PROBES]


def _pairs(singles):
    """Every two that do not touch the same switch."""
    for (a, x), (b, y) in itertools.combinations(singles, 2):
        if not x.keys() & y.keys():
            yield f"{a}; and {b}", x | y


def _fits(spec, switches, f):
    """The mistaken reference gives this result, and is much nearer to it than the right one."""
    with np.errstate(all="ignore"):
        wrong = _wrong(spec, switches, f, f.inputs)
        if not _alike(f.actual, wrong):
            return False
        near = _distance(f.actual, wrong)
        if near <= f.near and near * TIMES < _distance(f.actual, f.ref):
            return True
        return _within(f.actual, wrong, f.allowed, f.near) and _tells(f, wrong)


def _tells(f, wrong):
    """The mistaken result is much nearer where this one is further from the right one than it may be: an error that is
    the same with the mistake and without it is of another."""
    to_wrong = to_right = 0.0
    for a, d, r, e in zip(f.actual, wrong, f.ref, f.allowed, strict=True):
        a = np.asarray(a, np.float64)
        right, unit = distance(a, r)[0], np.maximum(e + U * np.abs(r), TINY)
        far = right > e
        to_right += np.sum((right / unit)[far] ** 2)
        to_wrong += np.sum((distance(a, d)[0] / unit)[far] ** 2)
    return TIMES**2 * to_wrong < to_right


def _fits_loosely(spec, switches, f):
    """The same where rounding has grown: the mistaken reference is near, and much nearer than the right one."""
    with np.errstate(all="ignore"):
        wrong = _wrong(spec, switches, f, f.inputs)
        near = _distance(f.actual, wrong, HUGE) if _alike(f.actual, wrong) else np.inf
        return near <= max(LOOSE, f.near) and near * TIMES < _distance(f.actual, f.ref)


def _fails_early(spec, switches, f):
    """Whether the first rows of the first result are too far from the mistake's for `_fits`."""
    start = spec.start(f.inputs, switches)
    with np.errstate(all="ignore"):
        wrong, n = _wrong(spec, switches, f, start), len(next(iter(start.values())))
        a, d, e = np.asarray(f.actual[0], np.float64), f.ref[0][:n] if wrong is None else wrong[0], f.allowed[0][:n]
        error, apart = distance(a[:n], d)
        loose = max(LOOSE, 2 * f.near) * np.linalg.norm(d[np.isfinite(d)])
        most = min(2 * f.near * np.linalg.norm(a[np.isfinite(a)]), loose)
        return bool(apart) or not (np.linalg.norm(error) <= most or (error <= e + f.near * np.abs(d)).all())


def _alike(actual, wrong):
    """Whether there is a wrong result, in the shapes of the other."""
    return wrong is not None and all(a.shape == w.shape for a, w in zip(actual, wrong, strict=True))


def _wrong(spec, switches, f, inputs):
    """What the mistake gives on a case's inputs, by its steps; None where it does nothing."""
    if f.case.steps is None:
        return spec.mistaken(inputs, **switches)
    idle = []

    def call(x):
        wrong = spec.mistaken(x, **switches)
        idle.append(wrong is None)
        return spec.mistaken(x) if wrong is None else wrong

    wrong = f.case.steps(inputs, call)
    return None if all(idle) else wrong


def _within(actual, desired, allowed, more):
    """Every element is as near as it should be to the right result, or `more` of its size; and some can be compared."""
    for a, d, e in zip(actual, desired, allowed, strict=True):
        error, apart = distance(np.asarray(a, np.float64), d)
        if apart or _few(d) or (error > e + more * np.abs(d)).any():  # beside two NaN there is no more to compare
            return False
    return True


def _distance(actual, desired, most=np.inf):
    """The largest rms error, over the rms, of the results; infinite where what is finite differs.

    With `most`, elements that are larger in `desired` are left out, and what is not finite in `actual` where there are
    such.
    """
    return max(_apart(np.asarray(a, np.float64), d, most) for a, d in zip(actual, desired, strict=True))


def _apart(a, d, most):
    huge = np.abs(d) >= most
    if most < np.inf and huge.any():
        keep = ~huge & np.isfinite(a)
        a, d = np.where(keep, a, np.nan), np.where(keep, d, np.nan)
    error, apart = distance(a, d)
    if apart or _few(d):
        return np.inf
    if not error.any():
        return 0.0
    size = np.sqrt(np.mean(d[np.isfinite(d)] ** 2))
    return float(np.sqrt(np.mean(error**2)) / size) if size else np.inf


def _narrow(f):
    """What is said of a float32 kernel whose results are all numbers of a narrow type, and as near as rounding to it
    leaves them, though no mistake gives them."""
    floats = [(a, r) for a, r in zip(f.actual, f.ref, strict=True) if a.dtype.kind not in "iu"]
    if f.near > NEAR or not f.finite:
        return []
    for dtype in (BFLOAT16, np.dtype(np.float16)):
        held = [(_held(a, dtype), _held(r, dtype)) for a, r in floats if len(np.unique(a)) >= DISTINCT]
        if held and all(got and not right for got, right in held) and _distance(f.actual, f.ref) < 8 * unit_of(dtype):
            name = "float16 or TF32" if dtype == np.float16 else dtype
            says = f"all results are numbers of {name}: they are rounded to it, and maybe what they are made of"
            return [(says, "")]
    return []


def _held(a, dtype):
    with np.errstate(all="ignore"):
        return np.array_equal(a, np.asarray(a).astype(np.float32).astype(dtype).astype(np.float64))


def _few(d):
    """True where next to nothing is finite: equal NaN tell nothing."""
    return d.size > 0 and np.isfinite(d).mean() < SOME
