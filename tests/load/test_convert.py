"""``kl.convert``: there and back without a loss, llama.cpp's layout, types and fallbacks, and nothing half-written."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import gguf
import gguf_files
import ml_dtypes
import numpy as np
import pytest
from conftest import canonical_weights

import kimi_linear as kl
from kimi_linear.cli import main
from kimi_linear.convert import Conversion, Fallback
from kimi_linear.errors import FormatError
from kimi_linear.load import GGUFFile, MetaArray, gguf_kept, gguf_metadata, gguf_types, open_checkpoint
from kimi_linear.verify import verify

TEXT = "In the beginning God created the heaven. 123 x=\u00e9\u4e2d\u6587\n\n  <|im_end|><|tool_call_begin|>"


@pytest.fixture(scope="module", params=["tiny", "kimi-a", "kimi-b"])
def folder(request, tiny_dir, golden_dir):
    return tiny_dir if request.param == "tiny" else golden_dir / request.param


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def bytes_by_name(folder):
    return {name: (a.dtype, a.tobytes()) for name, a in canonical_weights(folder / "model.safetensors").items()}


def types_of(path):
    return {name: view.dtype for name, view in GGUFFile(path).items()}


def random_folder(tmp_path, golden_dir, name="random", change=None, **config):
    """A folder of kimi-a's config with other values; a value of None takes the key away."""
    d = read(golden_dir / "kimi-a" / "config.json")
    d = {key: value for key, value in (d | config).items() if value is not None}
    model = kl.Model.from_config(d, seed=3)
    if change is not None:
        change(model)
    model.save_pretrained(tmp_path / name)
    (tmp_path / name / "config.json").write_text(json.dumps(d))
    return tmp_path / name


def values_of(model, n=40):
    """Logits and state of a text."""
    state = model.new_state()
    ids = np.random.default_rng(5).integers(0, model.config.vocab_size, n)
    return model(ids, state=state).tobytes() + b"".join(np.asarray(a).tobytes() for _, a in state.items())


# ---- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back(tmp_path, folder, dtype):
    """A folder of one float type to a GGUF of it: the same model, and again the same bytes, every key."""
    kl.convert(folder, tmp_path / "first.gguf")
    start, end = tmp_path / "start", tmp_path / "end"
    kl.convert(tmp_path / "first.gguf", start, dtype=dtype)
    made = kl.convert(start, tmp_path / "x.gguf", type={"float32": "F32", "bfloat16": "BF16"}[dtype])
    kl.convert(tmp_path / "x.gguf", end)
    assert not made.fallbacks and made.requantised == 0
    assert bytes_by_name(end) == bytes_by_name(start)
    for name in ("config.json", "generation_config.json"):
        assert read(end / name) == read(start / name)
    models = [kl.Model.from_pretrained(path) for path in (start, tmp_path / "x.gguf", end)]
    assert len({values_of(model) for model in models}) == 1
    assert models[0].config == models[1].config == models[2].config
    assert models[0].generation_config == models[1].generation_config != {}


@pytest.mark.parametrize("type", [None, "F32"])
def test_a_published_folder_comes_back(tmp_path, folder, type):
    """Types that differ among its tensors, the shapes of A_log and of convolutions, every key of config.json."""
    kl.convert(folder, tmp_path / "x.gguf", type=type)
    kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    assert bytes_by_name(tmp_path / "back") == bytes_by_name(folder)
    files = [open_checkpoint(path).files[0] for path in (folder, tmp_path / "back")]
    shapes = [{name.replace("mlp", "block_sparse_moe"): view.shape for name, view in file.items()} for file in files]
    assert shapes[0] == shapes[1]
    for name in ("config.json", "generation_config.json"):
        assert read(tmp_path / "back" / name) == read(folder / name)
    if (folder / "tiktoken.model").is_file():
        a, b = (kl.Tokenizer.from_folder(path) for path in (folder, tmp_path / "back"))
        assert a.encode(TEXT) == b.encode(TEXT) and a.special_ids == b.special_ids and a._names == b._names
        assert a._skipped == b._skipped and a.chat_template == b.chat_template and a._bytes == b._bytes


