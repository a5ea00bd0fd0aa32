"""Small random checkpoints of Kimi K3 and what mlx-lm computes for them, in float64.

For each case this writes a folder in the Hugging Face layout: config.json with its `text_config`, model.safetensors
with the names of the published files (`language_model.model...`), and `golden.safetensors`: the tokens of two prompts
and what mlx-lm's kimi_k3 gives for them. MLX's CPU backend has float64, but its exponentials, its convolution and
its products by expert are float32's: `Exact` has those in NumPy's float64 and all else is mlx-lm's own. The arrays
are stored as float32, rounded once; `golden64.safetensors` has some of them unrounded. MXFP4 experts are given to
MLX as the numbers they stand for. Needs `mlx==0.32.4 mlx-lm==0.32.2 safetensors`, CPU; nothing of this project.
Run: `python make_golden_mlx.py OUT_DIR [case ...]`.

Array names are those of make_golden.py, `<prompt>/<module path>` without `language_model.` and with `mlp` for both
kinds of feed-forward. In addition, under `model.layers.<i>.`:

    attn_res, mlp_res       [T, D]     the residual mixture before attention and before the feed-forward
    self_attn.forget_gate   [T, H, K]  log-decay in nats
    self_attn.delta_rule    [T, H, K]  before the norm;  self_attn.o_norm [T, H * K]: after norm and gate
    self_attn.attention     [T, H, V]  of MLA, before its gate;  self_attn.gated [T, H * V]: after it
    mlp.gate                [T, E]     router logits;  mlp.gate/ids, mlp.gate/weights: in the order of mlx-lm
    mlp.experts             [T, R]     the experts' weighted sum, in the latent where there is one

`model.layers.<i>` is the residual stream after the layer: with attention residuals, the prefix sum, which a block's
first layer begins anew. `model.output_attn_res` is the last mixture. `cache/<i>/conv` is [channels, W - 1], q|k|v,
newest last. The short prompt has every array, the long one those of LONG.
"""

import json
import re
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.nn.layers import activations, convolution, normalization
from mlx_lm.models import base, gated_delta, kimi_k3, kimi_linear, switch_layers
from safetensors.numpy import save_file

PROMPTS = {"long": 70, "short": 21}          # 70 crosses a chunk of 64
LONG = re.compile(r"tokens|logits|cache/.*|model\.output_attn_res|model\.layers\.\d+|.*/(ids|weights)")
EXACT = {"long": re.compile("tokens|logits"),                                  # what golden64 has
         "short": re.compile(r"tokens|logits|model\.layers\.\d+|model\.output_attn_res|cache/\d+/state")}
GROUP = 32                                   # columns that share a scale
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate([E2M1, -E2M1])         # bit 3 is the sign

MXFP4 = {
    "config_groups": {"group_0": {
        "format": "mxfp4-pack-quantized", "input_activations": None, "output_activations": None, "targets": ["Linear"],
        "weights": {"actorder": None, "block_structure": None, "dynamic": False, "group_size": GROUP, "num_bits": 4,
                    "observer": "minmax", "observer_kwargs": {}, "scale_dtype": "torch.uint8", "strategy": "group",
                    "symmetric": True, "type": "float", "zp_dtype": None}}},
    "format": "mxfp4-pack-quantized", "global_compression_ratio": None,
    "ignore": ["re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
               "re:.*lm_head.*", "re:.*vision_tower.*", "re:.*mm_projector.*"],
    "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "compressed",
}


def config(linear, mla, moe, tied=False, **more):
    """config.json as published: the keys that all cases share, and those of one."""
    n, nope, rope, v, rank = mla
    experts, top, groups, top_groups, shared, width, scale, renorm = moe
    text = dict(
        model_type="kimi_linear", architectures=["KimiLinearForCausalLM"], vocab_size=320, dtype="bfloat16",
        num_attention_heads=n, num_key_value_heads=n, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=v,
        kv_lora_rank=rank, mla_use_nope=True, linear_attn_config=linear, num_experts=experts,
        num_experts_per_token=top, num_expert_group=groups, topk_group=top_groups, num_shared_experts=shared,
        moe_intermediate_size=width, routed_scaling_factor=scale, moe_renormalize=renorm,
        moe_router_activation_func="sigmoid", topk_method="noaux_tc", use_grouped_topk=True, moe_layer_freq=1,
        hidden_act="situ", num_nextn_predict_layers=0, rope_theta=10000.0, max_position_embeddings=1048576,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=tied, **more)
    return dict(model_type="kimi_k3", architectures=["KimiK3ForConditionalGeneration"], dtype="bfloat16",
                bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=tied, text_config=text)


