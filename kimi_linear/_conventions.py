"""The data of `kimi_linear.conventions` for all ops but the delta rule.

An entry has `source`; `names`, ours = theirs; `forms`, words of the op's module in `kimi_linear.testing`; `fixed`,
values of arguments that cannot be passed; `always`, what is passed besides; `returned`, how many results there are
where not all.
"""

__all__ = ["OTHERS", "OURS"]

#: Arguments of the ops themselves, and of gradients as `kimi_linear.reference` has them.
OURS = {
    "embedding": "ids table", "rms_norm": "x w eps", "layer_norm": "x w b eps",
    "gated_rms_norm": "x z w eps activation", "l2_norm": "x eps",
    "linear": "x w bias", "short_conv": "x w history offsets activation",
    "decay_gate": "f rate dt_bias lower_bound", "decay_cumsum": "g chunk offsets",
    "latent_attention": "q latent k_shared w_uk w_uv scale offsets kv_offsets select", "swiglu": "gate up limit",
    "index_pool": "k gate ape offsets", "index_scores": "q keys weights scale pool offsets positions",
    "index_select": "q keys weights topk pool offsets positions",
    "situ": "gate up beta linear_beta", "softmax": "x",
    "rope": "x positions base rotary", "attention": "q k v scale offsets kv_offsets", "sigmoid_gate": "x gate",
    "route": "scores k bias groups top_groups function renormalise scale",
    "moe": "x ids weights w_gate w_up w_down shared shared_gate situ limit", "attn_res": "snapshots x w eps",
    "mhc_pre": "x fn base scale norm_eps eps iters", "mhc_post": "y x post comb",
    "rms_norm_backward": "dy x w eps", "short_conv_backward": "dy x w history offsets activation dfinal",
    "l2_norm_backward": "dy x eps", "decay_gate_backward": "dg f rate dt_bias lower_bound",
    "gated_rms_norm_backward": "dy x z w eps activation", "swiglu_backward": "dy gate up",
}

FLA, HF, VLLM = "fla-org/flash-linear-attention: ", "huggingface/transformers: src/transformers/", "vllm-project/vllm: "
TORCH, GGML, MLX, MLX_LM = "pytorch/pytorch: ", "ggml-org/llama.cpp: ", "ml-explore/mlx: ", "ml-explore/mlx-lm: "
ROUTER = "k=top_k bias=e_score_correction_bias groups=n_group top_groups=topk_group renormalise=norm_topk_prob " \
         "scale=routed_scaling_factor"

