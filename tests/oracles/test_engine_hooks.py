"""The hook file for vLLM and SGLang on stand-ins: torch modules with those engines' names, signatures and results.

Neither engine runs here. The stand-ins say what a trace of ours has, in the engines' own shapes, into buffers that are
overwritten when the model is done, so that a hook that keeps no copy of its own is found out.
"""

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from oracle import ours, t
from torch import nn

import kimi_linear as kl
from kimi_linear.adapters import engine_hooks, sglang, vllm
from kimi_linear.cli import main
from kimi_linear.diff import blame, replay, step, traces
from kimi_linear.load.safetensors import SafetensorsFile

HOOKS, FORMAT = Path(engine_hooks.__file__), engine_hooks.FORMAT
SAID = {}  # tap -> array of the call that runs


class Says(nn.Module):
    """Gives a tap, [rows, values], in a buffer that dies with the call; as the engine's layer of that kind does."""

    def __init__(self, *taps, form="linear", shape=None):
        super().__init__()
        self.taps, self.form, self.shape, self.buffer = taps, form, shape, None

    def forward(self, x=None, residual=None):
        parts = [t(SAID[tap]) for tap in self.taps]
        self.buffer = torch.cat([p.reshape(len(p), -1) for p in parts], -1)
        y = self.buffer if self.shape is None else self.buffer.view(self.shape(len(parts[0])))
        if self.form == "linear":
            return y, None
        if self.form == "norm" and residual is not None:
            return y, residual
        return y


class Norm(Says):
    def __init__(self, tap):
        super().__init__(tap, form="norm")


class MLP(nn.Module):
    def __init__(self, tap, out):
        super().__init__()
        self.gate_up_proj = Says(f"{tap}gate", f"{tap}up")
        self.act_fn = Says(f"{tap}act", form="plain")
        self.down_proj = Says(out)

    def forward(self, x):
        self.act_fn(self.gate_up_proj(x)[0])
        return self.down_proj(x)[0]


class TopK(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor


class Chosen(nn.Module):
    def __init__(self, tap):
        super().__init__()
        self.tap = tap

    def forward(self, hidden_states, router_logits):
        ids = t(SAID[self.tap + "ids"]).flip(-1)
        return TopK(torch.ones(ids.shape), ids, router_logits)


class MoE(nn.Module):
    """vLLM's and SGLang's block: the router's product, the shared expert, and the sum."""

    def __init__(self, tap, topk):
        super().__init__()
        self.gate, self.shared_experts, self.tap = Says(f"{tap}logits"), MLP(f"{tap}shared_", f"{tap}shared"), tap
        self.experts = nn.Identity()
        if topk:
            self.topk = Chosen(tap)

    def forward(self, hidden_states):
        self.shared_experts(hidden_states)
        logits, _ = self.gate(hidden_states)
        if hasattr(self, "topk"):
            self.topk(hidden_states, logits)
        return t(SAID[self.tap + "out"])


class KDA(nn.Module):
    """KimiDeltaAttention of vLLM: nine products, a gated norm of [1, T, H, K], a pool of states [slots, H, V, K]."""

    def __init__(self, tap, config):
        super().__init__()
        self.A_log, self.tap, self.heads = nn.Parameter(torch.zeros(1)), tap, config.kda_heads
        for name, kind in dict(q_proj="q_proj", k_proj="k_proj", v_proj="v_proj", f_a_proj="f_a",
                               f_b_proj="f", b_proj="b", g_a_proj="g_a", g_b_proj="z", o_proj="out").items():
            setattr(self, name, Says(tap + kind))
        self.o_norm = Says(f"{tap}o_norm", form="plain", shape=lambda T: (1, T, self.heads, -1))
        K = config.kda_head_dim
        self.kv_cache = torch.zeros(6, 3, 4), torch.full((6, self.heads, K, K), 7.0)
        layer = int(tap.split(".")[1])
        self.prefix, self.group = f"model.layers.{layer}.self_attn", layer % 2  # a KV cache group has its own blocks

    def projections(self, x):
        for name in ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj", "f_b_proj", "g_a_proj"):
            getattr(self, name)(x)
        return self.g_b_proj(x)[0].unflatten(-1, (self.heads, -1))

    def forward(self, hidden_states, positions, output):
        z, T = self.projections(hidden_states), len(hidden_states)
        core = t(SAID[self.tap + "o"]).view(1, T, self.heads, -1)
        if "slots" in SAID:
            self.kv_cache[1][SAID["slots"] + self.group] = t(SAID[self.tap + "state"]).transpose(-1, -2)
        x = self.o_norm(core, z)
        core.fill_(float("nan"))
        output[:] = self.o_proj(x.view(T, -1))[0]


class SGLangKDA(KDA):
    """KimiDeltaAttention of SGLang, products fused: q, k, v, b, f_a, g_a as one, f and z stacked."""

    def __init__(self, tap, config):
        super().__init__(tap, config)
        for name in ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj", "f_b_proj",
                     "g_a_proj", "g_b_proj", "kv_cache"):
            delattr(self, name)
        parts = [tap + n for n in ("q_proj", "k_proj", "v_proj", "b", "f_a", "g_a")]
        self.fused_qkvbfg_a_proj, self.fused_fg_b_proj = Says(*parts, form="plain"), Stacked(tap)
        self.attn = nn.Identity()

    def forward(self, hidden_states, positions, forward_batch, zero_allocator=None):
        T = len(hidden_states)
        self.fused_qkvbfg_a_proj(hidden_states)
        _, z = self.fused_fg_b_proj(hidden_states)
        core = t(SAID[self.tap + "o"]).view(1, T, self.heads, -1)
        return self.o_proj(self.o_norm(core, z.unflatten(-1, (self.heads, -1))).squeeze(0).flatten(-2))[0]


