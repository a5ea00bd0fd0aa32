"""check_op of gradients: right kernels hold in every case, planted bugs are named, and small errors are seen."""

import functools

import ml_dtypes
import numpy as np
import planted_backward
import pytest

import kimi_linear as kl
from kimi_linear import faults
from kimi_linear.testing import check_op, judge_golden, spec, write_golden
from kimi_linear.testing.spec import BACKWARD

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of planted's own float32

F = np.float32
OPS = [op for op in BACKWARD if op != "delta_rule_backward"]


def planted(op, bug=None):
    return functools.partial(getattr(planted_backward, op), what=bug)


def lacks(op):
    """What the planted kernels do not have: out=, and results that are subnormal."""
    return [n for n in ("out", "subnormals") if any(n in c.needs for c in (*spec(op).cases, *spec(op).laws))]


def exact(op, **x):
    """The reference's results in float32, writing them where `out` says."""
    out = x.pop("out", None)
    found = getattr(kl.reference, op)(**x)
    found = tuple(a.astype(F) for a in (found if isinstance(found, tuple) else (found,)))
    for a, given in zip(found, out if isinstance(out, tuple) else (out,)):
        if given is not None:
            given[...] = a
    return found if len(found) > 1 else found[0]


@pytest.mark.parametrize("op", OPS)
def test_the_reference_in_float32_holds_and_offers_everything(op):
    card = check_op(op, functools.partial(exact, op))
    assert card and card.not_offered == [] and max(r.share for r in card.rows if r.share == r.share) <= 0.5, card


@pytest.mark.parametrize("op", OPS)
def test_a_right_kernel_holds_in_every_case(op):
    """In other orders of sums, with 1 - s where the reference has sigmoid(-z), and r^3 for r n."""
    card = check_op(op, planted(op), without=lacks(op))
    assert card and not card.reasons, card
    assert 0.1 < max(r.share for r in card.rows if r.share == r.share) < 1.1, card


@pytest.mark.parametrize("op, bug", planted_backward.BUGS)
def test_a_planted_bug_is_named(op, bug):
    card = check_op(op, planted(op, bug), without=lacks(op))
    assert not card and card.reasons, card
    says, named = card.reasons[0]
    assert planted_backward.BUGS[op, bug] in says, card
    assert len(named) >= 0.5 * len(card.failing), card


@pytest.mark.parametrize("op", OPS)
def test_there_are_enough_of_everything(op):
    the = spec(op)
    assert len(the.cases) + len(the.laws) >= 25 and sum(o == op for o, _ in planted_backward.BUGS) >= 7
    assert len([f for f in faults.mistakes(op) if op in f.ops]) >= 8
    assert any("T = 0" in c.needs for c in the.cases) and {c.group for c in the.cases} >= {"lengths", "rim", "nan"}
    names = [c.name for c in (*the.cases, *the.laws)]
    assert len(set(names)) == len(names)
    assert len({e.says for e in the.explanations}) == len(the.explanations)


@pytest.mark.parametrize("op", OPS)
def test_every_mistake_shows_in_a_case(op):
    """A fault that no case shows would never be named."""
    the, seen = spec(op), set()
    calls = [(x, getattr(kl.reference, op)(**x)) for x in (c.make(None) for c in the.cases)]
    for e in the.explanations:
        for x, right in calls:
            wrong = the.mistaken(x, **dict(e.switches))
            right = right if isinstance(right, tuple) else (right,)
            if wrong is not None and not all(np.allclose(a, b, rtol=1e-6, atol=0, equal_nan=True)
                                             for a, b in zip(wrong, right, strict=True)):
                seen.add(e.says)
                break
    assert {e.says for e in the.explanations} == seen


@pytest.mark.parametrize("op", OPS)
def test_noise_is_not_explained(op):
    rng = np.random.default_rng(0)

    def noisy(**x):
        found = getattr(planted_backward, op)(**x)
        return tuple(a * (1 + 1e-3 * rng.standard_normal(a.shape)).astype(F)
                     for a in (found if isinstance(found, tuple) else (found,)))

    card = check_op(op, noisy, without="out", cases="lengths")
    assert not card and card.reasons == (), card


