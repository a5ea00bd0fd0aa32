"""Write a random model of real widths, to measure with: no model is held in memory, only a tensor at a time.

    python benchmarks/make_model.py --shape mini --type bfloat16 -o /somewhere/mini-bf16
    python benchmarks/make_model.py --shape full --layers 4 --experts 64 -o /somewhere/part
    python benchmarks/make_model.py --shape mini --type Q4_K -o /somewhere/mini-Q4_K.gguf
    python benchmarks/make_model.py --shape full --type Q4_K --map '*_exps*=Q2_K' --map output.weight=Q6_K -o full.gguf

    python benchmarks/make_model.py --shape qwen35-0.8b --type Q8_0 -o /somewhere/qwen35-Q8_0.gguf
    python benchmarks/make_model.py --shape glm --type Q4_K --map '*hc_*_fn*=Q8_0' -o /somewhere/glm-Q4_K.gguf

A name that ends in .gguf is a GGUF file that llama.cpp runs, too; any other a Hugging Face folder. Shapes:

    full           Kimi-Linear-48B-A3B as published
    mini           its widths with 8 layers (MLA at 4 and 8, counted from 1), 32 experts, a vocabulary of 32,768
    small          two layers; every block type divides the rows of all large matrices
    tiny           the packaged model's
    qwen3next-80b  Qwen3-Next-80B-A3B as published
    qwen3next      its widths with 8 layers (attention at 4 and 8) and 64 experts, of which 10 are used
    qwen3next-12   the same with 12 layers
    qwen35-0.8b    the text model of Qwen3.5-0.8B as published: dense, tied embeddings
    k3-2.8t        the text model of Kimi K3 as published
    k3             its widths with 6 layers (MLA at 4; a snapshot each 2), 32 experts, of which 16 are used
    glm-320b       the text model of GLM-5.3-Flash as published
    glm            its widths with 8 layers (MLA at 4 and 8), 32 experts, of which 8 are used
    k3-small, glm-small, qwen-small, qwen35-small, qwen35moe-small    four layers with rows as those of small

The values of a tensor depend on its name, shape, type and ``--seed`` alone. Matrices keep the size of their input,
gates go from almost none to strong, so that a run meets no subnormals or infinities that a trained model would not.
"""

import argparse
import json
import math
import shutil
import sys
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
from random_blocks import TYPES as BLOCK_TYPES
from random_gguf import plan_types, tensors_of, write_gguf

from kimi_linear.cli._common import human_bytes, human_count, layer_pattern, non_negative, positive, progress
from kimi_linear.config import Config
from kimi_linear.load.safetensors import write_safetensors
from kimi_linear.random_weights import random_tensor

TYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("bfloat16", "float16", "float32")}
GGUF_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
FLOAT32 = ("A_log", "dt_bias", "e_score_correction_bias")  # as published files keep them
SHARD = 5 << 30  # bytes of one file at most
POOL = 1 << 22   # random values that all matrices are cut from

