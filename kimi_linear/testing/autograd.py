"""A differentiable torch function as a kernel of gradients."""

from .check import imported

__all__ = ["autograd"]


def autograd(fn, grads=("do", "dstate")):
    """The backward pass of a function that torch differentiates, for `check_op` of an ``.._backward``.

    Parameters
    ----------
    fn : callable
        Of torch tensors, by name, in the conventions of the op itself.
    grads : sequence of str
        The arguments of the ``.._backward`` that are gradients of its results, in their order; one that is not given
        is none. Those of `delta_rule` by default; of most others ``["dy"]``.

    Returns
    -------
    callable
        Takes `grads` besides, calls `fn`, and returns the gradients of all floating-point tensors among its arguments,
        in their order; zeros where the results do not depend on one. It raises ValueError where the results have no
        graph, as under ``torch.no_grad()``.

    Raises
    ------
    TypeError
        If `fn` is not callable, or `grads` is not a sequence of names.

    Examples
    --------
    >>> from fla.ops.kda import chunk_kda                                                       # doctest: +SKIP
    >>> print(kl.testing.check_op("delta_rule_backward", kl.testing.autograd(chunk_kda), conventions="fla"))
    """
    if not callable(fn):
        raise TypeError(f"fn is a {type(fn).__name__}; it must be callable, with the arguments of the op")
    if isinstance(grads, str):
        raise TypeError(f"grads is {grads!r}; it must be a list of names: [{grads!r}]")
    torch = imported("torch")

    def backward(**arguments):
        given = [arguments.pop(name, None) for name in grads]
        leaves = {name: a.detach().requires_grad_() for name, a in arguments.items()
                  if torch.is_tensor(a) and a.is_floating_point()}
        results = fn(**{**arguments, **leaves})
        results = results if isinstance(results, tuple | list) else (results,)
        pairs = [(y, dy.to(y.dtype)) for y, dy in zip(results, given) if dy is not None and y.requires_grad]
        if not pairs:
            if any(dy is not None and dy.numel() for dy in given):
                raise ValueError("no result requires a gradient: torch has recorded no graph from the inputs to them")
            return tuple(map(torch.zeros_like, leaves.values()))
        outputs, gradients = zip(*pairs)
        found = torch.autograd.grad(outputs, tuple(leaves.values()), gradients, allow_unused=True)
        return tuple(torch.zeros_like(a) if d is None else d for a, d in zip(leaves.values(), found, strict=True))

    return backward
