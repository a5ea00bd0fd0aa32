"""What every op's test uses: all instruction sets and thread counts, guarded outputs, the judged error."""

import numpy as np

import kimi_linear as kl
from kimi_linear.diff.budgets import budget

# one product of these is another's than that of the table they are made from: tests/quant, tests/c/test_isa.c
DERIVED = ("avxvnni", "avx512bf16", "neon_dotprod")
CONTEXTS = [kl.Context(isa=isa, threads=n) for isa in kl.isa_list() if isa not in DERIVED for n in (1, 3)]


def normal(*shape, scale=1.0, seed=0):
    """float32 numbers of a bell curve of that width; the same for the same shape and seed."""
    return (scale * np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(np.float32)


def everywhere(run, contexts=CONTEXTS):
    """`run(ctx)` on every instruction set and 1 and 3 threads (or on `contexts`): one result, the same bytes from all.

    `run` gives an array or a tuple of arrays.
    """
    first = None
    for ctx in contexts:
        got = run(ctx)
        got = got if isinstance(got, tuple) else (got,)
        if first is None:
            first = got
        for a, b in zip(first, got, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            same = a.tobytes() == b.tobytes() or (np.isnan(a).any() and np.array_equal(a, b, equal_nan=True))
            assert same, f"{ctx} differs from {contexts[0]} at {np.argwhere(a != b)[:3].tolist()}"
    return first if len(first) > 1 else first[0]


def judge(op, got, ref, **inputs):
    """AssertionError when an element is further from `ref` than the op's budget; the message gives the worst."""
    bounds = budget(op, ref, **inputs)
    for i, (g, r, bound) in enumerate(zip(*map(_tuple, (got, ref, bounds)), strict=True)):
        g = np.asarray(g, np.float64)
        r = np.asarray(r, np.float64)
        assert g.shape == r.shape, f"{op}[{i}]: shape {g.shape}, reference {r.shape}"
        bound = np.broadcast_to(np.asarray(bound, np.float64), r.shape)
        alike = (g == r) | (np.isnan(g) & np.isnan(r))
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(alike, 0.0, np.abs(g - r) / bound)
        ratio = np.where(np.isnan(ratio), np.inf, ratio)
        if ratio.size and ratio.max() > 1:
            at = tuple(int(j) for j in np.unravel_index(ratio.argmax(), ratio.shape))
            raise AssertionError(
                f"{op}[{i}]: error at {at} is {ratio[at]:.3g} times its budget {bound[at]:.3g}: "
                f"got {g[at]!r}, reference {r[at]!r}"
            )


def guarded(shape, dtype=np.float32, fill=np.nan, guard=64):
    """An output filled with NaN (or `fill`) inside a larger array; returns (out, check): check() asserts that
    nothing past its end or before its start was written."""
    size = int(np.prod(shape))
    whole = np.full(size + 2 * guard, fill, dtype)
    whole[:guard] = whole[size + guard:] = 7
    out = whole[guard: size + guard].reshape(shape)

    def check():
        assert (whole[:guard] == 7).all() and (whole[size + guard:] == 7).all(), "written outside the output"

    return out, check


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)
