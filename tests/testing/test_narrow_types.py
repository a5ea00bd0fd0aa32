"""check_op on kernels that compute in bfloat16 or float16: what the type costs is allowed, what is wrong is named."""

import functools

import ml_dtypes
import numpy as np
import planted
import pytest

import kimi_linear as kl
from kimi_linear.diff.budgets import budget, names
from kimi_linear.testing import check_op, spec, specs
from kimi_linear.testing.spec import BACKWARD

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F = np.float32
TYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
OPS = [op for op in specs() if spec(op).narrow]
FEW = ["plain", "length-65", "length-200", "carried-7", "carried-65", "split-64", "heads", "ragged", "scale-1",
       "l2_norm", "gate-5"]
#: Seen on the rim alone, and there by these words.
RIM = {name: planted.BUGS[name] for name in (planted.FACTORED, planted.CLAMP5, planted.CLAMP20)} | {
    planted.SUMS: "sums of g that are subtracted", planted.SUMS_LOG2: "sums of g that are subtracted"}
#: Not seen: `stored` makes it harmless.
HIDDEN = {planted.WRITES}


# ---- kernels ---------------------------------------------------------------------------------------


def gpu_chunk(kind, C=64, state_kind=F):
    """The delta rule as matrix cores compute it: operands in a narrow type, sums in float32, chunk by chunk."""
    def r(x):
        return np.asarray(x, F).astype(kind).astype(F)

    def core(q, k, v, g, beta, S, what=None):
        o = np.empty(v.shape, F)
        for t in range(0, len(q), C):
            p = slice(t, t + C)
            o[p], S = chunk(*(np.swapaxes(a[p], 0, 1) for a in (q, k, v, g)), beta[p].T, S)
            S = S.astype(state_kind).astype(F)
        return o, S

    def chunk(q, k, v, g, beta, S):
        n, sums = q.shape[1], np.cumsum(g, axis=1, dtype=F)
        decays = np.exp(np.minimum(sums[:, :, None] - sums[:, None], 0))
        low = np.tri(n, dtype=bool)
        A = np.einsum("hik,hjk,hijk->hij", k, k, decays) * beta[..., None] * np.tri(n, k=-1)
        P = np.einsum("hik,hjk,hijk->hij", q, k, decays) * low
        T = r(np.linalg.inv(np.eye(n, dtype=F) + A))
        start, end = np.exp(sums), np.exp(sums[:, -1:] - sums)
        w = r(T @ r(beta[..., None] * start * k))
        d = T @ r(beta[..., None] * v) - w @ r(S)
        o = r(start * q) @ r(S) + r(P) @ r(d)
        return np.swapaxes(o, 0, 1), start[:, -1, :, None] * S + np.swapaxes(r(end * k), 1, 2) @ r(d)

    return planted.kernel(core=core)


def stored(fn, kind, results=("o",)):
    """A kernel that widens its arguments and rounds the first results."""
    def narrow(**x):
        y = fn(**{n: a.astype(F) if isinstance(a, np.ndarray) and a.dtype == kind else a for n, a in x.items()})
        y = y if isinstance(y, tuple) else (y,)
        return tuple(a.astype(kind) if i < len(results) else a for i, a in enumerate(y))

    return narrow


def check(fn, kind="bfloat16", **named):
    return check_op("delta_rule", stored(fn, TYPES[kind]), dtype=kind, **named)


# ---- right ones ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_a_chunk_of_matrix_cores_holds(kind):
    groups = ["lengths", "carried", "widths", "heads", "ragged", "scale", "gates", "beta", "laws", "l2_norm"]
    card = check(gpu_chunk(TYPES[kind]), kind, cases=groups, without=["out"])
    assert card, card
    assert 0.02 < max(r.share for r in card.rows if r.share == r.share) < 2
    assert f"ours conventions, {kind} (u = 2^-{8 if kind == 'bfloat16' else 11}):" in str(card)
    assert not check_op("delta_rule", stored(gpu_chunk(TYPES[kind]), TYPES[kind]), cases=["plain", "carried"])


def right(op):
    """The op itself; of a gradient the reference, in float32."""
    if op not in BACKWARD:
        return getattr(kl.ops, op)

    def fn(**x):
        found = getattr(kl.reference, op)(**x)
        return tuple(a.astype(F) for a in (found if isinstance(found, tuple) else (found,)))

    return fn


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("op", OPS)
def test_float32_inside_and_a_narrow_result_hold(op, kind):
    the = spec(op)
    fn = stored(right(op), TYPES[kind], the.narrow_results)
    card = check_op(op, fn, dtype=kind, without=["out"])
    assert card, card
    assert max(r.share for r in card.rows if r.share == r.share) < 1
    usual = check_op(op, fn, cases="plain")
    assert bool(usual) == (not the.narrow_results or op == "route"), usual  # without dtype nothing is allowed for