def test_a_log_that_its_rate_does_not_give_back(tmp_path, golden_dir):
    """Near 0 the logarithm of a rounded rate is many units off: A_log is kept beside it."""
    near = np.float32([1e-5, -3e-4])

    def change(model):
        for name in [n for n in model.weights if n.endswith("A_log")]:
            model.weights[name] = near

    folder = random_folder(tmp_path, golden_dir, change=change)
    kl.convert(folder, tmp_path / "x.gguf")
    with pytest.raises(AssertionError):
        np.testing.assert_array_max_ulp(np.log(np.exp(near)), near, 2)
    kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    assert bytes_by_name(tmp_path / "back") == bytes_by_name(folder)
    assert values_of(kl.Model.from_pretrained(tmp_path / "x.gguf")) == values_of(kl.Model.from_pretrained(folder))

    tensor = open_checkpoint(tmp_path / "x.gguf").tensors["model.layers.0.self_attn.A_log"]
    other = dataclasses.replace(tensor, kept=np.float32([near[0], 1.0]))  # the rates were changed since
    back = other.array().astype(np.float32)
    assert back[0] == near[0]
    np.testing.assert_allclose(back[1], near[1], rtol=1e-3)


CONFIGS = {
    "latent_eps": {"latent_eps": 1e-5}, "a key that nobody knows": {"my_key": [1, {"a": 1.0}]},
    "more digits than float32": {"routed_scaling_factor": 2.4460000001},
    "softmax": {"moe_router_activation_func": "softmax"},
    "groups": {"num_expert_group": 2, "topk_group": 1}, "tied": {"tie_word_embeddings": True},
    "no end": {"eos_token_id": None, "bos_token_id": None}, "several ends": {"eos_token_id": [2, 5]},
    "all dense": {"mlp_layer_types": ["dense"] * 6},
    "low rank, one shared": {"q_lora_rank": 24, "moe_renormalize": False},
    "all KDA, a lower bound": {"layer_types": None, "linear_attn_config": {
        "head_dim": 16, "num_heads": 2, "short_conv_kernel_size": 4, "gate_lower_bound": -5.0,
        "kda_layers": [1, 2, 3, 4, 5, 6], "full_attn_layers": []}},
    "all MLA": {"layer_types": ["full_attention"] * 6, "linear_attn_config": None},
}


@pytest.mark.filterwarnings("ignore:config. unknown keys")
@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_of_a_config(tmp_path, golden_dir, name):
    folder = random_folder(tmp_path, golden_dir, **CONFIGS[name])
    kl.convert(folder, tmp_path / "x.gguf")
    kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    assert gguf_kept.same(read(tmp_path / "back" / "config.json"), read(folder / "config.json"))
    assert open_checkpoint(tmp_path / "x.gguf").config == open_checkpoint(folder).config
    assert values_of(kl.Model.from_pretrained(tmp_path / "x.gguf")) == values_of(kl.Model.from_pretrained(folder))


def test_a_key_that_changed_in_the_file_is_obeyed():
    """Only what the keys do not give is kept, so that a changed one is not overruled."""
    wanted = {"a": 1, "b": True, "c": None}
    kept = gguf_kept.differences({"a": 1, "b": 1, "d": 0}, wanted)
    metadata = {gguf_kept.CONFIG: kept[gguf_kept.CONFIG],
                gguf_kept.ABSENT: gguf_metadata.Values("", *kept[gguf_kept.ABSENT])}
    problems = []
    assert gguf_kept.same(gguf_kept.restored({"a": 1, "b": 1, "d": 0}, metadata, problems), wanted)
    assert gguf_kept.restored({"a": 7, "b": 1, "d": 0}, metadata, problems)["a"] == 7 and not problems


