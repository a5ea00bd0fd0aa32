"""Tests for kernels of your own: one result beside the reference, or a whole kernel through every case of its op."""

from ._assert import assert_close
from .autograd import autograd
from .cards import Card, Row
from .check import check_op
from .golden import judge_golden, write_golden
from .spec import Case, Explanation, Law, Spec, spec, specs

__all__ = ["Card", "Case", "Explanation", "Law", "Row", "Spec", "assert_close", "autograd", "check_op",
           "judge_golden", "spec", "specs", "write_golden"]
