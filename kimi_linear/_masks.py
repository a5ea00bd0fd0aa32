"""Masked arrays are refused where arrays come in; beside what `_arrays` imports, which needs it, too."""

import numpy as np


def unmasked(a, name):
    """`a`, a NumPy array; TypeError where it is masked: no op knows of masks, and what is hidden would count."""
    if type(a) is not np.ndarray and isinstance(a, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost; give .filled(value) of it")
    return a
