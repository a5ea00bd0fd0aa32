"""The state of one sequence: what the model keeps of the tokens it has read."""

import threading
from contextlib import contextmanager

import numpy as np

from . import _core, _engine
from ._arrays import as_array, check_shape, contiguous
from ._names import near
from ._scalars import as_whole, at_least
from .context import current

__all__ = ["Snapshot", "State", "exclusive"]

_DELTA = {"state": 0, "q_history": 1, "k_history": 2, "v_history": 3}
_OF_MIXER = {  # the parts of a layer, by the number that C has for them
    "kda": _DELTA, "gdn": _DELTA,
    "mla": {"latent_cache": 4, "k_shared_cache": 5}, "attn": {"k_cache": 6, "v_cache": 7},
}
_INDEX = {"index_k_cache": 8, "index_gate_cache": 9, "pool_cache": 10}  # of MLA with an indexer
_CACHES = {4, 5, 6, 7, 8, 9, 10}  # what grows
_KEEP = 4  # checkpoints, where only their distance is given


class Snapshot:
    """A copy in memory of a state, made by ``state.snapshot()`` and put back by ``state.restore(snapshot)``.

    Attributes
    ----------
    position : int
    nbytes : int
        Its own memory: one copy of the state, and of its checkpoints.
    """

    def __init__(self, core, tokens):
        self._core, self._tokens = core, tokens

    @property
    def position(self):
        """Tokens that the state had read."""
        return self._core.position

    @property
    def nbytes(self):
        """Bytes held."""
        return self._core.bytes

    def __copy__(self):
        return self  # it never changes

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        raise TypeError("a Snapshot is of its model and is not pickled; restore it, and state.save(path) writes it")

    def __repr__(self):
        return f"Snapshot(position={self.position}, {self.nbytes / 2**20:.1f} MiB)"


def _parts(config, layer):
    """The parts of a layer, by the number that C has for them."""
    indexed = layer.mixer == "mla" and config.index_heads > 0
    return _OF_MIXER[layer.mixer] | (_INDEX if indexed else {})


