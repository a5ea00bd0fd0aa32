"""llama.cpp, live on the same files: its graph's tensors beside ours, faults planted in a file, and quantised files.

Tests are here where llama-cpp-python is: `make peers`.
"""

import functools
import importlib
import importlib.util
import os
import sys

import numpy as np
import pytest
from conftest import TINY

import kimi_linear as kl
from kimi_linear import cli
from kimi_linear.adapters import llama_cpp

HERE = all(map(importlib.util.find_spec, ("llama_cpp", "gguf")))

N = 64  # tokens
RMS = 2e-5  # of the difference of logits, whose rms is 8
NEW_TAPS = ("mla.latent_cache", "mla.k_shared_cache")  # rows of a cache, which the graph keeps otherwise


def test_llama_cpp_is_here_where_it_is_asked_for():
    assert HERE or "ggml" not in os.environ.get("KL_PEERS", "")


@functools.cache
def tokens(n=N):
    return np.array(kl.Model.tiny().tokenizer.encode((TINY / "sample.txt").read_text(), specials=False)[:n])


def relative(a, b):
    return float(np.sqrt(((a - b) ** 2).mean() / (b ** 2).mean()))


if HERE:
    gguf_files, block_types = map(importlib.import_module, ("gguf_files", "block_types"))

    @pytest.fixture(scope="module")
    def path(tmp_path_factory):
        """The packaged model as a GGUF in F32."""
        return gguf_files.write(tmp_path_factory.mktemp("llama") / "tiny.gguf", TINY)

    @pytest.fixture(scope="module")
    def model(path):
        return kl.Model.from_pretrained(path, threads=1, **llama_cpp.CONVENTIONS)

    @pytest.fixture(scope="module")
    def theirs(path, model):
        with llama_cpp.Engine(path, model=model) as engine:
            return engine.trace(tokens(), states=True)

    # ---- the adapter ----

    def test_every_tap_is_there_and_agrees(model, theirs):
        exact = model.reference().forward(tokens(), taps="*")
        assert {t for t in exact.taps if t not in theirs} == set()
        assert {t for t in exact.state if t not in theirs} == {t for t in exact.state if t.endswith(NEW_TAPS)}
        report = kl.diff.traces(theirs, exact)
        assert report.ok, report
        assert max(row.rms for row in report.rows) < 2e-6
        assert theirs.meta["source"].startswith("llama.cpp of llama-cpp-python")
        for name in (t for t in exact.state if t in theirs):
            assert relative(theirs[name], exact.state[name]) < 2e-6, name

    def test_no_op_is_blamed(model, theirs):
        found = kl.diff.blame(model, theirs)
        assert found.ok and len(found.rows) > 150, found

    def test_parts_of_a_prompt_follow_each_other(path, model, theirs):
        with llama_cpp.Engine(path, model=model, n_ubatch=24) as engine:
            parts = engine.trace(tokens(), states=True)
            undisturbed = engine.logits(tokens())
        assert list(parts) == list(theirs)
        for tap in parts:
            assert parts[tap].shape == theirs[tap].shape and relative(parts[tap], theirs[tap]) < 2e-6, tap
        assert relative(undisturbed, parts["logits"]) < 1e-6

    def test_one_token_and_chosen_taps(path, model):
        with llama_cpp.Engine(path) as engine:
            found = engine.trace([7], ["*.moe.weights", "layers.3.mla.k_shared"])
        want = model.trace([7], list(found))
        assert found["layers.3.mla.k_shared"].shape == (1, 16) and "layers.3.mla.latent_raw" not in found
        for tap in found:
            assert relative(found[tap], want[tap]) < 2e-6, tap

    def test_newer_and_older_files(model, tmp_path):
        """q, k and v in one tensor; convolutions of three axes."""
        for name, shape in (("fused", dict(fused=True)), ("three", dict(conv_axes=3))):
            path = gguf_files.write(tmp_path / f"{name}.gguf", TINY, **shape)
            with llama_cpp.Engine(path, model=model) as engine:
                found = engine.trace(tokens(9), states=True)
            exact = model.reference().forward(tokens(9), taps="*")
            assert set(exact.taps) <= set(found) and kl.diff.traces(found, exact).ok

    def test_bad_input_is_refused(path, model, tmp_path):
        with llama_cpp.Engine(path, model=model) as engine:
            with pytest.raises(ValueError, match="tokens has no token"):
                engine.logits([])
            with pytest.raises(ValueError, match="tokens.*2048"):
                engine.logits([2048])
            with pytest.raises(ValueError, match="matches no tap"):
                engine.trace([1], "layers.9.*")
        with pytest.raises(ValueError, match="the engine is closed"):
            engine.logits([1])
        bad = tmp_path / "bad.gguf"
        bad.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(ValueError, match="bad.gguf: llama.cpp does not open it: .*error"):
            llama_cpp.Engine(bad, model=model)

    def test_the_command_writes_a_trace_of_theirs(path, tmp_path, capsys):
        out = tmp_path / "theirs.safetensors"
        assert not cli.main(["trace", str(path), "--ids", "5,6,7", "-o", str(out), "--engine", "llama.cpp"])
        trace = kl.Trace.load(out)
        assert trace.tokens.tolist() == [5, 6, 7] and "layers.5.mla.o" in trace
        assert cli.main(["trace", "--ids", "5", "-o", str(out), "--engine", "llama.cpp"]) == 2
        assert "llama.cpp takes a GGUF file" in capsys.readouterr().err

    # ---- one tensor of the file is another ----

    @pytest.mark.parametrize("tensor, factor, tap, op", [
        ("blk.2.ssm_a", 1.01, "layers.2.kda.g", "decay_gate"),
        ("blk.3.attn_k_b.weight", 1.02, "layers.3.mla.o", "latent_attention"),
        ("blk.1.ssm_conv1d_k.weight", 1.001, "layers.1.kda.k_conv", "short_conv"),
        ("blk.4.ffn_down_exps.weight", 1.001, "layers.4.moe.out", "moe"),
    ])
    def test_an_altered_tensor_is_named(model, tmp_path, tensor, factor, tap, op):
        def altered(tensors):
            return {n: a * np.float32(factor) if n == tensor else a for n, a in tensors.items()}

        path = gguf_files.write(tmp_path / "other.gguf", TINY, tensors=altered)
        with llama_cpp.Engine(path, model=model) as engine:
            trace = engine.trace(tokens(), states=True)
        found = kl.diff.blame(model, trace)
        assert [(r.tap, r.op) for r in found.wrong] == [(tap, op)], found
        report = kl.diff.traces(trace, model.trace(tokens(), states=True), model=model)
        assert [r.tap for r in report.rows if r.verdict == "ADDS"] == [tap], report
        assert report.first.tap == tap

    def test_other_epsilons_are_named(path, theirs):
        """Against the training code's: the L2 norm adds 1e-5 under the root, the latent's norm has it, too."""
        found = kl.diff.blame(kl.Model.from_pretrained(path, l2_eps=llama_cpp.CONVENTIONS["l2_eps"]), theirs)
        assert {r.tap.split(".", 2)[-1] for r in found.wrong} == {"mla.latent"}, found
        found = kl.diff.blame(kl.Model.from_pretrained(path, latent_eps=llama_cpp.CONVENTIONS["latent_eps"]), theirs)
        wrong = {r.tap.split(".", 2)[-1]: r for r in found.wrong}
        assert wrong and set(wrong) <= {"kda.q", "kda.k"}, found
        assert {r.kind for r in found.wrong} == {"l2_eps_other"}

    # ---- logits, and quantised files ----

    def test_logits_in_float32(model, theirs):
        exact = model.reference().forward(tokens()).logits
        rms = [float(np.sqrt(((x - exact) ** 2).mean())) for x in (theirs["logits"], model.forward(tokens()))]
        assert rms[0] < RMS / 4 and rms[1] < rms[0], rms

    @pytest.mark.parametrize("name, nearer", [("Q4_K", 0.7), ("Q6_K", 0.7), ("Q8_0", 0.35)])
    def test_a_file_of_its_quantiser_runs_in_ours(path, tmp_path, name, nearer):
        """Where it rounds 256 activations with one scale, ours, of 32, are nearer; of blocks of 32 both round alike."""
        file = tmp_path / f"{name}.gguf"
        block_types.quantize(path, file, name)
        found = block_types.measure(file, [tokens(160).tolist()])
        assert found["kl"]["float32"]["mean"] < 1e-11
        assert found["nearer"] > nearer and found["kl"]["int8"]["median"] < 1.3 * found["kl"]["llama.cpp"]["median"]
        assert found["perplexity"]["float32"] == pytest.approx(found["perplexity"]["float64"], rel=1e-6)
        if nearer > 0.5:
            assert found["kl"]["int8"]["median"] < found["kl"]["llama.cpp"]["median"] / 1.5

    def test_the_benchmark_prints_its_table(monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(sys, "argv", ["block_types.py", "--tokens", "20", "--window", "8", "--types", "F32,MXFP4",
                                          "--json", str(tmp_path / "types.json")])
        assert not block_types.main()
        out = capsys.readouterr().out
        assert "20 tokens in windows of 8" in out and "| MXFP4 | 4.25 |" in out
        with pytest.raises(RuntimeError, match="llama.cpp writes no"):
            block_types.quantize(tmp_path / "none.gguf", tmp_path / "out.gguf", "Q4_K")