PUBLISHED = {
    "architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "vocab_size": 163840,
    "hidden_size": 2304, "num_hidden_layers": 27, "intermediate_size": 9216, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "num_attention_heads": 32, "num_key_value_heads": 32,
    "linear_attn_config": {
        "head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4,
        "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
    },
    "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "mla_use_nope": True, "rope_scaling": None, "model_max_length": 1048576,
    "num_experts": 256,
    "num_experts_per_token": 8, "num_shared_experts": 1, "moe_intermediate_size": 1024,
    "moe_router_activation_func": "sigmoid", "moe_renormalize": True, "routed_scaling_factor": 2.446,
    "use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "num_nextn_predict_layers": 0, "tie_word_embeddings": False,
    "bos_token_id": 163584, "eos_token_id": 163586, "pad_token_id": 163839,
}
TINY = PUBLISHED | {
    "vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 4,
    "linear_attn_config": {"head_dim": 32, "num_heads": 4, "short_conv_kernel_size": 4,
                           "kda_layers": [1, 2, 3, 5], "full_attn_layers": [4, 6]},
    "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "num_experts": 8,
    "num_experts_per_token": 2, "moe_intermediate_size": 96, "bos_token_id": 1792, "eos_token_id": 1794,
    "pad_token_id": 2047,
}
SMALL = PUBLISHED | {
    "vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 512,
    "num_attention_heads": 2, "num_key_value_heads": 2,
    "linear_attn_config": {"head_dim": 128, "num_heads": 2, "short_conv_kernel_size": 4,
                           "kda_layers": [1], "full_attn_layers": [2]},
    "kv_lora_rank": 256, "num_experts": 8, "num_experts_per_token": 2, "moe_intermediate_size": 256,
    "bos_token_id": 768, "eos_token_id": 770, "pad_token_id": 1023,
}
K3_LAYERS = [*range(4, 93, 4), 93]
K3 = PUBLISHED | {
    "architectures": ["KimiK3ForConditionalGeneration"], "model_type": "kimi_k3", "hidden_size": 7168,
    "num_hidden_layers": 93, "intermediate_size": 33792, "hidden_act": "situ", "activation_situ_beta": 4.0,
    "activation_situ_linear_beta": 25.0, "attn_res_block_size": 12, "num_attention_heads": 96,
    "num_key_value_heads": 96,
    "linear_attn_config": {
        "head_dim": 128, "num_heads": 96, "short_conv_kernel_size": 4, "gate_lower_bound": -5.0,
        "use_full_rank_gate": True, "kda_layers": [i for i in range(1, 94) if i not in K3_LAYERS],
        "full_attn_layers": K3_LAYERS,
    },
    "q_lora_rank": 1536, "mla_use_output_gate": True, "num_experts": 896, "num_experts_per_token": 16,
    "num_shared_experts": 2, "moe_intermediate_size": 3072, "routed_expert_hidden_size": 3584,
    "latent_moe_use_norm": True, "routed_scaling_factor": 1.0, "pad_token_id": 163839,
}
K3_SMALL = K3 | {name: SMALL[name] for name in (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "kv_lora_rank",
    "num_experts", "num_experts_per_token", "moe_intermediate_size", "bos_token_id", "eos_token_id",
    "pad_token_id")} | {
    "num_hidden_layers": 4, "q_lora_rank": 256, "routed_expert_hidden_size": 256, "attn_res_block_size": 2,
    "linear_attn_config": K3["linear_attn_config"] | {
        "num_heads": 2, "kda_layers": [1, 2, 3], "full_attn_layers": [4]},
}
GLM = {
    "architectures": ["Glm5NextForConditionalGeneration"], "model_type": "glm5_next_text", "vocab_size": 154880,
    "hidden_size": 4096, "num_hidden_layers": 45, "intermediate_size": 12288, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "max_position_embeddings": 1048576, "first_k_dense_replace": 3, "linear_head_dim": 128,
    "linear_num_heads": 64, "linear_conv_kernel_dim": 4, "linear_lower_bound": -5.0, "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 256, "qk_rope_head_dim": 0, "v_head_dim": 256,
    "index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048, "index_kpool": 4, "hc_mult": 4, "hc_eps": 1e-6,
    "hc_sinkhorn_iters": 20, "swiglu_limit": 10.0, "n_routed_experts": 288, "num_experts_per_tok": 8,
    "n_shared_experts": 1, "moe_intermediate_size": 2048, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "tie_word_embeddings": False, "eos_token_id": 154820, "pad_token_id": 154820,
}
GLM_SMALL = GLM | {
    "vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512, "linear_num_heads": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 256, "kv_lora_rank": 256, "index_n_heads": 4,
    "index_topk": 64, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
    "eos_token_id": 770, "pad_token_id": 770,
}
MINI = {"layers": 8, "experts": 32, "vocab": 32768}

QWEN = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 262144, "full_attention_interval": 4,
    "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}
