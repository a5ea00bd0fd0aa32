"""What `check_op` needs to know of an op, as data: cases, laws, how it is called, and what goes wrong with it.

An op's module in this package has a `SPEC`. `check`, `explain` and `golden` read nothing else.
"""

import fnmatch
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .. import reference
from .._names import meant

__all__ = ["BACKWARD", "OPS", "Case", "Explanation", "Law", "NotOffered", "Plan", "Spec", "WrongResult", "defaults",
           "given", "select", "spec", "specs"]

#: Functions of `kl.ops`, each a module of this package with a SPEC: the delta rule, and the rest in the order of the
#: pass.
OPS = ("delta_rule", "embedding", "rms_norm", "linear", "short_conv", "l2_norm", "decay_gate", "decay_cumsum",
       "gated_rms_norm", "index_pool", "index_scores", "index_select", "layer_norm", "latent_attention", "rope",
       "attention", "sigmoid_gate", "attn_res", "mhc_pre", "mhc_post", "swiglu", "situ", "softmax", "route", "moe")
#: Gradients, which `kl.ops` has not; the small ones are together in SPECS of `backward`.
SMALL = ("rms_norm_backward", "short_conv_backward", "l2_norm_backward", "decay_gate_backward",
         "gated_rms_norm_backward", "swiglu_backward")
BACKWARD = ("delta_rule_backward", *SMALL)


class NotOffered(Exception):
    """A convention or a callable has no way to ask for this; the words say for what."""


class WrongResult(Exception):
    """A result that cannot be compared: the sentence says why not, `why` is (mistake, place)."""

    def __init__(self, sentence, mistake="", place=""):
        super().__init__(sentence)
        self.why = mistake or sentence, place


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes
    ----------
    name, group : str
        The name is a file name, too; the group is a line of the card.
    make : callable(kind) -> dict
        The op's arguments by name, the same at every call. `kind` is what the convention usually has (of `delta_rule`:
        its gate), for cases that are about something else.
    needs : frozenset of str
        What a kernel may lack, in the words of `check_op`'s ``without=``.
    usual : int
        Inputs as a model has them: the bars of the usual range apply besides the bound. More than 1: of so many terms
        is its longest sum, which a kernel may add one by one.
    steps : callable(inputs, call) -> results, optional
        How to get the results where that is not one call, as ``call(inputs)``.
    says : str
        What is special about it, for the index of a golden file.
    """

    name: str
    group: str
    make: Callable
    needs: frozenset = frozenset()
    usual: int = False
    steps: Callable | None = None
    says: str = ""


@dataclass(frozen=True)
class Law:
    """What must hold besides the values: ``check(inputs, call)`` gives a sentence where it does not, else None.

    ``call(inputs, **more)`` runs the callable; `more` goes to it as it is, `arguments` are their names.
    """

    name: str
    says: str
    check: Callable
    needs: frozenset = frozenset()
    arguments: tuple = ()
    group: str = "laws"


@dataclass(frozen=True)
class Explanation:
    """One mistake: the words of the card, and the switches of the op's `mistaken` that reproduce it.

    `alone` is not tried together with another; `everywhere` is in all cases that can show it, or in none.
    """

    says: str
    switches: tuple  # of (name, value)
    alone: bool = False
    everywhere: bool = False


@dataclass
class Plan:
    """A call in somebody's conventions.

    Attributes
    ----------
    arguments : dict
        What is passed, NumPy arrays in their layout.
    inputs : dict
        The op's arguments that have these values, for the reference: what their layout rounds is rounded here, too.
    read : callable(result) -> tuple of arrays
        Their result in our layout.
    """

    arguments: dict
    inputs: dict
    read: Callable


def as_given(inputs, switches):
    """The switches: no two of an op's mistakes come to the same."""
    return switches


def none_known(inputs, switches):
    """None: what an op gives for its first rows may not be what it gives for them alone."""


