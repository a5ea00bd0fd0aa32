"""The one step that makes a foreign tensor ours: axes by letters, padded batches, joined tensors, types."""

import ml_dtypes
import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.adapters._layout import ALONE, Batch, Layout, bring, places

T, H, K = 6, 4, 32


@pytest.fixture(scope="module")
def known():
    return places(kl.Model.tiny().config)


@pytest.fixture
def q(rng):
    return rng.standard_normal((T, H, K)).astype(np.float32)


def taken(known, x, tap, axes="", batch=ALONE, **layout):
    return bring(x, {tap: known[tap]}, Layout(axes, **layout), "q.npy", batch)


def laid(q, axes):
    """q in these axes, each letter or bracket being one."""
    letters = axes.replace("(", "").replace(")", "")
    x = np.expand_dims(q, tuple(range(letters.count("1") + letters.count("B"))))
    free = iter(range(x.ndim - q.ndim))
    x = x.transpose([next(free) if c in "1B" else x.ndim - 3 + "THK".index(c) for c in letters])
    sizes, at, shape = x.shape, 0, []
    for group in __import__("re").findall(r"\([A-Z1]+\)|[A-Z1]", axes):
        n = len(group.strip("()"))
        shape.append(int(np.prod(sizes[at:at + n])))
        at += n
    return x.reshape(shape)


@pytest.mark.parametrize("axes", ["THK", "BTHK", "BHTK", "HTK", "HKT", "T(HK)", "BT(HK)", "(TH)K",
                                  "T(KH)", "TH1K", "1BTKH"])
def test_axes(known, q, axes):
    x = laid(q, axes)
    assert axes == "THK" or x.shape != q.shape
    found, lengths = taken(known, x, "layers.0.kda.q", axes)
    assert np.array_equal(found["layers.0.kda.q"], q) and lengths == (T,)


@pytest.mark.parametrize("shape", [(T, H, K), (1, T, H, K), (T, H * K), (1, T, H * K), (1, 1, T, H, K), (T, 1, H, K)])
def test_without_letters(known, q, shape):
    found, lengths = taken(known, q.reshape(shape), "layers.0.kda.q")
    assert np.array_equal(found["layers.0.kda.q"], q) and lengths == (T,)


@pytest.mark.parametrize("shape", [(T, K, H), (T, H, K, 2), (T * H, K + 1), (2, 3, T, H * K), (5,)])
def test_a_shape_that_must_be_said(known, rng, shape):
    x = rng.standard_normal(shape).astype(np.float32)
    with pytest.raises(ValueError, match=r"q\.npy has shape .*layers\.0\.kda\.q must be \[T, 4, 32\], or say its axes"):
        taken(known, x, "layers.0.kda.q")


@pytest.mark.parametrize("axes, says", [
    ("BTHK", r"\[6, 4, 32\]; layers.0.kda.q as BTHK must be \[B, T, 4, 32\]"),
    ("TKH", r"as TKH must be \[T, 32, 4\]"), ("T(HK)", r"as T\(HK\) must be \[T, 4\*32\]"),
    ("TH", "it must have each of T, H, K once"), ("THKK", "once"), ("THKW", "once"), ("TxK", "it must be letters"),
])
def test_letters_that_do_not_fit(known, q, axes, says):
    with pytest.raises(ValueError, match=says):
        taken(known, q, "layers.0.kda.q", axes)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("axes", ["", "BTHK", "BHTK"])
def test_padded_batch(known, rng, padding, axes):
    lengths = 6, 2, 4
    rows = [rng.standard_normal((n, H, K)).astype(np.float32) for n in lengths]
    x = np.full((3, 6, H, K), np.nan, np.float32)
    for b, r in enumerate(rows):
        x[b, 6 - len(r):] = r if padding == "left" else x[b, 6 - len(r):]
        if padding == "right":
            x[b, :len(r)] = r
    x = x.swapaxes(1, 2) if axes == "BHTK" else x
    found, n = taken(known, x, "layers.0.kda.q", axes, Batch(lengths, padding))
    assert n == lengths and np.array_equal(found["layers.0.kda.q"], np.concatenate(rows))
    with pytest.raises(ValueError, match=r"lengths is \[6, 2\]: it must be 3 numbers of 0 to 6"):
        taken(known, x, "layers.0.kda.q", axes or "BTHK", Batch((6, 2), padding))


@pytest.mark.parametrize("lengths", [(4, 2), (3, 2), (6, 0)])
def test_rows_that_are_packed_already(known, q, lengths):
    """One axis of all tokens, and the lengths of its sequences; padding is behind them all."""
    found, n = taken(known, q[None], "layers.0.kda.q", "BTHK", Batch(lengths))
    assert n == lengths and np.array_equal(found["layers.0.kda.q"], q[:sum(lengths)])


