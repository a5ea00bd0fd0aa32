"""Small random checkpoints of GLM-5.3-Flash and what transformers computes for them, in float64.

For each case this writes a folder in the Hugging Face layout: config.json with its `text_config`, model.safetensors
with the names of the published files (`model.language_model...`, and a vision tower of one layer, which no text
needs), and `golden.safetensors`: the tokens of two prompts and what transformers' glm5_next gives for them (its
eager attention). Its module computes parts in float32 whatever the weights are; here it is run with float64 in each
such place (`exact`), and nothing else is changed. The arrays are stored as float32, rounded once;
`golden64.safetensors` has some of them unrounded. Needs `transformers==5.23.0 torch==2.13.0 safetensors`; nothing of
this project.
Run: `python make_golden_glm.py OUT_DIR [case ...]`.

Array names are those of make_golden.py, without `language_model.`. In addition, under `model.layers.<i>.`:

    attn_hc, ffn_hc                  [T, D]     what a block reads of the streams
    attn_hc/post, attn_hc/comb       [T, n], [T, n * n]  and the weights of its output and of the streams behind it
    self_attn.indexer/ids            [T, W]     positions attended to, rising, -1 behind the last

`model.layers.<i>` are the streams after the layer, [T, n, D]. `cache/<i>/indexer` is [T, 2 D_i]: k and gate. The short
prompt has every array, the long one those of LONG.
"""

import importlib.util
import re
import sys
from pathlib import Path

import torch
from make_golden import PROMPTS, randomise
from safetensors.torch import save_file
from transformers import Glm5NextConfig, Glm5NextForConditionalGeneration
from transformers.models.glm5_next import modeling_glm5_next

LONG = re.compile(r"tokens|logits|cache/.*|model\.layers\.\d+|.*/ids|.*mlp\.gate/weights")
EXACT = {"long": re.compile("tokens|logits"),                                  # what golden64 has
         "short": re.compile(r"tokens|logits|model\.layers\.\d+|cache/\d+/state")}
SKIPPED = ("layers", "act_fn", "conv1d", "experts", "input_norm", "gate")
VISION = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, projection_intermediate_size=16,
              image_size=28)


def config(layers, dense, kda, mla, index, streams, moe, hidden, **more):
    """The keys that all cases share, and those of one: a letter a layer (k, m), and the tuples unpacked here."""
    heads, width, conv, bound = kda
    n_heads, nope, v, rank, q_rank = mla
    index_heads, index_dim, topk, pool = index
    experts, top, groups, top_groups, shared, width_e, scale, renorm = moe
    n, iters = streams
    text = dict(
        vocab_size=320, hidden_size=hidden, num_hidden_layers=len(layers), pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
        layer_types=[{"k": "linear_attention", "m": "indexed_attention"}[x] for x in layers],
        mlp_layer_types=["dense" if i in dense else "sparse" for i in range(len(layers))],
        num_attention_heads=n_heads, num_key_value_heads=n_heads, qk_nope_head_dim=nope, qk_rope_head_dim=0,
        v_head_dim=v, kv_lora_rank=rank, q_lora_rank=q_rank, index_n_heads=index_heads,
        index_head_dim=index_dim, index_topk=topk,
        index_kpool=pool, linear_num_heads=heads, linear_head_dim=width, linear_conv_kernel_dim=conv,
        linear_lower_bound=bound, hc_mult=n, hc_sinkhorn_iters=iters, n_routed_experts=experts, num_experts_per_tok=top,
        n_group=groups, topk_group=top_groups, n_shared_experts=shared, moe_intermediate_size=width_e,
        routed_scaling_factor=scale, norm_topk_prob=renorm, **more)
    return Glm5NextConfig(text_config=text, vision_config=VISION | dict(out_hidden_size=hidden),
                          tie_word_embeddings=more.get("tie_word_embeddings", False))


CASES = {
    # the published model in small: one dense layer, a bounded gate, pools of four of which two are chosen
    "glm-a": lambda: (config("kmkkm", {0}, (2, 16, 4, -5.0), (3, 12, 8, 24, 20), (9, 8, 8, 4), (4, 20),
                             (10, 3, 1, 1, 1, 24, 2.5, True), 48, intermediate_size=80, swiglu_limit=1.5,
                             rms_norm_eps=1e-5), torch.float32),
    # what the config allows besides: attention first, a softplus gate, convolution of 3, three streams and few passes,
    # pools of two, expert groups, two shared experts, no renormalisation, bfloat16 file, tied embeddings
    "glm-b": lambda: (config("mkkm", {1, 3}, (3, 8, 3, None), (2, 10, 7, 20, 16), (12, 6, 10, 2), (3, 4),
                             (12, 4, 3, 2, 2, 18, 1.3, False), 40, intermediate_size=56, swiglu_limit=0.7,
                             rms_norm_eps=1e-6, hc_eps=1e-4, tie_word_embeddings=True), torch.bfloat16),
}


