"""Faults of norms, residuals and embedding, and those that any op can have."""

from __future__ import annotations

import re
from dataclasses import replace

import ml_dtypes
import numpy as np

from .. import reference
from ._fault import LARGE, Fault, changed
from .site import Site

HALF_MAX = 65504.0


def other_eps(site: Site, eps: float):
    return site.run(eps=eps) if eps != site["eps"] else None


def plus_one(site: Site):
    return site.run(w=1 + site["w"])


def norm_of_product(site: Site):
    """rms_norm(x gate(z)): the gate before the norm."""
    return reference.rms_norm(site["x"] * reference.sigmoid(site["z"]), site["w"], eps=site["eps"])


def norm_of_all_heads(site: Site):
    """One norm for a token, over all heads, not one for a head."""
    x, shape = site["x"], site["x"].shape
    flat, w = x.reshape(len(x), -1), np.tile(site["w"], shape[1])
    return reference.rms_norm(flat, w, eps=site["eps"]).reshape(shape) * reference.sigmoid(site["z"])


def centred(site: Site):
    x = site["x"]
    return site.run(x=x - x.mean(-1, keepdims=True))


def heads_interleaved(site: Site):
    """Channels lie as [width, heads], not [heads, width]."""
    shape = site.node.shape
    if len(shape) != 2 or 1 in shape:
        return None
    y = site.run().reshape(-1, *shape[::-1])
    return y.swapaxes(1, 2)


def of_layer(site: Site, by: int):
    """The weights of the layer before or behind."""
    names = {a: re.sub(r"layers\.(\d+)\.", lambda m: f"layers.{int(m[1]) + by}.", w.name)
             for a, w in site.node.weights.items()}
    for a, w in site.node.weights.items():
        first, other = (name.format(0) for name in (w.name, names[a]))
        if other == first or other not in site.weights or site.weights[other].shape != site.weights[first].shape:
            return None
    if not names or site.node.op == "route_weights":
        return None
    weights = {a: w._replace(name=names[a]) for a, w in site.node.weights.items()}
    return Site.of(replace(site.node, weights=weights), site.values, site.weights, site.scene).run()


def rounded(dtype):
    """The result stored in a narrow type, and widened again; what is past its range stays."""
    def narrow(y):
        z = y.astype(np.float32).astype(dtype).astype(np.float64)
        return np.where(np.isfinite(z), z, y)

    return lambda site: _of_floats(site, narrow)


def rounded_inputs(site: Site):
    """What has a row a token is rounded to bfloat16 on the way in."""
    floats = {a: site[a].astype(ml_dtypes.bfloat16).astype(np.float64) for a in site.node.inputs
              if np.asarray(site.args[a]).dtype.kind not in "iu"}
    return site.run(**floats) if floats and site.node.op not in ("add", "route") else None


def overflowed(site: Site):
    """float16: past 65504 lies infinity. Its rounding is left to `rounded`."""
    def overflow(y):
        return np.where(np.abs(y) > HALF_MAX, np.copysign(np.inf, y), y) if (np.abs(y) > HALF_MAX).any() else None

    return _of_floats(site, overflow)


def _of_floats(site, change):
    y = site.run()
    return change(y) if y.dtype.kind == "f" else None


NORMS = ("rms_norm", "gated_rms_norm")
GATED = ("gated_rms_norm",)
QWEN = "Qwen3-Next's norms have weight 1 + w"

FAULTS = (
    Fault("gated_norm_silu", "the output gate is SiLU, not sigmoid", GATED, changed(activation=lambda s: "silu"),
          source="flash-linear-attention: the class default; Gated DeltaNet has SiLU"),
    Fault("gate_before_norm", "the output gate multiplies before the norm", GATED, norm_of_product,
          source="flash-linear-attention: norm_before_gate"),
    Fault("gate_missing", "the output gate is left out", GATED, changed(z=lambda s: np.full_like(s["z"], np.inf)),
          source="arXiv:2510.26692, section 4"),
    Fault("norm_over_all_heads", "one norm for a token, over all heads", GATED, norm_of_all_heads,
          source="arXiv:2510.26692, section 4"),
    Fault("norm_eps_other", "another eps under the root", NORMS, other_eps, choices=((1e-6,), (1e-5,), (1e-12,)),
          source="kv_a_layernorm has 1e-6 in the training code, 1e-5 in llama.cpp, vLLM and SGLang"),
    Fault("norm_weight_plus_one", "the weight is taken as 1 + w", NORMS, plus_one, source=QWEN),
    Fault("norm_weight_missing", "the weight is left out", NORMS, changed(w=lambda s: np.ones_like(s["w"])),
          source=QWEN),
    Fault("norm_missing", "the norm is left out", ("rms_norm",), lambda s: s["x"],
          source="the latent is cached after its norm: arXiv:2405.04434"),
    Fault("norm_centred", "a LayerNorm: the mean is taken off", NORMS, centred, source="LayerNorm for RMSNorm"),
    Fault("residual_missing", "the stream before the block is not added", ("add",), lambda s: s["b"]),
    Fault("block_missing", "the block's output is not added", ("add",), lambda s: s["a"]),
    Fault("embedding_scaled", "the embedding is scaled by the root of the width", ("embedding",),
          lambda s: s.run() * s.node.shape[0] ** 0.5, source="Gemma does so"),
    Fault("heads_interleaved", "channels lie as [width, heads], not [heads, width]", ("linear", "short_conv"),
          heads_interleaved, source="llama.cpp permutes heads for rotary models"),
    Fault("weights_of_other_layer", "the weights are those of the layer before, or behind", ("*",), of_layer,
          choices=((-1,), (1,)), source="kda_layers and full_attn_layers count from 1"),
    Fault("bfloat16_result", "the result is rounded to bfloat16, here alone", ("*",), rounded(ml_dtypes.bfloat16),
          source="autocast; beta by a sigmoid in the model's type"),
    Fault("bfloat16_inputs", "the inputs are rounded to bfloat16, here alone", ("*",), rounded_inputs,
          source="TF32 and bfloat16 matrix units; routers in the model's type"),
    Fault("float16_result", "the result is rounded to float16, here alone", ("*",), rounded(np.float16),
          source="caches and activations in float16"),
    Fault("float16_overflow", "values past 65504 are infinite, as in float16", ("*",), overflowed, LARGE,
          source="large activations in float16 engines"),
)
