"""A pasted llama-eval-callback log beside a trace: written here in its format, read back, and compared."""

import re

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.adapters import llama_log

IDS = np.arange(3, 14)


@pytest.fixture(scope="module")
def model():
    return kl.Model.tiny()


@pytest.fixture(scope="module")
def ours(model):
    return model.trace(IDS, states=True)


def printed(name, x, op="MUL", old=False):
    """One tensor as common/debug.cpp prints it (old: as the first versions did), `x` in the order of ne reversed."""
    ne = ", ".join(str(n) for n in reversed(x.shape))
    head = "ggml_debug" if old else "common_debug_cb_eval"
    lines = [f"{head}: {name:>24} = (f32) {op:>10}(src{{{ne}}}, }}) = {{{ne}}}"]
    total, n = 0.0, 3

    def ends(size):
        """Indices that are printed, None for the dots."""
        return list(range(size)) if size <= 2 * n else [*range(n), None, *range(size - n, size)]

    for block in x:
        lines.append("    [")
        for i2 in ends(x.shape[1]):
            if i2 is None:
                lines.append("        ..., ")
                continue
            lines.append("        [")
            for i1 in ends(x.shape[2]):
                if i1 is None:
                    lines.append("            ..., ")
                    continue
                values = ["   ..." if i0 is None else f"{block[i2, i1, i0]:12.4f}" for i0 in ends(x.shape[3])]
                total += sum(block[i2, i1, i0] for i0 in ends(x.shape[3]) if i0 is not None)
                lines.append(f"            [{', '.join(values)}  ],")
            lines.append("        ],")
        lines.append("    ]")
        lines.append(f"    sum = {total if old else x.astype(np.float64).sum():f}")
    return lines


def names_of(model):
    """(name in the log, op, shape reversed) -> taps, as the graph has them, of a prompt of one sequence."""
    T, c = len(IDS), model.config
    found = []
    for (name, layer), taps in llama_log.taps_of(c).items():
        if name in ("inp_embd", "ffn_gate_par"):
            continue
        heads = {"kda_g1": (1, T, 4, 32), "attn_output": (1, T, 4, 32), "new_state": (1, 4, 32, 32),
                 "kda_beta": (1, T, 4, 1),
                 "mla_Q": (1, T, 4, 48), "Kcur": (1, T, 1, 80), "kv_cmpr_reshape": (1, T, 1, 64)}
        found.append((name if layer is None else f"{name}-{layer}", taps, heads.get(name)))
    return found


def log_of(model, trace, change=None, old=False, last=()):
    """The whole log; `change` maps a name to a function of its array, `last` are names of which one token is there."""
    lines = ["llama_context: n_ctx = 512", "0.01.123.456 I some other line", "ggml_debug: not a tensor"]
    for name, taps, shape in names_of(model):
        x = np.concatenate([trace[t].reshape(len(trace[t]), -1) for t in taps], -1) if len(taps) > 1 else trace[taps[0]]
        if name.startswith("new_state"):
            x = x.swapaxes(-1, -2)
        x = (change or {}).get(name, lambda x: x)(np.array(x))
        x = x[-1:] if name in last else x
        x = x.reshape(shape if shape and x.size == np.prod(shape) else (1, 1, len(x), -1))
        lines += printed(name, x, old=old)
        lines += printed(f"{name} (view)", x[..., :2], op="VIEW", old=old)
    return "\n".join(lines)


def test_parse(model, ours):
    tensors = llama_log.parse(log_of(model, ours))
    by_name = {(t.name, t.layer): t for t in tensors if not t.name.endswith("(view)")}
    g = by_name["kda_g1", 0]
    assert g.shape == (1, 11, 4, 32) and (g.op, g.dtype, g.run) == ("MUL", "f32", 0)
    assert len(g.values) == 6 * 4 * 6, "three of each end, and all four heads"
    for (_, i2, i1, i0), value in g.values.items():
        assert abs(value - ours["layers.0.kda.g"][i2, i1, i0]) <= 0.51e-4
    assert {i[1] for i in g.values} == {0, 1, 2, 8, 9, 10} and {i[3] for i in g.values} == {0, 1, 2, 29, 30, 31}
    assert abs(g.sum - ours["layers.0.kda.g"].sum()) < 1e-2
    assert by_name["g1 f_b(f_a(cur))", 0].shape == (1, 1, 11, 128) and by_name["result_output", None].layer is None


@pytest.mark.parametrize("old", [False, True])
def test_a_right_log(model, ours, old):
    report = llama_log.compare(log_of(model, ours, old=old), ours, model=model)
    assert report.ok, str(report)
    assert len(report.rows) == len({" | ".join(t) for _, t, _ in names_of(model)})
    assert re.match(r"[\d,]+ of [\d,]+ values of these taps are in the log: corners and sums are", report.notes[0])
    assert any("tensors of the log have no tap" in n for n in report.notes)
    assert "layers.0.kda.q" in report.only_a, "what the log does not have is told"


@pytest.mark.parametrize("name, tap, change", [
    ("kda_g1-2", "layers.2.kda.g", lambda x: x * np.float32(1.02)),
    ("new_state-1", "layers.1.kda.state", lambda x: x.swapaxes(-1, -2)),
    ("ffn_out-3", "layers.3.moe.out", lambda x: np.where(np.arange(len(x))[:, None] == 9, 0, x)),
    ("Kcur-3", "layers.3.mla.latent | layers.3.mla.k_shared", lambda x: x[:, ::-1]),
    ("result_norm", "norm", lambda x: x * np.nan),
])
def test_a_wrong_tensor_is_named(model, ours, name, tap, change):
    report = llama_log.compare(log_of(model, ours, {name: change}), ours, model=model)
    assert not report.ok and report.first.tap == tap, str(report)
    assert [r.tap for r in report.rows if not r.ok] == [tap]
    assert report.first.token == (9 if "ffn_out" in name else 0)