_FLA = {
    "rms_norm": dict(source=FLA + "fla/modules/layernorm.py (rms_norm)", names="x=x w=weight eps=eps",
                     always={"bias": None}),
    "gated_rms_norm": dict(source=FLA + "fla/modules/fused_norm_gate.py (rms_norm_gated)",
                           names="x=x z=g w=weight eps=eps activation=activation", forms=("swish",),
                           always={"bias": None}, notes=("the default activation is swish; Kimi has sigmoid",)),
    "l2_norm": dict(source=FLA + "fla/modules/l2norm.py (l2norm)", names="x=x eps=eps"),
    "short_conv": dict(source=FLA + "fla/modules/convolution.py (causal_conv1d)",
                       names="x=x w=weight history=initial_state offsets=cu_seqlens activation=activation",
                       forms=("x [1, T, C]", "history [N, C, W]"), always={"output_final_state": True},
                       notes=("the state has W columns, the newest last; the first is not read",)),
    "decay_gate": dict(source=FLA + "fla/ops/kda/gate.py (fused_kda_gate, naive_kda_gate)",
                       names="f=g rate=A_log dt_bias=dt_bias lower_bound=lower_bound",
                       forms=("f [1, T, H, K]", "rate as A_log", "dt_bias [H K]")),
    "decay_cumsum": dict(source=FLA + "fla/ops/utils/cumsum.py (chunk_local_cumsum)",
                         names="g=g chunk=chunk_size offsets=cu_seqlens", forms=("g [1, T, H, K]",),
                         notes=("scale=log2(e), where it is passed, makes sums in log2: forms with 'c in log2'",)),
    "layer_norm": dict(source=FLA + "fla/modules/layernorm.py (layer_norm)", names="x=x w=weight b=bias eps=eps"),
    "swiglu": dict(source=FLA + "fla/modules/activations.py (swiglu)", names="gate=x up=y"),
}
_HF = {
    "embedding": dict(source=TORCH + "torch/nn/functional.py (embedding)", names="ids=input table=weight"),
    "rms_norm": dict(source=TORCH + "torch/nn/functional.py (rms_norm)", names="x=input w=weight eps=eps",
                     forms=("normalized_shape",)),
    "layer_norm": dict(source=TORCH + "torch/nn/functional.py (layer_norm)", names="x=input w=weight b=bias eps=eps",
                       forms=("normalized_shape",)),
    "linear": dict(source=TORCH + "torch/nn/functional.py (linear)", names="x=input w=weight bias=bias"),
    "short_conv": dict(source="Dao-AILab/causal-conv1d: causal_conv1d/causal_conv1d_interface.py (causal_conv1d_fn)",
                       names="x=x w=weight history=initial_states activation=activation",
                       forms=("x [1, C, T]", "history [N, C, W-1]"), always={"return_final_states": True},
                       notes=("transformers calls it where it is installed",)),
    "latent_attention": dict(source=HF + "models/deepseek_v3/modeling_deepseek_v3.py (DeepseekV3Attention)",
                             names="q=query latent=latent k_shared=k_pe w_uk=kv_b_proj scale=scaling",
                             forms=("w_uk and w_uv in one, [H (nope + V), R]", "q [1, H, T, n]", "cache [1, S, n]"),
                             notes=("no one function there: kv_b_proj, the concatenation and the attention of it",)),
    "attention": dict(source=TORCH + "torch/nn/functional.py (scaled_dot_product_attention)",
                      names="q=query k=key v=value scale=scale", forms=("[1, H, T, n]",),
                      always={"is_causal": True, "enable_gqa": True},
                      notes=("is_causal aligns at the first position: behind a cache it needs a mask instead",)),
    "swiglu": dict(source=HF + "models/glm5_next/modeling_glm5_next.py (Glm5NextTextExperts._apply_gate)",
                   names="gate=gate_up limit=swiglu_limit", forms=("gate and up in one, [gate | up]",),
                   notes=("a method: the limit is its module's",)),
    "situ": dict(source="moonshotai/Kimi-K3: modeling_kimi_linear.py (SituAndMul)",
                 names="gate=x beta=beta linear_beta=linear_beta", forms=("gate and up in one, [gate | up]",),
                 notes=("a module: it is made with the betas, and called with x; float32 inside",)),
    "softmax": dict(source=TORCH + "torch/nn/functional.py (softmax)", names="x=input", always={"dim": -1}),
    "route": dict(source=HF + "models/deepseek_v3/modeling_deepseek_v3.py (DeepseekV3MoE.route_tokens_to_experts)",
                  names=f"scores=router_logits {ROUTER}", fixed={"function": "sigmoid"}, forms=("ids in any order",)),
    "moe": dict(source=HF + "models/deepseek_v3/modeling_deepseek_v3.py (DeepseekV3NaiveMoe)",
                names="x=hidden_states ids=top_k_index weights=top_k_weights w_gate=gate_up_proj w_down=down_proj "
                      "limit=swiglu_limit",
                forms=("w_gate and w_up in one, [E, 2 F, D]", "ids int64"),
                notes=("the limit is that of Glm5NextTextExperts (models/glm5_next), a module made with it",)),
    "mhc_pre": dict(source=HF + "models/glm5_next/modeling_glm5_next.py (Glm5NextTextHyperConnection)",
                    names="x=hidden_streams fn=fn base=base scale=scale norm_eps=rms_norm_eps eps=hc_eps "
                          "iters=hc_sinkhorn_iters",
                    forms=("post, comb, y", "x [1, T, n, D]"),
                    notes=("a module: made with a config and the three weights, called with hidden_streams",)),
    "mhc_post": dict(source=HF + "models/glm5_next/modeling_glm5_next.py (Glm5NextTextDecoderLayer)",
                     names="y=hidden_states x=residual post=post comb=comb", forms=("[1, T, ...]",),
                     notes=("no one function there: lines of the layer's forward",)),
}
_HF_GDN = {
    "rms_norm": dict(source=HF + "models/qwen3_next/modeling_qwen3_next.py (Qwen3NextRMSNorm)",
                     names="x=x w=weight eps=eps", forms=("w less 1",), notes=("the weight is 1 + w",)),
    "gated_rms_norm": dict(source=HF + "models/qwen3_next/modeling_qwen3_next.py (Qwen3NextRMSNormGated)",
                           names="x=hidden_states z=gate w=weight eps=eps", fixed={"activation": "silu"}),
}
_VLLM = {
    "rms_norm": dict(source=VLLM + "vllm/_custom_ops.py (rms_norm)", names="x=input w=weight eps=epsilon"),
    "swiglu": dict(source=VLLM + "vllm/model_executor/layers/activation.py (SiluAndMul)", names="gate=x",
                   forms=("gate and up in one, [gate | up]",)),
    "situ": dict(source=VLLM + "vllm/model_executor/layers/activation.py (SituAndMul)",
                 names="gate=x beta=beta linear_beta=linear_beta", forms=("gate and up in one, [gate | up]",),
                 notes=("as SiluAndMul, made with the betas",)),
    "route": dict(source=VLLM + "vllm/model_executor/layers/fused_moe/router/grouped_topk_router.py (grouped_topk)",
                  names="scores=gating_output k=topk bias=e_score_correction_bias groups=num_expert_group "
                        "top_groups=topk_group function=scoring_func renormalise=renormalize "
                        "scale=routed_scaling_factor",
                  forms=("hidden_states", "ids in any order", "weights before ids")),
    "moe": dict(source=VLLM + "vllm/model_executor/layers/fused_moe/fused_moe.py (fused_experts)",
                names="x=hidden_states ids=topk_ids weights=topk_weights w_gate=w1 w_down=w2",
                forms=("w_gate and w_up in one, [E, 2 F, D]",)),
    "mhc_pre": dict(source=VLLM + "vllm/model_executor/kernels/mhc/tilelang.py (mhc_pre_tilelang)",
                    names="x=residual fn=fn scale=hc_scale base=hc_base norm_eps=rms_eps eps=hc_pre_eps "
                          "iters=sinkhorn_repeat", always={"hc_post_mult_value": 2.0},
                    forms=("post [T, n, 1]", "post, comb, y", "hc_sinkhorn_eps")),
    "mhc_post": dict(source=VLLM + "vllm/model_executor/kernels/mhc/tilelang.py (mhc_post_tilelang)",
                     names="y=x x=residual post=post_layer_mix comb=comb_res_mix", forms=("post [T, n, 1]",)),
}
_GGML = {
    "embedding": dict(source=GGML + "ggml/include/ggml.h (ggml_get_rows)", names="ids=b table=a"),
    "linear": dict(source=GGML + "ggml/include/ggml.h (ggml_mul_mat)", names="x=b w=a"),
    "rms_norm": dict(source=GGML + "src/llama-graph.cpp (llm_graph_context::build_norm)", names="x=cur w=mw eps=eps",
                     notes=("ggml_rms_norm, then a product with the weight",)),
    "layer_norm": dict(source=GGML + "src/llama-graph.cpp (llm_graph_context::build_norm)",
                       names="x=cur w=mw b=mb eps=eps", notes=("ggml_norm, then a product and a sum",)),
    "short_conv": dict(source=GGML + "ggml/include/ggml.h (ggml_ssm_conv)", names="x=sx w=c",
                       fixed={"activation": None}, forms=("history in x, [1, C, W-1+T]",), returned=1,
                       notes=("ne of sx is [W-1+T, C, N]; SiLU and the histories are the caller's",)),
    "decay_gate": dict(source=GGML + "src/models/kimi-linear.cpp", names="f=g1 rate=ssm_a dt_bias=ssm_dt_b",
                       forms=("rate as -exp(A_log)", "f [T, H K]", "dt_bias [H K]"),
                       notes=("the converter stores -exp(A_log)",)),
    "rope": dict(source=GGML + "ggml/include/ggml.h (ggml_rope_ext)",
                 names="x=a positions=b base=freq_base rotary=n_dims", forms=("x [1, T, H, K]", "positions int32"),
                 notes=("mode is GGML_ROPE_TYPE_NEOX",)),
    "latent_attention": dict(source=GGML + "src/models/kimi-linear.cpp", forms=("w_uk [H, R, nope]",),
                             names="q=q latent=kv_cmpr k_shared=k_pe w_uk=wk_b w_uv=wv_b scale=kq_scale",
                             notes=("the absorbed form; ne of wk_b is [nope, R, H]",)),
    "swiglu": dict(source=GGML + "ggml/include/ggml.h (ggml_swiglu_split)", names="gate=a up=b"),
    "softmax": dict(source=GGML + "ggml/include/ggml.h (ggml_soft_max)", names="x=a"),
}
_MLX = {
    "rms_norm": dict(source=MLX + "python/src/fast.cpp (rms_norm)", names="x=x w=weight eps=eps"),
    "layer_norm": dict(source=MLX + "python/src/fast.cpp (layer_norm)", names="x=x w=weight b=bias eps=eps"),
    "short_conv": dict(source=MLX + "python/mlx/nn/layers/convolution.py (Conv1d)", names="x=x w=weight",
                       fixed={"activation": None}, forms=("history in x, [1, W-1+T, C]", "w [C, W, 1]"), returned=1,
                       notes=("with groups=C; the history is put in front by the caller",)),
    "attention": dict(source=MLX + "python/src/fast.cpp (scaled_dot_product_attention)",
                      names="q=q k=k v=v scale=scale", forms=("[1, H, T, n]",), always={"mask": "causal"}),
    "swiglu": dict(source=MLX_LM + "mlx_lm/models/activations.py (swiglu)", names="gate=gate up=x"),
    "situ": dict(source=MLX_LM + "mlx_lm/models/kimi_k3.py (_situ)",
                 names="gate=gate up=x beta=beta linear_beta=linear_beta", always={"linear_beta": None}),
    "softmax": dict(source=MLX + "python/mlx/nn/layers/activations.py (softmax)", names="x=x", always={"axis": -1},
                    notes=("mx.softmax itself takes its array by position alone",)),
    "attn_res": dict(source=MLX_LM + "mlx_lm/models/kimi_k3.py (_attn_res_combine)",
                     names="snapshots=raw x=partial_sum w=w_eff eps=eps", forms=("inv_rms of the snapshots",),
                     notes=("inv_rms [n, ...] is kept beside the snapshots, 1 / sqrt(mean + eps) of each",)),
}

#: project -> op -> entry.
OTHERS = {"fla": _FLA, "hf": _HF, "hf-gdn": _HF_GDN, "vllm": _VLLM, "ggml": _GGML, "mlx": _MLX}
ARRAYS = {"fla": "torch", "hf": "torch", "hf-gdn": "torch", "vllm": "torch", "mlx": "mlx"}