CASES = {
    # the published model in small: blocks begin at layers 0, 3 and 6, where a layer of MLA is the last
    "k3-a": config(
        dict(kda_layers=[1, 2, 4, 5, 6], full_attn_layers=[3, 7], head_dim=20, num_heads=2, short_conv_kernel_size=4,
             use_full_rank_gate=True, gate_lower_bound=-5.0),
        (3, 12, 6, 10, 24), (10, 3, 1, 1, 2, 64, 1.0, True),
        hidden_size=48, num_hidden_layers=7, intermediate_size=80, rms_norm_eps=1e-5, first_k_dense_replace=1,
        activation_situ_beta=4.0, activation_situ_linear_beta=25.0, attn_res_block_size=3, q_lora_rank=28,
        mla_use_output_gate=True, routed_expert_hidden_size=32, latent_moe_use_norm=True, quantization_config=MXFP4),
    # what the config allows besides: no attention residuals, gates or low-rank q, up as it is, a latent without norm,
    # softplus gates, expert groups, bfloat16 experts, tied embeddings
    "k3-b": config(
        dict(kda_layers=[2, 3], full_attn_layers=[1, 4], head_dim=8, num_heads=3, short_conv_kernel_size=3),
        (2, 10, 4, 7, 20), (12, 4, 3, 2, 1, 18, 1.7, False), tied=True,
        hidden_size=40, num_hidden_layers=4, intermediate_size=56, rms_norm_eps=1e-6, first_k_dense_replace=2,
        activation_situ_beta=2.5, routed_expert_hidden_size=28, latent_moe_use_norm=False),
}


