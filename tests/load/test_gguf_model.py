"""A GGUF of architecture kimi-linear is the model of the folder that it was made from, and says what is wrong."""

import os
import warnings
from dataclasses import replace

import gguf_files
import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.errors import FormatError
from kimi_linear.load import open_checkpoint
from kimi_linear.load.gguf_config import INERT, NAMES, architecture_of
from kimi_linear.load.gguf_write import Outgoing, write_gguf
from kimi_linear.verify import verify


def tokens_of(model, n=70):
    return np.random.default_rng(7).integers(0, model.config.vocab_size, n)


def write(tmp_path, folder, dtype="F32", name="x.gguf", **options):
    return gguf_files.write(tmp_path / name, folder, dtype, **options)


def problems_of(path):
    with pytest.raises(FormatError) as caught:
        kl.Model.from_pretrained(path)
    assert caught.value.where == str(path)
    return list(caught.value.problems)


@pytest.fixture(scope="module")
def kimi_b(golden_dir):
    return golden_dir / "kimi-b"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, kimi_b):
    return write(tmp_path_factory.mktemp("gguf"), kimi_b)


# ---- it is the same model --------------------------------------------------------------------------

FORMS = [{}, {"conv_axes": 3}, {"conv_axes": 2}, {"legacy_kv_b": True}, {"fused": True}]


def bytes_of(model):
    """Logits and state of a prefill and two single tokens."""
    ids, state = tokens_of(model), model.new_state()
    parts = [model(ids[:-2], state=state), model(ids[-2:-1], state=state), model(ids[-1:], state=state)]
    return b"".join(a.tobytes() for a in parts) + b"".join(np.asarray(a).tobytes() for _, a in state.items())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_float32_is_the_folder_byte_for_byte(tmp_path, kimi_case, form):
    """k_b is stored transposed, and a sum has one order for both layouts."""
    folder = kl.Model.from_pretrained(kimi_case)
    model = kl.Model.from_pretrained(write(tmp_path, kimi_case, **form))
    assert bytes_of(model) == bytes_of(folder)


def test_bfloat16_is_the_folder_byte_for_byte(tmp_path, tiny_dir, kimi_b):
    for i, folder in enumerate((tiny_dir, kimi_b)):  # whose matrices are bfloat16
        model = kl.Model.from_pretrained(write(tmp_path, folder, "BF16", f"{i}.gguf"))
        assert bytes_of(model) == bytes_of(kl.Model.from_pretrained(folder))


@pytest.mark.parametrize("dtype", ["F16", "Q8_0", "Q4_0", "MXFP4"])
@pytest.mark.parametrize("case", ["tiny", "kimi-b"])
def test_other_types_are_their_own_values(tmp_path, tiny_dir, golden_dir, case, dtype):
    """The file gives the bytes of a float32 model over the values that it holds, blocks of k_b included."""
    kimi_case = tiny_dir if case == "tiny" else golden_dir / case
    model = kl.Model.from_pretrained(write(tmp_path, kimi_case, dtype))
    values = {name: np.asarray(a, np.float32) for name, a in model.weights.items() if not name.endswith("A_log")}
    plain = kl.Model.from_pretrained(kimi_case)
    for name, a in values.items():
        plain.weights[name] = a
    kv_b = next(t for name, t in model._tensors.items() if name.endswith("kv_b_proj.weight"))
    assert kv_b.dtype == (dtype if case == "tiny" else "F16")  # whose rows a block does not divide
    assert bytes_of(model) == bytes_of(plain)


def test_config_and_weights(tmp_path, kimi_case):
    folder = kl.Model.from_pretrained(kimi_case)
    model = kl.Model.from_pretrained(write(tmp_path, kimi_case))
    told = {"bos_token_id", "eos_token_id", "pad_token_id"}  # a file without a tokenizer does not say them
    ours, theirs = model.config.to_dict(), folder.config.to_dict()
    assert {k: v for k, v in ours.items() if k not in told} == {k: v for k, v in theirs.items() if k not in told}
    assert model.config.latent_eps == 1e-6
    assert list(model.weights) == list(folder.weights)
    for name, a in folder.weights.items():
        if name.endswith("A_log"):
            rate = np.exp(a.astype(np.float64)).astype(np.float32)
            assert (np.exp(model.weights[name]).astype(np.float32) == rate).all(), name
        else:
            assert (model.weights[name] == a.astype(np.float32)).all(), name
            assert model.weights[name].shape == a.shape