def test_a_key_that_would_be_lost_is_named(tmp_path, golden_dir, monkeypatch):
    folder = random_folder(tmp_path, golden_dir, latent_eps=1e-5)
    monkeypatch.setattr(gguf_kept, "differences", lambda given, wanted: {})
    with pytest.raises(ValueError, match="a GGUF cannot keep .*latent_eps"):
        kl.convert(folder, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize("key, value, words", [
    (gguf_kept.CONFIG, "[1]", "kimi_linear.config is a JSON list; it must be an object"),
    (gguf_kept.CONFIG, '{"a": ' + 70 * "[" + 70 * "]" + "}", "kimi_linear.config: its JSON is nested deeper than 64"),
    (gguf_kept.CONFIG, "{", "kimi_linear.config: it is not JSON"),
    (gguf_kept.CONFIG, 3, "kimi_linear.config is 3; it must be a JSON object in a string"),
    (gguf_kept.CONFIG, '{"vocab_size": 7}', "kimi-linear.vocab_size|output.weight"),
    (gguf_kept.ABSENT, "x", "kimi_linear.config.absent is 'x'; it must be an array of string"),
    (gguf_kept.GENERATION, "1", "kimi_linear.generation_config is a JSON int"),
    (gguf_kept.TYPES, '{"a": "Q4_0"}', "'a' is 'Q4_0'; it must be F32, F16 or BF16"),
    (gguf_kept.RATES, [1.0, 2.0], "kimi_linear.A_log is an array of float32; it must be an array of 8 float32"),
])
def test_kept_keys_of_a_strange_file(tmp_path, golden_dir, key, value, words):
    def more(writer):
        add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}
        add[type(value)](key, value)

    path = gguf_files.write(tmp_path / "x.gguf", golden_dir / "kimi-a", more=more)
    with pytest.raises(FormatError, match=words):
        kl.Model.from_pretrained(path)


# ---- llama.cpp's layout ----------------------------------------------------------------------------


@pytest.mark.parametrize("type", list(gguf_files.TYPES))
def test_the_layout_is_the_converters(tmp_path, folder, type):
    """Every tensor, and every key but one, as the `gguf` package and the converter's rules give them."""
    kl.convert(folder, tmp_path / "ours.gguf", type=type)
    gguf_files.write(tmp_path / "theirs.gguf", folder, type)
    ours, theirs = GGUFFile(tmp_path / "ours.gguf"), GGUFFile(tmp_path / "theirs.gguf")
    assert {n: (v.shape, v.dtype) for n, v in ours.items()} == {n: (v.shape, v.dtype) for n, v in theirs.items()}
    for name, view in theirs.items():
        mine = ours[name]
        assert ours.mapping[mine.offset : mine.offset + mine.nbytes] \
            == theirs.mapping[view.offset : view.offset + view.nbytes], name

    def plain(value):
        return list(value.values()) if isinstance(value, MetaArray) else value

    for key, value in theirs.metadata.items():
        if key != "kimi-linear.attention.value_length":  # theirs of February, from head_dim
            assert plain(ours.metadata[key]) == plain(value), key
    assert ours.metadata["general.file_type"] == gguf.LlamaFileType[
        "ALL_F32" if type == "F32" else "MOSTLY_MXFP4_MOE" if type == "MXFP4" else f"MOSTLY_{type}"]


def test_file_types_are_llama_cpps():
    names = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_S", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S",
             "MXFP4": "MOSTLY_MXFP4_MOE"}
    known = {t.name: t.value for t in gguf.LlamaFileType} | {"MOSTLY_Q2_0": 41}  # younger than gguf 0.19: llama.h
    for type, number in gguf_metadata.FILE_TYPES.items():
        if type not in ("Q3_K", "IQ3_S"):
            assert known[names.get(type, f"MOSTLY_{type}")] == number, type
    assert set(gguf_types.WRITABLE) <= set(gguf_metadata.FILE_TYPES)


def test_merges():
    """The two parts a token is built from last; none where merging leaves three."""
    tokens = [bytes([b]) for b in range(256)] + [b"ab", b"bc", b"abc", b"xyz", b"\x00\n", b"abab"]
    found = gguf_metadata.merges(tokens)
    assert found == ["a b", "b c", "ab c", "\u0100 \u010a", "ab ab"]


def test_merges_of_the_packaged_model_rebuild_its_tokens(tiny_dir):
    tokenizer = kl.Tokenizer.from_folder(tiny_dir)
    base = [tokenizer.id_to_bytes(i) for i in range(tokenizer.n_base)]
    parts = [line.split(" ") for line in gguf_metadata.merges(base)]
    words = list(map(gguf_metadata.spelled, base))
    built = [a + b for a, b in parts]
    assert built == [w for w in words if w in set(built)]  # in the order of their ranks
    assert len(built) == len(base) - 256 and all(a in words and b in words for a, b in parts)