def exact():
    """transformers' module, computing in float64 where it says float32."""
    path = modeling_glm5_next.__file__
    source = Path(path).read_text().replace("torch.float32", "torch.float64").replace(".float()", ".double()")
    spec = importlib.util.spec_from_loader(modeling_glm5_next.__package__ + ".exact", loader=None, origin=path)
    module = importlib.util.module_from_spec(spec)
    module.__file__, sys.modules[spec.name] = path, module
    exec(compile(source, path, "exec"), module.__dict__)
    return module


@torch.no_grad()
def draw(model, gen):
    """Weights of a size at which every part matters: clamps are reached, streams mix, pools differ."""
    randomise(model, gen)
    for name, p in model.named_parameters():
        if name.endswith("_hc.scale"):
            p.copy_(0.5 + torch.rand(p.shape, generator=gen))
        elif name.endswith("_hc.base"):
            p.copy_(torch.randn(p.shape, generator=gen))
        elif name.endswith("A_log") and model.config.text_config.linear_lower_bound is not None:
            p.div_(4)


def keep(out, path, n_tokens):
    """A hook that stores what a module gives under its path."""
    def hook(module, args, result):
        if path.endswith("_hc"):
            post, comb, collapsed = result
            out.update({path: collapsed[0], path + "/post": post[0], path + "/comb": comb[0].reshape(n_tokens, -1)})
        elif path.endswith(".indexer"):
            ids = result[0].long()
            order = torch.where(ids < 0, torch.iinfo(ids.dtype).max, ids).sort(dim=-1).values
            out[path + "/ids"] = torch.where(order > len(ids), -1, order).to(torch.int32)
        elif path.endswith("mlp.gate"):
            logits, weights, ids = result
            out.update({path: logits, path + "/weights": weights, path + "/ids": ids})
        else:
            t = result[0] if isinstance(result, tuple) else result
            out[path] = t[0] if t.shape[0] == 1 else t.reshape(n_tokens, -1)
    return hook


def capture(text, head, tokens):
    """Every module's output, the logits and the caches, for tokens [1, T]."""
    out, hooks = {}, []
    for path, module in text.named_modules():
        if path and ".experts." not in path and (path.rsplit(".", 1)[-1] not in SKIPPED or path.endswith("mlp.gate")):
            hooks.append(module.register_forward_hook(keep(out, f"model.{path}", tokens.shape[1])))
    result = text(tokens, use_cache=True)
    for h in hooks:
        h.remove()
    out["logits"] = head(result.last_hidden_state)[0]
    for i, layer in enumerate(result.past_key_values.layers):
        if layer.__class__.__name__.startswith("LinearAttention"):
            kept = {"conv": layer.conv_states[0], "state": layer.recurrent_states[0]}
        else:
            kept = {"keys": layer.keys, "indexer": layer.indexer_keys[..., :-1]}
        out |= {f"cache/{i}/{name}": x[0] for name, x in kept.items()}
    return out


def make(name, folder):
    folder = Path(folder)
    gen = torch.Generator().manual_seed(sum(map(ord, name)))
    settings, dtype = CASES[name]()
    model = Glm5NextForConditionalGeneration(settings).eval()
    draw(model, gen)
    model.to(dtype).save_pretrained(folder)
    module = exact()
    for part in (settings, settings.text_config):
        part._attn_implementation = part._experts_implementation = "eager"
    sharp = module.Glm5NextForConditionalGeneration(settings).double().eval()
    sharp.load_state_dict(model.state_dict())
    golden, golden64 = {}, {}
    with torch.no_grad():
        for prompt, length in PROMPTS.items():
            tokens = torch.randint(3, settings.text_config.vocab_size, (1, length), generator=gen)
            arrays = {"tokens": tokens[0]} | capture(sharp.model.language_model, sharp.lm_head, tokens)
            for key, x in arrays.items():
                wide = x.dtype == torch.float64
                assert wide or not x.is_floating_point(), key
                if prompt == "short" or LONG.fullmatch(key):
                    golden[f"{prompt}/{key}"] = (x.float() if wide else x).clone().contiguous()
                if EXACT[prompt].fullmatch(key):
                    golden64[f"{prompt}/{key}"] = x.clone().contiguous()
    by = "transformers 5.23.0, torch 2.13.0, CPU, float64"
    save_file(golden, folder / "golden.safetensors", {"case": name, "by": by + ", rounded to float32"})
    save_file(golden64, folder / "golden64.safetensors", {"case": name, "by": by})
    print(name, *(f"{p.name} {p.stat().st_size}" for p in sorted(folder.iterdir())), len(golden), "arrays")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[2:] or CASES:
        make(case, Path(sys.argv[1]) / case)
