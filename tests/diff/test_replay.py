"""Recorded calls judged on their own inputs: the altered one first; every op, every convention; files that are none."""

import inspect
import json

import ml_dtypes
import numpy as np
import pytest
from small_calls import calls_of_every_op

import kimi_linear as kl
from kimi_linear.adapters import record_calls
from kimi_linear.cli import main
from kimi_linear.conventions import conventions
from kimi_linear.diff import replay
from kimi_linear.testing.delta_rule.calls import plan_of

BF16 = ml_dtypes.bfloat16


def given(rng, T, H=2, K=16, V=16):
    """Inputs of a delta rule as a model has them."""
    def x(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    def unit(a):
        return a / np.linalg.norm(a, axis=-1, keepdims=True)

    return dict(q=unit(x(T, H, K)), k=unit(x(T, H, K)), v=x(T, H, V), g=-np.abs(x(T, H, K)) / 3,
                beta=(1 / (1 + np.exp(-x(T, H)))).astype(np.float32))


@pytest.fixture(scope="module")
def two_hundred(tmp_path_factory):
    """Calls of a right kernel, of which call 137 has a state that is off in the sixth digit."""
    rng, folder, n = np.random.default_rng(3), tmp_path_factory.mktemp("calls"), iter(range(200))

    def kernel(q, k, v, g, beta, *, initial_state):
        o, state = kl.ops.delta_rule(q, k, v, g, beta, initial_state=initial_state)
        return o, state * np.float32(1 + 2e-6) if next(n) == 137 else state

    with record_calls(kernel, folder, op="delta_rule") as recorded:
        for _ in range(200):
            inputs = given(rng, int(rng.integers(1, 40)))
            recorded(**inputs, initial_state=rng.standard_normal((2, 16, 16)).astype(np.float32))
    return folder


def test_the_one_altered_call_of_two_hundred_is_first(two_hundred):
    seen = []
    report = replay(two_hundred, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 200) for i in range(200)]
    assert not report.ok and len(report.rows) == 200 and not report.skipped
    first, second = report.rows[:2]
    assert first.file == "call-000137.safetensors" and first.result == 1 and not first.ok
    assert second.ok and first.times > 5 * second.times
    assert report.verdict.startswith("WRONG: 1 of 200 calls; the worst is call-000137.safetensors (delta_rule), ")
    assert "head " in first.at and "key " in first.at