def test_nothing_is_copied(whole):
    model = kl.Model.from_pretrained(whole)
    for tensor in model._tensors.values():
        for view in getattr(tensor, "stored", {"": tensor}).values():
            assert hasattr(view, "file") or view.size == model.config.kda_heads  # the rates
    expert = model.weights["model.layers.3.block_sparse_moe.experts.5.w1.weight"]
    stack = model._checkpoint.files[0]["blk.3.ffn_gate_exps.weight"].array()
    assert np.shares_memory(expert, stack) and (expert == stack[5]).all()


def test_replaced_weights(whole, kimi_b):
    """Where the file stores another form, too."""
    model, folder = kl.Model.from_pretrained(whole), kl.Model.from_pretrained(kimi_b)
    for rest in ("0.self_attn.kv_b_proj.weight", "1.self_attn.A_log", "3.block_sparse_moe.experts.5.w1.weight"):
        name = f"model.layers.{rest}"
        half = folder.weights[name].astype(np.float32) / 2  # exact in bfloat16, too
        model.weights[name], folder.weights[name] = half, half.astype(folder.weights[name].dtype)
    assert bytes_of(model) == bytes_of(folder)


@pytest.mark.parametrize("dtype", ["F32", "Q8_0"])
def test_saved_as_a_folder(tmp_path, kimi_case, dtype):
    model = kl.Model.from_pretrained(write(tmp_path, kimi_case, dtype))
    model.save_pretrained(tmp_path / "folder")
    again = kl.Model.from_pretrained(tmp_path / "folder")
    assert again.config == model.config
    for name, a in again.weights.items():
        stored = model.weights[name]
        if name.endswith("A_log"):
            np.testing.assert_array_max_ulp(a, stored.astype(np.float32), 2)
        else:
            assert (a == stored).all(), name


def test_a_state_belongs_to_its_file(tmp_path, whole, kimi_b):
    model = kl.Model.from_pretrained(whole)
    state = model.new_state()
    model(tokens_of(model), state=state)
    state.save(tmp_path / "state")
    assert kl.Model.from_pretrained(whole).load_state(tmp_path / "state").position == 70

    def changed(tensors):
        return {name: a * 1.5 if name == "blk.1.ssm_a" else a for name, a in tensors.items()}

    other = kl.Model.from_pretrained(write(tmp_path, kimi_b, tensors=changed))
    with pytest.raises(ValueError, match="with other weights"):
        other.load_state(tmp_path / "state")


@pytest.mark.parametrize("name", ["latent_eps", "l2_eps"])
def test_other_epsilons(whole, name):
    """Large, so that they show: the engine has them where float64 has them."""
    model, usual = kl.Model.from_pretrained(whole, **{name: 0.1}), kl.Model.from_pretrained(whole)
    assert getattr(model.config, name) == 0.1 and getattr(usual.config, name) == 1e-6
    tokens = tokens_of(model)
    exact = model.reference().forward(np.asarray(tokens)).logits
    assert np.abs(model(tokens) - exact).max() < 1e-4 < 1e-2 < np.abs(usual(tokens) - exact).max()


def test_verify_finds_every_op_in_budget(tmp_path, tiny_dir):
    model = kl.Model.from_pretrained(write(tmp_path, tiny_dir, "BF16"))
    assert verify(model, model.tokenizer.encode("In the beginning God created the heaven")).ok


# ---- files and names -------------------------------------------------------------------------------


def test_any_name_will_do(tmp_path, whole):
    blob = tmp_path / "sha256-0a1b"
    os.link(whole, blob)
    (tmp_path / "link").symlink_to(blob)
    assert kl.Model.from_pretrained(str(tmp_path / "link")).name == "link"
    (tmp_path / "text").write_text("no model")
    with pytest.raises(NotADirectoryError, match="or a GGUF file, which begins with"):
        kl.Model.from_pretrained(tmp_path / "text")
    os.link(whole, tmp_path / "a.gguf")
    with pytest.raises(FileNotFoundError, match="It holds a.gguf: give the file"):
        kl.Model.from_pretrained(tmp_path)


