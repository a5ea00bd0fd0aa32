"""Matrix products, routing and block types on the host build of the HIP kernels: the CPU's bytes from every version of
a ladder, for waves of 32 and 64 and any order of threads, so that they are within the CPU's budgets; errors."""

import numpy as np
import pytest
from block_data import READ_ONLY, WRITABLE, raw_blocks, same_floats
from hip_build import context, everywhere, host_build_only, host_library, set_up, versions
from hip_weights import CPU, random_blocks, stored
from judge import normal

import kimi_linear as kl
from kimi_linear.diff.budgets import budget

BLOCK_TYPES = WRITABLE + READ_ONLY
TYPES = ["F32", "F16", "BF16", *BLOCK_TYPES]

version = versions("1", "2", "3", "")


def parts(got):
    return [np.asarray(part) for part in (got if isinstance(got, tuple) else (got,))]


def same_as_the_cpu(run, all_settings=True):
    """`run(ctx)`, an array or a tuple of them, has the CPU's bytes everywhere, or for one setting; its result."""
    wanted = b"".join(part.tobytes() for part in parts(run(CPU)))

    def one(ctx):
        return np.frombuffer(b"".join(part.tobytes() for part in parts(run(ctx))), np.uint8)

    try:
        if not all_settings:
            set_up(host_library(), 64, 7)
        got = everywhere(one) if all_settings else one(context())
    finally:
        set_up(host_library())
    assert got.tobytes() == wanted
    return run(CPU)


# ---- block types ----


@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_hip_dequantize_has_the_bytes_of_the_cpu(type):
    for q in (stored(normal(5, 768, scale=30), type), random_blocks(type, 7, 512)):
        y = same_as_the_cpu(lambda ctx, q=q: kl.ops.dequantize(q, ctx=ctx))
        assert y.tobytes() == kl.reference.dequantize(q).astype(np.float32).tobytes()
    assert kl.ops.dequantize(random_blocks(type, 2, 256)[:0], ctx=context()).shape == (0, 256)


@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_hip_dequantize_of_any_bytes(type):
    """Every byte, every special float16 at every place: the CPU's values, NaN where it has NaN."""
    kind = kl.storage_types[type]
    data = raw_blocks(kind)
    q = kl.Quantized(data, type, (len(data), kind.values))
    assert same_floats(kl.ops.dequantize(q, ctx=context()), kl.ops.dequantize(q, ctx=CPU))


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-7, 1.0, 6e4, 1e30, 3e38])
def test_hip_quantize_has_the_bytes_of_the_cpu(type, scale):
    """Halves, too, equal extremes of both signs, and a range that overflows."""
    x = np.clip(normal(9, 96), -1, 1) * np.float32(scale)
    x[0, :32], x[1, 3], x[2, 32:64] = 0.0, -x[1].max() * 0.99, -x[2, 40]
    x[3, :32] = np.arange(-16, 16) * np.float32(scale) / 32
    x[4, 5], x[4, 9] = np.float32(scale), np.float32(-scale)
    same_as_the_cpu(lambda ctx: kl.ops.quantize(x, type, ctx=ctx).data)


def test_hip_quantize_refuses_what_is_not_finite_and_what_it_does_not_write():
    x = normal(4, 64)
    x[2, 40], x[3, 1] = np.inf, np.nan
    out = np.full((4, 68), 7, np.uint8)
    with pytest.raises(ValueError, match=r"x\[2, 40\] is inf; it must be finite"):
        kl.ops.quantize(x, "Q8_0", out=out, ctx=context())
    with pytest.raises(ValueError, match=r"quantize: x\[2, 40\] is inf; it must be finite"):
        kl._core.quantize(context()._core, out, x, 8, 4, 64)
    assert (out == 7).all()
    with pytest.raises(NotImplementedError, match="type 12 is not written on hip; these are: Q8_0 Q4_0 Q4_1 Q5_0 "
                                                  "Q5_1; device='cpu' writes the others"):
        kl.ops.quantize(normal(1, 256), "Q4_K", ctx=context())


@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_hip_embedding_of_blocks(type, version):
    table, ids = stored(normal(20, 512), type), np.array([19, 0, 0, 7], np.int32)
    same_as_the_cpu(lambda ctx: kl.ops.embedding(ids, table, ctx=ctx), False)