def test_special_tokens_that_decoding_shows(tmp_path, tiny_dir):
    """A name that skipping keeps is a user's token, but for those of tool calls, which llama.cpp has as control."""
    ranks = {bytes([b]): b for b in range(256)}
    special = {f"<|reserved_token_{i}|>": i for i in range(259, 512)}
    special = {"[BOS]": 256, "<|think|>": 257, "<|tool_call_begin|>": 258} | special
    skipped = set(special.values()) - {257, 258}
    tokenizer = kl.Tokenizer(ranks, special, skipped=skipped, bos="[BOS]", chat_template="{{ 1 }}")
    keys = gguf_metadata.vocabulary_keys(tokenizer, 512)
    kinds = keys["tokenizer.ggml.token_type"][1]
    assert kinds[255:260] == [1, 3, 4, 3, 5] and keys["tokenizer.ggml.tokens"][1][258:260] == [
        "<|tool_call_begin|>", "[PAD259]"]
    assert keys["tokenizer.ggml.bos_token_id"] == 256 and "tokenizer.ggml.eos_token_id" not in keys
    metadata = {key: gguf_metadata.Values(key, *v) if isinstance(v, tuple) else v for key, v in keys.items()}
    gguf_metadata._check_tokenizer(tokenizer, metadata)
    hidden = kl.Tokenizer(ranks, special, bos="[BOS]", chat_template="{{ 1 }}")  # skips a token of tools
    with pytest.raises(ValueError, match="tokens that decoding leaves out cannot be kept"):
        gguf_metadata._check_tokenizer(hidden, metadata)


# ---- types -----------------------------------------------------------------------------------------


def test_types_by_pattern(tmp_path, tiny_dir):
    made = kl.convert(tiny_dir, tmp_path / "x.gguf", type="Q4_0", types=[
        "output.weight=Q6_K", ("blk.0.*", "F16"), "blk.*.ffn_down*=q5_0", "blk.1.*=Q8_0"])
    types = types_of(tmp_path / "x.gguf")
    assert types["output.weight"] == "Q6_K" and types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.1.ffn_down_exps.weight"] == "Q5_0" and types["blk.1.ffn_up_exps.weight"] == "Q8_0"
    assert types["blk.2.ffn_up_exps.weight"] == "Q4_0" and types["token_embd.weight"] == "Q4_0"
    kept = {n for n, v in GGUFFile(tmp_path / "x.gguf").items() if gguf_types.stays_float32(n, len(v.shape))}
    assert {n for n, t in types.items() if t == "F32"} == kept and len(kept) == 49
    assert {"blk.0.ssm_a", "blk.0.ssm_conv1d_q.weight", "blk.1.ffn_gate_inp.weight", "blk.1.exp_probs_b.bias",
            "blk.0.ssm_dt.bias", "blk.0.ssm_norm.weight", "output_norm.weight"} <= kept
    counts = {t: list(types.values()).count(t) for t in types.values()}
    assert {name: n for name, (n, _) in made.types.items()} == counts


@pytest.mark.parametrize("type, cols, used", [
    ("Q2_K", 96, "Q4_0"), ("Q3_K", 96, "Q4_0"), ("Q4_K", 96, "Q5_0"), ("Q5_K", 96, "Q5_1"), ("Q6_K", 96, "Q8_0"),
    ("IQ4_XS", 96, "IQ4_NL"), ("TQ1_0", 96, "Q4_0"), ("TQ2_0", 96, "Q4_0"), ("Q2_0", 96, "Q4_0"), ("Q2_0", 192, "Q2_0"),
    ("Q2_0", 48, "F16"), ("Q1_0", 192, "F16"), ("Q1_0", 384, "Q1_0"), ("Q4_K", 48, "F16"), ("Q8_0", 48, "F16"),
    ("MXFP4", 48, "F16"), ("BF16", 48, "BF16"), ("Q4_K", 512, "Q4_K"), ("Q8_0", 96, "Q8_0")])
def test_fallback(type, cols, used):
    assert gguf_types.fitting(type, cols) == used