def split(tmp_path, folder, count=3):
    return [write(tmp_path, folder, name=f"m-{i + 1:05d}-of-{count:05d}.gguf", split=(i, count)) for i in range(count)]


def test_parts(tmp_path, kimi_b, whole):
    parts = split(tmp_path, kimi_b)
    expected = bytes_of(kl.Model.from_pretrained(whole))
    for part in parts:
        model = kl.Model.from_pretrained(part)
        assert [file.path for file in model._checkpoint.files] == parts and bytes_of(model) == expected


def test_parts_that_are_wrong(tmp_path, kimi_b, whole):
    parts = split(tmp_path, kimi_b)
    moved = tmp_path / "blob"
    os.link(parts[1], moved)
    (problem,) = problems_of(moved)
    assert "it is part 2 of 3, and its name lacks '-00002-of-00003'" in problem
    held = parts[2].read_bytes()
    parts[2].unlink()
    (problem,) = problems_of(parts[0])
    assert problem == "part 3 of 3 is missing: m-00003-of-00003.gguf is not beside it"
    parts[2].write_bytes(held[:300])
    assert all(p.startswith("m-00003-of-00003.gguf: ") for p in problems_of(parts[1]))
    os.remove(parts[2])
    os.link(whole, parts[2])
    assert "says split.no None of split.count None; it must be 2 of 3" in problems_of(parts[0])[0]
    os.remove(parts[2])
    os.link(parts[1], parts[2])
    assert "says split.no 1 of split.count 3; it must be 2 of 3" in problems_of(parts[0])[0]
    os.remove(parts[2])
    write(tmp_path, kimi_b, name=parts[2].name, split=(2, 3), drop=("blk.4.ssm_a",))
    assert any("'split.tensors.count' is" in p for p in problems_of(parts[0]))
    parts[2].unlink()
    write_gguf(parts[2], {"split.no": 2, "split.count": 3}, [
        Outgoing("output_norm.weight", "F32", (2,), lambda: [np.zeros(2, np.float32)])])
    assert "'output_norm.weight' is in m-00001-of-00003.gguf and in m-00003-of-00003.gguf" in problems_of(parts[0])


@pytest.mark.parametrize("number, count", [(3, 3), (-1, 3), (0, 0), (0, 100000), (0, 2.5), ("0", 3)])
def test_numbers_of_a_part_that_are_none(tmp_path, number, count):
    path = tmp_path / "m-00001-of-00003.gguf"
    write_gguf(path, {"split.no": number, "split.count": count}, [])
    (problem,) = problems_of(path)
    assert problem.startswith(f"'split.no' is {number!r} and 'split.count' {count!r}; they must be a part's number")


@pytest.mark.parametrize("change", ["touch", "grow", "replace", "remove"])
def test_a_file_that_changes_is_noticed(tmp_path, whole, change):
    path = tmp_path / "x.gguf"
    path.write_bytes(whole.read_bytes())
    model = kl.Model.from_pretrained(path)
    model([1, 2])
    if change == "touch":
        os.utime(path, ns=(1, 1))
    elif change == "grow":
        with open(path, "ab") as file:
            file.write(b"\0")
    elif change == "replace":
        (tmp_path / "new").write_bytes(path.read_bytes())
        os.replace(tmp_path / "new", path)
    else:
        path.unlink()
    with pytest.raises(FormatError, match="x.gguf (changed after it was opened|can no longer be read)"):
        model([1, 2])


# ---- what a file may say, and what it may not ------------------------------------------------------


@pytest.mark.parametrize("keys", [
    {"attention.value_length": 32}, {"attention.value_length": None}, {"vocab_size": None},
    {"attention.key_length": None, "rope.dimension_count": None}, {"attention.key_length": 16},
    {"attention.key_length_mla": None, "attention.value_length_mla": None}, {"leading_dense_block_count": None},
    {"feed_forward_length": None, "embedding_length": None, "expert_feed_forward_length": None},
    {"ssm.conv_kernel": None, "kda.head_dim": None, "attention.kv_lora_rank": None, "attention.q_lora_rank": None},
    {"expert_shared_count": None, "expert_gating_func": None, "expert_count": None},
], ids=str)
def test_keys_not_to_rely_on(tmp_path, kimi_b, whole, keys):
    """Values of other converters, and keys that the tensors tell as well."""
    model = kl.Model.from_pretrained(write(tmp_path, kimi_b, keys=keys))
    assert model.config == kl.Model.from_pretrained(whole).config