@pytest.mark.parametrize("id", [4, 9, 15, 43])
def test_hip_ids_that_are_no_type_are_refused(id):
    """Every type has kernels; ids of ggml that are none (Q4_2, Q8_1, Q8_K) and the first above all."""
    with pytest.raises(TypeError, match=f"w has storage type {id} .* it must be a known type"):
        kl._core.linear(context()._core, [np.zeros((1, 4), np.float32)], normal(1, 256),
                        [(np.zeros(4096, np.uint8), id, 1, 4, 256)], [None], [False], 1, 256)


# ---- linear ----


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("T, M", [(3, 19), (9, 33)])
def test_hip_linear_has_the_bytes_of_the_cpu(T, M, type, version):
    """Three spans of 256 inputs, of which a thread of v2 reads sixteen at once, and what is left of short blocks."""
    block = kl.storage_types[type].values
    D = 768 if block == 256 else 768 + max(block, 64)
    x, w, bias = normal(T, D), stored(normal(M, D, seed=1), type), normal(M, seed=2)
    y = same_as_the_cpu(lambda ctx: kl.ops.linear(x, w, bias=bias, ctx=ctx), type == "Q4_K")
    wide = np.asarray(w, np.float32) if type in TYPES[:3] else kl.ops.dequantize(w)
    ref = kl.reference.linear(x, wide, bias=bias)
    assert (np.abs(y - ref) <= budget("linear", ref, x=x, w=wide, bias=bias)).all()


@pytest.mark.parametrize("D", [1, 2, 15, 16, 17, 31, 33, 100, 255, 256, 257, 527])
def test_hip_linear_of_any_width_has_the_bytes_of_the_cpu(D, version):
    for T in (1, 11):
        x, w = normal(T, D), normal(34, D, seed=1)
        for stored_w in (w, w.astype(np.float16), np.ascontiguousarray(w.T).T):
            same_as_the_cpu(lambda ctx, x=x, w=stored_w: kl.ops.linear(x, w, ctx=ctx),
                            D in (1, 17))


@pytest.mark.parametrize("sign", [1, -1])
def test_hip_linear_where_each_addition_rounds_one_way(sign, version):
    """The worst case of a sum: terms just above half a step, all of one sign. Within the budget, which a sum one by one
    is not."""
    D = 1024
    x = np.full((9, D), sign * (2**-12 + 2**-24), np.float32)
    x[:, 0] = sign
    w = np.full((3, D), 2**-12 + 2**-24, np.float32)
    w[:, 0] = 1
    y, ref = same_as_the_cpu(lambda ctx: kl.ops.linear(x, w, ctx=ctx), False), kl.reference.linear(x, w)
    bound = budget("linear", ref, x=x, w=w)
    assert (np.abs(y - ref) <= bound).all()
    one_by_one = np.float32(0)
    for term in (x[0].astype(np.float64) * w[0]).tolist():
        one_by_one = np.float32(one_by_one + term)
    assert abs(one_by_one - ref[0, 0]) > bound[0, 0]


@pytest.mark.parametrize("T", [2, 20])
@pytest.mark.parametrize("type", ["F32", "Q4_K"])
def test_hip_linear_of_several_matrices_one_below_the_other(type, T, version):
    w, x, bias = stored(normal(3 * 20, 256, seed=1), type), normal(T, 256), normal(60, seed=2)
    weight = (w if type == "F32" else w.data, 0 if type == "F32" else 12, 3, 20, 256)

    def run(ctx):
        y = np.full((T, 60), np.nan, np.float32)
        kl._core.linear(ctx._core, [y], x, [weight], [bias], [False], T, 256)
        return y

    assert same_as_the_cpu(run, False).tobytes() == kl.ops.linear(x, w, bias=bias).tobytes()


@pytest.mark.parametrize("T", [2, 20])
@pytest.mark.parametrize("type", ["Q8_0", "Q4_K", "Q6_K", "Q2_K", "Q5_1", "IQ2_XS"])
def test_hip_linear_of_transposed_blocks(type, T, version):
    w, x = stored(normal(40, 256, seed=1), type), normal(T, 40)  # 40 inputs, 256 outputs

    def run(ctx):
        y = np.full((T, 256), np.nan, np.float32)
        kl._core.linear(ctx._core, [y], x, [(w.data, kl.storage_types[type].id, 1, 40, 256)], [None], [True], T, 40)
        return y

    same_as_the_cpu(run, False)