def test_fallbacks_are_told_once(tmp_path, golden_dir):
    made = kl.convert(golden_dir / "kimi-b", tmp_path / "x.gguf", type="Q4_K")
    assert made.fallbacks == [Fallback("Q4_K", "F16", 63), Fallback("Q4_K", "Q5_0", 2)]
    assert "fallback Q4_K -> Q5_0: 2 tensors have rows that Q4_K does not divide" in str(made).splitlines()


@pytest.mark.parametrize("type", ["Q4_K", "Q8_0", "BF16"])
def test_from_a_gguf_as_from_the_folder(tmp_path, tiny_dir, type):
    """A float file quantised is the file that the folder gives, metadata and all."""
    kl.convert(tiny_dir, tmp_path / "f32.gguf", type="F32")
    a = kl.convert(tmp_path / "f32.gguf", tmp_path / "a.gguf", type=type)
    b = kl.convert(tiny_dir, tmp_path / "b.gguf", type=type)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert a.fallbacks == b.fallbacks and a.requantised == 0
    assert kl.convert(tmp_path / "a.gguf", tmp_path / "c.gguf", type="Q4_0").requantised == {
        "Q4_K": 81, "Q8_0": 81, "BF16": 0}[type]


@pytest.mark.parametrize("form", [{"legacy_kv_b": True}, {"fused": True}, {"conv_axes": 2}], ids=str)
def test_a_foreign_file_keeps_its_form(tmp_path, golden_dir, form):
    """Split, older, fused: its tensors and its own keys are as they were, in one file."""
    folder = golden_dir / "kimi-a"
    parts = [gguf_files.write(tmp_path / f"x-{i + 1:05d}-of-00002.gguf", folder, split=(i, 2),
                              more=lambda w: w.add_int16("strange.key", -3), **form) for i in range(2)]
    kl.convert(parts[1], tmp_path / "y.gguf", types={"blk.0.*": "Q8_0"})
    file = GGUFFile(tmp_path / "y.gguf")
    assert file.metadata["strange.key"] == -3 and not [key for key in file.metadata if key.startswith("split.")]
    stored = {name: view for part in parts for name, view in GGUFFile(part).items()}
    assert list(file) == list(stored)
    for name, view in stored.items():
        if file[name].dtype == view.dtype:
            assert file[name].array().tobytes() == view.array().tobytes()
        else:
            assert file[name].dtype in ("Q8_0", "F16") and name.startswith("blk.0.")
    kl.Model.from_pretrained(tmp_path / "y.gguf")
    kl.convert(tmp_path / "y.gguf", tmp_path / "back")  # it says nothing of a folder's types
    types = {name: view.dtype for name, view in open_checkpoint(tmp_path / "back").tensors.items()}
    assert types["model.layers.0.self_attn.q_proj.weight"] == "BF16"
    assert types["model.layers.1.self_attn.q_proj.weight"] == "F32" == types["model.norm.weight"]


def test_dtype_of_a_folder(tmp_path, tiny_dir):
    kl.convert(tiny_dir, tmp_path / "x.gguf", type="Q8_0")
    kl.convert(tmp_path / "x.gguf", tmp_path / "half", dtype="float16")
    assert {str(a.dtype) for a in canonical_weights(tmp_path / "half" / "model.safetensors").values()} == {"float16"}
    assert read(tmp_path / "half" / "config.json") == read(tiny_dir / "config.json") | {"dtype": "float16"}
    values = kl.Model.from_pretrained(tmp_path / "x.gguf").weights["model.layers.0.self_attn.q_proj.weight"]
    back = kl.Model.from_pretrained(tmp_path / "half").weights["model.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(values.astype(np.float16), back)


# ---- what the files compute ------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["F32", "BF16"])
def test_float_files_are_the_folder(tmp_path, tiny_dir, type):
    kl.convert(tiny_dir, tmp_path / "x.gguf", type=type)
    assert values_of(kl.Model.from_pretrained(tmp_path / "x.gguf"), 130) == values_of(kl.Model.tiny(), 130)


@pytest.mark.parametrize("type", ["Q8_0", "Q4_K", "Q2_K"])
def test_quantised_files_are_float64_on_their_values(tmp_path, tiny_dir, type):
    """The engine on blocks, beside the float64 model on the values that `gguf` reads from them."""
    kl.convert(tiny_dir, tmp_path / "x.gguf", type=type)
    model = kl.Model.from_pretrained(tmp_path / "x.gguf", activations="float32")
    tensors = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    read = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in tensors}
    for name, stored in (("model.layers.0.self_attn.q_proj.weight", read["blk.0.attn_q.weight"]),
                         ("model.layers.2.block_sparse_moe.experts.5.w2.weight", read["blk.2.ffn_down_exps.weight"][5]),
                         ("lm_head.weight", read["output.weight"])):
        assert model.weights[name].tobytes() == stored.tobytes()
    report = verify(model, np.random.default_rng(2).integers(0, model.config.vocab_size, 40))
    assert report.ok, str(report)
    assert report.worst_rms.total_rms < 5e-6