def test_its_rim_fails_and_the_card_says_why():
    """No type excuses NaN: of gates that are subtracted at -infinity, and of one token's in the rows of others."""
    card = check(gpu_chunk(ml_dtypes.bfloat16), cases=["rim gates", "nan", "plain"])
    reasons = [says.partition(":")[0] for says, _ in card.reasons]
    assert set(reasons) == {"NaN of one token reaches others", "NaN from -infinity minus -infinity, sums of g that are "
                            "subtracted"}, card
    assert card["plain"].status == "holds" and "not explained" not in str(card)


def test_a_state_kept_narrow_is_seen_in_what_reads_it():
    """The state of one call may come in any type; one that is rounded at every chunk drifts."""
    lossy = gpu_chunk(ml_dtypes.bfloat16, C=1, state_kind=ml_dtypes.float8_e4m3fn)
    assert not check(lossy, cases=["carried-65"])


# ---- wrong ones ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(planted.BUGS) - HIDDEN))
def test_a_planted_bug_is_named_in_bfloat16(name):
    card = check(planted.kernel(name), cases=["rim gates", "plain"] if name in RIM else FEW)
    assert not card and card.failing
    assert RIM.get(name, planted.BUGS[name]) in card.reasons[0][0], card


def test_noise_above_the_type_is_not_explained():
    rng = np.random.default_rng(0)

    def noisy(**x):
        return tuple(a * (1 + 0.2 * rng.standard_normal(a.shape)).astype(F) for a in planted.kernel()(**x))

    card = check(noisy, cases=["lengths", "carried"])
    assert not card and card.reasons == () and len(card.failing) >= 15


def test_rms_is_judged_in_units_of_the_type():
    def off(**x):
        o, state = planted.kernel()(**x)
        return o * F(1.02), state

    card = check(off, cases=["plain"])
    assert "on such inputs it may be 5e-03 and 1e-01" in card["plain"].detail
    assert 4 < card["plain"].rms < 7  # 0.02 in 2^-8


# ---- the budget ------------------------------------------------------------------------------------


def _each_step(op, kind):
    """Ops as eager modules compute them: every step in the type."""
    def r(x):
        return np.asarray(x, F).astype(kind).astype(F)

    def sigmoid(x):
        return r(1 / (1 + np.exp(-x)))

    def silu(x):
        return r(x * sigmoid(x))

    def rms_norm(x, w, eps):
        return r(x * r(1 / np.sqrt((x * x).mean(-1, keepdims=True) + F(eps)))) * w

    def attention(q, k, v, scale, **offsets):
        q, group = r(q * F(scale)), q.shape[1] // k.shape[1]
        k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
        s = np.einsum("thk,shk->hts", q, k)
        s[:, ~np.tri(len(q), len(k), len(k) - len(q), dtype=bool)] = -np.inf
        p = np.exp(s - s.max(-1, keepdims=True))
        return np.einsum("hts,shv->thv", r(p), v) / p.sum(-1).T[:, :, None]

    def attn_res(snapshots, x, w, eps):
        v = np.concatenate([snapshots, x[None]])
        scores = r((r(rms_norm(v, w, eps))).sum(-1))
        e = np.exp(scores - scores.max(0))
        return (r(e / e.sum(0))[..., None] * v).sum(0)

    def mhc_pre(x, fn, base, scale, norm_eps, eps, iters):
        n = x.shape[1]
        flat = x.reshape(len(x), -1)
        m = r(r(flat * r(1 / np.sqrt((flat * flat).mean(-1, keepdims=True) + F(norm_eps)))) @ r(fn).T)
        logits = r(r(m * np.repeat(scale, [n, n, n * n])) + base)
        pre, post, comb = np.split(logits, [n, 2 * n], -1)
        comb = r(np.exp(r(comb.reshape(-1, n, n) - comb.reshape(-1, n, n).max(-1, keepdims=True))))
        comb = r(r(comb / r(comb.sum(-1, keepdims=True))) + F(eps))
        for i in range(2 * iters - 1):
            comb = r(comb / r(comb.sum(1 + i % 2, keepdims=True) + F(eps)))
        y = (r(r(sigmoid(pre) + F(eps))[..., None] * x)).sum(1)
        return y, r(2 * sigmoid(post)), comb

    def mhc_post(y, x, post, comb):
        return r(r(post)[..., None] * y[:, None]) + r(np.swapaxes(r(comb), 1, 2) @ x)

    def index_pool(k, gate, ape):
        n, P = len(k) // len(ape), len(ape)
        k, logits = k[:n * P].reshape(n, P, -1), gate[:n * P].reshape(n, P, -1) + ape
        e = np.exp(logits - logits.max(1, keepdims=True))
        return r(r(e / e.sum(1, keepdims=True)) * k).sum(1)

    def index_scores(q, keys, weights, scale, pool):
        heads = r(weights[..., None] * np.maximum(r(np.einsum("thd,pd->thp", q, keys)), 0)).sum(1)
        complete = (np.arange(len(q)) + 1) // pool
        return np.where(np.arange(len(keys)) < complete[:, None], F(scale) * heads, -np.inf)

    def moe(x, ids, weights, w_gate, w_up, w_down, **shared):
        y = np.zeros(x.shape, F)
        for slot in range(ids.shape[1]):
            for t, e in enumerate(ids[:, slot]):
                h = r(silu(r(w_gate[e] @ x[t])) * r(w_up[e] @ x[t]))
                y[t] = r(y[t] + r(r(w_down[e] @ h) * r(weights[t, slot])))
        return y

    def short_conv(x, w, activation="silu", **history):
        padded = np.concatenate([np.zeros((w.shape[1] - 1, x.shape[1]), F), x])
        return silu(r(sum(padded[i:i + len(x)] * w[:, i] for i in range(w.shape[1])))), padded[len(x):]

    return dict(
        rms_norm=rms_norm, l2_norm=lambda x, eps=1e-6: x * r(1 / np.sqrt((x * x).sum(-1, keepdims=True) + F(eps))),
        swiglu=lambda gate, up: silu(gate) * up, sigmoid_gate=lambda x, gate: x * sigmoid(gate),
        softmax=lambda x: r(np.exp(x - x.max(-1, keepdims=True)))
        / r(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)),
        linear=lambda x, w, bias=None: x @ w.T if bias is None else r(x @ w.T) + bias,
        gated_rms_norm=lambda x, z, w, eps, activation="sigmoid": r(rms_norm(x, w, eps)) * sigmoid(z),
        attention=attention, attn_res=attn_res, mhc_post=mhc_post, mhc_pre=mhc_pre, moe=moe, short_conv=short_conv,
        index_pool=index_pool, index_scores=index_scores)[op]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("op", ["rms_norm", "l2_norm", "swiglu", "sigmoid_gate", "softmax", "linear", "gated_rms_norm",
                                "attention", "attn_res", "mhc_pre", "mhc_post", "moe", "short_conv", "index_pool",
                                "index_scores"])
