"""Traces that torch and transformers make: .pt files, the model-addition debugger, bfloat16, a wrong scale."""

import contextlib
import copy
import functools
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import torch
from oracle import ours, theirs, tokens
from safetensors.torch import save_file
from transformers.model_debugging_utils import model_addition_debugger_context
from transformers.models.kimi_linear import modeling_kimi_linear as modeling

import kimi_linear as kl
from kimi_linear import golden
from kimi_linear.adapters import debugger, pt, record_calls
from kimi_linear.adapters import transformers as adapter
from kimi_linear.diff import blame, replay, traces

IDS = tokens("tiny", 70)


# ---- .pt -----------------------------------------------------------------------------------------------


def test_pt(tmp_path):
    """Nested lists, bfloat16, heads first, one file and a folder of them."""
    trace = ours("tiny").trace(IDS)
    q = [torch.from_numpy(trace[f"layers.{i}.kda.q"].copy()).transpose(0, 1)[None].bfloat16() for i in (0, 1, 2)]
    torch.save({"layers": [{"q": x} for x in q], "meta": {"n": 3}, "logits": torch.from_numpy(trace["logits"].copy())},
               tmp_path / "dump.pt")
    mapping = {"taps": {"layers.{i}.kda.q": {"key": "layers.{i}.q", "axes": "BHTK"}, "logits": {"key": "logits"}},
               "tokens": IDS.tolist(), "dtype": "bfloat16"}
    found = pt.read(tmp_path / "dump.pt", mapping, model=ours("tiny"))
    assert found["layers.1.kda.q"].dtype == ml_dtypes.bfloat16 and found.tokens.tolist() == IDS.tolist()
    assert found.meta["left_out"] == ["layers.4.kda.q"] and traces(found, trace).ok
    torch.save(torch.from_numpy(trace["norm"].copy()).requires_grad_(), tmp_path / "norm.pt")
    mapping = {"taps": {"norm": "norm.pt", "logits": {"file": "dump.pt", "key": "logits"}}}
    found = pt.read(tmp_path, mapping, model=ours("tiny"))
    assert all(found[n].tobytes() == trace[n].tobytes() for n in ("norm", "logits"))
    torch.save({"norm": torch.zeros(3, 256), "tokens": torch.arange(3)}, tmp_path / "named.pt")
    assert pt.read(tmp_path / "named.pt", model=ours("tiny")).tokens.tolist() == [0, 1, 2]


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle was run')",)


