"""check_op of every op: right kernels pass in every convention, planted bugs are named, the data is whole."""

import functools
import inspect

import numpy as np
import planted_ops
import pytest

import kimi_linear as kl
from kimi_linear import faults
from kimi_linear.conventions import Convention, PlainOp
from kimi_linear.diff.budgets import names as budgets
from kimi_linear.testing import check_op, spec, specs
from kimi_linear.testing.spec import BACKWARD
from kimi_linear.testing.spec import OPS as FORWARD

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of planted's own float32

OPS = [op for op in FORWARD if op != "delta_rule"]  # gradients: test_check_backward.py
BORROWED = [(project, op) for project, ops in kl.conventions.items() for op in ops if op in OPS]


def lacks(op):
    """What the planted kernels do not have: out=, and results that are subnormal."""
    return [n for n in ("out", "subnormals") if any(n in c.needs for c in (*spec(op).cases, *spec(op).laws))]


def test_every_op_that_a_port_writes_is_there():
    of_ours_alone = {"add", "sigmoid", "delta_rule_inter", "delta_rule_intra", "mhc_collapse", "mhc_expand"}
    assert set(specs()) == set(budgets()) - of_ours_alone, "kimi_linear/testing/spec.py: OPS, or of_ours_alone here"
    for op in specs():
        assert hasattr(kl.ops, op) == (op not in BACKWARD) and getattr(kl.reference, op)
        assert op in kl.conventions["ours"], f"kimi_linear/_conventions.py: OURS has no {op}"
    for op in FORWARD:
        assert hasattr(planted_ops, op) or op == "delta_rule", f"tests/testing/planted_ops.py: no right kernel of {op}"


@pytest.mark.parametrize("op", OPS)
def test_the_op_itself_holds_and_offers_everything(op):
    card = check_op(op, getattr(kl.ops, op))
    assert card and card.not_offered == [], card
    assert [r.name for r in card.rows if r.share > 1] == [], card


@pytest.mark.parametrize("op", OPS)
def test_another_right_kernel_passes(op):
    card = check_op(op, functools.partial(getattr(planted_ops, op), what=None), without=lacks(op))
    assert card and not card.reasons, card
    assert set(card.not_offered) <= {"out", "subnormal", "rim", "vanishing", "closed", "closed-silu",
                                     "bounded-mixed"}


@pytest.mark.parametrize("op, bug", planted_ops.BUGS)
def test_a_planted_bug_is_named(op, bug):
    card = check_op(op, functools.partial(getattr(planted_ops, op), what=bug), without=lacks(op))
    assert not card and card.reasons, card
    says, named = card.reasons[0]
    assert planted_ops.BUGS[op, bug] in says, card
    assert len(named) >= 0.5 * len(card.failing), card
    assert len(card.brief().splitlines()) <= 24


def test_there_are_enough_bugs_of_each_op():
    for op in OPS:
        bugs = sum(o == op for o, _ in planted_ops.BUGS)
        assert bugs >= 4, f"tests/testing/planted_ops.py: BUGS has {bugs} of {op}; it must have 4"
        own = len([f for f in faults.mistakes(op) if "*" not in f.ops]) + 2 * (op == "route")
        assert own >= 4, f"kimi_linear/faults has {own} of {op} that one call can have; it must have 4"


@pytest.mark.parametrize("op", [op for op in OPS if op != "index_select"])  # ids alone
def test_noise_is_not_explained(op):
    rng = np.random.default_rng(0)

    def noisy(**x):
        got = getattr(planted_ops, op)(**x)
        got = [a * (1 + 1e-3 * rng.standard_normal(a.shape)).astype(np.float32) if a.dtype == np.float32 else a
               for a in (got if isinstance(got, tuple) else (got,))]
        return tuple(got) if len(got) > 1 else got[0]

    card = check_op(op, noisy, without="out", cases="lengths")
    assert not card and card.reasons == (), card


# ---- the conventions of others -----------------------------------------------------------------------


def theirs(project, op):
    """The right kernel as that project would have it: the reverse of the forms, one by one, by hand."""
    how, right = kl.conventions[project][op], getattr(planted_ops, op)
    ours = {b: a for a, b in how.names.items()}
    forms = how.forms

    def fn(**given):
        for name, value in how.always.items():
            assert name in given if name in ours else given.pop(name) == value
        x = {ours.get(n, n): a for n, a in given.items()} | dict(how.fixed)
        read = [lambda y: y]
        for word in reversed(forms):
            x, back = UNDO[word](x)
            read.append(back)
        y = right(**x)
        for back in read[1:]:
            y = back(y)
        return y

    return fn