# ---- refusals --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory, golden_dir):
    path = tmp_path_factory.mktemp("file") / "a.gguf"
    kl.convert(golden_dir / "kimi-a", path)
    return path


@pytest.mark.parametrize("source, target, options, error, words", [
    ("file", "x.gguf", {"type": "Q9_K"}, ValueError, "type is 'Q9_K'; it must be one of F32, F16, BF16, Q4_0"),
    ("file", "x.gguf", {"type": "IQ2_S"}, ValueError, "type is 'IQ2_S'; it can be read but not written"),
    ("file", "x.gguf", {"types": ["blk.0=Q1"]}, ValueError, "the type of the rule 'blk.0=Q1' is 'Q1'"),
    ("file", "x.gguf", {"types": ["Q4_0"]}, ValueError, "the rule 'Q4_0' must be PATTERN=TYPE"),
    ("file", "x.gguf", {"types": ["blk.77.*=Q4_0"]}, ValueError, "'blk.77.*' decides no tensor"),
    ("file", "x.gguf", {"types": ["*_norm.weight=Q4_0"]}, ValueError, "'\\*_norm.weight' decides no tensor"),
    ("file", "x.gguf", {"dtype": "float32"}, ValueError, "dtype is 'float32', and the target a GGUF"),
    ("file", "x", {"type": "Q4_0"}, ValueError, "is a folder; a GGUF must end in .gguf"),
    ("file", "x", {"dtype": "int8"}, ValueError, "dtype is 'int8'; it must be auto, float32"),
    ("folder", "x", {}, ValueError, "it must be a file that ends in .gguf"),
    ("file", "there.gguf", {}, FileExistsError, "there.gguf is there; overwrite=True"),
    ("file", "is.gguf", {}, FileExistsError, "is.gguf is a folder"),
    ("file", "full", {}, FileExistsError, "full holds a checkpoint"),
    ("file", "no/x.gguf", {}, FileNotFoundError, "there is no folder"),
    ("no such", "x.gguf", {}, FileNotFoundError, "no such"),
])
def test_refusals(tmp_path, golden_dir, file, source, target, options, error, words):
    (tmp_path / "there.gguf").write_bytes(b"x")
    (tmp_path / "is.gguf").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    source = {"file": file, "folder": golden_dir / "kimi-a"}.get(source, source)
    with pytest.raises(error, match=words):
        kl.convert(source, tmp_path / target, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_is_saved_before_it_is_converted(tmp_path):
    model = kl.Model.tiny()
    with pytest.raises(TypeError, match="source is a Model; it must be a path, such as a folder that model.save_pret"):
        kl.convert(model, tmp_path / "x.gguf")
    name = "model.layers.1.self_attn.q_proj.weight"
    model.weights[name] = model.weights[name].astype(np.float32) * np.float32(1.1)
    model.save_pretrained(tmp_path / "folder")
    kl.convert(tmp_path / "folder", tmp_path / "x.gguf")
    logits = kl.Model.from_pretrained(tmp_path / "x.gguf").forward([5, 6, 7])
    assert logits.tobytes() == model.forward([5, 6, 7]).tobytes()


def test_overwrite(tmp_path, file):
    (tmp_path / "x.gguf").write_bytes(b"x")
    kl.convert(file, tmp_path / "x.gguf", overwrite=True)
    assert (tmp_path / "x.gguf").stat().st_size == file.stat().st_size
    with pytest.raises(FileExistsError, match="the source itself"):
        kl.convert(tmp_path / "x.gguf", tmp_path / "x.gguf", overwrite=True)


def test_a_pattern_of_dense_layers_without_a_key(tmp_path, golden_dir):
    kinds = ["dense", "sparse", "dense", "sparse", "sparse", "sparse"]
    folder = random_folder(tmp_path, golden_dir, mlp_layer_types=kinds)
    with pytest.raises(ValueError, match="layer 2 is dense behind the sparse layer 1"):
        kl.convert(folder, tmp_path / "x.gguf")


@pytest.mark.parametrize("value, type, words", [
    (np.nan, "Q4_0", r"blk.0.attn_q.weight as Q4_0: x\[0, 3\] is nan; it must be finite"),
    (1e6, "F16", "blk.0.attn_q.weight as F16: it holds 1000000.0, which F16 cannot"),
])
def test_values_that_a_type_cannot_hold(tmp_path, golden_dir, value, type, words):
    def change(model):
        w = np.array(model.weights["model.layers.0.self_attn.q_proj.weight"])
        w[0, 3] = value
        model.weights["model.layers.0.self_attn.q_proj.weight"] = w

    folder = random_folder(tmp_path, golden_dir, change=change)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=words):
        kl.convert(folder, tmp_path / "x.gguf", type=type)
    assert sorted(tmp_path.iterdir()) == before
    kl.convert(folder, tmp_path / "x.gguf")  # as they are
    if value == 1e6:
        with pytest.raises(ValueError, match="layers.0.self_attn.q_proj.weight as F16: it holds 1000000.0, which F16"):
            kl.convert(tmp_path / "x.gguf", tmp_path / "half", dtype="float16")
        assert not (tmp_path / "half").exists()


