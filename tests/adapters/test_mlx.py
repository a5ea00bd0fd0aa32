"""The adapter of mlx-lm without MLX: NumPy arrays in the shapes of its caches and functions, and what is refused.

On mlx-lm itself: tests/oracles/test_mlx.py.
"""

from dataclasses import make_dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import K3_CASES

import kimi_linear as kl
from kimi_linear.adapters import mlx as adapter

B, T = 1, 7


def args_of(config):
    """A dataclass with the keys of a config as fields, as mlx-lm's ModelArgs; in it another of K3's text_config."""
    d = config.to_dict()
    if "text_config" in d:
        d["text_config"] = make_dataclass("TextArgs", list(d["text_config"]))(**d["text_config"])
    return make_dataclass("ModelArgs", list(d))(**d)


@pytest.fixture(params=["tiny", "qwen-a", *K3_CASES])
def model(request, golden_dir, monkeypatch):
    monkeypatch.setattr(adapter, "_numpy", np.asarray)
    return kl.Model.tiny() if request.param == "tiny" else kl.Model.from_pretrained(golden_dir / request.param)


def sizes(config, mixer):
    """Heads of keys and of values, and their widths."""
    if mixer == "kda":
        return config.kda_heads, config.kda_heads, config.kda_head_dim, config.kda_head_dim
    return config.gdn_k_heads, config.gdn_v_heads, config.gdn_k_dim, config.gdn_v_dim


def linear(config):
    return next((i, spec.mixer) for i, spec in enumerate(config.layers) if spec.mixer in ("kda", "gdn"))


def test_config_of_a_model(model):
    given = SimpleNamespace(model_type=model.config.model_type, args=args_of(model.config))
    assert adapter.config_of(given) == model.config


@pytest.mark.parametrize("other", [object(), SimpleNamespace(model_type="kimi_k3", args=None),
                                   SimpleNamespace(model_type="kimi_linear", args={})])
def test_another_model_is_refused(other):
    with pytest.raises(ValueError, match="must be a Model of mlx_lm.models.kimi_linear or mlx_lm.models.qwen3_next"):
        adapter.trace(other, [1, 2])


def test_a_batch_is_refused(model):
    given = SimpleNamespace(model_type=model.config.model_type, args=args_of(model.config))
    with pytest.raises(ValueError, match=r"tokens has shape \[1, 2\]; it must be \[T\], one sequence"):
        adapter.trace(given, [[1, 2]])


def test_what_functions_are_given(model, rng):
    """Taps of the model, in their shapes; q has the scale K^-0.5 there."""
    c = model.config
    i, mixer = linear(c)
    H, Hv, K, V = sizes(c, mixer)
    q, k, v = (rng.standard_normal((B, T, h, n)).astype(np.float32) for h, n in ((H, K), (H, K), (Hv, V)))
    beta = rng.random((B, T, Hv)).astype(np.float32)
    got = adapter._unit((3 * q, 2 * k), (q, k), i, c) | adapter._delta_rule((q, k, v, beta, beta, None), None, i, c)
    want = model.trace(rng.integers(3, 300, T))
    assert set(got) == {f"layers.{i}.{mixer}.{n}" for n in ("q", "k", "q_conv", "k_conv", "v_conv", "beta")}
    assert all(x.shape == want[name].shape for name, x in got.items())
    assert np.array_equal(got[f"layers.{i}.{mixer}.q_conv"], 3 * q[0])
    np.testing.assert_allclose(got[f"layers.{i}.{mixer}.q"], q[0] * K**0.5, rtol=1e-6)


def test_attention_and_router(model, rng):
    c, want = model.config, model.trace(rng.integers(3, 300, T))
    i = next(i for i, spec in enumerate(c.layers) if spec.mixer in ("mla", "attn"))
    q = rng.standard_normal((B, c.attn_heads or c.mla_heads, T, c.attn_head_dim or c.v_head_dim)).astype(np.float32)
    k = q[:, :c.attn_kv_heads or 4]
    got = adapter._attention((q, k, k), q, i, c)
    parts = "qko" if c.layers[i].mixer == "attn" else "o"
    assert set(got) == {f"layers.{i}.{c.layers[i].mixer}.{n}" for n in parts}
    assert all(x.shape == want[name].shape for name, x in got.items())
    ids = np.array([[[5, 1], [0, 7]]])
    last = c.n_layers - 1
    got = adapter._router((None,), (ids, ids / 10), last, c)
    chosen, weights = got[f"layers.{last}.moe.ids"], got[f"layers.{last}.moe.weights"]
    assert chosen.tolist() == [[1, 5], [0, 7]] and chosen.dtype == np.int32
    assert weights.tolist() == [[0.1, 0.5], [0, 0.7]]


