"""The state of one sequence: what the model keeps of the tokens it has read."""

import re

import numpy as np

from . import _core, _engine
from ._arrays import as_array, check_shape
from .context import current

__all__ = ["State"]

_PARTS = {
    "kda.state": 0, "kda.q_history": 1, "kda.k_history": 2, "kda.v_history": 3,
    "mla.latent_cache": 4, "mla.k_shared_cache": 5,
}
_OF_MIXER = {"kda": [n for n in _PARTS if n.startswith("kda")], "mla": [n for n in _PARTS if n.startswith("mla")]}


class State:
    """What a model keeps of one sequence; made by ``model.new_state()``, moved on by ``model.forward(state=)``.

    A KDA layer keeps a delta state ``layers.i.kda.state`` [H, K, V] and three convolution histories
    ``layers.i.kda.q_history`` (``k_``, ``v_``) [W-1, H*K], oldest first: their size does not grow. An MLA layer keeps
    a row for each token: ``layers.i.mla.latent_cache`` [position, R], ``layers.i.mla.k_shared_cache`` [position, P],
    in the cache's type.

    ``state[name]`` is a copy of an array; ``state[name] = array`` replaces it.
    """

    def __init__(self, model, *, cache="float32", context=0, ctx=None):
        self._config = model.config
        self._model = model
        self.cache = cache
        self._core = _core.State(current(ctx)._core, model._core, _engine.cache_type(cache), context)

    @property
    def position(self):
        """Tokens read so far."""
        return self._core.position

    @property
    def nbytes(self):
        """Bytes now held."""
        return self._core.bytes

    def reset(self):
        """Forget everything: an empty sequence again, its memory kept."""
        self._core.reset(current()._core)

    def keys(self):
        """Names of the arrays, in the order of the layers."""
        return [f"layers.{i}.{name}" for i, layer in enumerate(self._config.layers) for name in _OF_MIXER[layer.mixer]]

    def __iter__(self):
        return iter(self.keys())

    def __len__(self):
        return len(self.keys())

    def __contains__(self, name):
        return name in self.keys()

    def _place(self, name):
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", str(name))
        if not match or name not in self.keys():
            raise KeyError(f"{name!r} is no array of this state; it has {', '.join(self.keys()[:4])}, ...")
        layer, part = int(match[1]), _PARTS[match[2]]
        shape, type_id = self._core.shape(current()._core, layer, part)
        return layer, part, shape, np.float16 if type_id == 1 else np.float32

    def __getitem__(self, name):
        layer, part, shape, dtype = self._place(name)
        a = np.empty(shape, dtype)
        self._core.read(current()._core, layer, part, a)
        return a

    def __setitem__(self, name, value):
        layer, part, shape, dtype = self._place(name)
        a = as_array(value, name)
        if a.dtype != dtype:
            raise TypeError(f"{name} is {a.dtype}; it must be {np.dtype(dtype)}")
        check_shape(a, name, shape)
        self._core.write(current()._core, layer, part, np.ascontiguousarray(a))

    def items(self):
        """(name, copy of the array) of each."""
        return ((name, self[name]) for name in self)

    def __repr__(self):
        return f"State(position={self.position}, cache={self.cache!r}, {self.nbytes / 2**20:.1f} MiB)"
