"""Traces of Kimi-Linear, Qwen3-Next and Qwen3.5 in vLLM, from what `engine_hooks.py` recorded there.

    from vllm import LLM
    llm = LLM(model, enforce_eager=True)
    llm.apply_model(lambda m: __import__("engine_hooks").attach(m, "calls") and None)
    llm.generate(...)
    calls = vllm.read("calls", model=kl.Model.from_pretrained(...))
    kl.diff.blame(model, vllm.of_slot(calls))

Module names from vllm-project/vllm: vllm/model_executor/models/kimi_linear.py, qwen3_next.py, qwen2_moe.py,
vllm/model_executor/layers/kda.py, mla.py, mamba/gdn/qwen_gdn_linear_attn.py. Of a vision-language model attach its
language_model. Their linear layers give (result, bias). Their norms take the residual stream along: what is added up
by then is the second result. q, k and g behind the convolutions are in no module: `engine_hooks.record_function`
records chunk_kda. Gated attention norms and turns q and k in one kernel on CUDA: what that gives is what `attn` is
given. The shared expert's module ends with its gate.
"""

from ..conventions import conventions
from . import _engine
from ._engine import ATTN_QKV, GDN_BA, GDN_QKVZ, of_slot

__all__ = ["NAMES", "of_slot", "read"]

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
        "self_attn.q_proj": "kda.q_proj", "self_attn.k_proj": "kda.k_proj", "self_attn.v_proj": "kda.v_proj",
        "self_attn.f_a_proj": "kda.f_a", "self_attn.f_b_proj": "kda.f", "self_attn.b_proj": "kda.b",
        "self_attn.g_a_proj": "kda.g_a", "self_attn.g_b_proj": "kda.z", "self_attn.o_norm/in.0": "kda.o",
        "self_attn.o_norm": "kda.o_norm", "self_attn.o_proj": "kda.out",
        "self_attn/state.before": "before.kda.state", "self_attn/state.after": "kda.state",
    },
    "mla": {
        "self_attn.q_proj": "mla.q", "self_attn.kv_a_proj_with_mqa": "mla.latent_raw | mla.k_shared",
        "self_attn.kv_a_layernorm": "mla.latent", "self_attn.o_proj/in.0": "mla.o", "self_attn.o_proj": "mla.out",
    },
    "gdn": {
        "linear_attn.in_proj_qkvz": GDN_QKVZ, "linear_attn.in_proj_ba": GDN_BA, "linear_attn.norm/in.0": "gdn.o",
        "linear_attn.norm": "gdn.o_norm", "linear_attn.out_proj": "gdn.out",
        "linear_attn/state.before": "before.gdn.state", "linear_attn/state.after": "gdn.state",
    },
    "attn": {
        "self_attn.qkv_proj": ATTN_QKV, "self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm",
        "self_attn.attn/in.0": "attn.q", "self_attn.attn/in.1": "attn.k", "self_attn.attn": "attn.o",
        "self_attn.o_proj/in.0": "attn.gated", "self_attn.o_proj": "attn.out",
    },
    "dense": {
        "mlp.gate_up_proj": "mlp.gate | mlp.up", "mlp.act_fn": "mlp.act", "mlp.down_proj": "mlp.out", "mlp": "mlp.out",
    },
    "moe": {
        "block_sparse_moe.gate": "moe.logits", "block_sparse_moe.shared_experts.gate_up_proj":
            "moe.shared_gate | moe.shared_up",
        "block_sparse_moe.shared_experts.act_fn": "moe.shared_act", "block_sparse_moe.shared_experts": "moe.shared",
        "block_sparse_moe": "moe.out",
        "mlp.gate": "moe.logits", "mlp.shared_expert.gate_up_proj": "moe.shared_gate | moe.shared_up",
        "mlp.shared_expert.act_fn": "moe.shared_act", "mlp.shared_expert.down_proj": "moe.shared",
        "mlp.shared_expert_gate": "moe.shared_g", "mlp.shared_expert": "moe.shared_gated", "mlp": "moe.out",
    },
}

#: Where theirs does not lie as ours, by the convention of the delta rule there.
AXES = {
    **dict.fromkeys(("kda.state", "gdn.state"), "NH" + conventions["vllm"]["delta_rule"].state),
    "gdn.o": "(TH)V", "gdn.o_norm": "(TH)V",
}


def read(folder, *, model, state=None):
    """The traces of the calls in a folder, in order.

    Parameters
    ----------
    folder : str or path
    model : Model or Config
    state : {"VK", "KV"}, optional
        How a recurrent state lies; by default as `kimi_linear.conventions` says of vLLM.

    Returns
    -------
    list of Trace
        Rows of the batch's sequences one after another; the metadata have ``offsets``, ``position``, ``slots``,
        ``kind`` ("prefill", "decode", "mixed"), ``layout``, and ``left_out`` (logits that were made of some rows
        alone).

    Raises
    ------
    FileNotFoundError, ValueError, FormatError
        If there is no call, a file is damaged, of several ranks, or of another model.
    """
    axes = AXES if state is None else AXES | dict.fromkeys(("kda.state", "gdn.state"), "NH" + state)
    return _engine.read(folder, NAMES, axes, model, "vllm")
