"""Memory before it is taken: weights, state and scratch in bytes; what a decoded token reads, and what that allows."""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import _engine
from ._control_groups import control_groups, text_of
from ._scalars import as_whole, at_least
from .config import Config
from .context import current
from .load.gguf import bytes_of
from .quantized import storage_type, storage_types

PAGE = 512  # positions; a sequence's cache grows by this many
FITTING = ("BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ2_XXS", "IQ1_S")  # by falling size
_SAMPLE = 256 << 20  # bytes that are read for the read rate

__all__ = ["Plan", "active", "available_memory", "plan", "read_rate"]


@dataclass(frozen=True)
class Plan:
    """Bytes that a model takes, for `sequences` of `context` tokens each.

    Attributes
    ----------
    weights : int
        Mapped from the checkpoint, shared with other processes, never copied.
    vectors : int
        Norm weights and convolution taps, widened to float32 at load.
    state_fixed : int
        One sequence's convolution histories and delta states: the same at any length.
    state_page : int
        One sequence's cache, for each 512 positions.
    state : int
        All sequences at the full context.
    scratch : int
        Intermediates of the largest pass, with the copies that make it a transaction.
    unread : int
        Of one sequence's cache at the full context, what decoding a token does not read: what an indexer does not
        choose, and those of its keys that pools stand for.
    checkpoints : int
        Copies of `state_fixed` that states keep to go back to, of all sequences.
    active : int
        Bytes of weights that decoding a token reads: no unused experts, no other rows of the embedding.
    experts : int
        Bytes of weights in routed experts, the part that may stay on disk until it is used.
    routed : float
        Share of the experts that a token uses.
    typed : dict from str to int
        Bytes of all weights if their matrices were of a type.
    """

    context: int
    sequences: int
    cache: str
    weights: int
    vectors: int
    state_fixed: int
    state_page: int
    state: int
    scratch: int
    unread: int = 0
    checkpoints: int = 0
    active: int = 0
    experts: int = 0
    routed: float = 0.0
    typed: dict = field(default_factory=dict)

    @property
    def anonymous(self):
        """Bytes of the process's own memory: all but the mapped weights."""
        return self.vectors + self.state + self.checkpoints + self.scratch

    @property
    def total(self):
        """Bytes with the weights resident."""
        return self.weights + self.anonymous

    @property
    def step(self):
        """Bytes that decoding a token of one sequence at the full context moves: weights, what it reads of the cache,
        and the fixed state, which is read and written."""
        return self.active + -(-self.context // PAGE) * self.state_page - self.unread + 2 * self.state_fixed

    def largest_context(self, memory, weights=None):
        """The longest context a sequence may have when it must fit `memory` bytes together with so many bytes of
        weights, by default all; 0 if none does."""
        weights = self.weights if weights is None else weights
        left = memory - weights - (self.anonymous - self.state) - self.sequences * self.state_fixed
        if left < 0:
            return 0
        return left // (self.sequences * self.state_page) * PAGE if self.state_page else 1 << 40

    def from_disk(self, memory):
        """Bytes of experts that a decoded token reads from disk where only `memory` bytes are there: an estimate.

        All else stays in memory, and as many experts as there is room for, used all alike. None where not even what
        is no expert fits.
        """
        room = memory - self.anonymous - (self.weights - self.experts)
        if room < 0:
            return None
        return int(self.routed * max(0, self.experts - room))

    def fitting_type(self, memory):
        """The largest of the types in `typed` in which all fits `memory` bytes, or None."""
        return next((name for name, n in self.typed.items() if n + self.anonymous <= memory), None)


def plan(source, *, context=4096, sequences=1, cache="float32", dtype=None, pass_tokens=0, keep=0, ctx=None):
    """Plan a model from its file, of which only the header is read, or from its config alone.

    Parameters
    ----------
    source : str or path, Config or dict
        A GGUF or a Hugging Face folder, whose tensors have their types; or a config, a config.json or its content, as
        if all its tensors were of one storage type.
    context : int
        Tokens a sequence may hold.
    sequences : int
        States at the same time.
    cache : {"float32", "float16", "q8_0"}
    dtype : {"BF16", "F16", "F32"}
        Storage type of the weights of a config; BF16 where it is not given.
    pass_tokens : int
        Tokens of the longest pass; 0 is the 512 that a call of the engine takes.
    keep : int
        Checkpoints of each sequence, as for ``model.new_state(checkpoints_every=, keep=)``.

    Returns
    -------
    Plan
    """
    ctx = current(ctx)
    source = _config(source)
    if not isinstance(source, Config):
        from .load import open_checkpoint

        if dtype is not None:
            raise ValueError(f"dtype is {dtype!r}; it is for a config alone: a file's tensors have their types")
        checkpoint = open_checkpoint(source)
        config, tensors = checkpoint.config, checkpoint.tensors
        core = _engine.core_model(ctx, config, tensors)
    else:
        if dtype not in (None, "BF16", "F16", "F32"):
            raise ValueError(f"dtype is {dtype!r}; it must be 'BF16', 'F16' or 'F32'")
        config, dtype = source, dtype or "BF16"
        tensors = {name: _Planned(shape, bytes_of(dtype, shape)) for name, shape in config.weight_shapes().items()}
        core = _engine.planning_model(ctx, config, dtype)
    return of_core(core, ctx, context, sequences, cache, pass_tokens, keep, config=config, tensors=tensors)


def _config(source):
    """A Config where `source` is one in any form; a path of another kind as it is."""
    if isinstance(source, Mapping):
        return Config.from_dict(source)
    if isinstance(source, str | os.PathLike):
        path = os.path.expanduser(os.fspath(source))
        return Config.from_file(path) if path.endswith(".json") and os.path.isfile(path) else source
    if not isinstance(source, Config):
        raise TypeError(f"source is a {type(source).__name__}; it must be a path, a Config, or the content of a "
                        "config.json")
    return source


@dataclass(frozen=True)
class _Planned:
    """A tensor that is not there."""

    shape: tuple
    nbytes: int


def of_core(core, ctx, context, sequences, cache, pass_tokens=0, keep=0, *, config=None, tensors=None):
    """The Plan of a ``_core.Model``; what a token reads only with the config and the tensors."""
    context, sequences = as_whole(context, "context"), as_whole(sequences, "sequences")
    pass_tokens, keep = as_whole(pass_tokens, "pass_tokens"), at_least(keep, 0, "keep")
    bytes_of = core.plan(ctx._core, _engine.cache_type(cache), context, sequences, pass_tokens)
    return Plan(context=context, sequences=sequences, cache=cache, **bytes_of,
                unread=_unread(config, context, cache) if config is not None else 0,
                checkpoints=sequences * keep * bytes_of["state_fixed"],
                **(_of_weights(config, tensors) if tensors is not None else {}))


# ---- what a token reads ----

def active(config, tensors):
    """(name, tensor, share of it that decoding a token uses) of those that it uses."""
    for name, t in tensors.items():
        if ".experts." in name:
            yield name, t, config.experts_per_token / config.n_experts
        elif name != "model.embed_tokens.weight" or config.tie_embeddings:
            yield name, t, 1.0


def _of_weights(config: Config, tensors):
    return {
        "active": round(sum(share * t.nbytes for _, t, share in active(config, tensors))),
        "experts": sum(t.nbytes for name, t in tensors.items() if ".experts." in name),
        "routed": config.experts_per_token / config.n_experts if config.n_experts else 0.0,
        "typed": {dtype: sum(_bytes_as(name, t, dtype) for name, t in tensors.items()) for dtype in FITTING},
    }


def _unread(config, context, cache):
    """Plan.unread: with an indexer a token reads the keys of all pools, and the latents of what it chooses."""
    if not config.index_heads:
        return 0
    kind = storage_type(_engine.cache_type(cache))

    def row(width, first=False):  # what no whole blocks make up is in float16, as csrc/model/cache.c has it
        return width // kind.values * kind.bytes if first or width % kind.values == 0 else 2 * width

    rows = -(-context // PAGE) * PAGE
    left = max(0, rows - (config.index_topk + config.index_pool - 1))
    layers = sum(layer.mixer == "mla" for layer in config.layers)
    return layers * (rows * 2 * row(config.index_dim) + left * (row(config.kv_rank, True) + row(config.rope_dim)))


def _bytes_as(name, t, dtype):
    """Bytes of a tensor of a type, or of the next one whose blocks make up its rows; vectors, convolutions and routers
    stay as they are."""
    if len(t.shape) != 2 or "conv1d" in name or name.endswith((".block_sparse_moe.gate.weight", ".mlp.gate.weight")):
        return t.nbytes
    fits = next(d for d in (dtype, "Q8_0", "F16") if t.shape[-1] % storage_types[d].values == 0)
    return bytes_of(fits, t.shape)


def read_rate(ctx=None):
    """Bytes a second that this machine reads from memory with a context's threads: the best of five readings."""
    core, data = current(ctx)._core, np.ones(_SAMPLE, np.uint8)
    return max(core.roof_read(data) for _ in range(5))


def available_memory(root="/"):
    """Bytes that this process can still have without swapping; None where the system does not say.

    What the machine has left, or less where a control group, as that of a container, has a limit. `root` is where
    ``proc`` and ``sys`` are.
    """
    root = Path(root)
    groups = [_left(folder, *_GROUPS[version]) for version, folder in control_groups(root, "memory")]
    left = [_of_the_machine(root / "proc/meminfo"), *groups]
    return min((n for n in left if n is not None), default=None)


def _of_the_machine(meminfo):
    for line in text_of(meminfo).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return _free_by_vm_stat(asked_of_macos("vm_stat"))


#: Of each version: the files of the limit and the use; the line of memory.stat with the file cache that is given up
#: first.
_GROUPS = {2: ("memory.max", "memory.current", "inactive_file"),
           1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}


def _left(folder, limit, used, cache):
    """Bytes left in one group; None where it has no limit."""
    numbers = [text_of(folder / name).strip() for name in (limit, used)]
    if not all(number.isdigit() for number in numbers):  # there is no such file, or "max"
        return None
    stat = dict(line.split() for line in text_of(folder / "memory.stat").splitlines() if line.count(" ") == 1)
    return max(0, int(numbers[0]) - int(numbers[1]) + int(stat.get(cache, 0)))


def asked_of_macos(*command):
    """What a command of macOS prints; nothing on other systems."""
    if sys.platform != "darwin":
        return ""
    import subprocess

    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _free_by_vm_stat(text):
    """Bytes that vm_stat of macOS calls free, inactive or speculative, which all are given without swapping."""
    page = re.search(r"page size of (\d+) bytes", text)
    counts = [re.search(rf"^Pages {kind}: +(\d+)", text, re.MULTILINE) for kind in ("free", "inactive", "speculative")]
    if page is None or None in counts:
        return None
    return int(page[1]) * sum(int(count[1]) for count in counts)