QWEN3_NEXT = QWEN | {
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "vocab_size": 151936, "hidden_size": 2048,
    "num_hidden_layers": 48, "intermediate_size": 5120, "num_attention_heads": 16, "linear_num_value_heads": 32,
    "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "tie_word_embeddings": False, "bos_token_id": 151643, "eos_token_id": 151645,
}
QWEN35 = QWEN | {
    "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "vocab_size": 248320, "hidden_size": 1024,
    "num_hidden_layers": 24, "intermediate_size": 3584, "num_attention_heads": 8, "linear_num_value_heads": 16,
    "tie_word_embeddings": True, "eos_token_id": 248044,
}
NARROW = {"vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512,
          "num_attention_heads": 4, "head_dim": 128, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
          "bos_token_id": 768, "eos_token_id": 768}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
           "shared_expert_intermediate_size": 256}
QWEN35_MOE = QWEN35 | {"architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text"}

SHAPES = {  # a config and changes of it
    "mini": (PUBLISHED, MINI), "full": (PUBLISHED, {}), "small": (SMALL, {}), "tiny": (TINY, {}),
    "qwen3next-80b": (QWEN3_NEXT, {}), "qwen3next": (QWEN3_NEXT, {"layers": 8, "experts": 64}),
    "qwen3next-12": (QWEN3_NEXT, {"layers": 12, "experts": 64}), "qwen35-0.8b": (QWEN35, {}),
    "k3-2.8t": (K3, {}), "k3": (K3 | {"attn_res_block_size": 2}, {"layers": 6, "experts": 32, "vocab": 32768}),
    "k3-small": (K3_SMALL, {}),
    "glm-320b": (GLM, {}), "glm": (GLM, MINI), "glm-small": (GLM_SMALL, {}),
    "qwen-small": (QWEN3_NEXT | NARROW | EXPERTS, {}), "qwen35-small": (QWEN35 | NARROW, {}),
    "qwen35moe-small": (QWEN35_MOE | NARROW | EXPERTS, {}),
}


def main():
    args = arguments()
    write = write_file if args.output.suffix == ".gguf" else write_folder
    try:
        return write(args, config_of(args))
    except ValueError as error:
        return f"make_model: {error}"


def write_folder(args, config):
    """A folder of safetensors with a config.json."""
    if args.type not in TYPES or args.map:
        return f"make_model: a folder's type is one of {', '.join(TYPES)}, the same for all; blocks need a .gguf name"
    shapes = config.weight_shapes()
    tensors = {name: RandomTensor(name, shape, TYPES[args.type], args.seed, config.norm_plus_one)
               for name, shape in shapes.items()}
    n_bytes = sum(t.nbytes for t in tensors.values())
    if problem := announce(config, n_bytes, args):
        return problem
    args.output.mkdir(parents=True, exist_ok=True)
    with progress(n_bytes, args.output.name, unit="B") as bar:
        write_shards(args.output, tensors, bar)
    text = json.dumps(config.to_dict() | {"dtype": args.type}, indent=2)
    (args.output / "config.json").write_text(text + "\n")
    return 0


def write_file(args, config):
    """A GGUF file."""
    tensors = tensors_of(config)
    for sentence in plan_types(tensors, GGUF_NAMES.get(args.type, args.type), args.map):
        print(sentence, file=sys.stderr)
    n_bytes = sum(t.nbytes for t in tensors)
    if problem := announce(config, n_bytes, args):
        return problem
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with progress(n_bytes, args.output.name, unit="B") as bar:
        write_gguf(args.output, config, tensors, name=f"random {args.shape}", seed=args.seed, progress=bar.update)
    print(f"{args.output}: {human_bytes(args.output.stat().st_size)}", file=sys.stderr)
    return 0


def announce(config, n_bytes, args):
    """Says what is made; a sentence where the disk has no room for it."""
    n_values = sum(math.prod(shape) for shape in config.weight_shapes().values())
    print(f"{layer_pattern(config)}: {human_count(n_values)} parameters, {human_bytes(n_bytes)}", file=sys.stderr)
    room = shutil.disk_usage(existing_parent(args.output)).free
    return f"make_model: there is room for {human_bytes(room)}" if n_bytes > room else None


