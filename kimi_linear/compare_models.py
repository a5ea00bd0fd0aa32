"""Two files of one model: how far their weights are apart, and what that does to a text; see `compare_models`."""

import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np

from ._arrays import as_integers
from ._scalars import to_json
from .diff import _html as parts
from .load.gguf_heads import have_one_form, in_common_form
from .load.gguf_scores import Product, Score, score_of
from .load.gguf_tensors import VALUES, rows_of
from .load.packed import PackedMatrix
from .load.safetensors import TensorView, stored_as

__all__ = ["ModelComparison", "TensorDistance", "compare_models"]

PASS = 128  # tokens of a forward call: no more logits than these are held, of both
CACHED = 1 << 15  # values at a time in float64: these and their differences stay in the cache
SHOWN = 24  # lines of the table
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_HEAD = ("tensor", "A", "B", "rms error", "largest", "values")


@dataclass(frozen=True)
class TensorDistance:
    """Values of B less those of A, of one tensor or of the experts of a layer.

    Attributes
    ----------
    name : str
        Canonical; ``*`` stands for all experts.
    types : tuple of str
        Storage types in A and in B.
    values : int
    rms : float
        Root of the mean square of the differences, over that of A's values; infinite where A is zero.
    largest : float
        The largest difference, over the root mean square of A's values.
    """

    name: str
    types: tuple[str, str]
    values: int
    rms: float
    largest: float


