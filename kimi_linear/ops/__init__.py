"""Every op of the model as a function on arrays: float32 in, float32 out, on the CPU.

The same names with the same arguments stand in :mod:`kimi_linear.reference` in float64.
"""

from ._attention import attention, rope
from ._basic import (
    add,
    attn_res,
    gated_rms_norm,
    l2_norm,
    layer_norm,
    rms_norm,
    sigmoid,
    sigmoid_gate,
    situ,
    softmax,
    swiglu,
)
from ._delta import decay_cumsum, delta_rule, delta_rule_inter, delta_rule_intra
from ._dense import embedding, linear, moe, route
from ._index import index_pool, index_scores, index_select
from ._kda import decay_gate, short_conv
from ._mhc import mhc_collapse, mhc_expand, mhc_post, mhc_pre
from ._mla import latent_attention
from ._quant import dequantize, quantize
from ._sample import sample

__all__ = [
    "add", "attention", "attn_res", "decay_cumsum", "decay_gate", "delta_rule", "delta_rule_inter", "delta_rule_intra",
    "dequantize", "embedding", "gated_rms_norm", "index_pool", "index_scores", "index_select", "l2_norm",
    "latent_attention", "layer_norm", "linear", "mhc_collapse", "mhc_expand", "mhc_post", "mhc_pre", "moe", "quantize",
    "rms_norm", "rope", "route", "sample", "short_conv", "sigmoid", "sigmoid_gate", "situ", "softmax", "swiglu",
]
