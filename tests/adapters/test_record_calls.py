"""Recording the calls of a function: what is kept, when, and how it lay in memory."""

import sys
import types

import ml_dtypes
import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.adapters import record_calls
from kimi_linear.adapters.calls import files_of, load_call


def scaled(x, w, *, eps=1e-5, flag=None, shared=()):
    """Changes its input, as a kernel with a state in place does."""
    y = x * w * 2
    x[...] = -1
    return y, None, np.int32(3), x


def test_what_is_kept(tmp_path, rng):
    x, w = rng.standard_normal((3, 4)).astype(np.float32), np.ones(4, ml_dtypes.bfloat16)
    before = x.copy()
    pair = np.zeros(2, np.float32), np.ones(3, np.float32)
    with record_calls(scaled, tmp_path / "new" / "calls", op="rms_norm", conventions="hf") as fn:
        assert fn.__name__ == "scaled" and fn.__doc__ == scaled.__doc__
        result = fn(x, w=w, eps=1e-3, shared=pair)
    assert result[2] == 3 and result[3] is x
    call, = map(load_call, files_of(tmp_path / "new" / "calls"))
    assert (call.op, call.conventions) == ("rms_norm", "hf")
    assert np.array_equal(call.inputs["x"], before), "as it was before the call"
    assert call.inputs["w"].dtype == ml_dtypes.bfloat16 and call.inputs["eps"] == 1e-3 and "flag" not in call.inputs
    assert [np.array_equal(a, b) for a, b in zip(call.inputs["shared"], pair, strict=True)] == [True, True]
    assert len(call.results) == 3, "None is no result"
    assert np.array_equal(call.results[0], before * 2) and call.results[1] == 3 and (call.results[2] == -1).all()


def test_memory_is_told(tmp_path, rng):
    base = rng.standard_normal((5, 6)).astype(np.float32)
    with record_calls(lambda x: x, tmp_path, op="softmax") as fn:
        fn(base[1:, ::2].T)
    layout = load_call(files_of(tmp_path)[0]).layout["in/x"]
    assert layout == {"shape": [3, 4], "strides": [2, 6], "offset": 6, "dtype": "float32", "device": "cpu"}
    report = kl.diff.replay(tmp_path)
    assert "not contiguous when recorded: in/x, out/0 (1 call)" in str(report)


def test_limit_numbers_and_errors(tmp_path):
    def fails(x):
        raise RuntimeError("no")

    with record_calls(np.negative, tmp_path, op="softmax", limit=2) as fn, \
            record_calls(np.square, tmp_path, op="softmax", limit=2) as other:
        for i in range(4):
            fn(np.full(2, i, np.float32))
            other(np.full(2, i, np.float32))
    with record_calls(fails, tmp_path, op="softmax") as fn, pytest.raises(RuntimeError, match="no"):
        fn(np.zeros(2))
    assert [p.name for p in files_of(tmp_path)] == [f"call-{i:06d}.safetensors" for i in range(4)]
    assert [load_call(p).results[0][0] for p in files_of(tmp_path)] == [0, 0, -1, 1]


def test_a_dotted_name_is_replaced_and_put_back(tmp_path, monkeypatch):
    module = types.ModuleType("some_engine")
    module.ops = types.SimpleNamespace(double=lambda x: 2 * x)
    monkeypatch.setitem(sys.modules, "some_engine", module)
    real = module.ops.double
    with pytest.raises(ZeroDivisionError), record_calls("some_engine.ops.double", tmp_path, op="add"):
        module.ops.double(np.ones(2))
        raise ZeroDivisionError
    assert module.ops.double is real and len(files_of(tmp_path)) == 1
    for name in ("some_engine.ops.triple", "some_engine.none.double", "no_such_engine.f", "double"):
        with pytest.raises(ValueError, match=f"there is no {name!r} to record"), record_calls(name, tmp_path, op="add"):
            pass
    with pytest.raises(TypeError, match="fn is a int; it must be a function, or the dotted name of one"), \
            record_calls(3, tmp_path, op="add"):
        pass


class Engine:
    """Each kind of a class's function, and what is inherited."""

    def double(self, x):
        return self.factor() * x

    def factor(self):
        return 2

    @staticmethod
    def alone(x):
        return 3 * x

    @classmethod
    def of_class(cls, x):
        return cls.value * x

    builtin = np.negative
    value = 4


class Inherits(Engine):
    value = 5


