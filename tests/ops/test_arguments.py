"""What all ops promise of their arguments: arrays wherever they lie, results that share no memory, errors by name."""

import threading

import numpy as np
import pytest
from judge import normal

import kimi_linear as kl
from kimi_linear import context
from kimi_linear.testing import spec
from kimi_linear.testing.spec import OPS


def plain(op):
    """The inputs of the op's plain case."""
    inputs = spec(op).cases[0].make(spec(op).kind)
    return {name: inputs.get(name) for name in spec(op).required} | inputs


def unaligned(a):
    """`a` at an address that is no multiple of its items' size, as in a file behind a header of any length."""
    room = np.zeros(a.nbytes + 1, np.uint8)
    moved = room[1:].view(a.dtype).reshape(a.shape)
    moved[...] = a
    return moved


def of_bytes(results):
    return [np.asarray(r).tobytes() for r in (results if isinstance(results, (tuple, list)) else (results,))]


@pytest.mark.parametrize("op", OPS)
def test_arrays_lie_at_any_address(op):
    inputs = plain(op)
    moved = {name: unaligned(x) if isinstance(x, np.ndarray) else x for name, x in inputs.items()}
    assert of_bytes(getattr(kl.ops, op)(**moved)) == of_bytes(getattr(kl.ops, op)(**inputs))


def test_so_do_weights_ids_and_states():
    x, w = normal(5, 16), normal(7, 16).astype(np.float16)
    assert of_bytes(kl.ops.linear(x, unaligned(w))) == of_bytes(kl.ops.linear(x, w))
    ids = unaligned(np.array([3, 1], np.int32))
    np.testing.assert_array_equal(kl.ops.embedding(ids, x), x[[3, 1]])
    state = kl.Model.tiny().new_state()
    name = state.keys()[0]
    state[name] = unaligned(state[name] + 1)
    assert (state[name] == 1).all()


@pytest.mark.parametrize("call, name", [
    (lambda out: kl.ops.sigmoid(np.zeros(4, np.float32), out=out), "out"),
    (lambda out: kl.ops.route(np.zeros((1, 8), np.float32), k=4, out=(None, out[None])), r"out\[1\]"),
])
def test_a_result_is_written_at_an_address_of_its_size(call, name):
    with pytest.raises(ValueError, match=rf"{name} begins at an address that is no multiple of 4; it must be aligned"):
        call(unaligned(np.zeros(4, np.float32)))


def test_integers_past_64_bits_are_named():
    model = kl.Model.tiny()
    for name, call in (("prompt", model.generate), ("tokens", model.forward)):
        with pytest.raises(ValueError, match=f"{name} holds 1{'0' * 26}; integers must fit 64 bits"):
            call([1, 10**26])


def test_lists_that_make_no_array_are_named():
    with pytest.raises(ValueError, match="^b is a list that makes no array"):
        kl.ops.add(np.zeros(2, np.float32), [[1.0], [1.0, 2.0]])


# ---- results that share memory -----------------------------------------------------------------------------------


def room(a, *shapes):
    """Arrays of these shapes over the memory of `a`, grown where one needs more; `a` itself first."""
    room = np.zeros(max(a.size, *(int(np.prod(shape)) for shape in shapes)), np.float32)
    room[:a.size] = a.ravel()
    return [room[:int(np.prod(shape))].reshape(shape) for shape in (a.shape, *shapes)]


@pytest.mark.parametrize("name", ["w_uk", "w_uv"])
def test_latent_attention_is_not_written_over_its_weights(name):
    given = dict(q=normal(6, 2, 12), latent=normal(6, 16), k_shared=normal(6, 4), w_uk=normal(2, 8, 16),
                 w_uv=normal(2, 5, 16))
    given[name], out = room(given[name], (6, 2, 5))
    with pytest.raises(ValueError, match=f"out shares memory with {name}"):
        kl.ops.latent_attention(**given, scale=0.3, out=out)


@pytest.mark.parametrize("name", ["w_gate", "w_up", "w_down", "ids"])
def test_moe_is_not_written_over_its_weights(name):
    given = dict(x=normal(6, 8), ids=np.tile(np.arange(2, dtype=np.int32), (6, 1)), weights=normal(6, 2),
                 w_gate=normal(2, 3, 8), w_up=normal(2, 3, 8), w_down=normal(2, 8, 3))
    if name == "ids":
        out = np.zeros((6, 8), np.float32)
        given["ids"] = out.ravel()[:12].view(np.int32).reshape(6, 2)
        given["ids"][:, 1] = 1
    else:
        given[name], out = room(given[name], (6, 8))
    with pytest.raises(ValueError, match=f"out shares memory with {name}"):
        kl.ops.moe(**given, out=out)


