"""check_op of the delta rule's gradients: right kernels hold, wrong ones are named, digits that a type costs are told
from digits that are lost."""

import functools

import backward_kernels
import ml_dtypes
import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.faults import Call
from kimi_linear.faults._delta_backward import FAULTS
from kimi_linear.testing import check_op, spec

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

OP, F = "delta_rule_backward", np.float32
NAMES = spec(OP).results


# ---- right ones ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn, form", [
    (backward_kernels.recurrent, "recurrent"), (backward_kernels.recurrent, None),
    (backward_kernels.chunked, None), (functools.partial(backward_kernels.chunked, chunk=16), None),
    (functools.partial(backward_kernels.chunked, diagonal=True), None),
    (functools.partial(backward_kernels.chunked, solved=np.linalg.inv), None)])
def test_a_right_kernel_holds_every_case(fn, form):
    card = check_op(OP, fn, form=form)
    assert card and card.not_offered == ["out"], card
    assert max(r.share for r in card.rows if r.share == r.share) < 0.5, card


def test_running_sums_are_allowed_for_in_chunks_alone():
    """What cancels in a sum from the chunk's end drowns the gradient of a strong gate; a recurrence has no such sum."""
    card = check_op(OP, backward_kernels.chunked, form="recurrent", cases=["gate-20-long", "some-100", "plain"])
    assert {"some-100", "gate-20-long"} <= set(card.failing), card


def test_without_an_initial_state_its_gradient_may_be_left_out():
    def five(**x):
        return backward_kernels.recurrent(**x)[:5 if "initial_state" not in x else 6]

    assert check_op(OP, five, cases=["lengths", "carried"])
    card = check_op(OP, lambda **x: backward_kernels.recurrent(**x)[:5], cases=["plain", "carried-7"])
    assert card.failing == ["carried-7"]
    assert "it gave 5 results; it must give dq, dk, dv, dg, dbeta, dinitial_state" in card["carried-7"].detail


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16])
def test_operands_of_a_narrow_type_hold(kind):
    """Every operand of a product rounded to the type once, sums in float32."""
    name = np.dtype(kind).name
    card = check_op(OP, functools.partial(narrow, kind), dtype=name, without=["T = 0", "any size"],
                    cases=["lengths", "carried", "widths", "heads", "gates", "beta", "ragged"])
    assert card, card
    assert not check_op(OP, functools.partial(narrow, kind), cases="plain")


def narrow(kind, *, own=lambda x: x, **x):
    """The recurrence with q, k, v, do, d and the states that they meet rounded; `own` rounds once more what a token
    has to do with itself, on one of the two sides where it cancels in dg."""
    def r(a):
        return np.asarray(a, F).astype(kind).astype(F)

    wide = {n: np.asarray(a, F) if isinstance(a, np.ndarray) and a.dtype == kind else a for n, a in x.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward_kernels, "_recurrent", functools.partial(_rounded, r, own))
        got = backward_kernels.recurrent(**wide)
    return *(a.astype(kind) for a in got[:3]), *got[3:]


def _rounded(r, own, q, k, v, g, beta, S, do, A):
    before, after = [], []
    for t in range(len(q)):
        before.append(np.exp(g[t])[:, None] * S)
        S = before[t] + np.outer(k[t], r(beta[t] * (v[t] - k[t] @ r(before[t]))))
        after.append(S)
    dq, dk, dv, dg, dbeta = (np.zeros_like(x) for x in (q, k, v, g, beta))
    for t in reversed(range(len(q))):
        error = v[t] - k[t] @ r(before[t])
        dq[t] = r(after[t]) @ do[t]
        A = A + np.outer(q[t], do[t])
        read = k[t] @ r(A)
        dbeta[t], dv[t] = read @ error, beta[t] * read
        dk[t] = r(A) @ r(beta[t] * error) - r(before[t]) @ r(dv[t])
        diagonal = k[t] * q[t] * (do[t] @ r(beta[t] * error))
        A = A - np.outer(k[t], r(dv[t]))
        dg[t] = (A * before[t]).sum(-1) + own(diagonal) - diagonal
        A = np.exp(g[t])[:, None] * A
    return dq, dk, dv, dg, dbeta, A


def test_terms_of_a_token_with_itself_may_not_be_rounded_apart():
    """They cancel in dg. Rounded on one side they are all there is of it behind a strong gate (attention-gym, pull
    request 461)."""
    def own(x):
        return x.astype(ml_dtypes.bfloat16).astype(F)

    wrong = functools.partial(narrow, ml_dtypes.bfloat16, own=own)
    card = check_op(OP, wrong, dtype="bfloat16", cases=["plain", "gate-20-long", "gate-100"])
    assert card.failing == ["gate-100", "gate-20-long"] and "dg is" in card["gate-20-long"].detail, card


# ---- wrong ones ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault, choice", [(f, c) for f in FAULTS for c in f.choices],
                         ids=lambda x: getattr(x, "name", str(x)))
