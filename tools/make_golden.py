"""Small random checkpoints and what an independent implementation computes for them.

For each case this writes a folder in the Hugging Face layout (config.json, model.safetensors) and
`golden.safetensors`: the tokens of two prompts and, for each prompt, what `transformers` (float32, CPU, its
plain PyTorch path) gives at every module, the logits, and the caches at the end. Needs `transformers==5.23.0
torch==2.13.0 safetensors`; nothing of this project. Run: `python make_golden.py OUT_DIR [case ...]`.

Array names: `<prompt>/<module path>` is that module's output without the batch axis ([T, ...]);
`<prompt>/tokens` int64; `<prompt>/logits` [T, vocab]; `<prompt>/cache/<layer>/{conv, state}` for a
linear-attention layer: the last W inputs of the convolution ([channels, W], q|k|v, newest last) and the state
[H, K, V]; `<prompt>/cache/<layer>/{keys, values}` for an attention layer: [heads, T, K], or the normed latent and
the shared part. Router modules give `ids` and `weights` ([T, k], in the order of the implementation: compare as
sets).
The table that maps these names to taps is kimi_linear/golden.py.
"""

import os
import sys

import torch
from safetensors.torch import save_file
from transformers import KimiLinearConfig, KimiLinearForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5_moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

PROMPTS = {"long": 70, "short": 21}          # 70 crosses a chunk of 64


def kimi(kda, full, dense, heads, width, conv, mla, moe, hidden=64, eps=1e-5, q_lora=None):
    """A config: layer lists, dense layers, KDA heads, their width and taps, and the tuples unpacked here."""
    n_heads, nope, rope, v, rank = mla
    experts, top, groups, top_groups, shared, width_e, scale, renorm = moe
    layers = len(kda) + len(full)
    return KimiLinearConfig(
        vocab_size=320, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=96,
        moe_intermediate_size=width_e, num_attention_heads=n_heads, num_key_value_heads=n_heads,
        kv_lora_rank=rank, q_lora_rank=q_lora, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=v,
        num_local_experts=experts, num_experts_per_tok=top, n_group=groups, topk_group=top_groups,
        n_shared_experts=shared,
        routed_scaling_factor=scale, norm_topk_prob=renorm, rms_norm_eps=eps,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
        linear_attn_config=dict(head_dim=width, num_heads=heads, short_conv_kernel_size=conv, kda_layers=kda,
                                full_attn_layers=full),
        mlp_layer_types=["dense"] * dense + ["sparse"] * (layers - dense))


def qwen(kind, k_heads, v_heads, k, v, theta, attn, moe=None, rope=None, **more):
    """A config, by default of five layers, the fourth of them attention: key and value heads, their widths, and the
    tuples unpacked here."""
    n, n_kv, d, rotary = attn
    if moe:
        experts, top, width_e, shared = moe
        more = dict(num_experts=experts, num_experts_per_tok=top, moe_intermediate_size=width_e,
                    shared_expert_intermediate_size=shared) | more
    rope = dict(rope_type="default", rope_theta=theta, partial_rotary_factor=rotary) | (rope or {})
    return kind(**dict(
        vocab_size=320, hidden_size=64, num_hidden_layers=5, num_attention_heads=n, num_key_value_heads=n_kv,
        head_dim=d, rope_parameters=rope, linear_conv_kernel_dim=4, linear_key_head_dim=k, linear_value_head_dim=v,
        linear_num_key_heads=k_heads, linear_num_value_heads=v_heads, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ) | more)


MROPE = dict(mrope_section=[2, 1, 1], mrope_interleaved=True)
MODELS = {
    "kimi_linear": KimiLinearForCausalLM, "qwen3_next": Qwen3NextForCausalLM, "qwen3_5_text": Qwen3_5ForCausalLM,
    "qwen3_5_moe_text": Qwen3_5MoeForCausalLM,
}
CASES = {
    # the published model in small: layer 0 dense, the last layer breaks the period
    "kimi-a": lambda: (kimi([1, 2, 3, 5], [4, 6], 1, 2, 16, 4, (4, 16, 8, 16, 32),
                            (8, 2, 1, 1, 1, 32, 2.446, True)), torch.float32),
    # what the config allows besides: attention first, convolution of 3, low-rank q, expert groups,
    # two shared experts, no renormalisation, bfloat16 file
    "kimi-b": lambda: (kimi([2, 3, 5], [1, 4], 2, 3, 8, 3, (2, 8, 8, 12, 24),
                            (12, 3, 3, 2, 2, 24, 1.3, False), hidden=48, eps=1e-6, q_lora=20),
                       torch.bfloat16),
    # one gate a head: two value heads a key head, values wider than keys
    "qwen-a": lambda: (qwen(Qwen3NextConfig, 2, 4, 16, 24, 1e4, (4, 2, 32, 0.25), (8, 2, 32, 48), intermediate_size=96,
                            norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], full_attention_interval=4,
                            partial_rotary_factor=0.25),
                       torch.float32),
    # dense: separate projections, three value heads a key head, tied embeddings, bfloat16 file
    "qwen35-a": lambda: (qwen(Qwen3_5TextConfig, 2, 6, 16, 16, 1e6, (4, 2, 32, 0.25), rope=MROPE, intermediate_size=96,
                              tie_word_embeddings=True),
                         torch.bfloat16),
    # a mixture, always renormalised
    "qwen35-moe": lambda: (qwen(Qwen3_5MoeTextConfig, 2, 4, 16, 16, 1e6, (4, 2, 32, 0.25), (8, 2, 32, 48), rope=MROPE,
                                tie_word_embeddings=False),
                           torch.float32),
}


