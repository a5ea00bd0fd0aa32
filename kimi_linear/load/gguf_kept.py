"""What a Hugging Face folder says and a GGUF has no key for, in keys of our own: written here, and read back.

========================================  ============================================================================
``kimi_linear.config``                    JSON: keys of config.json whose values the GGUF's keys do not give
``kimi_linear.config.absent``             keys that they give and config.json lacks
``kimi_linear.config.around``             JSON: keys around text_config, which the others describe; see `taken_out`
``kimi_linear.generation_config``         JSON: generation_config.json
``kimi_linear.dtypes``                    JSON: storage types of the folder's tensors, by name, ``*`` for a number
``kimi_linear.A_log``                     A_log of all linear layers, where the logarithm of the rates is not it
``kimi_linear.norms``                     all norms w that the file holds as 1 + w, where that less 1 is not w
``kimi_linear.scores``                    of what scores residuals both factors of the product (gguf_scores.py)
========================================  ============================================================================

A key of the GGUF that was changed later is obeyed: only what differs from what the keys gave is kept.
"""

import json
import re
from collections.abc import Mapping

import numpy as np

from .. import config_glm
from ..config import Config
from ..config_kimi import INHERITED, K3
from . import gguf_heads as order
from .gguf import MetaArray, described
from .safetensors import DTYPES, WEIGHT_DTYPES
from .strict_json import parse, show

CONFIG, ABSENT, AROUND = "kimi_linear.config", "kimi_linear.config.absent", "kimi_linear.config.around"
GENERATION, TYPES = "kimi_linear.generation_config", "kimi_linear.dtypes"
RATES, NORMS = "kimi_linear.A_log", "kimi_linear.norms"
PACKED = "MXFP4"  # among TYPES: of a matrix that a folder has in two parts (packed.py)
MAX_DEPTH = 64  # of JSON
#: model_type of a file that sees -> the keys that count around its text model where that has none.
_INHERITED = {K3: INHERITED, config_glm.WRAPPER: config_glm.INHERITED}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


# ---- config.json -----------------------------------------------------------------------------------


def same(a: object, b: object) -> bool:
    """Whether two JSON values are one: 1, 1.0 and true are three."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def differences(given: Mapping, wanted: Mapping) -> dict:
    """Keys by which `restored` makes `wanted` of `given`: name -> JSON text, or (kind, items)."""
    more = {key: value for key, value in wanted.items() if key not in given or not same(given[key], value)}
    absent = [key for key in given if key not in wanted]
    found: dict = {CONFIG: json.dumps(more, ensure_ascii=False)} if more else {}
    return found | ({ABSENT: ("string", absent)} if absent else {})


def restored(given: Mapping, metadata: Mapping, problems: list[str]) -> dict:
    """The content of config.json: what the keys gave, as the folder had it."""
    more = json_object(metadata, CONFIG, problems)
    absent = metadata.get(ABSENT)
    gone: list = []
    if isinstance(absent, MetaArray) and absent.kind == "string":
        gone = absent.values()
    elif absent is not None:
        problems.append(f"{ABSENT} is {described(absent)}; it must be an array of string")
    text = {key: value for key, value in (dict(given) | more).items() if key not in gone}
    return _put_back(text, json_object(metadata, AROUND, problems), problems) if AROUND in metadata else text


def taken_out(content: Mapping) -> tuple[dict, dict | None]:
    """Of a config.json the text model's keys, and the others, None where the file is the text model's alone.

    Among the others ``text_config`` lists those of the text model's keys that are not inside it.
    """
    kind = content.get("model_type", K3)
    if kind not in _INHERITED or "text_config" not in content:
        return dict(content), None
    text = content["text_config"]
    outside = [key for key in _INHERITED[kind] if key not in text and content.get(key) is not None]
    around = {key: value for key, value in content.items() if key not in outside}
    return {**text, **{key: content[key] for key in outside}}, around | {"text_config": outside}


def _put_back(text: dict, around: dict, problems: list[str]) -> dict:
    """The content of which `taken_out` made these."""
    outside, kind = around.get("text_config"), around.get("model_type", K3)
    inherited = _INHERITED.get(kind, INHERITED) if isinstance(kind, str) else INHERITED
    if not isinstance(outside, list) or not all(key in inherited for key in outside):
        problems.append(f"{AROUND}: text_config is {show(outside)}; it must be a list of {', '.join(inherited)}")
        return text
    inside = {key: value for key, value in text.items() if key not in outside}
    return {**around, **{key: text[key] for key in outside if key in text}, "text_config": inside}


def json_object(metadata: Mapping, key: str, problems: list[str]) -> dict:
    """The object in a text of the metadata; empty where there is none."""
    text = metadata.get(key)
    if text is None:
        return {}
    if not isinstance(text, str):
        problems.append(f"{key} is {described(text)}; it must be a JSON object in a string")
        return {}
    try:
        value = parse(text.encode("utf-8"))
    except ValueError as error:
        problems.append(f"{key}: {error}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{key} is a JSON {type(value).__name__}; it must be an object")
        return {}
    if _depth(value) > MAX_DEPTH:
        problems.append(f"{key}: its JSON is nested deeper than {MAX_DEPTH}")
        return {}
    return value


def _depth(value: object, most: int = 0) -> int:
    """Depth of objects and lists, counted no further than is of interest."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return most if most > MAX_DEPTH else max((_depth(x, most + 1) for x in inside), default=most)


