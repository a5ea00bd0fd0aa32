"""check_op: right kernels pass in every convention, planted bugs are named, and what is not offered is said."""

import functools
import json
import time

import numpy as np
import planted
import pytest

import kimi_linear as kl
from kimi_linear.testing import check_op, spec

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of planted's own float32

SOME = ["plain", "length-7", "length-65", "carried-7", "carried-65", "split-64", "heads", "ragged", "scale-1",
        "l2_norm", "gate-5", "gate-10000", "beta-1"]
RIM = {planted.CLAMP20, planted.FACTORED, planted.SUMS, planted.SUMS_LOG2}  # seen on the rim alone


def check(fn, conventions="ours", **named):
    return check_op("delta_rule", fn, conventions=conventions, arrays="numpy", **named)


# ---- bars ------------------------------------------------------------------------------------------


def off_by(scale, at=None):
    """rms_norm, off by a relative error everywhere, or in one element by so many times the rms."""
    def fn(x, **options):
        y = kl.ops.rms_norm(x, **options)
        if at is None or not y.size:
            return y * np.float32(1 + scale)
        y[at] += np.float32(scale) * np.sqrt(np.mean(y**2))
        return y

    return fn


def test_the_factor_is_how_many_bounds_an_error_may_reach():
    fn = off_by(2.0**-20)
    (row,) = check_op("rms_norm", fn, cases="width-1", factor=1e9).rows
    assert row.status == "holds" and 1 < row.share < 4
    assert check_op("rms_norm", fn, cases="width-1", factor=1.01 * row.share)
    (wrong,) = check_op("rms_norm", fn, cases="width-1", factor=0.99 * row.share).rows
    assert wrong.status == "fails" and f"{row.share:.3g} times the bound" in wrong.detail


@pytest.mark.parametrize("fn, holds", [
    (off_by(0.9e-6), True), (off_by(1.2e-6), False), (off_by(18e-6, (0, 0)), True), (off_by(22e-6, (0, 0)), False),
])
def test_on_usual_inputs_the_error_is_held_against_the_rms(fn, holds):
    """1e-6 of it over all, 20 times that in one element, whatever the bound of the op is."""
    (row,) = check_op("rms_norm", fn, cases="length-65", factor=1e9).rows
    assert row.status == ("holds" if holds else "fails") and ("of its rms" in row.detail) == (not holds)


# ---- right kernels ---------------------------------------------------------------------------------


