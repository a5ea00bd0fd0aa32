"""Every law by its name on the packaged and both golden models, and that a broken one is seen."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import DATA, GOLDEN_CASES

import kimi_linear as kl
from kimi_linear.cli import main
from kimi_linear.laws import LAWS, laws

CASES = ["tiny", *GOLDEN_CASES]
_models = {}


def open_model(case):
    if case not in _models:
        _models[case] = kl.Model.tiny() if case == "tiny" else kl.Model.from_pretrained(DATA / "golden" / case)
    return _models[case]


def ids(model, T, seed=0):
    return np.random.default_rng(seed).integers(3, model.config.vocab_size, T).astype(np.int32)


def arrays(state):
    return {name: value.tobytes() for name, value in state.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("law", LAWS)
def test_law(law, case):
    report = laws(open_model(case), law)
    assert report.ok, str(report)


def test_no_law_is_refused():
    with pytest.raises(ValueError, match="names is empty; it must name a law or more"):
        laws(open_model("tiny"), [])


@pytest.mark.parametrize("law", [name for name in LAWS if name not in ("inputs_unchanged", "nothing_outside_outputs")])
def test_a_model_that_breaks_a_law_is_seen(law, monkeypatch):
    """Every other call adds a little noise: each law that compares two runs names a difference."""
    model = open_model("kimi-a")
    own, calls = model.forward, []

    def noisy(tokens, **options):
        out = own(tokens, **options)
        calls.append(1)
        logits = out[0] if isinstance(out, tuple) else out
        for part in logits if isinstance(logits, list) else [logits]:
            if part is not None:
                part += np.float32(1e-3 * len(calls))
        return out

    monkeypatch.setattr(model, "forward", noisy)
    report = laws(model, law)
    assert not report.ok
    assert "logits" in report.rows[0].difference and law in report.verdict


def test_two_python_threads_share_a_model():
    model = open_model("kimi-b")
    tokens = [ids(model, 130, seed=n) for n in range(2)]
    want = [(s := model.new_state(), model.forward(t, state=s).tobytes(), arrays(s)) for t in tokens]
    got = [None, None]

    def read(n):
        results = set()
        for _ in range(6):
            state = model.new_state()
            logits = model.forward(tokens[n], state=state)
            results.add((logits.tobytes(), tuple(arrays(state).items())))
        got[n] = results

    workers = [threading.Thread(target=read, args=(n,)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for n in range(2):
        assert got[n] == {(want[n][1], tuple(want[n][2].items()))}


def test_a_state_saved_here_goes_on_in_another_process(tmp_path):
    model = open_model("tiny")
    tokens = ids(model, 100)
    state = model.new_state()
    model.forward(tokens[:70], state=state, logits="none")
    state.save(tmp_path / "state")
    want = model.forward(tokens[70:], state=state)
    np.save(tmp_path / "rest.npy", tokens[70:])
    code = ("import sys, numpy as np, kimi_linear as kl; m = kl.Model.tiny();"
            "s = m.load_state(sys.argv[1] + '/state');"
            "np.save(sys.argv[1] + '/logits.npy', m.forward(np.load(sys.argv[1] + '/rest.npy'), state=s))")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert np.load(tmp_path / "logits.npy").tobytes() == want.tobytes()


def test_names_and_report():
    model = open_model("kimi-a")
    seen = []
    report = laws(model, ["split_at_64", "inputs_unchanged"], progress=lambda *moved: seen.append(moved))
    assert report and [law.name for law in report.rows] == ["split_at_64", "inputs_unchanged"]
    assert seen == [(0, 2, "split_at_64"), (1, 2, "inputs_unchanged"), (2, 2, "")]
    assert report.verdict == "ok: all 2 laws hold on kimi-a" and report.verdict in str(report)
    with pytest.raises(ValueError, match="names is 'faster'; it must be one of 'batch_is_alone'"):
        laws(model, "faster")


def test_command(capsys):
    folder = str(DATA / "golden" / "kimi-a")
    assert main(["laws", folder, "--only", "split_at_64"]) == 0
    assert capsys.readouterr().out.endswith("ok: all 1 laws hold on kimi-a\n")
    assert main(["laws", "--only", "faster"]) == 2
    assert "--only is 'faster'" in capsys.readouterr().err