class Stacked(nn.Module):
    def __init__(self, tap):
        super().__init__()
        self.tap = tap

    def forward(self, x):
        return torch.stack([t(SAID[self.tap + n]).reshape(len(x), -1) for n in "fz"])


class MLA(nn.Module):
    """KimiMLAAttention: the wrapper of vLLM holds the same modules once more."""

    def __init__(self, tap):
        super().__init__()
        self.kv_a_proj_with_mqa = Says(f"{tap}latent_raw", f"{tap}k_shared")
        self.q_proj, self.o_proj = Says(f"{tap}q"), Says(f"{tap}out")
        self.kv_a_layernorm = Says(f"{tap}latent", form="plain")
        self.mla_attn, self.tap = nn.ModuleDict({"q_proj": self.q_proj, "o_proj": self.o_proj}), tap

    def forward(self, hidden_states, positions, output=None, forward_batch=None, zero_allocator=None):
        self.q_proj(hidden_states), self.kv_a_layernorm(self.kv_a_proj_with_mqa(hidden_states)[0])
        x = self.o_proj(t(SAID[self.tap + "o"]).flatten(1))[0]
        if output is None:
            return x
        output[:] = x
        return None


class DecoderLayer(nn.Module):
    def __init__(self, i, spec, config, engine):
        super().__init__()
        tap = f"layers.{i}."
        kda = KDA if engine == "vllm" else SGLangKDA
        self.self_attn = kda(f"{tap}kda.", config) if spec.mixer == "kda" else MLA(f"{tap}mla.")
        if spec.ffn == "moe":
            self.block_sparse_moe = MoE(f"{tap}moe.", topk=engine == "sglang")
            self.mlp = self.block_sparse_moe
        else:
            self.mlp = MLP(f"{tap}mlp.", f"{tap}mlp.out")
        self.input_layernorm, self.post_attention_layernorm = Norm(f"{tap}attn_norm"), Norm(f"{tap}ffn_norm")
        self.i, self.engine = i, engine

    def forward(self, positions, hidden_states, residual, forward_batch=None):
        if residual is None:
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, _ = self.input_layernorm(hidden_states, t(SAID[f"layers.{self.i - 1}.out"]))
        if self.engine == "vllm":
            out = torch.empty_like(hidden_states)
            self.self_attn(hidden_states=hidden_states, positions=positions, output=out)
        else:
            out = self.self_attn(hidden_states=hidden_states, positions=positions, forward_batch=forward_batch,
                                 zero_allocator=None)
        hidden_states, residual = self.post_attention_layernorm(out, t(SAID[f"layers.{self.i}.mid"]))
        return self.mlp(hidden_states), residual


