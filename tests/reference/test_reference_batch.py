"""A batch axis in the reference, the budgets and `compare`, as in `kl.ops`: B sequences, each as it is alone."""

import numpy as np
import pytest

import kimi_linear as kl

RNG = np.random.default_rng(0)
B, T, S = 2, 5, 7
WEIGHTS = ("w", "rate", "dt_bias", "bias", "w_uk", "w_uv", "w_gate", "w_up", "w_down")  # of all sequences


def normal(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def delta(gate):
    g = {"channel": -np.abs(normal(B, T, 4, 8)), "head": -np.abs(normal(B, T, 4)), "none": None}[gate]
    return dict(q=0.3 * normal(B, T, 2, 8), k=0.3 * normal(B, T, 2, 8), v=normal(B, T, 4, 6), g=g,
                beta=np.abs(normal(B, T, 4)).clip(0, 1))


def halves():
    given = delta("channel")
    _, P, _, W, U = kl.ops.delta_rule_intra(**given, chunk=4)
    return {name: given[name] for name in "qkg"} | dict(P=P, W=W, U=U)


def chosen():
    ids, weights = kl.ops.route(normal(B, T, 8), k=3)
    return dict(x=normal(B, T, 12), ids=ids, weights=weights, w_gate=normal(8, 5, 12), w_up=normal(8, 5, 12),
                w_down=normal(8, 12, 5), shared=normal(B, T, 12))


def rows():
    """For each query two of the positions that it sees, and none."""
    first = np.random.default_rng(3).integers(0, S - T, (B, T, 1))
    return np.concatenate([first, first + 1, np.full((B, T, 1), -1)], axis=-1).astype(np.int32)


CASES = {
    "delta_rule": [(delta("channel"), dict(form="recurrent")), (delta("none"), dict(form="chunked")),
                   (delta("head") | dict(initial_state=normal(B, 4, 8, 6)), dict(checkpoints=2))],
    "delta_rule_intra": [(delta("channel"), dict(chunk=4))],
    "delta_rule_inter": [(halves(), dict(chunk=4))],
    "short_conv": [(dict(x=normal(B, T, 6), w=normal(6, 4)), {}),
                   (dict(x=normal(B, T, 6), w=normal(6, 4), history=normal(B, 3, 6)), dict(activation=None))],
    "decay_gate": [(dict(f=normal(B, T, 3, 4), rate=np.abs(normal(3)), dt_bias=normal(3, 4)), {}),
                   (dict(f=normal(B, T, 3), rate=np.abs(normal(3)), dt_bias=normal(3)), dict(lower_bound=-5.0)),
                   (dict(f=normal(B, T, 3, 1), rate=np.abs(normal(3)), dt_bias=normal(3, 1)), {}),
                   (dict(f=normal(B, 1, 3, 4), rate=np.abs(normal(3)), dt_bias=normal(3, 4)), {})],
    "latent_attention": [(dict(q=normal(B, T, 3, 12), latent=normal(B, S, 16), k_shared=normal(B, S, 4),
                               w_uk=normal(3, 8, 16), w_uv=normal(3, 6, 16)), dict(scale=0.3)),
                         (dict(q=normal(B, T, 3, 12), latent=normal(B, S, 16), k_shared=normal(B, S, 4),
                               w_uk=normal(3, 8, 16), w_uv=normal(3, 6, 16), select=rows()), dict(scale=0.3))],
    "attention": [(dict(q=normal(B, T, 4, 8), k=normal(B, S, 2, 8), v=normal(B, S, 2, 6)), dict(scale=0.3))],
    "route": [(dict(scores=normal(B, T, 8), bias=normal(8)), dict(k=3, groups=4, top_groups=2))],
    "moe": [(chosen(), {})],
}


def results(x):
    return x if isinstance(x, tuple) else (x,)


@pytest.mark.parametrize("op, given, options", [(op, *case) for op, cases in CASES.items() for case in cases])
def test_the_reference_takes_it(op, given, options):
    f = getattr(kl.reference, op)
    whole = results(f(**given, **options))
    for b in range(B):
        alone = {name: x if name in WEIGHTS or x is None else x[b] for name, x in given.items()}
        for i, (x, y) in enumerate(zip(whole, results(f(**alone, **options)), strict=True)):
            x = x.reshape(B, -1, *x.shape[1:]) if "checkpoints" in options and i == 2 else x
            np.testing.assert_allclose(x[b], y, rtol=1e-13)
    ours = getattr(kl.ops, op)(**given, **options)
    found = kl.diff.compare(ours, whole if len(whole) > 1 else whole[0], op=op, inputs=given | options)
    assert found, found
    assert [np.shape(x) for x in results(ours)] == [np.shape(x) for x in whole]


@pytest.mark.parametrize("op, given", [
    ("route", dict(scores=normal(8), k=2)),
    ("moe", {name: x[0, 0] if name in ("x", "ids", "weights", "shared") else x for name, x in chosen().items()}),
    ("moe", dict(chosen(), ids=chosen()["ids"].tolist())),
])
def test_rows_of_any_axes(op, given):
    ours, ref = results(getattr(kl.ops, op)(**given)), results(getattr(kl.reference, op)(**given))
    for x, y in zip(ours, ref, strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_no_sequence_at_all():
    given = {name: x if name in WEIGHTS else x[:0] for name, x in delta("channel").items()}
    o, state = kl.reference.delta_rule(**given)
    assert o.shape == (0, T, 4, 6) and state.shape == (0, 4, 8, 6)


def test_offsets_and_a_batch_axis_are_refused():
    with pytest.raises(ValueError, match="x has a batch axis and offsets are given; it must be one of them"):
        kl.reference.short_conv(normal(B, T, 6), normal(6, 4), offsets=[0, B * T])


def test_rows_of_logits_with_a_setting_each():
    logits, options = normal(T, 50), dict(seed=3, position=np.arange(T), temperature=np.linspace(0, 2, T))
    np.testing.assert_array_equal(kl.reference.sample(logits, **options), kl.ops.sample(logits, **options))