@torch.no_grad()
def randomise(model, gen):
    """Weights of a size at which every part matters; gates from almost none to strong."""
    for name, p in list(model.named_parameters()) + list(model.named_buffers()):
        if not p.is_floating_point() or "inv_freq" in name:
            continue
        r = torch.randn(p.shape, generator=gen)
        if name.endswith("A_log"):
            p.copy_(torch.log(1 + 15 * torch.rand(p.shape, generator=gen)))
        elif name.endswith("dt_bias"):
            p.copy_(-4 + 3 * torch.rand(p.shape, generator=gen))
        elif "norm" in name:
            p.copy_((0.0 if p.mean().abs() < 0.5 else 1.0) + 0.2 * r)
        elif "conv" in name:
            p.copy_(0.5 * r)
        elif "correction_bias" in name:
            p.copy_(0.1 * r)
        elif "embed" in name:
            p.copy_(r)
        else:
            p.copy_(1.2 * r / p.shape[-1] ** 0.5)


def keep(out, path, n_tokens):
    """A hook that stores a module's output under its path."""
    def hook(module, args, result):
        if path.endswith("mlp.gate"):                     # routers return (logits, weights, ids)
            tensors = [t for t in result if torch.is_tensor(t)]
            ids = next(t for t in tensors if not t.is_floating_point()).reshape(n_tokens, -1)
            out[path + "/ids"] = ids
            out[path + "/weights"] = next(t for t in tensors if t.is_floating_point()
                                          and t.shape[-1] == ids.shape[-1]).reshape(n_tokens, -1)
            return
        t = result[0] if isinstance(result, tuple) else result
        if torch.is_tensor(t) and t.is_floating_point():
            out[path] = t.reshape(n_tokens, -1) if t.shape[0] != 1 else t[0]
    return hook


def capture(model, tokens):
    """Every module's output, the logits and the caches, for tokens [1, T]."""
    out, hooks = {}, []
    skipped = ("layers", "act_fn", "conv1d", "experts", "model")
    for path, module in model.named_modules():
        leaf = path.rsplit(".", 1)[-1]
        if not path or path.endswith("rotary_emb") or leaf in skipped or ".experts." in path:
            continue
        hooks.append(module.register_forward_hook(keep(out, path, tokens.shape[1])))
    result = model(tokens, use_cache=True)
    for h in hooks:
        h.remove()
    out["logits"] = result.logits[0]
    caches = {"conv_states": "conv", "recurrent_states": "state", "keys": "keys", "values": "values"}
    for i, layer in enumerate(result.past_key_values.layers):
        for attr, name in caches.items():
            t = getattr(layer, attr, None)
            t = t[0] if isinstance(t, (list, tuple)) else t.get(0) if isinstance(t, dict) else t
            if torch.is_tensor(t) and t.numel():
                out[f"cache/{i}/{name}"] = t[0]
    return out


def make(name, folder):
    gen = torch.Generator().manual_seed(sum(map(ord, name)))
    config, dtype = CASES[name]()
    model = MODELS[config.model_type](config).eval()
    randomise(model, gen)
    model = model.to(dtype).to(torch.float32)                # the file's values, computed on in float32
    model.to(dtype).save_pretrained(folder)
    model = MODELS[config.model_type].from_pretrained(folder, dtype=torch.float32).eval()
    golden = {}
    with torch.no_grad():
        for prompt, length in PROMPTS.items():
            tokens = torch.randint(3, config.vocab_size, (1, length), generator=gen)
            golden[f"{prompt}/tokens"] = tokens[0]
            for key, value in capture(model, tokens).items():
                golden[f"{prompt}/{key}"] = value.detach().clone().contiguous()
    save_file(golden, os.path.join(folder, "golden.safetensors"),
              metadata={"case": name, "by": "transformers 5.23.0, torch 2.13.0, float32, CPU"})
    print(name, sum(v.numel() * v.element_size() for v in golden.values()), "bytes,", len(golden), "arrays")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[2:] or CASES:
        make(case, os.path.join(sys.argv[1], case))
