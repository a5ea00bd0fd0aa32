"""The cases of an op in a file, for kernels that no Python can call: inputs, float64 results, and the error allowed."""

import functools
import inspect
import io
import json
import textwrap
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from .. import reference
from .._arrays import BFLOAT16, as_tuple
from .._names import listed, meant
from .._version import __version__
from ..adapters.arrays import read_npz
from ..conventions import convention
from ..diff.budgets import budget
from ..errors import FormatError
from ..load.safetensors import SafetensorsFile, array_of, atomic_file, write_safetensors
from .check import FACTOR, Run, lacks_of, narrow_type, widened
from .spec import Case, NotOffered, WrongResult, defaults, given, select, spec

__all__ = ["judge_golden", "write_golden"]

#: What a file's name ends with, and its format.
FORMATS = {".npz": "npz", ".safetensors": "safetensors"}

README = """Cases of {op}, written by kimi_linear {version}: `kimi-linear golden {op}`.

CASE/in/NAME are the arguments, float32 (integers int32 or int64); CASE/out/NAME the results in float64;
CASE/bound/NAME the largest absolute error that the bound of docs/math.md allows at each element, in the op's own
order of sums. Arrays are row-major. Judge a kernel by the largest |got - out| / bound; {factor} is what kimi_linear
allows a foreign one. NaN in `out` must be NaN in yours, and nothing else may be; beside NaN a bound is infinite, and
where it is 0 the values must be the same.{narrow}

Write your results as CASE/out/NAME to an npz or safetensors file of your own, in any float type (ids as integers),
and `kimi-linear golden {op}{option} --judge FILE` says which cases hold, how far off they are,
and why. CASE/in and CASE/bound may be in it, too, and are not looked at.

The index has an entry a case: what it is about (`says`), its group, which arrays it has, what it `needs` of a kernel,
and arguments that are no arrays (`options`). Cases called model-* are a trained model's own inputs. What is not there
has its default:

{defaults}

{formula}
"""


def write_golden(op, path, *, format=None, cases="all", dtype="float32"):
    """Write an op's cases to a file.

    Parameters
    ----------
    op : str
        One of `specs()`.
    path : str or path
        What is there is replaced when the new file is whole.
    format : {"npz", "safetensors"}, optional
        By default as the path ends; "npz" where it has no suffix. README and index are the members README.txt and
        index.json of an npz, the metadata "readme" and "index" of a safetensors file.
    cases : str or list of str
        As for `check_op`, of the cases that are one call; "all" has those of the packaged model, too.
    dtype : {"float32", "bfloat16", "float16"}
        What the kernel computes in. The arguments that `check_op` would hand on in a narrow type are float32 here, with
        values that it holds; cases of which it holds no values are left out.

    Returns
    -------
    index : dict

    Raises
    ------
    ValueError
        If there is no such op, case, format or type, or the path has another suffix and no format is given.
    """
    the = spec(op)
    run = _Stored(the, convention("ours", op), {}, frozenset(), narrow_type(the, dtype))
    suffix = Path(path).suffix
    if format is None and suffix not in ("", *FORMATS):
        raise ValueError(f"{path} ends with {suffix!r}; it must end with {' or '.join(FORMATS)}, or format (--format) "
                         "must say which of them it is")
    format = format or FORMATS.get(suffix, "npz")
    if format not in FORMATS.values():
        raise ValueError(f'format is {format!r}; it must be "npz" or "safetensors"')
    entries, arrays = [], {}
    for case in _cases(the, cases):
        about = {"group": case.group, "says": case.says, "needs": sorted(case.needs)}
        with suppress(NotOffered):
            _add(run, case.name, run.narrowed(case.make(the.kind)), about, entries, arrays)
    formula = inspect.getdoc(getattr(reference, op)).partition("Parameters")[0].strip()
    readme = README.format(op=op, version=__version__, factor=FACTOR, formula=formula, defaults=_defaults(op),
                           **_about_type(run))
    index = {"op": op, "version": __version__, "dtype": run.dtype.name, "results": list(the.results), "cases": entries}
    (_write_npz if format == "npz" else _write_safetensors)(path, arrays, readme, json.dumps(index, indent=1))
    return index


def _cases(the, patterns):
    """Those of one call that are chosen; of all, the packaged model's, too."""
    model = [Case(name, "model", functools.partial(_held, inputs), says="a layer of the packaged model")
             for name, inputs in (the.real().items() if patterns == "all" else ())]
    return select([c for c in the.cases if c.steps is None], patterns) + model


def _held(inputs, kind):
    return inputs


def _defaults(op):
    """In words; of the delta rule what None stands for."""
    if op == "delta_rule":
        return "scale K**-0.5, no initial state, one sequence, no norm"
    return textwrap.fill(", ".join(f"{n} {value!r}" for n, value in defaults(op).items()) or "none", 115)


def _about_type(run):
    """What the README says of the type."""
    if not run.stored:
        return {"narrow": "", "option": ""}
    name, results = run.dtype.name, run.the.narrow_results
    too = f", {' and '.join(results)} themselves among it" if results else ""
    return {"narrow": f"\n\nFor a kernel in {name}: {', '.join(run.the.narrow)} are float32 here, of values that it "
                      f"holds.\nThe bounds have what it may round{too}: docs/math.md#narrow.",
            "option": f" --dtype {name}"}