def test_hostile_pt(tmp_path):
    file = tmp_path / "x.pt"
    torch.save({"norm": torch.zeros(3, 256), "trap": Trap()}, file)
    with pytest.raises(kl.FormatError, match=r"x\.pt: it holds more than tensors and plain values, and is not read"):
        pt.read(file, model=ours("tiny"))
    torch.save({"norm": torch.zeros(3, 256)}, file)
    whole = file.read_bytes()
    for data in (whole[:len(whole) // 2], b"", b"nothing"):
        file.write_bytes(data)
        with pytest.raises(kl.FormatError, match="it is no file of torch, or it is cut short|and is not read"):
            pt.read(file, model=ours("tiny"))
    file.write_bytes(whole)
    with pytest.raises(KeyError, match=r"has no tensor 'q'; it has norm"):
        pt.read(file, {"taps": {"layers.0.kda.q": {"file": "x.pt", "key": "q"}}}, model=ours("tiny"))
    with pytest.raises(KeyError, match=r"y\.pt is not there; there are x\.pt"):
        pt.read(tmp_path, {"taps": {"norm": "y.pt"}}, model=ours("tiny"))
    with pytest.raises(FileNotFoundError, match="it must be a .pt file, or a folder of them"):
        pt.read(tmp_path / "none.pt", model=ours("tiny"))


# ---- transformers' debugger ----------------------------------------------------------------------------


def debugged(folder, ids=IDS[None], dtype=torch.float32, **options):
    model = copy.deepcopy(theirs("tiny")).to(dtype)
    with model_addition_debugger_context(model, debug_path=str(folder), **options) as model:
        model(torch.from_numpy(ids), use_cache=False)


def test_model_addition_debugger(tmp_path):
    debugged(tmp_path, do_prune_layers=False, use_repr=False)
    found, want = debugger.read(tmp_path, model=ours("tiny")), adapter.trace(theirs("tiny"), IDS)
    assert len(found) > 60 and found.tokens.tolist() == IDS.tolist() and "left_out" not in found.meta
    for name, x in found.items():
        np.testing.assert_array_equal(x, want[name], err_msg=name)
    assert traces(found, ours("tiny").trace(IDS)).ok


def test_a_batch_is_so_many_sequences(tmp_path):
    """Of the debugger, and of modules' results by their paths in a file."""
    batch = IDS[:40].reshape(4, 10)
    debugged(tmp_path, batch, do_prune_layers=False, use_repr=False)
    found = debugger.read(tmp_path, model=ours("tiny"))
    assert found.meta["offsets"] == [0, 10, 20, 30, 40] and found.tokens.tolist() == batch.ravel().tolist()
    results, known = {"tokens": torch.from_numpy(batch)}, golden.names(ours("tiny").config)
    model = copy.deepcopy(theirs("tiny"))
    for path, module in model.named_modules():
        if path in known:
            module.register_forward_hook(lambda _, given, made, path=path: results.update(
                {path: (made[0] if isinstance(made, tuple) else made).detach().clone().contiguous()}))
    model(torch.from_numpy(batch), use_cache=False)
    save_file(results, tmp_path / "batch.safetensors")
    by_path = kl.Trace.load(tmp_path / "batch.safetensors", names="hf", config=ours("tiny").config)
    assert by_path.meta["offsets"] == found.meta["offsets"]
    for trace in (found, by_path):
        assert blame(ours("tiny"), trace).ok and traces(trace, ours("tiny").trace(list(batch))).ok


def test_the_debugger_of_a_bfloat16_run(tmp_path):
    """Its files are widened; the tree says what they were."""
    debugged(tmp_path, dtype=torch.bfloat16, do_prune_layers=False, use_repr=False)
    found = debugger.read(tmp_path, model=ours("tiny"))
    assert found.meta["dtype"] == "bfloat16" and found["layers.2.mid"].dtype == np.float32
    with rounded_weights() as model:
        assert blame(model, found).ok
    assert traces(found, ours("tiny").trace(IDS), threshold=None).rows[3].threshold == 16 * 2.0**-8


def test_debugger_s_defaults(tmp_path):
    """Layers pruned, tensors printed: what is there is told."""
    debugged(tmp_path)
    with pytest.raises(kl.FormatError, match="record with use_repr=False"):
        debugger.read(tmp_path, model=ours("tiny"))
    figures = debugger.figures(tmp_path)
    assert figures["model.norm/outputs"]["shape"] == [1, 70, 256]
    np.testing.assert_allclose(figures["model.norm/outputs"]["max"], ours("tiny").trace(IDS)["norm"].max(), rtol=1e-3)
    debugged(tmp_path, use_repr=False)
    assert debugger.read(tmp_path, model=ours("tiny")).meta["left_out"][0].startswith("layers 1, 2, 3, 4: pruned")


# ---- live, in bfloat16 ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow():
    return copy.deepcopy(theirs("tiny")).to(torch.bfloat16)


@contextlib.contextmanager
def rounded_weights():
    """Our model on the weights that theirs has in bfloat16."""
    model = ours("tiny")
    weights = {n: np.asarray(model.weights[n]).astype(ml_dtypes.bfloat16).astype(np.float32) for n in model.weights}
    yield kl.ReferenceModel(model.config, weights)


def test_bfloat16_run_has_no_fault(narrow):
    trace = adapter.trace(narrow, IDS)
    assert trace.meta["layout"]["model.layers.0.self_attn.q_proj"] == {
        "shape": [1, 70, 128], "strides": [70 * 128, 128, 1], "offset": 0, "dtype": "bfloat16", "device": "cpu"}
    with rounded_weights() as model:
        report = blame(model, trace)
    assert report.ok, str(report)


def test_a_wrong_scale_of_attention_is_named(narrow):
    """One line changed in a copy: 1 / sqrt of the keys' own width, without the shared part's."""
    other = copy.deepcopy(narrow)
    for layer in other.model.layers:
        if hasattr(layer.self_attn, "scaling"):
            layer.self_attn.scaling = ours("tiny").config.nope_dim**-0.5
    with rounded_weights() as model:
        report = blame(model, adapter.trace(other, IDS))
    assert {r.tap for r in report.wrong} == {"layers.3.mla.o", "layers.5.mla.o"}, str(report)
    assert all("scale" in r.kind for r in report.wrong), str(report)


# ---- recorded calls ------------------------------------------------------------------------------------


def recorded(model, folder):
    name = f"{modeling.__name__}.chunk_kimi_delta_attention"
    with record_calls(name, folder, op="delta_rule", conventions="hf"), torch.no_grad():
        model(torch.from_numpy(IDS[None]))
    return replay(folder)


def test_calls_of_transformers_delta_rule(tmp_path, narrow):
    """chunk_kimi_delta_attention as a forward calls it, judged call by call; those altered are found.

    In float32 it is behind: it subtracts cumulative sums of g, and strong decays cost it digits.
    """
    report = recorded(narrow, tmp_path / "narrow")
    assert report.ok and len(report.rows) == 4 and {r.dtype for r in report.rows} == {"bfloat16"}, str(report)
    exact = recorded(theirs("tiny"), tmp_path / "exact")
    assert not exact.ok and exact.rows[0].share > 1 and exact.rows[0].error < 1e-5, str(exact)
    function = modeling.chunk_kimi_delta_attention

    @functools.wraps(function)
    def altered(*args, **kwargs):
        o, state = function(*args, **kwargs)
        return o, None if state is None else state.transpose(-1, -2)

    with mock.patch.object(modeling, "chunk_kimi_delta_attention", altered):
        report = recorded(narrow, tmp_path / "narrow")
    assert {r.file for r in report.wrong} == {f"call-{i:06d}.safetensors" for i in range(4, 8)}, str(report)
