"""The HTML report and the notebook, opened in a real headless browser without a network."""

import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib import image
from nbconvert import HTMLExporter

import kimi_linear as kl
from kimi_linear.diff._html import HEAT

ROOT = Path(__file__).parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless=new", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions",
         "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
         "--virtual-time-budget=5000", "--window-size=1100,1600")


class Browser:
    """Chromium: what it makes of a page."""

    def __init__(self, folder):
        self.folder = folder
        self.program = next((p for p in map(shutil.which, NAMES) if p), None)
        assert self.program, "there is no Chromium: sh tools/setup-system.sh chromium installs it (make test does so)"

    def run(self, page, *flags):
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # root has none
        env = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS")}
        done = subprocess.run([self.program, *FLAGS, *sandbox, f"--user-data-dir={self.folder / 'profile'}", *flags,
                               Path(page).as_uri()], capture_output=True, env=env, timeout=120)
        said = done.stderr.decode("utf-8", "replace")
        assert done.returncode == 0, said[-2000:]
        console = [line for line in said.splitlines() if ":CONSOLE" in line]
        return done.stdout.decode("utf-8"), console

    def dom(self, page):
        """(the document after it was laid out, what was said on the console)."""
        return self.run(page, "--dump-dom")

    def picture(self, page, *flags):
        """[rows, columns, 3] of 0 to 255."""
        file = self.folder / "screen.png"
        self.run(page, f"--screenshot={file}", *flags)
        return (image.imread(file)[..., :3] * 255).round().astype(int)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    return Browser(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def model():
    return kl.Model.tiny()


@pytest.fixture(scope="module")
def runs(model):
    """300 tokens of the packaged model: (with a fault in layer 2, ours)."""
    text = (ROOT / "tests/data/tiny/heldout.txt").read_text(encoding="utf-8")
    ids = model.tokenizer.encode(text)[:300]
    [theirs] = kl.faults.run(model, ids, plant={"layers.2.kda.o": "decay_after_update"})
    return theirs, model.trace(ids)


def pixels(picture, colour):
    return int((picture == [int(colour[i:i + 2], 16) for i in (1, 3, 5)]).all(-1).sum())


def test_the_browser_tells_errors(browser, tmp_path):
    """The judge itself: an error of a script is seen."""
    page = tmp_path / "bad.html"
    page.write_text("<!DOCTYPE html><p id=p>here</p><script>nothing()</script>", encoding="utf-8")
    dom, console = browser.dom(page)
    assert "here" in dom and len(console) == 1 and "nothing is not defined" in console[0]


@pytest.mark.parametrize("kind", ["traces", "blame"])
def test_report(browser, model, runs, tmp_path, kind):
    report = kl.diff.traces(*runs, model=model) if kind == "traces" else kl.diff.blame(model, runs[0])
    page = tmp_path / f"{kind}.html"
    report.html(page)
    assert page.stat().st_size < 2_000_000
    dom, console = browser.dom(page)
    assert console == []
    verdict = re.search(r"<p class=\"verdict no\">([^<]*)</p>", dom)[1]
    assert unescape(verdict) == report.verdict and "layers.2.kda.o" in verdict
    maps = re.findall(r"<g class=\"cells\".*?</g>", dom, re.S)
    assert maps[0].count("<rect ") == 300 * (len(model.config.layers) + 2)
    assert maps[1].count("<rect ") == np.prod(report.grid("layer 2").at_most(4000 // 29).values.shape)
    assert "://" not in page.read_text(encoding="utf-8"), "no address"


def test_colours_of_both_themes(browser, runs, tmp_path):
    """What is laid out is drawn: the wrong layers in the colour of large errors, light and dark."""
    page = tmp_path / "page.html"
    kl.diff.traces(*runs).html(page)
    for flags, ground in (((), "#ffffff"), (("--blink-settings=preferredColorScheme=0",), "#0f1318")):
        picture = browser.picture(page, *flags)
        assert picture.shape == (1600, 1100, 3)
        assert pixels(picture, ground) > 0.5 * 1600 * 1100
        assert pixels(picture, HEAT[8]) > 20_000, "six rows of 18 pixels, and below them the taps of a layer"


def test_notebook(browser, tmp_path):
    """As nbconvert exports it, without what it would fetch: MathJax, RequireJS."""
    notebook = nbformat.read(ROOT / "notebooks/04-find-the-bug.ipynb", as_version=4)
    body, _ = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="").from_notebook_node(notebook)
    body = body.replace("</body>", "<pre id='fetched'></pre><script>document.getElementById('fetched').textContent = "
                                   "performance.getEntriesByType('resource').map(e => e.name).join(' ')"
                                   "</script></body>")
    page = tmp_path / "notebook.html"
    page.write_text(body, encoding="utf-8")
    assert page.stat().st_size < 2_000_000
    dom, console = browser.dom(page)
    assert console == []
    fetched = re.search(r"<pre id=\"fetched\">([^<]*)</pre>", dom)[1].split()
    assert [name for name in fetched if not name.startswith(("file:", "data:"))] == []
    said = next(out for cell in notebook.cells for out in cell.get("outputs", []) if "text/html" in out.get("data", {}))
    verdict = unescape(re.search(r"<p class='verdict no'>([^<]*)</p>", said.data["text/html"])[1])
    assert f"<p class=\"verdict no\">{verdict}</p>" in unescape(dom) and "decay_after_correction" in verdict
    assert dom.count("<g class=\"cells\"") == 1 and "all of it holds" in dom
