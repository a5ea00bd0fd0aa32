"""Spellings of weight names and shapes in Hugging Face checkpoints, brought to the one used inside.

The canonical names are those of the published checkpoint, the canonical shapes `Config.weight_shapes()`'s.
"""

import re

_DENSE = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.((?:gate|up|down)_proj\.weight)")
_BASE_MODEL = re.compile(r"(?:embed_tokens|norm|layers\.\d+)\.")
_INERT = re.compile(r"(?:.*\.)?rotary_emb\.(?:inv_freq|original_inv_freq)")
_CONV = re.compile(r".*\.[qkv]_conv1d\.weight")


def is_inert(name: str) -> bool:
    """Whether the tensor is a buffer that some writers save and no model of this family reads."""
    return _INERT.fullmatch(name) is not None


def canonical_name(name: str) -> str:
    """The name used inside for a name found in a file.

    Files of the bare model lack the prefix ``model.``; transformers 5.23 saves the feed-forward of a dense
    layer as ``block_sparse_moe.gate_proj`` where published files have ``mlp.gate_proj``.
    """
    if _BASE_MODEL.match(name):
        name = "model." + name
    if dense := _DENSE.fullmatch(name):
        return f"{dense[1]}.mlp.{dense[2]}"
    return name


def canonical_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without the axes of length 1 that some files have; any other shape as it is.

    A_log [1, 1, H, 1] or [H, 1] is [H]; a convolution's taps [C, 1, W] are [C, W].
    """
    if name.endswith(".A_log"):
        if len(shape) == 4 and (shape[0], shape[1], shape[3]) == (1, 1, 1):
            return shape[2:3]
        if len(shape) == 2 and shape[1] == 1:
            return shape[:1]
    if _CONV.fullmatch(name) and len(shape) == 3 and shape[1] == 1:
        return (shape[0], shape[2])
    return shape