class State:
    """What a model keeps of one sequence; made by ``model.new_state()``, moved on by ``model.forward(state=)``.

    A KDA layer keeps a delta state ``layers.i.kda.state`` [H, K, V] and three convolution histories
    ``layers.i.kda.q_history`` (``k_``, ``v_``) [W-1, H*K], oldest first: their size does not grow. A GDN layer has
    the same under ``gdn``: [Hv, K, V], [W-1, Hk*K] twice, [W-1, Hv*V]. An MLA layer keeps a row for each token:
    ``layers.i.mla.latent_cache`` [position, R], ``layers.i.mla.k_shared_cache`` [position, P], in the cache's type;
    with an indexer also its keys and gates ``index_k_cache``, ``index_gate_cache`` [position, D_i], and a key for each
    whole pool, ``pool_cache`` [position // pool, D_i]; a layer of gated attention ``layers.i.attn.k_cache`` and
    ``v_cache`` [position, Hkv, K]. Of a q8_0 cache these are the rows' blocks as they lie, uint8 [position, bytes], but
    for what is behind the latent and of whose width 32 is no divisor, such as a shared key: that is float16.

    ``state[name]`` is a copy of an array; ``state[name] = array`` replaces it; ``state.widened(name)`` are its numbers.
    What each verb costs: docs/state.md.

    Attributes
    ----------
    tokens : list of int
        Every token read, in order; -1 for a row of ``embeds`` that has no id.
    cache : {"float32", "float16", "q8_0"}
    checkpoints_every, keep : int
        0 where the state keeps no checkpoints.
    """

    def __init__(self, model, *, cache="float32", context=0, checkpoints_every=None, keep=0, ctx=None):
        every, keep = _checkpoints(checkpoints_every, keep)
        self._config = model.config
        self._parts = {f"layers.{i}.{layer.mixer}.{part}": (i, number) for i, layer in enumerate(model.config.layers)
                       for part, number in _parts(model.config, layer).items()}
        self._model = model
        self._owner = model._core  # these weights: replacing one makes another
        self._tensors = model._tensors
        self._context = as_whole(context, "context")
        self.cache = cache
        self.checkpoints_every, self.keep = every, keep
        self.tokens = []
        self._lock = threading.RLock()  # over the core and the tokens, which move on one after the other
        self._core = self._new_core(self._context, ctx)

    def positions_of_row(self, name):
        """Positions that share a row of an array that grows: 1, but of the keys of pools."""
        return self._config.index_pool if name.endswith("pool_cache") else 1

    def _new_core(self, context, ctx=None):
        return _core.State(self._ctx(ctx)._core, self._owner, _engine.cache_type(self.cache), context,
                           self.checkpoints_every, self.keep)

    def _ctx(self, ctx=None):
        """The context of a call: the model's, of which arrays on a device have need."""
        return current(ctx or self._model.ctx)

    def _append(self, ids):
        """Told by forward: the ids that it has read."""
        self.tokens.extend(ids)

    @property
    def position(self):
        """Tokens read so far."""
        return self._core.position

    @property
    def nbytes(self):
        """Bytes now held."""
        return self._core.bytes

    @property
    def checkpoints(self):
        """Positions of the kept checkpoints, oldest first."""
        return self._core.checkpoints

    # ---- verbs ----

    def reset(self):
        """Forget everything: an empty sequence again, its memory kept."""
        with exclusive("reset", self):
            self._core.reset(self._ctx()._core)
            self.tokens = []

    def checkpoint(self):
        """Keep a checkpoint here, besides those that come by themselves.

        Raises
        ------
        ValueError
            If the state was made to keep none.
        """
        self._core.checkpoint(self._ctx()._core)

    def fork(self):
        """An independent copy, checkpoints included; costs one copy of the state."""
        copy = object.__new__(State)
        with exclusive("fork", self):
            copy.__dict__.update(self.__dict__, tokens=list(self.tokens), _core=self._copy(self._context),
                                 _lock=threading.RLock())
        return copy

    __copy__ = fork

    def __deepcopy__(self, memo):
        return self.fork()  # over the same model

    def __reduce__(self):
        raise TypeError("a State is of its model and is not pickled; save(path) writes it and model.load_state(path) "
                        "reads it")

    def snapshot(self):
        """A copy in memory, for `restore`; costs one copy of the state."""
        with exclusive("snapshot", self):
            return Snapshot(self._copy(0), list(self.tokens))

    def _copy(self, context):
        core = self._new_core(context)
        core.copy_from(self._ctx()._core, self._core)
        return core

    def restore(self, snapshot):
        """Go back (or on) to a snapshot: of this state, of a fork, or of any state of the same model and cache type.

        The snapshot stays as it is, to be restored again. Checkpoints become those of the snapshot.

        Raises
        ------
        TypeError
            If it is no Snapshot.
        ValueError
            If it is of another model or cache type, or has read more than this state's context; nothing changes.
        """
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"snapshot is a {type(snapshot).__name__}; it must be a Snapshot of state.snapshot()")
        with exclusive("restore", self):
            self._core.copy_from(self._ctx()._core, snapshot._core)
            self.tokens = list(snapshot._tokens)

    def truncate(self, n):
        """Go back to the first `n` tokens.

        The state goes back to its newest checkpoint at or before `n`, and the tokens in between are read again, in one
        call. The present position is free; 0 empties the state, and is itself a place to go back to as long as no
        checkpoint has been given up for a newer one.

        Parameters
        ----------
        n : int
            0 to `position`.

        Raises
        ------
        ValueError
            If `n` is outside that, before the oldest checkpoint (which is named), or if rows between the checkpoint and
            `n` were embeds without ids; nothing changes then.
        """
        n = as_whole(n, "n")
        with exclusive("truncate", self):
            self._refuse_nameless(n)
            at = self._core.truncate(self._ctx()._core, n)
            between, self.tokens = self.tokens[at:n], self.tokens[:at]
            if between:
                self._model.forward(np.array(between, np.int32), state=self, logits="none")

    def _refuse_nameless(self, n):
        first = max((at for at in self.checkpoints if at <= n), default=0)
        if 0 < n < self.position and -1 in self.tokens[first:n]:
            at = first + self.tokens[first:n].index(-1)
            raise ValueError(f"truncate: n is {n}; row {at} was read as embeds without an id and cannot be read again")

    def save(self, path):
        """Write the state to a file; `load` gives it back in any process, over the same model.

        The file is safetensors: arrays under their names, those of the checkpoints, ``tokens``, and a manifest with
        a checksum each. The file takes its name when it is whole.

        Raises
        ------
        OSError
            If it would not fit on its disk, or cannot be written; nothing is left under its name.
        """
        from .statefile import save

        with exclusive("save", self):
            save(self, path)

    @classmethod
    def load(cls, path, model, *, context=None, checkpoints_every=None, keep=0):
        """The state that `save` wrote, as a new State of `model`.

        Where checkpoints are asked for, the newest is at the position loaded; of those in the file the newest that
        `keep` has room for stay. `truncate` does not go back behind the oldest, but to 0.

        Parameters
        ----------
        path : str or path
        model : Model
            With the weights that the state was made with.
        context, checkpoints_every, keep
            As for ``model.new_state``.

        Raises
        ------
        FormatError
            If the file is no state, damaged (the array is named, or the header), or of a newer version.
        ValueError
            If it is of another model, or longer than `context`.
        """
        from .statefile import load

        return load(path, model, context=context or 0, checkpoints_every=checkpoints_every, keep=keep)

    # ---- arrays ----

    def keys(self):
        """Names of the arrays, in the order of the layers."""
        return list(self._parts)

    _ipython_key_completions_ = keys

    def fixed(self):
        """Names of the arrays whose size does not grow: those of delta nets, which checkpoints keep."""
        return [name for name, (_, number) in self._parts.items() if number not in _CACHES]

    def __iter__(self):
        return iter(self._parts)

    def __len__(self):
        return len(self._parts)

    def __contains__(self, name):
        return name in self._parts

    def _part(self, name):
        """(layer, number of the part) of an array."""
        if name not in self._parts:
            raise KeyError(f"{name!r} is no array of this state; near it are {', '.join(near(name, self))}")
        return self._parts[name]

    def _place(self, name):
        layer, part = self._part(name)
        shape, type_id = self._core.shape(self._ctx()._core, layer, part)
        if type_id == 8:
            return layer, part, (shape[0], shape[1] // 32 * 34), np.uint8
        if self._config.layers[layer].mixer == "attn":
            shape = (shape[0], self._config.attn_kv_heads, self._config.attn_head_dim)
        return layer, part, shape, np.float16 if type_id == 1 else np.float32

    def __getitem__(self, name):
        layer, part, shape, dtype = self._place(name)
        a = np.empty(shape, dtype)
        self._core.read(self._ctx()._core, layer, part, a)
        return a

    def widened(self, name):
        """The numbers of an array, as float32: those of a cache in float16 or q8_0 widened, exactly."""
        a = self[name]
        if a.dtype != np.uint8:
            return a.astype(np.float32)
        blocks = a.reshape(len(a), -1, 34)
        scales, q = blocks[:, :, :2].copy().view(np.float16).astype(np.float32), blocks[:, :, 2:].view(np.int8)
        rows = (scales * q).reshape(len(a), -1)
        c = self._config
        attends = c.layers[self._part(name)[0]].mixer == "attn"
        return rows.reshape(len(a), c.attn_kv_heads, c.attn_head_dim) if attends else rows

    def _of_checkpoint(self, i):
        """(name, copy of the array) of each array that checkpoint `i` holds, 0 the oldest."""
        for name in self.fixed():
            layer, part, shape, dtype = self._place(name)
            a = np.empty(shape, dtype)
            self._core.read(self._ctx()._core, layer, part, a, i)
            yield name, a

    def __setitem__(self, name, value):
        layer, part, shape, dtype = self._place(name)
        a = as_array(value, name)
        if a.dtype != dtype:
            raise TypeError(f"{name} is {a.dtype}; it must be {np.dtype(dtype)}")
        check_shape(a, name, shape)
        self._core.write(self._ctx()._core, layer, part, contiguous(a))

    def items(self):
        """(name, copy of the array) of each."""
        return ((name, self[name]) for name in self)

    def values(self):
        """A copy of each array."""
        return (self[name] for name in self)

    def __repr__(self):
        return f"State(position={self.position}, cache={self.cache!r}, {self.nbytes / 2**20:.1f} MiB)"


@contextmanager
def exclusive(verb, *states):
    """Hold states for a verb; ValueError where another thread has one of them in a call."""
    held = []
    try:
        for i, state in enumerate(states):
            if not state._lock.acquire(blocking=False):
                which = f"state {i}" if len(states) > 1 else "the state"
                raise ValueError(f"{verb}: {which} is in use by another call")
            held.append(state)
        yield
    finally:
        for state in held:
            state._lock.release()


def _checkpoints(every, keep):
    """(every, keep), both 0 where there are none."""
    keep = at_least(keep, 0, "keep")
    if every is None:
        if keep:
            raise ValueError(f"keep is {keep}; checkpoints_every must then say how many tokens apart they are")
        return 0, 0
    return at_least(every, 1, "checkpoints_every", "None, or an int"), keep or _KEEP
