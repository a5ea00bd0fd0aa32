"""Is a checkpoint's file good? Its values, its tokenizer, where it stops, and what it says to a text."""

import importlib.resources
import math
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np

from . import config_glm
from .errors import FormatError
from .load.gguf import BlockView
from .load.gguf_kept import TYPES as KEPT_TYPES
from .load.gguf_scores import score_of
from .load.gguf_tensors import rows_of
from .load.packed import PackedMatrix
from .load.safetensors import stored_as
from .perplexity import perplexity

__all__ = ["FileReport", "check_file", "converter_of", "packaged_text"]

_BLOCK = 32  # values whose scale may be zero
_MATRIX_WORDS = ("proj", "embed_tokens", "lm_head", "experts", "gate.weight")
TEXT_TOKENS = 512


@dataclass
class FileReport:
    """What `check_file` found.

    Attributes
    ----------
    faults : list of str
        Each by itself makes the file bad.
    notes : list of str
        Worth knowing, and no fault.
    types : dict of str to int
        Bytes by storage type.
    values : int
        Values that were read.
    zero_blocks : int
        Of these values, runs of 32 in tensors of block types that are all zero.
    converter : str or None
        The generation of converter that the file seems to be of; None for a folder.
    stops : list of int
        Ids at which generation ends.
    perplexity : float or None
        Of the text in the package; None without a tokenizer.
    scored : int
        Tokens that it is of.
    """

    faults: list
    notes: list
    types: dict
    values: int = 0
    zero_blocks: int = 0
    converter: str | None = None
    stops: list | None = None
    perplexity: float | None = None
    scored: int = 0

    @property
    def ok(self):
        """Whether no fault was found."""
        return not self.faults

    def to_dict(self):
        """Plain values, for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self):
        stored = ", ".join(f"{name} {n:,} bytes" for name, n in sorted(self.types.items()))
        lines = [f"stored as   {stored}", f"values      {self.values:,} read"] if self.types else []
        if self.zero_blocks:
            lines.append(f"zero        {self.zero_blocks:,} runs of {_BLOCK} values in blocks are all zero")
        if self.converter:
            lines.append(f"converter   {self.converter}")
        if self.stops is not None:
            lines.append(f"stops       at the ids {', '.join(map(str, self.stops)) or '(none)'}")
        if self.perplexity is not None:
            lines.append(f"perplexity  {self.perplexity:.4f} of {self.scored:,} tokens of the text in the package")
        lines += [f"note        {note}" for note in self.notes] + [f"fault       {fault}" for fault in self.faults]
        n = len(self.faults)
        return "\n".join([*lines, "good" if self.ok else f"bad: {n} fault{'s' if n > 1 else ''}"])


def check_file(model, progress=None):
    """Read every value of a model's files, and try its tokenizer, its template and a text.

    Parameters
    ----------
    model : Model
        As `from_pretrained` gives it.
    progress : callable, optional
        Called with the number of bytes of tensors read since the last call; the text comes after all of them.

    Returns
    -------
    FileReport
    """
    report = FileReport([], [], {})
    types = Counter()
    for name, tensor in model._tensors.items():
        for view in getattr(tensor, "stored", {name: tensor}).values():
            _check_values(report, name, tensor, view)
            types[stored_as(view)] += view.nbytes
        (progress or (lambda n: None))(tensor.nbytes)
    report.types = dict(types)
    report.converter = converter_of(model)
    try:
        tokenizer = model.tokenizer
    except FormatError as error:
        report.faults += [f"tokenizer: {problem}" for problem in error.problems]
        return report
    if tokenizer is None:
        report.notes.append("it has no tokenizer: token ids only")
        return report
    _check_tokenizer(report, tokenizer)
    _check_stops(report, model, tokenizer)
    _check_text(report, model, tokenizer)
    return report


# ---- values ----


def _pieces(view):
    """Values of a tensor, some rows at a time, with the index of the first."""
    if not hasattr(view, "file"):
        yield 0, np.asarray(view)
        return
    begin = 0
    for part in rows_of(view):
        yield begin, part.array()
        begin += math.prod(part.shape)


def _check_values(report, name, tensor, view):
    low, high, bad, first = math.inf, -math.inf, 0, None
    for begin, a in _pieces(view):
        a = a.astype(np.float32, copy=False)
        report.values += a.size
        least, most = float(a.min()), float(a.max())
        if not math.isfinite(least) or not math.isfinite(most):
            wrong = np.flatnonzero(~np.isfinite(a.reshape(-1)))
            bad += len(wrong)
            first = begin + int(wrong[0]) if first is None else first
        if isinstance(view, BlockView | PackedMatrix):
            report.zero_blocks += int((~a.reshape(-1, _BLOCK).any(axis=1)).sum())
        low, high = min(low, least), max(high, most)
    source = view if hasattr(view, "offset") else getattr(tensor, "ssm_a", getattr(tensor, "packed", None))
    where = f"{name}, at byte {source.offset}," if source is not None else f"{name}"
    if bad:
        report.faults.append(f"{where} stored as {tensor.dtype}: {bad:,} values are not finite, the first at index "
                             f"{first}")
    elif low == high and math.prod(view.shape) > 1:
        what = f"{where} is dead: all its values are {low:g}"
        matrix = any(word in name for word in _MATRIX_WORDS) and "bias" not in name and not score_of(name)
        (report.faults if matrix or (low == 0 and "norm" in name) else report.notes).append(what)


# ---- which converter ----


def converter_of(model):
    """The generation of the converter that wrote a GGUF, as its marks tell; None for another checkpoint."""
    files = getattr(model._checkpoint, "files", ())
    metadata = getattr(files[0], "metadata", {}) if files else {}
    if "general.architecture" not in metadata:
        return None
    names = {name.split(".", 2)[-1] for file in files for name in file if name.startswith("blk.")}
    width = metadata.get("kimi-linear.attention.value_length")
    marks = []
    if "attn_kv_b.weight" in names:
        marks.append("attn_kv_b is whole" if "attn_k_b.weight" not in names else "attn_kv_b is there twice")
    if "attn_qkv.weight" in names:
        marks.append("q, k and v are fused")
    c = model.config
    if KEPT_TYPES in metadata:
        generation = "kimi_linear"
    elif width is not None and width not in (c.kv_rank, c.v_head_dim) and c.mla_heads:
        marks.append(f"value_length is {width}, as conversions of February 2026 have it")
        generation = "llama.cpp, February 2026"
    elif c.model_type == config_glm.TEXT:
        generation = f"llama.cpp, pull request {_glm_layout(metadata)}"
    else:
        generation = "llama.cpp, after February 2026"
    if marks and marks[0] == "attn_kv_b is whole":
        generation = "before February 2026"
    if by := metadata.get("general.quantized_by"):
        marks.append(f"quantised by {by}")
    return generation + (f" ({'; '.join(marks)})" if marks else "")


def _glm_layout(metadata):
    """The pull request of ggml-org/llama.cpp whose names of keys these are: docs/gguf.md#glm."""
    name = metadata["general.architecture"]
    if f"{name}.attention.indexer.block_size" in metadata:
        return 27752
    return 27773 if name == "glm5-next" else 27754


