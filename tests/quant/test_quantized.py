"""kl.Quantized: an array whose rows lie in blocks, and the ops that take it for a weight."""

import pickle

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.diff.budgets import budget

X = np.random.default_rng(5).standard_normal((3, 8, 256)).astype(np.float32)
W = kl.ops.quantize(X, "Q4_K")
VALUES = kl.ops.dequantize(W)


def test_attributes():
    assert (W.type, W.shape, W.ndim, W.size, len(W)) == ("Q4_K", (3, 8, 256), 3, 6144, 3)
    assert W.data.shape == (3, 8, 144) and W.data.dtype == np.uint8
    assert W.n_bytes == W.nbytes == 3 * 8 * 144 and W.storage is kl.storage_types["Q4_K"]
    assert repr(W) == "Quantized(Q4_K, shape=[3, 8, 256], 3,456 bytes)"


def test_slices_of_leading_axes_are_views():
    for index in (1, -1, slice(1, 3), (2, slice(None, None, 2)), (slice(None), 5), (0, 3)):
        part = W[index]
        assert np.shares_memory(part.data, W.data)
        assert part.shape == VALUES[index].shape and np.array_equal(np.asarray(part), VALUES[index])
    rows = W[np.array([2, 0])]
    assert np.array_equal(np.asarray(rows), VALUES[[2, 0]])
    assert [e.shape for e in W] == [(8, 256)] * 3
    for index in (None, ..., (0, 1, 2), (0, ...)):
        with pytest.raises(IndexError, match="reaches the last axis"):
            W[index]
    with pytest.raises(IndexError, match="reaches the last axis"):
        W[0, 0][0]


def test_numpy_sees_values():
    assert np.asarray(W).dtype == np.float32 and np.asarray(W, np.float64).dtype == np.float64
    assert np.array_equal(np.asarray(W), VALUES)
    with pytest.raises(ValueError, match="copy=False cannot be"):
        W.__array__(copy=False)
    assert np.array_equal(kl.reference.dequantize(W), VALUES)


def test_equality_and_pickle():
    assert W == kl.Quantized(W.data.copy(), 12, (3, 8, 256)) == pickle.loads(pickle.dumps(W))
    assert W != W[1:] and W != kl.ops.quantize(X, "Q5_K") and W != 3
    changed = W.data.copy()
    changed[0, 0, 9] ^= 1
    assert W != kl.Quantized(changed, "Q4_K", W.shape)
    with pytest.raises(TypeError, match="unhashable"):
        hash(W)


def test_data_is_kept_where_it_lies():
    raw = W.data.tobytes()
    w = kl.Quantized(raw, "Q4_K", W.shape)
    assert np.shares_memory(w.data, np.frombuffer(raw, np.uint8)) and not w.data.flags.writeable and w == W


@pytest.mark.parametrize("make, error, sentence", [
    (lambda: kl.Quantized(W.data, "Q9_K", W.shape), ValueError, r"type is 'Q9_K'; it must be one of F32, F16, Q4_0"),
    (lambda: kl.Quantized(W.data, 99, W.shape), ValueError, "type is 99; it must be one of"),
    (lambda: kl.Quantized(W.data, "F16", W.shape), ValueError, "type is F16, which has no blocks"),
    (lambda: kl.Quantized(W.data, "Q4_K", (3, 8, 100)), ValueError,
     "shape has rows of 100 values; Q4_K needs a multiple of 256"),
    (lambda: kl.Quantized(W.data, "Q4_K", (3, 9, 256)), ValueError,
     r"data has 3456 bytes; Q4_K of shape \[3, 9, 256\] has 3888"),
    (lambda: kl.Quantized(W.data, "Q4_K", ()), ValueError, r"shape is \[\]; it must have one axis or more"),
    (lambda: kl.Quantized(X, "Q4_K", W.shape), TypeError, "data is float32; it must be uint8"),
])
def test_what_is_no_quantized(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()


# ---- as a weight -----------------------------------------------------------------------------------


def judged(op, got, *arguments):
    """`got` has the bytes of the op on the dequantised values, and is within its budget of float64."""
    plain = [np.asarray(a) if isinstance(a, kl.Quantized) else a for a in arguments]
    assert got.tobytes() == getattr(kl.ops, op)(*plain).tobytes()
    ref = getattr(kl.reference, op)(*arguments)
    assert np.array_equal(ref, getattr(kl.reference, op)(*plain))
    names = {"linear": ("x", "w"), "embedding": ("ids", "table"),
             "moe": ("x", "ids", "weights", "w_gate", "w_up", "w_down")}[op]
    assert (np.abs(got - ref) <= budget(op, ref, **dict(zip(names, arguments, strict=True)))).all()


@pytest.mark.parametrize("name", [t.name for t in kl.storage_types.values() if t.values > 1 and t.writable])
def test_ops_take_it_for_a_weight(name):
    w = kl.ops.quantize(X, name)
    x = np.random.default_rng(6).standard_normal((5, 256)).astype(np.float32)
    judged("linear", kl.ops.linear(x, w[1]), x, w[1])
    judged("linear", kl.ops.linear(x, w[1, ::2]), x, w[1, ::2])
    ids = np.array([7, 0, 7])
    judged("embedding", kl.ops.embedding(ids, w[2]), ids, w[2])
    square = kl.ops.quantize(np.random.default_rng(7).standard_normal((3, 256, 256)).astype(np.float32) / 16, name)
    chosen, weights = np.array([[0, 2], [1, 2], [0, 1], [0, 2], [1, 2]]), np.full((5, 2), 0.5, np.float32)
    judged("moe", kl.ops.moe(x, chosen, weights, square, square, square), x, chosen, weights, square, square, square)


def test_a_list_of_weights_mixes_types():
    x = np.random.default_rng(6).standard_normal((2, 256)).astype(np.float32)
    mixed = [W[0], VALUES[1], kl.ops.quantize(X[2], "Q8_0")]
    for y, w in zip(kl.ops.linear(x, mixed), mixed, strict=True):
        assert y.tobytes() == kl.ops.linear(x, np.asarray(w)).tobytes()


def test_a_weight_of_other_axes():
    with pytest.raises(ValueError, match=r"w has shape \[3, 8, 256\]; it must be \[rows, cols\]"):
        kl.ops.linear(X[0], W)
    with pytest.raises(ValueError, match=r"w has shape \[8, 256\]; it must be \[M, 512\]"):
        kl.ops.linear(np.ones((2, 512), np.float32), W[0])
