"""The tensors of a GGUF that is to be made, of a Hugging Face folder's or of another GGUF's, a part at a time.

Names and what changes of the values: gguf_names.py, which reads them, and gguf_heads.py.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..config import Config
from ..weight_shapes import score_weight
from . import gguf_heads as order
from .gguf_config import architecture_of, stored_form
from .gguf_kept import rate_of
from .gguf_names import EXPERTS, FUSED, GATE, K_B, MODEL, V_B, expert_of, layer_name
from .gguf_scores import score_of
from .gguf_types import stays_float32
from .packed import PackedMatrix
from .safetensors import DTYPES, TensorView

VALUES = 1 << 22  # of a part: 16 MiB in float32


@dataclass(frozen=True)
class Incoming:
    """A tensor by its GGUF name, as it is stored now.

    Attributes
    ----------
    name : str
    dtype : str
        Of its values now.
    shape : tuple of int
        Row-major, as the GGUF will have it.
    fixed : str or None
        The type that it has to have, whatever was asked for.
    parts : callable
        Gives views or arrays, rows of the tensor one after the other.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    fixed: str | None
    parts: Callable[[], Iterable]


def of_folder(config: Config, tensors: Mapping[str, TensorView]) -> list[Incoming]:
    """Of a Hugging Face checkpoint by canonical names, in their order; the experts of a layer are one tensor."""
    stacks: dict[str, list[TensorView]] = {}
    made: dict[str, Incoming | None] = {}
    for name, view in tensors.items():
        if name in MODEL:
            found = [_plus_one(MODEL[name], view) if _folded(config, name) else _whole(MODEL[name], view, view.shape)]
        elif (score := score_of(name)) is not None:
            found = [_score(score.stored, tensors[score.norm], tensors[score.proj])]
        else:
            _, _, layer, rest = name.split(".", 3)
            at = f"blk.{layer}."
            if (expert := expert_of(rest)) is not None:
                stored = at + EXPERTS[expert[1]]
                stacks.setdefault(stored, []).append(view)
                made[stored] = None  # all of its experts are needed: below
                continue
            found = _of_layer(config, int(layer), rest, view)
        made |= {x.name: x for x in found}
    return [_stacked(name, stacks[name]) if name in stacks else x for name, x in made.items()]


def of_file(tensors: Mapping[str, TensorView]) -> list[Incoming]:
    """Of another GGUF: as it has them; vectors and the like keep their types."""
    return [_whole(name, view, view.shape, view.dtype) for name, view in tensors.items()]


def _whole(name: str, view: TensorView, shape: tuple[int, ...], fixed: str = "F32") -> Incoming:
    kept = stays_float32(name, len(shape))
    return Incoming(name, view.dtype, shape, fixed if kept else None, lambda: rows_of(view))


def _score(name: str, norm: TensorView, proj: TensorView) -> Incoming:
    """What scores residuals: one vector of the two."""
    return Incoming(name, "F32", norm.shape, "F32", lambda: [score_weight(norm.array(), proj.array())])


def _of_layer(config: Config, layer: int, rest: str, view: TensorView) -> list[Incoming]:
    """What a tensor below ``model.layers.N.`` becomes."""
    at = f"blk.{layer}."
    if rest == "self_attn.kv_b_proj.weight":
        return _heads(config, at, view)
    if rest == "linear_attn.in_proj_qkvz.weight":
        return [_moved(at + stored, view, ranges)
                for stored, ranges in zip((FUSED, GATE), order.ungrouped(config))]
    name = at + layer_name(config, layer, rest)
    if rest.startswith("linear_attn."):
        return [_of_linear(config, name, rest, view)]
    if _folded(config, rest):
        return [_plus_one(name, view)]
    if rest == "self_attn.A_log":
        heads = (1, 1, view.shape[0], 1) if architecture_of(config).name == "kimi-linear" else view.shape
        return [Incoming(name, "F32", heads, "F32", lambda: [-rate_of(view.array())])]
    if rest.endswith("conv1d.weight"):
        return [_whole(name, view, (1, view.shape[0], 1, view.shape[1]))]
    return [_whole(name, view, view.shape[1:] if rest == "mlp.shared_expert_gate.weight" else view.shape)]


