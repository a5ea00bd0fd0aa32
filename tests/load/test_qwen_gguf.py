"""GGUF files of qwen3next, qwen35 and qwen35moe by the `gguf` package: config, tensors as they lie, refusals."""

import dataclasses

import gguf
import gguf_files
import numpy as np
import pytest
import qwen_files
from conftest import canonical_weights

from kimi_linear.errors import FormatError
from kimi_linear.load import GGUFFile, open_checkpoint
from kimi_linear.load.gguf_config import ARCHITECTURES, stored_form
from kimi_linear.load.gguf_config_qwen import KNOWN, NAMES, factor_of


@pytest.fixture(scope="module", params=qwen_files.NAMES)
def folder(request, golden_dir):
    return golden_dir / request.param


def expected(folder):
    """Canonical name -> array of the file: as the folder's, norms 1 + w, value heads tiled where its kind does so."""
    config = qwen_files.config_of(folder)
    found = {}
    for name, x in canonical_weights(folder / "model.safetensors").items():
        x = x.astype(np.float32)
        if name.endswith("norm.weight") and "linear_attn" not in name:
            x = x + np.float32(1)
        found[name] = x if config.gdn_inputs == "grouped" else qwen_files._tiled(config, name, x)
    return found


def check_tensors(checkpoint, folder):
    wanted = expected(folder)
    assert list(checkpoint.tensors) == list(checkpoint.config.weight_shapes())
    for name, x in wanted.items():
        found = checkpoint.tensors[name]
        assert found.shape == x.shape, name
        if name.endswith("A_log"):
            np.testing.assert_array_max_ulp(found.array().astype(np.float32), x, 2)
        else:
            assert found.array().tobytes() == x.tobytes(), name


@pytest.mark.parametrize("shape", [{}, {"fused": True}, {"legacy": True}], ids=str)
def test_tensors_as_they_lie(tmp_path, folder, shape):
    checkpoint = open_checkpoint(qwen_files.write(tmp_path / "x.gguf", folder, **shape))
    check_tensors(checkpoint, folder)
    assert checkpoint.config == stored_form(qwen_files.config_of(folder)) and not checkpoint.skipped
    assert not checkpoint.config.norm_plus_one
    assert checkpoint.config.gdn_tiled == (folder.name != "qwen-a")


def test_what_the_engine_takes_in_their_place(tmp_path, golden_dir):
    """in_proj_qkvz and A_log go to C as they lie, each under a name of its own."""
    folder = golden_dir / "qwen-a"
    checkpoint = open_checkpoint(qwen_files.write(tmp_path / "x.gguf", folder))
    file, at = checkpoint.files[0], "model.layers.0.linear_attn."
    inputs, a_log = checkpoint.tensors[at + "in_proj_qkvz.weight"], checkpoint.tensors[at + "A_log"]
    assert {n: (t.offset, t.shape) for n, t in inputs.stored.items()} == {
        at + "in_proj_qkv.weight": (file["blk.0.attn_qkv.weight"].offset, (160, 64)),
        at + "in_proj_z.weight": (file["blk.0.attn_gate.weight"].offset, (96, 64))}
    assert inputs.dtype == "F32" and inputs.nbytes == 256 * 64 * 4 and inputs.file is file
    assert list(a_log.stored) == [at + "rate"]
    assert np.array_equal(a_log.stored[at + "rate"], -file["blk.0.ssm_a"].array())
    assert checkpoint.tensors[at + "in_proj_ba.weight"].offset == file["blk.0.ssm_ba.weight"].offset
    legacy = open_checkpoint(qwen_files.write(tmp_path / "old.gguf", folder, legacy=True))
    assert not hasattr(legacy.tensors[at + "in_proj_qkvz.weight"], "stored")


def test_config_is_that_of_the_folder(tmp_path, folder):
    """Every field, of keys alone: what the keys do not give is the same default."""
    config = open_checkpoint(qwen_files.write(tmp_path / "x.gguf", folder)).config
    back = dataclasses.replace(config, norm_plus_one=True, gdn_tiled=False)
    assert back == qwen_files.config_of(folder)


def test_keys_that_are_absent_are_read_off_the_tensors(tmp_path, folder):
    absent = dict.fromkeys(["embedding_length", "ssm.conv_kernel", "ssm.time_step_rank", "attention.key_length",
                            "attention.value_length", "full_attention_interval", "expert_count",
                            "expert_feed_forward_length", "expert_shared_feed_forward_length", "rope.freq_base"])
    if folder.name == "qwen35-a":
        absent["feed_forward_length"] = None
    config = open_checkpoint(qwen_files.write(tmp_path / "x.gguf", folder, keys=absent)).config
    wanted = stored_form(qwen_files.config_of(folder))
    if folder.name == "qwen-a":
        assert config == wanted  # its rope.freq_base is 10000, which is the default
    else:
        assert config.rope_base == 10000.0 and dataclasses.replace(config, rope_base=wanted.rope_base) == wanted


