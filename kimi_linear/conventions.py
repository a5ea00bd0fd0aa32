"""How other projects call the same op: one table, as data.

``conventions["fla"]["delta_rule"]`` says where the scale sits, how the state lies, what a gate is and what the
arguments are called; `kimi_linear.testing.check_op` reads it to call a kernel of that project on our cases. Each entry
names the files that it was read from, and `but` makes a variant: ``conventions["fla"]["delta_rule"].but(state="VK")``.
"""

from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType

from ._conventions import ARRAYS, OTHERS, OURS
from ._names import Named, meant

__all__ = ["Convention", "DeltaRule", "PlainOp", "convention", "conventions"]


@dataclass(frozen=True, kw_only=True)
class Convention:
    """What the conventions of all ops say.

    Attributes
    ----------
    project : str
        The key in `conventions`.
    source : tuple of str
        Files that this was read from, each ``owner/name: path``.
    arrays : {"numpy", "torch", "mlx"}
        What the arguments are.
    names : mapping
        Our name of an argument to theirs, in their order; an argument that is not there cannot be passed.
    always : mapping
        Arguments that every call gets besides; one of `names` where the call has no value of its own for it.
    dtypes : str
        What they compute in and keep.
    notes : tuple of str
        What else differs, in words.
    """

    project: str
    source: tuple = ()
    arrays: str = "numpy"
    names: MappingProxyType = field(default_factory=lambda: MappingProxyType({}))
    always: MappingProxyType = field(default_factory=lambda: MappingProxyType({}))
    dtypes: str = "float32"
    notes: tuple = ()

    def but(self, **changes):
        """This convention with some fields changed; ValueError names a field that there is not."""
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                raise ValueError(f"{name!r} is no field of a {type(self).__name__}; it has {', '.join(known)}")
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class DeltaRule(Convention):
    """The conventions of `delta_rule`.

    Attributes
    ----------
    axes : {"THK", "BTHK", "BHTK"}
        Of q: tokens first, a batch of one before them, or heads before tokens. g, beta, v and o follow.
    state : {"KV", "VK"}
        The last two axes of a state. Before them: heads, and sequences where `axes` has a batch or they are ragged.
    gate : {"log", "log2", "exp"}
        What the gate argument holds: g in nats, g / ln 2, or the decay exp(g) itself.
    gates : tuple of {"channel", "head", None}
        Kinds of gate that are taken, the usual one first: [T, H, K], [T, H], none.
    gate_axis : bool
        A gate per head has a last axis of 1.
    beta_axis : bool
        beta has a last axis of 1.
    scale : {"argument", "inside", "caller"}
        On q: an argument, K**-0.5 fixed inside, or multiplied by the caller.
    l2_norm : str or None
        The argument that asks for it; None where it is the caller's.
    l2_eps : float
    l2_form : str
        Where l2_eps stands, as this project norms, inside the kernel or before it.
    heads : tuple of {"equal", "grouped", "tiled"}
        How value heads find key heads; "equal" is as many, repeated by the caller where they are not.
    square : bool
        K = V alone.
    no_state : {"omit", "none", "zeros"}
        What stands for no initial state: no argument, None, or zeros.
    returns : {"o, state", "packed"}
        Two arrays, or one of [all of o | all of the state].
    """

    axes: str = "THK"
    state: str = "KV"
    gate: str = "log"
    gates: tuple = ("channel", "head", None)
    gate_axis: bool = False
    beta_axis: bool = False
    scale: str = "argument"
    l2_norm: str | None = None
    l2_eps: float = 1e-6
    l2_form: str = "x / sqrt(sum(x^2) + eps)"
    heads: tuple = ("equal", "grouped", "tiled")
    square: bool = False
    no_state: str = "omit"
    returns: str = "o, state"


@dataclass(frozen=True, kw_only=True)
class PlainOp(Convention):
    """The conventions of every other op.

    Attributes
    ----------
    forms : tuple of str
        How arguments and results lie and what they hold where that is not as ours, each a key of the op's FORMS in
        `kimi_linear.testing`: "w [n, m]", "rate as A_log". They are applied in this order.
    fixed : mapping
        Arguments of ours that cannot be passed, and the values that they have there.
    returned : int
        How many of our results there are, the first; 0 is all.
    """

    forms: tuple = ()
    fixed: MappingProxyType = field(default_factory=lambda: MappingProxyType({}))
    returned: int = 0


