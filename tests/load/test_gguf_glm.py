"""GLM-5.3-Flash in GGUF: there and back without a loss, files of other converters, types, contradictions."""

import json
from dataclasses import replace

import gguf_glm_files as glm
import ml_dtypes
import numpy as np
import pytest
from conftest import read_safetensors

import kimi_linear as kl
from kimi_linear.config import Config
from kimi_linear.errors import FormatError
from kimi_linear.load import GGUFFile, MetaArray, gguf_kept, open_checkpoint, write_safetensors
from kimi_linear.load.safetensors import array_of
from kimi_linear.reference_model import ReferenceModel
from kimi_linear.verify import verify


@pytest.fixture(scope="module")
def glm_a(golden_dir):
    return golden_dir / "glm-a"


@pytest.fixture(scope="module", params=["glm-a", "glm-b"])
def folder(request, golden_dir, tmp_path_factory):
    """glm-a; and what glm-b has besides, with its dense layers in front, where a GGUF can have them, in bfloat16."""
    if request.param == "glm-a":
        return golden_dir / "glm-a"
    content = json.loads((golden_dir / "glm-b" / "config.json").read_text())
    content["text_config"]["mlp_layer_types"] = ["dense", "dense", "sparse", "sparse"]
    return random_folder(tmp_path_factory.mktemp("glm") / "b", content)


@pytest.fixture(scope="module")
def ours(tmp_path_factory, glm_a):
    path = tmp_path_factory.mktemp("glm") / "ours.gguf"
    kl.convert(glm_a, path)
    return path


def random_folder(path, content, seed=3):
    """A folder of that config.json, with the names of a model that sees where it is one; in bfloat16."""
    config, rng = Config.from_dict(content), np.random.default_rng(seed)
    inside = "text_config" in content
    path.mkdir()
    (path / "config.json").write_text(json.dumps(content))
    tensors = {}
    for name, shape in config.weight_shapes().items():
        shape = (shape[0], 1, shape[1]) if name.endswith("conv1d.weight") else shape
        name = name.replace("model.", "model.language_model.") if inside else name
        tensors[name] = (("norm" in name) + rng.normal(0, 0.1, shape)).astype(ml_dtypes.bfloat16)
    write_safetensors(path / "model.safetensors", tensors)
    return path


def read(path):
    return json.loads((path / "config.json").read_text())


def assert_same_folder(a, b):
    """The same tensors of the text model, their bytes, shapes and types, and the same config.json."""
    assert read(a) == read(b)
    x, y = (read_safetensors(path / "model.safetensors") for path in (a, b))
    x = {name: w for name, w in x.items() if not name.startswith("model.visual.")}
    assert x.keys() == y.keys()
    for name in x:
        assert (x[name].dtype, x[name].shape) == (y[name].dtype, y[name].shape), name
        assert x[name].tobytes() == y[name].tobytes(), name


def problems_of(path):
    with pytest.raises(FormatError) as caught:
        open_checkpoint(path)
    return caught.value.problems


def assert_tensors(checkpoint, folder, ulp=0):
    """Each array is the folder's; of A_log the rate, a float32 in the file, to so many units."""
    wanted = open_checkpoint(folder).tensors
    assert list(checkpoint.tensors) == list(wanted)
    for name, tensor in checkpoint.tensors.items():
        is_log = name.endswith("A_log")
        got, want = ((gguf_kept.rate_of(x) if is_log else x.astype(np.float32))
                     for x in (array_of(tensor), wanted[name].array()))
        assert got.shape == want.shape, name
        np.testing.assert_array_max_ulp(got, want, ulp if is_log else 0)


# ---- there and back --------------------------------------------------------------------------------


def test_there_and_back(tmp_path, folder):
    made = kl.convert(folder, tmp_path / "x.gguf")
    assert not made.fallbacks and not made.requantised
    kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    assert_same_folder(folder, tmp_path / "back")
    a, b = open_checkpoint(folder), open_checkpoint(tmp_path / "x.gguf")
    assert a.config == b.config == open_checkpoint(tmp_path / "back").config and b.config.streams
    assert_tensors(b, folder)
    kl.convert(tmp_path / "back", tmp_path / "again.gguf")
    x, y = ({name: view.array().tobytes() for name, view in GGUFFile(tmp_path / name).items()}
            for name in ("x.gguf", "again.gguf"))
    assert x == y