def _only(name, undo):
    return lambda x: (x | {name: undo(x[name])}, lambda y: y)


def _history(x):
    h = x.get("history")
    W = x["w"].shape[1]
    if h is not None:
        x = x | {"history": np.ascontiguousarray(h.swapaxes(1, 2)[:, h.shape[2] - W + 1:])}
        if "offsets" not in x:
            x["history"] = x["history"][0]

    def back(y):
        h = y[1] if y[1].ndim == 3 else y[1][None]
        return y[0], np.ascontiguousarray(h.swapaxes(1, 2))

    return x, back


def _history_of_w(x):
    x, back = _history(x)

    def wider(y):
        h = back(y)[1]
        return y[0], np.concatenate([np.full_like(h[:, :, :1], 7), h], -1)

    return x, wider


def _joined_conv(turned):
    def undo(x):
        whole = x["x"][0].T if turned else x["x"][0]
        W = x["w"].shape[1]
        return x | {"x": whole[W - 1:], "history": whole[:W - 1]}, lambda y: y[0][None]
    return undo


def _two(name, other, axis):
    def undo(x):
        a, b = np.split(x[name], 2, axis)
        return x | {name: a, other: b}, lambda y: y
    return undo


def _kv_b(x):
    """Undone before q's axes: q is [1, H, T, n] here."""
    w = x["w_uk"].reshape(x["q"].shape[1], -1, x["w_uk"].shape[1])
    nope = x["q"].shape[-1] - x["k_shared"].shape[-1]
    return x | {"w_uk": w[:, :nope], "w_uv": w[:, nope:]}, lambda y: y


def _shuffled(x):
    def back(y):
        ids, w = y
        return np.ascontiguousarray(ids[:, ::-1]), np.ascontiguousarray(w[:, ::-1])
    return x, back


