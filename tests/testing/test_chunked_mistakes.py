"""check_op names the slips of those who write the delta rule in chunks, and where in the chunked form they are."""

from dataclasses import replace

import numpy as np
import planted
import planted_chunks
import pytest

from kimi_linear.faults import mistakes
from kimi_linear.faults._delta_chunk import Chunks
from kimi_linear.testing import check, check_op, explain, spec

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of planted gates that overflow

SOME = ["plain", "length-7", "length-65", "length-200", "carried-7", "carried-65", "split-64", "ragged*", "scale-1",
        "gate-head", "gate-5-long"]
WITHOUT = ["NaN", "out"]  # a NaN in a product of matrices reaches rows that do not read it
OVERFLOWS = {"full P": 0.8}  # what is above the diagonal, where gates are strong
OF_NO_LENGTH = {"strict P", "no beta in U", "beta twice in U", "diagonal in L", "exclusive k", "exclusive q"}
MILD = ["lengths", "carried", "ragged", "gate-head", "gate-mild"]


def card_of(fn, cases=SOME):
    return check_op("delta_rule", fn, arrays="numpy", without=WITHOUT, cases=cases)


# ---- right, and named ------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("C", [16, 64])
def test_a_right_chunked_kernel_passes(C, padded):
    card = card_of(planted_chunks.kernel(C=C, padded=padded), "all")
    assert card and not card.reasons, card


@pytest.mark.parametrize("C", [16, 64])
def test_of_a_right_chunk_nothing_is_named_but_that_it_spreads_nan(C):
    card = check_op("delta_rule", planted_chunks.kernel(C=C), without="out")
    (says, names), = card.reasons
    assert says.startswith("NaN of one token reaches others") and list(names) == card.failing, card
    assert {card[name].group for name in names} == {"nan"}


@pytest.mark.parametrize("C", [16, 64])
@pytest.mark.parametrize("slip", planted_chunks.SLIPS)
def test_a_slip_is_named_with_its_chunk(slip, C):
    card = card_of(planted_chunks.kernel(slip, C))
    says, names = card.reasons[0]
    assert planted_chunks.SLIPS[slip][2] in says, card
    assert len(names) >= OVERFLOWS.get(slip, 1) * len(card.failing), card
    assert says.endswith(f", chunks of {C}") != (slip in OF_NO_LENGTH)


@pytest.mark.parametrize("C", [64, 128])
@pytest.mark.parametrize("slip", planted_chunks.OF_BLOCKS)
def test_a_slip_between_blocks_of_16_rows_is_named(slip, C):
    card = card_of(planted_chunks.kernel(slip, C))
    [(says, names)] = card.reasons
    assert planted_chunks.OF_BLOCKS[slip][2] in says and len(names) == len(card.failing), card
    assert says.endswith(f"blocks of 16 in a chunk, chunks of {C}")


@pytest.mark.parametrize("C, n", [(16, 7), (64, 7), (32, 15), (64, 31)])
def test_a_product_that_is_short_of_factors_shows_where_keys_are_equal(C, n):
    """(I - L)(I + L^2)(I + L^4)... is the inverse to the power before that of the next factor."""
    factors = "".join(f" @ (np.eye(len(L[0])) + np.linalg.matrix_power(L, {2**i}))" for i in range(1, 5) if 2**i < n)
    slip = "np.linalg.inv(np.eye(len(lower)) + L)", f"(np.eye(len(lower)) - L){factors}"
    card = card_of(planted_chunks.kernel(slip, C), ["keys-equal", "carried-65", "length-65"])
    says, names = card.reasons[0]
    assert f"up to L^{n} for (I + L)^-1" in says and "keys-equal" in names and len(names) == len(card.failing), card


@pytest.mark.parametrize("C", [32, 128])
@pytest.mark.parametrize("slip", ["exclusive start", "beta of columns", "series of 2", "no total", "tail"])
def test_other_lengths_of_chunk(slip, C):
    card = card_of(planted_chunks.kernel(slip, C))
    assert len(card.reasons) == 1 and card.reasons[0][0].endswith(f", chunks of {C}"), card


@pytest.mark.parametrize("C", [16, 64])
@pytest.mark.parametrize("slip", ["exclusive sum", "total too early", "end too early", "both too early"])
def test_rows_of_padding_that_are_taken_for_the_end(slip, C):
    card = card_of(planted_chunks.kernel(slip, C, padded=True))
    says = planted_chunks.SLIPS[slip][2]
    assert says in card.reasons[0][0] and "filled up with zeros" in card.reasons[0][0], card


@pytest.mark.parametrize("slip", ["exclusive start", "no beta in W", "sign of L", "inverse transposed", "no total",
                                  "scale in inter alone", "tail from zero"])