#: Neighbours of one kernel type go together, up to six; rare types and a transposed matrix go alone.
SEVERAL = [(19, "F32"), (1, "F32"), (33, "Q8_0"), (40, "Q4_K"), (16, "Q4_K"), (70, "Q4_K"), (5, "Q4_K"), (17, "Q4_K"),
           (32, "Q4_K"), (9, "Q4_K"), (3, "IQ3_S"), (20, "IQ3_S"), (7, "IQ2_XS"), (18, "F16"), (34, "turned"),
           (2, "turned")]


def several():
    for i, (rows, type) in enumerate(SEVERAL):
        w = normal(rows, 512, seed=i + 1)
        yield np.asfortranarray(w) if type == "turned" else stored(w, type)


@pytest.mark.parametrize("T", [1, 8, 9, 40])
def test_hip_linear_of_several_weights_has_the_bytes_of_each_alone(T, version):
    x, w = normal(T, 512), list(several())
    biases = [normal(len(m), seed=90) if i % 2 else None for i, m in enumerate(w)]
    together = kl.ops.linear(x, w, bias=biases, ctx=context())
    for y, m, bias in zip(together, w, biases, strict=True):
        assert y.tobytes() == kl.ops.linear(x, m, bias=bias, ctx=context()).tobytes()
    same_as_the_cpu(lambda ctx: tuple(kl.ops.linear(x, w, bias=biases, ctx=ctx)), T == 8)


@host_build_only
@pytest.mark.parametrize("T, launches", [(1, 10), (9, 9)])
def test_hip_linear_of_several_weights_launches(T, launches):
    """F32; Q8_0; six and one of Q4_K; three of rare types; F16; transposed ones, for one token each alone."""
    x, w, ctx = normal(T, 512), list(several()), context()
    count = host_library().kl_host_launches
    before = count()
    kl.ops.linear(x, w, ctx=ctx)
    assert count() - before == launches


def test_hip_a_token_has_the_same_bytes_in_any_batch():
    x, w = normal(70, 100), normal(70, 100, seed=1)
    whole = kl.ops.linear(x, w, ctx=context())
    for size in (1, 5, 8, 9, 33):
        got = [kl.ops.linear(x[t: t + size], w, ctx=context()) for t in range(0, 70, size)]
        assert np.concatenate(got).tobytes() == whole.tobytes(), size


# ---- moe ----


def experts(T, E=6, D=33, F=20, k=3, type="F32", seed=0):
    rng = np.random.default_rng([seed, T, E, k])
    ids = np.array([np.sort(rng.choice(E, k, replace=False)) for _ in range(T)], np.int32).reshape(T, k)
    mats = {"w_gate": normal(E, F, D, seed=1, scale=D**-0.5), "w_up": normal(E, F, D, seed=2, scale=D**-0.5),
            "w_down": normal(E, D, F, seed=3, scale=F**-0.5)}
    return dict(x=normal(T, D), ids=ids, weights=rng.uniform(0, 1, (T, k)).astype(np.float32),
                **{name: stored(w, type) for name, w in mats.items()})


@pytest.mark.parametrize("shape", [dict(E=1, D=1, F=1, k=1), dict(E=2, D=16, F=15, k=2), dict(), dict(E=40, k=8)],
                         ids=str)
@pytest.mark.parametrize("T", [0, 1, 8, 9, 90])
def test_hip_moe_has_the_bytes_of_the_cpu(T, shape, version):
    """Up to 256 pairs are grouped by one block."""
    inputs = experts(T, **shape)
    inputs["shared"] = normal(*inputs["x"].shape, seed=9) if T % 2 else None
    y = same_as_the_cpu(lambda ctx: kl.ops.moe(**inputs, ctx=ctx), T in (1, 9, 90) and "E" not in shape)
    ref = kl.reference.moe(**inputs)
    assert (np.abs(y - ref) <= budget("moe", ref, **inputs)).all()


@pytest.mark.parametrize("situ", [(4.0, 25.0), (1.7, None)], ids=str)
@pytest.mark.parametrize("T", [0, 1, 8, 9, 90])
def test_hip_moe_with_situ_has_the_bytes_of_the_cpu(T, situ, version):
    inputs = experts(T) | dict(situ=situ)
    inputs["x"] *= 10
    y = same_as_the_cpu(lambda ctx: kl.ops.moe(**inputs, ctx=ctx), T in (1, 9))
    ref = kl.reference.moe(**inputs)
    assert (np.abs(y - ref) <= budget("moe", ref, **inputs)).all()


