"""A stand-in for torch's tensors, of which NumPy may not take the memory by itself."""

from types import SimpleNamespace

import numpy as np


class Tensor:
    """One that requires grad: it must be detached first."""

    device = SimpleNamespace(type="cpu")

    def __init__(self, x):
        self.x = np.asarray(x)
        self.shape, self.dtype, self.ndim = self.x.shape, self.x.dtype, self.x.ndim

    def __array__(self, *args, **kwargs):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

    def __len__(self):
        return len(self.x)

    def detach(self):
        return SimpleNamespace(resolve_conj=lambda: SimpleNamespace(resolve_neg=lambda: _Detached(self.x)))


class _Detached:
    def __init__(self, x):
        self.dtype, self.numpy = x.dtype, lambda: x


Tensor.__module__ = "torch"
