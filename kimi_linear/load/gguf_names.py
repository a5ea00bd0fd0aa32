"""Tensors of a ``kimi-linear`` GGUF by the names of the Hugging Face checkpoint, as views: nothing is copied.

The one place that says how the two differ (docs/gguf.md#names):

- an expert is a slice of a stacked tensor;
- q, k and v of a KDA layer may be rows of one ``attn_qkv``;
- ``kv_b_proj`` is stored as ``attn_k_b``, transposed in each head, and ``attn_v_b``; older files have it whole;
- ``A_log`` is stored as its effect, -exp(A_log).

The engine takes the last two as they lie, by names of their own (csrc/model/weights.c):
``self_attn.k_b_proj.weight`` [H, R, nope], ``self_attn.v_b_proj.weight`` [H, V, R], ``self_attn.rate`` [H].
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..config import Config
from .gguf import BLOCK_TYPES, BlockView, place, stored_parts
from .gguf_kept import rate_of
from .mapped import MappedFile
from .safetensors import TensorView

MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_conv1d.weight": "ssm_conv1d_q.weight",
    "self_attn.k_conv1d.weight": "ssm_conv1d_k.weight",
    "self_attn.v_conv1d.weight": "ssm_conv1d_v.weight",
    "self_attn.f_a_proj.weight": "ssm_f_a.weight",
    "self_attn.f_b_proj.weight": "ssm_f_b.weight",
    "self_attn.A_log": "ssm_a",
    "self_attn.dt_bias": "ssm_dt.bias",
    "self_attn.b_proj.weight": "ssm_beta.weight",
    "self_attn.g_a_proj.weight": "ssm_g_a.weight",
    "self_attn.g_b_proj.weight": "ssm_g_b.weight",
    "self_attn.o_norm.weight": "ssm_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attn_kv_b.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.gate.e_score_correction_bias": "exp_probs_b.bias",
    "block_sparse_moe.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "block_sparse_moe.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "block_sparse_moe.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
EXPERTS = {"w1": "ffn_gate_exps.weight", "w3": "ffn_up_exps.weight", "w2": "ffn_down_exps.weight"}
FUSED, K_B, V_B = "attn_qkv.weight", "attn_k_b.weight", "attn_v_b.weight"
INERT = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
PLAIN = ("F32", "F16", "BF16")
_EXPERT = "block_sparse_moe.experts."


@dataclass(frozen=True)
class SplitHeads:
    """kv_b_proj [H * (nope + v), R], stored as k_b [H, R, nope] and v_b [H, v, R]."""

    name: str
    shape: tuple[int, ...]
    k_b: TensorView
    v_b: TensorView

    @property
    def stored(self) -> dict[str, TensorView]:
        """What the engine takes in its place."""
        head = self.name.removesuffix("kv_b_proj.weight")
        return {head + "k_b_proj.weight": self.k_b, head + "v_b_proj.weight": self.v_b}

    @property
    def dtype(self) -> str:
        """The parts' storage type, or both."""
        return self.k_b.dtype if self.k_b.dtype == self.v_b.dtype else f"{self.k_b.dtype}/{self.v_b.dtype}"

    @property
    def file(self) -> MappedFile:
        """The file that holds the first part."""
        return self.k_b.file

    @property
    def nbytes(self) -> int:
        """As stored."""
        return self.k_b.nbytes + self.v_b.nbytes

    def digest_parts(self, n: int) -> list[bytes]:
        """As of a BlockView, of both parts."""
        return stored_parts(self.k_b, n) + stored_parts(self.v_b, n)

    def array(self) -> np.ndarray:
        """The matrix of the Hugging Face checkpoint: a copy."""
        k, v = self.k_b.array(), self.v_b.array()
        if k.dtype != v.dtype:
            k, v = k.astype(np.float32), v.astype(np.float32)
        values = np.concatenate([k.transpose(0, 2, 1), v], axis=1).reshape(self.shape)
        values.flags.writeable = False
        return values