def test_values_that_are_not_finite_are_copied_and_told(tmp_path, golden_dir, capfd):
    """There and back; blocks refuse them. Of an infinite gain of a norm, and of a matrix with NaN."""
    names = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.input_layernorm.weight"

    def change(model):
        for name, at, value in ((names[0], np.s_[0, 3:5], np.nan), (names[1], np.s_[2], -np.inf)):
            w = np.array(model.weights[name])
            w[at] = value
            model.weights[name] = w

    folder = random_folder(tmp_path, golden_dir, change=change)
    capfd.readouterr()
    assert main(["convert", str(folder), str(tmp_path / "x.gguf")]) == 0
    says = "warning: values that are NaN or infinite are copied as they are: "
    assert capfd.readouterr().err == f"{says}blk.0.attn_q.weight has 2, blk.1.attn_norm.weight has 1\n"
    found = kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    assert found.not_finite == {names[0]: 2, names[1]: 1} and found.to_dict()["not_finite"] == found.not_finite
    found = kl.convert(tmp_path / "x.gguf", tmp_path / "half.gguf", types={"blk.0.attn_q.weight": "BF16"})
    assert found.not_finite == {"blk.0.attn_q.weight": 2, "blk.1.attn_norm.weight": 1}
    with pytest.raises(ValueError, match=r"blk.0.attn_q.weight as Q8_0: x\[0, 3\] is nan; it must be finite"):
        kl.convert(tmp_path / "x.gguf", tmp_path / "q.gguf", type="Q8_0")


