"""One forward call, from what the caller gives to what the caller gets."""

import numpy as np

from . import reference
from ._arrays import as_float32, as_integers, as_offsets
from ._scalars import as_whole
from .context import current
from .dataflow import stream_axes, stream_of
from .editing import Edits, Place
from .plan import available_memory
from .state import State, exclusive
from .trace import Trace, matches

SMALL = 64 << 20  # bytes: a result below this is not worth asking the machine about

__all__ = ["Call", "attention_probs", "joined_stream", "refuse_what_does_not_fit", "tap_names"]


def joined_stream(parts):
    """Arrays [T, ...] of `stream_of` as `Model.forward` takes and gives them: the one, or [T, parts, D]."""
    return parts[0] if len(parts) == 1 else np.stack(parts, axis=1)


class Call:
    """One forward call: its sequences in packed form, and the way back to the caller's form."""

    def __init__(self, model, tokens, *, offsets=None, logits="all", state=None, embeds=None, start=None, stop=None):
        self.model = model
        self.vocab = model.config.vocab_size
        self.start, self.stop = self._layers(start, stop, embeds)
        self.embeds, tokens, rows = self._embeds(embeds, tokens)
        self.form, self.ids, self.offsets = self._pack(tokens, offsets)
        self.T, self.N = len(self.ids), len(self.offsets) - 1
        if self.embeds is not None:
            self._check_rows(rows)
            self.embeds = as_float32(self.embeds, "embeds", (self.T, *self._tail()))
        self.states = self._states(state)
        self.position = self._positions()  # before the call
        self.rows = self._rows(logits)
        taps = model._taps
        self.table = taps if self.whole else {name: taps[name] for name in taps if self._is_made(name)}
        self._refuse_too_many()

    # ---- which layers, from what ----

    @property
    def whole(self):
        """Whether all layers are run, so that there are logits."""
        return self.start == 0 and self.stop == self.model.config.n_layers

    @property
    def headless(self):
        """Whether the call ends before the last layer: the residual stream is its value."""
        return self.stop < self.model.config.n_layers

    def _layers(self, start, stop, embeds):
        n = self.model.config.n_layers
        start = 0 if start is None else as_whole(start, "start", "an int, or None")
        stop = n if stop is None else as_whole(stop, "stop", "an int, or None")
        if not (0 <= start < stop <= n or start == stop == n):
            raise ValueError(f"start is {start} and stop {stop}; 0 <= start < stop <= {n} layers must hold, or both be "
                             f"{n}: the final norm and the head alone")
        if start and embeds is None:
            raise ValueError(f"start is {start}; embeds must then be the residual stream that enters layer {start}")
        return start, stop

    def _embeds(self, embeds, tokens):
        """The rows that enter layer `start`, packed; the tokens, else ids that stand for them; rows of each sequence.

        Rows [T, D] are of no sequence in particular: None.
        """
        if embeds is None:
            if tokens is None:
                raise TypeError("tokens is None; it may be only where embeds are given")
            return None, tokens, None
        self.nameless, tail = tokens is None, self._tail()
        axes = 1 + len(tail)
        if isinstance(embeds, (list, tuple)) and len(embeds) and np.ndim(embeds[0]) == axes:
            parts = [as_float32(e, f"embeds[{i}]", ("T", *tail)) for i, e in enumerate(embeds)]
            ids = [np.zeros(len(e), np.int32) for e in parts] if tokens is None else tokens
            return np.concatenate(parts), ids, [len(e) for e in parts]
        embeds = as_float32(embeds, "embeds", ("T", *tail), ("B", "T", *tail))
        ids = np.zeros(embeds.shape[:-len(tail)], np.int32) if tokens is None else tokens
        return embeds.reshape(-1, *tail), ids, None if embeds.ndim == axes else [embeds.shape[1]] * len(embeds)

    def _tail(self):
        """The axes of a token's part of the stream that enters layer `start`."""
        c = self.model.config
        n = len(stream_of(c, self.start))
        if n > 1:
            return n, c.hidden_size
        return stream_axes(c) if self.start else (c.hidden_size,)

    def _check_rows(self, rows):
        """ValueError where the rows are cut into other sequences than the tokens."""
        if rows is None:
            return
        if len(rows) != self.N:
            raise ValueError(f"embeds has {len(rows)} sequences and tokens {self.N}; they must have as many")
        for i, (n, length) in enumerate(zip(rows, np.diff(self.offsets).tolist(), strict=True)):
            if n != length:
                raise ValueError(f"embeds[{i}] has {n} rows; it must have {length}, one for each token of its sequence")

    def _is_made(self, name):
        if name.startswith("layers."):
            return self.start <= int(name.split(".")[1]) < self.stop
        return not self.headless if name in ("output_res", "collapsed", "norm") else self.start == 0

    # ---- tokens, states, rows ----

    def _pack(self, tokens, offsets):
        if isinstance(tokens, str) or (isinstance(tokens, (list, tuple)) and tokens and isinstance(tokens[0], str)):
            raise TypeError("tokens is text; give ids: model.tokenizer.encode(text)")
        nested = isinstance(tokens, (list, tuple)) and len(tokens) > 0 and np.ndim(tokens[0]) == 1
        if nested and offsets is None:
            parts = [as_integers(t, f"tokens[{i}]", ("T",), low=0, high=self.vocab) for i, t in enumerate(tokens)]
            ends = np.cumsum([0] + [len(p) for p in parts]).astype(np.int64)
            return "list", np.concatenate(parts).astype(np.int32), ends
        ids = as_integers(tokens, "tokens", ("T",), ("B", "T"), low=0, high=self.vocab)
        if ids.ndim == 2:
            if offsets is not None:
                raise ValueError("tokens is [B, T] and offsets are given; offsets need tokens [T]")
            B, T = self.shape = ids.shape
            return "batch", ids.reshape(-1), np.arange(B + 1, dtype=np.int64) * T
        return ("single" if offsets is None else "packed"), ids, as_offsets(offsets, len(ids))

    def _states(self, state):
        if state is not None and not self.whole:
            raise ValueError(f"state is given and only layers {self.start} to {self.stop - 1} are run; a state moves "
                             "on through all of them")
        if state is None:
            return None  # made when the call runs
        states = list(state) if isinstance(state, (list, tuple)) else [state]
        if len(states) != self.N:
            raise ValueError(f"state has {len(states)} states; it must have one for each of {self.N} sequences")
        for i, s in enumerate(states):
            if not isinstance(s, State):
                raise TypeError(f"state[{i}] is a {type(s).__name__}; it must be a State")
        return states

    def _positions(self):
        return [s.position for s in self.states] if self.states else [0] * self.N

    def _rows(self, logits):
        self.which = logits if isinstance(logits, str) else "rows"
        if self.which == "all":
            return np.arange(self.T, dtype=np.int64)
        if self.which == "none":
            return np.zeros(0, np.int64)
        if self.which == "last":
            empty = np.flatnonzero(np.diff(self.offsets) == 0)
            if empty.size:
                raise ValueError(f"tokens: sequence {empty[0]} is empty; logits='last' needs a token in each")
            return self.offsets[1:] - 1
        if isinstance(logits, str):
            raise ValueError(f"logits is {logits!r}; it must be 'all', 'last', 'none' or rows")
        rows = as_integers(logits, "logits", ("n",), dtype=np.int64, low=0, high=self.T)
        if (np.diff(rows) <= 0).any():
            raise ValueError("logits: rows must rise")
        return rows

    def _refuse_too_many(self):
        if not self.headless:
            refuse_what_does_not_fit(len(self.rows) * self.vocab * 4,
                                     f"logits of {len(self.rows)} tokens x {self.vocab}",
                                     "ask for logits='last' or rows")

    # ---- taps ----

    def names(self):
        """Taps that this call makes, in the order of the dataflow."""
        return tap_names(self.table) + ([] if self.headless else ["logits"])

    def trace(self, patterns, edit, expert_ids, check):
        """Run; the value, and the taps that the globs match."""
        names = matches(self.names(), patterns)
        if "logits" in names and self.which != "all":
            raise ValueError("taps: 'logits' needs logits='all'")
        probs = [name for name in names if name.endswith(".probs")]
        made_of = [name.replace("probs", part) for name in probs for part in ("q", "select")]
        kept = {*names, *made_of} & self.table.keys()
        self._refuse_probs(probs)
        arrays = {n: np.empty((self.T, *self.table[n][2]), self.table[n][3]) for n in self.table if n in kept}
        value = self.run(arrays, edit, expert_ids, check)
        arrays["logits"] = self.values
        for name in probs:
            arrays[name] = attention_probs(self.model, self.states[0], name, arrays[name.replace("probs", "q")],
                                           arrays.get(name.replace("probs", "select")))
        return value, Trace({name: arrays[name] for name in names}, self.meta())

    def _refuse_probs(self, names):
        if not names:
            return
        if self.N != 1:
            raise ValueError(f"taps: {names[0]} is of one sequence; {self.N} are given")
        c, S = self.model.config, self.T + (self.states[0].position if self.states else 0)
        H = sum(c.mla_heads if name.endswith("mla.probs") else c.attn_heads for name in names)
        refuse_what_does_not_fit(self.T * H * S * 4, f"probs of {self.T} x {H} x {S}, heads of all layers,",
                                 "ask for fewer tokens, behind a state")

    # ---- run ----

    def run(self, arrays, edit=None, expert_ids=None, check=None):
        """The call itself: fills the arrays of taps, moves the states on, gives the value in the caller's form."""
        if check not in (None, "finite"):
            raise ValueError(f"check is {check!r}; it must be None or 'finite'")
        if self.model._checkpoint is not None:
            self.model._checkpoint.check_unchanged()
        if self.states is None:
            self.states = self.model.new_state(self.N)
        with exclusive("forward", *self.states):
            self.position = self._positions()
            return self._run(arrays, edit, expert_ids, check)

    def _run(self, arrays, edit, expert_ids, check):
        model, n_logits = self.model, 0 if self.headless else len(self.rows)
        edits = self.edits(edit, n_logits)
        if self.headless and len(self.rows):
            leaving = [tap for tap in stream_of(model.config, self.stop) if tap in self.table]
            axes = stream_axes(model.config)
            arrays = {**{tap: np.empty((self.T, *axes), np.float32) for tap in leaving}, **arrays}
        embeds = self.embeds
        if embeds is not None and model.config.attn_res_block and embeds.ndim > 2:
            embeds = np.ascontiguousarray(embeds.swapaxes(0, 1))  # as C takes them
        taps = [(*self.table[n][:2], a) for n, a in arrays.items()] or None
        self.done = np.zeros(self.N, np.int64)
        self.values = np.empty((n_logits, self.vocab), np.float32)
        try:
            model._core.forward(
                current(model.ctx)._core, [s._core for s in self.states], self.ids, self.offsets, self.T, self.values,
                self.rows[:n_logits], n_logits, taps, self.experts(expert_ids), int(check == "finite"), 0, self.done,
                edits.places if edits else None, edits.rows if edits else None, embeds, self.start, self.stop,
            )
        except ValueError as error:
            if "must be numbers" not in str(error):
                raise
            raise ValueError(f'{error}; check="finite" names the first tap that is not finite, '
                             "`kimi-linear inspect --check` the weights") from None
        finally:
            self._tell_states()
        if self.headless:
            self.values = self._leaving(arrays)
        elif edits:
            self.values = edits.logits(self.values)
        return self._form(self.values)

    def _leaving(self, arrays):
        """The stream behind layer stop-1, of the rows that are asked for."""
        c = self.model.config
        names, axes = stream_of(c, self.stop), stream_axes(c)
        if not len(self.rows):
            return joined_stream([np.empty((0, *axes), np.float32)] * len(names))
        entered = {}
        if self.start and c.attn_res_block:
            parts = np.moveaxis(self.embeds.reshape(self.T, -1, *axes), 1, 0)
            entered = dict(zip(stream_of(c, self.start), parts))
        return joined_stream([(arrays[tap] if tap in arrays else entered[tap])[self.rows] for tap in names])

    def edits(self, edit, n_logits):
        if edit is None or (hasattr(edit, "items") and not edit):
            return None
        lengths = np.diff(self.offsets)
        first = np.asarray(self.position, np.int64) - self.offsets[:-1]
        place = Place(np.repeat(np.arange(self.N), lengths), np.arange(self.T) + np.repeat(first, lengths))
        return Edits(self.table, self.model.config.n_experts, self.T, n_logits, self.vocab, edit, place,
                     self.rows[:n_logits])

    def _tell_states(self):
        """Each state keeps the ids that it has read; -1 stands for a row of embeds that has none."""
        for state, begin, n in zip(self.states, self.offsets[:-1], self.done, strict=True):
            nameless = self.embeds is not None and self.nameless
            state._append([-1] * int(n) if nameless else self.ids[begin : begin + n].tolist())

    def experts(self, expert_ids):
        if expert_ids is None:
            return None
        if not hasattr(expert_ids, "items"):
            raise TypeError(f"expert_ids is a {type(expert_ids).__name__}; it must be a dict from layer to ids [T, k]")
        given = []
        c = self.model.config
        for layer, ids in expert_ids.items():
            if f"layers.{layer}.moe.ids" not in self.table:
                layers = [i for i, spec in enumerate(self.model.config.layers) if spec.ffn == "moe"]
                raise ValueError(f"expert_ids has the key {layer!r}; it must be a layer with a mixture of experts, one "
                                 f"of {layers}")
            _, tap, shape, _ = self.model._taps[f"layers.{layer}.moe.ids"]
            a = as_integers(ids, f"expert_ids[{layer}]", (self.T, *shape), low=0, high=c.n_experts)
            given.append((layer, tap, np.sort(a, axis=-1)))
        return given

    def _form(self, values):
        if self.which == "none":
            return None
        if self.which == "rows" or self.form == "packed":
            return values
        if self.which == "last":
            return values[0] if self.form == "single" else list(values) if self.form == "list" else values
        if self.form == "single":
            return values
        if self.form == "batch":
            return values.reshape(*self.shape, values.shape[-1])
        return [values[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]

    def meta(self):
        return {
            "model": self.model.name, "tokens": self.ids.tolist(), "offsets": self.offsets.tolist(),
            "position": self.position, "source": "kimi_linear", "dtype": "float32",
            "activations": self.model.activations,
        }


def tap_names(table):
    """Names of a table of taps, with those that are derived from them."""
    names = []
    for name in table:
        if name.endswith((".mla.o", ".attn.o")):
            names.append(name[:-1] + "probs")
        names.append(name)
    return names


def refuse_what_does_not_fit(n_bytes, what, instead):
    """MemoryError before work starts, where a result is larger than the memory that is free."""
    if n_bytes < SMALL:
        return
    free = available_memory()
    if free is not None and n_bytes > free:
        raise MemoryError(f"{what} are {n_bytes / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; {instead}")


def attention_probs(model, state, name, q, select=None):
    """What each token of a call attends to: softmax of its scores over all positions of the sequence.

    MLA: p[t, h, s] = softmax_s(scale (q_nope[t, h] . w_uk[h] latent[s] + q_rope[t, h] . k_shared[s])), s <= t; gated
    attention: softmax_s(scale q[t, h] . k[s, h // (H/Hkv)]). In float64, rounded once. Source: DeepSeek-V2,
    arXiv:2405.04434, section 2.1.

    Parameters
    ----------
    model : Model
    state : State
        After the call.
    name : str
        ``layers.<i>.mla.probs`` or ``layers.<i>.attn.probs``.
    q : (T, H, K) float32
        The tap ``mla.q``, or ``attn.q``.
    select : (T, W) int32, optional
        What each token attends to, as `kl.ops.latent_attention` takes it.

    Returns
    -------
    p : (T, H, S) float32
        S positions; 0 behind the token's own, and for what it does not select.
    """
    keys, scale = (_mla_keys if name.endswith("mla.probs") else _attn_keys)(model, state, name)
    T, S = len(q), keys.shape[1]
    attended = _attended(T, S, select)
    some, p = attended.any(-1), np.zeros((T, q.shape[1], S), np.float32)
    for h in range(q.shape[1]):
        scores = scale * reference.f64(q[:, h]) @ keys[h * len(keys) // q.shape[1]].T
        scores[~attended] = -np.inf
        p[some, h] = reference.softmax(scores[some])
    return p


def _attended(T, S, select=None):
    """Which of S positions each of the last T attends to, [T, S]: all up to its own, or those that it selects."""
    attended = np.zeros((T, S), bool)
    for row, positions in zip(attended, reference.seen_by(T, S, select), strict=True):
        row[positions] = True
    return attended


def _mla_keys(model, state, name):
    """(keys [H, S, nope + rope], scale)."""
    c, layer = model.config, name.removesuffix("mla.probs")
    latent = reference.f64(state.widened(f"{layer}mla.latent_cache"))
    k_shared = reference.f64(state.widened(f"{layer}mla.k_shared_cache"))
    kv_b = reference.f64(model.weights[f"model.{layer}self_attn.kv_b_proj.weight"])
    w_uk = kv_b.reshape(c.mla_heads, c.nope_dim + c.v_head_dim, c.kv_rank)[:, : c.nope_dim]
    shared = np.broadcast_to(k_shared, (c.mla_heads, *k_shared.shape))
    return np.concatenate([latent @ w_uk.swapaxes(1, 2), shared], axis=-1), (c.nope_dim + c.rope_dim) ** -0.5


def _attn_keys(model, state, name):
    """(keys [Hkv, S, K], scale)."""
    k = reference.f64(state.widened(f"{name.removesuffix('probs')}k_cache"))
    return k.swapaxes(0, 1), model.config.attn_head_dim ** -0.5
