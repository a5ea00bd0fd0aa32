"""The delta rule of transformers, in torch: Kimi-Linear's for a gate each channel, Qwen3-Next's for one each head.

Both are there as a chunked form (64 tokens, decays from differences of cumulative sums) and token by token. The
chunked form of Kimi-Linear holds an array of [H, T, 64, K] for its decays, several times over: sequences are given to
it in pieces of `PIECE` tokens, whose results are the same as of the whole, because a piece is a number of chunks.
"""

import functools
import os
import warnings

from . import Missing

__all__ = ["about", "contenders"]

PIECE = 512
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@functools.cache
def _modules():
    try:
        with warnings.catch_warnings(action="ignore"):
            import torch
            from transformers.models.kimi_linear import modeling_kimi_linear as kimi
            from transformers.models.qwen3_next import modeling_qwen3_next as qwen
    except ImportError as error:
        raise Missing(f"torch is missing ({error}): `make peers` installs torch and transformers into .venv-peers, and "
                      f".venv-peers/bin/python runs this file with them") from None
    return torch, kimi, qwen


def about():
    """Releases."""
    torch = _modules()[0]
    import transformers

    return f"transformers {transformers.__version__} on torch {torch.__version__}"


class Call:
    """One function of transformers on one sequence, in pieces where `piece` is given."""

    def __init__(self, function, arguments, threads, piece=None):
        self.torch, self.function, self.threads = _modules()[0], function, threads
        self.inputs = [self._tensor(arguments[name]) for name in ("q", "k", "v", "g", "beta")]
        self.initial = self._tensor(arguments["initial_state"])
        self.piece = piece or max(1, self.inputs[0].shape[1])

    def _tensor(self, a):
        return self.torch.from_numpy(a.copy())[None]

    def __call__(self):
        if self.torch.get_num_threads() != self.threads:
            self.torch.set_num_threads(self.threads)
        self.o, state = [], self.initial
        with self.torch.no_grad():
            for begin in range(0, self.inputs[0].shape[1], self.piece):
                q, k, v, g, beta = (x[:, begin:begin + self.piece] for x in self.inputs)
                o, state = self.function(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True,
                                         use_qk_l2norm_in_kernel=False)
                self.o.append(o)
        self.state = state

    def result(self):
        """o [T, H, V] and the state [H, K, V] of the last run."""
        return self.torch.cat(self.o, 1)[0].numpy().copy(), self.state[0].numpy().copy()


def contenders(arguments, threads):
    """``torch chunked`` and ``torch recurrent``."""
    _, kimi, qwen = _modules()
    if arguments["g"].ndim == 3:
        chunked, recurrent = kimi.chunk_kimi_delta_attention, kimi.recurrent_kimi_delta_attention
    else:
        chunked, recurrent = qwen.torch_chunk_gated_delta_rule, qwen.torch_recurrent_gated_delta_rule
    return {"torch chunked": Call(chunked, arguments, threads, PIECE),
            "torch recurrent": Call(recurrent, arguments, threads)}