@dataclass(frozen=True)
class LogRate:
    """A_log [H], stored as -exp(A_log) in float32.

    `array` is float64: its exponential, rounded once, is the rate that the file has. `kept` is A_log itself, where the
    file has it beside the rate; it holds for the heads whose rate is its exponential.
    """

    name: str
    shape: tuple[int, ...]
    ssm_a: TensorView
    kept: np.ndarray | None = field(default=None, compare=False)

    @property
    def dtype(self) -> str:
        """As stored."""
        return self.ssm_a.dtype

    @property
    def stored(self) -> dict[str, np.ndarray]:
        """What the engine takes in its place: the rate, exp(A_log)."""
        return {self.name.removesuffix("A_log") + "rate": self.rate()}

    @property
    def file(self) -> MappedFile:
        """The file that holds it."""
        return self.ssm_a.file

    @property
    def nbytes(self) -> int:
        """As stored."""
        return self.ssm_a.nbytes

    def digest_parts(self, n: int) -> list[bytes]:
        """As of a BlockView."""
        return stored_parts(self.ssm_a, n)

    def rate(self) -> np.ndarray:
        """exp(A_log) [H] float32."""
        return -self.ssm_a.array().astype(np.float32).reshape(self.shape)

    def array(self) -> np.ndarray:
        """A_log [H] float64."""
        with np.errstate(divide="ignore"):
            values = np.log(self.rate().astype(np.float64))
        if self.kept is not None:
            values = np.where(rate_of(self.kept) == self.rate(), self.kept.astype(np.float64), values)
        values.flags.writeable = False
        return values


def match(config: Config, tensors: Mapping[str, TensorView], problems: list[str], a_logs: Mapping | None = None):
    """The config's tensors among a file's.

    Parameters
    ----------
    config : Config
    tensors : mapping of str to TensorView
        By GGUF names.
    problems : list of str
        Gets a sentence for each tensor that is missing, unknown, or of the wrong sizes, type or values.
    a_logs : mapping of int to (H,) float32, optional
        A_log by layer, of a file that keeps it beside the rates.

    Returns
    -------
    found : dict of str to (TensorView, BlockView, SplitHeads or LogRate)
        By canonical names, in the config's order.
    skipped : tuple of str
        Tensors of the file that are not read.
    """
    m = _Matcher(config, tensors, problems, a_logs or {})
    found = {}
    for name, shape in config.weight_shapes().items():
        tensor = m.tensor(name, shape)
        if tensor is not None:
            found[name] = tensor
    for name in tensors:
        if name not in m.used and name not in m.skipped:
            if name in INERT:
                m.skipped.add(name)
            else:
                problems.append(f"{name!r} is in the file, but by its metadata there is no such tensor")
    return found, tuple(name for name in tensors if name in m.skipped)