# ---- tokenizer, stops, text ----


def _check_tokenizer(report, tokenizer):
    known = {tokenizer.id_to_bytes(i) for i in range(tokenizer.n_base)}
    if len(known) != tokenizer.n_base:
        report.faults.append(f"tokenizer: {tokenizer.n_base - len(known)} base tokens have the bytes of another")
    for name, i in tokenizer.special_ids.items():
        if tokenizer.encode(name) != [i]:
            report.faults.append(f"tokenizer: {name!r} is token {i}, but its name encodes to {tokenizer.encode(name)}")
    text = packaged_text()
    if tokenizer.decode(tokenizer.encode(text, specials=False)) != text:
        report.faults.append("tokenizer: a text does not come back from its ids")


def _check_stops(report, model, tokenizer):
    from .generate import _stop_ids

    stops = sorted(_stop_ids(model, tokenizer))
    report.stops = stops
    outside = [i for i in stops if i >= model.config.vocab_size]
    if outside:
        report.faults.append(f"the stop ids {outside} are outside the vocabulary of {model.config.vocab_size}")
    if not stops:
        report.faults.append("no token ends a generation: there is no eos, no eot and no <|im_end|>")
    if tokenizer.chat_template is None:
        report.notes.append("it has no chat template")
        return
    try:
        end = _end_of_turn(tokenizer, stops)
    except ValueError as error:
        report.faults.append(f"the chat template fails: {error}")
        return
    own = model.config.eos_token_ids
    if end is not None and end not in stops:
        report.faults.append(f"a turn ends with token {end}, {tokenizer.token(end)!r}, which is not among the "
                             f"stops {stops}")
    elif end is not None and own and end not in own:
        report.notes.append(f"the file's eos is {', '.join(map(str, own))}; a turn ends with {end}, which is a "
                            f"stop here, too")


def _end_of_turn(tokenizer, stops):
    """The token that ends an answer: its turn's last, or a stop that the next turn begins with, as GLM's do."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]

    def ids_of(turns):
        return tokenizer.encode(tokenizer.apply_chat_template(turns, add_generation_prompt=False).rstrip())

    ids = ids_of(turns)
    if not ids or ids[-1] in stops:
        return ids[-1] if ids else None
    more = ids_of([*turns, turns[0]])
    begins = more[len(ids)] if more[: len(ids)] == ids and len(more) > len(ids) else None
    return begins if begins in stops else ids[-1]


def packaged_text():
    """Some 9 KiB of text that the packaged model was not trained on (King James Bible, public domain)."""
    return (importlib.resources.files(__package__) / "data" / "tiny" / "sample.txt").read_text(encoding="utf-8")


def _check_text(report, model, tokenizer):
    ids = tokenizer.encode(packaged_text(), specials=False)[:TEXT_TOKENS]
    try:
        found = perplexity(model, ids, None)
        report.perplexity, report.scored = found.perplexity, found.scored
    except ValueError as error:
        report.faults.append(f"the text in the package: {error}")
        return
    if not report.perplexity < model.config.vocab_size:
        report.faults.append(f"the perplexity of the text in the package is {report.perplexity:.4g}: no better than a "
                             f"guess among {model.config.vocab_size} tokens")
