"""Memory before it is taken: weights, state and scratch in bytes."""

from dataclasses import dataclass

from . import _engine
from .context import current

PAGE = 512  # positions; a sequence's cache grows by this many

__all__ = ["Plan", "available_memory", "plan"]


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
    checkpoints : int
        Copies of `state_fixed` that states keep to go back to, of all sequences.
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
    checkpoints: int = 0

    @property
    def anonymous(self):
        """Bytes of the process's own memory: all but the mapped weights."""
        return self.vectors + self.state + self.checkpoints + self.scratch

    @property
    def total(self):
        """Bytes with the weights resident."""
        return self.weights + self.anonymous

    def largest_context(self, memory):
        """The longest context a sequence may have when all of it must fit `memory` bytes; 0 if none does."""
        left = memory - (self.total - self.state) - self.sequences * self.state_fixed
        if left < 0:
            return 0
        return left // (self.sequences * self.state_page) * PAGE if self.state_page else 1 << 40


def plan(config, *, context=4096, sequences=1, cache="float32", dtype="BF16", pass_tokens=0, keep=0, ctx=None):
    """Plan a model from its config alone, as if all its tensors were of one storage type.

    Parameters
    ----------
    config : Config
    context : int
        Tokens a sequence may hold.
    sequences : int
        States at the same time.
    cache : {"float32", "float16"}
    dtype : {"BF16", "F16", "F32"}
        Storage type of the weights.
    keep : int
        Checkpoints of each sequence, as for ``model.new_state(checkpoints_every=, keep=)``.

    Returns
    -------
    Plan
    """
    if dtype not in ("BF16", "F16", "F32"):
        raise ValueError(f"dtype is {dtype!r}; it must be 'BF16', 'F16' or 'F32'")
    ctx = current(ctx)
    return of_core(_engine.planning_model(ctx, config, dtype), ctx, context, sequences, cache, pass_tokens, keep)


def of_core(core, ctx, context, sequences, cache, pass_tokens=0, keep=0):
    """The Plan of a ``_core.Model``."""
    bytes_of = core.plan(ctx._core, _engine.cache_type(cache), context, sequences, pass_tokens)
    if keep < 0:
        raise ValueError(f"keep is {keep}; it must be >= 0")
    return Plan(context=context, sequences=sequences, cache=cache, **bytes_of,
                checkpoints=sequences * keep * bytes_of["state_fixed"])


def available_memory():
    """Bytes that this machine can still give without swapping; None where it does not say."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