def test_the_text_model_alone(tmp_path, glm_a):
    """Its own config.json, without the names of a model that sees."""
    source = random_folder(tmp_path / "a", Config.from_dict(read(glm_a)).to_dict() | {"dtype": "bfloat16"})
    kl.convert(source, tmp_path / "x.gguf")
    kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    assert_same_folder(source, tmp_path / "back")
    assert gguf_kept.AROUND not in GGUFFile(tmp_path / "x.gguf").metadata


def test_what_no_key_has(tmp_path, glm_a):
    """Keys around the text model, a count of layers behind it, and epsilons; one that is None inside stays so."""
    content = read(glm_a)
    content["text_config"] |= {"num_nextn_predict_layers": 1, "l2_eps": 1e-5, "latent_eps": 3e-6, "index_eps": 1e-5,
                               "pad_token_id": None, "torch_dtype": "bfloat16"}
    del content["text_config"]["eos_token_id"]
    content |= {"eos_token_id": [2, 3], "anything": {"a": [1, None]}}
    with pytest.warns(UserWarning, match="anything"):
        source = random_folder(tmp_path / "a", content)
        kl.convert(source, tmp_path / "x.gguf")
        config = open_checkpoint(tmp_path / "x.gguf").config
        kl.convert(tmp_path / "x.gguf", tmp_path / "back")
        assert_same_folder(source, tmp_path / "back")
    assert (config.l2_eps, config.latent_eps, config.index_eps, config.eos_token_ids) == (1e-5, 3e-6, 1e-5, (2, 3))


@pytest.mark.parametrize("layers", ["linear_attention", "indexed_attention"])
def test_all_layers_of_one_kind(tmp_path, glm_a, layers):
    content = Config.from_dict(read(glm_a)).to_dict()
    content |= {"layer_types": [layers] * 5, "mlp_layer_types": ["dense"] * 5, "n_routed_experts": 0,
                "swiglu_limit": 0, "dtype": "bfloat16"}
    source = random_folder(tmp_path / "a", content)
    kl.convert(source, tmp_path / "x.gguf")
    kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    assert_same_folder(source, tmp_path / "back")
    config = open_checkpoint(tmp_path / "x.gguf").config
    assert config == open_checkpoint(source).config and config.swiglu_limit is None