def test_a_fault_is_named(fault, choice):
    def kernel(**x):
        call = Call(OP, x)
        y = fault.function(call, *choice)
        return tuple(np.float32(a) for a in (call.results() if y is None else y))

    without = ["out", *["-inf"] * ("float32 sums" in fault.text)]  # -inf less -inf has another name
    card = check_op(OP, kernel, without=without)
    assert not card and card.reasons[0][0].startswith(fault.says(choice)), card
    assert len(card.reasons[0][1]) >= 0.9 * len(card.failing), card


def of_sums(chunk, *args):
    """The last step left out: dg before it is summed."""
    *rest, dg, dbeta, dS = chunk(*args)
    return *rest, np.concatenate([dg[:-1] - dg[1:], dg[-1:]]), dbeta, dS


def one_late(chunk, *args):
    """The sum from the chunk's end without a token's own row."""
    *rest, dg, dbeta, dS = chunk(*args)
    return *rest, np.concatenate([dg[1:], 0 * dg[:1]]), dbeta, dS


@pytest.mark.parametrize("wrong, says", [
    (of_sums, "dg is of the running sums of g: it is not added up from the chunk's end, chunks of 64"),
    (one_late, "dg is that of the next token: the sum from the chunk's end leaves its own row out, chunks of 64"),
])
def test_a_mistake_in_the_chunked_form_is_named(wrong, says, monkeypatch):
    right = backward_kernels._Chunk.backward
    monkeypatch.setattr(backward_kernels._Chunk, "backward",
                        lambda self, *args: wrong(functools.partial(right, self), *args))
    card = check_op(OP, backward_kernels.chunked)
    assert not card and says in " ".join(str(card).split()), card


def test_noise_is_not_explained():
    rng = np.random.default_rng(0)

    def noisy(**x):
        return tuple(F(a * (1 + 1e-3 * rng.standard_normal(a.shape))) for a in kl.reference.delta_rule_backward(**x))

    card = check_op(OP, noisy, cases="lengths")
    assert not card and card.reasons == (), card


def test_shapes_are_told():
    card = check_op(OP, lambda **x: tuple(a.T for a in backward_kernels.recurrent(**x)), cases="plain")
    assert "dq has shape [16, 2, 24]; it must be [24, 2, 16], as q" in card["plain"].detail


def test_arrays_are_compared_by_the_budget():
    """All six, or one of which it is told which it is."""
    x = spec(OP).cases[0].make("channel")
    ref, got = kl.reference.delta_rule_backward(**x), backward_kernels.chunked(**x)
    assert kl.diff.compare(got, ref, op=OP, inputs=x)
    kl.testing.assert_close(got[2], ref[2], op=OP, inputs=x)
    assert not kl.diff.compare(got[3] * np.float32(1.01), ref[3], op=OP, inputs=x)


def test_an_error_of_g_names_it():
    x = spec(OP).cases[0].make("channel")
    with pytest.raises(ValueError, match=r"g is None; it must be an array, zeros where nothing decays"):
        kl.reference.delta_rule_backward(**{**x, "g": None})
    with pytest.raises(ValueError, match=r"do"):
        kl.reference.delta_rule_backward(**{**x, "do": x["do"][1:]})


# ---- conventions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("project", [p for p in kl.conventions if p != "ours"])
def test_a_right_kernel_holds_in_every_convention(project):
    """Ours behind the project's layout, turned back by hand: gradients lie as what they are of."""
    how = kl.conventions[project][OP]
    assert list(how.names)[0] == "do" and list(how.names)[-1] == "dstate" and "out" not in how.names

    def kernel(**given):
        x = {a: given[b] for a, b in how.names.items() if given.get(b) is not None}
        normed = how.l2_norm is not None and given.pop(how.l2_norm, False)
        args = {n: a[0] if n in ("do", "q", "k", "v", "g", "beta") else a for n, a in x.items()}
        args["g"] = args["g"][..., 0] if how.gate_axis and args["g"].shape[-1] == 1 else args["g"]
        args["beta"] = args["beta"][..., 0] if how.beta_axis else args["beta"]
        of_exp = args["g"] if how.gate == "exp" else 1
        args["g"] = np.log(args["g"]) if how.gate == "exp" else args["g"]
        for n in ("initial_state", "dstate"):
            if n in args:
                a = args[n].swapaxes(-1, -2) if how.state == "VK" else args[n]
                args[n] = a if "offsets" in args else a[0]
        more = {"scale": 1.0} if how.scale == "caller" else {}
        more |= {"head_map": "tiled"} if "tiled" in how.heads and args["q"].shape[1] != args["v"].shape[1] else {}
        *got, dS = backward_kernels.recurrent(**args, **more, l2_norm=normed)
        got[3] = got[3] / of_exp
        got = [a[None].reshape(given[how.names[n]].shape) for n, a in zip("q k v g beta".split(), got)]
        dS = dS if "offsets" in args else dS[None]
        return *got, dS.swapaxes(-1, -2) if how.state == "VK" else dS

    card = check_op(OP, kernel, conventions=project, arrays="numpy", without=["-inf"],
                    cases=["lengths", "carried", "heads", "ragged", "gates", "l2_norm"])
    assert card, card
    assert card["plain"].status == card["carried-7"].status == "holds"
