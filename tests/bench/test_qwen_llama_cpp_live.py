"""llama.cpp and ours on Qwen3-Next and Qwen3.5 files that `kl.convert` wrote: both give float64's logits.

Tests are here where llama-cpp-python is: `make peers`. What llama.cpp asks of sizes: keys and values of the linear
layers of one width (it reads both from ssm.state_size), and no more rotary sections than a head is wide. A refusal in
its graph is an abort, so each file runs in a process of its own.
"""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear import reference_model
from kimi_linear.adapters import llama_cpp
from kimi_linear.config import Config
from kimi_linear.load import open_checkpoint, write_safetensors
from kimi_linear.random_weights import random_weights
from kimi_linear.weights import array_of

HERE = importlib.util.find_spec("llama_cpp") is not None
N = 40  # tokens
RMS = 2e-5  # of the difference of logits, whose rms is about 1.2

BASE = {
    "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 5, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4096, "linear_conv_kernel_dim": 4,
    "intermediate_size": 96, "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_num_value_heads": 4,
    "linear_value_head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "layer_types": [*["linear_attention"] * 3, "full_attention", "linear_attention"],
    "rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25, "rope_type": "default"},
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
           "shared_expert_intermediate_size": 48}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "linear_num_value_heads": 8, "num_attention_heads": 8}
WIDE_EXPERTS = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "num_experts_per_tok": 8}
CASES = {
    "next": {"model_type": "qwen3_next", "norm_topk_prob": True, **EXPERTS},
    "dense": {"model_type": "qwen3_5_text"},
    "dense, three value heads a key head": {"model_type": "qwen3_5_text", "linear_num_value_heads": 6},
    "dense, tied": {"model_type": "qwen3_5_text", "tie_word_embeddings": True},
    "dense, layers one by one": {"model_type": "qwen3_5_text", "layer_types": [
        "full_attention", *["linear_attention"] * 3, "full_attention"]},
    "dense, narrow heads": {"model_type": "qwen3_5_text", "head_dim": 16, "linear_key_head_dim": 16,
                            "linear_value_head_dim": 16},
    "experts": {"model_type": "qwen3_5_moe_text", **EXPERTS},
}
RUN = """
    import sys
    import llama_cpp as api
    import numpy as np

    said = []
    listen = api.llama_log_callback(lambda level, text, _: said.append(text.decode(errors="replace")))
    api.llama_log_set(listen, None)
    path, out, ids = sys.argv[1], sys.argv[2], [int(x) for x in sys.argv[3].split(",")]
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0
    model = api.llama_model_load_from_file(path.encode(), params)
    if not model:
        sys.exit("".join(said[-6:]))
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(ids)
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = params.flash_attn_type = 0
    context = api.llama_init_from_model(model, params)
    batch = api.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    if status := api.llama_decode(context, batch):
        sys.exit(f"llama_decode returned {status}")
    n = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    np.save(out, np.ctypeslib.as_array(api.llama_get_logits(context), (len(ids), n)))
"""


def test_llama_cpp_is_here_where_it_is_asked_for():
    assert HERE or "ggml" not in os.environ.get("KL_PEERS", "")


def tokens(n=N):
    return np.random.default_rng(5).integers(0, BASE["vocab_size"], n)


def write_folder(path, **config):
    """A random model; what would be the norms' weights lacks 1, as folders of these kinds have it."""
    path.mkdir()
    content = BASE | config
    (path / "config.json").write_text(json.dumps(content))
    config = Config.from_dict(content)
    weights = random_weights(config, 3)
    for name, x in weights.items():
        if name.endswith("conv1d.weight"):
            weights[name] = x[:, None]
        elif name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            weights[name] = 0.2 * np.random.default_rng(len(name)).standard_normal(x.shape, np.float32)
    write_safetensors(path / "model.safetensors", weights)
    return path


def logits_of(path, out):
    """llama.cpp's logits of `tokens`; what it said where it does not run the file."""
    env = os.environ | {"GGML_NO_BACKTRACE": "1"}  # an abort would start a debugger
    command = [sys.executable, "-c", textwrap.dedent(RUN), str(path), str(out), ",".join(map(str, tokens()))]
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    return np.load(out) if done.returncode == 0 else done.stderr


def exact_logits(path):
    """In float64, by the values that the checkpoint holds."""
    checkpoint = open_checkpoint(path)
    weights = {name: array_of(t) for name, t in checkpoint.tensors.items()}
    return reference_model.ReferenceModel(checkpoint.config, weights).forward(tokens()).logits