@pytest.mark.parametrize("T", [0, 1, 8, 9, 90])
def test_hip_moe_with_a_limit_has_the_bytes_of_the_cpu(T, version):
    """Of one token gate and up are one launch."""
    inputs = experts(T) | dict(limit=10.0)
    inputs["x"] *= 10
    y = same_as_the_cpu(lambda ctx: kl.ops.moe(**inputs, ctx=ctx), T in (1, 9))
    ref = kl.reference.moe(**inputs)
    assert (np.abs(y - ref) <= budget("moe", ref, **inputs)).all()
    assert T == 0 or not np.array_equal(y, kl.ops.moe(**inputs | dict(limit=None)))


def test_hip_moe_with_a_limit_of_any_types(version):
    for T in (1, 3, 12):
        for up in ("Q4_K", "IQ3_S", "BF16"):  # of one type, and of types that do not go together
            inputs = experts(T, D=256, F=256, type="Q4_K") | dict(limit=7)
            inputs["w_up"] = stored(normal(6, 256, 256, seed=2), up)
            same_as_the_cpu(lambda ctx, inputs=inputs: kl.ops.moe(**inputs, ctx=ctx), False)


@pytest.mark.parametrize("T", [1, 9])
def test_hip_moe_with_a_limit_hides_no_nan(T, version):
    inputs = experts(T) | dict(limit=10.0)
    inputs["x"][0, 5] = np.nan
    y = kl.ops.moe(**inputs, ctx=context())
    assert np.isnan(y[0]).all() and np.isfinite(y[1:]).all()


def test_hip_moe_with_situ_of_three_types_in_one_call(version):
    for T in (1, 3, 12):
        inputs = experts(T, D=256, F=256) | {"w_up": stored(normal(6, 256, 256, seed=2), "Q4_K"),
                                             "w_down": stored(normal(6, 256, 256, seed=3), "Q6_K"), "situ": (4, 25)}
        same_as_the_cpu(lambda ctx, inputs=inputs: kl.ops.moe(**inputs, ctx=ctx), False)


@pytest.mark.parametrize("type", TYPES[1:])
def test_hip_moe_of_any_type(type, version):
    for T in (2, 9):
        inputs = experts(T, E=3, D=256, F=256, k=1, type=type)
        same_as_the_cpu(lambda ctx, inputs=inputs: kl.ops.moe(**inputs, ctx=ctx), False)


def test_hip_moe_of_three_types_in_one_call(version):
    for T in (3, 12):
        inputs = experts(T, D=256, F=256) | {"w_up": stored(normal(6, 256, 256, seed=2), "Q4_K"),
                                             "w_down": stored(normal(6, 256, 256, seed=3), "Q6_K")}
        same_as_the_cpu(lambda ctx, inputs=inputs: kl.ops.moe(**inputs, ctx=ctx), False)


def test_hip_moe_of_more_tokens_than_a_pass():
    inputs = experts(1030, E=3, D=8, F=4, k=1)
    assert kl.ops.moe(**inputs, ctx=context()).tobytes() == kl.ops.moe(**inputs).tobytes()


def test_hip_moe_of_one_expert_for_all_and_of_experts_that_nobody_uses(version):
    inputs = experts(40, E=7, k=1)
    inputs["ids"][:] = 4
    for e in set(range(7)) - {4}:
        inputs["w_up"][e] = np.nan
    assert np.isfinite(same_as_the_cpu(lambda ctx: kl.ops.moe(**inputs, ctx=ctx), False)).all()


def core_moe(ctx, inputs, y):
    weight = [(inputs[n], 0, *inputs[n].shape) for n in ("w_gate", "w_up", "w_down")]
    T, k = inputs["ids"].shape
    kl._core.moe(ctx._core, y, inputs["x"], inputs["ids"], inputs["weights"], *weight, None, T, 33, 20, k, 0.0, 0.0,
                 0.0)


@pytest.mark.parametrize("T", [20, 90])
@pytest.mark.parametrize("wrong, sentence", [(77, "is 77"), (-1, "is -1"), (0, "is 0")])
def test_hip_moe_says_which_id_is_wrong_and_goes_on(wrong, sentence, T, version):
    good, y = experts(T), np.full((T, 33), 7, np.float32)
    bad = good | dict(ids=good["ids"].copy())
    bad["ids"][5, 2] = bad["ids"][9, 1] = wrong
    with pytest.raises(ValueError, match=rf"moe: ids\[5, 2\] \(token, slot\) {sentence}; ids of a token must rise "
                                         "within 0 to 5"):
        core_moe(context(), bad, y)
    assert (y == 7).all()
    core_moe(context(), good, y)
    assert y.tobytes() == kl.ops.moe(**good).tobytes()