@pytest.mark.parametrize("kind", [bool, int])
def test_recurrent_layers_and_blocks_behind(tmp_path, golden_dir, kind):
    """An array instead of the interval; a block that predicts a second token is skipped, and told."""
    folder = golden_dir / "qwen35-a"
    more = {"blk.5.attn_norm.weight": np.ones(64, "f4"), "blk.5.nextn.eh_proj.weight": np.ones((64, 128), "f4")}
    linear = [kind(x) for x in (1, 1, 1, 0, 1, 0)]
    keys = {"full_attention_interval": None, "attention.recurrent_layers": linear, "block_count": 6,
            "nextn_predict_layers": 1}
    checkpoint = open_checkpoint(qwen_files.write(tmp_path / "x.gguf", folder, keys=keys, tensors=lambda t: t | more))
    check_tensors(checkpoint, folder)
    assert sorted(checkpoint.skipped) == sorted(more) and checkpoint.config.n_layers == 5


def test_a_tied_model_has_no_head(tmp_path, golden_dir):
    checkpoint = open_checkpoint(qwen_files.write(tmp_path / "x.gguf", golden_dir / "qwen35-a"))
    assert checkpoint.config.tie_embeddings and "lm_head.weight" not in checkpoint.tensors


def put(name, x):
    return lambda tensors: tensors | {name: x}


F4 = np.float32
Q, M = "qwen-a", "qwen35-moe"
BAD = [
    (Q, dict(keys={"block_count": None}), "qwen3next.block_count is missing; it must be an integer >= 0"),
    (Q, dict(keys={"nextn_predict_layers": 5}), "qwen3next.nextn_predict_layers is 5; it must be below block_count, 5"),
    (Q, dict(keys={"attention.recurrent_layers": [True, True]}),
     "attention.recurrent_layers is an array of 2 bool; it must be an array of 5 bools"),
    (Q, dict(keys={"full_attention_interval": 3}), "full_attention_interval is 3, by which layer 2 has full attention, "
                                                   "but blk.2.ssm_a"),
    (Q, dict(keys={"full_attention_interval": 0}), "full_attention_interval is 0; it must be an integer >= 1"),
    (Q, dict(keys={"attention.recurrent_layers": [True] * 5}), r"attention.recurrent_layers\[3\] is True, by which "
     r"layer 3 has linear attention, but blk.3.attn_q.weight"),
    (Q, dict(keys={"attention.layer_norm_rms_epsilon": None}), "rms_epsilon is missing; it must be a number"),
    (Q, dict(keys={"embedding_length": 32}), "embedding_length is 32, but token_embd.weight .* is 64 along axis 0"),
    (Q, dict(keys={"ssm.state_size": 8}), "ssm.state_size is 8 of 2 key heads beside an inner_size of 96, but "
                                          "blk.0.ssm_conv1d.weight .* has 160 channels"),
    (Q, dict(keys={"ssm.state_size": None}), "ssm.state_size is missing; it must be an integer >= 0"),
    (Q, dict(keys={"ssm.inner_size": 97}), "ssm.inner_size is 97; it must be a multiple of ssm.time_step_rank, 4"),
    (Q, dict(keys={"ssm.inner_size": 64}), "ssm.inner_size is 64 of 4 heads, but blk.0.ssm_norm.weight"),
    (Q, dict(keys={"ssm.group_count": 3}), "ssm.time_step_rank is 4; it must be a multiple of ssm.group_count, 3"),
    (Q, dict(keys={"ssm.time_step_rank": 6}), "ssm.time_step_rank is 6, but blk.0.ssm_a .* is 4 along axis 0"),
    (Q, dict(keys={"ssm.conv_kernel": 3}), "ssm.conv_kernel is 3, but blk.0.ssm_conv1d.weight"),
    (Q, dict(keys={"attention.key_length": 16}), "attention.key_length is 16, but blk.3.attn_q_norm.weight"),
    (Q, dict(keys={"attention.key_length": 0}), "attention.key_length is 0; it must be an integer >= 1"),
    (Q, dict(keys={"attention.value_length": 16}), "attention.value_length is 16; it must be attention.key_length, 32"),
    (Q, dict(keys={"attention.head_count": 8}), "attention.head_count is 8 of width 32, but blk.3.attn_q.weight .* has "
                                                "256 rows; it must have 512"),
    (Q, dict(keys={"attention.head_count_kv": 4}), "attention.head_count_kv is 4 of width 32, but blk.3.attn_k.weight"),
    (Q, dict(keys={"rope.dimension_count": 7}), "rope.dimension_count is 7; it must be an even number from 2 to "
                                                "attention.key_length, 32"),
    (Q, dict(keys={"rope.scaling.type": "yarn"}), "rope.scaling.type is 'yarn'; it must be 'none'"),
    (M, dict(keys={"rope.dimension_sections": [1]}), "rope.dimension_sections is an array of int32; it must be an "
                                                     "array of 4 int32"),
    (M, dict(keys={"expert_gating_func": 2}), r"expert_gating_func is 2; it must be 1 \(softmax\)"),
    (M, dict(keys={"expert_weights_scale": 2.5}), "expert_weights_scale is 2.5; it must be 1"),
    (M, dict(keys={"expert_weights_norm": False}), "expert_weights_norm is False; it must be true"),
    (M, dict(keys={"expert_count": 4}), "expert_count is 4, but blk.0.ffn_gate_inp.weight"),
    (M, dict(keys={"expert_feed_forward_length": 16}), "expert_feed_forward_length is 16, but blk.0.ffn_down_exps"),
    (M, dict(keys={"expert_shared_feed_forward_length": 16}), "expert_shared_feed_forward_length is 16, but blk.0.ff"),
    (M, dict(keys={"expert_used_count": None}), "expert_used_count is missing"),
    (Q, dict(drop=("blk.0.attn_gate.weight",)), r"blk.0.attn_gate.weight is missing; it must .* \[64, 96\]"),
    (Q, dict(drop=("blk.0.attn_qkv.weight",)), "blk.0.attn_qkv.weight is missing"),
    (Q, dict(tensors=put("blk.0.ssm_in.weight", np.zeros((256, 64), F4))),
     "'blk.0.attn_qkv.weight' is in the file, and 'blk.0.ssm_in.weight', which holds the same; one of them must do"),
    (M, dict(tensors=put("blk.1.ffn_gate_up_exps.weight", np.zeros((8, 64, 64), F4))),
     "'blk.1.ffn_gate_exps.weight' is in the file, and 'blk.1.ffn_gate_up_exps.weight', which holds the same"),
    (M, dict(tensors=put("blk.0.ssm_ba.weight", np.zeros((8, 64), F4))),
     "'blk.0.ssm_ba.weight' is in the file, but by its metadata there is no such tensor"),
    (M, dict(tensors=put("blk.9.attn_norm.weight", np.ones(64, F4))), "'blk.9.attn_norm.weight' is in the file, but"),
    (M, dict(tensors=put("blk.0.ssm_beta.weight", np.zeros((2, 64), F4))),
     r"blk.0.ssm_beta.weight at byte \d+ has the sizes \[64, 2\]; by the metadata it must have \[64, 4\]"),
    (M, dict(tensors=put("blk.0.ssm_a", np.ones(4, F4))), r"blk.0.ssm_a .* holds 1.0 at index 0; it must be -exp"),
    (M, dict(tensors=put("blk.3.attn_q_norm.weight", np.zeros(16, F4))), "attention.key_length is 32, but blk.3"),
]


