"""GGUF files, fuzzed by coverage: whatever the bytes are, opening refuses with a FormatError or gives a whole model.

    make fuzz                                       ten minutes, and ten for state files
    python tests/fuzz/fuzz_gguf.py [folder of inputs] [options of libFuzzer]
    python tests/fuzz/fuzz_gguf.py one-input        once more, with its traceback

An input is a file. What opens is also read: every array of the metadata, every tensor, the tokenizer; and the model is
planned in C from the views. Python's part is instrumented, C's is not.
"""

import os
import random
import sys
import tempfile
import warnings
from pathlib import Path

import atheris
from harness import run

with atheris.instrument_imports(include=["kimi_linear.load.gguf", "kimi_linear.load.gguf_config",
                                         "kimi_linear.load.gguf_config_qwen", "kimi_linear.load.gguf_config_glm",
                                         "kimi_linear.load.gguf_keys",
                                         "kimi_linear.load.gguf_names", "kimi_linear.load.gguf_checkpoint",
                                         "kimi_linear.load.gguf_scores",
                                         "kimi_linear.load.gguf_tokenizer", "kimi_linear.load.gguf_tokenizer_json",
                                         "kimi_linear.load.mapped"]):
    import kimi_linear as kl
    import kimi_linear.load.gguf
    import kimi_linear.load.gguf_checkpoint
    import kimi_linear.load.gguf_config
    import kimi_linear.load.gguf_names
    import kimi_linear.load.gguf_tokenizer
    import kimi_linear.load.mapped  # noqa: F401

from kimi_linear.errors import FormatError
from kimi_linear.load import GGUFFile, MetaArray, open_checkpoint

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "load")]

ODD = [0, 1, 2, 3, 4, 5, 8, 13, 31, 32, 33, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63,
       2**64 - 32, 2**64 - 1]
CONFIG = {
    "model_type": "kimi_linear", "vocab_size": 5, "hidden_size": 4, "num_hidden_layers": 3, "intermediate_size": 2,
    "rms_norm_eps": 1e-5, "num_attention_heads": 2, "q_lora_rank": None, "kv_lora_rank": 3, "qk_nope_head_dim": 2,
    "qk_rope_head_dim": 1, "v_head_dim": 2, "num_experts": 2, "num_experts_per_token": 1, "num_shared_experts": 1,
    "moe_intermediate_size": 2, "first_k_dense_replace": 1,
    "linear_attn_config": {"head_dim": 2, "num_heads": 2, "short_conv_kernel_size": 2, "kda_layers": [1, 2],
                           "full_attn_layers": [3]},
}


def whole_files():
    """Small models: float32; blocks where they fit; legacy kv_b; with a tokenizer; and a part of two."""
    import gguf_files

    from kimi_linear.random_weights import random_weights

    letters = gguf_files.byte_alphabet()

    def tokenizer(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("kimi-k2")
        writer.add_token_list([*letters.values(), "[BOS]", "[EOS]", "<|im_end|>", "[PAD259]"])
        writer.add_token_types([1] * 256 + [3, 3, 3, 5])
        writer.add_bos_token_id(256)
        writer.add_eos_token_id(257)
        writer.add_chat_template("x")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        for sizes, options in (({}, {}), ({"hidden_size": 32}, {"dtype": "Q8_0", "conv_axes": 2}),
                               ({}, {"legacy_kv_b": True, "fused": True}), ({}, {"split": (0, 2)}),
                               ({"vocab_size": 260, "hidden_size": 1}, {"more": tokenizer})):
            config = kl.Config.from_dict(CONFIG | sizes)
            gguf_files.write_weights(path, config, random_weights(config, 0, "float32"), **options)
            yield path.read_bytes()


def header_length(file):
    """Bytes before the data, about: the part worth changing."""
    return min(len(file), max(file.rfind(b"output_norm"), file.rfind(b"ssm_"), file.rfind(b"_exps"), 64) + 64)


class Target:
    """What is fuzzed: one opening, and what must hold behind it."""

    def __init__(self):
        place = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.path = Path(tempfile.mkdtemp(prefix="fuzz", dir=place)) / "x.gguf"
        self.files = list(whole_files())
        warnings.simplefilter("ignore")

    def __call__(self, data):
        data = bytes(data)
        self.path.write_bytes(data)
        try:
            file = GGUFFile(self.path)
            for value in file.metadata.values():
                if isinstance(value, MetaArray):
                    assert len(value.values()) == len(value)
            for view in file.values():
                assert file.data_offset <= view.offset and view.offset + view.nbytes <= len(data)
            checkpoint = open_checkpoint(self.path)
        except FormatError as error:
            assert error.problems and all(error.problems)
            return
        try:
            if checkpoint.tokenizer is not None:
                checkpoint.tokenizer().encode("In the beginning")
        except FormatError as error:
            assert error.problems
        model = kl.Model(checkpoint.config, checkpoint.tensors, checkpoint=checkpoint)
        assert list(model.weights) == list(checkpoint.config.weight_shapes())
        for name, shape in checkpoint.config.weight_shapes().items():
            assert model.weights[name].shape == shape, name

    def seeds(self):
        """Inputs to begin with."""
        yield from self.files


def mutated(data, max_size, seed):
    """Half the time a size, count, type or offset of the header becomes another, else another byte anywhere."""
    rng = random.Random(seed)
    if len(data) < 64 or rng.random() < 0.5:
        return atheris.Mutate(data, max_size)
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        end = header_length(out) - 8
        if end <= 4:
            break
        at = rng.randrange(4, end)
        kind = rng.random()
        if kind < 0.4:
            out[at] = rng.choice(ODD) & 255
        elif kind < 0.6:
            out[at : at + 4] = (rng.choice(ODD) & (2**32 - 1)).to_bytes(4, "little")
        elif kind < 0.8:
            out[at : at + 8] = rng.choice(ODD).to_bytes(8, "little")
        elif kind < 0.9:
            out[at : at + rng.randrange(1, 40)] = b""
        else:
            begin = rng.randrange(4, end)
            out[at:at] = out[begin : begin + rng.randrange(1, 80)]
    return bytes(out[:max_size])


if __name__ == "__main__":
    run(Target(), sys.argv, mutated, room=1024)
