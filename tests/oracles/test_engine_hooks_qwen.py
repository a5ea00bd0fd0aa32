"""The hook file for vLLM and SGLang on stand-ins of their Qwen3-Next and Qwen3.5: joint products come apart rightly."""

import sys
import types

import numpy as np
import pytest
import torch
from oracle import ours, t
from test_engine_hooks import SAID, Chosen, DecoderLayer, Norm, Says, run
from torch import nn

from kimi_linear.adapters import engine_hooks, sglang, vllm
from kimi_linear.diff import blame


class ByKeyHead(Says):
    """A joint product of a grouped checkpoint: of each key head its part of every tap, in turn."""

    def __init__(self, heads, *taps, grouped=True):
        super().__init__(*taps)
        self.heads, self.grouped = heads if grouped else 1, grouped

    def forward(self, x=None, residual=None):
        parts = [t(SAID[tap]).reshape(len(SAID[tap]), self.heads, -1) for tap in self.taps]
        self.buffer = torch.cat(parts, -1).flatten(1)
        return self.buffer, None


class GDN(nn.Module):
    """A joint product of q, k, v and z, one of b and a, a gated norm of rows of one head, a pool of states."""

    def __init__(self, tap, config, engine):
        super().__init__()
        c, grouped = config, config.gdn_inputs == "grouped"
        self.A_log, self.tap, self.V = nn.Parameter(torch.zeros(1)), tap, c.gdn_v_dim
        self.in_proj_qkvz = ByKeyHead(c.gdn_k_heads, *(tap + x for x in ("q_proj", "k_proj", "v_proj", "z")),
                                      grouped=grouped)
        self.in_proj_ba = ByKeyHead(c.gdn_k_heads, tap + "b", tap + "a", grouped=grouped)
        self.norm = Says(tap + "o_norm", form="plain", shape=lambda T: (T * c.gdn_v_heads, c.gdn_v_dim))
        self.out_proj = Says(tap + "out")
        if engine == "vllm":
            self.kv_cache = torch.zeros(6, 3, 4), torch.full((6, c.gdn_v_heads, c.gdn_v_dim, c.gdn_k_dim), 7.0)

    def forward(self, x):
        self.in_proj_qkvz(x), self.in_proj_ba(x)
        if "slots" in SAID and hasattr(self, "kv_cache"):
            self.kv_cache[1][SAID["slots"]] = t(SAID[self.tap + "state"]).transpose(-1, -2)
        core = t(SAID[self.tap + "o"]).reshape(-1, self.V)
        y = self.out_proj(self.norm(core, core))[0]
        core.fill_(float("nan"))
        return y


class Attend(nn.Module):
    def __init__(self, tap):
        super().__init__()
        self.tap = tap

    def forward(self, q, k, v, forward_batch=None):
        return t(SAID[self.tap + "o"]).flatten(1)


def attention(module, tap, c, engine):
    """The parts of gated attention as attributes of a module: its own in vLLM, the layer in SGLang."""
    queries, keys = (c.attn_heads, c.attn_head_dim), (c.attn_kv_heads, c.attn_head_dim)
    rows = [lambda T, s=s: (T, *s) if engine == "vllm" else (T * s[0], s[1]) for s in (queries, keys)]
    module.qkv_proj, module.attn = QKV(tap, c), Attend(tap)
    module.q_norm = Says(tap + "q_norm", form="plain", shape=rows[0])
    module.k_norm = Says(tap + "k_norm", form="plain", shape=rows[1])
    module.o_proj = Says(tap + "out")


def attend(module, tap, x, batch=None):
    module.qkv_proj(x), module.q_norm(x), module.k_norm(x)
    q, k, v, gated = (t(SAID[tap + n]).flatten(1) for n in ("q", "k", "v", "gated"))
    module.attn(q, k, v)
    return module.o_proj(gated)[0]


class QKV(Says):
    """Of each query head its query and its gate, then keys, then values."""

    def __init__(self, tap, config):
        super().__init__(*(tap + x for x in ("q_proj", "gate", "k_proj", "v")))

    def forward(self, x=None, residual=None):
        q, gate, k, v = (t(SAID[tap]) for tap in self.taps)
        self.buffer = torch.cat([torch.cat([q, gate], -1).flatten(1), k.flatten(1), v.flatten(1)], -1)
        return self.buffer, None


class Attention(nn.Module):
    def __init__(self, tap, config):
        super().__init__()
        self.tap = tap
        attention(self, tap, config, "vllm")

    def forward(self, x):
        return attend(self, self.tap, x)