UNDO = {
    "hidden_states": lambda x: ({n: a for n, a in x.items() if n != "hidden_states"}, lambda y: y),
    "normalized_shape": lambda x: ({n: a for n, a in x.items() if n != "normalized_shape"}, lambda y: y),
    "w less 1": _only("w", lambda w: np.float32(1) + w),
    "swish": _only("activation", lambda a: {"swish": "silu"}.get(a, a)),
    "x [1, T, C]": lambda x: (x | {"x": x["x"][0]}, lambda y: (y[0][None], y[1])),
    "x [1, C, T]": lambda x: (x | {"x": x["x"][0].T}, lambda y: (np.ascontiguousarray(y[0].T)[None], y[1])),
    "history [N, C, W-1]": _history, "history [N, C, W]": _history_of_w,
    "history in x, [1, W-1+T, C]": _joined_conv(False), "history in x, [1, C, W-1+T]": _joined_conv(True),
    "w [C, W, 1]": _only("w", lambda w: w[:, :, 0]),
    "f [1, T, H, K]": lambda x: (x | {"f": x["f"][0]}, lambda y: y[None]),
    "f [T, H K]": lambda x: (x | {"f": x["f"].reshape(len(x["f"]), len(x["rate"]), x["f"].shape[1] // len(x["rate"]))},
                             lambda y: y.reshape(len(y), -1) if len(y) else y),
    "dt_bias [H K]": lambda x: (x | {"dt_bias": x["dt_bias"].reshape(x["f"].shape[2:] if x["f"].ndim > 2 else
                                                                    (len(x["rate"]), -1))}, lambda y: y),
    "rate as A_log": _only("rate", np.exp), "rate as -exp(A_log)": _only("rate", np.negative),
    "g [1, T, H, K]": lambda x: (x | {"g": x["g"][0]}, lambda y: y[None]),
    "w_uk and w_uv in one, [H (nope + V), R]": _kv_b,
    "w_uk [H, R, nope]": _only("w_uk", lambda w: w.swapaxes(1, 2)),
    "q [1, H, T, n]": lambda x: (x | {"q": x["q"][0].swapaxes(0, 1)}, lambda y: y.swapaxes(0, 1)[None]),
    "[1, H, T, n]": lambda x: (x | {n: x[n][0].swapaxes(0, 1) for n in "qkv"}, lambda y: y.swapaxes(0, 1)[None]),
    "x [1, T, H, K]": lambda x: (x | {"x": x["x"][0]}, lambda y: y[None]),
    "positions int32": _only("positions", lambda a: a.astype(np.int64)),
    "cache [1, S, n]": lambda x: (x | {n: x[n][0] for n in ("latent", "k_shared")}, lambda y: y),
    "gate and up in one, [gate | up]": _two("gate", "up", -1),
    "w_gate and w_up in one, [E, 2 F, D]": _two("w_gate", "w_up", 1),
    "ids int64": lambda x: (x | {"ids": x["ids"].astype(np.int32)}, lambda y: y),
    "inv_rms of the snapshots": lambda x: ({n: a for n, a in x.items() if n != "inv_rms"}, lambda y: y),
    "x [1, T, n, D]": lambda x: (x | {"x": x["x"][0]}, lambda y: tuple(a[None] for a in y)),
    "[1, T, ...]": lambda x: ({n: a[0] for n, a in x.items()}, lambda y: y[None]),
    "post, comb, y": lambda x: (x, lambda y: (y[1], y[2], y[0])),
    "post [T, n, 1]": lambda x: (x | {"post": x["post"][..., 0]}, lambda y: y) if "post" in x else (
        x, lambda y: (y[0][..., None], *y[1:])),
    "hc_sinkhorn_eps": lambda x: ({n: a for n, a in x.items() if n != "hc_sinkhorn_eps"}, lambda y: y),
    "ids in any order": _shuffled, "weights before ids": lambda x: (x, lambda y: (y[1], y[0])),
}


@pytest.mark.parametrize("project, op", BORROWED)
def test_a_right_kernel_passes_in_every_convention(project, op):
    card = check_op(op, theirs(project, op), conventions=project, arrays="numpy",
                    without=lacks(op))
    assert card and not card.reasons, card
    assert len([r for r in card.rows if r.status == "holds"]) >= 10, card
    names = inspect.signature(getattr(kl.reference, op)).parameters
    assert set(kl.conventions[project][op].names) <= set(names) | {"out"}


@pytest.mark.parametrize("project, op", BORROWED)
def test_conventions_are_data(project, op):
    how = kl.conventions[project][op]
    assert isinstance(how, PlainOp) and isinstance(how, Convention) and how.project == project and how.source[0]
    assert project == "ours" or ": " in how.source[0]


@pytest.mark.parametrize("op, forms, change", [
    ("linear", ("w [n, m]",), lambda x: x | {"w": x["w"].T}),
    ("short_conv", ("w [W, C]",), lambda x: x | {"w": x["w"].T}),
    ("short_conv", ("w [C, 1, W]",), lambda x: x | {"w": x["w"][:, 0]}),
    ("short_conv", ("w newest first",), lambda x: x | {"w": x["w"][:, ::-1]}),
    ("latent_attention", ("w_uv [H, R, V]", "w_uk [H, R, nope]"),
     lambda x: x | {n: x[n].swapaxes(1, 2) for n in ("w_uk", "w_uv")}),
    ("latent_attention", ("select [T, 1, W]",),
     lambda x: x | {"select": x["select"].squeeze(1)} if "select" in x else x),
    ("moe", ("w_down [E, F, D]", "w_gate [E, D, F]", "w_up [E, D, F]"),
     lambda x: x | {n: x[n].swapaxes(1, 2) for n in ("w_gate", "w_up", "w_down")}),
    ("attn_res", ("snapshots [T, n, D]", "w in two, norm.weight and proj.weight"),
     lambda x: {"snapshots": x["snapshots"].swapaxes(0, 1), "x": x["x"], "eps": x["eps"],
                "w": x["norm_weight"] * x["proj_weight"]}),
    ("mhc_pre", ("fn [n D, (2 + n) n]",), lambda x: x | {"fn": x["fn"].T}),
    ("mhc_post", ("comb [T, to, from]",), lambda x: x | {"comb": np.swapaxes(x["comb"], -1, -2)}),
    ("swiglu", ("up and gate in one, [up | gate]",),
     lambda x: x | dict(zip(("up", "gate"), np.split(x["gate"], 2, -1)))),
    ("situ", ("up and gate in one, [up | gate]",),
     lambda x: x | dict(zip(("up", "gate"), np.split(x["gate"], 2, -1)))),
])
def test_a_form_of_ones_own(op, forms, change):
    how = kl.conventions["ours"][op].but(forms=forms)
    assert check_op(op, lambda **x: getattr(planted_ops, op)(**change(x)), conventions=how, without=lacks(op))
    wrong = check_op(op, lambda **x: getattr(planted_ops, op)(**change(x)), without="out")
    assert not wrong


def test_what_a_convention_cannot_say_is_not_offered():
    card = check_op("gated_rms_norm", theirs("hf-gdn", "gated_rms_norm"), conventions="hf-gdn", arrays="numpy")
    assert card["plain"].status == "holds" and card["sigmoid"].detail == "activation = 'sigmoid'"
    card = check_op("decay_gate", theirs("ggml", "decay_gate"), conventions="ggml", without="subnormals")
    assert card["bounded-5"].detail == "lower_bound" and card["bounded-5"].status == "not offered"
    with pytest.raises(ValueError, match=r"ours has the form 'w \[m\]' of linear; there are w \[n, m\]"):
        check_op("linear", kl.ops.linear, conventions=kl.conventions["ours"]["linear"].but(forms=("w [m]",)))
    with pytest.raises(ValueError, match="hf-gdn has no conventions of 'moe'; it has delta_rule, rms_norm"):
        check_op("moe", kl.ops.moe, conventions="hf-gdn")


# ---- what is not allowed -----------------------------------------------------------------------------


def test_results_of_other_shapes_and_numbers():
    card = check_op("rms_norm", lambda x, w, eps: x[:-1], cases="plain")
    assert "y has shape [8, 48]; it must be [9, 48]" in card["plain"].detail
    card = check_op("short_conv", lambda **x: x["x"], cases="plain")
    assert card["plain"].detail == "it gave 1 result; it must give 2: y, history"


def test_laws():
    def mixes(x, w, eps):
        return planted_ops.rms_norm(x, w, eps) * np.float32(1 + 1e-7 * np.float64(np.nansum(x[-1]) > 0))

    def leaks(x, w, eps):
        return planted_ops.rms_norm(x, w, eps) + x[-1] * np.float32(1e-3)

    assert "one row changes the results of others" in check_op("rms_norm", leaks, cases="laws")["rows-apart"].detail
    assert check_op("rms_norm", mixes, cases="laws", without="out")

    def of_the_batch(x, w, eps):
        return planted_ops.rms_norm(x, w, eps) * np.float32(1 + 1e-3 * (len(x) > 1))

    card = check_op("rms_norm", of_the_batch, cases="laws")
    assert card["batch-alone"].detail == "row 0 alone gives another result than in a batch of 9"

    def looks_ahead(x, **rest):
        return planted_ops.short_conv(x + x[-1:], **rest)

    assert "tokens change outputs before them" in check_op("short_conv", looks_ahead, cases="laws")["causal"].detail


@pytest.mark.parametrize("op", OPS)
def test_cases_are_the_same_at_every_call(op):
    the = spec(op)
    n = len(the.cases) + len(the.laws)
    assert len({c.name for c in (*the.cases, *the.laws)}) == n, "two have one name"
    assert n >= 20, f"kimi_linear/testing/{op}.py has {n} cases and laws; it must have 20"
    for c in the.cases:
        a, b = c.make(None), c.make(None)
        for n in a:
            same = np.array_equal(a[n], b[n], equal_nan=a[n].dtype.kind == "f") if isinstance(a[n], np.ndarray) \
                else a[n] == b[n]
            assert same, (c.name, n)
            assert not isinstance(a[n], np.ndarray) or a[n].dtype in (np.float32, np.int32, np.int64), (c.name, n)
    assert any("T = 0" in c.needs for c in the.cases) and {c.group for c in the.cases} >= {"lengths"}


@pytest.mark.parametrize("op", OPS)
def test_every_mistake_shows_in_a_case(op):
    """A fault that no case of its op shows would never be named; but some ops have no results past 65504, or ids."""
    the, seen = spec(op), set()
    calls = [(x, getattr(kl.reference, op)(**x)) for x in (c.make(None) for c in the.cases)]
    with np.errstate(all="ignore"):
        for e in the.explanations:
            for x, right in calls:
                wrong = the.mistaken(x, **dict(e.switches))
                right = right if isinstance(right, tuple) else (right,)
                if wrong is not None and not all(np.allclose(a, b, rtol=1e-6, atol=0, equal_nan=True)
                                                 for a, b in zip(wrong, right, strict=True)):
                    seen.add(e.says)
                    break
    of_floats = ("float16_result", "bfloat16_result") if op == "index_select" else ()
    unseen = {faults.by_name(name).text for name in ("float16_overflow", *of_floats)}
    assert {e.says for e in the.explanations} - seen <= unseen


@pytest.mark.parametrize("op", OPS)
def test_faults_and_mistakes_are_the_same(op):
    """What check_op tries of an op are the faults of kl.faults, those that need a run left out."""
    tried = {dict(e.switches).popitem()[0] for e in spec(op).explanations}
    assert {f.name for f in faults.for_op(op) if f.use == faults.BOTH} <= tried
    assert {f.name for f in faults.mistakes(op)} <= tried
    assert len({e.says for e in spec(op).explanations}) == len(spec(op).explanations)