class Inner(nn.Module):
    def __init__(self, config, engine, layer):
        super().__init__()
        self.embed_tokens, self.norm = Says("embed", form="plain"), Norm("norm")
        self.layers = nn.ModuleList(layer(i, s, config, engine) for i, s in enumerate(config.layers))
        self.engine = engine

    def __call__(self, *args, **kwargs):
        """vLLM's is decorated with @support_torch_compile, which in eager mode goes past the module's own hooks."""
        return self.forward(*args, **kwargs) if self.engine == "vllm" else super().__call__(*args, **kwargs)

    def forward(self, input_ids, positions, forward_batch=None):
        x, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            x, residual = layer(positions, x, residual, forward_batch)
        x, _ = self.norm(x, t(SAID[f"layers.{len(self.layers) - 1}.out"]))
        x = x.clone()
        for module in self.modules():
            if isinstance(module, Says) and module.buffer is not None:
                module.buffer.fill_(float("nan"))
        return x


class KimiLinearForCausalLM(nn.Module):
    def __init__(self, config, engine, layer=DecoderLayer):
        super().__init__()
        self.model, self.logits_processor = Inner(config, engine, layer), Says("logits", form="plain")

    def forward(self, input_ids, positions, forward_batch=None):
        return self.model(input_ids, positions, forward_batch)


# ---- two requests: a prompt each, two steps together, one more of the first ----------------------------

CALLS = [[np.arange(10, 17), np.arange(40, 45)], [[71], [72]], [[81], [82]], [[91]]]


def run(engine, attach, padded=0, change=None, case="tiny", layer=DecoderLayer):
    """Runs a stand-in over the calls; gives what it said, call by call. `change` alters a tap of what is said."""
    model, config = ours(case), ours(case).config
    fake, states, said = KimiLinearForCausalLM(config, engine, layer), model.new_state(2), []
    recorder = attach(fake)
    for sequences in CALLS:
        n = len(sequences)
        ids, offsets = np.concatenate(sequences).astype(int), np.cumsum([0, *map(len, sequences)])
        positions = np.concatenate([s.position + np.arange(len(x)) for s, x in zip(states, sequences)])
        trace = model.trace(ids, offsets=offsets, state=states[:n])
        SAID.clear()
        for name, x in trace.items():
            x = x if change is None or name not in change else change[name](np.array(x))
            SAID[name] = np.concatenate([x, np.full((padded, *x.shape[1:]), 9, x.dtype)])
        slots = torch.tensor([4, 2][:n])
        SAID["slots"] = slots
        for name in (x for x in states[0] if x.endswith(".state")):
            SAID[name] = np.stack([s[name] for s in states[:n]])
        ids, positions = (torch.cat([t(x), torch.zeros(padded, dtype=torch.int64)]) for x in (ids, positions))
        batch = None
        if engine == "vllm":
            metadata = {f"model.layers.{i}.self_attn": types.SimpleNamespace(
                non_spec_query_start_loc=t(offsets), non_spec_state_indices_tensor=slots + i % 2,
                num_actual_tokens=int(offsets[-1])) for i, spec in enumerate(config.layers) if spec.mixer != "mla"}
            sys.modules["vllm.forward_context"].get_forward_context = lambda m=metadata: types.SimpleNamespace(
                attn_metadata=m)
        else:
            decode = all(len(s) == 1 for s in sequences)
            batch = types.SimpleNamespace(forward_mode=types.SimpleNamespace(is_decode=lambda d=decode: d),
                                          req_pool_indices=slots,
                                          extend_seq_lens=None if decode else t(np.diff(offsets)))
        hidden = fake(ids, positions, batch)
        fake.logits_processor(hidden)
        said.append(trace)
    recorder.close()
    return said


@pytest.fixture
def context(monkeypatch):
    module = types.ModuleType("vllm.forward_context")
    monkeypatch.setitem(sys.modules, "vllm.forward_context", module)
    return module