def test_dense_layers_that_are_no_prefix(tmp_path, golden_dir):
    with pytest.raises(ValueError, match="layer 1 is dense behind the sparse layer 0"):
        kl.convert(golden_dir / "glm-b", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_a_key_that_would_be_lost_is_named(tmp_path, glm_a, monkeypatch):
    monkeypatch.setattr(gguf_kept, "differences", lambda given, wanted: {})
    with pytest.raises(ValueError, match=r"a GGUF cannot keep .*text_config\.attention_dropout"):
        kl.convert(glm_a, tmp_path / "x.gguf")


def test_keys_around_that_are_wrong(tmp_path, glm_a, monkeypatch):
    taken_out = gguf_kept.taken_out
    monkeypatch.setattr(gguf_kept, "taken_out", lambda content: (taken_out(content)[0], {
        "model_type": "glm5_next", "text_config": ["vocab_size"]}))
    with pytest.raises(FormatError, match=r'text_config is \[.vocab_size.\]; it must be a list of tie_word_embeddings'):
        kl.convert(glm_a, tmp_path / "x.gguf")


# ---- the layout and types --------------------------------------------------------------------------


def test_the_layout_is_the_converters(tmp_path, folder):
    """Every tensor and every key as the rules give them, written a second time in gguf_glm_files.py."""
    kl.convert(folder, tmp_path / "ours.gguf", type="F32")
    mine, other = GGUFFile(tmp_path / "ours.gguf"), GGUFFile(glm.write(tmp_path / "theirs.gguf", folder))
    assert {n: (v.shape, v.dtype) for n, v in mine.items()} == {n: (v.shape, v.dtype) for n, v in other.items()}
    for name, view in other.items():
        assert mine[name].array().tobytes() == view.array().tobytes(), name

    def plain(value):
        return list(value.values()) if isinstance(value, MetaArray) else value

    assert {key for key in mine.metadata if key.startswith("glm5next.")} \
        == {key for key in other.metadata if key.startswith("glm5next.")}
    for key, value in other.metadata.items():
        assert plain(mine.metadata[key]) == plain(value), key


@pytest.mark.parametrize("source", ["folder", "file"])
def test_what_stays_float32(tmp_path, glm_a, ours, source):
    """What mixes streams and what weighs and pools the indexer's keys is never in blocks; its projections are."""
    kl.convert({"folder": glm_a, "file": ours}[source], tmp_path / "x.gguf", type="Q8_0")
    types = {}
    for name, view in GGUFFile(tmp_path / "x.gguf").items():
        types.setdefault(name.split(".", 2)[-1], set()).add(view.dtype)
    single = {name for name, kinds in types.items() if kinds == {"F32"}}
    assert {*glm.EXACT, "hc_attn_base.weight", "hc_ffn_scale.weight", "indexer.k_norm.weight", "indexer.k_norm.bias",
            "exp_probs_b.bias", "ffn_gate_inp.weight", "ssm_a", "ssm_dt.bias", "ssm_conv1d_q.weight"} <= single
    assert types["attn_q_a.weight"] == types["indexer.attn_k.weight"] == {"F16"}  # rows of 48, no multiple of 32
    assert types["attn_output.weight"] == {"Q8_0", "F16"}
    with pytest.raises(ValueError, match=r"the pattern '\*hc_attn_fn\*' decides no tensor"):
        kl.convert(glm_a, tmp_path / "y.gguf", types={"*hc_attn_fn*": "Q8_0"})


# ---- files of others -------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", glm.ARCHITECTURES)
@pytest.mark.parametrize("nextn", [0, 1])
def test_a_file_of_another_converter(tmp_path, folder, architecture, nextn):
    path = glm.write(tmp_path / "x.gguf", folder, architecture=architecture, nextn=nextn)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == open_checkpoint(folder).config
    assert_tensors(checkpoint, folder)
    n = checkpoint.config.n_layers
    assert bool(checkpoint.skipped) == bool(nextn) and all(x.startswith(f"blk.{n}.") for x in checkpoint.skipped)
    kl.convert(path, tmp_path / "back")
    config = read(tmp_path / "back")
    assert config["model_type"] == "glm5_next_text" and "text_config" not in config
    assert Config.from_dict(config) == checkpoint.config
    assert_tensors(open_checkpoint(tmp_path / "back"), folder, ulp=2)
    kl.convert(path, tmp_path / "same.gguf")
    assert {n: v.array().tobytes() for n, v in GGUFFile(tmp_path / "same.gguf").items()} \
        == {n: v.array().tobytes() for n, v in GGUFFile(path).items()}


def renamed(before, after):
    return lambda tensors: {name.replace(before, after): a for name, a in tensors.items()}


@pytest.mark.parametrize("more", [
    {"keys": {"attention.indexer.key_length": None, "attention.indexer.kpool": None, "kda.head_dim": None}},
    {"keys": {"attention.indexer.head_count": None, "expert_shared_count": None, "attention.key_length": None}},
    {"keys": {"attention.layer_norm_epsilon": None, "hyper_connection.epsilon": None, "expert_gating_func": None}},
    {"keys": {"swiglu_clamp_shexp": None}}, {"keys": {"swiglu_clamp_exp": 1.5, "swiglu_clamp_shexp": 1.5}},
    {"keys": {"attention.indexer.kpool_select_tail": True, "attention.indexer.index_share_mtp": True,
              "attention.indexer.types": [True] * 5, "ssm.state_size": 16, "ssm.group_count": 2}},
    {"keys": {"attention.indexer.types": [False, True, False, False, True]}},
    {"keys": {"attention.head_count_kv": 1}},
], ids=str)
def test_other_spellings_and_what_tensors_tell(tmp_path, glm_a, more, recwarn):
    path = glm.write(tmp_path / "x.gguf", glm_a, **more)
    assert open_checkpoint(path).config == open_checkpoint(glm_a).config
    assert_tensors(open_checkpoint(path), glm_a)
    assert not recwarn.list


@pytest.mark.parametrize("keys", [{}, {"attention.indexer.kpool": None}], ids=str)
def test_the_other_names_of_the_tensors_of_a_pool(tmp_path, glm_a, keys, recwarn):
    path = glm.write(tmp_path / "x.gguf", glm_a, tensors=renamed("indexer_compressor_", "indexer.kpool_"), keys=keys)
    assert open_checkpoint(path).config == open_checkpoint(glm_a).config
    assert_tensors(open_checkpoint(path), glm_a)
    assert not recwarn.list


def test_the_older_spelling_of_a_pool_has_the_bound_of_its_engine(tmp_path, glm_a):
    """A file with neither has no bound; of pull request 27752, which writes block_size, it is -5."""
    none = {"kda.gate_lower_bound": None}
    older = none | {"attention.indexer.kpool": None, "attention.indexer.block_size": 4, "attention.head_count_kv": 1}
    config = open_checkpoint(glm_a).config
    assert open_checkpoint(glm.write(tmp_path / "x.gguf", glm_a, keys=older)).config == config
    assert open_checkpoint(glm.write(tmp_path / "y.gguf", glm_a, keys=none)).config == replace(
        config, gate_lower_bound=None)


def test_mixers_in_blocks(tmp_path):
    """Published files have hc_*_fn in Q8_0, and projections of the indexer."""
    source = random_folder(tmp_path / "a", SMALL)
    exact = ("indexer_compressor_ape.weight", "indexer.proj.weight")
    path = glm.write(tmp_path / "x.gguf", source, "Q8_0", exact=exact)
    tensors = open_checkpoint(path).tensors
    for name in ("hc_attn_fn", "hc_ffn_fn", "self_attn.indexer.wq_b.weight", "self_attn.indexer.wk.weight",
                 "self_attn.indexer.index_kpool_compress_gate"):
        assert tensors["model.layers.1." + name].dtype == "Q8_0"
    model = kl.Model.from_pretrained(path)
    report = verify(model, np.arange(24) % 64)
    assert report.ok, report
    exact = ReferenceModel(model.config, model.weights).forward(np.arange(24)).logits
    assert np.abs(model(np.arange(24)) - exact).max() < 1e-5 * np.abs(exact).max()
    (problem,) = problems_of(glm.write(tmp_path / "y.gguf", source, "Q8_0", exact=()))
    assert problem.startswith("blk.1.indexer_compressor_ape.weight at byte") and "is stored as Q8_0" in problem


SMALL = dict(
    model_type="glm5_next_text", vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=64,
    layer_types=["linear_attention", "indexed_attention"], first_k_dense_replace=2, rms_norm_eps=1e-5,
    linear_head_dim=32, linear_num_heads=1, linear_conv_kernel_dim=4, num_attention_heads=1, q_lora_rank=32,
    kv_lora_rank=32, qk_nope_head_dim=32, v_head_dim=32, index_n_heads=2, index_head_dim=32, index_topk=8,
    index_kpool=4)


def test_how_a_generation_ends(tmp_path, glm_a):
    """At eos, eot and eom: published files have three."""
    raw = glm.write(tmp_path / "x.gguf", glm_a).read_bytes()
    path = tmp_path / "y.gguf"
    path.write_bytes(raw.replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eom_token_id"))
    config = open_checkpoint(path).config
    assert (config.bos_token_id, config.eos_token_ids) == (None, (2, 1))


# ---- contradictions --------------------------------------------------------------------------------

CONTRADICTIONS = {
    "attention.indexer.kpool": (2, "attention.indexer.kpool is 2, but blk.1.indexer_compressor_ape.weight at byte"),
    "attention.indexer.kpool ": (0, "attention.indexer.kpool is 0, but blk.1.indexer_compressor_ape.weight at byte"),
    "attention.indexer.top_k": (6, "attention.indexer.top_k is 6; it must be a multiple of glm5next.attention.indexer"),
    "attention.indexer.top_k ": (None, "glm5next.attention.indexer.top_k is missing; it must be an integer >= 0"),
    "attention.indexer.key_length": (4, "attention.indexer.key_length is 4, but blk.1.indexer.attn_k.weight at byte"),
    "attention.indexer.head_count": (8, "attention.indexer.head_count is 8, but blk.1.indexer.proj.weight at byte"),
    "attention.indexer.kpool_select_tail": (False, "indexer.kpool_select_tail is false; only true is supported"),
    "attention.indexer.types": ([True, False, True, True, True], "indexer.types is an array of bool; it must be an"),
    "attention.indexer.types  ": (["a"] * 5, "attention.indexer.types is an array of string; it must be an array"),
    "attention.indexer.types ": ([True], "attention.indexer.types is an array of bool; it must be an array of true"),
    "hyper_connection.count": (None, "glm5next.hyper_connection.count is missing; it must be an integer >= 0"),
    "hyper_connection.count ": (65, "glm5next.hyper_connection.count is 65; it must be an integer from 1 to 64"),
    "hyper_connection.sinkhorn_iterations": (0, "sinkhorn_iterations is 0; it must be an integer from 1 to 1000"),
    "hyper_connection.epsilon": (-1.0, "glm5next.hyper_connection.epsilon is -1.0; it must be a finite number >= 0"),
    "swiglu_clamp_exp": ([1.5, 1.5, 2.0, 1.5, 1.5], "swiglu_clamp_exp and swiglu_clamp_shexp have the limits [1.5, 2"),
    "swiglu_clamp_shexp": (0.5, "have the limits [0.5, 1.5]; all feed-forwards must have one"),
    "swiglu_clamp_exp ": ([1.5], "glm5next.swiglu_clamp_exp is an array of float32; it must be a number, or an arr"),
    "swiglu_clamp_exp  ": (-1.0, "swiglu_clamp_exp and swiglu_clamp_shexp have the limits [-1.0, 1.5]"),
    "kda.gate_lower_bound": (1.0, "glm5next.kda.gate_lower_bound is 1.0; it must be a finite number < 0"),
    "rope.dimension_count": (4, "glm5next.rope.dimension_count is 4, but blk.1.attn_kv_a_mqa.weight at byte"),
    "attention.q_lora_rank": (19, "glm5next.attention.q_lora_rank is 19, but blk.1.attn_q_a.weight at byte"),
    "expert_gating_func": (1, 'glm5next.expert_gating_func is "softmax"; only "sigmoid" is supported'),
    "nextn_predict_layers": (5, "glm5next.nextn_predict_layers is 5; it must be below block_count, 5"),
    "attention.head_count_kv": ([0, 1, 0, 0, 0], "head_count_kv[4] is 0, which marks KDA, but blk.4.attn_kv_a_mqa"),
    "leading_dense_block_count": (0, "leading_dense_block_count is 0, but blk.0.ffn_gate.weight at byte"),
}


@pytest.mark.parametrize("key", CONTRADICTIONS)
def test_metadata_that_contradicts(tmp_path, glm_a, key):
    value, message = CONTRADICTIONS[key]
    problems = problems_of(glm.write(tmp_path / "x.gguf", glm_a, keys={key.strip(): value}))
    assert any(message in problem for problem in problems), problems
    assert len(problems) <= 2  # one sentence, not one a tensor


def without(end):
    return lambda tensors: {name: a for name, a in tensors.items() if not name.endswith(end)}


def also(name, *shape):
    return lambda tensors: tensors | {name: np.zeros(shape, np.float32)}


TENSORS = {
    "a mixer of streams": (without("3.hc_ffn_fn.weight"), "blk.3.hc_ffn_fn.weight is missing; it must have the s"),
    "a bias": (without("4.indexer.k_norm.bias"), "blk.4.indexer.k_norm.bias is missing; it must have the sizes [8]"),
    "an ape": (without("1.indexer_compressor_ape.weight"), "blk.1.indexer_compressor_ape.weight is missing; it must"),
    "both spellings": (also("blk.1.indexer.kpool_gate.weight", 8, 48), "'blk.1.indexer.kpool_gate.weight' is in the"),
    "factors of other sizes": (also("blk.2.hc_attn_scale.weight", 4), "blk.2.hc_attn_scale.weight at byte"),
    "a block behind": (also("blk.5.nextn.enorm.weight", 48), "'blk.5.nextn.enorm.weight' is in the file, but by its"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_wrong(tmp_path, glm_a, name):
    change, message = TENSORS[name]
    (problem,) = problems_of(glm.write(tmp_path / "x.gguf", glm_a, tensors=change))
    assert message in problem
