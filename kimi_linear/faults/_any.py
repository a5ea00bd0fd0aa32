"""Faults of norms, residuals and embedding, and those that any op can have."""

from __future__ import annotations

import math
import re

import ml_dtypes
import numpy as np

from .. import reference
from ._fault import CALL, FAINT, LARGE, RUN, Fault, changed
from .site import Site

HALF_MAX = 65504.0
FLOAT32_MAX = float(np.finfo(np.float32).max)


# ---- norms -------------------------------------------------------------------------------------------


def other_eps(call, eps: float):
    return call.run(eps=eps) if eps != call["eps"] else None


def over(length):
    """The norm with another length: a function of the mean of squares, eps and the width."""
    def function(call):
        x, eps = call["x"], call["eps"]
        right = np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        return call.run() * right / length((x * x).mean(-1, keepdims=True), eps, x.shape[-1])

    return function


def overflowing(mean, eps, D):
    return np.where(mean * D > FLOAT32_MAX, np.inf, np.sqrt(mean + eps))


def norm_of_weighted(call):
    """The weight is on x before the norm."""
    return call.run(x=call["x"] * call["w"], w=np.ones_like(call["w"]))


def norm_of_product(call):
    """rms_norm(x gate(z)): the gate before the norm."""
    return reference.rms_norm(call["x"] * _gate_of(call)(call["z"]), call["w"], eps=call["eps"])


def _gate_of(call):
    return reference.silu if call.args.get("activation") == "silu" else reference.sigmoid


def norm_of_all_heads(call):
    """One norm for a token, over all heads, not one for a head."""
    y = norm_of_row(call)
    return None if y is None else y * _gate_of(call)(call["z"])


def norm_of_row(call):
    """One norm for a token, over all that its row of x has."""
    x = call["x"]
    if x.ndim < 3:
        return None
    return call["w"] * x / np.sqrt((x * x).mean((-2, -1), keepdims=True) + call["eps"])


def other_gate(call):
    return call.run(activation="sigmoid" if call.args.get("activation") == "silu" else "silu")


def centred(call):
    x = call["x"]
    return call.run(x=x - x.mean(-1, keepdims=True))


# ---- embedding, linear, activations ------------------------------------------------------------------


def moved_ids(call, by: int):
    """The row behind or before; the last and the first are each other's neighbours."""
    return call.run(ids=(call.args["ids"] + by) % len(call.args["table"]))


def short_ids(call):
    """ids in 16 bits."""
    ids = np.asarray(call.args["ids"])
    return call.run(ids=ids & 0xFFFF) if (ids > 0xFFFF).any() else None


def turned(argument):
    """A matrix [m, n] read from memory that holds [n, m]."""
    def function(call):
        w = np.asarray(call.args[argument])
        return call.run(**{argument: np.ascontiguousarray(w.T).reshape(w.shape)})

    return function


def no_padding_row(call):
    y, ids = call.run().copy(), np.asarray(call.args["ids"])
    y[ids == 0] = 0
    return y


def without_tail(call, n: int):
    """The columns past a multiple of n are not summed."""
    D = call["x"].shape[-1]
    kept = D // n * n
    if kept == D:
        return None
    return call.run(x=call["x"] * (np.arange(D) < kept))


def to_ten_bits(call):
    """Inputs as a TF32 matrix unit takes them: 10 bits behind the point, to nearest."""
    def narrow(x):
        bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
        bits = (bits + 0xFFF + ((bits >> np.uint64(13)) & np.uint64(1))) & np.uint64(0xFFFFE000)
        return np.where(np.isfinite(x), bits.astype(np.uint32).view(np.float32), x).astype(np.float64)

    return call.run(**{a: narrow(call.args[a]) for a in ("x", "w")})


def halves(call):
    """gate and up, within SwiGLU's limit where it has one."""
    gate, up, limit = call["gate"], call["up"], call.args.get("limit")
    return (gate, up) if limit is None else (np.minimum(gate, limit), np.clip(up, -limit, limit))


def activated(function):
    def wrong(call):
        gate, up = halves(call)
        return function(gate) * up

    return wrong


def silu_of_product(call):
    gate, up = halves(call)
    return reference.silu(gate * up)


