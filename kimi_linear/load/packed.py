"""Matrices that a Hugging Face folder keeps in MXFP4, as Kimi K3 its experts: compressed-tensors' mxfp4-pack-quantized.

``weight_packed`` [rows, columns / 2] uint8 has column 2 j in the low half of byte j and 2 j + 1 in the high half;
``weight_scale`` [rows, columns / 32] uint8 has a byte e for 32 columns, whose scale is 2^(e - 127). ggml's MXFP4 has
the same codes and scales: a block of 17 bytes is e, then column j in the low half of byte j and j + 16 in the high
half. So one becomes the other bit for bit.
"""

from dataclasses import dataclass, replace

import numpy as np

from ..quantized import Quantized
from .mapped import MappedFile
from .safetensors import TensorView

COLUMNS = 32
PARTS = ("_packed", "_scale")  # behind the name of the matrix


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix [rows, columns] of two tensors. Its blocks are a copy, made when they are asked for."""

    name: str
    shape: tuple[int, int]
    packed: TensorView
    scale: TensorView

    dtype = "MXFP4"

    @property
    def file(self) -> MappedFile:
        """The file that holds the codes."""
        return self.packed.file

    @property
    def nbytes(self) -> int:
        """As stored."""
        return self.packed.nbytes + self.scale.nbytes

    def blocks(self) -> Quantized:
        """ggml's blocks of the same values, which the engine takes in its place."""
        rows, cols = self.shape
        codes = self.packed.array().reshape(rows, cols // COLUMNS, COLUMNS // 2)
        low, high = codes & 15, codes >> 4                             # columns 2 j and 2 j + 1
        columns = np.stack([low, high], axis=-1).reshape(rows, -1, COLUMNS)
        blocks = np.empty((rows, cols // COLUMNS, 1 + COLUMNS // 2), np.uint8)
        blocks[..., 0] = self.scale.array()
        blocks[..., 1:] = columns[..., :COLUMNS // 2] | columns[..., COLUMNS // 2:] << 4
        return Quantized(blocks.reshape(rows, -1), self.dtype, self.shape)

    def rows(self, first: int, n: int) -> "PackedMatrix":
        """n of its rows, from `first` on."""
        return replace(self, shape=(n, self.shape[1]), packed=self.packed.rows(first, n),
                       scale=self.scale.rows(first, n))

    def digest_parts(self, n: int) -> list[bytes]:
        """As of a BlockView, of both parts."""
        from .gguf import stored_parts

        return stored_parts(self.packed, n) + stored_parts(self.scale, n)

    def array(self) -> np.ndarray:
        """The values in float32, a copy."""
        values = np.asarray(self.blocks())
        values.flags.writeable = False
        return values


def half_of(blocks: np.ndarray, part: int) -> np.ndarray:
    """The tensor of `PARTS` that is in ggml's blocks [rows, bytes]: `PackedMatrix.blocks` undone."""
    parts = blocks.reshape(len(blocks), -1, 1 + COLUMNS // 2)
    if PARTS[part] == "_scale":
        return parts[..., 0]
    codes = parts[..., 1:]
    columns = np.concatenate([codes & 15, codes >> 4], axis=-1)
    return (columns[..., ::2] | columns[..., 1::2] << 4).reshape(len(blocks), -1)


def matrix_of(name: str) -> tuple[str, str] | None:
    """(matrix, part) of the name of a part; None for another name."""
    for part in PARTS:
        if name.endswith(".weight" + part):
            return name.removesuffix(part), part
    return None


def problems_of(name: str, parts: dict[str, TensorView], shape: tuple[int, ...]) -> list[str]:
    """Sentences about what keeps the parts of a matrix of this shape from being one."""
    problems = []
    for part, columns in zip(PARTS, (2, COLUMNS)):
        wanted = [shape[0], shape[1] // columns]
        if part not in parts:
            problems.append(f"{name}{part} {wanted} is missing, and its other half is there")
        elif parts[part].dtype != "U8" or list(parts[part].shape) != wanted or shape[1] % COLUMNS:
            view = parts[part]
            problems.append(f"{view.name} is {view.dtype} {list(view.shape)}; for the matrix {list(shape)} it must be "
                            f"U8 {wanted}, and columns a multiple of {COLUMNS}")
    return problems
