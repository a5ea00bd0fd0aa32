"""What is written down is true: docstrings, type stubs, anchors and paths in the docs, the table of ops."""

import ast
import inspect
import re
from pathlib import Path

import basic_inputs
import numpy as np
import pytest
from small_calls import calls_of_every_op

import kimi_linear as kl
import kimi_linear.diff
import kimi_linear.load
import kimi_linear.testing
from kimi_linear import _core
from kimi_linear.config import MIXER_LETTERS
from kimi_linear.diff import budgets
from kimi_linear.diff.budgets import _basic
from kimi_linear.editing import Place

ROOT = Path(__file__).parents[1]
MATH = ROOT / "docs" / "math.md"
STATE = ROOT / "docs" / "state.md"
PAGES = [ROOT / "README.md", ROOT / "csrc/README.md", *sorted((ROOT / "docs").glob("*.md"))]

OPS = re.findall(r"^\s+OP\((\w+),", (ROOT / "csrc/ops/list.h").read_text(), re.M)
INNER = {"cache_append"}  # part of a forward pass: no function of kl.ops
EXACT = {"cache_append", "dequantize", "quantize", "sample"}  # nothing to bound: a copy or one rounding; bytes; an id
PLAIN = {"add", "embedding", "linear", "sigmoid", "softmax"}  # textbook formulas, without a source
PYTHON_OPS = [op for op in OPS if op not in INNER]


