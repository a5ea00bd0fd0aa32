"""Error metrics, budgets and comparisons.

`compare` lays one result beside its reference; `traces` lays two runs beside each other, tap by tap.
"""

from .budgets import budget
from .compare import Comparison, compare
from .traces import Report, traces

__all__ = ["Comparison", "Report", "budget", "compare", "traces"]