def test_a_bias_that_is_no_ndarray_is_not_written_over():
    out = np.zeros((1, 8), np.float32)
    with pytest.raises(ValueError, match="out shares memory with bias"):
        kl.ops.linear(normal(1, 8), normal(8, 8), memoryview(out[0]), out=out)


def results_over_one_room():
    q, k, v, beta = normal(4, 2, 8), normal(4, 2, 8), normal(4, 2, 8), np.ones((4, 2), np.float32)
    big = np.zeros(1024, np.float32)

    def over(*shape):
        return big[:int(np.prod(shape))].reshape(shape)

    L, P, T, W, U = kl.ops.delta_rule_intra(q, k, v, None, beta, chunk=8)
    return {
        "short_conv": lambda: kl.ops.short_conv(normal(4, 8), normal(8, 3), out=(over(4, 8), over(2, 8))),
        "route": lambda: kl.ops.route(normal(4, 8), k=2, out=(over(4, 2).view(np.int32), over(4, 2))),
        "delta_rule": lambda: kl.ops.delta_rule(q, k, v, None, beta, out=(over(4, 2, 8), over(2, 8, 8))),
        "final_state": lambda: kl.ops.delta_rule(q, k, v, None, beta, final_state=over(2, 8, 8),
                                                 out=(over(4, 2, 8), None)),
        "delta_rule_intra": lambda: kl.ops.delta_rule_intra(
            q, k, v, None, beta, chunk=8, out=(None, over(4, 2, 8), None, None, over(4, 2, 8))),
        "delta_rule_inter": lambda: kl.ops.delta_rule_inter(
            q, k, None, P, W, U, chunk=8, out=(over(4, 2, 8), None, over(4, 2, 8))),
        "linear": lambda: kl.ops.linear(normal(4, 8), [normal(8, 8)] * 9,
                                        out=(over(4, 8), *[None] * 7, over(4, 8))),
    }


@pytest.mark.parametrize("op", list(results_over_one_room()))
def test_no_two_results_share_memory(op):
    with pytest.raises(ValueError, match=r"out\[\d\] shares memory with out\[\d\]; each result needs its own"):
        results_over_one_room()[op]()


def test_a_wrong_weight_of_nine_leaves_all_results_as_they_were():
    out = tuple(np.full((4, 8), 7, np.float32) for _ in range(9))
    with pytest.raises(ValueError, match=r"w\[8\] has shape \[8, 7\]"):
        kl.ops.linear(normal(4, 8), [*[normal(8, 8)] * 8, normal(8, 7)], out=out)
    assert all((o == 7).all() for o in out)


# ---- numbers and names -------------------------------------------------------------------------------------------


class NoCapsule:
    """What says that it has DLPack, and has none."""

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **_):
        return 5