def gelu(x):
    """The form with tanh, as most kernels have it."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def exact_gelu(x):
    return x / 2 * (1 + np.vectorize(math.erf, otypes=[float])(x / np.sqrt(2)))


GELU = {"tanh": gelu, "erf": exact_gelu}


def bounded(x, beta):
    """beta tanh(x / beta); x where there is no beta."""
    return x if beta is None else beta * np.tanh(x / beta)


def situ_gated(factor):
    """SiTU with ``factor(gate, beta)`` for that of the gate."""
    return lambda call: factor(call["gate"], call["beta"]) * bounded(call["up"], call["linear_beta"])


def of_unbounded_gate(call):
    """SiLU for the gate's factor; None where up is not bounded either, for that is SwiGLU."""
    return None if call["linear_beta"] is None else situ_gated(lambda x, beta: reference.silu(x))(call)


def situ_upped(factor):
    """SiTU with ``factor(up, linear_beta)`` for that of up, which is there where up is bounded."""
    def function(call):
        beta = call["linear_beta"]
        return None if beta is None else call.run(up=factor(call["up"], beta), linear_beta=None)

    return function


OF_SIGMOID = {"gate / beta": lambda x, beta: x / beta, "beta gate": lambda x, beta: beta * x,
              "beta tanh(gate / beta)": bounded, "-gate": lambda x, beta: -x}
TANH = {"beta tanh(x)": lambda x, beta: beta * np.tanh(x), "tanh(x / beta)": lambda x, beta: np.tanh(x / beta),
        "tanh(x)": lambda x, beta: np.tanh(x), "beta tanh(beta x)": lambda x, beta: beta * np.tanh(beta * x),
        "a clamp at beta": lambda x, beta: np.clip(x, -beta, beta)}


def other_sigmoid(call, of: str):
    return situ_gated(lambda x, beta: bounded(x, beta) * reference.sigmoid(OF_SIGMOID[of](x, beta)))(call)


def other_tanh(call, form: str):
    return situ_gated(lambda x, beta: TANH[form](x, beta) * reference.sigmoid(x))(call)


def other_tanh_of_up(call, form: str):
    return situ_upped(TANH[form])(call)


def swapped_betas(call):
    beta, linear_beta = call["beta"], call["linear_beta"]
    return None if linear_beta is None else call.run(beta=linear_beta, linear_beta=beta)


def bounded_by_beta(call):
    """up is bounded by the gate's beta, whatever its own is."""
    return call.run(linear_beta=call["beta"])


def overflowing_tanh(call):
    """(e^2x - 1) / (e^2x + 1) in float32: infinity over infinity."""
    beta, y = call["beta"], call.run()
    return np.where(call["gate"] / beta > 44.36, np.nan, y) if (call["gate"] / beta > 44.36).any() else None


def without_largest(call):
    """exp(x) over its sum in float32: infinity over infinity past 88.7, 0 over 0 below -104."""
    x = call["x"]
    e = np.where(x > 88.72, np.inf, np.where(x < -103.97, 0.0, np.exp(np.minimum(x, 88.72))))
    total = e.sum(-1, keepdims=True)
    return e / np.where(total > FLOAT32_MAX, np.inf, total)


def largest_from_zero(call):
    """exp(x - max(0, largest)) over its sum in float32: 0 over 0 where all of a row is below -104."""
    x = call["x"]
    e = np.exp(x - np.maximum(x.max(-1, keepdims=True), 0))
    e[e < 2.0**-150] = 0
    return e / e.sum(-1, keepdims=True) if (x.max(-1) < 0).any() else None


def along_tokens(call):
    x = call["x"]
    if x.ndim < 2:
        return None
    e = np.exp(x - x.max(0))
    return e / e.sum(0)


def plus_one_in_sum(call):
    x = call["x"]
    most = x.max(-1, keepdims=True)
    e = np.exp(x - most)
    return e / (e.sum(-1, keepdims=True) + np.exp(-most))


# ---- what needs a run, roundings ---------------------------------------------------------------------


def heads_interleaved(site: Site):
    """Channels lie as [width, heads], not [heads, width]."""
    shape = site.node.shape
    if len(shape) != 2 or 1 in shape:
        return None
    y = site.run().reshape(-1, *shape[::-1])
    return y.swapaxes(1, 2)


def of_whole(site: Site, rows):
    """The op with these rows of the joint matrix that its own are taken from."""
    whole = np.asarray(site.weights[site.node.weights["w"].name])
    return site.run(w=rows(whole))