def text_of(*folders, suffixes=(".c", ".h", ".inc", ".def", ".py", ".pyi", ".ipynb")):
    """(path, text) of every source file below these folders."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in suffixes:
                yield path.relative_to(ROOT), path.read_text(encoding="utf-8")


def anchors(markdown):
    """What a link into the document can name: headings as GitHub spells them, and explicit ids."""
    found = set(re.findall(r'<a id="([^"]+)">', markdown))
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", markdown, flags=re.S), re.M):
        words = re.sub(r"<[^>]*>", "", heading).replace("`", "").strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return found


# ---- docstrings ------------------------------------------------------------------------------------


def sections(doc):
    """A numpydoc docstring as {title: text}; what comes before the first title is under ''."""
    parts = re.split(r"^([A-Z][A-Za-z ]+)\n-{3,}\n", inspect.cleandoc(doc), flags=re.M)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def entries(section):
    """Names that a section documents: of lines such as ``q, k : (T, Hk, K) float32``, or ``q, k`` alone."""
    names = set()
    for line in section.splitlines():
        if re.match(r"[A-Za-z_]\w*(, \w+)*( :.*)?$", line):
            names.update(line.partition(" :")[0].split(", "))
    return names


@pytest.mark.parametrize("op", PYTHON_OPS)
def test_docstring_of_op(op):
    function = getattr(kl.ops, op)
    doc = sections(function.__doc__)
    about = doc[""].replace("\n", " ")
    assert re.match(r"[A-Z].*?[.:]", about), "it does not begin with a sentence"
    missing = set(inspect.signature(function).parameters) - entries(doc["Parameters"])
    assert not missing, f"Parameters leaves out {sorted(missing)}"
    assert re.match(r"\w+( :|,)", doc["Returns"]), "Returns names no result"
    assert "TypeError" in doc["Raises"] and "ValueError" in doc["Raises"]
    if op not in PLAIN:
        assert re.search(r"Source: .*(arXiv:\d{4}\.\d{4,5}|Salmon|flash-linear-attention)", about)


def test_every_op_is_in_the_list():
    extra = {"pack", "unpack"}
    assert set(kl.ops.__all__) - extra == set(PYTHON_OPS)


def documented(module):
    """(where, object) of the public names of a module, and of the public methods of its classes."""
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.ismodule(thing) or not callable(thing):
            continue
        yield f"{module.__name__}.{name}", thing
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                if not member.startswith("_") and _is_code(value):
                    yield f"{module.__name__}.{name}.{member}", value


def _is_code(value):
    return callable(value) or isinstance(value, property | classmethod)


MODULES = [kl, kl.ops, kl.diff, kl.faults, kl.testing, kl.load, budgets]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_public_names_have_docstrings(module):
    assert module.__doc__
    for where, thing in documented(module):
        doc = thing.__doc__
        generated = inspect.isclass(thing) and (doc or "").startswith(f"{thing.__name__}(")
        assert doc and not generated, f"{where} has no docstring"


@pytest.mark.parametrize("op", PYTHON_OPS)
def test_reference_takes_the_same_arguments(op):
    """The same names in the same order with the same defaults; `out` and `ctx` are of the engine alone."""
    def arguments(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()
                if p.name not in ("out", "ctx")]

    assert arguments(getattr(kl.ops, op)) == arguments(getattr(kl.reference, op))


# ---- stubs -----------------------------------------------------------------------------------------


def stubs():
    """Functions, and the members of classes, of _core.pyi: {name: ast node or {member: node}}."""
    found = {}
    for node in ast.parse((ROOT / "kimi_linear/_core.pyi").read_text()).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign) and not node.target.id.startswith("_"):
            found[node.target.id] = node
    return found


def public(thing):
    return {name for name in dir(thing) if not name.startswith("_")}


def test_stubs_name_what_the_extension_has():
    found = stubs()
    assert set(found) == public(_core)
    for name, members in found.items():
        if isinstance(members, dict):
            assert set(members) - {"__new__"} == public(getattr(_core, name)), name


def units(formats):
    """(required, all) arguments of a format string of PyArg_ParseTuple."""
    formats = re.sub(r"\([^()]*\)", "O", formats)
    first, _, rest = formats.partition("|")
    count = [len(re.sub(r"[!*#&]", "", part)) for part in (first, rest)]
    return count[0], sum(count)


def test_stubs_take_what_the_extension_parses():
    parsed = {}
    for _, text in text_of("csrc/python"):
        text = re.sub(r'"\s*\n\s*"', "", text)
        for formats, name in re.findall(r'PyArg_ParseTuple(?:AndKeywords)?\([^"]*?"([^":]+):(\w+)"', text):
            parsed[name] = units(formats)
    found = stubs()
    for owner in ("Context", "DeviceMemory", "Model", "State"):
        for name, node in found.pop(owner).items():
            found[owner if name == "__new__" else name] = node
    for name, counts in parsed.items():
        given = found[name].args
        taken = [a for a in given.posonlyargs + given.args if a.arg not in ("self", "cls")]
        assert (len(taken) - len(given.defaults), len(taken)) == counts, f"{name}: {[a.arg for a in taken]}"
    assert set(OPS) <= set(parsed)


def test_package_says_that_it_is_typed():
    assert (ROOT / "kimi_linear/py.typed").exists()


# ---- docs ------------------------------------------------------------------------------------------


def test_anchors_of_math_exist():
    there = anchors(MATH.read_text(encoding="utf-8"))
    seen = 0
    for path, text in text_of("csrc", "kimi_linear", "tests", "benchmarks", "notebooks"):
        if path.name == Path(__file__).name:
            continue
        for anchor in re.findall(r"docs/math\.md#([\w-]+)", text):
            assert anchor in there, f"{path} points to docs/math.md#{anchor}"
            seen += 1
    assert seen > 10


def section(path, title):
    """The text below a heading that has these words, to the next heading of its level or above."""
    level, rest = re.search(rf"^(#+) [^\n]*?{title}\n(.*)", path.read_text(encoding="utf-8"), re.M | re.S).groups()
    return re.split(rf"^#{{1,{len(level)}}} ", rest, flags=re.M)[0]


def test_the_forward_pass_names_every_tap():
    taps = re.findall(r'^ +KL_TAP\(\w+, "([\w.]+)"', (ROOT / "csrc/kimi_linear_model.h").read_text(), re.M)
    text = section(MATH, "The forward pass")
    assert len(taps) > 60
    for name in taps:
        assert re.search(rf"\b{name.rpartition('.')[2]}\b", text), f"docs/math.md#forward has no {name}"


@pytest.mark.parametrize("case", ["kimi-a", "qwen-a"])
def test_the_page_of_states_has_every_array(case):
    model = kl.Model.from_pretrained(ROOT / "tests/data/golden" / case)
    rows = section(STATE, "What it holds").splitlines()
    for mixer, array in {tuple(name.split(".")[2:]) for name in dict(model.new_state().items())}:
        assert any(row.startswith(f"| `layers.i.{mixer}.") and f"{array}`" in row for row in rows), (mixer, array)
    size = model.plan(context=512)
    n, c = {kind: sum(layer.mixer == kind for layer in model.config.layers) for kind in MIXER_LETTERS}, model.config
    H, K, W = c.kda_heads, c.kda_head_dim, c.conv_width
    gdn = c.gdn_v_heads * c.gdn_k_dim * c.gdn_v_dim + (W - 1) * (
        2 * c.gdn_k_heads * c.gdn_k_dim + c.gdn_v_heads * c.gdn_v_dim)
    assert size.state_fixed == 4 * (n["kda"] * (H * K * K + 3 * (W - 1) * H * K) + n["gdn"] * gdn)
    assert size.state_page == 4 * 512 * (n["mla"] * (c.kv_rank + c.rope_dim)
                                         + n["attn"] * 2 * c.attn_kv_heads * c.attn_head_dim)


def test_the_readme_explains_the_letters_of_layers():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    explained = re.search(r"a letter a layer: (.*?);", text, re.S)[1]
    assert set(re.findall(r"\b([A-Z]) \w", explained)) == set(MIXER_LETTERS.values())


def blocks(title):
    """The blocks of code below a heading of the README."""
    return re.findall(r"^```\w*\n(.*?)^```", section(ROOT / "README.md", title), re.M | re.S)


def test_the_first_example_of_the_readme_prints_what_it_shows(capsys):
    code, shown = blocks(r"Is this op right\?")
    exec(code, {})
    printed = capsys.readouterr().out
    assert re.sub(r"[\d.]+(e-\d+)?", "#", printed).split() == re.sub(r"[\d.]+(e-\d+)?", "#", shown).split()


def test_the_edits_of_the_readme_run():
    model = kl.Model.tiny()
    (code,) = blocks("Change something inside")
    ids = model.tokenizer.encode("And the LORD said unto Moses, Speak unto the children of Israel")
    theirs = np.zeros_like(model.trace(ids, "layers.2.kda.beta")["layers.2.kda.beta"])
    run = {"kl": kl, "np": np, "model": model, "theirs_beta": theirs}
    exec(code, run)
    assert run["rest"].tobytes() == run["whole"].tobytes() and run["lens"].shape == run["whole"].shape
    for name in ("slower", "replaced", "unread"):
        assert (run[name] != run["whole"]).any(), name


def test_the_recipes_of_looking_inside_do_what_they_say(capsys):
    run = {}
    page = (ROOT / "docs/look-inside.md").read_text(encoding="utf-8")
    for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        exec(code, run)
    model, trace, ids = (run[name] for name in ("model", "trace", "ids"))
    whole = trace["logits"]
    np.testing.assert_allclose(sum(run["share"].values()), whole[:, 328], rtol=0, atol=1e-4)
    routed = trace["layers.2.moe.out"] - trace["layers.2.moe.shared"]
    np.testing.assert_allclose(sum(run["by_expert"]), routed, rtol=0, atol=1e-5)
    assert run["lens"][-1].tobytes() == whole.tobytes()
    assert run["effect"][-1, -1] == model.forward(run["other"], logits="last")[328] != whole[-1, 328]
    for name in ("read", "answer"):
        np.testing.assert_allclose(run[name], trace["layers.1.kda.o"], rtol=0, atol=1e-6)
    for name in ("cut", "unattended"):
        assert (np.flatnonzero((run[name] != whole).any(-1)) == range(9, len(ids))).all(), name
    p = np.delete(trace["layers.3.mla.probs"][9, :, :10], 4, axis=-1)
    values = np.einsum("hvr,sr->shv", run["kv_b"][:, model.config.nope_dim :].astype(float), run["latent"][run["seen"]])
    o = run["unseen"](trace["layers.3.mla.o"].copy(), Place(None, np.arange(len(ids))))[9]
    np.testing.assert_allclose(o, np.einsum("hs,shv->hv", p / p.sum(-1, keepdims=True), values), rtol=0, atol=1e-5)
    plain, changed = run["state"].items(), dict(run["changed"].items())
    assert [name for name, x in plain if x.tobytes() != changed[name].tobytes()] == ["layers.1.kda.state",
                                                                                     "layers.4.kda.state"]
    assert run["used"].sum() == 2 * len(ids)
    for name in ("without_3", "silent_3", "forced"):
        assert (run[name] != whole).any(), name
    assert "q_proj.weight is furthest apart" in capsys.readouterr().out


@pytest.mark.parametrize("function", [kl.reference.rms_norm, _basic.rms_norm], ids=["reference", "budget"])
def test_the_page_of_a_new_op_shows_the_code(function):
    shown = re.findall(r"^```python\n(def rms_norm.*?)^```", (ROOT / "docs/add-an-op.md").read_text(), re.M | re.S)
    code = inspect.getsource(function)
    assert any(all(line in code for line in block.splitlines()) for block in shown)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_in_docs(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        other = path.parent / file if file else path
        there = other.exists() and (not anchor or anchor in anchors(other.read_text(encoding="utf-8")))
        assert there, f"{path.name} links to {target}"
    for name in re.findall(r"`((?:csrc|kimi_linear|tests|docs|notebooks|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_the_map_of_csrc_names_all_that_lies_there():
    text = read("csrc/README.md")
    for path in sorted((ROOT / "csrc").iterdir()):
        if path.suffix in (".c", "") or not path.with_suffix(".c").exists() and path.suffix == ".h":
            wanted = f"`{path.name}`" if path.suffix == ".c" else f"]({path.name})"
            assert wanted in text, f"csrc/README.md says nothing of {path.name}"
    for name in re.findall(r"`((?:ops|hip|model)/[\w.*<>]+)`", text):
        assert list((ROOT / "csrc").glob(name.replace("<op>", "*"))), f"csrc/README.md names {name}"


def test_each_file_of_csrc_says_what_it_is():
    for path, code in text_of("csrc", suffixes=(".c", ".h", ".inc", ".def", ".hip", ".cpp")):
        assert code.startswith("/* "), f"{path} does not begin with a comment that says what it is"


# ---- what docs/math.md says was measured ----


def stated(function):
    """The measured error of a function in docs/math.md, in u."""
    text = MATH.read_text(encoding="utf-8")
    return float(re.search(rf"^\*\*{function}[.*].*?\*\*([\d.]+) u\*\*", text, re.M | re.S)[1])


def exp_of(x):
    """exp(x) for x <= 0: what one token without a write leaves of a state of 1."""
    H = len(x)
    one, none = np.ones((H, 1, 1), np.float32), np.zeros((1, H, 1), np.float32)
    return kl.ops.delta_rule(none, none, none, x.reshape(1, H, 1), none[..., 0], initial_state=one)[1].ravel()


def softplus_of(x):
    """softplus(x): a decay gate of rate 1, its sign apart."""
    one, none = np.ones(1, np.float32), np.zeros(1, np.float32)
    return -kl.ops.decay_gate(x[:, None], one, none).ravel()


@pytest.mark.parametrize("function, run, reference, worst", [
    ("exp", exp_of, np.exp, -5.8911829),
    ("sigmoid", kl.ops.sigmoid, kl.reference.sigmoid, -6.57636595),
    ("softplus", softplus_of, kl.reference.softplus, -2.72590327),
])
def test_errors_of_elementary_functions_are_as_stated(function, run, reference, worst):
    """A grid over the range of normal results, and the floats around the one where the error was largest."""
    high = 0.0 if function == "exp" else 87.0
    near = np.arange(-2000, 2000) * np.spacing(np.float32(worst)) + np.float32(worst)
    grids = np.linspace(-87.0, high, 400_001), np.linspace(-8.0, 0.0, 400_001), near
    x = np.concatenate(grids).astype(np.float32)
    want = reference(x.astype(np.float64))
    error = (abs(run(x) - want) / want).max() / budgets.U
    assert 0.97 * stated(function) < error <= stated(function)


# ---- each op, everywhere ---------------------------------------------------------------------------


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def places(op):
    """(whether it is there, the place and what must be there) of an op, in the order of docs/add-an-op.md."""
    def said(path, pattern, what):
        return re.search(pattern.replace("OP", op), read(path), re.M) is not None, f"{path}: {what.replace('OP', op)}"

    def said_below(folder, suffixes, pattern, what):
        text = "\n".join(text for _, text in text_of(folder, suffixes=suffixes))
        return re.search(pattern.replace("OP", op), text, re.M) is not None, f"{folder}: {what.replace('OP', op)}"

    outer = op not in INNER
    judged = r"\bOP\b" if op in EXACT or op in basic_inputs.OPS else r'judge\("OP"'
    yield said("docs/math.md", "^##+ OP$", "a section OP")
    yield said("docs/math.md", r"\[OP\]\(#OP\)", "OP in the list of contents")
    yield not outer or callable(getattr(kl.reference, op, None)), f"kimi_linear/reference.py: a function {op}"
    yield op in EXACT or op in budgets.names(), f"kimi_linear/diff/budgets: a budget {op}, named in __all__"
    yield said("csrc/kimi_linear.h", r"^KL_API kl_status kl_OP\(", "a declaration of kl_OP")
    yield said_below("csrc/ops", (".c",), r"^(?:/\*| \*) +OP:", "a first comment with the formula, 'OP: ...'")
    yield said_below("csrc/ops", (".c",), r"^kl_status cpu_OP\(", "a function cpu_OP")
    if f"KL_KERNEL({op}," in read("csrc/cpu/kernels.def"):
        yield said("tests/c/test_isa.c", r"\bkl_OP\(", "a call of kl_OP, whose kernel each instruction set has")
    yield hasattr(_core, op), f"csrc/python/ops_*.c: py_{op}, and its line in the table of that file"
    yield said("kimi_linear/_core.pyi", r"^def OP\(", "a line of OP")
    yield not outer or op in kl.ops.__all__, f"kimi_linear/ops/__init__.py: {op} in __all__"
    yield said_below("tests/ops", (".py",), judged, "a test that judges OP")
    yield not outer or op in calls_of_every_op(), f"tests/ops/small_calls.py: a call of {op}"
    yield said("csrc/hip/ops.def", r"^KL_HAVE\(OP\)", "a line KL_HAVE(OP)")
    yield said("docs/hip.md", r"^\|[^|]*`OP`", "a row of OP in the ladder")
    yield said("tests/hip/test_hip_grids.py", r'^    "OP\b', "a case of OP")
    yield said("tests/hip/test_hip_far.py", r"\bOP\b", "rows of OP behind 2^31")
    if outer:
        yield said("benchmarks/cases.py", r'Case\("OP"', "a case of OP")
        yield said("README.md", r"^\| *`OP` *\|", "a row of OP in the table of ops")


@pytest.mark.parametrize("op", OPS)
def test_op_is_complete(op):
    missing = [place for there, place in places(op) if not there]
    assert not missing, "\n".join(["docs/add-an-op.md says what a place is for; missing is", *missing])


@pytest.mark.parametrize("name", ["example_op.c", "example_delta_rule.c", "example_model.c"])
def test_the_page_of_the_c_library_shows_the_programs_of_its_tests(name):
    page, program = (ROOT / "docs/c-api.md").read_text(), (ROOT / "tests/c" / name).read_text()
    shown = re.search(rf"tests/c/{name}\).*?```c\n(.*?)```", page, re.S)[1]
    assert shown == program.split("\n", 1)[1]