def divergence(exact, logits):
    """Mean over the tokens of KL(exact || logits), nats."""
    p, q = (x - x.max(-1, keepdims=True) for x in (exact, logits.astype(np.float64)))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


if HERE:
    @pytest.fixture(scope="module", params=CASES)
    def found(request, tmp_path_factory):
        """(folder, file, llama.cpp's logits of the file)"""
        folder = tmp_path_factory.mktemp("qwen")
        source = write_folder(folder / "model", **CASES[request.param])
        kl.convert(source, folder / "x.gguf", type="F32")
        return source, folder / "x.gguf", logits_of(folder / "x.gguf", folder / "logits.npy")

    def test_it_loads_and_runs(found):
        logits = found[2]
        assert not isinstance(logits, str), logits
        assert logits.shape == (N, BASE["vocab_size"]) and np.isfinite(logits).all()
        assert 0.5 < np.sqrt((logits ** 2).mean()) < 20

    @pytest.mark.parametrize("which", [0, 1], ids=["folder", "file"])
    def test_logits_beside_float64(found, which):
        """The folder's model and the file's, each in float64 by its own weights and Config."""
        exact = exact_logits(found[which])
        ours = kl.Model.from_pretrained(found[which])(tokens())
        for name, logits in (("llama.cpp", found[2]), ("ours", ours)):
            assert np.sqrt(((logits - exact) ** 2).mean()) < RMS * np.sqrt((exact ** 2).mean()), name

    @pytest.mark.parametrize("case", ["next", "dense, three value heads a key head", "experts"])
    def test_every_tap_is_there_and_agrees(tmp_path, case):
        """Of the file's own model; nothing is to blame but ggml's softplus, log(1 + exp(x)) in float32, where it is
        visible: softplus_in_steps, or unknown where 1 + exp(x) was rounded the other way."""
        kl.convert(write_folder(tmp_path / "model", **CASES[case]), tmp_path / "x.gguf", type="F32")
        model = kl.Model.from_pretrained(tmp_path / "x.gguf", threads=1)
        with llama_cpp.Engine(tmp_path / "x.gguf", model=model) as engine:
            theirs = engine.trace(tokens(), states=True)
        exact = model.reference().forward(tokens(), taps="*")
        assert not set(exact.taps) - set(theirs)
        assert {t for t in exact.state if t not in theirs} == {t for t in exact.state if t.endswith("_cache")}
        report = kl.diff.traces(theirs, exact)
        assert report.ok and max(row.rms for row in report.rows) < 1e-5, report
        found = kl.diff.blame(model, theirs)
        assert {r.op for r in found.wrong} <= {"decay_gate"} and all(r.error < 1e-5 for r in found.wrong), found
        assert len(found.rows) == len(exact.taps) + sum(not t.endswith("_cache") for t in exact.state)

    @pytest.mark.parametrize("type", ["Q8_0", "Q4_K", "Q6_K", "Q4_0"])
    @pytest.mark.parametrize("case", ["next", "dense", "experts"])
    def test_blocks(tmp_path, case, type):
        """KL from float64 on the file's own values: for K types ours is nearer with int8 activations, whose scales are
        of 32 values where llama.cpp's are of 256; for types of 32 they are alike.

        Rows are whole blocks of 256. All experts are used: where one of two nearly equal ones is chosen, either
        engine's KL is what that choice costs.
        """
        source = write_folder(tmp_path / "model", **CASES[case] | WIDE | (WIDE_EXPERTS if case != "dense" else {}))
        kl.convert(source, tmp_path / "x.gguf", type=type)
        theirs = logits_of(tmp_path / "x.gguf", tmp_path / "logits.npy")
        assert not isinstance(theirs, str), theirs
        exact = exact_logits(tmp_path / "x.gguf")
        ours = {kind: kl.Model.from_pretrained(tmp_path / "x.gguf", activations=kind)(tokens())
                for kind in ("float32", "int8")}
        far = {name: divergence(exact, logits) for name, logits in (ours | {"llama.cpp": theirs}).items()}
        assert far["float32"] < 1e-9, far
        assert far["int8"] < (1.0 if "_K" in type else 1.5) * far["llama.cpp"] < 0.02, far

    def test_values_wider_than_keys_are_refused_there(tmp_path):
        """Ours are files all the same; llama.cpp has one width for both."""
        source = write_folder(tmp_path / "model", **CASES["next"] | {"linear_value_head_dim": 64})
        kl.convert(source, tmp_path / "x.gguf", type="F32")
        assert "attn_qkv.weight' has wrong shape" in logits_of(tmp_path / "x.gguf", tmp_path / "logits.npy")
        assert open_checkpoint(tmp_path / "x.gguf").config.gdn_v_dim == 64