@pytest.mark.parametrize("padded", [0, 3])
def test_vllm(tmp_path, context, padded):
    said = run("vllm", lambda m: engine_hooks.attach(m, tmp_path), padded)
    found = vllm.read(tmp_path, model=ours("tiny"))
    assert [f.meta["kind"] for f in found] == ["prefill", "decode", "decode", "decode"]
    assert found[0].meta["offsets"] == [0, 7, 12] and found[2].meta["position"] == [8, 6]
    assert found[0].meta["slots"] == [4, 2] and found[3].meta["slots"] == [4] and found[0].meta["dtype"] == "float32"
    for call, want in zip(found, said, strict=True):
        floats = {n for n in call if "state" not in n}
        assert len(floats) > 110 and call.tokens.tolist() == want.tokens.tolist()
        for name in floats:
            assert call[name].tobytes() == want[name].tobytes(), name
    assert all(traces(a, b).ok for a, b in zip(found, said, strict=True))
    layout = found[0].meta["layout"]["model.layers.0.self_attn.o_norm/in.0"]
    assert layout == {"shape": [1, 12 + padded, 4, 32], "strides": [(12 + padded) * 128, 128, 32, 1], "offset": 0,
                      "dtype": "float32", "device": "cpu"}


def test_vllm_states_are_kept_before_and_after(tmp_path, context):
    run("vllm", lambda m: engine_hooks.attach(m, tmp_path))
    first, second, *_ = calls = vllm.of_slot(vllm.read(tmp_path, model=ours("tiny")), 4)
    state = ours("tiny").new_state()
    ours("tiny").forward(CALLS[0][0], state=state, logits="none")
    np.testing.assert_array_equal(first["layers.0.kda.state"], state["layers.0.kda.state"])
    np.testing.assert_array_equal(second["before.layers.0.kda.state"], state["layers.0.kda.state"])
    np.testing.assert_array_equal(second["before.layers.1.kda.state"], state["layers.1.kda.state"])  # of another group
    assert [c.tokens.tolist() for c in calls] == [CALLS[0][0].tolist(), [71], [81], [91]]
    assert blame(ours("tiny"), calls).ok, str(blame(ours("tiny"), calls))
    assert len(vllm.of_slot(vllm.read(tmp_path, model=ours("tiny")))) == 4
    with pytest.raises(ValueError, match="slot is 9; the calls have 4, 2"):
        vllm.of_slot(calls + vllm.read(tmp_path, model=ours("tiny")), 9)


@pytest.mark.parametrize("engine, reader", [("vllm", vllm), ("sglang", sglang)])
def test_an_op_that_is_wrong_there_is_named(tmp_path, context, engine, reader):
    """The decay of layer 2 twice as strong, given on to nobody: its gated norm is right on what it got."""
    change = {"layers.2.kda.o_norm": lambda x: x * np.float32(1.05)}
    run(engine, lambda m: engine_hooks.attach(m, tmp_path), change=change)
    report = blame(ours("tiny"), reader.of_slot(reader.read(tmp_path, model=ours("tiny")), 2))
    assert {r.tap for r in report.wrong} == {"layers.2.kda.o_norm", "layers.2.kda.out"}, str(report)


def test_requests_that_come_and_go_are_taken_one_by_one(tmp_path, context, capsys):
    """In a batch that is in another order, or of other requests, rows of one are not those of the next."""
    run("vllm", lambda m: engine_hooks.attach(m, tmp_path))
    calls = vllm.read(tmp_path, model=ours("tiny"))
    with pytest.raises(ValueError, match="call 3 has the requests of slots 4, and call 0 those of 4, 2; take those of "
                                         r"one request: adapters.vllm.of_slot\(calls, slot\), or --slot"):
        blame(ours("tiny"), calls)
    calls[1].meta["slots"].reverse()
    with pytest.raises(ValueError, match="call 1 has the requests of slots 2, 4, and call 0 those of 4, 2"):
        blame(ours("tiny"), calls[:3])
    command = ["blame", "tiny", str(tmp_path), "--names", "vllm"]
    assert main(command) == 2 and "call 3 has the requests of slots 4" in capsys.readouterr().err
    assert main([*command, "--slot", "2"]) == 0 and "ok: none of" in capsys.readouterr().out
    assert main([*command, "--slot", "5"]) == 2 and "slot is 5; the calls have 4, 2" in capsys.readouterr().err
    assert main(["blame", "tiny", str(tmp_path), "--slot", "5"]) == 2
    assert "--slot is for --names vllm and --names sglang" in capsys.readouterr().err


@pytest.mark.parametrize("padded", [0, 3])
def test_sglang(tmp_path, padded):
    said = run("sglang", lambda m: engine_hooks.attach(m, tmp_path), padded)
    found = sglang.read(tmp_path, model=ours("tiny"))
    assert [f.meta["offsets"] for f in found] == [[0, 7, 12], [0, 1, 2], [0, 1, 2], [0, 1]]
    for call, want in zip(found, said, strict=True):
        assert len(call) > 110 and "layers.1.moe.ids" in call and "layers.0.kda.z" in call
        for name, x in call.items():
            assert x.tobytes() == want[name].tobytes(), name
    assert blame(ours("tiny"), sglang.of_slot(found)).ok