def _table(**values):
    return MappingProxyType(values)


_OURS = _table(q="q", k="k", v="v", g="g", beta="beta", scale="scale", initial_state="initial_state",
               offsets="offsets", l2_norm="l2_norm", l2_eps="l2_eps", head_map="head_map", out="out")
_FLA = _table(q="q", k="k", v="v", g="g", beta="beta", scale="scale", initial_state="initial_state",
              offsets="cu_seqlens")
_HF = _table(q="query", k="key", v="value", g="g", beta="beta", initial_state="initial_state")
_FINAL = _table(output_final_state=True)
_NORM = "use_qk_l2norm_in_kernel"

_FLA_KDA = DeltaRule(
    project="fla",
    source=("fla-org/flash-linear-attention: fla/ops/kda/naive.py, fused_recurrent.py, chunk.py",),
    arrays="torch", names=_FLA, always=_FINAL, axes="BTHK", gates=("channel",), l2_norm=_NORM,
    heads=("equal", "grouped"),
    dtypes="any for q, k, v; g, beta and the state float32",
    notes=("the chunk kernels multiply g by log2(e) once and use exp2",
           "state_v_first=True is state='VK'",
           "cu_seqlens needs a batch of one",
           "use_gate_in_kernel and use_beta_sigmoid_in_kernel, where on, take raw gates and beta: leave them off"))
_VLLM_KDA = DeltaRule(
    project="vllm",
    source=("vllm-project/vllm: vllm/third_party/flash_linear_attention/ops/kda.py, fused_recurrent.py",),
    arrays="torch", names=_FLA, always=_FINAL, axes="BTHK", state="VK", gates=("channel",), l2_norm=_NORM,
    heads=("equal", "grouped"), dtypes="bfloat16 q, k, v; g, beta float32; state as configured",
    notes=("the state is [N, H, V, K]; earlier releases had [N, H, K, V]: state='KV'",
           "this is chunk_kda; the decode kernel writes states in place, at ssm_state_indices"))
_HF_KDA = DeltaRule(
    project="hf",
    source=("huggingface/transformers: src/transformers/models/kimi_linear/modeling_kimi_linear.py "
            "(chunk_kimi_delta_attention, recurrent_kimi_delta_attention)",),
    arrays="torch", names=_HF, always=_FINAL, axes="BTHK", gates=("channel",), scale="inside", l2_norm=_NORM,
    heads=("equal",), no_state="none",
    notes=("the chunk form subtracts cumulative sums of g: digits go with strong gates, and -inf gives NaN",
           "unknown keywords are swallowed: cu_seqlens does nothing without fla"))