@dataclass(frozen=True)
class Spec:
    """An op's entry.

    Attributes
    ----------
    op : str
        Its name in `kimi_linear.reference`, the budgets and, where it is no gradient, `kimi_linear.ops`.
    results, required : tuple of str
        Names of what it gives, and of the arguments without a default.
    forms : tuple of str
        Forms whose bounds differ.
    kind : object
        What `Case.make` takes in our own conventions.
    cases, laws, explanations : tuple
        The first case is the plain one; laws are judged on its inputs.
    kinds : callable(convention) -> tuple
        What `Case.make` takes, the usual one first.
    plan : callable(convention, inputs) -> Plan
        Raises NotOffered.
    mistaken : callable(inputs, **switches) -> results or None
        The reference with mistakes; None where a switch does nothing on these inputs.
    diagnose : callable(inputs, actual, reference) -> list of (str, str)
        What may be the cause where results are not finite and should be, and of which place; the likeliest first.
    real : callable() -> dict of str to inputs
        Inputs from the packaged model, for golden files.
    acting : callable(inputs, switches) -> switches
        What a mistake's switches come to on these inputs: where that is equal, so are the results.
    start : callable(inputs, switches) -> inputs or None
        The first tokens, whose results of a mistake are the first rows of all; None where there are few, or the mistake
        looks ahead.
    narrow, narrow_results : tuple of str
        Arguments that kernels take in a type narrower than float32, and results that they then give in it.
    narrow_rms : float
        On inputs as a model has them the rms error over the rms of the result, then, in u of that type: by default the
        0.005 that flash-linear-attention's tests allow for bfloat16.
    """

    op: str
    results: tuple
    required: tuple
    forms: tuple
    kind: object
    cases: tuple
    laws: tuple
    explanations: tuple
    kinds: Callable
    plan: Callable
    mistaken: Callable
    diagnose: Callable
    real: Callable
    acting: Callable = as_given
    start: Callable = none_known
    narrow: tuple = ()
    narrow_results: tuple = ()
    narrow_rms: float = 1.28


def specs():
    """Ops that `check_op` knows, gradients last."""
    return [*OPS, *BACKWARD]


def spec(op):
    """The Spec of an op; ValueError names those that there are."""
    if op not in specs():
        raise ValueError(f"op is {op!r}; check_op knows {', '.join(specs())}{meant(op, specs())}")
    if op in SMALL:
        return importlib.import_module(f"{__package__}.backward").SPECS[op]
    return importlib.import_module(f"{__package__}.{op}").SPEC


@functools.cache
def defaults(op):
    """The arguments of an op that have a default, and their defaults."""
    parameters = inspect.signature(getattr(reference, op)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def given(op, x):
    """Arguments without those that are None, where None is the default."""
    return {n: a for n, a in x.items() if a is not None or defaults(op).get(n) is not None}


def select(cases, patterns):
    """The cases whose name or group matches one of the patterns, in their order; "all" is all.

    Raises
    ------
    ValueError
        No pattern, or one that matches none; the sentence names the groups.
    """
    if isinstance(patterns, str):
        patterns = ["*"] if patterns == "all" else [patterns]
    elif not isinstance(patterns, Iterable):
        raise TypeError(f"cases is {patterns!r:.40}; it must be text, or a list of it")
    patterns, groups = list(patterns), dict.fromkeys(c.group for c in cases)
    if not patterns:
        raise ValueError(f"cases is empty; it must be \"all\", or name cases or groups: {', '.join(groups)}")
    for p in patterns:
        if not any(_matches(c, p) for c in cases):
            hint = meant(p, [*groups, *(c.name for c in cases)])
            raise ValueError(f"cases has {p!r}, which matches no case; the groups are {', '.join(groups)}{hint}")
    return [c for c in cases if any(_matches(c, p) for p in patterns)]


def _matches(case, pattern):
    return fnmatch.fnmatchcase(case.name, pattern) or fnmatch.fnmatchcase(case.group, pattern)