def test_latent_attention_of_a_single_token(golden_dir, monkeypatch, rng):
    """Its result is a latent, and that of `unembed_out` the tap; of more tokens the latter has the values."""
    monkeypatch.setattr(adapter, "_numpy", np.asarray)
    c = kl.Model.from_pretrained(golden_dir / "k3-a").config
    x = rng.standard_normal((B, c.mla_heads, T, c.v_head_dim))
    assert adapter._attention((x, x, x), x[:, :, :1], 2, c) == {}
    path = "model.layers.2.self_attn.unembed_out"
    assert adapter._output_taps(path, (), x, c) == {}
    got = adapter._output_taps(path, (), x[:, :, :1], c)
    assert set(got) == {"layers.2.mla.o"} and np.array_equal(got["layers.2.mla.o"][0], x[0, :, 0])


def test_joint_projection(golden_dir, monkeypatch):
    """Of KDA in K3: q, k and v side by side."""
    monkeypatch.setattr(adapter, "_numpy", np.asarray)
    c = kl.Model.from_pretrained(golden_dir / "k3-a").config
    n = c.kda_heads * c.kda_head_dim
    x = np.arange(T * 3 * n).reshape(B, T, 3 * n)
    got = adapter._output_taps("model.layers.1.self_attn.qkv_proj", (), x, c)
    assert {name: (y.shape, y[0, 0]) for name, y in got.items()} == {
        f"layers.1.kda.{part}_proj": ((T, n), j * n) for j, part in enumerate("qkv")}


def test_attention_residuals(golden_dir, monkeypatch):
    """Mixtures by the order of calls, and what the second of a layer is given; a block's first has no sum yet."""
    monkeypatch.setattr(adapter, "_numpy", np.asarray)
    model = kl.Model.from_pretrained(golden_dir / "k3-a")
    c, taps, found = model.config, adapter._residuals(model.config), {}
    for call, i in enumerate([*np.repeat(range(c.n_layers), 2), None]):
        found |= taps((None, np.array([[-call]])), np.array([[call]]), i, c)
    assert set(found) == {n for n in model.taps if n.endswith(("_res", ".mid"))}
    assert found["layers.1.attn_res"] == 2 and found["layers.1.ffn_res"] == 3 and found["layers.1.mid"] == -3
    assert found["output_res"] == 2 * c.n_layers


@pytest.mark.parametrize("case, taps", [
    ("k3-a", {"layers.2.self_attn.o_proj": "mla.gated", "layers.1.mlp.routed_expert_norm": "moe.routed",
              "layers.1.mlp.routed_expert_up_proj": None, "layers.1.post_attention_layernorm": None}),
    ("k3-b", {"layers.0.self_attn.o_proj": "mla.o", "layers.2.mlp.routed_expert_up_proj": "moe.routed",
              "layers.2.post_attention_layernorm": "mid"}),
])
def test_inputs_of_modules(golden_dir, case, taps):
    """Which tap they are goes by the config."""
    model = kl.Model.from_pretrained(golden_dir / case)
    want = model.trace([5, 6, 7])
    for path, tap in taps.items():
        layer = ".".join(path.split(".")[:2])
        x = want[f"{layer}.{tap}"] if tap else np.zeros((3, 1))
        got = adapter.input_taps("model." + path, lambda x=x: x.reshape(3, -1), model.config,
                                 adapter.inputs_of(model.config))
        assert set(got) == ({f"{layer}.{tap}"} if tap else set())
        assert all(y.shape == x.shape and np.array_equal(y, x) for y in got.values())


def test_caches(model, rng):
    """Under the names and in the shapes of a State, whose states are [H, K, V]."""
    c, state = model.config, model.new_state()
    model.forward(rng.integers(3, 300, T), state=state)
    found = {}
    for i, spec in enumerate(c.layers):
        if spec.mixer in ("kda", "gdn"):
            parts = [state[f"layers.{i}.{spec.mixer}.{s}_history"][None] for s in "qkv"]
            apart = c.model_type == "kimi_linear"
            held = parts if apart else [np.concatenate(parts, axis=-1)]
            last = state[f"layers.{i}.{spec.mixer}.state"].swapaxes(-1, -2)[None]
            cache = SimpleNamespace(cache=[*held, last])
        else:                                               # with room for more tokens
            names = ("latent_cache", "k_shared_cache") if spec.mixer == "mla" else ("k_cache", "v_cache")
            keys, values = (state[f"layers.{i}.{spec.mixer}.{n}"].reshape(T, -1, state[
                f"layers.{i}.{spec.mixer}.{n}"].shape[-1]).swapaxes(0, 1)[None] for n in names)
            room = [(0, 0), (0, 0), (0, 9), (0, 0)]
            cache = SimpleNamespace(keys=np.pad(keys, room), values=np.pad(values, room), offset=T)
        found |= adapter._state_of(cache, i, c)
    assert set(found) == set(state)
    assert all(np.array_equal(x, state[name]) for name, x in found.items())
