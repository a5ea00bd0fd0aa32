"""What scores residuals: in a folder the weight of a norm and a projection to one value, in a GGUF their product.

Only the product matters, and the engine takes it as it lies. A file of ours has both factors beside it, in one key of
the metadata, so that a folder made of it has them again; of another file the norm is 1 and the projection the product.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..weight_shapes import FFN_SCORE, MIXER_SCORE, OUTPUT_SCORE, score_weight
from .gguf import MetaArray, described, stored_parts
from .mapped import MappedFile
from .safetensors import DTYPES, TensorView, array_of, stored_as

KEY = "kimi_linear.scores"
#: Canonical name without its end -> the GGUF's, below ``blk.N.`` but for the last.
STORED = {MIXER_SCORE: "attn_res_score.weight", FFN_SCORE: "ffn_res_score.weight",
          OUTPUT_SCORE: "output_res_score.weight"}
_FACTOR = re.compile(rf"(model\.(?:layers\.(\d+)\.)?({'|'.join(STORED)}))_(?:norm|proj)\.weight")


class ScoreNames(NamedTuple):
    """The canonical names of both factors, the GGUF's of the product, and the engine's of that."""

    norm: str
    proj: str
    stored: str
    taken: str


def score_of(name: str) -> ScoreNames | None:
    """The names of a score of which `name` is a factor; None for another tensor."""
    found = _FACTOR.fullmatch(name)
    if found is None:
        return None
    whole, layer, score = found.groups()
    at = "" if layer is None else f"blk.{layer}."
    return ScoreNames(f"{whole}_norm.weight", f"{whole}_proj.weight", at + STORED[score], f"{whole}.weight")


@dataclass(frozen=True)
class Score:
    """One factor of a score, of which the file has the product.

    `kept` is (norm, projection), each [D] float32, where the file has them; they hold for the values whose product is
    still that of the file.
    """

    name: str
    shape: tuple[int, ...]
    view: TensorView
    kept: tuple[np.ndarray, np.ndarray] | None = field(default=None, compare=False)

    @property
    def _is_norm(self) -> bool:
        return self.name == score_of(self.name).norm

    @property
    def partner(self) -> str:
        """The name of the other factor."""
        names = score_of(self.name)
        return names.proj if self._is_norm else names.norm

    @property
    def stored(self) -> dict[str, TensorView]:
        """What the engine takes in the place of both factors: of the norm nothing, of the projection the product."""
        return {} if self._is_norm else {self.view.name: self.view}

    @property
    def dtype(self) -> str:
        """The product's."""
        return self.view.dtype

    @property
    def file(self) -> MappedFile:
        """The file that holds the product."""
        return self.view.file

    @property
    def nbytes(self) -> int:
        """As stored: the product counts once."""
        return 0 if self._is_norm else self.view.nbytes

    def digest_parts(self, n: int) -> list[bytes]:
        """As of a BlockView, of the product."""
        return stored_parts(self.view, n)

    def array(self) -> np.ndarray:
        """The factor, float32, a copy."""
        stored = self.view.array().astype(np.float32).reshape(-1)
        values = np.ones_like(stored) if self._is_norm else stored
        if self.kept is not None:
            still = score_weight(*self.kept).view(np.uint32) == stored.view(np.uint32)
            values = np.where(still, self.kept[0 if self._is_norm else 1], values)
        values = values.reshape(self.shape)
        values.flags.writeable = False
        return values


class Product:
    """A factor of a score as files can be compared that have other ones: a norm of 1, and the product as projection."""

    def __init__(self, name: str, tensors: Mapping):
        names = score_of(name)
        self.dtype = stored_as(tensors[name])
        self._norm, self._proj = tensors[names.norm], tensors[names.proj]
        self._is_norm, self.shape = name == names.norm, tuple(tensors[name].shape)

    def array(self) -> np.ndarray:
        """The values, a copy."""
        values = score_weight(array_of(self._norm), array_of(self._proj))
        return (np.ones_like(values) if self._is_norm else values).reshape(self.shape)


# ---- both factors, in a file of ours ---------------------------------------------------------------


def kept_scores(tensors: Mapping) -> list[np.ndarray]:
    """Norm and projection of each score of a folder, in their order; none where every norm is 1."""
    factors = {name: t.array().astype(np.float32).reshape(-1) for name, t in tensors.items() if score_of(name)}
    lost = any((w != 1).any() for name, w in factors.items() if name == score_of(name).norm)
    return [*factors.values()] if lost else []


def read_scores(metadata: Mapping, shapes: Mapping, problems: list[str]) -> dict[str, np.ndarray]:
    """Name -> factor [D] float32, of a file that keeps them; `shapes` are those of all tensors of the config."""
    value = metadata.get(KEY)
    sizes = {name: shape[-1] for name, shape in shapes.items() if score_of(name)}
    if value is None or not sizes:
        return {}
    n = sum(sizes.values())
    if not isinstance(value, MetaArray) or value.kind != "float32" or value.count != n:
        problems.append(f"{KEY} is {described(value)}; it must be an array of {n} float32, norm and projection of each "
                        "score of residuals")
        return {}
    parts = np.split(value.values().astype(DTYPES["F32"]), np.cumsum([*sizes.values()])[:-1])
    return dict(zip(sizes, parts, strict=True))