def ungrouped(site: Site):
    """Rows of in_proj_qkvz or in_proj_ba as if its parts lay one after another."""
    name, part = site.node.weights["w"].name, site.node.tap.split(".")[-1][0]
    if not name.endswith(("in_proj_qkvz.weight", "in_proj_ba.weight")):
        return None
    n, parts = int(np.prod(site.node.shape)), "ba" if "in_proj_ba" in name else "qkvz"

    def rows(whole):
        last = (parts.index(part) - len(parts)) * n     # parts behind it are as wide as it, those before k are q
        first = n if part == "k" else 0 if part == "q" else len(whole) + last
        return whole[first:first + n]

    return of_whole(site, rows)


def other_half_of_head(site: Site):
    """Of each head the other half of q_proj's rows."""
    H, K = site.node.shape
    half = 0 if site.node.tap.endswith("gate") else 1
    return of_whole(site, lambda whole: whole.reshape(H, 2, K, -1)[:, half].reshape(H * K, -1))


def half_of_all(site: Site):
    """The first half of q_proj's rows for the query, the second for the gate."""
    n = int(np.prod(site.node.shape))
    return of_whole(site, lambda whole: whole[n:] if site.node.tap.endswith("gate") else whole[:n])


def of_layer(site: Site, by: int):
    """The weights of the layer before or behind."""
    def moved(name):
        return re.sub(r"layers\.(\d+)\.", lambda m: f"layers.{int(m[1]) + by}.", name)

    weights = {a: w._replace(name=moved(w.name), other=moved(w.other)) for a, w in site.node.weights.items()}
    for a, w in site.node.weights.items():
        first, other = (name.format(0) for name in (w.name, weights[a].name))
        if other == first or other not in site.weights or site.weights[other].shape != site.weights[first].shape:
            return None
    return site.with_weights(**weights) if weights and site.node.op != "route_weights" else None


def rounded(dtype):
    """The result stored in a narrow type, and widened again; what is past its range stays."""
    def narrow(y):
        z = y.astype(np.float32).astype(dtype).astype(np.float64)
        return np.where(np.isfinite(z), z, y)

    return lambda site: _of_floats(site, narrow)


def rounded_inputs(call):
    """What has a row a token is rounded to bfloat16 on the way in; of a single call, every array."""
    floats = {a: call[a].astype(ml_dtypes.bfloat16).astype(np.float64) for a in call.inputs}
    return call.run(**floats) if floats and call.op not in ("add", "route") else None