@pytest.mark.parametrize("T", [8, 90])
def test_hip_moe_of_one_id_everywhere_fails_and_stays_inside_its_arrays(T, version):
    """Each expert of a token the same: more pairs of it than there are tokens, in more groups."""
    bad, y = experts(T) | dict(ids=np.full((T, 3), 2, np.int32)), np.full((T, 33), 7, np.float32)
    with pytest.raises(ValueError, match=r"moe: ids\[0, 1\] \(token, slot\) is 2"):
        core_moe(context(), bad, y)
    assert (y == 7).all()


# ---- route ----

ROUTES = [dict(k=1), dict(k=8, scale=2.446), dict(k=3, renormalise=False, scale=0.5), dict(k=3, function="softmax"),
          dict(k=3, function="softmax", renormalise=False), dict(k=3, groups=4, top_groups=2),
          dict(k=4, groups=4, top_groups=1), dict(k=5, groups=16, top_groups=5), dict(k=16),
          dict(k=8, groups=2, top_groups=2, scale=-1.0)]


@pytest.mark.parametrize("options", ROUTES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 5, 37])
def test_hip_route_has_the_ids_and_bytes_of_the_cpu(T, options, version):
    for bias in (None, np.linspace(-0.2, 0.2, 16).astype(np.float32)[::-1].copy()):
        for scale in (0.3, 30.0):
            x = normal(T, 16, scale=scale)
            same_as_the_cpu(lambda ctx, x=x, bias=bias: kl.ops.route(x, bias=bias, **options, ctx=ctx),
                            T == 5)


@pytest.mark.parametrize("E", [1, 31, 33, 256, 1024, 1100])
def test_hip_route_of_many_experts(E, version):
    x = normal(3, E)
    for function in ("sigmoid", "softmax"):
        same_as_the_cpu(lambda ctx, f=function: kl.ops.route(x, k=min(8, E), function=f, ctx=ctx), E < 50)


def test_hip_route_ties_and_masks(version):
    x = np.array([[1, 2, 2, 0, 2, 1], [0, 0, 0, 0, 0, 0], [5, -1, 5, 5, 5, -1], [300, 200, 100, -300, 300, 9]],
                 np.float32)
    for options in (dict(k=2), dict(k=2, groups=3, top_groups=1), dict(k=5), dict(k=4, groups=3, top_groups=2)):
        same_as_the_cpu(lambda ctx, o=options: kl.ops.route(x, **o, ctx=ctx))
    bias = np.array([-np.inf, 0, -np.inf, 0, -np.inf, -np.inf], np.float32)
    ids, _ = same_as_the_cpu(lambda ctx: kl.ops.route(x, k=4, bias=bias, ctx=ctx))
    assert ids[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("place, value, options, message", [
    ((2, 5), np.nan, dict(), r"scores\[2, 5\] \(token, expert\) is NaN"),
    ((2, 5), np.inf, dict(function="softmax"), r"scores\[2, 5\] is inf, the largest of its token"),
    ((3,), -np.inf, dict(function="softmax"), r"scores\[3, 0\] is -inf, the largest"),
])
def test_hip_route_says_which_score_is_wrong(place, value, options, message, version):
    x = normal(6, 8)
    x[place] = value
    x[5, 7] = np.nan
    out = np.full((6, 2), 9, np.int32), np.full((6, 2), 9, np.float32)
    with pytest.raises(ValueError, match=message):
        kl.ops.route(x, k=2, **options, out=out, ctx=context())
    assert (out[0] == 9).all() and (out[1] == 9).all()
    with pytest.raises(ValueError, match=r"bias\[1\] is nan; it must be a number below infinity"):
        kl.ops.route(normal(6, 8), k=2, bias=np.array([0, np.nan] * 4, np.float32), ctx=context())
    assert kl.ops.route(normal(6, 8), k=2, ctx=context())[0].shape == (6, 2)  # what was noted is gone


def test_hip_route_of_scores_that_are_probabilities(version):
    def run(ctx):
        ids, weights = np.zeros((5, 3), np.int32), np.zeros((5, 3), np.float32)
        kl._core.route(ctx._core, ids, weights, np.abs(normal(5, 12)), None, 5, 12, 3, 4, 2, 2, True, 2.0)
        return ids, weights

    same_as_the_cpu(run)