@pytest.mark.parametrize("name, options, words", BAD)
def test_bad_files(tmp_path, golden_dir, name, options, words):
    path = qwen_files.write(tmp_path / "x.gguf", golden_dir / name, **options)
    with pytest.raises(FormatError, match=words):
        open_checkpoint(path)


def test_mla_has_no_fused_inputs(tmp_path, golden_dir):
    path = gguf_files.write(tmp_path / "x.gguf", golden_dir / "kimi-a",
                            tensors=put("blk.3.attn_qkv.weight", np.zeros((6, 64), F4)))
    with pytest.raises(FormatError, match="'blk.3.attn_qkv.weight' is in the file, but by its metadata there is no"):
        open_checkpoint(path)


def test_unknown_keys_are_told(tmp_path, golden_dir):
    path = qwen_files.write(tmp_path / "x.gguf", golden_dir / Q, keys={"new_key": 1})
    with pytest.warns(UserWarning, match="unknown keys, ignored: qwen3next.new_key"):
        open_checkpoint(path)


def test_known_keys_are_those_of_the_gguf_package():
    keys = {v.removeprefix("{arch}.") for group in vars(gguf.Keys).values() if isinstance(group, type)
            for v in vars(group).values() if isinstance(v, str)}
    assert KNOWN - keys == {"attention.recurrent_layers"}  # newer than the package
    assert set(NAMES.values()) <= KNOWN
    newer = {"kimi-k3", "glm5next", "glm5-next"}
    assert set(ARCHITECTURES) - set(gguf.MODEL_ARCH_NAMES.values()) <= newer


def test_every_tensor_of_the_gguf_package_is_known(tmp_path, golden_dir):
    """What its table has for an architecture is what is written and read, but for spellings that exclude each other."""
    for name in qwen_files.NAMES:
        folder = golden_dir / name
        kind = qwen_files.architecture(qwen_files.config_of(folder))
        arch = next(a for a, text in gguf.MODEL_ARCH_NAMES.items() if text == kind)
        table = {gguf.TENSOR_NAMES[t].split(".")[-1] for t in gguf.MODEL_TENSORS[arch]}
        read = set()
        for i, shape in enumerate(({}, {"fused": True}, {"legacy": True})):
            path = qwen_files.write(tmp_path / f"{name}-{i}.gguf", folder, **shape)
            open_checkpoint(path)
            read |= {n.removesuffix(".weight").removesuffix(".bias").split(".")[-1] for n in GGUFFile(path)}
        assert {n for n in table - read if not n.startswith("nextn")} <= {"output"}, name


@pytest.mark.parametrize("width, K", [(8, 32), (64, 256), (20, 80), (14, 98), (2, 6), (22, 66), (32, 32)])
def test_the_share_that_is_rotated(width, K):
    assert int(K * factor_of(width, K)) == width and len(str(factor_of(64, 256))) == 4