@pytest.mark.parametrize("lengths", [(7, 1), (-1, 6), (6,), (6, 6, 6)])
def test_lengths_that_are_not_those_of_the_batch(known, q, lengths):
    with pytest.raises(ValueError, match=r"q.npy has 2 sequences of 6 tokens; lengths is .*: it must be 2 numbers of"):
        taken(known, np.stack([q, q]), "layers.0.kda.q", "BTHK", Batch(lengths))


def test_states_of_several_sequences_stay_apart(known, rng):
    tap = "layers.0.kda.state"
    x = rng.standard_normal((3, *known[tap].sizes)).astype(np.float32)
    assert np.array_equal(taken(known, x, tap, "NHKV")[0][tap], x)


def test_decode_of_a_batch_has_one_token_each(known, rng):
    x = rng.standard_normal((3, 1, H, K)).astype(np.float32)
    found, n = taken(known, x, "layers.0.kda.q", "", Batch((1, 1, 1)))
    assert n == (1, 1, 1) and found["layers.0.kda.q"].shape == (3, H, K)


@pytest.mark.parametrize("tap, axes", [("layers.0.kda.state", "HVK"), ("layers.0.kda.state", "NHVK"),
                                       ("before.layers.0.kda.state", "NHVK"), ("layers.0.kda.q_history", "CW")])
def test_states(known, rng, tap, axes):
    want = rng.standard_normal(known[tap].sizes).astype(np.float32)
    x = want.swapaxes(-1, -2) if axes != "NHVK" else want.swapaxes(-1, -2)[None]
    assert np.array_equal(taken(known, x, tap, axes)[0][tap], want)
    several = np.stack([want, 2 * want])
    assert np.array_equal(taken(known, several, tap)[0][tap], several)


def test_joined_taps_come_apart(known, rng):
    taps = [f"layers.0.kda.{s}_conv" for s in "qkv"]
    parts = [rng.standard_normal((T, H, K)).astype(np.float32) for _ in taps]
    x = np.concatenate([p.reshape(1, T, H * K) for p in parts], -1)
    found, _ = bring(x, {t: known[t] for t in taps}, Layout(), "qkv.npy")
    assert all(np.array_equal(found[t], p) for t, p in zip(taps, parts, strict=True))


def test_types(known, q):
    narrow = q.astype(ml_dtypes.bfloat16)
    found, _ = taken(known, narrow.view(np.uint16), "layers.0.kda.q", bits="bfloat16")
    assert found["layers.0.kda.q"].dtype == ml_dtypes.bfloat16 and np.array_equal(found["layers.0.kda.q"], narrow)
    assert taken(known, q, "layers.0.kda.q", scale=0.5)[0]["layers.0.kda.q"].tolist() == (q / 2).tolist()
    with pytest.raises(TypeError, match="q.npy is int64; layers.0.kda.q must be floats$"):
        taken(known, q.astype(np.int64), "layers.0.kda.q")
    with pytest.raises(TypeError, match="if these are the bits of bfloat16, say bits"):
        taken(known, narrow.view(np.uint16), "layers.0.kda.q")
    with pytest.raises(TypeError, match="with bits 'bfloat16' it must be uint16"):
        taken(known, q, "layers.0.kda.q", bits="bfloat16")
    with pytest.raises(TypeError, match="q.npy is float32; layers.1.moe.ids must be integers"):
        taken(known, np.zeros((T, 2), np.float32), "layers.1.moe.ids")


def test_joined_channels_in_an_order_of_their_own(known):
    """Histories and taps: what lies by head there becomes ours."""
    rng = np.random.default_rng(2)
    order = rng.permutation(3 * H * K)
    for kind, axes in (("conv", ""), ("history", "CW")):
        taps = {f"layers.0.kda.{s}_{kind}": known[f"layers.0.kda.{s}_{kind}"] for s in "qkv"}
        n = T if kind == "conv" else 3
        x = rng.standard_normal((n, 3 * H * K)).astype(np.float32)
        found, _ = bring(x.T if axes else x, taps, Layout(axes, order=order), "x.npy")
        want = np.split(x[:, order], 3, axis=1)
        assert all(np.array_equal(a.reshape(n, -1), b) for a, b in zip(found.values(), want, strict=True))


@pytest.mark.parametrize("case", ["tiny", "qwen-a", "qwen35-moe"])
def test_every_tap_and_state_array_has_a_place(golden_dir, case):
    model = kl.Model.tiny() if case == "tiny" else kl.Model.from_pretrained(golden_dir / case)
    known = places(model.config)
    trace = model.trace(np.arange(3, 12), states=True)
    assert set(trace) <= set(known)
    for name, x in trace.items():
        assert taken(known, np.asarray(x), name)[0][name].shape == x.shape, name
