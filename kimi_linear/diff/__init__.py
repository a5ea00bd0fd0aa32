"""Error metrics, budgets and comparisons.

`compare` lays one result beside its reference; `traces` lays two runs beside each other, tap by tap; `align` finds
the order of axes, permutation or factor that makes a foreign tensor ours; `blame` runs every op of a foreign run again
on its own inputs and names what is wrong with it; `bisect` finds the op at which two engines part by swapping halves
of them. `replay` judges recorded calls of single ops, `step` one step of one layer of a trace that has its states.
"""

from .align import Alignment, align
from .bisect import Bisection, bisect
from .blame import Blame, blame
from .budgets import budget
from .compare import Comparison, compare
from .replay import Replay, replay
from .step import step
from .traces import Report, traces

__all__ = ["Alignment", "Bisection", "Blame", "Comparison", "Replay", "Report", "align", "bisect", "blame", "budget",
           "compare", "replay", "step", "traces"]