def shapes(c):
    """The tensors of the language model of a text_config: name without `language_model.` -> shape."""
    D, linear, out = c["hidden_size"], c["linear_attn_config"], {}
    H, K = linear["num_heads"], linear["head_dim"]
    n, nope, rope, v = (c[k] for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    R, r = c["kv_lora_rank"], c.get("q_lora_rank")
    latent, width = c["routed_expert_hidden_size"], c["moe_intermediate_size"]
    residuals = c.get("attn_res_block_size") is not None

    def matrices(at, **rows_and_columns):
        out.update({f"{at}{name}.weight": shape for name, shape in rows_and_columns.items()})

    def gated(at, inner):
        matrices(at, gate_proj=(inner, D), up_proj=(inner, D), down_proj=(D, inner))

    matrices("model.", embed_tokens=(c["vocab_size"], D), norm=(D,))
    if not c["tie_word_embeddings"]:
        matrices("", lm_head=(c["vocab_size"], D))
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        attn, moe = layer + "self_attn.", layer + "block_sparse_moe."
        matrices(layer, input_layernorm=(D,), post_attention_layernorm=(D,))
        if residuals:
            matrices(layer, self_attention_res_norm=(D,), self_attention_res_proj=(1, D), mlp_res_norm=(D,),
                     mlp_res_proj=(1, D))
        if i + 1 in linear["kda_layers"]:
            matrices(attn, **{f"{x}_proj": (H * K, D) for x in "qkv"}, b_proj=(H, D), f_a_proj=(K, D),
                     f_b_proj=(H * K, K), o_norm=(K,), o_proj=(D, H * K))
            matrices(attn, **{f"{x}_conv1d": (H * K, 1, linear["short_conv_kernel_size"]) for x in "qkv"})
            if linear.get("use_full_rank_gate"):
                matrices(attn, g_proj=(H * K, D))
            else:
                matrices(attn, g_a_proj=(K, D), g_b_proj=(H * K, K))
            out[attn + "A_log"], out[attn + "dt_bias"] = (2 * H,), (H * K,)        # the second half is padding
        else:
            if r:
                matrices(attn, q_a_proj=(r, D), q_a_layernorm=(r,), q_b_proj=(n * (nope + rope), r))
            else:
                matrices(attn, q_proj=(n * (nope + rope), D))
            matrices(attn, kv_a_proj_with_mqa=(R + rope, D), kv_a_layernorm=(R,), kv_b_proj=(n * (nope + v), R),
                     o_proj=(D, n * v))
            if c.get("mla_use_output_gate"):
                matrices(attn, g_proj=(n * v, D))
        if i < c["first_k_dense_replace"]:
            gated(layer + "mlp.", c["intermediate_size"])
            continue
        matrices(moe, gate=(c["num_experts"], D), routed_expert_down_proj=(latent, D),
                 routed_expert_up_proj=(D, latent))
        out[moe + "gate.e_score_correction_bias"] = (c["num_experts"],)
        if c["latent_moe_use_norm"]:
            matrices(moe, routed_expert_norm=(latent,))
        gated(moe + "shared_experts.", width * c["num_shared_experts"])
        for e in range(c["num_experts"]):
            matrices(f"{moe}experts.{e}.", w1=(width, latent), w2=(latent, width), w3=(width, latent))
    if residuals:
        matrices("model.", output_attn_res_norm=(D,), output_attn_res_proj=(1, D))
    return out


def spread(name, shape, rng):
    """A factor for each row, or block of a row, so that the gated units reach several beta: small to far too large."""
    if re.search(r"(gate_proj|w1)\.weight$", name):
        return np.exp(rng.uniform(0, np.log(12), (shape[0], 1)))
    if re.search(r"(up_proj|w3)\.weight$", name) and "routed_expert" not in name:
        return np.exp(rng.uniform(0, np.log(60), (shape[0], 1)))
    return 1 / 12 if re.search(r"((?<!expert_)down_proj|w2)\.weight$", name) else 1.0


def draw(name, shape, text, rng):
    """Weights of a size at which every part matters; gates from almost none to strong."""
    r = rng.standard_normal(shape)
    if name.endswith("A_log"):
        x = np.log(1 + 15 * rng.random(shape))
        x[shape[0] // 2:] = 1e3 * r[shape[0] // 2:]
        return x / (4 if text["linear_attn_config"].get("gate_lower_bound") else 1)
    if name.endswith("dt_bias"):
        return -4 + 3 * rng.random(shape)
    if "norm" in name:
        return 1 + 0.2 * r
    if "conv" in name:
        return 0.5 * r
    if "correction_bias" in name:
        return 0.1 * r
    if "embed" in name:
        return r
    return 1.2 * r / shape[-1] ** 0.5 * spread(name, shape, rng)


def mxfp4(name, shape, rng):
    """Random codes and scales of such a size: weight_packed [rows, columns / 2], weight_scale [rows, columns / 32]."""
    rows, columns = shape
    codes = rng.integers(0, 16, shape, dtype=np.uint8)
    size = spread(name, shape, rng) / (np.sqrt(np.mean(E2M1**2)) * columns**0.5)
    scale = 127 + np.round(np.log2(size) + rng.uniform(-1.5, 1.5, (rows, columns // GROUP)))
    return codes[:, ::2] | codes[:, 1::2] << 4, scale.astype(np.uint8)


def unpack(packed, scale):
    """What MXFP4 stands for: the low nibble is the even column, 2^(scale - 127) for 32 columns."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return E2M1[codes] * np.repeat(np.ldexp(1.0, scale.astype(int) - 127), GROUP, axis=1)


def checkpoint(text, rng):
    """(the file's tensors, what MLX computes with: the same numbers in float64)."""
    file, numbers = {}, {}
    for name, shape in shapes(text).items():
        name, x = "language_model." + name, None
        if "quantization_config" in text and ".experts." in name:
            packed, scale = mxfp4(name, shape, rng)
            file[name + "_packed"], file[name + "_scale"] = mx.array(packed), mx.array(scale)
            x = mx.array(unpack(packed, scale), dtype=mx.float64)
        else:
            wide = name.endswith(("A_log", "dt_bias", "correction_bias"))
            file[name] = mx.array(draw(name, shape, text, rng)).astype(mx.float32 if wide else mx.bfloat16)
        numbers[name] = file[name].astype(mx.float64) if x is None else x
    return file, numbers


def f64(x):
    return mx.array(np.asarray(x, np.float64), dtype=mx.float64)


class Exact:
    """mlx.core with float64 for float32, and plain formulas where its float64 has the precision of float32."""

    float32 = mx.float64

    def __getattr__(self, name):
        return getattr(mx, name)

    @property
    def fast(self):
        return self

    def exp(self, x):
        return f64(np.exp(np.array(x)))

    def sigmoid(self, x):
        return 1 / (1 + self.exp(-x))

    def logaddexp(self, a, b):
        return f64(np.logaddexp(np.array(a), np.array(b)))

    def softmax(self, x, axis, precise=True):
        e = self.exp(x - x.max(axis=axis, keepdims=True))
        return e / e.sum(axis=axis, keepdims=True)

    def conv1d(self, x, weight, stride=1, padding=0, dilation=1, groups=1):
        taps = weight.shape[1]
        assert (stride, padding, dilation, groups) == (1, 0, 1, len(weight))
        n = x.shape[1] - taps + 1
        return sum(x[:, j:j + n] * weight[:, j, 0] for j in range(taps))

    def gather_mm(self, x, weight, rhs_indices, sorted_indices=False):
        return x @ weight[rhs_indices]

    def rms_norm(self, x, weight, eps):
        y = x * mx.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps)
        return y if weight is None else y * weight

    def scaled_dot_product_attention(self, q, k, v, *, scale, mask=None, sinks=None):
        return self.softmax(scale * q @ k.swapaxes(-1, -2) + mask, axis=-1) @ v


def install():
    """Everything that mlx-lm's kimi_k3 runs, on Exact; uncompiled, as NumPy needs values."""
    mx.set_default_device(mx.cpu)
    mx.disable_compile()
    for module in (kimi_k3, kimi_linear, gated_delta, switch_layers, base, activations, convolution, normalization):
        module.mx = Exact()


class Recorder:
    """Keeps results by module path while a model runs; `paths` is where the call is."""

    def __init__(self, model):
        self.names = {id(m): p.removeprefix("language_model.") for p, m in model.named_modules()}
        self.out, self.paths, self.undo = {}, [], []
        for kind in {type(m) for m in model.modules()}:
            self.wrap(kind, "__call__", self.module)
        self.wrap(kimi_k3, "_group_expert_select", self.router)
        self.wrap(kimi_k3, "_attn_res_mix", self.mixture)
        self.wrap(kimi_k3, "scaled_dot_product_attention", self.attention)
        self.wrap(kimi_k3, "gated_delta_update", self.delta_rule)
        self.wrap(gated_delta, "compute_g", self.decay)
        self.wrap(gated_delta, "compute_lower_bound_g", self.decay)

    def wrap(self, owner, name, keep):
        inner = getattr(owner, name)

        def wrapped(*args, **kwargs):
            return keep(inner, *args, **kwargs)
        setattr(owner, name, wrapped)
        self.undo.append((owner, name, inner))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for owner, name, inner in reversed(self.undo):
            setattr(owner, name, inner)

    def put(self, leaf, x):
        self.out[".".join(filter(None, (self.paths[-1], leaf)))] = x[0]

    def module(self, call, module, *args, **kwargs):
        path = self.names.get(id(module))
        if path is None:
            return call(module, *args, **kwargs)
        if path.endswith("self_attn.o_proj"):
            at = self.paths[-1]
            if at + ".delta_rule" in self.out:
                self.put("o_norm", args[0])
            elif at + ".g_proj" in self.out:
                self.put("gated", args[0])
        if path.endswith("routed_expert_norm"):
            self.put("experts", args[0])
        elif path.endswith("routed_expert_up_proj") and self.paths[-1] + ".experts" not in self.out:
            self.put("experts", args[0])
        self.paths.append(path)
        result = call(module, *args, **kwargs)
        x = result[0] if isinstance(result, tuple) else result
        if not re.search(r"^$|^(language_)?model$|_conv|\.conv|switch_mlp|embed_q|unembed_out|\.o_norm$|lm_head", path):
            self.put("", x)
        self.paths.pop()
        if path.endswith("qkv_proj"):
            del self.out[path]
            for part, y in zip("qkv", mx.split(x, 3, axis=-1)):
                self.put(f"{part}_proj", y)
        return result

    def router(self, call, *args):
        ids, weights = call(*args)
        self.out[self.paths[-1] + ".gate/ids"], self.out[self.paths[-1] + ".gate/weights"] = ids[0], weights[0]
        return ids, weights

    def mixture(self, call, *args):
        x = call(*args)
        at = self.paths[-1]
        self.put("output_attn_res" if at == "model" else "mlp_res" if at + ".attn_res" in self.out else "attn_res", x)
        return x

    def attention(self, call, *args, **kwargs):
        x = call(*args, **kwargs)
        self.put("attention", x.swapaxes(1, 2))
        return x

    def delta_rule(self, call, *args, **kwargs):
        o, state = call(*args, **kwargs)
        self.put("delta_rule", o)
        return o, state

    def decay(self, call, *args):
        alpha = call(*args)
        self.put("forget_gate", mx.log(alpha))
        return alpha


def capture(model, tokens):
    """Every array of one prompt, as float64 and int64 NumPy arrays."""
    cache = model.make_cache()
    with Recorder(model) as recorder:
        out = recorder.out
        out["logits"] = model(mx.array(tokens[None]), cache=cache)[0]
    out["tokens"] = mx.array(tokens)
    for i, (layer, kept) in enumerate(zip(model.layers, cache)):
        if layer.is_linear:
            out[f"cache/{i}/conv"], out[f"cache/{i}/state"] = kept[0][0].T, kept[1][0].swapaxes(-1, -2)
        else:
            out[f"cache/{i}/keys"], out[f"cache/{i}/values"] = (x[0, :, :len(tokens)] for x in (kept.keys, kept.values))
    whole = {name for name in out if name == "tokens" or name.endswith("/ids")}
    assert all(x.dtype == mx.float64 for name, x in out.items() if name not in whole)
    return {name: np.array(x).astype(np.int64 if name in whole else np.float64) for name, x in out.items()}


def assert_bent(arrays, text):
    """AssertionError unless gates and ups reach three beta, so that a tanh left out shows."""
    for part, beta in (("gate", "activation_situ_beta"), ("up", "activation_situ_linear_beta")):
        if beta in text:
            largest = {n: np.abs(x).max() for n, x in arrays.items() if n.endswith(f".{part}_proj")}
            assert min(largest.values()) > 3 * text[beta], (beta, largest)


def make(name, folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(name.encode()))
    text = CASES[name]["text_config"]
    file, numbers = checkpoint(text, rng)
    (folder / "config.json").write_text(json.dumps(CASES[name], indent=2, sort_keys=True) + "\n")
    mx.save_safetensors(str(folder / "model.safetensors"), file, {"format": "pt"})
    install()
    model = kimi_k3.Model(kimi_k3.ModelArgs.from_dict(CASES[name]))
    model.eval()
    model.load_weights(list(model.sanitize(numbers).items()), strict=True)
    golden, golden64 = {}, {}
    for prompt, length in PROMPTS.items():
        arrays = capture(model, rng.integers(3, text["vocab_size"], length))
        assert_bent(arrays, text)
        for key, x in arrays.items():
            if prompt == "short" or LONG.fullmatch(key):
                golden[f"{prompt}/{key}"] = np.ascontiguousarray(x if x.dtype == np.int64 else x.astype(np.float32))
            if EXACT[prompt].fullmatch(key):
                golden64[f"{prompt}/{key}"] = np.ascontiguousarray(x)
    by = "mlx 0.32.4, mlx-lm 0.32.2, CPU, float64 with NumPy's exp"
    save_file(golden, folder / "golden.safetensors", {"case": name, "by": by + ", rounded to float32"})
    save_file(golden64, folder / "golden64.safetensors", {"case": name, "by": by})
    for file in folder.iterdir():
        file.chmod(0o644)
    print(name, *(f"{p.name} {p.stat().st_size}" for p in sorted(folder.iterdir())), len(golden), "arrays")


if __name__ == "__main__":
    for case in sys.argv[2:] or CASES:
        make(case, Path(sys.argv[1]) / case)