def test_in_float32(slip):
    card = card_of(planted_chunks.kernel(slip, dtype=np.float32), MILD)
    says, names = card.reasons[0]
    assert planted_chunks.SLIPS[slip][2] in says and len(names) == len(card.failing), card


def test_sums_that_are_subtracted_in_L_and_P_alone():
    def one_chunk(q, k, v, g, beta, S):
        """`planted.one_chunk` with exact decays from and to the chunk's rim."""
        c, a = np.cumsum(g, axis=0, dtype=np.float32), np.exp(g)
        start, end, d, o = np.cumprod(a, axis=0), np.ones_like(a), np.empty_like(v), np.empty_like(v)
        for i in range(len(q)):
            end[:i] *= a[i]
            decayed = np.exp(c[i] - c[:i + 1]) * k[:i + 1]
            L = beta[i][:, None] * np.einsum("hk,jhk->hj", k[i], decayed[:i])
            d[i] = beta[i][:, None] * (v[i] - np.einsum("hk,hkv->hv", start[i] * k[i], S))
            d[i] -= np.einsum("hj,jhv->hv", L, d[:i])
            P = np.einsum("hk,jhk->hj", q[i], decayed)
            o[i] = np.einsum("hk,hkv->hv", start[i] * q[i], S) + np.einsum("hj,jhv->hv", P, d[:i + 1])
        return o, start[-1][:, :, None] * S + np.einsum("jhk,jhv->hkv", end * k, d)

    def chunked(q, k, v, g, beta, S, what):
        o = np.empty_like(v)
        for t in range(0, len(q), 64):
            o[t:t + 64], S = one_chunk(*(x[t:t + 64] for x in (q, k, v, g, beta)), S)
        return o, S

    card = card_of(planted.kernel(core=chunked), ["gate-wide", "strong-then-weak", "some-1*"])
    assert [says for says, _ in card.reasons] == [
        "in L and P, decays are formed by subtracting float32 sums of g over chunks of 64: digits are lost after a "
        "strong gate"], card


def rolled(name, by):
    def fn(**x):
        """The heads of one argument one further; those of an argument without heads stay."""
        moved = x.get(name)
        return planted.kernel()(**x | ({} if moved is None else {name: np.roll(moved, by, axis=1)}))
    return fn


@pytest.mark.parametrize("name, by, says", [
    ("g", -1, "each value head has the gates of the next"), ("g", 1, "each value head has the gates of the one before"),
    ("beta", -1, "each value head has the beta of the next"),
    ("v", 1, "each value head has the values of the one before"),
])
def test_heads_that_are_one_off(name, by, says):
    card = card_of(rolled(name, by), ["lengths", "carried", "heads"])
    assert card.reasons[0][0] == says and len(card.reasons[0][1]) == len(card.failing), card


@pytest.mark.parametrize("what", ["o", "o and the state"])
def test_heads_in_reverse(what):
    def fn(**x):
        o, state = planted.kernel()(**x)
        return o[:, ::-1], state[..., ::-1, :, :] if "state" in what else state

    [(says, names)] = card_of(fn, ["lengths", "carried", "heads", "ragged"]).reasons
    assert says == f"the heads of {what} are in reverse order"


@pytest.mark.parametrize("C", [16, 64])
def test_the_last_row_of_a_short_chunk_is_left_out(C):
    """No length is told: a call that chunks fill, which is right, tells it alone."""
    rows = "y.swapaxes(0, 1)[:T - t]"
    slip = rows, f"np.where((t + C <= T) | (np.arange(min(C, T - t)) < T - t - 1)[:, None, None], {rows}, 0)"
    card = card_of(planted_chunks.kernel(slip, C))
    says, names = card.reasons[0]
    assert says == "the last row of o in the last chunk, which is not full, is zero", card
    assert set(card.failing) - set(names) <= {"split-64"}, card


def test_channels_of_the_gate_in_reverse():
    def fn(g, **x):
        return planted.kernel()(g=g if g is None or g.ndim == 2 else g[..., ::-1], **x)

    assert "cases: the channels have the gates in reverse order" in card_of(fn, ["lengths", "carried"]).verdict.replace(
        "; 1 not offered", "")


# ---- what is not said ------------------------------------------------------------------------------


UNKNOWN = {
    "T twice": ("T @ (beta", "T @ T @ (beta"),
    "a longer series": ("np.linalg.inv(np.eye(len(lower)) + L)",
                        "np.eye(len(lower)) - L + L @ L - L @ L @ L + L @ L @ L @ L"),
    "the root of beta": ("beta * v", "np.sqrt(beta) * v"),
    "half of start": ("np.exp(c) *", "np.exp(c / 2) *"),
    "P too large": ("P = scale", "P = 1.01 * scale"),
    "half of the own gate": ("c = np.cumsum(g, axis=1)", "c = np.cumsum(g, axis=1) - g / 2"),
}


