"""A model's weights by name: read when asked for, replaceable."""

from collections.abc import Mapping

import numpy as np

from ._arrays import TYPE_IDS, as_array, check_shape
from ._names import near
from .load.safetensors import array_of, dtype_name
from .quantized import Quantized

__all__ = ["Weights"]


class Weights(Mapping):
    """Canonical name -> array of a Model; a tensor of a file is mapped when it is asked for.

    ``weights[name] = array`` replaces a tensor by a copy of the array, which must have its shape; ``del weights[name]``
    puts back the one of the file, or does nothing where that is in place.
    """

    def __init__(self, model):
        self._model = model

    def __getitem__(self, name):
        self._check(name)
        if self._model._checkpoint is not None:
            self._model._checkpoint.check_unchanged()  # what is mapped is read
        return array_of(self._model._tensors[name])

    def __setitem__(self, name, value):
        self._check(name)
        if isinstance(value, Quantized):
            raise TypeError(f"{name} is a Quantized; a weight is replaced by an array, such as its values: "
                            "np.asarray(it), which are float32")
        a = as_array(value, name)
        if a.dtype not in TYPE_IDS:
            raise TypeError(f"{name} is {a.dtype}; it must be float32, float16 or bfloat16")
        check_shape(a, name, tuple(self._model._tensors[name].shape))
        a = np.array(a, order="C")
        a.flags.writeable = False
        self._model._replace(name, a)

    def __delitem__(self, name):
        self._check(name)
        self._model._restore(name)

    def storage_type(self, name):
        """In what a tensor lies: "F32", "BF16", "Q4_K"; "Q4_K/Q6_K" where its parts lie in two types.

        Raises
        ------
        KeyError
            If no weight has that name.
        """
        self._check(name)
        tensor = self._model._tensors[name]
        return dtype_name(tensor.dtype) if isinstance(tensor, np.ndarray) else tensor.dtype

    def __iter__(self):
        return iter(self._model._tensors)

    def __len__(self):
        return len(self._model._tensors)

    def __contains__(self, name):
        return name in self._model._tensors

    def _ipython_key_completions_(self):
        return list(self)

    def __repr__(self):
        return f"Weights({len(self)} tensors of {self._model.name!r}: {', '.join([*self][:2])}, ...)"

    def _check(self, name):
        if name not in self._model._tensors:
            raise KeyError(f"{name!r} is no weight of this model; near it are {', '.join(near(name, self))}")