class _Matcher:
    """Finds one tensor at a time, and remembers which of the file's were used."""

    def __init__(self, config: Config, tensors: Mapping[str, TensorView], problems: list[str], a_logs: Mapping):
        self.config, self.tensors, self.problems, self.a_logs = config, tensors, problems, a_logs
        self.used: set[str] = set()
        self.skipped: set[str] = set()
        self.told: set[str] = set()

    def tensor(self, name: str, shape: tuple[int, ...]):
        if name in MODEL:
            return self.whole(name, MODEL[name], shape)
        _, _, layer, rest = name.split(".", 3)
        at = f"blk.{layer}."
        if rest.startswith(_EXPERT):
            expert, part, _ = rest.removeprefix(_EXPERT).split(".")
            return self.slice(name, at + EXPERTS[part], int(expert), (self.config.n_experts, *shape), shape)
        if rest == "self_attn.kv_b_proj.weight" and at + K_B in self.tensors:
            return self.split_heads(name, at, shape)
        if rest[:12] in ("self_attn.q_", "self_attn.k_", "self_attn.v_") and rest[12:] == "proj.weight" \
                and at + FUSED in self.tensors:
            return self.slice(name, at + FUSED, "qkv".index(rest[10]), (3 * shape[0], shape[1]), shape)
        view = self.whole(name, at + LAYER[rest], shape)
        return self.log_rate(name, view) if view is not None and rest == "self_attn.A_log" else view

    def view(self, name: str, shape: tuple[int, ...]) -> TensorView | None:
        """The file's tensor, if it has these sizes; axes of 1 do not count: files differ in them."""
        view = self.tensors.get(name)
        if view is None:
            self.tell(name, f"{name} is missing; it must have the sizes {_ne(shape)}")
            return None
        self.used.add(name)
        if _squeezed(view.shape) != _squeezed(shape):
            self.tell(name, f"{name} {place(view)} has the sizes {_ne(view.shape)}; by the metadata it must "
                            f"have {_ne(shape)}")
            return None
        return view

    def whole(self, name: str, stored: str, shape: tuple[int, ...]) -> TensorView | None:
        view = self.view(stored, shape)
        if view is None:
            return None
        allowed = len(shape) > 1 and not name.endswith("conv1d.weight")
        return self.typed(view, name, shape) if self.readable(view, blocks=allowed) else None

    def readable(self, view: TensorView, blocks: bool) -> bool:
        """Whether its storage type will do: vectors are never in blocks."""
        if view.dtype in PLAIN or (blocks and view.dtype in BLOCK_TYPES):
            return True
        self.tell(view.name, f"{view.name} {place(view)} is stored as {view.dtype}; it must be "
                             f"{', '.join([*PLAIN, *BLOCK_TYPES]) if blocks else ' or '.join(PLAIN)}")
        return False

    def typed(self, view: TensorView, name: str, shape: tuple[int, ...], first=0, nbytes=None) -> TensorView:
        """A part of a tensor under another name and shape."""
        kind = TensorView if view.dtype in PLAIN else BlockView
        return kind(name, view.dtype, shape, view.file, view.offset + first, view.nbytes if nbytes is None else nbytes)

    def slice(self, name: str, stored: str, i: int, whole: tuple[int, ...], shape: tuple[int, ...]):
        """Matrix i of those that lie one behind the other in a tensor of the shape `whole`."""
        if stored in self.told:
            return None
        view = self.view(stored, whole)
        if view is None:
            return None
        if not self.readable(view, blocks=True):
            return None
        nbytes = view.nbytes * math.prod(shape) // math.prod(whole)
        return self.typed(view, name, shape, i * nbytes, nbytes)

    def split_heads(self, name: str, at: str, shape: tuple[int, ...]) -> SplitHeads | None:
        c = self.config
        if at + LAYER["self_attn.kv_b_proj.weight"] in self.tensors:
            self.skipped.add(at + LAYER["self_attn.kv_b_proj.weight"])
        k = self.whole(name, at + K_B, (c.mla_heads, c.kv_rank, c.nope_dim))
        v = self.whole(name, at + V_B, (c.mla_heads, c.v_head_dim, c.kv_rank))
        return SplitHeads(name, shape, k, v) if k is not None and v is not None else None

    def log_rate(self, name: str, view: TensorView) -> LogRate | None:
        tensor = LogRate(name, view.shape, view, self.a_logs.get(int(name.split(".")[2])))
        rate = tensor.rate()
        bad = np.flatnonzero(~((rate >= 0) & np.isfinite(rate)))
        if bad.size:
            stored = "blk." + name.split(".")[2] + ".ssm_a"
            self.tell(stored, f"{stored} {place(view)} holds {-rate[bad[0]]} at index {bad[0]}; it must be "
                              f"-exp(A_log), which is finite and not above 0")
            return None
        return tensor

    def tell(self, name: str, problem: str) -> None:
        """One problem a tensor."""
        if name not in self.told:
            self.told.add(name)
            self.problems.append(problem)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _ne(shape: tuple[int, ...]) -> list[int]:
    """As the file writes sizes: the fastest first."""
    return list(shape[::-1])