def _of_linear(config: Config, name: str, rest: str, view: TensorView) -> Incoming:
    """A tensor of a gated delta net: its value heads in the order of the file."""
    is_tiled = stored_form(config).gdn_tiled and config.gdn_v_heads != config.gdn_k_heads
    heads = order.tiled(config) if is_tiled else None
    ranges = order.rows(config, rest, heads) if is_tiled else None
    if rest == "linear_attn.A_log":
        return Incoming(name, "F32", view.shape, "F32",
                        lambda: [-rate_of(view.array() if heads is None else view.array()[heads])])
    if is_tiled and rest == "linear_attn.out_proj.weight":
        return Incoming(name, view.dtype, view.shape, None,
                        lambda: (order.take_columns(config, part.array(), heads) for part in rows_of(view)))
    return _whole(name, view, view.shape) if ranges is None else _moved(name, view, ranges)


def _folded(config: Config, name: str) -> bool:
    """Whether a tensor is stored as 1 + w."""
    return config.norm_plus_one and order.is_folded(name)


def _plus_one(name: str, view: TensorView) -> Incoming:
    return Incoming(name, "F32", view.shape, "F32", lambda: [order.plus_one(view.array())])


def _moved(name: str, view: TensorView, ranges: order.Ranges) -> Incoming:
    """The rows of a tensor in another order: no value is touched."""
    row_bytes, inner = view.nbytes // view.shape[0], view.shape[1:]

    def parts():
        for first, n in ranges:
            yield from rows_of(replace(view, shape=(n, *inner), offset=view.offset + first * row_bytes,
                                       nbytes=n * row_bytes))

    shape = (sum(n for _, n in ranges), *inner)
    return Incoming(name, view.dtype, shape, "F32" if stays_float32(name, len(shape)) else None, parts)


def _stacked(name: str, views: list[TensorView]) -> Incoming:
    types = {view.dtype for view in views}
    dtype = types.pop() if len(types) == 1 else "F32"
    return Incoming(name, dtype, (len(views), *views[0].shape), None,
                    lambda: (part for view in views for part in rows_of(view)))


def _heads(c: Config, at: str, view: TensorView) -> list[Incoming]:
    """kv_b [H (nope + v), R] as k_b [H, R, nope] and v_b [H, v, R]."""
    def part(first, last, transposed):
        heads = view.array().reshape(c.mla_heads, c.nope_dim + c.v_head_dim, c.kv_rank)[:, first:last]
        return [heads.transpose(0, 2, 1) if transposed else heads]

    n, v = c.nope_dim, c.v_head_dim
    return [Incoming(at + K_B, view.dtype, (c.mla_heads, c.kv_rank, n), None, lambda: part(0, n, True)),
            Incoming(at + V_B, view.dtype, (c.mla_heads, v, c.kv_rank), None, lambda: part(n, n + v, False))]


def rows_of(view: TensorView | PackedMatrix) -> Iterator[TensorView | PackedMatrix]:
    """A tensor as [rows, columns], so many rows at a time as hold about VALUES values."""
    rows, cols = math.prod(view.shape[:-1]), view.shape[-1]
    step = max(1, VALUES // cols)
    for first in range(0, rows, step):
        yield view.rows(first, min(step, rows - first))


def encoded(part: TensorView | PackedMatrix | np.ndarray, dtype: str, cols: int) -> memoryview | np.ndarray:
    """The bytes of a part in a storage type, whose rows have `cols` values.

    A view that is of this type already is not touched: its bytes are the file's. Codes and scales of a matrix in two
    parts go into blocks as they are.

    Raises
    ------
    ValueError
        If a value is not finite and the type has blocks, or it is too large for float16 or bfloat16.
    """
    if isinstance(part, TensorView) and part.dtype == dtype:
        return memoryview(part.file.mapping)[part.offset : part.offset + part.nbytes]
    if isinstance(part, PackedMatrix) and part.dtype == dtype:
        return part.blocks().data.reshape(-1)
    values = part if isinstance(part, np.ndarray) else part.array()
    if dtype in DTYPES:
        return cast(values, dtype).reshape(-1).view(np.uint8)
    from ..ops import quantize

    return quantize(np.ascontiguousarray(values, np.float32).reshape(-1, cols), dtype).data.reshape(-1)


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values in a float type; ValueError where one is finite and too large for it."""
    with np.errstate(over="ignore"):
        made = np.ascontiguousarray(values, DTYPES[dtype])
    if dtype != "F32" and values.dtype != made.dtype:
        bad = np.isinf(made.astype(np.float32)) & np.isfinite(values.astype(np.float32))
        if bad.any():
            raise ValueError(f"it holds {values[bad].flat[0]}, which {dtype} cannot")
    return made
