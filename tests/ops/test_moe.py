"""moe: budget, batches in the same bytes, storage types, the shared expert, errors."""

import ml_dtypes
import numpy as np
import pytest
from judge import everywhere, guarded, judge, normal

import kimi_linear as kl


def case(T, E=6, D=33, F=20, k=3, dtype=np.float32, seed=0):
    rng = np.random.default_rng([seed, T, E, k])
    ids = np.array([np.sort(rng.choice(E, k, replace=False)) for _ in range(T)], np.int32).reshape(T, k)
    return dict(x=normal(T, D), ids=ids, weights=rng.uniform(0, 1, (T, k)).astype(np.float32),
                w_gate=normal(E, F, D, seed=1, scale=D**-0.5).astype(dtype),
                w_up=normal(E, F, D, seed=2, scale=D**-0.5).astype(dtype),
                w_down=normal(E, D, F, seed=3, scale=F**-0.5).astype(dtype))


SHAPES = [dict(E=1, D=1, F=1, k=1), dict(E=2, D=16, F=15, k=2), dict(), dict(E=5, D=130, F=65, k=1),
          dict(E=4, D=48, F=17, k=4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 2, 30])
@pytest.mark.parametrize("with_shared", [False, True])
@pytest.mark.parametrize("activation", [{}, dict(situ=(4, 25)), dict(situ=(0.7, None)), dict(limit=0.8)], ids=str)
def test_within_budget_same_bytes_and_guarded(T, shape, with_shared, activation):
    inputs = case(T, **shape) | activation
    if with_shared:
        inputs["shared"] = normal(*inputs["x"].shape, seed=9)

    def run(ctx):
        out, check = guarded(inputs["x"].shape)
        assert kl.ops.moe(**inputs, out=out, ctx=ctx) is out
        check()
        return out.copy()

    judge("moe", everywhere(run), kl.reference.moe(**inputs), **inputs)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_storage_type_changes_no_byte(dtype):
    for T in (1, 40):
        inputs = case(T, dtype=dtype)
        wide = {n: v.astype(np.float32) if n[:2] == "w_" else v for n, v in inputs.items()}
        got = everywhere(lambda ctx, inputs=inputs: kl.ops.moe(**inputs, ctx=ctx))
        assert got.tobytes() == kl.ops.moe(**wide).tobytes()


def test_a_token_alone_has_the_same_bytes():
    inputs = case(50, D=70, F=40)
    shared = normal(50, 70, seed=9)
    whole = everywhere(lambda ctx: kl.ops.moe(**inputs, shared=shared, ctx=ctx))
    for size in (1, 3, 7, 20):
        parts = []
        for t in range(0, 50, size):
            part = {n: v if n[:2] == "w_" else v[t: t + size] for n, v in inputs.items()}
            parts.append(kl.ops.moe(**part, shared=shared[t: t + size]))
        assert np.concatenate(parts).tobytes() == whole.tobytes(), size


def test_more_tokens_than_a_pass_holds():
    inputs = case(1100, E=3, D=8, F=4, k=2)
    whole = kl.ops.moe(**inputs)
    judge("moe", whole, kl.reference.moe(**inputs), **inputs)
    late = {n: v if n[:2] == "w_" else v[1020:1030] for n, v in inputs.items()}
    assert kl.ops.moe(**late).tobytes() == whole[1020:1030].tobytes()


def test_all_tokens_to_one_expert_and_experts_that_nobody_uses():
    inputs = case(20, E=7, k=1)
    inputs["ids"][:] = 4
    for e in set(range(7)) - {4}:
        for name in ("w_gate", "w_up", "w_down"):
            inputs[name][e] = np.nan
    judge("moe", everywhere(lambda ctx: kl.ops.moe(**inputs, ctx=ctx)), kl.reference.moe(**inputs), **inputs)


