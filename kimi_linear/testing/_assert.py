"""`assert_close`: the judgement of `kimi_linear.diff.compare` as an assertion."""

from ..diff.compare import compare

__all__ = ["assert_close"]


def assert_close(actual, desired, *, op=None, inputs=None, axes=None, dtype=None):
    """Raise unless a result is within its op's budget of the reference.

    Parameters
    ----------
    actual, desired : array, or tuples of arrays
    op : str, optional
    inputs : mapping, optional
        The op's arguments by name. With both, the op's budget decides; else the usual gates of ggml,
        flash-linear-attention and transformers.
    axes, dtype : as for `kimi_linear.diff.compare`

    Raises
    ------
    AssertionError
        With the table of `compare`.
    ValueError
        If the shapes differ, or there is no such op.
    """
    __tracebackhide__ = True  # pytest shows the line that called
    found = compare(actual, desired, op=op, inputs=inputs, axes=axes, dtype=dtype)
    if not found:
        raise AssertionError(f"{op or 'arrays'} differ\n{found}")