def test_sglang_hook_factory(tmp_path):
    """Hooked as SGLang does it, by a name and a JSON: the first run is not recorded, the others are, without logits."""
    def attach(model):
        hook = engine_hooks.sglang_hook({"folder": str(tmp_path), "limit": 2})
        model.model.register_forward_hook(hook)
        held = next(c.cell_contents for c in hook.__closure__ if isinstance(c.cell_contents, list))
        return types.SimpleNamespace(close=lambda: held[0].close())

    said = run("sglang", attach)
    found = sglang.read(tmp_path, model=ours("tiny"))
    assert [f.tokens.tolist() for f in found] == [[71, 72], [81, 82]] and "logits" not in found[0]
    assert all(x.tobytes() == said[1][n].tobytes() for n, x in found[0].items())


def test_profile_runs_are_not_recorded(tmp_path, context):
    """vLLM runs the model without a batch when it starts."""
    fake = KimiLinearForCausalLM(ours("tiny").config, "vllm")
    recorder = engine_hooks.attach(fake, tmp_path)
    SAID.clear()
    SAID.update({**ours("tiny").trace(np.arange(5)), "slots": torch.tensor([0])})
    SAID.update({f"layers.{i}.kda.state": np.zeros((1, 4, 32, 32), np.float32) for i in range(6)})
    context.get_forward_context = lambda: types.SimpleNamespace(attn_metadata=None)
    fake(torch.arange(5), torch.arange(5))
    recorder.close()
    with pytest.raises(ValueError, match="holds no call-.*; was the model run, in eager mode, after attach"):
        vllm.read(tmp_path, model=ours("tiny"))


def test_bad_recordings(tmp_path, context):
    run("vllm", lambda m: engine_hooks.attach(m, tmp_path))
    other = ours("kimi-a")
    with pytest.raises(ValueError, match=r"call-000000.safetensors:model.embed_tokens/out has shape \[12, 256\]; "
                                         r"embed must be"):
        vllm.read(tmp_path, model=other)
    with pytest.raises(FileNotFoundError, match="none is not there; it must be the folder that engine_hooks.attach"):
        vllm.read(tmp_path / "none", model=other)
    file = tmp_path / "call-000001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(kl.FormatError, match="cut short or damaged"):
        vllm.read(tmp_path, model=ours("tiny"))
    from safetensors.torch import save_file

    for about, error, says in (({"format": "x"}, kl.FormatError, "its format is 'x'"),
                               ({"format": FORMAT, "call": "1"}, ValueError, "has no module of the table"),
                               ({"format": FORMAT, "world": "8"}, ValueError, "of one of 8 ranks")):
        save_file({"other": torch.zeros(2)}, file, about)
        with pytest.raises(error, match=says):
            vllm.read(tmp_path, model=ours("tiny"))
    with pytest.raises(ValueError, match="the model has no module 'model'; it has "):
        engine_hooks.attach(nn.Linear(2, 2), tmp_path)


def test_a_closed_recorder_leaves_the_model_as_it_was(tmp_path):
    """With a forward of the class, or of the object; and where another has been put on since."""
    for own in (None, lambda *args: 3):
        fake = KimiLinearForCausalLM(ours("tiny").config, "vllm")
        if own is not None:
            fake.model.forward = own
        recorder = engine_hooks.attach(fake, tmp_path)
        assert vars(fake.model)["forward"] is not own
        recorder.close()
        assert vars(fake.model).get("forward") is own
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in fake.modules())
    recorder, later = engine_hooks.attach(fake, tmp_path), lambda *args: 4
    fake.model.forward = later
    recorder.close()
    assert fake.model.forward is later


def test_a_folder_is_of_one_run(tmp_path, context):
    """What an earlier run left would be read with it."""
    run("vllm", lambda m: engine_hooks.attach(m, tmp_path))
    with pytest.raises(ValueError, match="has the calls of another run; give a folder of its own, or remove them"):
        engine_hooks.attach(KimiLinearForCausalLM(ours("tiny").config, "vllm"), tmp_path)


