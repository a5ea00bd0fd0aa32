"""Tensors of a GGUF by the names of the Hugging Face checkpoint, as views: nothing is copied.

The one place that says how the two differ (docs/gguf.md#names):

- an expert is a slice of a stacked tensor, in which gate and up may lie together;
- q, k and v of a layer may be rows of one ``attn_qkv``;
- ``kv_b_proj`` is stored as ``attn_k_b``, transposed in each head, and ``attn_v_b``; older files have it whole;
- ``in_proj_qkvz`` is stored as ``attn_qkv``, no longer grouped by key heads, and ``attn_gate``; older files have it
  whole, as ``ssm_in``;
- ``A_log`` is stored as its effect, -exp(A_log);
- what scores residuals is stored as one vector (gguf_scores.py);
- of the Qwen kinds norms hold 1 + w, and ``qwen35`` has its value heads in another order: that is the file's Config
  (gguf_config.py, `Architecture.form`), and tensors are as they lie.

The engine takes kv_b_proj, in_proj_qkvz, A_log and scores as they lie, by names of their own (csrc/model/weights.c):
``self_attn.k_b_proj.weight`` [H, R, nope], ``self_attn.v_b_proj.weight`` [H, V, R];
``linear_attn.in_proj_qkv.weight``, ``linear_attn.in_proj_z.weight``; ``self_attn.rate`` or ``linear_attn.rate`` [H];
``self_attention_res.weight``, ``mlp_res.weight``, ``model.output_attn_res.weight`` [D].
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..config import Config
from .gguf import BLOCK_TYPES, BlockView, place, stored_parts
from .gguf_kept import rate_of
from .gguf_scores import Score, ScoreNames, score_of
from .mapped import MappedFile
from .safetensors import WEIGHT_DTYPES, TensorView

MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
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
    "block_sparse_moe.routed_expert_down_proj.weight": "ffn_routed_down.weight",
    "block_sparse_moe.routed_expert_norm.weight": "ffn_routed_norm.weight",
    "block_sparse_moe.routed_expert_up_proj.weight": "ffn_routed_up.weight",
    "block_sparse_moe.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "block_sparse_moe.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "block_sparse_moe.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.in_proj_qkvz.weight": "ssm_in.weight",
    "linear_attn.in_proj_ba.weight": "ssm_ba.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "self_attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "self_attn.indexer.wk.weight": "indexer.attn_k.weight",
    "self_attn.indexer.k_norm.weight": "indexer.k_norm.weight",
    "self_attn.indexer.k_norm.bias": "indexer.k_norm.bias",
    "self_attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "self_attn.indexer.index_kpool_compress_ape": "indexer_compressor_ape.weight",
    "self_attn.indexer.index_kpool_compress_gate": "indexer_compressor_gate.weight",
    **{f"hc_{half}_{part}": f"hc_{half}_{part}.weight" for half in ("attn", "ffn") for part in ("fn", "base", "scale")},
}
#: Another spelling that files of some converters have.
_ALSO = {"indexer_compressor_ape.weight": "indexer.kpool_ape.weight",
         "indexer_compressor_gate.weight": "indexer.kpool_gate.weight"}
#: The second norm of a layer, which llama.cpp names by architecture.
_SECOND_NORM = dict.fromkeys(["kimi_linear", "kimi_k3", "glm5_next_text"], "ffn_norm.weight")
_POST_NORM = "post_attention_norm.weight"
EXPERTS = {"w1": "ffn_gate_exps.weight", "w3": "ffn_up_exps.weight", "w2": "ffn_down_exps.weight",
           "gate_proj": "ffn_gate_exps.weight", "up_proj": "ffn_up_exps.weight", "down_proj": "ffn_down_exps.weight"}
GATE_UP = "ffn_gate_up_exps.weight"  # the rows of gate, then those of up, of each expert
#: The output gate, which is one projection, by the mixer of its layer.
_OUTPUT_GATE = {"kda": "ssm_g.weight", "mla": "attn_gate.weight"}
FUSED, K_B, V_B, GATE = "attn_qkv.weight", "attn_k_b.weight", "attn_v_b.weight", "attn_gate.weight"
INERT = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
#: What may stand in a tensor's place: of two that are there one is too many.
_INSTEAD = {"attn_qkv": "ssm_in.weight", "attn_gate": "ssm_in.weight", "ffn_gate_exps": GATE_UP, "ffn_up_exps": GATE_UP,
            "attn_q": FUSED, "attn_k": FUSED, "attn_v": FUSED, "ssm_g_a": "ssm_g.weight", "ssm_g_b": "ssm_g.weight"}
_EXPERT = re.compile(r"(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.weight")
_QKV = re.compile(r"self_attn\.([qkv])_proj\.weight")


def layer_name(config: Config, layer: int, rest: str) -> str:
    """The GGUF's name below ``blk.N.`` of a tensor below ``model.layers.N.`` that is stored as it is."""
    if rest == "self_attn.g_proj.weight":
        return _OUTPUT_GATE[config.layers[layer].mixer]
    if rest == "post_attention_layernorm.weight":
        return _SECOND_NORM.get(config.model_type, _POST_NORM)
    return _LAYER[rest]


