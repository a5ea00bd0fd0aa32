"""Spellings of weight names and shapes in Hugging Face checkpoints, brought to the one used inside.

The canonical names are those of the published checkpoints, the canonical shapes `Config.weight_shapes()`'s.
"""

import re
from collections.abc import Mapping

from ..config_glm import WRAPPER as GLM

_DENSE = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.((?:gate|up|down)_proj\.weight)")
_BASE_MODEL = re.compile(r"(?:embed_tokens|norm|output_attn_res(?:_norm|_proj)?|layers\.\d+)\.")
_INSIDE = "model.language_model."  # of a model that sees
OF_K3 = "language_model."  # of another that does
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_SCORE = re.compile(r"(.*\.(?:self_attention_res|mlp_res|output_attn_res))\.(norm|proj)_weight")
_INERT = re.compile(r"(?:.*\.)?rotary_emb\.(?:inv_freq|original_inv_freq)")
_OTHER_PARTS = re.compile(r"(?:(?:language_model\.)?(?:model\.)?mtp|(?:model\.)?visual|vision_tower|vision_model|"
                          r"mm_projector|multi_modal_projector)\..+")
_CONV = re.compile(r".*\.(?:[qkv]_conv1d|linear_attn\.conv1d)\.weight")
_FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up|down)_proj(?:\.weight)?")
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.\d+\.(gate|up|down)_proj\.weight")


def is_inert(name: str) -> bool:
    """Whether the tensor is none of the language model's: a buffer that some writers save, or of another part.

    Other parts are the vision tower, ``model.visual`` or ``vision_tower`` and ``mm_projector``, and the layers that
    predict a second token, ``mtp``.
    """
    return _INERT.fullmatch(name) is not None or _OTHER_PARTS.fullmatch(name) is not None


def layer_of(canonical: str) -> int:
    """The layer of a tensor; -1 of one that is in none."""
    found = _LAYER.match(canonical)
    return int(found[1]) if found else -1


def name_in_folder(name: str, content: Mapping) -> str:
    """A canonical name as the folder with this config.json has it, which may be that of a model that sees."""
    if "text_config" not in content:
        return name
    if content.get("model_type") == GLM:
        return _INSIDE + name.removeprefix("model.") if name.startswith("model.") else name
    return OF_K3 + name


def canonical_name(name: str) -> str:
    """The name used inside for a name found in a file.

    Files of the bare model lack the prefix ``model.``, those of a model that sees have ``model.language_model.``, or
    ``language_model.`` before all names (Kimi K3); transformers 5.23 saves the feed-forward of a dense layer as
    ``block_sparse_moe.gate_proj`` where published files have ``mlp.gate_proj``; some files of Kimi K3 spell
    ``self_attention_res.norm_weight`` for ``self_attention_res_norm.weight``.
    """
    name = name.removeprefix(OF_K3)
    if name.startswith(_INSIDE):
        name = "model." + name.removeprefix(_INSIDE)
    elif _BASE_MODEL.match(name):
        name = "model." + name
    if score := _SCORE.fullmatch(name):
        return f"{score[1]}_{score[2]}.weight"
    if dense := _DENSE.fullmatch(name):
        return f"{dense[1]}.mlp.{dense[2]}"
    if fused := _FUSED.fullmatch(name):
        return f"{fused[1]}.{fused[2]}_proj"
    return name


def fused_parts(name: str) -> tuple[str, tuple[str, ...]] | None:
    """(prefix, parts) of a canonical name under which all experts of a layer lie: [experts, parts x rows, columns].

    Expert e's tensors are ``prefix.e.part.weight``. None for another name. Source: transformers 5.23, qwen3_5_moe.
    """
    fused = _FUSED.fullmatch(name)
    if fused is None:
        return None
    return fused[1], ("gate_proj", "up_proj") if fused[2] == "gate_up" else ("down_proj",)


def fused_name(name: str) -> str | None:
    """The name of the tensor in which the tensor of one expert may lie with the others; None for another name."""
    expert = _EXPERT.fullmatch(name)
    return None if expert is None else f"{expert[1]}.{'down' if expert[2] == 'down' else 'gate_up'}_proj"


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
