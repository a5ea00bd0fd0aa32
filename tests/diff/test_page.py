"""Pages, notebooks' tables and plots: what is on them, what they never have, and hostile names."""

import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.diff._grid import Line, by_layer, by_tap, grid_of
from kimi_linear.diff._opened import axes_of, open_array, open_ids

HOSTILE = "<img src=x onerror=alert(1)>'\"&</title></style><script>alert(2)</script>"
VOID = {"meta", "link", "img"}


class Tree(HTMLParser):
    """Elements that are open; `count` of each, `texts` by element."""

    def __init__(self, page):
        super().__init__()
        self.open, self.count, self.texts, self.attributes = [], {}, {}, []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += [name for name, _ in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


@pytest.fixture(scope="module")
def model(golden_dir):
    return kl.Model.from_pretrained(golden_dir / "kimi-a")


@pytest.fixture(scope="module")
def runs(model):
    """(a run with a fault in layer 2, the right one)."""
    tokens = list(range(1, 20))
    [right] = kl.faults.run(model, tokens)
    [wrong] = kl.faults.run(model, tokens, plant={"layers.2.kda.beta": "beta_doubled"})
    return wrong, right


@pytest.fixture(scope="module")
def results(model, runs):
    wrong, right = runs
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((7, 3, 5)), np.ones(5)
    y = kl.reference.rms_norm(x, w, eps=1e-6)
    inputs = {"x": x, "w": w, "eps": 1e-6}
    return {
        "traces": kl.diff.traces(wrong, right), "parts": kl.diff.traces(wrong, right, model=model),
        "same": kl.diff.traces(right, right),
        "blame": kl.diff.blame(model, wrong), "right": kl.diff.blame(model, right),
        "budget": kl.diff.compare(y.astype(np.float32), y, op="rms_norm", inputs=inputs),
        "gates": kl.diff.compare(y * 1.01, y), "several": kl.diff.compare((y, y * 2), (y, y)),
        "ids": kl.diff.compare(np.array([[1, 2]]), np.array([[1, 3]])),
        "empty": kl.diff.compare(np.zeros((0, 3)), np.zeros((0, 3))), "one": kl.diff.compare(np.ones(3), np.zeros(3)),
        "bisect": kl.diff.bisect(model.reference(), model, [1, 2, 3]),
    }


NAMES = ("traces", "parts", "same", "blame", "right", "budget", "gates", "several", "ids", "empty", "one", "bisect")


@pytest.mark.parametrize("name", NAMES)
def test_page_is_whole_and_needs_nothing(results, name):
    result = results[name]
    page = result.html()
    tree = Tree(page)
    assert tree.open == [] and tree.count["html"] == tree.count["body"] == tree.count["h1"] == 1
    assert "script" not in tree.count and not any(a.startswith("on") for a in tree.attributes)
    assert "://" not in page and "url(" not in page and "@import" not in page and len(page) < 2_000_000
    assert "default-src 'none'" in page and "prefers-color-scheme:dark" in page
    assert result.verdict in tree.texts["p"], "the answer, in one sentence"
    assert page.index("class='verdict") < page.index("<table"), "first"
    assert Tree(result._repr_html_()).open == [] and result.verdict in unescape(result._repr_html_())


def cells(page, label):
    """Titles of the cells of a heat map."""
    svg = re.search(rf"<svg[^>]*aria-label='{label}'.*?</svg>", page, re.S)[0]
    return re.findall(r"<rect x='(\d+)' y='(\d+)'[^>]*class='h(\d)'><title>([^<]*)</title>", svg)


def test_heat_map_of_added_error(results, model):
    """One cell for each layer and token; warm in the one layer whose op is wrong, although all behind it differ."""
    page = results["parts"].html()
    found = cells(page, "added error of layers and tokens")
    layers = len(model.config.layers) + 2
    assert len(found) == layers * 19
    warm = {int(y) for _, y, level, _ in found if int(level) >= 5}
    assert warm == {3}, "embed, layer 0, layer 1, layer 2"
    assert all(title.endswith(" kda.beta") for _, y, _, title in found if y == "3")
    assert {int(y) for _, y, level, _ in cells(results["traces"].html(), "error of layers and tokens")
            if int(level) >= 5} == set(range(3, layers))
    blamed = cells(results["blame"].html(), "error over noise of layers and tokens")
    assert len(blamed) == layers * 19 and {int(y) for _, y, level, _ in blamed if int(level) >= 5} == {3}
    assert not any(int(level) >= 5 for _, _, level, _ in cells(results["right"].html(), "error over noise.*?"))


def test_sections_in_the_order_of_the_questions(results):
    for name, titles in {
        "parts": ("Added error by layer and token", "Inside layer 2", "The first tap that diverges: layers.2.kda.beta",
                  "Error by depth", "Every tap"),
        "blame": ("Added error by layer and token", "Inside layer 2", "What it is",
                  "layers.2.kda.beta: theirs beside float64 on their inputs", "Worst op by depth", "Every op"),
    }.items():
        page = results[name].html()
        assert [t for t in re.findall("<h2>([^<]*)</h2>", page) if not t.startswith("Left out")] == list(titles)
    assert "beta_doubled" in page and "Worst elements" in page
    assert "<h2>Error by depth</h2><p class='soft'>The rms error of a tap," in results["parts"].html()
    assert re.search(r"<td>token \d+, channel \d+</td><td>[\d.e-]+</td>", results["parts"].html())


def test_table_of_taps_in_order_with_verdicts(results, runs):
    page = results["parts"].html()
    rows = re.findall(r"<tr( class='no')?><td>([\w.]+)</td><td>(ok|ADDS|inherited|DIVERGES)</td>", page)
    assert [tap for _, tap, _ in rows] == list(runs[0])
    verdicts = {tap: v for _, tap, v in rows}
    assert verdicts["layers.1.out"] == "ok" and verdicts["layers.2.kda.beta"] == "ADDS"
    assert verdicts["layers.2.kda.o"] == "inherited" and list(verdicts.values()).count("ADDS") == 1
    assert all(bool(mark) == (v != "ok") for mark, _, v in rows)


def test_hostile_names(tmp_path):
    taps = {HOSTILE: np.zeros((3, 2)), "layers.0." + HOSTILE: np.zeros((3, 2)), "\udcff\x00": np.zeros((3, 2))}
    other = {name: x + 1 for name, x in taps.items()}
    a, b = (kl.Trace(x, {"source": HOSTILE, "model": HOSTILE}) for x in (taps, other))
    report = kl.diff.traces(a, b)
    for page in (report.html(), report._repr_html_(), kl.diff.compare(np.ones((2, 2)), np.zeros((2, 2)),
                                                                      axes=("token", HOSTILE)).html()):
        tree = Tree(page)
        assert tree.open == [] and not {"script", "img"} & set(tree.count)
        assert not any(a.startswith("on") for a in tree.attributes)
    report.html(tmp_path / "page.html")
    assert "&lt;script&gt;" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_written_or_returned(results, tmp_path):
    assert results["same"].html(tmp_path / "page.html") is None
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == results["same"].html()
    with pytest.raises(FileNotFoundError):
        results["same"].html(tmp_path / "no" / "page.html")


def test_not_finite_and_experts(model, runs):
    right = runs[1]
    theirs = {tap: np.array(x) for tap, x in right.items()}
    theirs["layers.4.kda.o"][2, 1, 3] = np.nan
    theirs["layers.2.moe.ids"][5] = (theirs["layers.2.moe.ids"][5] + 1) % 8
    report = kl.diff.traces(kl.Trace(theirs, right.meta), right, model=model)
    page = report.html()
    assert "The first tap that diverges: layers.2.moe.ids" in page and "in place of" in page
    grid = report.grid("layer 4")
    assert grid.levels()[grid.labels.index("kda.o")].tolist() == [0, 0, 9, *[0] * 16]
    assert "not finite kda.o" in page and "not finite" in kl.diff.compare(theirs["layers.4.kda.o"],
                                                                         right["layers.4.kda.o"]).html()
    assert kl.diff.blame(model, kl.Trace(theirs, right.meta)).html()


def test_sequences_and_calls_are_told(model):
    calls = kl.faults.run(model, [[[1, 2, 3], [4, 5]], [[6], [7, 8]]], plant={"layers.1.kda.g": "dt_bias_twice"})
    found = kl.diff.blame(model, calls)
    assert found.columns[2:5] == ["call 0, sequence 0, token 2", "call 1, sequence 0, token 0",
                                  "call 0, sequence 1, token 0"]
    assert found.cuts == (3, 4, 6) and "call 1, sequence 0, token 0: " in found.html()
    report = kl.diff.traces(calls[0], calls[0])
    assert report.columns[2:4] == ["sequence 0, token 2", "sequence 1, token 0"] and report.cuts == (3,)


# ---- the parts ----


def test_columns_are_joined_to_the_worst():
    values = np.zeros(1000)
    values[[17, 999]] = 3.0, np.inf
    grid = by_tap([Line("layers.3.out", values, 1.0)], [f"token {t}" for t in range(1000)], cuts=(500,)).at_most(300)
    assert grid.values.shape == (1, 250) and grid.cuts == (125,)
    assert grid.values[0, 4] == 3 and np.isinf(grid.values[0, -1]) and grid.columns[4] == "token 16 to 19"
    assert grid.levels()[0, [0, 4, -1]].tolist() == [0, 5, 9]


def test_layers_show_their_worst_tap():
    lines = [Line("embed", np.zeros(2), 1.0), Line("layers.0.kda.o", np.array([0.5, 2]), 1.0),
             Line("layers.0.out", np.array([0.9, 1.9]), 1.0), Line("logits", np.ones(2), 0.0)]
    grid = by_layer(lines, ["token 0", "token 1"])
    assert grid.labels == ["embed", "layer 0", "head"]
    assert grid.names[1] == ["out", "kda.o"] and grid.values[1].tolist() == [0.9, 2]
    assert grid.levels()[1].tolist() == [4, 5] and grid.levels()[2].tolist() == [8, 8]


def test_opened():
    d = np.ones((10, 4, 3))
    a = d.copy()
    a[3, 2, 1], a[:, 2, 0] = 9, 1 + 2.0**-20
    x = open_array("layers.0.kda.o", a, d)
    assert x.worst[0][:3] == ("token 3, head 2, channel 1", "9", "1")
    assert [axis.text for axis in x.axes] == [
        "90 % of it is in 1 of 10 tokens: 3", "90 % of it is in 1 of 4 heads: 2", "90 % of it is in 1 of 3 channels: 1"]
    assert [row[0] for row in x.worst[1:3]] == ["token 0, head 2, channel 0", "token 1, head 2, channel 0"]
    assert x.exact == 120 - 11 and x.counts.sum() == 11 and x.counts[2 * (1 + 4)] == 10, "2^-20 is 16 u"
    assert axes_of("layers.0.kda.state", (4, 8, 8)) == ("head", "key", "value")
    assert axes_of("logits", (5, 9)) == ("token", "id") and axes_of("x", (5, 9)) == ("token", "channel")
    huge = open_array("x", np.array([[np.inf, 1.5]]), np.array([[0.0, 1.0]]))
    assert huge.axes[0].text == "90 % of it is in 1 of 2 channels: 0"
    ids = open_ids("layers.1.moe.ids", np.array([[1, 2], [3, 4]]), np.array([[2, 1], [3, 5]]))
    assert ids.worst == [("token 1", "4", "5")] and ids.axes[0].text == "1 of 2 tokens differ"


def test_grid_of_one_array():
    d = np.ones((6, 40))
    grid, allowed = grid_of(d * (1 + 1e-3), d, ("token", "channel"))
    assert grid.labels[0] == "channel 0 to 1" and grid.values.shape == (20, 6) and allowed == "1e-04 of the rms"
    np.testing.assert_allclose(grid.values, 1e-3)
    grid, _ = grid_of(d + np.eye(6, 40), d, ("token", "channel"), np.full(d.shape, 0.5))
    assert grid.values.max() == 2 and not grid_of(np.zeros((0, 2)), np.zeros((0, 2)), ("token", "channel"))[0]


# ---- plots ----


@pytest.mark.parametrize("name", ["traces", "parts", "same", "blame", "right", "budget", "gates", "several", "one"])
def test_plot(results, name):
    figure = results[name].plot()
    assert len(figure.axes) == 3 and figure._repr_png_()[:4] == b"\x89PNG"
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape[0] == len(figure.axes[0].get_yticks())
    assert figure.axes[1].get_xlabel() and figure.axes[1].get_ylabel()


def test_nothing_to_draw(results):
    with pytest.raises(ValueError, match="expert ids have no heat map"):
        results["ids"].plot()
    with pytest.raises(ValueError, match="nothing to draw"):
        results["empty"].plot()
    states = kl.diff.traces({"layers.1.kda.state": np.ones((2, 3, 3))}, {"layers.1.kda.state": np.zeros((2, 3, 3))})
    assert "layers.1.kda.state" in states.html() and not states.grid()
    with pytest.raises(ValueError, match="nothing to draw"):
        states.plot()


def test_a_number_and_nothing():
    """Arrays without tokens, or without anything, have a page, too."""
    assert "DIVERGES at x" in kl.diff.traces({"x": np.float32(1)}, {"x": np.float32(2)}).html()
    experts = kl.diff.traces({"layers.0.moe.ids": np.ones((2, 3), int)}, {"layers.0.moe.ids": np.zeros((2, 3), int)})
    assert "<td>token 0</td><td>1, 1, 1</td><td>0, 0, 0</td>" in experts.html() and experts.plot()._repr_png_()
    assert "ok: no divergence" in kl.diff.traces({"embed": np.zeros((0, 4))}, {"embed": np.zeros((0, 4))}).html()


def test_without_matplotlib():
    """In a process where it cannot be imported: a sentence, and pages all the same."""
    code = ("import sys; sys.modules['matplotlib'] = None\n"
            "import numpy as np, kimi_linear as kl\n"
            "found = kl.diff.compare(np.ones((2, 2)), np.zeros((2, 2)))\n"
            "assert '<svg' in found.html()\n"
            "try: found.plot()\n"
            "except ImportError as error: print(error)\n")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("plot() needs matplotlib, which is not installed: pip install matplotlib")
