"""A model with its latent cache in Q8_0: the laws of the other types, verbs and files, sizes, and what it refuses."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from states import assert_same, contents, ids, read

import kimi_linear as kl

MLA = [3, 5]  # layers of the packaged model
Q8_0 = GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def tiny():
    return kl.Model.tiny(cache="q8_0")


@pytest.fixture(scope="module", params=[16, 32, 0])
def model(request, tiny):
    """The packaged model, whose shared key of 16 values is no whole blocks, and like it one of 32, one of none."""
    if request.param == tiny.config.rope_dim:
        return tiny
    config = tiny.config.to_dict() | {"qk_rope_head_dim": request.param}
    return kl.Model.from_config(config, 3, cache="q8_0")


def test_rows_are_blocks_of_the_taps(model):
    tokens, state = ids(model, 600), model.new_state()
    _, trace = model.forward(tokens, state=state, taps=["*.mla.latent", "*.mla.k_shared"])
    for i in MLA:
        latent, name = trace[f"layers.{i}.mla.latent"], f"layers.{i}.mla.latent_cache"
        assert state[name].tobytes() == quants.quantize(latent, Q8_0).tobytes()
        assert state.widened(name).tobytes() == quants.dequantize(state[name], Q8_0).tobytes()
        shared, name = trace[f"layers.{i}.mla.k_shared"], f"layers.{i}.mla.k_shared_cache"
        if model.config.rope_dim == 16:
            assert state[name].dtype == np.float16
            assert state[name].tobytes() == shared.astype(np.float16).tobytes()
        elif model.config.rope_dim:
            assert state[name].tobytes() == quants.quantize(shared, Q8_0).tobytes()


def test_tokens_read_the_cache_as_it_is_stored(model):
    """With a float32 cache and those taps replaced by what the blocks hold: the same bytes."""
    def stored(part):
        def edit(rows):
            width = rows.shape[-1]
            if width % 32:
                return rows.astype(np.float16).astype(np.float32)
            return quants.dequantize(quants.quantize(rows, Q8_0), Q8_0)
        return edit

    tokens = ids(model, 130)
    edit = {"*.mla.latent": stored("latent")} | ({"*.mla.k_shared": stored("k")} if model.config.rope_dim else {})
    want = model.forward(tokens, state=model.new_state(cache="float32"), edit=edit)
    assert model.forward(tokens, state=model.new_state()).tobytes() == want.tobytes()
    assert model.forward(tokens).tobytes() == want.tobytes()
    assert model.forward(tokens, state=model.new_state(cache="float32")).tobytes() != want.tobytes()


def test_the_same_bytes_in_batch_threads_isa_and_split(model):
    parts = [ids(model, n, n) for n in (1, 70, 600, 64)]
    states = model.new_state(len(parts))
    together = model.forward(parts, state=states)
    for part, state, logits in zip(parts, states, together, strict=True):
        alone = model.new_state()
        assert model.forward(part, state=alone).tobytes() == logits.tobytes()
        assert contents(alone) == contents(state)
    before, want = model.ctx, contents(states[1])
    try:
        for isa in kl.isa_list():
            for threads in (1, 3):
                model.ctx = kl.Context(isa=isa, threads=threads)
                assert contents(read(model, parts[1])) == want
    finally:
        model.ctx = before
    assert contents(read(model, parts[2], cuts=[64, 192, 576])) == contents(states[2])


def test_fork_restore_truncate(model):
    tokens = ids(model, 300)
    state = read(model, tokens, checkpoints_every=64, keep=3)
    snapshot = state.snapshot()
    assert_same(state.fork(), read(model, tokens), model)
    state.truncate(200)
    assert_same(state.fork(), read(model, tokens[:200], cuts=[192]), model)
    state.restore(snapshot)
    assert_same(state, read(model, tokens), model)
    with pytest.raises(ValueError, match="one state has a cache of F16, the other of Q8_0"):
        read(model, tokens, cache="float16").restore(snapshot)


def test_save_and_load(model, tmp_path):
    state = read(model, ids(model, 230), checkpoints_every=64, keep=3)
    state.save(tmp_path / "state")
    loaded = model.load_state(tmp_path / "state", checkpoints_every=64, keep=3)
    assert loaded.cache == "q8_0" and loaded.checkpoints == [128, 192, 230]
    assert_same(loaded, state, model)


def test_arrays_can_be_replaced_in_their_shape_and_type(tiny):
    state, name = read(tiny, ids(tiny, 70)), "layers.3.mla.latent_cache"
    assert (state[name].shape, state[name].dtype) == ((70, 68), np.uint8)
    other = read(tiny, ids(tiny, 70, 1))
    state[name] = other[name]
    assert state[name].tobytes() == other[name].tobytes()
    with pytest.raises(TypeError, match="latent_cache is float32; it must be uint8"):
        state[name] = state.widened(name)
    with pytest.raises(ValueError, match=r"latent_cache has shape \[70, 64\]"):
        state[name] = state[name][:, :64]


def test_attention_probabilities_are_of_the_values(tiny):
    tokens = ids(tiny, 40)
    trace = tiny.trace(tokens, "layers.3.mla.probs", state=tiny.new_state())
    wide = tiny.trace(tokens, "layers.3.mla.probs", state=tiny.new_state(cache="float32"))
    assert 0 < np.abs(trace["layers.3.mla.probs"] - wide["layers.3.mla.probs"]).max() < 0.02


@pytest.mark.parametrize("cache, latent, shared", [("float32", 256, 64), ("float16", 128, 32), ("q8_0", 68, 32)])
def test_a_page_is_its_rows(tiny, cache, latent, shared):
    assert tiny.plan(cache=cache).state_page == 2 * 512 * (latent + shared)


def test_a_latent_that_blocks_do_not_divide_is_named(golden_dir):
    model = kl.Model.from_pretrained(golden_dir / "kimi-b")
    message = "cache is of type Q8_0, blocks of 32 values, which do not divide the latent's 24; it must be F32 or F16"
    for make in (model.new_state, model.plan):
        with pytest.raises(ValueError, match=message):
            make(cache="q8_0")