@pytest.mark.parametrize("dtype, held", [("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_what_is_finite_is_not_counted(dtype, held):
    largest = ml_dtypes.finfo(held).max
    values = np.array([0, -0.0, 1, largest, -largest, ml_dtypes.finfo(held).smallest_subnormal], held)
    found = Conversion("x")
    found.look_at("a", dtype, values.view(np.uint8))
    assert found.not_finite == {} and found.warning == ""
    for _ in range(2):
        found.look_at("a", dtype, np.array([np.nan, 1, np.inf, -np.inf, -np.nan], held).view(np.uint8))
    assert found.not_finite == {"a": 8}
    found.look_at("a", "Q8_0", np.full(34, 255, np.uint8))
    assert found.not_finite == {"a": 8} and not found.warning.endswith("more tensors have some")


def test_a_tokenizer_larger_or_smaller_than_the_model(tmp_path, tiny_dir):
    folder = tmp_path / "wide"
    config = read(tiny_dir / "config.json") | {"vocab_size": 2052}
    kl.Model.from_config(config).save_pretrained(folder)
    for name in ("tiktoken.model", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((tiny_dir / name).read_bytes())
    kl.convert(folder, tmp_path / "x.gguf")
    model = kl.Model.from_pretrained(tmp_path / "x.gguf")
    assert model.tokenizer.encode(TEXT) == kl.Model.tiny().tokenizer.encode(TEXT)
    kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    assert read(tmp_path / "back" / "config.json") == read(folder / "config.json")
    tokenizer = kl.Tokenizer.from_folder(tiny_dir)
    with pytest.raises(ValueError, match="the tokenizer has 2048 tokens, and config.json a vocabulary of 2000"):
        gguf_metadata.vocabulary_keys(tokenizer, 2000)


# ---- whole or not at all ---------------------------------------------------------------------------


def test_a_disk_that_is_too_small(tmp_path, file, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for target in ("x.gguf", "x"):
        with pytest.raises(OSError, match="1,000 are free") as caught:
            kl.convert(file, tmp_path / target)
        assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["x.gguf", "x"])
def test_interrupted(tmp_path, file, target):
    def stop(done, total, name):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kl.convert(file, tmp_path / target, progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_source_that_changes_meanwhile(tmp_path, file):
    source = tmp_path / "source.gguf"
    source.write_bytes(file.read_bytes())
    with pytest.raises(FormatError, match="changed after it was opened"):
        kl.convert(source, tmp_path / "x.gguf", progress=lambda *_: os.utime(source, (1, 1)))
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def child(code, *argv):
    script = "import sys, time\nimport kimi_linear as kl\n" + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", script, *map(str, argv)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("target", ["x.gguf", "x"])
def test_killed(tmp_path, file, target):
    """SIGKILL in the middle leaves nothing under the final name, and what was there before."""
    if target == "x.gguf":
        (tmp_path / target).write_bytes(b"before")
    process = child("""
        def wait(done, total, name):
            if done > total // 2:
                print("half", flush=True)
                time.sleep(60)
        kl.convert(sys.argv[1], sys.argv[2], overwrite=True, progress=wait)
    """, file, tmp_path / target)
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if target == "x.gguf":
        assert (tmp_path / target).read_bytes() == b"before"
    else:
        assert all(path.name.startswith(".") for path in (tmp_path / target).iterdir())
    kl.convert(file, tmp_path / target, overwrite=True)
    kl.Model.from_pretrained(tmp_path / target)


def test_a_write_that_fails(tmp_path, file):
    """The system's own error, by a limit on the size of files: it names the file, which is gone."""
    process = child("""
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            kl.convert(sys.argv[1], sys.argv[2])
        except OSError as error:
            print(error.errno, error.filename)
    """, file, tmp_path / "x.gguf")
    out, err = process.communicate()
    assert out == f"{errno.EFBIG} {tmp_path / 'x.gguf'}\n", err
    assert not list(tmp_path.iterdir())


def test_constant_memory(tmp_path, golden_dir):
    """No part is larger than VALUES, whatever the tensor: rows of a stacked tensor come one piece at a time."""
    from kimi_linear.load import gguf_tensors

    view = next(iter(open_checkpoint(golden_dir / "kimi-a").tensors.values()))
    pieces = list(gguf_tensors.rows_of(view))
    assert len(pieces) == 1
    old, gguf_tensors.VALUES = gguf_tensors.VALUES, 1000
    try:
        pieces = list(gguf_tensors.rows_of(view))
        kl.convert(golden_dir / "kimi-a", tmp_path / "x.gguf", type="Q8_0")
    finally:
        gguf_tensors.VALUES = old
    assert len(pieces) > 10 and all(np.prod(piece.shape) <= 1000 for piece in pieces)
    assert b"".join(p.array().tobytes() for p in pieces) == view.array().tobytes()
    kl.convert(golden_dir / "kimi-a", tmp_path / "y.gguf", type="Q8_0")
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()


def test_bfloat16_overflow_is_refused(tmp_path):
    from kimi_linear.load.gguf_tensors import encoded

    x = np.float32([[3.4e38, 1.0]])
    with pytest.raises(ValueError, match="which BF16 cannot"):
        encoded(x, "BF16", 2)
    infinite = np.float32([[np.inf, 1.0]])
    assert encoded(infinite, "BF16", 2).tobytes() == infinite.astype(ml_dtypes.bfloat16).tobytes()
