"""The pytest plugin of kimi_linear: a test returns a kernel, and fails with the card of `check_op`.

A module of its own beside the package, as importing any module of the package imports all of it: pytest loads plugins
at every start, so this one imports nothing before a fixture or the marker is used. Where the entry point is not
installed: ``-p pytest_kimi_linear``.
"""

import shlex

import pytest

MARKER = "kl_op(op, conventions='ours', **options): the test returns a callable, which kimi_linear.testing.check_op " \
         "takes through the cases of the op; options are those of check_op"


def pytest_addoption(parser):
    """``--kl-cases``, and ``kl_cases`` of the ini file."""
    says = "cases that check_op runs: names or groups with * and ?, separated by commas"
    parser.getgroup("kimi_linear").addoption("--kl-cases", metavar="PATTERNS", help=f"{says}; goes before all else")
    parser.addini("kl_cases", f"{says}; where a test does not say", default="")


def pytest_configure(config):
    """The marker, for ``--strict-markers`` and ``--markers``."""
    config.addinivalue_line("markers", MARKER)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test with the marker: what it returns goes through the cases."""
    mark = pyfuncitem.get_closest_marker("kl_op")
    if mark is None:
        return (yield)
    function = pyfuncitem.obj

    def judged(**fixtures):
        __tracebackhide__ = True
        if len(mark.args) != 1 or not isinstance(mark.args[0], str):
            pytest.fail(f"kl_op has the arguments {mark.args!r}; it must have the name of an op, and options by name",
                        pytrace=False)
        fn = function(**fixtures)
        if not callable(fn):
            pytest.fail(f"{pyfuncitem.name} is marked kl_op and returned {fn!r:.80}; it must return the callable to "
                        "check", pytrace=False)
        _judge(pyfuncitem, mark.args[0], fn, mark.kwargs)

    pyfuncitem.obj = judged
    try:
        return (yield)
    finally:
        pyfuncitem.obj = function


def _judge(item, op, fn, named):
    """The card of a callable; the test fails where it is bad."""
    __tracebackhide__ = True
    import numpy as np

    from kimi_linear.testing import check_op

    try:
        with np.errstate(all="ignore"):  # cases on the rim overflow, and are meant to
            card = check_op(op, fn, **named | {"cases": _cases(item.config, named)})
    except (ImportError, TypeError, ValueError) as error:  # of the arguments: what the callable raises is in the card
        wrong = f"check_op: {error}"
    else:
        wrong = ""
    if wrong:  # here, so that pytest does not show the error twice
        pytest.fail(wrong, pytrace=False)
    item.user_properties.append((f"kl_op {op}", card.verdict))
    if not card:
        pytest.fail("\n".join([card.brief(), *_next(item.nodeid, card)]), pytrace=False)
    return card


def _cases(config, named):
    """The command line's, else the test's own, else the ini file's."""
    for patterns in (config.getoption("--kl-cases"), named.get("cases"), config.getini("kl_cases"), "all"):
        if isinstance(patterns, str) and patterns != "all":
            patterns = [p.strip() for p in patterns.split(",") if p.strip()]
        if patterns:
            return patterns


def _next(nodeid, card):
    """Lines: what to look at next."""
    if not card.failing:
        return []
    lines = [f"next: pytest {shlex.quote(nodeid)} --kl-cases {shlex.quote(card.failing[0])}    runs one case alone"]
    if any(not row.why for row in card.rows if row.status == "fails"):
        lines.append("      kl.diff.align(yours, reference)    finds a transpose, permutation or factor")
    return [*lines, "      docs/check-your-kernel.md of kimi_linear    what a case must do"]


@pytest.fixture(scope="session")
def kl_assert_close():
    """`kimi_linear.testing.assert_close`: a result beside its reference, judged by the op's own budget."""
    from kimi_linear.testing import assert_close

    return assert_close


@pytest.fixture
def kl_check_op(request):
    """``kl_check_op(op, fn, **options)``: `kimi_linear.testing.check_op`; fails with the card where it is bad, else
    returns it."""
    def check(op, fn, **named):
        __tracebackhide__ = True
        return _judge(request.node, op, fn, named)

    return check


@pytest.fixture(scope="session")
def kl_reference():
    """`kimi_linear.reference`: every op in float64, by its name."""
    from kimi_linear import reference

    return reference


@pytest.fixture(scope="session")
def kl_tiny():
    """The packaged model, opened once a session: give each test a state of its own, and leave the weights alone."""
    from kimi_linear import Model

    return Model.tiny()