def arguments():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--shape", choices=SHAPES, default="mini", help="(default: %(default)s)")
    parser.add_argument("--type", default="bfloat16", metavar="TYPE",
                        help=f"storage type of the matrices: {', '.join(TYPES)}; in a GGUF file also "
                             f"{', '.join(BLOCK_TYPES)} (default: %(default)s)")
    parser.add_argument("--map", type=pattern_and_type, action="append", default=[], metavar="PATTERN=TYPE",
                        help="another type for the tensors of a GGUF file with such names; the first that fits counts")
    parser.add_argument("--layers", type=positive, metavar="N",
                        help="another number of layers, each 4th of full attention")
    parser.add_argument("--experts", type=positive, metavar="N", help="another number of experts")
    parser.add_argument("--vocab", type=positive, metavar="N", help="another vocabulary, of 512 tokens or more")
    parser.add_argument("--seed", type=non_negative, default=0, metavar="N",
                        help="of the values (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PATH")
    return parser.parse_args()


def pattern_and_type(text):
    pattern, _, kind = text.rpartition("=")
    if not pattern:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=TYPE, such as '*_exps*=Q2_K'")
    return pattern, kind


def config_of(args):
    """The shape's config, with what was asked for otherwise."""
    d, changes = SHAPES[args.shape]
    asked = {"layers": args.layers, "experts": args.experts, "vocab": args.vocab}
    changes = changes | {name: n for name, n in asked.items() if n is not None}
    d = dict(d)
    if n := changes.get("layers"):
        d["num_hidden_layers"] = n
        if linear := d.get("linear_attn_config"):
            full = range(4, n + 1, 4)
            d["linear_attn_config"] = linear | {
                "full_attn_layers": [*full], "kda_layers": [i for i in range(1, n + 1) if i not in full]}
    if n := changes.get("experts"):
        count = "n_routed_experts" if "n_routed_experts" in d else "num_experts"
        if count not in d:
            raise ValueError(f"--experts is {n}; {args.shape} has none")
        used = "num_experts_per_token" if "num_experts_per_token" in d else "num_experts_per_tok"
        d |= {count: n, used: min(n, d[used])}
    if n := changes.get("vocab"):
        if n < 512:
            raise ValueError(f"the vocabulary is {n}; it must have 512 tokens or more: 256 bytes and 256 special ones")
        d |= {"vocab_size": n, "bos_token_id": n - 256, "eos_token_id": n - 254, "pad_token_id": n - 1}
    return Config.from_dict(d)


class RandomTensor:
    """A tensor that is made when it is written."""

    pool = np.random.default_rng(0).standard_normal(POOL, np.float32)

    def __init__(self, name, shape, dtype, seed, plus_one):
        self.name, self.shape, self.seed, self.plus_one = name, shape, seed, plus_one
        self.dtype = TYPES["float32"] if name.endswith(FLOAT32) else dtype
        self.nbytes = math.prod(shape) * self.dtype.itemsize

    def array(self):
        rng = np.random.default_rng([self.seed, zlib.crc32(self.name.encode())])
        if len(self.shape) == 1 or "conv1d" in self.name:
            return random_tensor(self.name, self.shape, rng, self.plus_one).astype(self.dtype)
        scale = 1.0 if "embed_tokens" in self.name else 1.2 / self.shape[-1] ** 0.5
        pool = (self.pool * np.float32(scale)).astype(self.dtype)
        flat = np.empty(math.prod(self.shape), self.dtype)
        for begin in range(0, flat.size, POOL // 2):
            part = flat[begin : begin + POOL // 2]
            start = int(rng.integers(0, POOL - part.size + 1))
            part[:] = pool[start : start + part.size]
        return flat.reshape(self.shape)


class Counted:
    """A RandomTensor that tells the bar when it was made."""

    def __init__(self, tensor, bar):
        self.tensor, self.bar = tensor, bar
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def array(self):
        self.bar.update(self.tensor.nbytes)
        return self.tensor.array()


def write_shards(folder, tensors, bar):
    """One file, or shards with an index."""
    shards = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", counted(shards[0], bar))
        return
    names = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, counted(shard, bar))
        names |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def counted(tensors, bar):
    return {name: Counted(tensor, bar) for name, tensor in tensors.items()}


def existing_parent(path):
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


if __name__ == "__main__":
    sys.exit(main())
