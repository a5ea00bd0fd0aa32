"""What `check_op` knows of `delta_rule`."""

from ..spec import Spec
from .calls import kinds, plan_of
from .cases import CASES, LAWS, real
from .mistakes import EXPLANATIONS, acting, diagnose, mistaken, start

__all__ = ["SPEC"]

SPEC = Spec(op="delta_rule", results=("o", "state"), required=("q", "k", "v", "g", "beta"),
            forms=("recurrent", "chunked"), kind="channel", kinds=kinds, cases=CASES, laws=LAWS, real=real,
            plan=plan_of, explanations=EXPLANATIONS, mistaken=mistaken, diagnose=diagnose, acting=acting, start=start,
            narrow=("q", "k", "v"), narrow_results=("o",))