def wrong_scalars():
    x = normal(2, 4)
    q, beta = normal(4, 2, 8), np.ones((4, 2), np.float32)

    def delta(**options):
        return kl.ops.delta_rule(q, q, q, None, beta, **options)

    def gate(**options):
        return kl.ops.decay_gate(q, np.ones(2, np.float32), normal(2, 8), **options)

    def latent(**options):
        return kl.ops.latent_attention(q, normal(4, 3), normal(4, 0), normal(2, 8, 3), normal(2, 8, 3), **options)

    def experts(**options):
        w = normal(1, 4, 4)
        return kl.ops.moe(x, np.zeros((2, 1), int), np.ones((2, 1), np.float32), w, w, w, shared=x, **options)

    yield from [
        (lambda: delta(scale="x"), TypeError, "scale is 'x'; it must be a number, or None"),
        (lambda: delta(chunk=2.5), TypeError, "chunk is 2.5; it must be an int"),
        (lambda: delta(chunk=None), TypeError, "chunk is None; it must be an int"),
        (lambda: delta(l2_eps=-1), ValueError, "l2_eps is -1.0; it must be >= 0"),
        (lambda: delta(l2_eps=[]), TypeError, r"l2_eps is \[\]; it must be a number >= 0"),
        (lambda: delta(form=["auto"]), ValueError, r"form is \['auto'\]; it must be one of 'auto', 'recurrent'"),
        (lambda: delta(head_map={}), ValueError, "head_map is {}; it must be one of 'grouped', 'tiled'"),
        (lambda: delta(l2_eps=np.inf), ValueError, "l2_eps is inf; it must be >= 0 and finite"),
        (lambda: delta(l2_norm="no"), TypeError, "l2_norm is 'no'; it must be True or False"),
        (lambda: delta(l2_norm=x), TypeError, "l2_norm is array"),
        (lambda: delta(l2_norm=float("nan")), TypeError, "l2_norm is nan; it must be True or False"),
        (lambda: delta(out=(None, x)), ValueError, r"out\[1\] has shape \[2, 4\]; it must be \[2, 8, 8\]"),
        (lambda: delta(out=(x, None)), ValueError, r"out\[0\] has shape"),
        (lambda: delta(final_state=x), ValueError, "final_state has shape"),
        (lambda: delta(checkpoints=True), TypeError, "checkpoints is True; it must be an int >= 1, or a list"),
        (lambda: delta(checkpoints=""), TypeError, "checkpoints is ''; it must be an int >= 1, or a list"),
        (lambda: delta(checkpoints=2.5), TypeError, "checkpoints is 2.5; it must be an int >= 1, or a list"),
        (lambda: kl.ops.decay_cumsum(-np.abs(q), chunk=2.5), TypeError, "chunk is 2.5; it must be an int, or None"),
        (lambda: gate(lower_bound="x"), TypeError, "lower_bound is 'x'; it must be a number, or None"),
        (lambda: latent(scale=None), TypeError, "scale is None; it must be a number"),
        (lambda: latent(scale=1, form=x), ValueError, "form is array"),
        (lambda: kl.ops.attention(q, q, q, scale="x"), TypeError, "scale is 'x'; it must be a number"),
        (lambda: kl.ops.rope(q, np.arange(4), base=None, rotary=2), TypeError, "base is None; it must be a number"),
        (lambda: kl.ops.rope(q, np.arange(4), base=1e4, rotary="x"), TypeError, "rotary is 'x'; it must be an int"),
        (lambda: kl.ops.route(x, k=1, scale="x"), TypeError, "scale is 'x'; it must be a number"),
        (lambda: kl.ops.route(x, k=1, groups=x), TypeError, "groups is array"),
        (lambda: kl.ops.route(x, k=1, renormalise="False"), TypeError, "renormalise is 'False'; it must be True or"),
        (lambda: kl.ops.short_conv(x, x.T, out=(x[:1], None)), ValueError, r"out\[0\] has shape \[1, 4\]"),
        (lambda: kl.ops.route(x, k=1, function=[]), ValueError, r"function is \[\]; it must be one of 'sigmoid'"),
        (lambda: kl.ops.gated_rms_norm(x, x, x[0], eps=1, activation=x), ValueError, "activation is array"),
        (lambda: experts(shared_gate=np.zeros((1, 4))), TypeError, "shared_gate is float64"),
        (lambda: experts(shared_gate=normal(1, 3)), ValueError, r"shared_gate has shape \[1, 3\]"),
        (lambda: kl.pack([x, normal(2, 3)]), ValueError, r"arrays\[1\] has shape \[2, 3\]"),
        (lambda: kl.pack([1.0]), ValueError, r"arrays\[0\] has shape \[\]"),
        (lambda: kl.pack(3), TypeError, "arrays is a int; it must be a list"),
        (lambda: kl.unpack(3, [0, 1]), ValueError, r"x has shape \[\]; it must be \[T, ...\]"),
        (lambda: kl.ops.sigmoid(NoCapsule()), TypeError, "x: a NoCapsule that NumPy cannot read"),
        (lambda: kl.Context(isa=3), TypeError, "isa is int; it must be a str, as 'avx2', or None"),
        (lambda: kl.set_num_threads("x"), TypeError, "n is 'x'; it must be an int from 0"),
    ]


