"""numpy.ma is refused wherever arrays come in: what a mask hides would count."""

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.testing import spec, specs
from kimi_linear.testing.spec import OPS


def masked(a):
    return np.ma.masked_array(a, mask=np.zeros(np.shape(a), bool))


def arguments():
    """(op, inputs, name) of each array that an op takes in its plain case."""
    for op in specs():
        inputs = spec(op).cases[0].make(spec(op).kind)
        inputs = {n: inputs.get(n) for n in spec(op).required} | inputs
        for name, x in inputs.items():
            if isinstance(x, np.ndarray):
                yield pytest.param(op, inputs, name, id=f"{op}-{name}")


@pytest.mark.parametrize("op, inputs, name", list(arguments()))
def test_an_op_and_its_reference_refuse_them(op, inputs, name):
    wrong = {**inputs, name: masked(inputs[name])}
    if op in OPS:
        with pytest.raises(TypeError, match=rf"^{name} is a masked array, whose mask .*; give \.filled\(value\)"):
            getattr(kl.ops, op)(**wrong)
    with pytest.raises(TypeError, match="is a masked array"):
        getattr(kl.reference, op)(**wrong)


MODEL = kl.Model.tiny()
TRACE = MODEL.trace([1, 2, 3])
TAP = "layers.2.kda.q_proj"
X = np.ones((2, 4), np.float32)
WRONG = kl.Trace({**TRACE, TAP: masked(TRACE[TAP])}, TRACE.meta)


@pytest.mark.parametrize("call, name", [
    (lambda: kl.ops.softmax(X, out=masked(X)), "out"),
    (lambda: kl.ops.sample(X, seed=masked([1, 2])), "seed"),
    (lambda: kl.Quantized(masked(np.zeros((2, 34), np.uint8)), "Q8_0", (2, 32)), "data"),
    (lambda: kl.pack([X, masked(X)]), r"arrays\[1\]"),
    (lambda: kl.diff.compare(masked(X), X), "actual"),
    (lambda: kl.testing.assert_close(X, masked(X)), "desired"),
    (lambda: kl.diff.traces(WRONG, TRACE), rf"a\['{TAP}'\]"),
    (lambda: kl.diff.traces(TRACE, WRONG, model=MODEL), rf"b\['{TAP}'\]"),
    (lambda: kl.diff.blame(MODEL, WRONG), TAP),
    (lambda: kl.diff.align(masked(X), X), "theirs"),
    (lambda: kl.diff.bisect(lambda *_: {"embed": masked(X)}, lambda *_: {"embed": X}, [1, 2]), "run_a: embed"),
    (lambda: kl.diff.bisect(lambda *_: {"embed": X}, lambda *_: {"embed": masked(X)}, [1, 2]), "run_b: embed"),
    (lambda: MODEL.forward(masked([1, 2])), "tokens"),
    (lambda: MODEL.forward([1, 2, 3], edit={TAP: WRONG[TAP]}), rf"edit\['{TAP}'\]"),
    (lambda: MODEL.reference().forward([1, 2, 3], edit={TAP: WRONG[TAP]}), f"edit of {TAP}"),
])
def test_so_do_traces_and_models(call, name):
    with pytest.raises(TypeError, match=f"{name} is a masked array"):
        call()