CONVENTIONS = {
    "ours": planted.kernel(), "ours, chunked": planted.kernel(core=planted.chunked), "fla": planted.fla(),
    "fla, chunked": planted.fla(planted.chunked), "fla-gdn": planted.fla(), "hf": planted.hf(),
    "hf-gdn, chunked": planted.hf(planted.chunked), "vllm": planted.fla(state="VK"),
    "vllm-gdn": planted.fla(state="VK"), "ggml": planted.ggml, "mlx": planted.mlx,
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_right_kernel_passes(name):
    card = check(CONVENTIONS[name], name.partition(",")[0])
    assert card, card
    assert not card.reasons and "not offered" in card.verdict
    assert len(card.rows) == len(spec("delta_rule").cases) + len(spec("delta_rule").laws)
    assert max(r.share for r in card.rows if r.share == r.share) < 1.5


def test_every_convention_is_tried_above():
    assert {name.partition(",")[0] for name in CONVENTIONS} == set(kl.conventions)


def test_the_op_itself_holds_everywhere_and_offers_everything():
    card = check_op("delta_rule", kl.ops.delta_rule)
    assert card and card.not_offered == [] and card.verdict.startswith("ok: all ")
    assert all(r.share < 1 for r in card.rows if r.share == r.share)


def test_a_chunked_kernel_within_the_bound_of_its_form():
    assert check(planted.kernel(core=planted.chunked), form="chunked", cases=["lengths", "rim gates"])


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_the_reference_is_far_inside(form):
    card = check(lambda **x: kl.reference.delta_rule(**x, form=form), without=["out", "NaN"])
    assert card and max(r.largest for r in card.rows if r.largest == r.largest) < 0.01


def test_the_textbook_chunk_fails_where_gates_are_infinite_alone():
    card = check(lambda **x: kl.reference.delta_rule(**x, form="pairwise"), cases=["rim gates", "lengths"])
    assert set(card.failing) == {"gate-inf", "one-inf", "every-gate-65", "every-gate-130"}
    assert [says.partition(":")[0] for says, _ in card.reasons] == [
        "NaN from -infinity minus -infinity, sums of g that are subtracted"]


def test_a_convention_can_be_changed():
    how = kl.conventions["fla"]["delta_rule"].but(axes="BHTK", gate="log2")
    assert check(planted.heads_first, how, without="offsets")
    wrong = check(planted.heads_first, how.but(gate="log"), without="offsets", cases=SOME)
    assert "multiplied by" in wrong.verdict or "log2" in wrong.verdict
    with pytest.raises(ValueError, match="'gait' is no field of a DeltaRule; it has project, source,"):
        how.but(gait="log")


# ---- planted bugs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", planted.BUGS)
def test_a_planted_bug_is_named(name):
    cases = ["rim gates", "plain"] if name in RIM else SOME
    card = check(planted.kernel(name), cases=cases)
    assert not card and card.failing
    says, names = card.reasons[0]
    assert planted.BUGS[name] in says, card
    assert len(names) > 0.5 * len(card.failing), card
    assert all(card[n].why.startswith(says.partition(":")[0]) for n in names)
    assert len(str(card).splitlines()) <= 30 and max(map(len, str(card).splitlines())) <= 110


def test_there_are_enough_bugs_and_they_differ():
    assert len(planted.BUGS) >= 12 and len(set(planted.BUGS.values())) == len(planted.BUGS)


def test_the_place_of_an_overflow():
    """-5 nats a token: the sum passes -88.7 at the eighteenth."""
    card = check(planted.kernel(planted.FACTORED), cases=["gate-5", "gate-5-long"])
    assert card["gate-5"].why == (
        "NaN from a positive exponent, exp(90) where float32 ends at exp(88.7), chunk 0, row 17")
    assert "token 17, head 0" in card["gate-5"].detail


def test_noise_is_not_explained():
    """An error that no mistake gives: it fails, and nothing is claimed."""
    rng = np.random.default_rng(0)

    def noisy(**x):
        return tuple(a * (1 + 1e-3 * rng.standard_normal(a.shape)).astype(np.float32) for a in planted.kernel()(**x))

    card = check(noisy, cases=["lengths", "carried"])
    assert not card and card.reasons == () and len(card.failing) >= 15
    assert card.verdict == f"FAILS {len(card.failing)} of 18 cases"


def test_bfloat16_gates_fail():
    def short(g, **x):
        g = None if g is None else (g.view(np.uint32) & 0xFFFF0000).view(np.float32)
        return planted.kernel()(g=g, **x)

    card = check(short, cases=["carried"])
    assert "carried-65" in card.failing and card.reasons == ()


# ---- what is not offered, and what is not allowed --------------------------------------------------


def test_unknown_keywords_and_not_implemented_are_listed():
    def few(q, k, v, g, beta, initial_state=None):
        if g is None or g.ndim == 2:
            raise NotImplementedError("a gate per channel alone")
        return planted.kernel()(q, k, v, g, beta, initial_state=initial_state)

    card = check(few)
    assert card, card
    assert {"ragged", "scale-1", "gate-head", "gate-none", "norm", "tiled-2-6", "out"} <= set(card.not_offered)
    assert card["ragged"].detail == "no argument 'offsets'" and card["gate-head"].detail == "a gate per channel alone"
    assert "not offered:" in str(card) and f"{len(card.not_offered)} not offered" in card.verdict


def test_a_keyword_that_is_handed_on_is_not_offered():
    """Decorators take ``**options``; the TypeError comes from inside of them."""
    def few(q, k, v, g, beta, initial_state=None):
        return planted.kernel()(q, k, v, g, beta, initial_state=initial_state)

    def logged(*args, **options):
        return few(*args, **options)

    cases = ["plain", "ragged", "scale-1"]
    for fn in (few, logged, functools.partial(logged), lambda **x: logged(**x)):
        card = check(fn, cases=cases)
        assert card and card["ragged"].detail == "no argument 'offsets'" and "scale-1" in card.not_offered


def test_a_typing_error_inside_of_a_kernel_fails():
    def fast(x):
        return x

    def own_keyword(x, w, *, eps):
        return kl.ops.rms_norm(fast(x, mode="fast") if x.shape[-1] > 64 else x, w, eps=eps)

    def keyword_of_the_call(x, w, *, eps):
        return kl.ops.rms_norm(fast(x, eps=eps) if x.shape[-1] > 64 else x, w, eps=eps)

    for fn, name in ((own_keyword, "mode"), (keyword_of_the_call, "eps")):
        card = check_op("rms_norm", fn)
        assert not card and set(card.not_offered) <= {"out"}  # of a law, an argument of ours
        assert {card[n].detail.rpartition(".")[2] for n in card.failing} == {
            f"fast() got an unexpected keyword argument '{name}'"}


def test_without():
    card = check(planted.kernel(), without=["offsets", "T = 0"])
    assert card and {"ragged", "ragged-carried", "length-0"} <= set(card.not_offered)
    assert card["ragged"].detail == "offsets"


def test_what_a_kernel_has_not_and_does_not_say():
    def ungrouped(q, k, v, g, beta, scale=None, initial_state=None):
        if q.shape[1] != v.shape[1]:
            raise ValueError("shapes")
        return planted.kernel()(q, k, v, g, beta, scale=scale, initial_state=initial_state)

    card = check(ungrouped)
    assert not card and card.lacks == ("grouped heads",) and card.to_dict()["lacks"] == ["grouped heads"]
    assert "without=['grouped heads']" in str(card)
    assert check(ungrouped, without=card.lacks)
    assert check(lambda **x: 1 / 0).lacks == ()


def test_without_the_plain_case_the_others_are_run():
    def without_bias(scores, *, k, bias=None, **options):
        if bias is not None:
            raise NotImplementedError("a bias")
        return kl.ops.route(scores, k=k, **options)

    card = kl.testing.check_op("route", without_bias)
    assert card and card["plain"].status == "not offered" and card["softmax-512-10"].status == "holds"


def test_a_router_whose_softmax_is_of_the_chosen_alone():
    def router(scores, *, k, bias=None, function="sigmoid", renormalise=True, scale=1.0, **groups):
        ids, weights = kl.ops.route(scores, k=k, bias=bias, function=function, renormalise=renormalise, scale=scale,
                                    **groups)
        if function == "softmax":
            weights = kl.ops.softmax(np.take_along_axis(scores, ids.astype(np.int64), -1)) * np.float32(scale)
        return ids, weights

    card = kl.testing.check_op("route", router)
    assert card.failing == ["softmax-plain-weights"] and "divided by their sum" in card.verdict
    assert "slot" in card["softmax-plain-weights"].detail


def test_a_router_whose_bias_is_on_the_logits():
    def router(scores, *, k, bias=None, **options):
        ids, _ = kl.ops.route(scores if bias is None else scores + bias, k=k, **options)
        weights = kl.reference.route_weights(scores, ids, **{n: options[n] for n in options if "group" not in n})
        return ids, weights.astype(np.float32)

    card = kl.testing.check_op("route", router)
    assert not card and card.reasons[0][0].startswith("the bias is added to the logits"), card


def test_a_kernel_that_takes_nothing_is_not_run():
    card = check(planted.kernel(), "fla")
    assert not card and "'use_qk_l2norm_in_kernel'; it is called with q, k, v, beta, g, " in card.verdict
    assert card.verdict.startswith("NOT RUN: the plain case is not offered: no argument 'use_qk")
    assert not check(lambda **x: (_ for _ in ()).throw(NotImplementedError("later")))


@pytest.mark.parametrize("fn, words", [
    (lambda **x: None, "a result is None"),
    (lambda **x: x["v"], "it gave 1 result; it must give two"),
    (lambda **x: (planted.kernel()(**x)[0][:-1], 0 * x["q"]), "o has shape"),
    (lambda **x: 1 / 0, "raised ZeroDivisionError: division by zero"),
])
def test_what_is_no_result_fails_with_a_sentence(fn, words):
    card = check(fn, cases="carried-7")
    assert not card and words in card["carried-7"].detail and words.partition(" has")[0] in card.verdict


def test_a_state_of_another_shape_is_named():
    card = check(planted.kernel(planted.TRANSPOSED), cases="width-7x16")
    assert card["width-7x16"].detail == "the state has shape [1, 16, 7]; it must be [1, 7, 16]"
    assert card.reasons[0][0] == "the final state equals ours with K and V swapped"


def test_writing_past_an_input_is_seen():
    def writes(v, **x):
        np.lib.stride_tricks.as_strided(v, (v.size + 1,), (4,))[-1] = 3
        return planted.kernel()(v=v, **x)

    card = check(writes, cases="plain")
    assert card["plain"].detail == "its input v was written past its end"


def test_laws():
    count = iter(range(10**6))

    def drifts(**x):
        o, state = planted.kernel()(**x)
        return o * np.float32(1 + next(count) % 2 * 2e-7), state

    assert "two calls on the same inputs differ" in check(drifts, cases="laws")["same-bytes-twice"].detail

    def looks_ahead(v, **x):
        return planted.kernel()(v=v + v[-1:], **x)

    assert "tokens change outputs before them, in " in check(looks_ahead, cases="laws")["causal"].detail

    def mixes_heads(v, **x):
        return planted.kernel()(v=v + v[:, -1:], **x)

    card = check(mixes_heads, cases="laws")
    assert "one head changes the outputs of others" in card["heads-apart"].detail and card["causal"].status == "holds"

    def swallows(out=None, **x):
        return planted.kernel()(**x)

    assert check(swallows, cases="laws")["out"].detail == "out= is taken, and its o is left as it was"

    def overruns(out=None, **x):
        o, state = planted.kernel()(**x)
        if out is not None:
            out[0][...], out[1][...] = o, state
            np.lib.stride_tricks.as_strided(out[1], (state.size + 1,), (4,))[-1] = 0
        return o, state

    assert check(overruns, cases="laws")["out"].detail == "it wrote outside of its output state"


@pytest.mark.parametrize("change, message", [
    (dict(op="rms_nrom"), "op is 'rms_nrom'; check_op knows delta_rule"),
    (dict(conventions="flo"), "conventions is 'flo'; it must be one of ours, fla, "),
    (dict(cases="lenghts"), "'lenghts', which matches no case; the groups are lengths, carried, widths"),
    (dict(cases=[]), 'cases is empty; it must be "all", or name cases or groups: lengths, carried'),
    (dict(without=["offset"]), "without has 'offset'; it must be of -inf, K != V"),
    (dict(form="fast"), "form is 'fast'; delta_rule has recurrent, chunked"),
    (dict(arrays="cupy"), 'arrays is \'cupy\'; it must be "numpy"'),
])
def test_errors_are_sentences(change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        check_op(**dict(op="delta_rule", fn=planted.kernel()) | change)


@pytest.mark.parametrize("change, message", [(dict(fn=3), "fn is a int; it must be callable"),
                                             (dict(cases=3), "cases is 3; it must be text, or a list of it")])
def test_arguments_of_another_type_are_named(change, message):
    with pytest.raises(TypeError, match=message):
        check_op(**dict(op="delta_rule", fn=planted.kernel()) | change)


# ---- the card --------------------------------------------------------------------------------------


def test_the_card():
    card = check(planted.kernel(planted.NO_SCALE), cases=["lengths", "carried"])
    text = str(card)
    assert text == repr(card) and text.splitlines()[-1] == card.verdict
    assert card.verdict == f"FAILS {len(card.failing)} of 18 cases: the scale is missing"
    assert "first: plain: o is" in text and "times the bound" in text
    assert f"why: the scale is missing (explains {len(card.failing)} of {len(card.failing)})" in text
    html = card._repr_html_()
    assert "delta_rule, ours conventions: FAILS" in html
    assert html.startswith("<table>") and "#cf222e" in html and "the scale is missing" in html
    assert json.loads(json.dumps(card.to_dict(), allow_nan=False))["ok"] is False
    with pytest.raises(KeyError, match="no case 'x'"):
        card["x"]


def test_cases_are_the_same_at_every_call_and_cover_what_they_say():
    cases = spec("delta_rule").cases
    assert len({c.name for c in cases}) == len(cases)
    for c in cases:
        a, b = c.make("channel"), c.make("channel")
        for n in a:
            same = np.array_equal(a[n], b[n], equal_nan=True) if isinstance(a[n], np.ndarray) else a[n] == b[n]
            assert same, (c.name, n)
    lengths = {len(c.make("channel")["q"]) for c in cases}
    assert {0, 1, 16, 63, 64, 65, 200} <= lengths
    gates = np.concatenate([np.ravel(c.make("channel")["g"]) for c in cases if c.group == "rim gates"])
    assert set(np.float32([-0.0, -1e-30, -1e-3, -5, -100, -1e4, -np.inf])) <= set(gates)
    widths = {x["q"].shape[-1] for x in (c.make("channel") for c in cases)}
    assert {1, 130} <= widths


def test_naming_a_bug_takes_under_two_seconds():
    check(planted.kernel(), cases=["lengths", "carried"])
    start = time.process_time()
    assert check(planted.kernel(planted.TRANSPOSED), cases=["lengths", "carried"]).reasons
    assert time.process_time() - start < 2