def test_equals_its_ops():
    """One expert with weight 1 is the feed-forward, by the very same bytes."""
    inputs = case(9, E=1, k=1)
    inputs["weights"][:] = 1
    h = kl.ops.swiglu(*kl.ops.linear(inputs["x"], [inputs["w_gate"][0], inputs["w_up"][0]]))
    assert np.array_equal(kl.ops.moe(**inputs), kl.ops.linear(h, inputs["w_down"][0]))


@pytest.mark.parametrize("situ", [(4, 25), (1.7, None)], ids=str)
def test_situ_equals_its_ops(situ):
    inputs = case(9, E=1, k=1)
    inputs["weights"][:] = 1
    inputs["x"] *= 20
    mats = tuple(inputs[name][0] for name in ("w_gate", "w_up", "w_down"))
    h = kl.ops.situ(*kl.ops.linear(inputs["x"], list(mats[:2])), beta=situ[0], linear_beta=situ[1])
    own = kl.ops.linear(h, mats[2])
    assert np.array_equal(kl.ops.moe(**inputs, situ=situ), own)
    assert not np.array_equal(kl.ops.moe(**inputs), own)
    shared = kl.ops.moe(**inputs, shared=mats, situ=situ)
    assert shared.tobytes() == (own + own).tobytes()
    judge("moe", shared, kl.reference.moe(**inputs, shared=mats, situ=situ), **inputs, shared=mats, situ=situ)


def past(inputs, factor=8):
    """Inputs whose products of gate and up lie on both sides of 10, most within."""
    return inputs | dict(x=inputs["x"] * np.float32(factor))


def test_a_limit_equals_its_ops():
    inputs = past(case(9, E=1, k=1))
    inputs["weights"][:] = 1
    mats = tuple(inputs[name][0] for name in ("w_gate", "w_up", "w_down"))
    gate, up = kl.ops.linear(inputs["x"], list(mats[:2]))
    assert gate.max() > 10 > -10 > gate.min() and up.max() > 10 > -10 > up.min()
    own = kl.ops.linear(kl.ops.swiglu(gate, up, limit=10), mats[2])
    assert np.array_equal(kl.ops.moe(**inputs, limit=10), own)
    assert not np.array_equal(kl.ops.moe(**inputs), own)
    assert kl.ops.moe(**inputs, limit=1e4).tobytes() == kl.ops.moe(**inputs).tobytes()
    given = dict(**inputs, shared=mats, limit=10)  # the shared expert has it, too
    shared = everywhere(lambda ctx: kl.ops.moe(**given, ctx=ctx))
    assert shared.tobytes() == (own + own).tobytes()
    judge("moe", shared, kl.reference.moe(**given), **given)


@pytest.mark.parametrize("factor", [1, 8, 1000])
def test_a_limit_of_far_products(factor):
    """What is cut has no error of a product any more."""
    inputs = past(case(20, D=130, F=65), factor) | dict(limit=10)
    judge("moe", everywhere(lambda ctx: kl.ops.moe(**inputs, ctx=ctx)), kl.reference.moe(**inputs), **inputs)


def test_a_limit_hides_no_nan():
    inputs = past(case(10)) | dict(limit=10)
    inputs["x"][3, 5] = np.nan
    y = everywhere(lambda ctx: kl.ops.moe(**inputs, ctx=ctx))
    assert np.isnan(y[3]).all() and np.isfinite(np.delete(y, 3, axis=0)).all()


@pytest.mark.parametrize("activations", ["int8", "bfloat16"])
def test_a_limit_with_narrow_activations(activations):
    inputs = past(case(21, D=64, F=96))
    for name in ("w_gate", "w_up", "w_down"):
        w = inputs[name]
        inputs[name] = w.astype(ml_dtypes.bfloat16) if activations == "bfloat16" else kl.ops.quantize(w, "Q8_0")
    for isa in kl.isa_list():
        ctx = kl.Context(isa=isa, threads=3, activations=activations)
        got, free = kl.ops.moe(**inputs, limit=10, ctx=ctx), kl.ops.moe(**inputs, ctx=ctx)
        wanted = kl.ops.moe(**inputs, limit=10)
        error = np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2))
        assert error < 0.03 < 0.3 < np.sqrt(np.mean((free - wanted) ** 2) / np.mean(wanted**2))