# ---- storage types of the folder -------------------------------------------------------------------


def pattern(name: str) -> str:
    """A tensor's name without its layer and expert."""
    return _NUMBER.sub("*", name)


def dtypes_of(tensors: Mapping) -> str:
    """JSON for `read_dtypes`: one entry for all tensors of a pattern where they are of one type."""
    by_pattern: dict[str, dict] = {}
    for name, tensor in tensors.items():
        by_pattern.setdefault(pattern(name), {})[name] = tensor.dtype
    found: dict = {}
    for key, names in by_pattern.items():
        found |= {key: next(iter(names.values()))} if len(set(names.values())) == 1 else names
    return json.dumps(found)


def read_dtypes(metadata: Mapping, problems: list[str]) -> dict[str, str]:
    """Name or `pattern` -> storage type that the folder's tensors had; empty for files of others."""
    found = json_object(metadata, TYPES, problems)
    for name, dtype in found.items():
        if dtype not in (*WEIGHT_DTYPES, PACKED):
            problems.append(f"{TYPES}: {show(name)} is {show(dtype)}; it must be F32, F16 or BF16, or {PACKED} of a "
                            "matrix in two parts")
    return {} if problems else found


# ---- A_log -----------------------------------------------------------------------------------------


def rate_of(a_log: np.ndarray) -> np.ndarray:
    """exp(A_log) in float64, rounded once to float32; infinite where it is too large for that."""
    with np.errstate(over="ignore"):
        return np.exp(a_log.astype(np.float64)).astype(np.float32)


def check_rate(name: str, a_log: np.ndarray) -> None:
    """ValueError where a rate is not finite, which no file may hold."""
    bad = np.flatnonzero(~np.isfinite(rate_of(a_log)))
    if bad.size:
        raise ValueError(f"{name} holds {a_log[bad[0]]} at index {bad[0]}; a GGUF holds -exp(A_log) in float32, which "
                         "must be finite")


def needs_keeping(a_log: np.ndarray) -> bool:
    """Whether the logarithm of the rate, rounded to the type of a_log, is another number."""
    with np.errstate(divide="ignore"):
        back = np.log(rate_of(a_log).astype(np.float64)).astype(a_log.dtype)
    return back.tobytes() != a_log.tobytes()


def read_a_logs(metadata: Mapping, config: Config, problems: list[str]) -> dict[int, np.ndarray]:
    """Layer -> A_log [H] float32, of a file that keeps it."""
    value = metadata.get(RATES)
    heads = {"kda": config.kda_heads, "gdn": config.gdn_v_heads}
    layers = [i for i, spec in enumerate(config.layers) if spec.mixer in heads]
    if value is None or not layers:
        return {}
    n = sum(heads[config.layers[i].mixer] for i in layers)
    if not isinstance(value, MetaArray) or value.kind != "float32" or value.count != n:
        problems.append(f"{RATES} is {described(value)}; it must be an array of {n} float32, one a head of a linear "
                        "layer")
        return {}
    return dict(zip(layers, np.split(value.values().astype(DTYPES["F32"]), len(layers)), strict=True))


# ---- norms -----------------------------------------------------------------------------------------


def kept_norms(tensors: Mapping) -> list[np.ndarray]:
    """The norms w of a folder whose file has 1 + w, in their order; none where each comes back from that."""
    norms = [t.array() for name, t in tensors.items() if order.is_folded(name)]
    lost = any(order.minus_one(order.plus_one(w)).astype(w.dtype).tobytes() != w.tobytes() for w in norms)
    return [w.astype(np.float32) for w in norms] if lost else []


def read_norms(metadata: Mapping, shapes: Mapping, problems: list[str]) -> dict[str, np.ndarray]:
    """Name -> norm w [n] float32, of a file that keeps them; `shapes` are those of all tensors of the config."""
    value = metadata.get(NORMS)
    if value is None:
        return {}
    sizes = {name: shape[0] for name, shape in shapes.items() if order.is_folded(name)}
    n = sum(sizes.values())
    if not isinstance(value, MetaArray) or value.kind != "float32" or value.count != n:
        problems.append(f"{NORMS} is {described(value)}; it must be an array of {n} float32, all norms that are 1 + w")
        return {}
    parts = np.split(value.values().astype(DTYPES["F32"]), np.cumsum([*sizes.values()])[:-1])
    return dict(zip(sizes, parts, strict=True))
