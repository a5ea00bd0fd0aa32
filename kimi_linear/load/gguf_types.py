"""Which storage type a tensor of a GGUF gets: what stays float32, patterns, and what narrow rows fall back to.

Source: the rules of llama.cpp's converter (gguf-py) and of its quantiser (tensor_type_fallback in llama-quant.cpp).
"""

import fnmatch
from collections.abc import Iterable, Mapping

from ..quantized import storage_types
from .safetensors import WEIGHT_DTYPES

WRITABLE = (*WEIGHT_DTYPES, *(t.name for t in storage_types.values() if t.values > 1 and t.writable))
#: Type with blocks of 256 values, or of 64 -> the one that rows get which are no multiple of that, but of 32.
FALLBACK = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL", "Q2_0": "Q4_0",
}


def stays_float32(name: str, n_axes: int) -> bool:
    """Whether a tensor is never put in blocks: vectors, norms, routers, convolutions, what is no weight.

    Of GLM-5.3-Flash what mixes streams and what weighs and pools the indexer's keys, too.
    """
    return n_axes == 1 or not name.endswith(".weight") or "conv1d" in name \
        or name.endswith(("_norm.weight", "ffn_gate_inp.weight", "hc_attn_fn.weight", "hc_ffn_fn.weight",
                          "indexer.proj.weight")) or "indexer_compressor_" in name or "indexer.kpool_" in name


def fitting(wanted: str, cols: int) -> str:
    """`wanted`, or what rows of `cols` values fall back to."""
    for dtype in (wanted, FALLBACK.get(wanted)):
        if dtype is not None and cols % storage_types[dtype].values == 0:
            return dtype
    return "F16"


def checked_type(name: str, argument: str = "type") -> str:
    """A type that can be written, in its own spelling; ValueError lists them."""
    found = {t.upper(): t for t in WRITABLE}.get(str(name).upper())
    if found is None:
        known = str(name).upper() in storage_types
        rule = f"it can be read but not written; {', '.join(WRITABLE)} can" if known else \
            f"it must be one of {', '.join(WRITABLE)}{_of_a_mix(str(name).upper())}"
        raise ValueError(f"{argument} is {name!r}; {rule}")
    return found


def _of_a_mix(name):
    """What to say to Q4_K_M: llama.cpp's names of mixes."""
    base, _, size = name.rpartition("_")
    if size not in ("S", "M", "L") or base not in WRITABLE:
        return ""
    return f"; {name} is a mix of types: {base}, and better ones for patterns of tensors, as output.weight=Q6_K"


def checked_rules(types: Mapping | Iterable) -> list[tuple[str, str]]:
    """(pattern, type) of a mapping, of pairs, or of texts ``pattern=type``."""
    if isinstance(types, str) or not isinstance(types, Iterable):
        raise TypeError(f"types is {types!r:.40}; it must be a mapping, or a list of rules PATTERN=TYPE")
    rules = []
    for rule in types.items() if isinstance(types, Mapping) else types:
        pattern, dtype = rule.rpartition("=")[::2] if isinstance(rule, str) else _pair(rule)
        if not pattern:
            raise ValueError(f"the rule {rule!r:.40} must be PATTERN=TYPE, as 'blk.*.ffn_down*=Q6_K'")
        rules.append((pattern, checked_type(dtype, f"the type of the rule {rule!r}")))
    return rules


def _pair(rule: object) -> tuple:
    """A rule of two texts; an empty pattern where it is another thing."""
    is_pair = isinstance(rule, tuple | list) and len(rule) == 2 and all(isinstance(part, str) for part in rule)
    return tuple(rule) if is_pair else ("", "")


class Choice:
    """The types of a file's tensors.

    Parameters
    ----------
    default : str or None
        Of matrices that no rule matches; None leaves each its own.
    rules : list of (str, str)
        fnmatch pattern on a GGUF name, type; the first that matches holds.
    """

    def __init__(self, default: str | None, rules: list[tuple[str, str]]):
        self.default, self.rules = default, rules
        self.met: set[str] = set()

    def wanted(self, name: str, own: str) -> str:
        """The type asked for a matrix whose values are stored as `own` now."""
        for pattern, dtype in self.rules:
            if fnmatch.fnmatchcase(name, pattern):
                self.met.add(pattern)
                return dtype
        return self.default or own

    def check_met(self) -> None:
        """ValueError for a rule that no matrix has met."""
        for pattern, _ in self.rules:
            if pattern not in self.met:
                raise ValueError(f"the pattern {pattern!r} decides no tensor that takes a type; names are those of the "
                                 f"GGUF, as 'blk.0.attn_q.weight', and the first pattern that matches holds")