@pytest.mark.parametrize("factor", [1, 30, 1000])
def test_situ_of_far_products(factor):
    """Both factors level off, and with them what an error of a product becomes."""
    inputs = case(20, D=130, F=65) | dict(situ=(4, 25))
    inputs["x"] *= np.float32(factor)
    judge("moe", everywhere(lambda ctx: kl.ops.moe(**inputs, ctx=ctx)), kl.reference.moe(**inputs), **inputs)


def test_experts_are_added_by_fma_in_ascending_id_then_shared():
    inputs = case(7, k=4)
    x, shared, y = inputs["x"], normal(7, 33, seed=9), np.zeros((7, 33), np.float32)
    for e in range(6):
        h = kl.ops.swiglu(*kl.ops.linear(x, [inputs["w_gate"][e], inputs["w_up"][e]]))
        out = kl.ops.linear(h, inputs["w_down"][e]).astype(np.longdouble)
        t, slot = np.nonzero(inputs["ids"] == e)
        y[t] = (inputs["weights"][t, slot, None] * out[t] + y[t]).astype(np.float32)
    got = everywhere(lambda ctx: kl.ops.moe(**inputs, shared=shared, ctx=ctx))
    assert got.tobytes() == (y + shared).tobytes()


def test_shared_expert_by_its_matrices_and_its_gate():
    inputs = case(12)
    mats = normal(25, 33, seed=5), normal(25, 33, seed=6), normal(33, 25, seed=7)
    gate = normal(1, 33, seed=8)
    own = kl.ops.linear(kl.ops.swiglu(*kl.ops.linear(inputs["x"], list(mats[:2]))), mats[2])
    assert kl.ops.moe(**inputs, shared=mats).tobytes() == kl.ops.moe(**inputs, shared=own).tobytes()
    scaled = own * kl.ops.sigmoid(kl.ops.linear(inputs["x"], gate))
    got = kl.ops.moe(**inputs, shared=mats, shared_gate=gate)
    assert got.tobytes() == kl.ops.moe(**inputs, shared=scaled).tobytes()


def test_leading_axes():
    inputs = case(12)
    batched = {n: v if n[:2] == "w_" else v.reshape(3, 4, -1) for n, v in inputs.items()}
    assert np.array_equal(kl.ops.moe(**batched).reshape(12, -1), kl.ops.moe(**inputs))


def test_nan_stays_in_its_token():
    inputs = case(10)
    inputs["x"][3, 5] = np.nan
    y = everywhere(lambda ctx: kl.ops.moe(**inputs, ctx=ctx))
    assert np.isnan(y[3]).all() and np.isfinite(np.delete(y, 3, axis=0)).all()


def test_blas_by_name_is_close():
    inputs = case(40)
    if kl._core.blas_name() == "none":
        with pytest.raises(NotImplementedError, match="this build has no BLAS"):
            kl.Context(gemm="blas")
        return
    got = kl.ops.moe(**inputs, ctx=kl.Context(gemm="blas", threads=2))
    assert np.abs(got - kl.reference.moe(**inputs)).max() < 1e-5


C = case(4)


