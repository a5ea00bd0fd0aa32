"""Traces of Kimi-Linear and Qwen3-Next in SGLang, from what `engine_hooks.py` recorded there.

    sglang.Engine(model_path=..., disable_cuda_graph=True, forward_hooks=[
        {"target_modules": ["model"], "hook_factory": "engine_hooks:sglang_hook", "config": {"folder": "calls"}}])

Module names from sgl-project/sglang: python/sglang/srt/models/kimi_linear.py, models/deepseek_v2.py (its attention),
models/qwen3_next.py (whose attention has no module of its own: its parts are the layer's), models/qwen2_moe.py, and
srt/model_executor/hook_manager.py. The KDA projections are one product where the model is not quantised, else q,
k, v are. Weights of experts are not kept: the routed scale is in them or is not, by the backend. With logits of some
rows alone, and tensors of the LayerCommunicator, see ``left_out``.
"""

from . import _engine
from ._engine import ATTN_QKV, GDN_BA, GDN_QKVZ, of_slot

__all__ = ["NAMES", "of_slot", "read"]

_QKV = "kda.q_proj | kda.k_proj | kda.v_proj"

#: Array in the file -> tap. A module alone is its result, or the first of its results.
NAMES = {
    "model": {
        "model.embed_tokens": "embed", "model.norm": "norm", "model.norm/out.1": "layers.{last}.out",
        "logits_processor": "logits",
    },
    "layer": {
        "input_layernorm": "attn_norm", "input_layernorm/out.1": "layers.{i-1}.out",
        "post_attention_layernorm": "ffn_norm", "post_attention_layernorm/out.1": "mid",
    },
    "kda": {
        "self_attn.fused_qkvbfg_a_proj": f"{_QKV} | kda.b | kda.f_a | kda.g_a", "self_attn.qkv_proj": _QKV,
        "self_attn.fused_fg_b_proj[0]": "kda.f", "self_attn.fused_fg_b_proj[1]": "kda.z",
        "self_attn.f_a_proj": "kda.f_a", "self_attn.f_b_proj": "kda.f", "self_attn.b_proj": "kda.b",
        "self_attn.g_a_proj": "kda.g_a", "self_attn.g_b_proj": "kda.z", "self_attn.o_norm/in.0": "kda.o",
        "self_attn.o_norm": "kda.o_norm", "self_attn.o_proj": "kda.out",
    },
    "mla": {
        "self_attn.q_proj": "mla.q", "self_attn.kv_a_proj_with_mqa": "mla.latent_raw | mla.k_shared",
        "self_attn.kv_a_layernorm": "mla.latent", "self_attn.o_proj/in.0": "mla.o", "self_attn.o_proj": "mla.out",
    },
    "gdn": {
        "linear_attn.in_proj_qkvz": GDN_QKVZ, "linear_attn.in_proj_ba": GDN_BA, "linear_attn.norm/in.0": "gdn.o",
        "linear_attn.norm": "gdn.o_norm", "linear_attn.out_proj": "gdn.out",
    },
    "attn": {
        "qkv_proj": ATTN_QKV, "q_norm": "attn.q_norm", "k_norm": "attn.k_norm", "attn/in.0": "attn.q",
        "attn/in.1": "attn.k", "attn": "attn.o", "o_proj/in.0": "attn.gated", "o_proj": "attn.out",
    },
    "dense": {
        "mlp.gate_up_proj": "mlp.gate | mlp.up", "mlp.act_fn": "mlp.act", "mlp.down_proj": "mlp.out", "mlp": "mlp.out",
    },
    "moe": {
        "block_sparse_moe.gate": "moe.logits", "block_sparse_moe.topk/out.topk_ids": "moe.ids",
        "block_sparse_moe.shared_experts.gate_up_proj": "moe.shared_gate | moe.shared_up",
        "block_sparse_moe.shared_experts.act_fn": "moe.shared_act", "block_sparse_moe.shared_experts": "moe.shared",
        "block_sparse_moe": "moe.out",
        "mlp.gate": "moe.logits", "mlp.topk/out.topk_ids": "moe.ids",
        "mlp.shared_expert.gate_up_proj": "moe.shared_gate | moe.shared_up",
        "mlp.shared_expert.act_fn": "moe.shared_act", "mlp.shared_expert": "moe.shared",
        "mlp.shared_expert_gate": "moe.shared_g", "mlp": "moe.out",
    },
}

#: Where theirs does not lie as ours.
AXES = dict.fromkeys(("gdn.o", "gdn.o_norm", "attn.q_norm", "attn.k_norm"), "(TH)K")


def read(folder, *, model):
    """The traces of the calls in a folder, in order; as `kimi_linear.adapters.vllm.read`.

    Parameters
    ----------
    folder : str or path
    model : Model or Config

    Returns
    -------
    list of Trace

    Raises
    ------
    FileNotFoundError, ValueError, FormatError
        If there is no call, a file is damaged, of several ranks, or of another model.
    """
    return _engine.read(folder, NAMES, AXES, model, "sglang")