# ---- what is a little wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["rms_norm_backward", "gated_rms_norm_backward", "l2_norm_backward"])
def test_twice_eps_is_seen_where_it_matters(op):
    """In rows as large as its root, and in rows a hundred times as large, where it moves r by 5e-5."""
    card = check_op(op, planted(op, "eps"), cases=["eps", "plain"])
    assert set(card.failing) >= {"eps-1e-06", "faint-1e-06", "eps-1e-05", "faint-1e-05"}, card


def rounded(a):
    return a.astype(ml_dtypes.bfloat16).astype(F)


@pytest.mark.parametrize("op, name", [(op, n) for op in OPS for n in spec(op).cases[0].make(None)
                                      if isinstance(spec(op).cases[0].make(None)[n], np.ndarray)])
def test_one_operand_in_bfloat16_is_seen(op, name):
    """Each argument alone, in the bounds by themselves: on inputs that are not of a model's size."""
    def kernel(**x):
        return getattr(planted_backward, op)(**{n: rounded(a) if n == name else a for n, a in x.items()})

    card = check_op(op, kernel, cases=["plain", "widths"])
    assert "plain" in card.failing and len(card.failing) > 0.6 * len(card.rows), card
    assert max(r.share for r in card.rows) > 8, card  # of a bound of which 4 are allowed


@pytest.mark.parametrize("op, what", [(op, i) for op in OPS for i in range(len(spec(op).results))])
def test_a_relative_error_of_1e_5_is_seen_in_each_result(op, what):
    def kernel(**x):
        found = getattr(planted_backward, op)(**x)
        found = list(found if isinstance(found, tuple) else (found,))
        found[what] = found[what] * F(1 + 1e-5)
        return tuple(found)

    card = check_op(op, kernel, cases="lengths")
    assert "plain" in card.failing, card


# ---- in a narrow type ----------------------------------------------------------------------------------


def each_step(op, r):
    """A gradient of which what lies between two steps is rounded by `r`; sums and roots are float32."""
    def sigmoid(z):
        return r(F(1) / (F(1) + np.exp(-z)))

    def slope(z, silu):
        s = sigmoid(z)
        return r(s * (F(1) + z * (F(1) - s))) if silu else r(s * (F(1) - s))

    def rms_norm_backward(dy, x, w, eps):
        rms = r(F(1) / np.sqrt((x * x).mean(-1, keepdims=True, dtype=F) + F(eps)))
        n, p = r(x * rms), r(dy * w)
        c = r(r(n * p).mean(-1, keepdims=True, dtype=F))
        return rms * r(p - n * c), r(n * dy).reshape(-1, len(w)).sum(0, dtype=F)

    def gated_rms_norm_backward(dy, x, z, w, eps, activation="sigmoid"):
        a = sigmoid(z) if activation == "sigmoid" else r(z * sigmoid(z))
        dx, dw = rms_norm_backward(r(dy * a), x, w, eps)
        m = r(w * r(x * r(F(1) / np.sqrt((x * x).mean(-1, keepdims=True, dtype=F) + F(eps)))))
        return dx, r(dy * m) * slope(z, activation == "silu"), dw

    def l2_norm_backward(dy, x, eps=1e-6):
        D = x.shape[-1]
        return rms_norm_backward(dy, x, np.ones(D, F), eps / D)[0] / F(D**0.5)

    def short_conv_backward(dy, x, w, activation="silu"):
        none = np.zeros((w.shape[1] - 1, x.shape[1]), F)
        seen = np.concatenate([none, x])
        dc = r(dy * slope(r(sum(w[:, j] * seen[j:j + len(x)] for j in range(w.shape[1]))), True))
        dseen = np.zeros_like(seen)
        for j in range(w.shape[1]):
            dseen[j:j + len(x)] += w[:, j] * dc
        dw = np.stack([(dc * seen[j:j + len(x)]).sum(0, dtype=F) for j in range(w.shape[1])], -1)
        return dseen[len(none):], dw, dseen[:len(none)]

    def swiglu_backward(dy, gate, up):
        return r(dy * up) * slope(gate, True), dy * r(gate * sigmoid(gate))

    return locals()[op]