def without_sigmoids_below(least):
    """Sigmoids of what is below `least` are 0."""
    def change(call):
        y, x = call.run(), call["z" if call.op == "gated_rms_norm" else "gate"]
        x = np.repeat(x, y.shape[-1] // x.shape[-1], axis=-1)
        return np.where(x < least, 0.0, y) if (x < least).any() else None

    return change


def rounded_exponents(call):
    """SwiGLU of which exp(-x) is 2^(x log2 e), the product rounded to float32: off by |x| u of itself."""
    gate, _ = halves(call)
    x = np.minimum(np.abs(gate), 88)
    power = (x.astype(np.float32) * np.float32(np.log2(np.e))).astype(np.float64)
    return call.run() * np.where(gate < 0, (1 + np.exp(x)) / (1 + np.exp2(power)), 1.0)


def flushed(call):
    y = call.run()
    return np.where(np.abs(y) < 2.0**-126, 0.0, y) if ((y != 0) & (np.abs(y) < 2.0**-126)).any() else None


def overflowed(site: Site):
    """float16: past 65504 lies infinity. Its rounding is left to `rounded`."""
    def overflow(y):
        return np.where(np.abs(y) > HALF_MAX, np.copysign(np.inf, y), y) if (np.abs(y) > HALF_MAX).any() else None

    return _of_floats(site, overflow)


def _of_floats(site, change):
    y = site.run()
    return change(y) if y.dtype.kind == "f" else None


NORMS = ("rms_norm", "gated_rms_norm")
GATED, SWIGLU, SITU, SOFTMAX = ("gated_rms_norm",), ("swiglu",), ("situ",), ("softmax",)
K3_CODE = "beta tanh(gate / beta) sigmoid(gate): mlx-lm, mlx_lm/models/kimi_k3.py"
QWEN = "Qwen3-Next's norms have weight 1 + w, but for the gated one; GGUF files have the 1 folded in"

FAULTS = (
    Fault("gated_norm_silu", "the output gate is SiLU, not sigmoid (or the other way round)", GATED, other_gate,
          source="flash-linear-attention: the class default; Gated DeltaNet has SiLU"),
    Fault("gate_before_norm", "the output gate multiplies before the norm", GATED, norm_of_product,
          source="flash-linear-attention: norm_before_gate"),
    Fault("gate_missing", "the output gate is left out", GATED,
          lambda s: reference.rms_norm(s["x"], s["w"], eps=s["eps"]), source="arXiv:2510.26692, section 4"),
    Fault("gate_without_activation", "the output gate is not put through its activation", GATED,
          lambda s: reference.rms_norm(s["x"], s["w"], eps=s["eps"]) * s["z"]),
    Fault("norm_over_all_heads", "one norm for a token, over all heads", GATED, norm_of_all_heads,
          source="arXiv:2510.26692, section 4"),
    Fault("norm_eps_other", "another eps under the root", NORMS, other_eps, choices=((1e-6,), (1e-5,), (1e-12,)),
          each="eps is {:g}",
          source="kv_a_layernorm has 1e-6 in the training code, 1e-5 in llama.cpp, vLLM and SGLang"),
    Fault("norm_weight_plus_one", "the weight is taken as 1 + w", NORMS, changed(w=lambda s: 1 + s["w"]), source=QWEN),
    Fault("norm_weight_less_one", "the weight is taken as w, where 1 + w is meant", ("rms_norm",),
          changed(w=lambda s: s["w"] - 1), source=QWEN),
    Fault("norm_weight_missing", "the weight is left out", NORMS, changed(w=lambda s: np.ones_like(s["w"])),
          source=QWEN),
    Fault("norm_missing", "the norm is left out", ("rms_norm",), lambda s: s["x"],
          source="the latent is cached after its norm: arXiv:2405.04434"),
    Fault("norm_centred", "a LayerNorm: the mean is taken off", NORMS, centred, source="LayerNorm for RMSNorm"),
    Fault("norm_eps_outside", "eps is outside of the root: x / (sqrt(mean) + eps)", NORMS,
          over(lambda mean, eps, D: np.sqrt(mean) + eps), FAINT, use=CALL),
    Fault("norm_eps_on_sum", "eps is on the sum of squares, not on their mean", NORMS,
          over(lambda mean, eps, D: np.sqrt(mean + eps / D)), FAINT, use=CALL),
    Fault("norm_eps_missing", "no eps", NORMS, over(lambda mean, eps, D: np.sqrt(mean)), FAINT, use=CALL),
    Fault("norm_of_sum", "the sum of squares in place of their mean: an L2 norm", NORMS,
          over(lambda mean, eps, D: np.sqrt(mean * D + eps)), use=CALL),
    Fault("norm_overflow", "the sum of squares overflows float32", NORMS, over(overflowing), use=CALL),
    Fault("norm_over_token", "one norm for a token, over all heads", ("rms_norm",), norm_of_row, use=CALL,
          source="norms of q and k, put before the split into heads"),
    Fault("norm_of_weighted", "the weight is on x before the norm", NORMS, norm_of_weighted, use=CALL),
    Fault("residual_missing", "the stream before the block is not added", ("add",), lambda s: s["b"],
          taps=("mid", "out")),
    Fault("block_missing", "the block's output is not added", ("add",), lambda s: s["a"], taps=("mid", "out")),
    Fault("embedding_scaled", "the embedding is scaled by the root of the width", ("embedding",),
          lambda s: s.run() * np.shape(s.args["table"])[1] ** 0.5, source="Gemma does so"),
    Fault("embedding_off_by_one", "the row of the id before, or behind", ("embedding",), moved_ids, use=CALL,
          choices=((1,), (-1,)), each="the row of id {:+d}", source="vocabularies that count from 1"),
    Fault("embedding_of_16_bits", "ids go through 16 bits", ("embedding",), short_ids, use=CALL,
          source="the vocabulary has 163,840 ids"),
    Fault("embedding_transposed", "the table is read as [D, vocab]", ("embedding",), turned("table"), use=CALL),
    Fault("embedding_padding_row", "the row of id 0 is taken for padding, and zero", ("embedding",), no_padding_row,
          use=CALL, source="torch's padding_idx"),
    Fault("linear_transposed", "the matrix is read as [n, m]", ("linear",), turned("w"), use=CALL,
          source="MLX and torch keep [m, n], BLAS by columns and Flax [n, m]"),
    Fault("linear_bias_missing", "the bias is not added", ("linear",), changed(bias=lambda s: None), use=CALL),
    Fault("linear_bias_twice", "the bias is added twice", ("linear",),
          lambda s: s.run(bias=2 * s["bias"]) if s.args.get("bias") is not None else None, use=CALL),
    Fault("linear_bias_subtracted", "the bias is taken off", ("linear",),
          lambda s: s.run(bias=-s["bias"]) if s.args.get("bias") is not None else None, use=CALL),
    Fault("linear_without_tail", "columns past a multiple of the tile are left out", ("linear",), without_tail,
          use=CALL,
          choices=((4,), (8,), (16,), (32,), (64,), (128,)), each="columns past a multiple of {} are left out"),
    Fault("linear_in_tf32", "inputs have 10 bits, as in TF32", ("linear",), to_ten_bits, use=CALL,
          source="torch.backends.cuda.matmul.allow_tf32"),
    Fault("swiglu_sigmoid", "sigmoid(gate) up: GLU, without the factor gate", SWIGLU, activated(reference.sigmoid),
          use=CALL, source="arXiv:2002.05202"),
    Fault("swiglu_gelu", "GELU in place of SiLU", SWIGLU, lambda s, form: activated(GELU[form])(s),
          choices=(("tanh",), ("erf",)), each="GELU in place of SiLU (its form with {})",
          source="arXiv:2002.05202: GEGLU"),
    Fault("swiglu_quick_gelu", "x sigmoid(1.702 x) in place of SiLU", SWIGLU,
          activated(lambda x: x * reference.sigmoid(1.702 * x)), use=CALL, source="ggml_gelu_quick"),
    Fault("swiglu_relu", "ReLU in place of SiLU", SWIGLU, activated(lambda x: np.maximum(x, 0)), use=CALL),
    Fault("swiglu_of_product", "silu(gate up)", SWIGLU, silu_of_product, use=CALL),
    Fault("swiglu_bilinear", "no activation: gate up", SWIGLU, activated(lambda x: x), use=CALL),
    Fault("situ_sigmoid_of_other", "the sigmoid takes something else, not gate", SITU, other_sigmoid,
          choices=tuple((of,) for of in OF_SIGMOID), each="the sigmoid takes {}, not gate", source=K3_CODE),
    Fault("situ_tanh_other", "another form of beta tanh(gate / beta)", SITU, other_tanh,
          choices=tuple((form,) for form in TANH), each="{} of gate in place of beta tanh(gate / beta)",
          source=K3_CODE),
    Fault("situ_up_tanh_other", "another form of linear_beta tanh(up / linear_beta)", SITU, other_tanh_of_up,
          choices=tuple((form,) for form in TANH),
          each="{} of up in place of beta tanh(up / beta), of linear_beta", source=K3_CODE),
    Fault("situ_silu", "gate is not bounded: SiLU(gate)", SITU, of_unbounded_gate),
    Fault("situ_swish", "gate sigmoid(beta gate): Swish with a beta", SITU,
          situ_gated(lambda x, beta: x * reference.sigmoid(beta * x)),
          source="transformers: a docstring of Kimi K3's config; its code has SiTU"),
    Fault("situ_up_unbounded", "up is not bounded", SITU, situ_upped(lambda up, beta: up),
          source="SwiGLU's up is not"),
    Fault("situ_of_swiglu", "SwiGLU, without a bound", SITU, lambda s: reference.swiglu(s["gate"], s["up"]),
          source="Kimi-Linear has SwiGLU"),
    Fault("situ_sigmoid_missing", "the sigmoid is left out", SITU, situ_gated(bounded)),
    Fault("situ_tanh_missing", "tanh is left out: sigmoid(gate) alone", SITU,
          situ_gated(lambda x, beta: reference.sigmoid(x))),
    Fault("situ_halves_swapped", "gate and up are swapped", SITU, lambda s: s.run(gate=s["up"], up=s["gate"]),
          source="fused gate_up tensors differ in their order"),
    Fault("situ_betas_swapped", "beta and linear_beta are swapped", SITU, swapped_betas),
    Fault("situ_up_by_beta", "up is bounded by beta, not by linear_beta", SITU, bounded_by_beta),
    Fault("situ_tanh_overflow", "tanh as (e^2x - 1) / (e^2x + 1): infinity over infinity past 44", SITU,
          overflowing_tanh, use=CALL),
    Fault("softmax_from_zero", "the largest is sought from 0 on, not from -inf: far below it all is 0 / 0", SOFTMAX,
          largest_from_zero, use=CALL),
    Fault("softmax_overflow", "exp(x) without taking off the largest: it overflows float32", SOFTMAX, without_largest,
          use=CALL),
    Fault("softmax_of_two", "2 ** x in place of exp(x)", SOFTMAX, lambda s: s.run(x=s["x"] * np.log(2)), use=CALL,
          source="kernels with exp2 multiply by log2(e) before"),
    Fault("softmax_scaled_twice", "exp(x log2(e)): scaled for exp2, then exp", SOFTMAX,
          lambda s: s.run(x=s["x"] / np.log(2)),
          use=CALL),
    Fault("softmax_log", "the logarithm of it", SOFTMAX, lambda s: np.log(s.run()), use=CALL),
    Fault("softmax_other_axis", "over tokens, not over channels", SOFTMAX, along_tokens, use=CALL),
    Fault("softmax_plus_one", "one more in the sum", SOFTMAX, plus_one_in_sum, use=CALL,
          source="attention sinks; softmax1"),
    Fault("inputs_not_grouped", "q, k, v, z (or b, a) are taken one after another; they lie by key head", ("linear",),
          ungrouped, taps=tuple(f"gdn.{x}" for x in ("q_proj", "k_proj", "v_proj", "z", "b", "a")), use=RUN,
          source="Qwen3-Next's in_proj_qkvz and in_proj_ba; Qwen3.5 has each apart"),
    Fault("query_and_gate_swapped", "of each head the gate is before the query in q_proj", ("linear",),
          other_half_of_head, taps=("attn.q_proj", "attn.gate"), use=RUN, source="arXiv:2505.06708; Qwen3-Next"),
    Fault("query_and_gate_apart", "q_proj is taken as all queries, then all gates; they lie by head", ("linear",),
          half_of_all, taps=("attn.q_proj", "attn.gate"), use=RUN, source="Qwen3-Next"),
    Fault("heads_interleaved", "channels lie as [width, heads], not [heads, width]", ("linear", "short_conv"),
          heads_interleaved, source="llama.cpp permutes heads for rotary models", use=RUN),
    Fault("weights_of_other_layer", "the weights are those of the layer before, or behind", ("*",), of_layer,
          choices=((-1,), (1,)), source="kda_layers and full_attn_layers count from 1", use=RUN),
    Fault("sigmoid_underflow", "1 / (1 + exp(-x)) in float32: a sigmoid of 0 below -88.7", ("gated_rms_norm", "swiglu",
          "situ", "sigmoid_gate"), without_sigmoids_below(-88.72), use=CALL),
    Fault("sigmoid_flushed", "sigmoids below 2^-126 are 0", ("gated_rms_norm", "swiglu", "situ",
          "sigmoid_gate"), without_sigmoids_below(-126 * np.log(2)), use=CALL,
          source="processors that flush subnormals"),
    Fault("exponent_rounded", "exp(x) as 2^(x log2 e), the product rounded to float32: |x| u of a small sigmoid",
          ("swiglu",), rounded_exponents, use=CALL, source="MLX's CPU backend; many exponentials of two steps"),
    Fault("subnormals_flushed", "results below 2^-126 are 0", ("embedding", "linear", "rms_norm", "l2_norm",
          "gated_rms_norm", "attn_res", "mhc_pre", "mhc_post", "sigmoid_gate", "swiglu", "situ", "softmax", "rope",
          "attention", "latent_attention", "decay_gate", "decay_cumsum", "route_weights", "moe", "index_pool",
          "index_scores"), flushed, use=CALL,
          source="processors that flush subnormals"),
    Fault("bfloat16_result", "the result is rounded to bfloat16", ("*",), rounded(ml_dtypes.bfloat16),
          source="autocast; beta by a sigmoid in the model's type"),
    Fault("bfloat16_inputs", "the inputs are rounded to bfloat16", ("*",), rounded_inputs,
          source="TF32 and bfloat16 matrix units; routers in the model's type"),
    Fault("float16_result", "the result is rounded to float16", ("*",), rounded(np.float16),
          source="caches and activations in float16"),
    Fault("float16_overflow", "values past 65504 are infinite, as in float16", ("*",), overflowed, LARGE,
          source="large activations in float16 engines"),
)