def test_head_dim_in_place_of_rope(tmp_path, tiny_dir):
    """Some files carry the config's head_dim, the model's width over its heads, as rope.dimension_count."""
    keys = {"rope.dimension_count": 64, "attention.key_length": 64}
    model = kl.Model.from_pretrained(write(tmp_path, tiny_dir, keys=keys))
    assert (model.config.rope_dim, model.config.nope_dim) == (16, 32)


def test_a_missing_expert_weights_norm_is_renormalisation(tmp_path, kimi_b):
    assert not kl.Model.from_pretrained(write(tmp_path, kimi_b)).config.renormalise
    assert kl.Model.from_pretrained(write(tmp_path, kimi_b, keys={"expert_weights_norm": None})).config.renormalise


def test_a_missing_head_is_a_tied_one(tmp_path, kimi_b):
    model = kl.Model.from_pretrained(write(tmp_path, kimi_b, drop=("output.weight",)))
    assert model.config.tie_embeddings and "lm_head.weight" not in model.weights
    assert np.isfinite(model([1, 2])).all()


def test_unknown_keys_are_told(tmp_path, kimi_b):
    with pytest.warns(UserWarning, match=r"unknown keys, ignored: kimi-linear\.novel"):
        kl.Model.from_pretrained(write(tmp_path, kimi_b, keys={"novel": 1}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kl.Model.from_pretrained(write(tmp_path, kimi_b, name="y.gguf"))


CONTRADICTIONS = {
    "embedding_length": (50, "embedding_length is 50, but token_embd.weight at byte"),
    "vocab_size": (321, "vocab_size is 321, but token_embd.weight at byte"),
    "feed_forward_length": (97, "feed_forward_length is 97, but blk.0.ffn_gate.weight at byte"),
    "attention.head_count": (2, "attention.head_count is 2, but blk.1.ssm_beta.weight at byte"),
    "attention.kv_lora_rank": (25, "attention.kv_lora_rank is 25, but blk.0.attn_kv_a_norm.weight at byte"),
    "attention.q_lora_rank": (21, "attention.q_lora_rank is 21, but blk.0.attn_q_a.weight at byte"),
    "attention.key_length_mla": (17, "attention.key_length_mla is 17 of 2 heads, but blk.0.attn_q_b.weight at byte"),
    "attention.value_length_mla": (13, "attention.value_length_mla is 13 of 2 heads, but blk.0.attn_output.weight at"),
    "attention.key_length": (577, "attention.key_length is 577, but blk.0.attn_kv_a_mqa.weight at byte"),
    "rope.dimension_count": (9, "rope.dimension_count is 9, but blk.0.attn_kv_a_mqa.weight at byte"),
    "ssm.conv_kernel": (4, "ssm.conv_kernel is 4, but blk.1.ssm_conv1d_q.weight at byte"),
    "kda.head_dim": (9, "kda.head_dim is 9, but blk.1.ssm_f_a.weight at byte"),
    "expert_count": (13, "expert_count is 13, but blk.2.ffn_gate_inp.weight at byte"),
    "leading_dense_block_count ": (9, "leading_dense_block_count is 9, but blk.2.ffn_gate_inp.weight at byte"),
    "expert_feed_forward_length": (25, "expert_feed_forward_length is 25, but blk.2.ffn_gate_exps.weight at byte"),
    "expert_shared_count": (3, "expert_shared_count is 3 of width 24, but blk.2.ffn_gate_shexp.weight at byte"),
    "leading_dense_block_count": (1, "leading_dense_block_count is 1, but blk.1.ffn_gate.weight at byte"),
    "attention.head_count_kv": ([1, 1, 0, 1, 0], "head_count_kv[1] is 1, which marks MLA, but blk.1.ssm_a at"),
    # no contradiction, but no model either
    "block_count": (None, "kimi-linear.block_count is missing; it must be an integer >= 0"),
    "context_length": ("x", "kimi-linear.context_length is 'x'; it must be an integer >= 0"),
    "expert_gating_func": (3, "kimi-linear.expert_gating_func is 3; it must be 1 (softmax) or 2 (sigmoid)"),
    "expert_weights_norm": (1, "kimi-linear.expert_weights_norm is 1; it must be a bool"),
    "expert_weights_scale": ("1", "kimi-linear.expert_weights_scale is '1'; it must be a number"),
    "expert_used_count": (12, "kimi-linear.expert_used_count is 12; it must be at most 8"),
    "expert_group_count": (5, "kimi-linear.expert_group_count is 5; it must divide kimi-linear.expert_count, 12"),
    "attention.layer_norm_rms_epsilon": (None, "kimi-linear.attention.layer_norm_rms_epsilon is missing"),
}


@pytest.mark.parametrize("key", CONTRADICTIONS)
def test_metadata_that_contradicts(tmp_path, kimi_b, key):
    value, message = CONTRADICTIONS[key]
    problems = problems_of(write(tmp_path, kimi_b, keys={key.strip(): value}))
    assert any(message in problem for problem in problems), problems
    assert len(problems) <= 2  # one sentence, not one a tensor


def test_more_layers_than_there_are(tmp_path, kimi_b):
    problems = problems_of(write(tmp_path, kimi_b, keys={"block_count": 6}))
    assert "kimi-linear.attention.head_count_kv is an array of 5 int32; it must have an integer for each of 6 layers" \
        in problems
    (problem,) = problems_of(write(tmp_path, kimi_b, keys={"block_count": 10**9}))
    assert "kimi-linear.block_count is 1000000000; it must be an integer from 1 to 4096" in problem


@pytest.mark.parametrize(("changes", "message"), [
    ({"drop": ("blk.1.ssm_dt.bias",)}, "blk.1.ssm_dt.bias is missing; it must have the sizes [24]"),
    ({"drop": ("blk.2.ffn_up_exps.weight",)}, "ffn_up_exps.weight is missing; it must have the sizes [48, 24, 12]"),
    ({"drop": ("blk.0.attn_v_b.weight",)}, "blk.0.attn_v_b.weight is missing; it must have the sizes [24, 12, 2]"),
    ({"tensors": lambda t: t | {"blk.9.foo.weight": np.zeros(4, np.float32)}}, "'blk.9.foo.weight' is in the file, b"),
    ({"tensors": lambda t: t | {"blk.1.attn_q.weight": np.zeros((23, 48), np.float32)}},
     "has the sizes [48, 23]; by the metadata it must have [48, 24]"),
    ({"tensors": lambda t: t | {"blk.1.ssm_a": -t["blk.1.ssm_a"]}}, "it must be -exp(A_log), which is finite and not"),
    ({"tensors": lambda t: t | {"blk.4.ssm_a": t["blk.4.ssm_a"] * np.nan}}, "blk.4.ssm_a at byte"),
])
def test_tensors_that_are_wrong(tmp_path, kimi_b, changes, message):
    (problem,) = problems_of(write(tmp_path, kimi_b, **changes))
    assert message in problem


def test_tokens_that_are_not_the_vocabulary(tmp_path, kimi_b):
    (problem,) = problems_of(write(tmp_path, kimi_b, more=lambda writer: writer.add_token_list(["a", "b"])))
    assert problem == "tokenizer.ggml.tokens has 2 tokens, but the model's vocabulary has 320"


def test_ids_outside_the_vocabulary(tmp_path, kimi_b):
    (problem,) = problems_of(write(tmp_path, kimi_b, more=lambda writer: writer.add_eos_token_id(320)))
    assert problem == "tokenizer.ggml.eos_token_id is 320; it must be an integer from 0 to 319"


def test_another_architecture_is_named(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match="its general.architecture is 'llama'; supported are 'kimi-linear', "):
        open_checkpoint(tmp_path / "x.gguf")


def test_known_keys_are_apart():
    assert not INERT & set(NAMES.values())


def test_a_family_that_no_architecture_can_hold(kimi_b):
    config = replace(kl.Model.from_pretrained(kimi_b).config, model_type="another")
    with pytest.raises(ValueError, match="model_type is 'another'; a GGUF can hold kimi_linear, qwen3_next"):
        architecture_of(config)