@pytest.mark.parametrize("op", [op for op in OPS if op != "decay_gate_backward"])
def test_steps_in_bfloat16_are_within_the_bound(op):
    def kernel(**x):
        found = each_step(op, rounded)(**{n: a.astype(F) if isinstance(a, np.ndarray) else a for n, a in x.items()})
        return tuple(a.astype(ml_dtypes.bfloat16) for a in (found if isinstance(found, tuple) else (found,)))

    card = check_op(op, kernel, dtype="bfloat16", cases=[c.name for c in spec(op).cases if c.usual
                                                         and c.group == "lengths"])
    assert card and 0.05 < max(r.share for r in card.rows) < 1, card
    assert not check_op(op, kernel, cases="plain")


# ---- laws, places, forms -------------------------------------------------------------------------------


def laws(op, change):
    """The rows of the laws for the right kernel with results changed."""
    return check_op(op, lambda **x: change(x, getattr(planted_backward, op)(**x)), cases="laws", without="out")


def test_laws_are_broken_by_name():
    def mixing(x, y):
        return y[0] + x["dy"][-1:] * F(1e-3), y[1]

    assert "one row changes the results of others" in laws("rms_norm_backward", mixing)["rows-apart"].detail

    def averaged(x, y):
        return y[0], y[1] / F(len(x["dy"]))

    assert laws("rms_norm_backward", averaged)["sums"].detail == \
        "what two halves of the tokens give dw does not add up to what all give"
    assert "gradients of outputs reach inputs behind them" in laws(
        "short_conv_backward", lambda x, y: (y[0] + x["dy"][:1], *y[1:]))["looks-ahead"].detail
    assert laws("short_conv_backward", lambda x, y: (y[0], y[1] / F(len(x["dy"])), y[2]))["sums"].status == "fails"


@pytest.mark.parametrize("op, result, place", [
    ("rms_norm_backward", 1, "channel 5"), ("short_conv_backward", 1, "channel 1, tap 1"),
    ("short_conv_backward", 2, "row 0, channel 5"), ("decay_gate_backward", 1, "head 1"),
    ("decay_gate_backward", 2, "head 0, channel 5"), ("rms_norm_backward", 0, "token 0, channel 5"),
])
def test_places_have_the_names_of_their_axes(op, result, place):
    def kernel(**x):
        found = [a.copy() for a in exact(op, **x)]
        found[result].flat[1 if found[result].ndim == 1 and op.startswith("decay") else 5] += 100
        return tuple(found)

    assert f" at {place}: " in check_op(op, kernel, cases="plain")["plain"].detail


def test_forms_of_ones_own():
    ours = kl.conventions["ours"]
    how = ours["short_conv_backward"].but(forms=("without dhistory",), returned=2)
    card = check_op("short_conv_backward", lambda **x: exact("short_conv_backward", **x)[:2], conventions=how,
                    without="out")
    assert card and "carried-3" in card.not_offered and card["ragged"].status == "holds", card

    def of_a_log(rate, **x):
        df, drate, ddt = exact("decay_gate_backward", rate=np.exp(rate), **x)
        return df, drate * np.exp(rate), ddt

    how = ours["decay_gate_backward"].but(forms=("rate as A_log",))
    assert check_op("decay_gate_backward", of_a_log, conventions=how, without="out")
    assert not check_op("decay_gate_backward", of_a_log, without="out")

    def joined(dy, gate):
        return np.concatenate(exact("swiglu_backward", dy=dy, gate=np.split(gate, 2, -1)[0],
                                    up=np.split(gate, 2, -1)[1]), -1)

    how = ours["swiglu_backward"].but(forms=("gate and up in one, [gate | up]",), returned=1)
    assert check_op("swiglu_backward", joined, conventions=how, without="out")


@pytest.mark.parametrize("op", OPS)
def test_a_file_of_cases_is_judged(op, tmp_path):
    index = write_golden(op, tmp_path / "cases.npz")
    found = np.load(tmp_path / "cases.npz")
    assert index["results"] == list(spec(op).results)
    results = {n: found[n].astype(F) for n in found.files if "/out/" in n}
    np.savez(tmp_path / "results.npz", **results)
    assert judge_golden(op, tmp_path / "results.npz")
    np.savez(tmp_path / "results.npz", **{n: -a for n, a in results.items()})
    assert not judge_golden(op, tmp_path / "results.npz")