class Shared(nn.Module):
    """The shared expert: of vLLM with its gate inside."""

    def __init__(self, tap, gate):
        super().__init__()
        self.gate_up_proj, self.act_fn = Says(f"{tap}shared_gate", f"{tap}shared_up"), Says(f"{tap}shared_act",
                                                                                          form="plain")
        self.down_proj, self.tap = Says(f"{tap}shared"), tap
        self.expert_gate = gate

    def forward(self, x):
        self.act_fn(self.gate_up_proj(x)[0])
        y = self.down_proj(x)[0]
        if self.expert_gate is None:
            return y
        self.expert_gate(x)
        return t(SAID[self.tap + "shared_gated"])


class MoE(nn.Module):
    def __init__(self, tap, engine):
        super().__init__()
        self.gate, self.shared_expert_gate, self.tap = Says(f"{tap}logits"), Says(f"{tap}shared_g"), tap
        self.shared_expert = Shared(tap, self.shared_expert_gate if engine == "vllm" else None)
        self.experts = nn.Identity()
        if engine == "sglang":
            self.topk = Chosen(tap)

    def forward(self, x):
        self.shared_expert(x)
        logits = self.gate(x)[0]
        if hasattr(self, "topk"):
            self.shared_expert_gate(x), self.topk(x, logits)
        return t(SAID[self.tap + "out"])


class Layer(DecoderLayer):
    def __init__(self, i, spec, config, engine):
        nn.Module.__init__(self)
        tap, self.i, self.engine, self.mixer = f"layers.{i}.", i, engine, spec.mixer
        if spec.mixer == "gdn":
            self.linear_attn = GDN(f"{tap}gdn.", config, engine)
        elif engine == "vllm":
            self.self_attn = Attention(f"{tap}attn.", config)
        else:
            attention(self, f"{tap}attn.", config, engine)
        self.mlp = MoE(f"{tap}moe.", engine)
        self.input_layernorm, self.post_attention_layernorm = Norm(f"{tap}attn_norm"), Norm(f"{tap}ffn_norm")

    def forward(self, positions, hidden_states, residual, forward_batch=None):
        before = () if residual is None else (t(SAID[f"layers.{self.i - 1}.out"]),)
        x = self.input_layernorm(hidden_states, *before)
        x = x if residual is None else x[0]
        if self.mixer == "gdn":
            out = self.linear_attn(x)
        else:
            out = self.self_attn(x) if self.engine == "vllm" else attend(self, f"layers.{self.i}.attn.", x)
        x, residual = self.post_attention_layernorm(out, t(SAID[f"layers.{self.i}.mid"]))
        return self.mlp(x), residual


@pytest.fixture
def context(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.forward_context", types.ModuleType("vllm.forward_context"))


@pytest.mark.parametrize("case, engine, padded", [
    ("qwen-a", "vllm", 0), ("qwen-a", "vllm", 3), ("qwen35-moe", "vllm", 0), ("qwen-a", "sglang", 2)])
def test_every_tap_of_a_module(tmp_path, context, case, engine, padded):
    said = run(engine, lambda m: engine_hooks.attach(m, tmp_path), padded, case=case, layer=Layer)
    reader = {"vllm": vllm, "sglang": sglang}[engine]
    found = reader.read(tmp_path, model=ours(case))
    unseen = {"gdn": {"q_conv", "k_conv", "v_conv", "q", "k", "g", "beta"}, "attn": set(),
              "moe": {"ids", "weights"} if engine == "vllm" else {"weights", "shared_gated"}}
    for call, want in zip(found, said, strict=True):
        arrays = {n: x for n, x in call.items() if not n.endswith(".state")}
        for name, x in arrays.items():
            assert x.tobytes() == want[name].tobytes(), name
        assert {n.split(".", 2)[-1] for n in set(want) - set(arrays)} == {
            f"{kind}.{n}" for kind, names in unseen.items() for n in names}
    assert blame(ours(case), reader.of_slot(found)).ok, str(blame(ours(case), reader.of_slot(found)))


def test_states_of_vllm_are_kept_before_and_after(tmp_path, context):
    run("vllm", lambda m: engine_hooks.attach(m, tmp_path), case="qwen-a", layer=Layer)
    first, second, *_ = vllm.of_slot(vllm.read(tmp_path, model=ours("qwen-a")), 4)
    state = ours("qwen-a").new_state()
    ours("qwen-a").forward(np.arange(10, 17), state=state, logits="none")
    name = "layers.1.gdn.state"
    np.testing.assert_array_equal(first[name], state[name])
    np.testing.assert_array_equal(second[f"before.{name}"], state[name])