@pytest.mark.parametrize("C", [16, 64])
@pytest.mark.parametrize("slip", UNKNOWN)
def test_an_unknown_mistake_has_no_name(slip, C):
    card = card_of(planted_chunks.kernel(UNKNOWN[slip], C), MILD)
    assert not card and card.reasons == () and len(card.failing) > 10, card


def test_no_length_is_claimed_where_all_cases_are_short():
    card = card_of(planted_chunks.kernel("sign of L"), ["length-7", "length-16", "plain"])
    assert [says for says, _ in card.reasons] == ["in a chunk, the sign of L is wrong: (I - L)^-1 for (I + L)^-1"]


@pytest.mark.parametrize("name", [planted.RESET, planted.FIRST_GATE, planted.PAD_REPEATS, planted.UNDECAYED,
                                  planted.NEXT, planted.CLAMP5, planted.BEFORE, planted.IGNORED])
def test_a_mistake_of_the_recurrence_keeps_its_name(name):
    card = card_of(planted.kernel(name), [*SOME, "gates", "beta", "gate-100"])
    assert planted.BUGS[name] in card.reasons[0][0] and len(card.reasons[0][1]) == len(card.failing), card


def test_a_border_is_not_named_where_a_case_that_has_it_lacks_it(monkeypatch):
    """Sums of gates that go on leave nothing of the state under strong gates, and most of it under mild ones."""
    the = spec("delta_rule")
    others = tuple(e for e in the.explanations if "over the borders of chunks" not in e.says)
    monkeypatch.setattr(check, "explain", lambda spec, *a: explain.explain(replace(spec, explanations=others), *a))
    cases = ["length-200", "split-*", "gate-wide", "gate-5-long", "some-1*", "gate-mild", "gate-0.001"]
    card = card_of(planted_chunks.kernel("sums that go on"), cases)
    assert "gate-mild" in card.failing and not any("border" in says for says, _ in card.reasons), card


def test_a_border_is_named_beside_digits_lost_by_sums():
    slip = planted_chunks.CALL, planted_chunks.CALL.replace(" S,", " S * (t == 0),")
    card = card_of(planted_chunks.kernel(slip, dtype=np.float32), ["lengths", "carried", "gate-mild", "some-1*",
                                                                        "gate-wide"])
    says, names = card.reasons[0]
    assert says == "the state is lost at the border of chunks of 64" and len(names) > 4, card


# ---- how they are found ----------------------------------------------------------------------------


def cases():
    return [(c.name, c.make("channel")) for c in spec("delta_rule").cases if c.group != "nan"]


@pytest.mark.parametrize("C", [16, 32, 64, 128, None])
def test_without_a_fault_the_chunked_form_is_the_reference(C):
    for name, x in cases():
        with np.errstate(all="ignore"):
            results, right = Chunks(x).results(C), check._reference("delta_rule", x, {})[0]
        for a, b in zip(results, right, strict=True):
            assert np.abs(a - b).max(initial=0) <= 1e-12 * np.abs(b).max(initial=0), name


def test_every_mistake_shows_in_a_case_and_has_its_own_words():
    chunked = [e for e in spec("delta_rule").explanations if "chunk" in dict(e.switches)]
    assert len({e.says for e in chunked}) == len(chunked) > 250
    long = [x for name, x in cases() if name in ("ragged-carried", "split-37", "gate-5-long", "gate-wide",
                                                  "length-200", "scale-1", "keys-equal")]
    with np.errstate(all="ignore"):
        for e in chunked:
            assert any(spec("delta_rule").mistaken(x, **dict(e.switches)) is not None for x in long), e.says


def test_a_length_belongs_to_every_sentence_but_the_one_without():
    faults = [f for f in mistakes("delta_rule") if hasattr(f.function, "name")]
    assert faults and all(f.says(()) == f.text and f.says((64,)) == f"{f.text}, chunks of 64" for f in faults)


@pytest.mark.parametrize("fn", [
    planted.kernel(planted.RESET), planted.kernel(planted.NEXT), planted_chunks.kernel("clamped sums"),
    planted_chunks.kernel("no total"), planted_chunks.kernel("tail", 16), planted_chunks.kernel("exclusive sum", 32),
    planted_chunks.kernel(UNKNOWN["half of start"])])
def test_the_short_ways_lead_to_the_same_names(fn, monkeypatch):
    """The first tokens rule out what all would; chunks that no sequence fills are the same one."""
    the = spec("delta_rule")
    run = check.Run(the, check.convention("ours", "delta_rule"), fn, lambda a: a, frozenset(WITHOUT), {}, check.FACTOR)
    for case in the.cases:
        if case.group in ("lengths", "ragged") or case.name in ("carried-65", "split-37", "gate-wide", "gate-5-long"):
            run.case(case)
    slow = replace(the, start=lambda x, switches: None, acting=lambda x, switches: switches)
    assert explain.explain(the, run.failures) == explain.explain(slow, run.failures)
