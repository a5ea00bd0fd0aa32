"""benchmarks/make_model.py: GGUF files of every storage type, as the `gguf` package reads them."""

import importlib
import sys

import ggml_types
import gguf
import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear import reference_model
from kimi_linear.load import open_checkpoint
from kimi_linear.weights import array_of

make_model, random_blocks, random_gguf = map(importlib.import_module, ("make_model", "random_blocks", "random_gguf"))


def make(monkeypatch, path, *argv):
    """What ``make_model.py argv -o path`` ends with."""
    monkeypatch.setattr(sys, "argv", ["make_model.py", *argv, "-o", str(path)])
    return make_model.main()


def tensors_of(path):
    """The reader's tensors by name."""
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def values(tensor):
    return ggml_types.dequantize(tensor.data, tensor.tensor_type.name)


# ---- blocks ----

@pytest.mark.parametrize("name", random_blocks.TYPES)
def test_blocks_have_the_deviation_asked_for(name):
    std, (n_values, n_bytes) = 0.025, random_blocks.block_of(name)
    blocks = random_blocks.random_blocks(name, std, 2048 * 256 // n_values, np.random.default_rng(1))
    if name in random_blocks.FLOATS:
        found = blocks.view(random_blocks.FLOATS[name]).astype(np.float64)
    else:
        assert (n_values, n_bytes) == ggml_types.size_of(name)
        found = ggml_types.dequantize(blocks, name).astype(np.float64)
    assert np.isfinite(found).all() and found.size == 2048 * 256
    assert abs(found.std() / std - 1) < 0.02
    assert abs(found.mean()) < 0.02 * std
    assert np.abs(found).max() < 8 * std
    assert len(np.unique(found)) > (1 if name == "Q1_0" else 2)


@pytest.mark.parametrize("asked, columns, got", [
    ("Q4_K", 2304, "Q4_K"), ("Q4_K", 128, "Q5_0"), ("Q2_K", 96, "Q4_0"), ("Q5_K", 128, "Q5_1"), ("Q6_K", 32, "Q8_0"),
    ("IQ4_XS", 128, "IQ4_NL"), ("Q8_0", 32, "Q8_0"), ("Q8_0", 48, "F16"), ("Q4_K", 48, "F16"), ("NVFP4", 96, "F16"),
    ("F32", 7, "F32"), ("BF16", 7, "BF16"),
])
def test_rows_that_a_type_does_not_divide(asked, columns, got):
    assert random_blocks.type_for(asked, columns) == got


# ---- files ----

def test_a_file(monkeypatch, tmp_path, capsys):
    path = tmp_path / "a.gguf"
    argv = ["--shape", "tiny", "--type", "Q4_K", "--map", "*_exps.weight=Q2_K", "--map", "output.weight=Q6_K"]
    assert make(monkeypatch, path, *argv) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
    said = capsys.readouterr().err
    assert "Q2_K does not divide rows of 96: 5 tensors are Q4_0, such as blk.1.ffn_down_exps.weight" in said
    found = tensors_of(path)
    config = make_model.Config.from_dict(make_model.TINY)
    assert len(found) == len(random_gguf.tensors_of(config))
    kinds = {name: t.tensor_type.name for name, t in found.items()}
    assert kinds["output.weight"] == "Q6_K" and kinds["token_embd.weight"] == kinds["blk.0.attn_q.weight"] == "Q4_K"
    assert kinds["blk.1.ffn_gate_exps.weight"] == "Q2_K" and kinds["blk.1.ffn_down_exps.weight"] == "Q4_0"
    assert kinds["blk.3.attn_k_b.weight"] == "Q5_0"
    plain = ("norm.weight", "conv1d", "ffn_gate_inp", "ssm_a", "ssm_dt", "exp_probs_b")
    assert {kinds[name] for name in found if any(part in name for part in plain)} == {"F32"}

    shapes = {name: t.shape.tolist() for name, t in found.items()}  # fastest first
    assert shapes["blk.3.attn_k_b.weight"] == [32, 64, 4] and shapes["blk.3.attn_v_b.weight"] == [64, 32, 4]
    assert shapes["blk.1.ffn_down_exps.weight"] == [96, 256, 8] and shapes["token_embd.weight"] == [256, 2048]
    assert shapes["blk.0.ssm_conv1d_q.weight"] == [4, 1, 128, 1] and shapes["blk.0.ssm_a"] == [1, 4, 1, 1]
    rate = found["blk.0.ssm_a"].data
    assert (rate <= -1).all() and (rate >= -16).all()
    for name, std in (("token_embd.weight", 1), ("output.weight", 1.2 / 16), ("blk.3.attn_k_b.weight", 1.2 / 8),
                      ("blk.1.ffn_down_exps.weight", 1.2 / 96**0.5)):
        assert abs(values(found[name]).std() / std - 1) < 0.05, name


def test_experts_and_rows_differ(monkeypatch, tmp_path):
    path = tmp_path / "a.gguf"
    make(monkeypatch, path, "--shape", "tiny", "--type", "Q8_0")
    found = tensors_of(path)
    for name in ("token_embd.weight", "blk.1.ffn_gate_exps.weight", "blk.2.ffn_gate_exps.weight"):
        rows = np.asarray(found[name].data).reshape(-1, found[name].data.shape[-1])
        assert len(np.unique(rows, axis=0)) == len(rows), name
    first, second = (np.asarray(found[f"blk.{i}.ffn_gate_exps.weight"].data) for i in (1, 2))
    assert not np.array_equal(first, second)


def test_the_same_seed_gives_the_same_bytes(monkeypatch, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(monkeypatch, tmp_path / f"{name}.gguf", "--shape", "small", "--type", "Q3_K", "--seed", str(seed))
    a, b, c = ((tmp_path / f"{name}.gguf").read_bytes() for name in "abc")
    assert a == b and a != c and len(a) == len(c)


def test_metadata_and_vocabulary(monkeypatch, tmp_path):
    path = tmp_path / "a.gguf"
    make(monkeypatch, path, "--shape", "small", "--type", "F16")
    fields = gguf.GGUFReader(path).fields
    at = "kimi-linear."
    assert fields["general.architecture"].contents() == "kimi-linear"
    assert fields[at + "attention.head_count_kv"].contents() == [0, 1]
    for key, value in (("block_count", 2), ("attention.key_length_mla", 192), ("attention.key_length", 320),
                       ("expert_gating_func", 2), ("leading_dense_block_count", 1), ("kda.head_dim", 128)):
        assert fields[at + key].contents() == value, key
    tokens, types = (fields[f"tokenizer.ggml.{x}"].contents() for x in ("tokens", "token_type"))
    assert len(tokens) == len(types) == len(set(tokens)) == 1024
    assert tokens[768:771] == ["[BOS]", "[EOS]", "<|im_end|>"] and types[767:771] == [1, 3, 3, 3]
    assert types[768 + 5] == 5 and tokens[768 + 5] == "[PAD773]" and types[768 + 13] == 4
    ranks = {token: i for i, token in enumerate(tokens[:768])}
    merges = fields["tokenizer.ggml.merges"].contents()
    assert len(merges) == 512
    for i, (left, right) in enumerate(merge.split(" ") for merge in merges):
        assert ranks[left + right] == 256 + i and max(ranks[left], ranks[right]) < 256 + i
    assert "<|im_middle|>" in fields["tokenizer.chat_template"].contents()


@pytest.mark.parametrize("type", [t for t in random_blocks.TYPES if t in gguf.GGMLQuantizationType.__members__])
@pytest.mark.parametrize("shape", ["k3-small", "glm-small", "qwen-small", "qwen35-small", "qwen35moe-small"])
def test_files_of_every_type_are_their_own_values(monkeypatch, tmp_path, shape, type):
    """Ours opens and runs them, and its logits are float64's on the values that gguf.quants reads."""
    path = tmp_path / "a.gguf"
    argv = ["--map", f"*.hc_*_fn.weight={type}"] if shape == "glm-small" else []
    assert make(monkeypatch, path, "--shape", shape, "--type", type, "--layers", "4", *argv) == 0
    checkpoint = open_checkpoint(path)
    raw = tensors_of(path)
    ids = np.random.default_rng(3).integers(0, 1024, 12)
    weights = {name: array_of(t) for name, t in checkpoint.tensors.items()}
    in_layer = {"k3-small": ("self_attn.o_proj.weight", "attn_output.weight"),
                "glm-small": ("hc_ffn_fn", "hc_ffn_fn.weight")}.get(shape, (
                    "linear_attn.out_proj.weight", "ssm_out.weight"))
    for name, stored in (("model.embed_tokens.weight", "token_embd.weight"),
                         tuple(at + x for at, x in zip(("model.layers.1.", "blk.1."), in_layer))):
        assert raw[stored].tensor_type.name == type and np.array_equal(weights[name], values(raw[stored])), name
    exact = reference_model.ReferenceModel(checkpoint.config, weights).forward(ids).logits
    logits = kl.Model.from_pretrained(path)(ids)
    error = (logits - exact) / np.sqrt((exact**2).mean())
    assert 0.3 < np.sqrt((exact**2).mean()) < 5
    assert np.sqrt((error**2).mean()) < 5e-6 and np.abs(error).max() < 1e-4


def test_qwen_files_are_read_as_the_shape(monkeypatch, tmp_path):
    """Config and tokenizer; special tokens where the config has them."""
    for shape, pre in (("qwen-small", "qwen2"), ("qwen35-small", "qwen35"), ("qwen35moe-small", "qwen35")):
        path = tmp_path / f"{shape}.gguf"
        make(monkeypatch, path, "--shape", shape, "--type", "Q8_0")
        checkpoint = open_checkpoint(path)
        told = make_model.Config.from_dict(make_model.SHAPES[shape][0])
        assert [getattr(checkpoint.config, x) == getattr(told, x) for x in (
            "model_type", "layers", "attn_heads", "rotary_dim", "rope_base", "gdn_v_heads", "moe_size", "shared_size",
            "tie_embeddings", "max_length")] == [True] * 10
        assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == pre
        tokenizer = checkpoint.tokenizer()
        assert tokenizer.encode("aaa<|im_end|>") == [*tokenizer.encode("aaa"), 770]


def test_a_glm_file_is_read_as_the_shape(monkeypatch, tmp_path):
    """With mixers of streams in float32 where no pattern names them, as llama.cpp's converter leaves them."""
    path = tmp_path / "a.gguf"
    make(monkeypatch, path, "--shape", "glm-small", "--type", "Q4_K", "--map", "blk.2.hc_attn_fn.weight=Q8_0")
    checkpoint, told = open_checkpoint(path), make_model.Config.from_dict(make_model.GLM_SMALL)
    differ = {key for key, value in vars(told).items() if getattr(checkpoint.config, key) != value}
    assert differ <= {"eos_token_ids", "rope_base", "extra"}, differ
    kinds = {name: t.tensor_type.name for name, t in tensors_of(path).items() if ".hc_" in name}
    assert kinds.pop("blk.2.hc_attn_fn.weight") == "Q8_0" and set(kinds.values()) == {"F32"}
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.pre"].contents() == "glm4" and "glm5next.rope.freq_base" not in fields
    assert checkpoint.tokenizer().encode("aaa<|user|>")[-1] == 777
    assert checkpoint.config.eos_token_ids == (770, 777, 779)


def test_published_qwen_sizes():
    """Parameters of the published models: 80 and 0.75 billion."""
    for shape, n, active in (("qwen3next-80b", 79.67e9, 3.87e9), ("qwen35-0.8b", 0.7524e9, 0.7524e9)):
        config = make_model.Config.from_dict(make_model.SHAPES[shape][0])
        sizes = {name: np.prod(x) for name, x in config.weight_shapes().items()}
        assert abs(sum(sizes.values()) / n - 1) < 0.001, sum(sizes.values())
        share = config.experts_per_token / config.n_experts if config.n_experts else 1
        found = sum(size * (share if ".experts." in name else 1) for name, size in sizes.items())
        assert abs(found / active - 1) < 0.01, found


@pytest.mark.parametrize("argv, sentence", [
    (["--type", "Q9_X"], "the type is 'Q9_X'; it must be one of F32"),
    (["--type", "F32", "--map", "blk.9*=F16"], "no matrix is named like blk.9*"),
    (["--vocab", "500"], "the vocabulary is 500; it must have 512 tokens"),
    (["--vocab", "100"], "the vocabulary is 100; it must have 512 tokens"),
    (["--shape", "qwen35-small", "--experts", "4"], "--experts is 4; qwen35-small has none"),
])
def test_what_cannot_be_made_is_said_and_leaves_no_file(monkeypatch, tmp_path, argv, sentence):
    assert sentence in make(monkeypatch, tmp_path / "a.gguf", "--shape", "small", *argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--layers", "--experts", "--vocab"])
def test_a_size_of_0_is_refused(monkeypatch, tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        make(monkeypatch, tmp_path / "a", option, "0")
    assert f"argument {option}: it is '0'; it must be an integer >= 1" in capsys.readouterr().err


def test_a_map_is_a_pattern_and_a_type(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        make(monkeypatch, tmp_path / "a.gguf", "--map", "Q2_K")
    assert "'Q2_K' is not PATTERN=TYPE" in capsys.readouterr().err
    assert "blocks need a .gguf name" in make(monkeypatch, tmp_path / "a", "--type", "Q2_K")


def test_the_big_one_is_as_large_as_said():
    """Of the published shape: experts Q2_K, head Q6_K, the rest Q4_K."""
    tensors = random_gguf.tensors_of(make_model.Config.from_dict(make_model.PUBLISHED))
    random_gguf.plan_types(tensors, "Q4_K", [("*_exps.weight", "Q2_K"), ("output.weight", "Q6_K")])
    assert abs(sum(t.nbytes for t in tensors) / 16.75e9 - 1) < 0.01
    assert sum(np.prod(t.shape) for t in tensors) == sum(
        np.prod(shape) for shape in make_model.Config.from_dict(make_model.PUBLISHED).weight_shapes().values())