def _add(run, name, inputs, about, entries, arrays):
    """One case: its arrays under its name, and its entry."""
    the = run.the
    inputs = given(the.op, inputs)
    arguments = {n: np.asarray(x) for n, x in inputs.items() if isinstance(x, np.ndarray)}
    whole = {n: inputs.get(n) for n in the.required} | inputs
    with np.errstate(all="ignore"):
        results = as_tuple(getattr(reference, the.op)(**whole))
        bounds = as_tuple(budget(the.op, results if len(results) > 1 else results[0], stored=run.stored, **whole))
    bounds = [run.with_storage(n, np.asarray(r, np.float64), b)
              for n, r, b in zip(the.results, results, bounds, strict=True)]
    held = {f"in/{n}": widened(x) for n, x in arguments.items()}
    held |= {f"out/{n}": np.asarray(r, np.float64) for n, r in zip(the.results, results, strict=True)}
    held |= {f"bound/{n}": np.where(np.isnan(b), np.inf, b) for n, b in zip(the.results, bounds, strict=True)}
    arrays |= {f"{name}/{n}": x for n, x in held.items()}
    shapes = {n: {"shape": list(x.shape), "dtype": str(x.dtype)} for n, x in held.items()}
    options = {n: x for n, x in inputs.items() if n not in arguments}
    entries.append({"name": name, **about, "options": options, "arrays": shapes})


def _write_npz(path, arrays, readme, index):
    """A zip of .npy members, as np.savez_compressed, and two of text; the same bytes at every call."""
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as members:
        members.writestr(zipfile.ZipInfo("README.txt"), readme, zipfile.ZIP_DEFLATED)
        members.writestr(zipfile.ZipInfo("index.json"), index, zipfile.ZIP_DEFLATED)
        for name, x in arrays.items():
            held = io.BytesIO()
            np.lib.format.write_array(held, np.ascontiguousarray(x).reshape(x.shape), allow_pickle=False)
            members.writestr(zipfile.ZipInfo(f"{name}.npy"), held.getvalue(), zipfile.ZIP_DEFLATED)


def _write_safetensors(path, arrays, readme, index):
    write_safetensors(path, arrays, {"readme": readme, "index": index})


# ---- the way back --------------------------------------------------------------------------------------


def judge_golden(op, path, *, cases="all", without=(), dtype="float32"):
    """Judge the results of a kernel that ran on the cases of `write_golden`, as `check_op` judges a callable.

    Parameters
    ----------
    op : str
        One of `specs()`.
    path : str or path
        An npz or safetensors file with ``CASE/out/NAME`` of every case, each in the shape that the golden file has.
    cases : str or list of str
        As for `write_golden`.
    without : list of str
        As for `check_op`: cases that need it are not offered, and need not be there.
    dtype : {"float32", "bfloat16", "float16"}
        As for `write_golden`.

    Returns
    -------
    Card

    Raises
    ------
    ValueError
        If results are missing, or the file has some that no case has; by name. If there is no such op, case or type.
    FormatError
        If the file is neither npz nor safetensors.
    """
    the = spec(op)
    chosen, lacks = _cases(the, cases), lacks_of(the, without)
    held = _open(path)
    known = {f"{c.name}/out/{n}" for c in _cases(the, "all") for n in the.results}
    run = _Stored(the, convention("ours", op), held, lacks, narrow_type(the, dtype))
    _check_names(path, held, known, [f"{c.name}/out/{n}" for c in chosen if run.offers(c) for n in the.results])
    return run.card(chosen)


class _Stored(Run):
    """Results that lie in a file."""

    def __init__(self, the, how, held, lacks, dtype):
        super().__init__(the, how, None, None, lacks, {}, FACTOR, dtype)
        self.held = held

    def offers(self, case):
        """Whether the case is run."""
        try:
            self._inputs(case)
        except NotOffered:
            return False
        return True

    def results(self, case, inputs, fill=np.nan):
        names = [f"{case.name}/out/{n}" for n in self.the.results]
        return tuple(_number(array_of(self.held[n]), n) for n in names)


def _number(a, name):
    if a.dtype.kind not in "fiu" and a.dtype != BFLOAT16:
        raise WrongResult(f"{name} is {a.dtype}; it must be an array of numbers")
    return a


def _is_zip(path):
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def is_golden(path):
    """Whether `write_golden` wrote the file."""
    try:
        if _is_zip(path):
            with zipfile.ZipFile(path) as members:
                return "index.json" in members.namelist()
        return "index" in SafetensorsFile(path).metadata
    except (FormatError, zipfile.BadZipFile):
        return False


def _open(path):
    """Name -> array, or what gives one, by what the file begins with."""
    if is_golden(path):
        raise ValueError(f"{path} is the file of cases itself; results are a file of their own, with CASE/out/NAME as "
                         "the kernel made them")
    return read_npz(path) if _is_zip(path) else SafetensorsFile(path)


def _check_names(path, held, known, wanted):
    """Every result that is wanted is there, and none that nobody asked for: it may be a misspelt one."""
    other = [n for n in held if n not in known and "/in/" not in n and "/bound/" not in n]
    if other:
        hint = meant(other[0], known) or "; a result is CASE/out/NAME"
        raise ValueError(f"{path} has {other[0]}, which is no result of the cases{hint}")
    missing = [n for n in wanted if n not in held]
    if missing:
        raise ValueError(f"{path} lacks {listed(missing)}; `cases` and `without` (--cases, --without) say "
                         f"which to judge")