@pytest.mark.parametrize("change, error, message", [
    (dict(ids=C["ids"] + 4), ValueError, r"ids\[\(0, .\)\] is .; it must be 0 <= ids < 6"),
    (dict(ids=C["ids"][:, ::-1]), ValueError, r"ids\[0, 1\] \(token, slot\) is . after .; the ids of a"),
    (dict(ids=C["ids"] * 0), ValueError, r"ids\[0, 1\] \(token, slot\) is 0 after 0"),
    (dict(ids=C["ids"].astype(float)), TypeError, "ids is float64"),
    (dict(ids=C["ids"][:3]), ValueError, r"ids has shape \[3, 3\]; it must be \[4, k\]"),
    (dict(weights=C["weights"][:, :2]), ValueError, r"weights has shape \[4, 2\]; it must be \[4, 3\]"),
    (dict(w_up=C["w_up"][:5]), ValueError, r"w_up has shape \[5, 20, 33\]; it must be \[6, 20, 33\]"),
    (dict(w_down=C["w_up"]), ValueError, r"w_down has shape \[6, 20, 33\]; it must be \[6, 33, 20\]"),
    (dict(x=C["x"][:, :9]), ValueError, r"w_gate has shape \[6, 20, 33\]; it must be \[6, 20, 9\]"),
    (dict(w_gate=C["w_gate"][0]), ValueError, r"w_gate has shape \[20, 33\]; it must be \[n, rows, cols\]"),
    (dict(shared=C["x"][:2]), ValueError, r"shared has shape \[2, 33\]; it must be \[4, 33\]"),
    (dict(shared=(C["w_gate"][0],)), ValueError, "shared is a tuple of 1"),
    (dict(shared_gate=C["x"][:1]), ValueError, "shared_gate needs shared"),
    (dict(activation="relu"), ValueError, "activation is 'relu'"),
    (dict(situ=4), TypeError, "situ is 4; it must be .beta, linear_beta., or None for SwiGLU"),
    (dict(situ=(4, 25, 1)), TypeError, "situ is .4, 25, 1.; it must be"),
    (dict(situ=(0, 25)), ValueError, "beta of situ is 0.0; it must be > 0"),
    (dict(situ=(4, -1)), ValueError, "linear_beta of situ is -1.0; it must be > 0"),
    (dict(limit=0), ValueError, "limit is 0.0; it must be > 0 in float32, or None"),
    (dict(limit=np.inf), ValueError, "limit is inf; it must be finite in float32"),
    (dict(limit="x"), TypeError, "limit is 'x'; it must be a number > 0, or None"),
    (dict(limit=10, situ=(4, 25)), ValueError, "limit is 10 beside situ; it must be None, it is SwiGLU's"),
    (dict(out=C["x"]), ValueError, "out shares memory with x"),
])
def test_errors_are_sentences(change, error, message):
    with pytest.raises(error, match=message):
        kl.ops.moe(**(C | change))


def test_the_core_checks_ids_itself():
    weight = [(C[n], 0, *C[n].shape) for n in ("w_gate", "w_up", "w_down")]
    y = np.zeros((4, 33), np.float32)
    with pytest.raises(ValueError, match=r"moe: ids\[0, 0\] \(token, slot\) is 77; it must be 0 <= id < 6"):
        kl._core.moe(kl.Context()._core, y, C["x"], C["ids"] * 0 + np.int32(77), C["weights"], *weight, None,
                     4, 33, 20, 3, 0.0, 0.0, 0.0)
    assert not y.any()


@pytest.mark.parametrize("betas, sentence", [((-1, 0, 0), "moe: beta is -1; it must be > 0 and finite"),
                                             ((4, -25, 0), "moe: linear_beta is -25; it must be > 0 and finite, or 0"),
                                             ((0, 0, -1), "moe: limit is -1; it must be > 0 and finite, or 0 for none"),
                                             ((0, 0, np.nan), "moe: limit is nan"),
                                             ((4, 25, 10), "moe: limit is 10 beside situ; it must be 0")])
def test_the_core_checks_betas_and_limit_itself(betas, sentence):
    weight = [(C[n], 0, *C[n].shape) for n in ("w_gate", "w_up", "w_down")]
    y = np.zeros((4, 33), np.float32)
    with pytest.raises(ValueError, match=sentence):
        kl._core.moe(kl.Context()._core, y, C["x"], C["ids"], C["weights"], *weight, None, 4, 33, 20, 3, *betas)
    assert not y.any()