@pytest.mark.parametrize("call, error, message", list(wrong_scalars()))
def test_numbers_and_names_are_told_by_argument(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_a_flag_may_be_numpys_or_0_or_1():
    q, beta = normal(4, 2, 8), np.ones((4, 2), np.float32)
    results = [kl.ops.delta_rule(q, q, q, None, beta, l2_norm=on)[0] for on in (True, np.True_, 1, False, 0)]
    assert len({o.tobytes() for o in results[:3]}) == len({o.tobytes() for o in results[3:]}) == 1


def test_a_number_of_threads_may_be_numpys():
    with kl.threads(np.int64(2)):
        np.testing.assert_array_equal(kl.ops.add(normal(3), normal(3)), 2 * normal(3))


def test_blocks_of_two_python_threads_that_overlap_leave_nothing_behind():
    usual, found = context.current().threads, {}
    inside, left = threading.Event(), threading.Event()

    def other():
        with kl.threads(2):
            inside.set()
            left.wait(10)
            found["inside"] = context.current().threads
        found["behind"] = context.current().threads

    thread = threading.Thread(target=other)
    with kl.threads(1):
        thread.start()
        assert inside.wait(10) and context.current().threads == 1
        with kl.threads(3):
            assert context.current().threads == kl.Context().threads == 3
        assert context.current().threads == 1
    left.set()
    thread.join(10)
    assert found == {"inside": 2, "behind": usual} and context.current().threads == kl.Context().threads == usual


def test_what_is_set_in_a_block_shows_behind_it():
    usual = context.current().threads
    try:
        with kl.threads(1):
            kl.set_num_threads(2)
            assert context.current().threads == 1
        assert context.current().threads == 2
    finally:
        kl.set_num_threads(None)
    assert context.current().threads == usual


@pytest.mark.parametrize("scale", [1e300, np.inf, np.nan])
def test_a_scale_that_float32_has_not_is_refused(scale):
    q = np.ones((2, 1, 4), np.float32)
    with pytest.raises(ValueError, match="scale is .*; it must be finite in float32"):
        kl.ops.attention(q, q, q, scale=scale)
    with pytest.raises(ValueError, match="scale is .*; it must be finite in float32"):
        kl.ops.delta_rule(q, q, q, None, np.ones((2, 1), np.float32), scale=scale)


def test_whole_numbers_of_any_size_are_refused_by_name():
    with pytest.raises(ValueError, match=f"groups is {10**30}; it must be at most E = 4"):
        kl.ops.route(np.ones((2, 4), np.float32), k=1, groups=10**30)
    with pytest.raises(TypeError, match="context is 'x'; it must be an int"):
        kl.Model.tiny().plan(context="x")


@pytest.mark.parametrize("value", [2**70, -(2**70)])
def test_whole_numbers_that_c_does_not_take(value, tmp_path):
    model = kl.Model.tiny()
    state = model.new_state()
    state.save(tmp_path / "x")
    for call, name in ((lambda: model.new_state(context=value), "context"), (lambda: state.truncate(value), "n"),
                       (lambda: model.load_state(tmp_path / "x", context=value), "context"),
                       (lambda: model.new_state(checkpoints_every=1, keep=value), "keep"),
                       (lambda: kl.Context(threads=value), "threads"), (lambda: model.plan(context=value), "context"),
                       (lambda: kl.set_num_threads(value), "n"), (lambda: kl.Context().set_threads(value), "n")):
        with pytest.raises(ValueError, match=f"^{name} is .*; it must be "):
            call()


def test_too_many_threads_of_the_environment_are_named(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5000")
    with pytest.raises(ValueError, match="the environment's OMP_NUM_THREADS is 5000; it must be at most 1024"):
        kl.Context()


@pytest.mark.parametrize("changes, error, message", [
    (dict(n=3), ValueError, "out has 4 values; the sizes of the call say 3"),
    (dict(n=5), ValueError, "out has 4 values; the sizes of the call say 5"),
    (dict(n=-1), ValueError, "out has 4 values; the sizes of the call say -1"),
    (dict(a=np.ones(4, np.int32)), TypeError, "a has items of format 'i'; it must be float32"),
    (dict(b=np.ones(4)), TypeError, "b has items of format 'd'; it must be float32"),
    (dict(b=np.ones(8, np.float32)[::2]), TypeError, "b must be a C-contiguous buffer of float32"),
    (dict(out=bytes(16)), TypeError, "out must be a C-contiguous writable buffer of float32"),
])
def test_buffers_below_the_checks_of_python(changes, error, message):
    x = np.ones(4, np.float32)
    given = dict(out=np.full(4, 7, np.float32), a=x, b=x, n=4) | changes
    with pytest.raises(error, match=message):
        kl._core.add(kl.Context()._core, *given.values())
    assert "out" in changes or (given["out"] == 7).all()