_DELTA_RULE = {
    "ours": _table(delta_rule=DeltaRule(
        project="ours", source=("kimi_linear/ops/_kda.py",), names=_OURS, l2_norm="l2_norm",
        dtypes="float32; float16 and bfloat16 widen exactly")),
    "fla": _table(delta_rule=_FLA_KDA),
    "fla-gdn": _table(delta_rule=_FLA_KDA.but(
        project="fla-gdn", gates=("head",),
        source=("fla-org/flash-linear-attention: fla/ops/gated_delta_rule/naive.py, fused_recurrent.py, chunk.py",),
        notes=("older files have beta before g: pass by name",))),
    "hf": _table(delta_rule=_HF_KDA),
    "hf-gdn": _table(delta_rule=_HF_KDA.but(
        project="hf-gdn", gates=("head",),
        source=("huggingface/transformers: src/transformers/models/qwen3_next/modeling_qwen3_next.py "
                "(torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule)",))),
    "vllm": _table(delta_rule=_VLLM_KDA),
    "vllm-gdn": _table(delta_rule=_VLLM_KDA.but(
        project="vllm-gdn", gates=("head",),
        source=("vllm-project/vllm: vllm/third_party/flash_linear_attention/ops/fused_recurrent.py, chunk.py",))),
    "ggml": _table(delta_rule=DeltaRule(
        project="ggml",
        source=("ggml-org/llama.cpp: ggml/src/ggml-cpu/ops.cpp (ggml_compute_forward_gated_delta_net_one_chunk), "
                "ggml/include/ggml.h (ggml_gated_delta_net)",),
        names=_table(q="q", k="k", v="v", g="g", beta="beta", initial_state="state"), axes="BTHK", state="VK",
        gates=("channel", "head"), gate_axis=True, beta_axis=True, scale="inside", heads=("equal", "tiled"),
        square=True, no_state="zeros", returns="packed",
        l2_eps=1e-5,
        l2_form="x / sqrt(sum(x^2) + eps), by the caller: rms_norm with eps / K, times K**-0.5. Older: "
                "ggml_l2_norm, x / max(sqrt(sum(x^2)), eps)",
        notes=("axes are ggml's ne from last to first: ne = [K, H, T, B] is [B, T, H, K] here",
               "the scale is V**-0.5, and V is K",
               "one result: [B, T, H, V] of o, then [B, H, V, K] of the state"))),
    "mlx": _table(delta_rule=DeltaRule(
        project="mlx",
        source=("ml-explore/mlx-lm: mlx_lm/models/gated_delta.py (gated_delta_ops, gated_delta_kernel)",
                "ml-explore/mlx-lm: mlx_lm/models/kimi_linear.py"),
        names=_table(q="q", k="k", v="v", g="g", beta="beta", initial_state="state"), arrays="mlx", axes="BTHK",
        state="VK", gate="exp", gates=("channel", "head"), scale="caller", heads=("equal", "grouped"),
        no_state="zeros",
        l2_form="rms_norm with eps on the mean, times K**-0.5, by the caller; eps was 1e-6, now 1e-6 / K",
        notes=("g is the decay itself, exp of the log-decay",
               "the kernel wants K a multiple of 32; gated_delta_ops takes any"))),
}


def _plain(project, entry):
    names = dict(pair.partition("=")[::2] for pair in entry["names"].split())
    rest = {n: entry[n] for n in ("forms", "notes", "returned") if n in entry}
    return PlainOp(project=project, source=(entry["source"],), arrays=ARRAYS.get(project, "numpy"),
                   names=_table(**names), always=_table(**entry.get("always", {})),
                   fixed=_table(**entry.get("fixed", {})), **rest)


def _ours(op):
    home = "kimi_linear/reference_backward.py" if op.endswith("_backward") else "kimi_linear/ops"
    return {"names": " ".join(f"{n}={n}" for n in [*OURS[op].split(), "out"]), "source": home}


_PLAIN = {"ours": {op: _ours(op) for op in OURS}} | OTHERS



def _backward(how):
    """The conventions of `delta_rule_backward`: those of the op, whose gradients lie as what they are of."""
    return how.but(names=_table(do="do", **how.names, dstate="dstate"))


#: project -> op -> Convention.
conventions = MappingProxyType(Named("a project of kimi_linear.conventions", {
    project: MappingProxyType(Named(f"an op of kimi_linear.conventions[{project!r}]", {
        **delta_rule, **{op: _plain(project, e) for op, e in _PLAIN.get(project, {}).items()},
        "delta_rule_backward": _backward(delta_rule["delta_rule"])}))
    for project, delta_rule in _DELTA_RULE.items()}))


def convention(given, op):
    """The Convention of an op: by the project's name, or `given` itself where it is one.

    Raises
    ------
    ValueError
        If there is no such project, or it has no such op; the sentence names those that there are.
    """
    if isinstance(given, Convention):
        return given
    if not isinstance(given, str) or given not in conventions:
        raise ValueError(f"conventions is {given!r:.40}; it must be one of {', '.join(conventions)}, or a Convention"
                         f"{meant(given, conventions)}")
    ops = conventions[given]
    if op not in ops:
        raise ValueError(f"{given} has no conventions of {op!r}; it has {', '.join(ops)}{meant(op, ops)}")
    return ops[op]
