"""What the values of a Qwen GGUF are beside a folder's: 1 + w, and the order of value heads, of grouped inputs.

A folder has the value heads of one key head side by side: value head k * r + j uses key head k, of Hk, where r is
Hv / Hk. The converter of llama.cpp tiles them: position j * Hk + k of the file is that head, so that value head p uses
key head p % Hk. Rows and columns of all that has value heads move with them. Source: conversion/qwen.py of
ggml-org/llama.cpp.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..config import Config
from .safetensors import array_of

Ranges = list[tuple[int, int]]  # (first row, rows)


def tiled(c: Config) -> np.ndarray:
    """For each value head of the file, in order, the folder's: [Hv]."""
    return np.arange(c.gdn_v_heads).reshape(c.gdn_k_heads, -1).T.reshape(-1)


def grouped(c: Config) -> np.ndarray:
    """For each value head of the folder, in order, the file's: [Hv]."""
    return np.argsort(tiled(c))


def rows(c: Config, rest: str, heads: np.ndarray) -> Ranges | None:
    """Where the rows of a tensor come from when its value heads get the order `heads`; None if it has none of them.

    `rest` is its name below ``model.layers.N.``.
    """
    part = rest.removeprefix("linear_attn.")
    before = 2 * c.gdn_k_heads * c.gdn_k_dim
    if part in ("in_proj_qkv.weight", "conv1d.weight"):
        return [(0, before), *((before + int(h) * c.gdn_v_dim, c.gdn_v_dim) for h in heads)]
    if part == "in_proj_z.weight":
        return [(int(h) * c.gdn_v_dim, c.gdn_v_dim) for h in heads]
    if part in ("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias"):
        return [(int(h), 1) for h in heads]
    return None


def ungrouped(c: Config) -> tuple[Ranges, Ranges]:
    """Where the rows of qkv and of z come from in in_proj_qkvz, which has q, k, v, z of one key head after another."""
    K, width = c.gdn_k_dim, c.gdn_v_heads // c.gdn_k_heads * c.gdn_v_dim
    starts = [i * 2 * (K + width) for i in range(c.gdn_k_heads)]
    parts = ((0, K), (K, K), (2 * K, width), (2 * K + width, width))
    q, k, v, z = ([(start + first, n) for start in starts] for first, n in parts)
    return q + k + v, z


def take_rows(values: np.ndarray, ranges: Ranges) -> np.ndarray:
    """The rows of `values` in another order."""
    return values[np.concatenate([np.arange(first, first + n) for first, n in ranges])]


def take_columns(c: Config, values: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """The columns of out_proj [rows, Hv V], whole heads of them, in the order `heads`."""
    return values.reshape(len(values), c.gdn_v_heads, c.gdn_v_dim)[:, heads].reshape(values.shape)


def is_folded(name: str) -> bool:
    """Whether a tensor is a norm w that files of the Qwen kinds store as 1 + w; ``linear_attn.norm`` is none."""
    return name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight")


def plus_one(w: np.ndarray) -> np.ndarray:
    """1 + w in float32."""
    return w.astype(np.float32) + np.float32(1)


def minus_one(stored: np.ndarray, kept: np.ndarray | None = None) -> np.ndarray:
    """w of 1 + w in float32: `kept`, where the file has w beside it and the sum is still that of it."""
    stored = stored.astype(np.float32)
    w = stored - np.float32(1)
    return w if kept is None else np.where(plus_one(kept) == stored, kept, w)


def undo(c: Config, published: Config, rest: str, kept: np.ndarray | None = None) \
        -> Callable[[np.ndarray], np.ndarray] | None:
    """What makes a tensor of a folder, whose Config is `published`, of that of a file, whose Config is `c`.

    None where they are the same. `kept` is the tensor of the folder, where the file has it beside the other.
    """
    if is_folded(rest):
        return (lambda w: minus_one(w, kept)) if c.norm_plus_one != published.norm_plus_one else None
    if c.gdn_tiled == published.gdn_tiled:
        return None
    heads = grouped(c)
    if rest == "linear_attn.out_proj.weight":
        return lambda w: take_columns(c, w, heads)
    ranges = rows(c, rest, heads)
    return None if ranges is None else lambda w: take_rows(w, ranges)


class _Undone:
    """A tensor of a GGUF with what the converter did to its values undone."""

    def __init__(self, tensor, change: Callable[[np.ndarray], np.ndarray]):
        self.dtype, self.shape, self.nbytes = tensor.dtype, tensor.shape, tensor.nbytes
        self._tensor, self._change = tensor, change

    def array(self) -> np.ndarray:
        """The values, a copy."""
        return self._change(array_of(self._tensor))


def as_published(config: Config, published: Config, name: str, tensor, kept: np.ndarray | None = None):
    """A tensor of a model whose Config is `config` as a folder's with `published`: itself, or a lazy copy.

    `kept` is a norm of the folder, where the file has it beside 1 + w.
    """
    rest = name.split(".", 3)[3] if name.startswith("model.layers.") else name
    change = undo(config, published, rest, kept)
    return tensor if change is None else _Undone(tensor, change)


def in_common_form(config: Config, name: str, tensor):
    """A tensor as folders and files can be compared: norms as 1 + w, value heads in a folder's order; else itself.

    Of a model whose Config is `config`. Norms are not taken as w, which 1 + w in float32 has rounded.
    """
    if is_folded(name):
        return _Undone(tensor, plus_one) if config.norm_plus_one else tensor
    return as_published(config, replace(config, gdn_tiled=False), name, tensor)


def have_one_form(a: Config, b: Config) -> bool:
    """Whether the tensors of two models of one shape are stored alike."""
    return (a.norm_plus_one, a.gdn_tiled) == (b.norm_plus_one, b.gdn_tiled)
