"""Every notebook runs from its first cell to its last, proves what it says, and is saved with its results."""

import ast
import re
import warnings
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
LARGEST = 500_000  # bytes


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def plain(source):
    """Python without IPython's own lines."""
    return "\n".join(line for line in source.splitlines() if not line.startswith(("%", "!")))


def printed(cell):
    """What a cell wrote, as one text."""
    return "".join(out.text for out in cell.outputs if out.output_type == "stream" and out.name == "stdout")


def words(cell):
    """What a cell shows as text: a # for each number, which may be another on another machine."""
    shown = [out.data.get("text/plain", "") for out in cell.outputs if "data" in out]
    return re.sub(r"[-+]?\d[\d,.]*(e[-+]?\d+)?", "#", " ".join([printed(cell), *shown])).split()


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS][:1] == ["01-recurrence"]


def test_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    saved = [words(cell) for cell in code_cells(notebook)]
    proven = printed(code_cells(notebook)[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the kernel's own start
        NotebookClient(notebook, timeout=600, kernel_name="python3",
                       resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert printed(code_cells(notebook)[-1]) == proven
    for i, (cell, before) in enumerate(zip(code_cells(notebook), saved), start=1):
        assert words(cell) == before, f"code cell {i} is saved with the results of another version"
    assert not any(tmp_path.iterdir()), "the notebook left files behind"


def test_opens_with_a_claim_and_ends_in_assertions(path):
    notebook = nbformat.read(path, as_version=4)
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "**Claim.**" in first.source
    last = ast.parse(plain(code_cells(notebook)[-1].source))
    assert sum(isinstance(node, ast.Assert) for node in ast.walk(last)) >= 1


def test_is_saved_with_results_and_nothing_of_the_machine(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len(text) < LARGEST
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    for i, cell in enumerate(notebook.cells):
        assert not cell.metadata, f"cell {i} has metadata {dict(cell.metadata)}"
    for i, cell in enumerate(code_cells(notebook), start=1):
        assert cell.execution_count == i, "saved after another order of runs than from top to bottom"
        for out in cell.outputs:
            assert out.output_type != "error" and out.get("name") != "stderr", f"code cell {i}: {out}"
    assert not re.search(r"/(home|root|tmp|Users)/\w+/", text)