def test_what_corners_do_not_show_a_sum_does(model, ours):
    def spoil(x):
        x[5, 100] += 30
        return x

    report = llama_log.compare(log_of(model, ours, {"l_out-2": spoil}), ours, model=model)
    assert report.first.tap == "layers.2.out" and "the sum is off" in report.verdict
    assert any("layers.2.out: the corners agree and the sum does not" in n for n in report.notes)
    assert "the sum is off" in str(report) and "the sum is off" in report.html()  # an error without a place


@pytest.mark.parametrize("case", ["qwen-a", "qwen35-a"])
def test_a_log_of_qwen(case, golden_dir):
    """Several nodes of one name are told by their ops; one value a head lies by key head."""
    model = kl.Model.from_pretrained(golden_dir / case)
    trace, lines = model.trace(IDS, states=True), []
    for (name, layer), taps in llama_log.taps_of(model.config).items():
        parts = [trace[t].reshape(len(trace[t]), -1) for t in taps]
        x = trace[taps[0]].swapaxes(-1, -2) if name == "new_state" else np.concatenate(parts, -1)
        x = x.reshape(1, len(IDS), 2, -1) if name in ("a", "b") else x.reshape((1,) * (4 - x.ndim) + x.shape)
        op, _, own = name.rpartition(" ")
        lines += printed(own if layer is None else f"{own}-{layer}", x, op=op or "MUL")
    report = llama_log.compare("\n".join(lines), trace, model=model)
    assert report.ok and len(report.rows) > 90, str(report)
    assert {"layers.3.attn.k", "layers.3.attn.k_proj", "layers.1.gdn.state", "layers.0.gdn.b"} <= {
        r.tap for r in report.rows}


def test_last_token_alone(model, ours):
    """The last layer goes on with the tokens that are asked for: they are taken as the last."""
    report = llama_log.compare(log_of(model, ours, last=("l_out-5", "result_norm", "result_output")), ours, model=model)
    assert report.ok and any("logits: the log has 1 of 11 tokens, taken as the last" in n for n in report.notes)


def test_several_evaluations(model, ours):
    more = model.trace(IDS[:2] + 40)
    text = log_of(model, ours) + "\n" + log_of(model, {**more, **{n: x for n, x in ours.items() if n not in more}})
    assert {t.run for t in llama_log.parse(text)} == {0, 1}
    assert llama_log.compare(text, ours, model=model, run=0).ok
    report = llama_log.compare(text, more, model=model, run=1)
    assert report.ok, str(report)
    with pytest.raises(ValueError, match="run is 2; the log has no tensor of it"):
        llama_log.compare(text, ours, model=model, run=2)


def test_partial_and_bad_input(model, ours):
    text = log_of(model, ours)
    part = ours.filter(["layers.1", "logits"])
    report = llama_log.compare(text, part, model=model)
    assert report.ok and {r.tap for r in report.rows} < set(part)
    assert any(n.startswith("not in the trace: embed") for n in report.notes)
    cut = llama_log.compare(text[:len(text) // 3], ours, model=model)
    assert cut.ok and len(cut.rows) < len(names_of(model))
    with pytest.raises(ValueError, match=r"embed: \[1, 1, 11, 256\] in the log and \[5, 256\] in the trace; left out: "
                                         "are these the same tokens?"):
        llama_log.compare(text, model.trace(IDS[:5]), model=model)
    with pytest.raises(ValueError, match="the log has no tensor: its lines must be like"):
        llama_log.parse("main: build = 1\nhello")
    with pytest.raises(ValueError, match="no tensor of the log can be laid beside the trace: it has Kcur"):
        llama_log.compare(text, {"layers.9.out": np.zeros(3)}, model=model)


@pytest.mark.parametrize("at, sum_alone", [((0, 0), False), ((5, 100), True)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_in_one_alone(model, ours, at, sum_alone, value):
    """In the corners or between them, ours or theirs: it is never within the threshold."""
    broken = {n: np.array(x) for n, x in ours.items()}
    broken["embed"][at] = value
    text = log_of(model, ours)
    report = llama_log.compare(text, broken, model=model)
    assert not report.ok and report.first.tap == "embed", str(report)
    assert ("the sum is off" in report.verdict) == sum_alone
    there = llama_log.compare(log_of(model, broken), ours, model=model)
    assert not there.ok and there.first.tap == "embed", str(there)
    both = llama_log.compare(log_of(model, broken), broken, model=model)
    assert both.ok, str(both)
    assert sum_alone or both.verdict.endswith("embed is not finite in both")


def test_a_wrong_value_beside_one_that_is_not_finite_is_found(model, ours):
    broken = {n: np.array(x) for n, x in ours.items()}
    broken["embed"][0, 0] = np.nan
    off = {"model.input_embed": lambda x: x * np.float32(1.5), "model.embed_tokens": lambda x: x * np.float32(1.5)}
    report = llama_log.compare(log_of(model, broken, off), broken, model=model)
    assert report.verdict.startswith("DIVERGES at embed, token 0: a value is off by "), report.verdict
