"""What a fault is, and the scenarios in which faults show."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..dataflow import RESULTS, Node
from .scene import Scene
from .site import Call, Site

WHOLE = "any prompt"
SPLIT = "a prompt split in calls"
SEVERAL = "several sequences in a call"
RESTORED = "a sequence put back to an earlier position"
LONG = "more tokens than a block has"
CHUNKS = "several chunks, under a mild decay"
CHUNKS_SPLIT = "a prompt split in calls of several chunks, under a mild decay"
STRONG = "strong decay"
FAINT = "activations near zero"
LARGE = "activations past 65504"
TIES = "equal router scores"

#: Where a fault's function works: on any call of its op, in a run of a model alone, or on one call alone.
BOTH, RUN, CALL = "both", "run", "call"

_SHOWS: dict[str, Callable[[Scene], bool]] = {
    SPLIT: lambda scene: scene.is_split,
    CHUNKS_SPLIT: lambda scene: scene.is_split,
    SEVERAL: lambda scene: scene.has_several,
    RESTORED: lambda scene: scene.is_restored,
}


@dataclass(frozen=True)
class Fault:
    """One way in which a port was wrong.

    The function is the one definition of it: `run` plants it in a model, `kimi_linear.diff.blame` finds it in a foreign
    run, and `kimi_linear.testing.check_op` names it in a foreign kernel.

    Attributes
    ----------
    name : str
    text : str
        What is done, in one line.
    ops : tuple of str
        Ops of the dataflow that it concerns; ``"*"`` is any.
    function : callable
        (Site or Call, *choice) -> the op's wrong first result in float64, or a tuple of all of them; None where the
        fault cannot be there.
    scenario : str
        What a run needs for the fault to show.
    taps : tuple of glob
        Below a layer: where it can be, if not at every tap of its ops.
    choices : tuple of tuples
        Values of the function's further arguments, where there are several ways to be wrong.
    source : str
        Where the fact is from.
    use : {"both", "run", "call"}
        "run": the function looks at the run, and gets a Site; "call": the fault is of one call (a layout, an initial
        state), and not in the catalogue of those that are planted in a model.
    more : tuple of tuples
        Choices that `check_op` tries besides.
    in_runs : tuple of tuples
        Choices that `blame` tries besides, where one call alone does not show them.
    each : str
        The text of one choice, a format of its values; without a value it is `text`.
    looks_ahead : bool
        Whether a row of its result depends on rows behind it.
    of_call : bool
        Whether its choice is a place, "call 2" or "call 2, sequence 1": of a run `blame` tries where its error begins.
    wired : bool
        Whether it is of how ops are connected, and shows at several of them: where it explains more of these than other
        faults that explain one do, `blame` names it.
    rare : bool
        Tried by `blame` where none of the others explains a result, and by `check_op` with no other at once.
    """

    name: str
    text: str
    ops: tuple[str, ...]
    function: Callable[..., np.ndarray | None]
    scenario: str = WHOLE
    taps: tuple[str, ...] = ("*",)
    choices: tuple[tuple, ...] = ((),)
    source: str = ""
    use: str = BOTH
    more: tuple[tuple, ...] = ()
    in_runs: tuple[tuple, ...] = ()
    each: str = ""
    looks_ahead: bool = False
    of_call: bool = False
    rare: bool = False
    wired: bool = False

    def says(self, choice: tuple = ()) -> str:
        """The text of one choice."""
        if self.each and choice:
            return self.each.format(*choice)
        return f"{self.text} ({', '.join(map(str, choice))})" if choice else self.text

    def concerns(self, node: Node) -> bool:
        """Whether it can be at this node."""
        name = node.tap.split(".", 2)[-1]
        return ("*" in self.ops or node.op in self.ops) and any(fnmatch.fnmatchcase(name, g) for g in self.taps)

    def shows_in(self, scene: Scene) -> bool:
        """Whether the calls and sequences of a run are such that it can show."""
        return _SHOWS.get(self.scenario, lambda scene: True)(scene)

    def result(self, site: Site, choice: tuple = ()) -> np.ndarray | None:
        """The wrong result at a site, in the tap's shape; None where it cannot be."""
        with np.errstate(all="ignore"):
            y = self.function(site, *choice)
        return None if y is None else site.shaped(y[0] if isinstance(y, tuple) else y)


def changed(**changes: Callable[[Site | Call], object]) -> Callable[[Site | Call], np.ndarray | None]:
    """The fault that runs the right op on wrong arguments, each a function of the call."""
    def function(site):
        return site.run(**{argument: change(site) for argument, change in changes.items()})

    return function


def of_call(function: Callable) -> Callable[[Site | Call], np.ndarray | None]:
    """A fault whose function knows of one call alone, its arguments and all of its results, at its place of a run, too.

    Of an op whose results are several taps it gives that of the site, and None where it changes others alone."""
    def at_place(call, *choice):
        if isinstance(call, Call):
            return function(call, *choice)
        op, which = RESULTS.get(call.op, (call.op, 0))
        y = call.run(by=lambda **args: _part(function(Call(op, args), *choice), which))
        return None if op == "mhc_pre" and y is not None and np.array_equal(y, call.run()) else y

    return at_place


def _part(results, which):
    return results[which] if isinstance(results, tuple) else results if which == 0 else None


def carried(rule) -> Callable[[Site], np.ndarray]:
    """The fault that carries states by a wrong rule."""
    return lambda site: site.run(branches=site.scene.branches(rule))


def in_blocks(site: Site, n: int) -> np.ndarray | None:
    """Every n tokens of a call begin with nothing."""
    longest = max((len(p.rows) for p in site.scene.pieces), default=0)
    return site.run(branches=site.scene.blocks(n)) if longest > n else None