def test_command_line(two_hundred, capsys, tmp_path):
    assert main(["replay", str(two_hundred), "--op", "delta_rule", "--top", "3"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("call-000137.safetensors") and "... and 197 more, 0 of them wrong" in out
    assert main(["replay", str(two_hundred / "call-000003.safetensors"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["rows"][0]["op"] == "delta_rule" and found["rows"][0]["share"] < 1
    assert main(["replay", str(tmp_path)]) == 2
    assert "holds no recorded call" in capsys.readouterr().err
    assert main(["replay", str(two_hundred), "--op", "delta_role"]) == 2
    assert "op is 'delta_role'; it must be one of add, " in capsys.readouterr().err


# ---- conventions ---------------------------------------------------------------------------------------


def kernel_of(how, fault=0.0):
    """Our op behind somebody's signature and layout: the inverse of `plan_of`, which check_op is tested with."""
    def kernel(**args):
        raise NotImplementedError

    def call(inputs):
        made = plan_of(how, inputs)
        x = made.inputs
        o, state = kl.reference.delta_rule(x["q"], x["k"], x["v"], x["g"], x["beta"],
                                           **{n: x[n] for n in ("scale", "initial_state", "offsets") if n in x})
        state = state * (1 + fault)
        lead = (x["v"].shape[1], x["q"].shape[2], x["v"].shape[2])
        state = state.reshape(-1, *lead) if how.axes != "THK" or "offsets" in x else state
        state = state.swapaxes(-1, -2) if how.state == "VK" else state
        o = o if how.axes == "THK" else o[None]
        o, state = (np.ascontiguousarray(a, np.float32) for a in (o, state))
        result = np.concatenate([o.ravel(), state.ravel()]) if how.returns == "packed" else (o, state)
        return made.arguments, result

    return call


CASES = [p for p in conventions if "delta_rule" in conventions[p]]


@pytest.mark.parametrize("project", CASES)
@pytest.mark.parametrize("fault", [0.0, 1e-4])
def test_conventions(tmp_path, rng, project, fault):
    """Each project's calls as it makes them: found right, and a fault found."""
    how = conventions[project]["delta_rule"]
    inputs = given(rng, 7, V=16 if how.square else 24)
    if how.gates[0] == "head":
        inputs["g"] = inputs["g"][..., 0]
    if how.scale == "argument":
        inputs["scale"] = 0.3
    inputs["initial_state"] = rng.standard_normal((2, 16, inputs["v"].shape[-1])).astype(np.float32)
    arguments, result = kernel_of(how, fault)(inputs)
    kernel = namespaced(arguments, result)
    with record_calls(kernel, tmp_path, op="delta_rule", conventions=project) as recorded:
        recorded(**arguments)
    report = replay(tmp_path)
    assert not report.skipped and report.ok == (fault == 0), str(report)
    if fault:
        assert report.rows[0].result == 1


def namespaced(arguments, result):
    def kernel(**args):
        return result

    kernel.__signature__ = inspect.Signature(
        [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in arguments])
    return kernel


def write(folder, inputs, results, name="call-000000", **meta):
    from kimi_linear.load.safetensors import write_safetensors

    folder.mkdir(exist_ok=True)
    options = {n: v for n, v in inputs.items() if not isinstance(v, np.ndarray)}
    arrays = {f"in/{n}": v for n, v in inputs.items() if isinstance(v, np.ndarray)}
    arrays |= {f"out/{i}": np.asarray(v) for i, v in enumerate(results)}
    write_safetensors(folder / f"{name}.safetensors", arrays, {"options": json.dumps(options), **meta})


def test_what_fla_makes_inside_its_kernel(tmp_path, rng):
    """Raw gates and beta, norms of q and k, packed sequences, states [V, K]."""
    T, H, K = 11, 2, 16
    raw = rng.standard_normal((T, H, K)).astype(np.float32)
    a_log, bias = rng.standard_normal(H).astype(np.float32), rng.standard_normal(H * K).astype(np.float32)
    q, k, v = (rng.standard_normal((T, H, K)).astype(np.float32) for _ in range(3))
    b, offsets = rng.standard_normal((T, H)).astype(np.float32), np.array([0, 4, 11])
    state = rng.standard_normal((2, H, K, K)).astype(np.float32)
    g = kl.reference.decay_gate(raw, np.exp(a_log.astype(np.float64)), bias.reshape(H, K))
    o, after = kl.reference.delta_rule(q, k, v, g, kl.reference.sigmoid(b), l2_norm=True,
                                       initial_state=state, offsets=offsets)
    inputs = dict(q=q[None], k=k[None], v=v[None], g=raw[None], beta=b[None], A_log=a_log, dt_bias=bias,
                  cu_seqlens=offsets, initial_state=np.ascontiguousarray(state.swapaxes(-1, -2)),
                  use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
                  use_beta_sigmoid_in_kernel=True, output_final_state=True,
                  transpose_state_layout=True)
    results = o[None].astype(np.float32), np.ascontiguousarray(after.swapaxes(-1, -2)).astype(np.float32)
    write(tmp_path, inputs, results, op="delta_rule", conventions="fla")
    report = replay(tmp_path)
    assert report.ok and not report.rows[0].notes, str(report)
    theirs = {"g": "raw_g", "dt_bias": "g_bias"}  # vLLM's chunk_kda_with_fused_gate
    implied = "use_gate_in_kernel", "transpose_state_layout"
    fused = {theirs.get(n, n): x for n, x in inputs.items() if n not in implied}
    write(tmp_path / "vllm", fused, results, op="delta_rule", conventions="vllm")
    assert replay(tmp_path / "vllm").ok, str(replay(tmp_path / "vllm"))
    del inputs["A_log"]
    write(tmp_path, inputs, results, op="delta_rule", conventions="fla")
    assert "use_gate_in_kernel is on and the call has no A_log" in str(replay(tmp_path))


def test_batches_without_offsets(tmp_path, rng):
    inputs = given(rng, 12)
    o, state = kl.reference.delta_rule(**inputs, offsets=[0, 4, 8, 12])
    arrays = {n: a.reshape(3, 4, *a.shape[1:]) for n, a in inputs.items()}
    write(tmp_path, arrays, (o.reshape(3, 4, 2, 16).astype(np.float32), state.astype(np.float32)), op="delta_rule",
          conventions="fla")
    assert replay(tmp_path).ok


def test_bfloat16_calls(tmp_path, rng):
    """A kernel on bfloat16 that rounds once is right; the noise is that of bfloat16; a scale of 5 % is seen in it."""
    for i, factor in enumerate((1.0,) * 9 + (1.05,)):
        inputs = {n: a.astype(BF16) for n, a in given(rng, 30).items()}
        o, state = kl.reference.delta_rule(**inputs)
        write(tmp_path, inputs, ((o * factor).astype(BF16), state.astype(np.float32)), f"call-{i:06d}", op="delta_rule")
    report = replay(tmp_path)
    assert [r.file for r in report.wrong] == ["call-000009.safetensors"] and report.rows[0].dtype == "bfloat16"


# ---- every op ------------------------------------------------------------------------------------------


STORAGE = {"quantize", "dequantize"}  # judged by bytes, not by a bound: docs/block-types.md
OPS = sorted(set(calls_of_every_op()) - STORAGE)


@pytest.mark.parametrize("op", OPS)
def test_every_op(tmp_path, op):
    """Our own engine's calls are right; the same with one value changed are not."""
    args = calls_of_every_op()[op]

    def spoiled(**given):
        result = getattr(kl.ops, op)(**given)
        parts = [np.array(r) for r in (result if isinstance(result, tuple) else (result,))]
        flat = parts[0].reshape(-1)
        flat[1 % flat.size] += 1 if flat.dtype.kind in "iu" else 0.01 * (1 + abs(flat[1 % flat.size]))
        return tuple(np.atleast_1d(p) for p in parts)

    def right(**given):
        return getattr(kl.ops, op)(**given)

    for function in (right, spoiled):
        function.__signature__ = inspect.Signature([inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in args])
    with record_calls(right, tmp_path / "right", op=op) as fn:
        fn(**args)
    with record_calls(spoiled, tmp_path / "spoiled", op=op) as fn:
        fn(**args)
    good, bad = replay(tmp_path / "right"), replay(tmp_path / "spoiled")
    assert good.ok and not good.rows[0].notes, str(good)
    assert not bad.ok and bad.rows and bad.rows[0].op == op, str(bad)


def test_ids_that_a_rounding_decides_are_ties(tmp_path):
    scores = np.tile(np.linspace(-1, 1, 8, dtype=np.float32), (4, 1))
    scores[2, 6] = scores[2, 5] * np.float32(1 + 2**-22)
    ids, weights = kl.reference.route(scores, k=2)
    theirs = ids.copy()
    theirs[2] = [5, 7]
    write(tmp_path, dict(scores=scores, k=2), (theirs,), op="route")
    assert replay(tmp_path).ok
    theirs[1] = [5, 7]
    write(tmp_path, dict(scores=scores, k=2), (theirs,), op="route")
    report = replay(tmp_path)
    assert not report.ok and report.rows[0].at == "token 1" and report.rows[0].error == 0.25


def test_experts_in_any_order(tmp_path, rng):
    inputs = dict(scores=rng.standard_normal((6, 16)).astype(np.float32), k=4)
    ids, weights = kl.ops.route(**inputs)
    write(tmp_path, inputs, (ids[:, ::-1], weights[:, ::-1]), op="route")
    assert replay(tmp_path).ok, str(replay(tmp_path))
    write(tmp_path, inputs, (ids[:, ::-1], weights), op="route")
    assert not replay(tmp_path).ok and replay(tmp_path).rows[0].result == 1, "weights of other experts"


def test_sampled_ids_are_no_set(tmp_path, rng):
    inputs = dict(logits=rng.standard_normal((5, 50)).astype(np.float32), temperature=0.0, seed=3, position=5)
    ids = kl.ops.sample(**inputs)
    write(tmp_path, inputs, (ids,), op="sample")
    assert replay(tmp_path).ok, str(replay(tmp_path))
    write(tmp_path, inputs, (np.roll(ids, 1),), op="sample")
    assert not replay(tmp_path).ok


def test_an_infinity_of_the_other_sign(tmp_path):
    far = dict(a=np.float32([[np.inf, 1]]), b=np.float32([[np.inf, 1]]))
    for value, right in ((np.inf, True), (-np.inf, False), (np.nan, False)):
        write(tmp_path, far, (np.float32([[value, 2]]),), op="add")
        assert replay(tmp_path).ok == right, value


def test_results_that_the_op_does_not_have(tmp_path, rng):
    inputs = given(rng, 5)
    o, state = kl.ops.delta_rule(**inputs)
    write(tmp_path, dict(a=o, b=o), (o + o, o * np.nan), op="add")
    assert replay(tmp_path).rows[0].notes == ("result 1 was not looked at",)
    fla = {how: x[None] for how, x in inputs.items()} | {"scale": 0.25}
    o, state = kl.reference.delta_rule(**inputs, scale=0.25)
    results = o[None].astype(np.float32), state[None].astype(np.float32), o[None] * np.float32(0)
    write(tmp_path, fla, results, op="delta_rule", conventions="fla")
    assert replay(tmp_path).ok and "result 2 was not looked at" in str(replay(tmp_path)), str(replay(tmp_path))


# ---- files that are no calls ---------------------------------------------------------------------------


def test_npz(tmp_path, rng):
    inputs = given(rng, 5)
    o, state = kl.ops.delta_rule(**inputs, scale=0.5)
    arrays = {f"in/{n}": a for n, a in inputs.items()} | {"in/scale": np.float64(0.5), "out/0": o, "out/1": state}
    np.savez(tmp_path / "a.npz", **arrays)
    report = replay(tmp_path)
    assert not report.ok and report.skipped[0][1] == "the file does not say of which op it is; give op="
    assert replay(tmp_path, op="delta_rule").ok


def test_one_bad_file_stops_no_other(tmp_path, rng):
    inputs = given(rng, 6)
    good = tuple(kl.ops.delta_rule(**inputs))

    def lacking(name):
        return {n: a for n, a in inputs.items() if n != name}

    cases = {
        "a-good": (inputs, good, ""),
        "b-no-k": (lacking("k"), good, "the call has no k; delta_rule takes q, k, v"),
        "c-shape": (inputs, (good[0][:4], good[1]), r"result 0 has shape [4, 2, 16]; it must be [6, 2, 16]"),
        "d-nan": (inputs, (good[0] * np.nan, good[1]), "wrong"),
        "e-nan-in": (inputs | {"v": inputs["v"] * np.nan}, (good[0] * np.nan, good[1] * np.nan), ""),
        "f-ints": (inputs | {"v": inputs["v"].astype(np.int64)}, good, "v is int64; it must be floats"),
        "g-extra": (inputs | {"mask": np.ones(6)}, good, "mask was not looked at"),
        "h-empty": ({n: a[:0] for n, a in inputs.items()}, (good[0][:0], good[1] * 0), ""),
    }
    for name, (arrays, results, _) in cases.items():
        write(tmp_path, arrays, results, name, op="delta_rule")
    (tmp_path / "i-cut.safetensors").write_bytes((tmp_path / "a-good.safetensors").read_bytes()[:-100])
    (tmp_path / "j-text.npz").write_text("no", encoding="utf-8")
    np.savez(tmp_path / "k-none.npz", q=np.ones(3))
    write(tmp_path, inputs, good, "l-other", op="kda")
    report = replay(tmp_path)
    rows, skipped = {r.file.split(".")[0]: r for r in report.rows}, {f.split(".")[0]: why for f, why in report.skipped}
    assert set(skipped) == {"b-no-k", "c-shape", "f-ints", "i-cut", "j-text", "k-none", "l-other"}
    assert cases["b-no-k"][2] in skipped["b-no-k"] and skipped["c-shape"] == cases["c-shape"][2]
    assert skipped["f-ints"] == cases["f-ints"][2]
    assert "it is cut short or damaged" in skipped["i-cut"] and "it is no npz" in skipped["j-text"]
    assert skipped["k-none"] == "it has no in/NAME and out/NAME: it must hold a call's inputs and results, and has q"
    assert "op is 'kda'; it must be one of" in skipped["l-other"]
    assert rows["a-good"].ok and rows["e-nan-in"].ok and rows["h-empty"].ok and rows["g-extra"].ok
    assert not rows["d-nan"].ok and rows["d-nan"].times == np.inf
    assert rows["g-extra"].notes == ("mask was not looked at",)
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["times"] is None
    assert "NOT JUDGED" not in report.verdict and "7 could not be judged" in report.verdict
    only = replay(tmp_path / "b-no-k.safetensors")
    assert not only.ok and only.verdict.startswith("NOT JUDGED: none of 1 calls could be judged: the call has no k")


def test_bad_arguments(tmp_path, rng):
    write(tmp_path, given(rng, 3), (np.zeros(3),), op="delta_rule")
    for options, says in ((dict(op="delta"), "op is 'delta'"), (dict(conventions="llvm"), "conventions is 'llvm'"),
                          (dict(dtype="int3"), "dtype is 'int3'")):
        with pytest.raises(ValueError, match=says):
            replay(tmp_path, **options)
    with pytest.raises(FileNotFoundError, match="none is not there; it must be a folder of recorded calls"):
        replay(tmp_path / "none")