@pytest.mark.parametrize("owner", [Engine, Inherits])
@pytest.mark.parametrize("name, factor", [("double", 2), ("alone", 3), ("of_class", None), ("builtin", -1)])
def test_a_function_of_a_class_stays_what_it_is(tmp_path, monkeypatch, owner, name, factor):
    module = types.ModuleType("some_engine")
    module.Owner = owner
    monkeypatch.setitem(sys.modules, "some_engine", module)
    before = [dict(vars(c)) for c in (Engine, Inherits)]
    x = np.arange(3.0)

    def called():
        wanted = owner.value if factor is None else factor
        assert np.array_equal(getattr(owner(), name)(x), wanted * x)
        if name != "double":
            assert np.array_equal(getattr(owner, name)(x), wanted * x)
            return 2
        return 1

    with record_calls(f"some_engine.Owner.{name}", tmp_path, op="softmax"):
        n = called()
        assert getattr(Inherits(), name)(x) is not None
    called()
    assert [dict(vars(c)) for c in (Engine, Inherits)] == before
    calls = [load_call(p) for p in files_of(tmp_path)]
    assert len(calls) == n + 1 and {next(iter(c.inputs)) for c in calls} <= {"x", "0"}


def test_what_cannot_be_kept_does_not_end_the_run(tmp_path):
    class Strange:
        shape, dtype = (2,), "strange"

        def __array__(self, *args, **kwargs):
            raise RuntimeError("no memory of it")

    with record_calls(lambda x, y=None: x, tmp_path, op="softmax") as fn:
        z = np.zeros(2, np.complex128)
        with pytest.warns(RuntimeWarning, match=r"call 0 of .* is not recorded: .*'in/y' has dtype complex128") as told:
            assert fn(3, z) == 3
        assert told[0].filename == __file__
        with pytest.warns(RuntimeWarning, match="call 1 of .* 'out/0' has dtype complex128"):
            assert fn(1j * np.float64(1) * np.ones(())) == 1j
        with pytest.warns(RuntimeWarning, match="is not recorded: no memory of it"):
            assert fn(1, Strange()) == 1
        assert [*tmp_path.iterdir()] == []
        fn(np.ones(2), 1j)
    assert load_call(files_of(tmp_path)[0]).inputs["y"] == "<y, a complex>"


def test_lists_of_numbers_are_arrays(tmp_path):
    with record_calls(lambda x, **options: x, tmp_path, op="softmax") as fn:
        fn([[1.0, 2.0], [3.0, 4.0]], ragged=[[1], [2, 3]], words=["a"], none=[])
    inputs = load_call(files_of(tmp_path)[0]).inputs
    assert inputs["x"].tolist() == [[1, 2], [3, 4]] and inputs["none"].shape == (0,)
    assert (inputs["ragged"], inputs["words"]) == ("<ragged, a list>", "<words, a list>")


def test_fla(tmp_path, monkeypatch):
    """Both places that have a function under its name record it; without fla a sentence."""
    from kimi_linear.adapters import fla

    with pytest.raises(ModuleNotFoundError, match="flash-linear-attention must be installed"), fla.record(tmp_path):
        pass
    names = {n.rpartition(".")[0] for n in fla.OPS}
    for name in ["fla", "fla.ops", *names]:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    kda, layer = sys.modules["fla.ops.kda"], types.ModuleType("fla_layer")

    def chunk_kda(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, **kwargs):
        o, state = kl.ops.delta_rule(q[0], k[0], v[0], g[0], beta[0])
        return o[None], state[None] if output_final_state else None

    kda.chunk_kda = layer.chunk_kda = chunk_kda
    monkeypatch.setitem(sys.modules, "fla_layer", layer)
    x = np.random.default_rng(0).standard_normal((5, 1, 9, 2, 8)).astype(np.float32)
    with fla.record(tmp_path) as places:
        assert sorted(places) == ["fla.ops.kda.chunk_kda", "fla_layer.chunk_kda"]
        for final in (True, False):
            layer.chunk_kda(x[0], x[1] / 3, x[2], -np.abs(x[3]), np.abs(np.tanh(x[4, ..., 0])),
                            output_final_state=final)
    assert layer.chunk_kda is kda.chunk_kda is chunk_kda
    report = kl.diff.replay(tmp_path)
    assert report.ok and len(report.rows) == 2, str(report)
    with pytest.raises(ValueError, match="functions has 'chunk_gla'; it must be of fla.ops.kda.chunk_kda"), \
            fla.record(tmp_path, ["chunk_gla"]):
        pass
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)  # as a release without it
    with fla.record(tmp_path) as places:
        assert sorted(places) == ["fla.ops.kda.chunk_kda", "fla_layer.chunk_kda"]
    with pytest.raises(ModuleNotFoundError, match="fla.ops.gated_delta_rule is not there"), \
            fla.record(tmp_path, ["fla.ops.gated_delta_rule.chunk_gated_delta_rule"]):
        pass