def expert_of(rest: str) -> tuple[int, str] | None:
    """(expert, part) of a name below ``model.layers.N.``; None where it is no expert's."""
    found = _EXPERT.fullmatch(rest)
    return None if found is None else (int(found[1]), found[2])


@dataclass(frozen=True)
class _Pair:
    """A matrix stored as two tensors; see the classes of it."""

    name: str
    shape: tuple[int, ...]
    first: TensorView
    second: TensorView

    def _names(self) -> tuple[str, str]:
        raise NotImplementedError

    def _joined(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    @property
    def stored(self) -> dict[str, TensorView]:
        """What the engine takes in its place."""
        head, _, _ = self.name.rpartition(".weight")[0].rpartition(".")
        return {f"{head}.{name}.weight": part for name, part in zip(self._names(), (self.first, self.second))}

    @property
    def dtype(self) -> str:
        """The parts' storage type, or both."""
        a, b = self.first.dtype, self.second.dtype
        return a if a == b else f"{a}/{b}"

    @property
    def file(self) -> MappedFile:
        """The file that holds the first part."""
        return self.first.file

    @property
    def nbytes(self) -> int:
        """As stored."""
        return self.first.nbytes + self.second.nbytes

    def digest_parts(self, n: int) -> list[bytes]:
        """As of a BlockView, of both parts."""
        return stored_parts(self.first, n) + stored_parts(self.second, n)

    def array(self) -> np.ndarray:
        """The matrix of the Hugging Face checkpoint: a copy."""
        first, second = self.first.array(), self.second.array()
        if first.dtype != second.dtype:
            first, second = first.astype(np.float32), second.astype(np.float32)
        values = self._joined(first, second).reshape(self.shape)
        values.flags.writeable = False
        return values


class SplitHeads(_Pair):
    """kv_b_proj [H * (nope + v), R], stored as k_b [H, R, nope] and v_b [H, v, R]."""

    def _names(self) -> tuple[str, str]:
        return "k_b_proj", "v_b_proj"

    def _joined(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.concatenate([first.transpose(0, 2, 1), second], axis=1)


@dataclass(frozen=True)
class SplitInputs(_Pair):
    """in_proj_qkvz, whose rows are grouped by key head, stored as qkv and z with each part's heads together.

    `heads` is (Hk, Hv, K, V).
    """

    heads: tuple[int, int, int, int]

    def _names(self) -> tuple[str, str]:
        return "in_proj_qkv", "in_proj_z"

    def _joined(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        Hk, Hv, K, V = self.heads
        q, k, v = np.split(first, [Hk * K, 2 * Hk * K])
        return np.concatenate([x.reshape(Hk, -1, x.shape[-1]) for x in (q, k, v, second)], axis=1)


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


def match(config: Config, tensors: Mapping[str, TensorView], problems: list[str], a_logs: Mapping | None = None,
          blocks: int = 0, scores: Mapping | None = None):
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
    blocks : int
        Blocks of the file; those behind the config's layers predict a second token, and are not read.
    scores : mapping of str to (D,) float32, optional
        Norms and projections by name, of a file that keeps them beside their products.

    Returns
    -------
    found : dict of str to (TensorView, BlockView, SplitHeads, SplitInputs, LogRate or Score)
        By canonical names, in the config's order.
    skipped : tuple of str
        Tensors of the file that are not read.
    """
    m = _Matcher(config, tensors, problems, a_logs or {}, scores or {})
    found = {}
    for name, shape in m.shapes.items():
        tensor = m.tensor(name, shape)
        if tensor is not None:
            found[name] = tensor
    for name in tensors:
        if name not in m.used and name not in m.skipped:
            if name in INERT or _block(name) in range(config.n_layers, blocks):
                m.skipped.add(name)
            else:
                problems.append(_unread(name, tensors))
    return found, tuple(name for name in tensors if name in m.skipped)


def _unread(name: str, tensors: Mapping) -> str:
    """A sentence about a tensor that nothing has asked for."""
    at, _, rest = name.rpartition(".weight")[0].rpartition(".")
    other = at + "." + _INSTEAD.get(rest, "")
    if other in tensors:
        return f"{name!r} is in the file, and {other!r}, which holds the same; one of them must do"
    return f"{name!r} is in the file, but by its metadata there is no such tensor"


def _block(name: str) -> int:
    """The block of a GGUF's name; -1 for one of none."""
    found = re.match(r"blk\.(\d{1,9})\.", name)
    return int(found[1]) if found else -1


class _Matcher:
    """Finds one tensor at a time, and remembers which of the file's were used."""

    def __init__(self, config: Config, tensors: Mapping[str, TensorView], problems: list[str], a_logs: Mapping,
                 scores: Mapping):
        self.config, self.tensors, self.problems = config, tensors, problems
        self.a_logs, self.scores = a_logs, scores
        self.used: set[str] = set()
        self.skipped: set[str] = set()
        self.told: set[str] = set()
        self.shapes = config.weight_shapes()

    def tensor(self, name: str, shape: tuple[int, ...]):
        if name in MODEL:
            return self.whole(name, MODEL[name], shape)
        if (score := score_of(name)) is not None:
            return self.score(name, score, shape)
        _, _, layer, rest = name.split(".", 3)
        at = f"blk.{layer}."
        if (expert := expert_of(rest)) is not None:
            return self.expert(name, at, *expert, shape)
        if rest == "self_attn.kv_b_proj.weight" and at + K_B in self.tensors:
            return self.split_heads(name, at, shape)
        if rest == "linear_attn.in_proj_qkvz.weight" and at + _LAYER[rest] not in self.tensors:
            return self.split_inputs(name, at, shape)
        if (part := _QKV.fullmatch(rest)) and at + FUSED in self.tensors and (rows := self.rows_of_qkv(int(layer))):
            before, total = sum(rows["qkv"[i]] for i in range("qkv".index(part[1]))), sum(rows.values())
            return self.part(name, at + FUSED, before * shape[1], (total, shape[1]), shape)
        stored = layer_name(self.config, int(layer), rest)
        if at + stored not in self.tensors and at + _ALSO.get(stored, "") in self.tensors:
            stored = _ALSO[stored]
        view = self.whole(name, at + stored, shape)
        return self.log_rate(name, view) if view is not None and rest.endswith(".A_log") else view

    def rows_of_qkv(self, layer: int) -> dict[str, int]:
        """Rows of q, k and v in a layer's attn_qkv; none of MLA, which has no k."""
        names = {x: f"model.layers.{layer}.self_attn.{x}_proj.weight" for x in "qkv"}
        return {x: self.shapes[name][0] for x, name in names.items()} if names["k"] in self.shapes else {}

    def expert(self, name: str, at: str, e: int, part: str, shape: tuple[int, ...]) -> TensorView | None:
        E, n = self.config.n_experts, math.prod(shape)
        if at + GATE_UP in self.tensors and part in ("gate_proj", "up_proj"):
            whole = (E, 2 * shape[0], shape[1])
            return self.part(name, at + GATE_UP, (2 * e + (part == "up_proj")) * n, whole, shape)
        return self.part(name, at + EXPERTS[part], e * n, (E, *shape), shape)

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
        allowed = len(shape) > 1 and not name.endswith(("conv1d.weight", "compress_ape"))
        return self.typed(view, name, shape) if self.readable(view, blocks=allowed) else None

    def readable(self, view: TensorView, blocks: bool) -> bool:
        """Whether its storage type will do: vectors are never in blocks."""
        if view.dtype in WEIGHT_DTYPES or (blocks and view.dtype in BLOCK_TYPES):
            return True
        self.tell(view.name, f"{view.name} {place(view)} is stored as {view.dtype}; it must be "
                             f"{', '.join([*WEIGHT_DTYPES, *BLOCK_TYPES]) if blocks else ' or '.join(WEIGHT_DTYPES)}")
        return False

    def typed(self, view: TensorView, name: str, shape: tuple[int, ...], first=0, nbytes=None) -> TensorView:
        """A part of a tensor under another name and shape."""
        kind = TensorView if view.dtype in WEIGHT_DTYPES else BlockView
        return kind(name, view.dtype, shape, view.file, view.offset + first, view.nbytes if nbytes is None else nbytes)

    def part(self, name: str, stored: str, first: int, whole: tuple[int, ...], shape: tuple[int, ...]):
        """The matrix that begins with value `first` of a tensor of the shape `whole`."""
        if stored in self.told:
            return None
        view = self.view(stored, whole)
        if view is None:
            return None
        if not self.readable(view, blocks=True):
            return None
        n = math.prod(whole)
        return self.typed(view, name, shape, view.nbytes * first // n, view.nbytes * math.prod(shape) // n)

    def split_heads(self, name: str, at: str, shape: tuple[int, ...]) -> SplitHeads | None:
        c = self.config
        if at + _LAYER["self_attn.kv_b_proj.weight"] in self.tensors:
            self.skipped.add(at + _LAYER["self_attn.kv_b_proj.weight"])
        k = self.whole(name, at + K_B, (c.mla_heads, c.kv_rank, c.nope_dim))
        v = self.whole(name, at + V_B, (c.mla_heads, c.v_head_dim, c.kv_rank))
        return SplitHeads(name, shape, k, v) if k is not None and v is not None else None

    def split_inputs(self, name: str, at: str, shape: tuple[int, ...]) -> SplitInputs | None:
        c = self.config
        n_z = c.gdn_v_heads * c.gdn_v_dim
        qkv = self.whole(name, at + FUSED, (shape[0] - n_z, shape[1]))
        z = self.whole(name, at + GATE, (n_z, shape[1]))
        heads = (c.gdn_k_heads, c.gdn_v_heads, c.gdn_k_dim, c.gdn_v_dim)
        return SplitInputs(name, shape, qkv, z, heads) if qkv is not None and z is not None else None

    def score(self, name: str, score: ScoreNames, shape: tuple[int, ...]) -> Score | None:
        view = self.whole(score.taken, score.stored, shape[-1:])
        kept = (self.scores[score.norm], self.scores[score.proj]) if score.norm in self.scores else None
        return None if view is None else Score(name, shape, view, kept)

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