def test_steps_in_the_type_are_within_the_bound(op, kind):
    fn = stored(_each_step(op, TYPES[kind]), TYPES[kind], spec(op).narrow_results)
    usual = [case.name for case in spec(op).cases if case.usual and case.group in ("lengths", "bias")]
    card = check_op(op, fn, dtype=kind, cases=usual)
    assert card, card
    assert 0.1 < max(r.share for r in card.rows) < (1 if kind == "bfloat16" else 2)  # float16 has few exponents


def test_every_op_with_narrow_arguments_has_a_bound_for_steps_or_needs_none():
    exact = {"embedding", "decay_gate", "decay_gate_backward", "route", "situ"}  # a gather; float32 inside
    for op in OPS:
        the = spec(op)
        x = next(x for c in the.cases for x in [c.make(the.kind)] if set(the.narrow) <= x.keys())
        ref = getattr(kl.reference, op)(**x)
        usual, more = (budget(op, ref, stored=s, **x) for s in (0.0, 2.0**-8))
        first = [b[0] if isinstance(b, tuple) else b for b in (usual, more)]
        assert (op in exact) == np.array_equal(*first), f"{op}: its budget takes `stored`, or it is in `exact` here"
    assert set(OPS) <= set(names())


# ---- what cannot be --------------------------------------------------------------------------------


def test_values_that_the_type_cannot_hold_are_not_offered():
    card = check(planted.kernel(), "float16", cases=["keys*", "l2_norm", "plain"])
    assert card and card.not_offered
    assert all(card[n].detail in ("values beyond float16", "no argument 'out'") for n in card.not_offered), card


def test_errors_are_sentences():
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be of float32, bfloat16, float16"):
        check_op("linear", kl.ops.linear, dtype="int8")
    with pytest.raises(ValueError, match="dtype is 'bfloat16'; decay_cumsum is computed in float32 alone"):
        check_op("decay_cumsum", kl.ops.decay_cumsum, dtype="bfloat16")
    assert check_op("linear", kl.ops.linear, dtype=np.float32, cases="plain").dtype == "float32"


def test_a_convention_whose_caller_scales_gets_the_type():
    seen = set()

    def kernel(q, k, v, g, beta, state):
        seen.update((q.dtype, k.dtype, v.dtype, g.dtype))
        wide = functools.partial(np.asarray, dtype=F)
        o, S = planted.mlx(wide(q), wide(k), wide(v), g, beta, state)
        return o.astype(ml_dtypes.bfloat16), S

    card = check_op("delta_rule", kernel, conventions="mlx", arrays="numpy", dtype="bfloat16",
                    cases=["plain", "carried", "widths"])
    assert card and seen == {np.dtype(ml_dtypes.bfloat16), np.dtype(F)}, card