@dataclass(frozen=True)
class ModelComparison:
    """What `compare_models` found. Prints as a table of tensors, the worst first, and what the text shows.

    Attributes
    ----------
    a, b : str
        The models' names.
    tensors : list of TensorDistance
        The worst first.
    tokens : int
        Of the text.
    kl : float
        Mean over its tokens of KL(A || B) of the next token's distribution, in nats.
    kl_largest : float
    kl_at : int
        The token behind which it is largest.
    top1 : float
        Share of tokens behind which A and B rank the same token first.
    perplexity : tuple of float
        Of A and of B; NaN for a text of one token.
    seconds : float
    """

    a: str
    b: str
    tensors: list[TensorDistance]
    tokens: int
    kl: float
    kl_largest: float
    kl_at: int
    top1: float
    perplexity: tuple[float, float]
    seconds: float = 0.0

    @property
    def equal(self) -> int:
        """Lines of the table that are without any difference."""
        return sum(t.rms == 0 for t in self.tensors)

    @property
    def verdict(self) -> str:
        """One sentence."""
        worst = self.tensors[0]
        if worst.rms == 0:
            weights = "all values of all tensors are equal"
        else:
            weights = f"{worst.name} is furthest apart, {worst.rms:.2e} of its rms"
        return f"{self.b} beside {self.a}: {weights}; KL {self.kl:.3e} nats, top-1 equal in {100 * self.top1:.2f} %"

    def lines(self) -> list[tuple[str, str]]:
        """Label and text: what the text shows."""
        first, second = self.perplexity
        return [
            ("text", f"{self.tokens:,} tokens, {self.seconds:.1f} s"),
            ("KL(A || B)", f"{self.kl:.4e} nats a token in the mean; {self.kl_largest:.3e} behind token {self.kl_at}"),
            ("top-1", f"{100 * self.top1:.2f} % equal"),
            ("perplexity", f"A {first:.5f}, B {second:.5f} ({100 * (second / first - 1):+.3f} %)"),
        ]

    def render(self, *, all_tensors: bool = False) -> str:
        """The comparison as text; the `SHOWN` worst tensors, or all of them."""
        shown = self.tensors if all_tensors else [t for t in self.tensors[:SHOWN] if t.rms != 0]
        rows = [_HEAD, *map(_cells, shown)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        left = (True, True, True, False, False, False)
        table = ["  ".join(c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(row, widths, left)).rstrip()
                 for row in rows]
        return "\n".join([f"A: {self.a}", f"B: {self.b}", "", *(table if shown else []), *self._rest(len(shown)), "",
                          *(f"{label:<12}  {text}" for label, text in self.lines()), "", self.verdict])

    def _rest(self, shown: int) -> list[str]:
        rest = self.tensors[shown:]
        if not rest:
            return []
        worst = "all of them equal" if rest[0].rms == 0 else f"at most {rest[0].rms:.2e}, {self.equal} of them equal"
        return [f"{'and ' if shown else ''}{len(rest):,} {'more ' if shown else 'tensors '}({worst})"]

    def __str__(self):
        return self.render()

    __repr__ = __str__

    def _repr_html_(self):
        rows = [_cells(t) for t in self.tensors[:SHOWN] if t.rms != 0]
        notes = [*self._rest(len(rows)), *(f"{label}: {text}" for label, text in self.lines())]
        return parts.fragment(parts.verdict(self.verdict, True), parts.table(rows, _HEAD) if rows else "",
                              parts.notes(notes))

    def to_dict(self) -> dict:
        """Plain values, for JSON; what is not finite is None."""
        return to_json(asdict(self) | {"verdict": self.verdict})


def _cells(t: TensorDistance) -> tuple[str, ...]:
    return t.name, *t.types, f"{t.rms:.2e}", f"{t.largest:.2e}", f"{t.values:,}"


def compare_models(a, b, tokens, progress: Callable[[int, int, str], None] | None = None) -> ModelComparison:
    """Compare the weights of two models of one shape, and their answers to a text.

    A folder and a GGUF of it are compared as what they mean: of the Qwen kinds norms as 1 + w, value heads in the
    folder's order; of Kimi K3 what scores residuals as a norm of 1 and the product as projection.
    Values are dequantised some rows of one tensor at a time; both models read the text in the same pieces. Logarithms
    of probabilities are in float64, of float32 logits.

    Parameters
    ----------
    a, b : Model
        A is the one that errors are relative to.
    tokens : (T,) integers
        One sequence, from an empty state.
    progress : callable, optional
        Called with values and tokens done, their number in all, and what was read.

    Returns
    -------
    ModelComparison

    Raises
    ------
    ValueError
        If the models have other tensors or other shapes, there is no token, or one is outside the vocabulary.
    """
    _check_same(a, b)
    ids = as_integers(tokens, "tokens", ("T",), low=0, high=a.config.vocab_size)
    if not len(ids):
        raise ValueError("tokens is empty; there must be at least one")
    begin = time.perf_counter()
    groups = _groups(a)
    of_a, of_b = _tensors_of(a, b), _tensors_of(b, a)
    total, progress = len(groups) + len(ids), progress or (lambda *_: None)
    distances = []
    for i, (name, names) in enumerate(groups.items()):
        distances.append(_distance(name, [(of_a(n), of_b(n)) for n in names]))
        progress(i + 1, total, name)
    distances.sort(key=lambda t: -math.inf if math.isnan(t.rms) else -t.rms)
    rows = _Rows()
    states = a.new_state(), b.new_state()
    for first in range(0, len(ids), PASS):
        piece = ids[first : first + PASS]
        rows.add(*(model.forward(piece, state=state) for model, state in zip((a, b), states, strict=True)),
                 ids[first + 1 : first + 1 + len(piece)])
        progress(len(groups) + first + len(piece), total, "text")
    return ModelComparison(a.name, b.name, distances, len(ids), *rows.results(), time.perf_counter() - begin)


def _check_same(a, b) -> None:
    shapes = [model.config.weight_shapes() for model in (a, b)]
    for name in dict.fromkeys([*shapes[0], *shapes[1]]):
        mine, theirs = (str(list(s[name])) if name in s else "absent" for s in shapes)
        if mine != theirs:
            raise ValueError(f"{a.name} and {b.name} are no two files of one model: {name} is {mine} in the one and "
                             f"{theirs} in the other")
    for field, value in vars(a.config).items():
        if field not in _NOT_THE_MODEL and value != getattr(b.config, field):
            raise ValueError(f"{a.name} and {b.name} are no two files of one model: {field} is {value} in the one and "
                             f"{getattr(b.config, field)} in the other")


_NOT_THE_MODEL = ("model_type", "bos_token_id", "eos_token_ids", "pad_token_id", "max_length",
                  "norm_plus_one", "gdn_tiled")  # the last two are how a file stores it, the first how it is called


def _tensors_of(model, other) -> Callable[[str], Any]:
    """Name -> tensor, in a form that the other model's have, too."""
    one_form = have_one_form(model.config, other.config)

    def tensor(name):
        if score_of(name) and any(isinstance(m._tensors[name], Score) for m in (model, other)):
            return Product(name, model._tensors)
        return model._tensors[name] if one_form else in_common_form(model.config, name, model._tensors[name])

    return tensor


def _groups(model) -> dict[str, list[str]]:
    """Line of the table -> tensors: the experts of a layer are one line."""
    found: dict[str, list[str]] = {}
    for name in model._tensors:
        found.setdefault(_EXPERT.sub("*", name), []).append(name)
    return found


def _distance(name: str, pairs: list) -> TensorDistance:
    squares = own = largest = 0.0
    values = 0
    types = [dict.fromkeys(stored_as(pair[i]) for pair in pairs) for i in (0, 1)]
    for x, y in chain.from_iterable(zip(*map(_values, pair), strict=True) for pair in pairs):
        x, y = x.reshape(-1), y.reshape(-1)
        values += x.size
        for at in range(0, x.size, CACHED):
            a = x[at : at + CACHED].astype(np.float64)
            d = y[at : at + CACHED] - a
            squares += float(np.einsum("i,i", d, d))  # no BLAS: its threads spin beside those that dequantise
            own += float(np.einsum("i,i", a, a))
            largest = float(np.max((largest, d.max(), -d.min())))
    rms = math.sqrt(own / values) if own >= 0 else math.nan
    errors = (math.sqrt(squares / values), largest)
    relative = (e / rms if rms else math.inf if e else 0.0 for e in errors)
    return TensorDistance(name, ("/".join(types[0]), "/".join(types[1])), values, *relative)


def _values(tensor) -> Iterator[np.ndarray]:
    """A tensor's values, some rows at a time: the same rows for any form of one shape."""
    if isinstance(tensor, TensorView | PackedMatrix):
        yield from (part.array() for part in rows_of(tensor))
        return
    values = tensor.array() if hasattr(tensor, "array") else np.asarray(tensor)
    values = values.astype(np.float32, copy=False)  # a logarithm of rates has more digits than any file
    values = values.reshape(-1, values.shape[-1])
    step = max(1, VALUES // values.shape[-1])
    for first in range(0, len(values), step):
        yield values[first : first + step]


class _Rows:
    """Sums over the rows of logits."""

    def __init__(self):
        self.kl: list[float] = []
        self.same = 0
        self.losses: tuple[list, list] = ([], [])

    def add(self, a: np.ndarray, b: np.ndarray, targets: np.ndarray) -> None:
        """Logits [n, vocab] of both, and the tokens that followed: n, or one fewer at the end."""
        for i, (x, y) in enumerate(zip(a, b, strict=True)):  # a row at a time: all in float64 would be large
            p, q = _log_softmax(x), _log_softmax(y)
            self.kl.append(float((np.exp(p) * (p - q)).sum()))
            self.same += int(x.argmax() == y.argmax())
            if i < len(targets):
                self.losses[0].append(-float(p[targets[i]]))
                self.losses[1].append(-float(q[targets[i]]))

    def results(self):
        """(mean KL, largest KL, where, top-1, perplexities)."""
        n, at = len(self.kl), int(np.argmax(self.kl))
        perplexity = tuple(_perplexity(losses) for losses in self.losses)
        return math.fsum(self.kl) / n, self.kl[at], at, self.same / n, perplexity


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x -= x.max()
    return x - np.log(np.exp(x).sum())


def _perplexity(losses: list[float]) -> float:
    mean = math.fsum(losses) / len(losses) if losses else math.nan
    return math.exp(mean) if not mean >= 700 else math.inf