def test_positions_tell_the_sequences_where_nobody_does(tmp_path):
    """No engine around: a sequence ends where positions do not rise by one."""
    fake = KimiLinearForCausalLM(ours("tiny").config, "sglang")
    recorder = engine_hooks.attach(fake, tmp_path)
    SAID.clear()
    SAID.update(ours("tiny").trace(np.arange(9)))
    fake(torch.arange(9), torch.tensor([0, 1, 2, 3, 0, 1, 7, 8, 9]))
    recorder.close()
    meta = sglang.read(tmp_path, model=ours("tiny"))[0].meta
    assert meta["offsets"] == [0, 4, 6, 9] and meta["position"] == [0, 0, 7] and meta["kind"] == "mixed"


def test_functions_that_are_no_modules(tmp_path, monkeypatch):
    """vLLM's chunk_kda and its decode kernel, with states in a pool, in place, of which the batch's rows are kept."""
    rng = np.random.default_rng(0)
    engine = types.ModuleType("fake_vllm_kda")

    def step_kernel(q, k, v, g, beta, initial_state, cu_seqlens, ssm_state_indices, use_qk_l2norm_in_kernel=True):
        before = initial_state[ssm_state_indices].transpose(-1, -2).numpy()
        o, after = kl.reference.delta_rule(*(np.asarray(x[0]) for x in (q, k, v, g, beta)), l2_norm=True,
                                           initial_state=before, offsets=cu_seqlens.numpy())
        initial_state[ssm_state_indices] = t(after.astype(np.float32)).transpose(-1, -2)
        return t(o[None].astype(np.float32)), initial_state

    engine.fused_recurrent_kda = step_kernel
    monkeypatch.setitem(sys.modules, "fake_vllm_kda", engine)
    undo = engine_hooks.record_function("fake_vllm_kda.fused_recurrent_kda", tmp_path, limit=3)
    pool = t(rng.standard_normal((5, 2, 8, 8)).astype(np.float32))
    for _ in range(4):
        x = [t(rng.standard_normal((1, 3, 2, 8)).astype(np.float32)) for _ in range(4)]
        beta = torch.rand(1, 3, 2)
        engine.fused_recurrent_kda(x[0], x[1], x[2], -x[3].abs(), beta, pool, torch.arange(4), torch.tensor([4, 0, 2]))
    engine.plain = lambda q, initial_state=None, ssm_state_indices=None: q
    engine_hooks.record_function("fake_vllm_kda.plain", tmp_path / "plain")
    assert engine.plain(pool, None, torch.tensor([0])) is pool and len(list((tmp_path / "plain").iterdir())) == 1
    undo()
    assert engine.fused_recurrent_kda is step_kernel
    report = replay(tmp_path)
    assert report.ok and len(report.rows) == 3 and not report.skipped, str(report)
    file = SafetensorsFile(tmp_path / "call-000001.safetensors")
    assert file["in/initial_state"].shape == (3, 2, 8, 8)
    assert json.loads(file.metadata["layout"])["in/initial_state"]["shape"] == [5, 2, 8, 8]


def test_the_hook_file_stands_alone(tmp_path):
    """It is imported from a copy, where there is no kimi_linear."""
    copy = tmp_path / "engine_hooks.py"
    copy.write_text(HOOKS.read_text(encoding="utf-8"), encoding="utf-8")
    code = ("import sys; sys.modules['kimi_linear'] = None\n"
            "import engine_hooks, torch; m = torch.nn.Module(); m.model = torch.nn.Identity()\n"
            "r = engine_hooks.attach(m, 'calls', outputs=('*',)); m.model(torch.ones(2, 3)); r.close()")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(SafetensorsFile(tmp_path / "calls" / "call-000000.safetensors")) == ["model/out"]


def test_a_step_of_vllm_judged_alone(tmp_path, context):
    """One layer of the second decode call, from the states that the hook kept."""
    run("vllm", lambda m: engine_hooks.attach(m, tmp_path))
    call = vllm.of_slot(vllm.read(tmp_path, model=ours("tiny")), 2)[2]
    report = step(ours("tiny"), call, 1)
    lacking = {"layers.1.kda.o", "layers.1.moe.out"}  # q, k, g and expert ids are in no module there
    assert report.ok and {tap for tap, _ in report.skipped} <= lacking, str(report)
