"""The whole model in float64 NumPy, layer by layer, with every tap.

Sources: arXiv:2510.26692, section 4 (Kimi Linear); arXiv:2412.06464 (gated delta net); Hugging Face transformers,
models qwen3_next and qwen3_5 (gated attention, the shared expert's gate) and glm5_next (hyper-connections, sparse
latent attention); llama.cpp's and mlx-lm's Kimi K3 (attention residuals, experts on a latent, SiTU).

Weights come from any mapping of canonical names (``Config.weight_shapes``) to arrays of any float type. They
are fetched and widened where they are used and dropped after, so that the largest matrix, not the model, sets
the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from . import reference as op
from ._arrays import as_array, as_integers
from .config import Config, layer_pattern
from .dataflow import begins_block, nodes
from .editing import Place, takes_place
from .trace import matches, on_request
from .weight_shapes import (
    FFN_SCORE,
    FFN_STREAMS,
    LATENT_DOWN,
    LATENT_NORM,
    LATENT_UP,
    MIXER_SCORE,
    MIXER_STREAMS,
    MOE_NAMES,
    OUTPUT_SCORE,
    ROUTER_BIAS,
    SHARED_GATE,
    attn_query_rows,
    gdn_channels,
    gdn_inputs,
    score_weight,
)

Tap = Callable[[str, np.ndarray], np.ndarray]


@dataclass
class ReferenceResult:
    """What a forward pass gives: logits [T, vocab], taps by name, state arrays after the last token."""

    logits: np.ndarray
    taps: dict[str, np.ndarray] = field(default_factory=dict)
    state: dict[str, np.ndarray] = field(default_factory=dict)

    def __repr__(self):
        return f"ReferenceResult({len(self.logits)} tokens, {len(self.taps)} taps, {len(self.state)} state arrays)"


class Recorder:
    """Receives each intermediate by name: changes it where `edits` says so, keeps it where `taps` has it.

    taps : names; None keeps all but those on request
    edits : mapping from name to its changes in order: arrays of its shape, or functions from the array to one
    position : of the first token in its sequence, for functions of two arguments; None where it is not known
    """

    def __init__(self, taps: Collection[str] | None = None, edits: Mapping[str, list] | None = None,
                 position: int | None = 0):
        self.taps = taps
        self.edits = edits or {}
        self.position = position
        self.kept: dict[str, np.ndarray] = {}

    def __call__(self, name: str, x: np.ndarray) -> np.ndarray:
        for change in self.edits.get(name, ()):
            new = as_array(self._called(change, name, x) if callable(change) else change, f"edit of {name}")
            if new.shape != x.shape:
                raise ValueError(f"edit of {name} has shape {new.shape}; it must have {x.shape}")
            x = new.astype(x.dtype)
        if not on_request(name) if self.taps is None else name in self.taps:
            self.kept[name] = x
        return x

    def _called(self, function, name, x):
        if not takes_place(function):
            return function(x)
        if self.position is None:
            raise ValueError(f"edit of {name} takes a place, and a state without attention does not tell how many "
                             "tokens it has read")
        return function(x, Place(np.zeros(len(x), np.int64), self.position + np.arange(len(x))))


def _no_tap(name: str, x: np.ndarray) -> np.ndarray:
    return x


class ReferenceModel:
    """The model that a Config describes, in float64.

    Parameters
    ----------
    config : Config
    weights : mapping from canonical name to array
        A_log [H] and convolution taps [H * K, W], as ``config.weight_shapes()`` gives them. May be lazy.

    Raises
    ------
    ValueError
        If weights are missing; the message names them.
    """

    def __init__(self, config: Config, weights: Mapping[str, np.ndarray]):
        missing = [name for name in config.weight_shapes() if name not in weights]
        if missing:
            raise ValueError(f"weights lacks {len(missing)} tensors: {', '.join(missing[:8])}"
                             + (", ..." if len(missing) > 8 else ""))
        self.config = config
        self.weights = weights

    def __repr__(self):
        c = self.config
        return f"ReferenceModel({layer_pattern(c)}, hidden {c.hidden_size}, vocabulary {c.vocab_size})"

    def forward(self, tokens, *, taps=None, state=None, offsets=None, edit=None,
                expert_ids=None) -> ReferenceResult:
        """Run tokens [T] of one sequence, from the start or behind a carried state.

        Parameters
        ----------
        tokens : (T,) integers
        taps : None, a glob or several: the intermediates to keep
        state : the `state` of an earlier result; it is not changed
        offsets : None or [0, T]
        edit : mapping from tap (or glob) to an array or a function: intermediates to replace, as for `Model.forward`.
            A function is called once, with all rows.
        expert_ids : mapping from layer to ids [T, k]
            Experts to use instead of the router's choice; their weights are the router's for them.

        Raises
        ------
        ValueError
            A glob that matches no tap, an id outside the vocabulary, experts for a layer without, a wrong shape.
        """
        tokens = as_integers(tokens, "tokens", ("T",), low=0, high=self.config.vocab_size)
        if offsets is not None and [int(x) for x in offsets] != [0, len(tokens)]:
            raise ValueError(f"offsets is {list(offsets)}; the reference runs one sequence a call, "
                             f"[0, {len(tokens)}]")
        state, experts = dict(state or {}), expert_ids or {}
        for i in experts:
            if i not in range(self.config.n_layers) or self.config.layers[i].ffn != "moe":
                raise ValueError(f"expert_ids has the key {i!r}; it must be a layer with a mixture of experts")
        tap = self._recorder(taps, edit, state)
        h, snapshots = self.embed(tokens, tap), []
        for i in range(self.config.n_layers):
            h = self.layer(i, h, state, tap, experts.get(i), snapshots)
        return ReferenceResult(self.head(h, tap, snapshots), tap.kept, state)

    def _recorder(self, taps, edit, state) -> Recorder:
        """What keeps and changes the taps that the globs match."""
        names = [node.tap for node in nodes(self.config) if not node.tap.endswith("_cache")]
        names += [name.replace("logits", "scores") for name in names if name.endswith("moe.logits")]
        edits: dict[str, list] = {}
        for pattern, change in (edit or {}).items():
            for name in matches(names, pattern, "edit"):
                edits.setdefault(name, []).append(change)
        position = next((len(x) for name, x in state.items() if name.endswith("_cache")), None if state else 0)
        return Recorder(() if taps is None else matches(names, taps), edits, position)

    def embed(self, tokens, tap: Tap = _no_tap) -> np.ndarray:
        """Rows of the embedding: [T] -> [T, D], or the streams of hyper-connections, [T, n, D]."""
        return self.streams(tap("embed", op.embedding(tokens, self.weights["model.embed_tokens.weight"])), tap)

    def streams(self, x, tap: Tap = _no_tap) -> np.ndarray:
        """What enters layer 0, of rows [T, D] of the embedding."""
        n = self.config.streams
        return tap("streams", op.mhc_expand(x, n=n)) if n else x

    def head(self, h, tap: Tap = _no_tap, snapshots=()) -> np.ndarray:
        """Final norm and logits: [T, D] -> [T, vocab]. `snapshots` are those of attention residuals."""
        return self.logits(self.last_norm(h, tap, snapshots), tap)

    def last_norm(self, h, tap: Tap = _no_tap, snapshots=()) -> np.ndarray:
        """The first half of `head`: [T, D] -> [T, D]."""
        x = self._residuals("output_res", f"model.{OUTPUT_SCORE}", h, snapshots, self.weights.__getitem__, tap)
        if self.config.streams:
            x = tap("collapsed", op.mhc_collapse(x))
        return tap("norm", self._norm(x, self.weights["model.norm.weight"]))

    def logits(self, x, tap: Tap = _no_tap) -> np.ndarray:
        """The second half of `head`: [T, D] -> [T, vocab]."""
        name = "model.embed_tokens.weight" if self.config.tie_embeddings else "lm_head.weight"
        return tap("logits", op.linear(x, self.weights[name]))

    def layer(self, i: int, h, state: dict | None = None, tap: Tap = _no_tap, expert_ids=None,
              snapshots: list | None = None) -> np.ndarray:
        """One layer: h [T, D] -> [T, D], or all streams of hyper-connections, [T, n, D]. `state`, a dict of the
        sequence, is read and brought up to date; so is the list of snapshots of a model with attention residuals, where
        h is what has been added up since the last."""
        spec = self.config.layers[i]
        state, snapshots = {} if state is None else state, [] if snapshots is None else snapshots

        def w(name):
            return self.weights[f"model.layers.{i}.{name}"]

        def named(name, x):
            return tap(f"layers.{i}.{name}", x)

        mixer = {"kda": self._kda, "mla": self._mla, "gdn": self._gdn, "attn": self._attn}[spec.mixer]
        x = self._residuals("attn_res", MIXER_SCORE, h, snapshots, w, named)
        x, added = self._connected("attn_hc", MIXER_STREAMS, x, w, named)
        x = named("attn_norm", self._norm(x, w("input_layernorm.weight")))
        if begins_block(self.config, i):
            snapshots.append(h)
            h = mixer(i, x, w, state, named)
        else:
            h = named("mid", added(h, mixer(i, x, w, state, named)))
        x = self._residuals("ffn_res", FFN_SCORE, h, snapshots, w, named)
        x, added = self._connected("ffn_hc", FFN_STREAMS, x, w, named)
        x = named("ffn_norm", self._norm(x, w("post_attention_layernorm.weight")))
        y = self._dense(x, w, named) if spec.ffn == "dense" else self._moe(x, w, named, expert_ids)
        return named("out", added(h, y))

    def _norm(self, x, w):
        """The norm of layers, queries and keys, and the final one."""
        return op.rms_norm(x, 1 + op.f64(w) if self.config.norm_plus_one else w, eps=self.config.rms_norm_eps)

    def _residuals(self, name, score, h, snapshots, w, tap):
        """What a norm reads: the stream h itself, or its mixture with the snapshots of it."""
        c = self.config
        if not c.attn_res_block:
            return h
        weight = score_weight(w(f"{score}_norm.weight"), w(f"{score}_proj.weight"))
        earlier = np.stack(snapshots) if snapshots else np.empty((0, *h.shape))
        return tap(name, op.attn_res(earlier, h, weight, eps=c.rms_norm_eps))

    def _connected(self, name, weights, h, w, tap):
        """What a block reads of the stream, and how its output joins it: a sum, or hyper-connections."""
        c = self.config
        if not c.streams:
            return h, op.add
        fn, base, scale = (w(f"{weights}_{part}") for part in ("fn", "base", "scale"))
        x, post, comb = op.mhc_pre(h, fn, base, scale, norm_eps=c.rms_norm_eps, eps=c.stream_eps, iters=c.stream_passes)
        x, post, comb = tap(name, x), tap(f"{name}_post", post), tap(f"{name}_comb", comb)
        return x, lambda h, y: op.mhc_post(y, h, post, comb)

    def _kda(self, i, x, w, state, tap):
        """Kimi Delta Attention."""
        c = self.config
        heads, flat = (len(x), c.kda_heads, c.kda_head_dim), (len(x), c.kda_heads * c.kda_head_dim)

        def convolved(s):
            key = f"layers.{i}.kda.{s}_history"
            p = tap(f"kda.{s}_proj", op.linear(x, w(f"self_attn.{s}_proj.weight")))
            y, state[key] = op.short_conv(p, w(f"self_attn.{s}_conv1d.weight"), history=state.get(key))
            return tap(f"kda.{s}_conv", y.reshape(heads))

        q = tap("kda.q", op.l2_norm(convolved("q"), eps=c.l2_eps))
        k = tap("kda.k", op.l2_norm(convolved("k"), eps=c.l2_eps))
        v = convolved("v")

        f = tap("kda.f_a", op.linear(x, w("self_attn.f_a_proj.weight")))
        f = tap("kda.f", op.linear(f, w("self_attn.f_b_proj.weight")).reshape(heads))
        rate = np.exp(op.f64(w("self_attn.A_log")))
        g = tap("kda.g", op.decay_gate(f, rate, w("self_attn.dt_bias"), lower_bound=c.gate_lower_bound))
        b = tap("kda.b", op.linear(x, w("self_attn.b_proj.weight")))
        beta = tap("kda.beta", op.sigmoid(b))

        key = f"layers.{i}.kda.state"
        o, state[key] = op.delta_rule(q, k, v, g, beta, initial_state=state.get(key))
        o = tap("kda.o", o)

        if c.kda_full_rank_gate:
            z = op.linear(x, w("self_attn.g_proj.weight"))
        else:
            z = tap("kda.g_a", op.linear(x, w("self_attn.g_a_proj.weight")))
            z = op.linear(z, w("self_attn.g_b_proj.weight"))
        z = tap("kda.z", z.reshape(heads))
        o = tap("kda.o_norm", op.gated_rms_norm(o, z, w("self_attn.o_norm.weight"), eps=c.rms_norm_eps))
        return tap("kda.out", op.linear(o.reshape(flat), w("self_attn.o_proj.weight")))

    def _mla(self, i, x, w, state, tap):
        """Multi-head latent attention without positions."""
        c = self.config
        T, H, R = len(x), c.mla_heads, c.kv_rank
        if c.q_rank:
            a = tap("mla.q_a", op.linear(x, w("self_attn.q_a_proj.weight")))
            a = tap("mla.q_a_norm", op.rms_norm(a, w("self_attn.q_a_layernorm.weight"), eps=c.latent_eps))
            q = op.linear(a, w("self_attn.q_b_proj.weight"))
        else:
            a = None
            q = op.linear(x, w("self_attn.q_proj.weight"))
        q = tap("mla.q", q.reshape(T, H, c.nope_dim + c.rope_dim))

        kv = op.linear(x, w("self_attn.kv_a_proj_with_mqa.weight"))
        latent, k_shared = tap("mla.latent_raw", kv[:, :R]), tap("mla.k_shared", kv[:, R:])
        latent = tap("mla.latent", op.rms_norm(latent, w("self_attn.kv_a_layernorm.weight"), eps=c.latent_eps))

        latents = _cached(state, f"layers.{i}.mla.latent_cache", latent)
        k_shared = _cached(state, f"layers.{i}.mla.k_shared_cache", k_shared)
        kv_b = op.f64(w("self_attn.kv_b_proj.weight")).reshape(H, c.nope_dim + c.v_head_dim, R)
        w_uk, w_uv = kv_b[:, :c.nope_dim], kv_b[:, c.nope_dim:]
        select = self._select(i, x, a, w, state, tap) if c.index_heads else None
        scale = (c.nope_dim + c.rope_dim) ** -0.5
        o = op.latent_attention(q, latents, k_shared, w_uk, w_uv, scale=scale, select=select)
        o = tap("mla.o", o).reshape(T, H * c.v_head_dim)
        if c.mla_gated:
            gate = tap("mla.gate", op.linear(x, w("self_attn.g_proj.weight")).reshape(T, H, c.v_head_dim))
            o = tap("mla.gated", op.sigmoid_gate(o, gate.reshape(o.shape)).reshape(gate.shape)).reshape(o.shape)
        return tap("mla.out", op.linear(o, w("self_attn.o_proj.weight")))

    def _select(self, i, x, a, w, state, tap):
        """The positions that MLA attends to, by its indexer: x [T, D], a [T, q_rank] -> [T, W]."""
        c, T = self.config, len(x)
        q = tap("mla.index_q", op.linear(a, w("self_attn.indexer.wq_b.weight")).reshape(T, c.index_heads, c.index_dim))
        k = tap("mla.index_k_raw", op.linear(x, w("self_attn.indexer.wk.weight")))
        norm = (w(f"self_attn.indexer.k_norm.{part}") for part in ("weight", "bias"))
        k = tap("mla.index_k", op.layer_norm(k, *norm, eps=c.index_eps))
        gate = tap("mla.index_gate", op.linear(x, w("self_attn.indexer.index_kpool_compress_gate")))
        weights = tap("mla.index_weights", op.linear(x, w("self_attn.indexer.weights_proj.weight")))
        k = _cached(state, f"layers.{i}.mla.index_k_cache", k)
        gate = _cached(state, f"layers.{i}.mla.index_gate_cache", gate)
        keys = op.index_pool(k, gate, w("self_attn.indexer.index_kpool_compress_ape"))
        state[f"layers.{i}.mla.pool_cache"] = keys
        ids = op.index_select(q, keys, weights, topk=c.index_topk, pool=c.index_pool, positions=len(k))
        return tap("mla.select", ids)

    def _gdn(self, i, x, w, state, tap):
        """Gated delta net: one gate a head, key heads shared by value heads."""
        c, T = self.config, len(x)
        keys, values = (T, c.gdn_k_heads, c.gdn_k_dim), (T, c.gdn_v_heads, c.gdn_v_dim)
        flat = (T, c.gdn_v_heads * c.gdn_v_dim)
        inputs, channels = gdn_inputs(c), gdn_channels(c)
        joint = {name: op.linear(x, w(f"linear_attn.{name}")) for name in {name for name, _ in inputs.values()}}

        def projected(part):
            name, rows = inputs[part]
            return joint[name][:, rows]

        def convolved(s, heads):
            key = f"layers.{i}.gdn.{s}_history"
            p = tap(f"gdn.{s}_proj", projected(s))
            y, state[key] = op.short_conv(p, w("linear_attn.conv1d.weight")[channels[s]], history=state.get(key))
            return tap(f"gdn.{s}_conv", y.reshape(heads))

        q = tap("gdn.q", op.l2_norm(convolved("q", keys), eps=c.l2_eps))
        k = tap("gdn.k", op.l2_norm(convolved("k", keys), eps=c.l2_eps))
        v = convolved("v", values)

        rate = np.exp(op.f64(w("linear_attn.A_log")))
        g = tap("gdn.g", op.decay_gate(tap("gdn.a", projected("a")), rate, w("linear_attn.dt_bias")))
        beta = tap("gdn.beta", op.sigmoid(tap("gdn.b", projected("b"))))

        key = f"layers.{i}.gdn.state"
        o, state[key] = op.delta_rule(q, k, v, g, beta, initial_state=state.get(key),
                                      head_map="tiled" if c.gdn_tiled else "grouped")
        o = tap("gdn.o", o)

        z = tap("gdn.z", projected("z").reshape(values))
        o = tap("gdn.o_norm", op.gated_rms_norm(o, z, w("linear_attn.norm.weight"), eps=c.rms_norm_eps,
                                                activation="silu"))
        return tap("gdn.out", op.linear(o.reshape(flat), w("linear_attn.out_proj.weight")))

    def _attn(self, i, x, w, state, tap):
        """Attention with grouped key heads, partly rotated, and a gate on its output."""
        c, T = self.config, len(x)
        queries, keys = (T, c.attn_heads, c.attn_head_dim), (T, c.attn_kv_heads, c.attn_head_dim)
        flat = (T, c.attn_heads * c.attn_head_dim)
        both, rows = op.linear(x, w("self_attn.q_proj.weight")), attn_query_rows(c)
        q = tap("attn.q_proj", both[:, rows["q_proj"]].reshape(queries))
        gate = tap("attn.gate", both[:, rows["gate"]].reshape(queries))
        k = tap("attn.k_proj", op.linear(x, w("self_attn.k_proj.weight")).reshape(keys))
        v = tap("attn.v", op.linear(x, w("self_attn.v_proj.weight")).reshape(keys))
        q = tap("attn.q_norm", self._norm(q, w("self_attn.q_norm.weight")))
        k = tap("attn.k_norm", self._norm(k, w("self_attn.k_norm.weight")))

        k_cache, v_cache = (f"layers.{i}.attn.{s}_cache" for s in "kv")
        turn = dict(positions=len(state.get(k_cache, ())) + np.arange(T), base=c.rope_base, rotary=c.rotary_dim)
        q, k = tap("attn.q", op.rope(q, **turn)), tap("attn.k", op.rope(k, **turn))
        o = op.attention(q, _cached(state, k_cache, k), _cached(state, v_cache, v), scale=c.attn_head_dim ** -0.5)
        o = op.sigmoid_gate(tap("attn.o", o).reshape(flat), gate.reshape(flat))
        o = tap("attn.gated", o.reshape(queries))
        return tap("attn.out", op.linear(o.reshape(flat), w("self_attn.o_proj.weight")))

    def _glu(self, gate, up):
        """The gated activation of all feed-forwards."""
        c = self.config
        return op.swiglu(gate, up, limit=c.swiglu_limit) if c.situ_beta is None else op.situ(
            gate, up, beta=c.situ_beta, linear_beta=c.situ_linear_beta)

    def _dense(self, x, w, tap):
        gate = tap("mlp.gate", op.linear(x, w("mlp.gate_proj.weight")))
        up = tap("mlp.up", op.linear(x, w("mlp.up_proj.weight")))
        act = tap("mlp.act", self._glu(gate, up))
        return tap("mlp.out", op.linear(act, w("mlp.down_proj.weight")))

    def _moe(self, x, w, tap, expert_ids):
        c, names = self.config, MOE_NAMES[self.config.moe_names]
        prefix = names.prefix
        scores = tap("moe.logits", op.linear(x, w(f"{prefix}.gate.weight")))
        function = c.router_function
        own = op.sigmoid(scores) if function == "sigmoid" else op.softmax(scores)
        asked = tap("moe.scores", own)
        if asked is not own:  # edited: they take the place of the logits
            scores, function = asked, "none"
        rule = dict(function=function, renormalise=c.renormalise, scale=c.routed_scale)
        ids, _ = op.route(scores, k=c.experts_per_token, bias=w(f"{prefix}.{ROUTER_BIAS}") if c.router_bias else None,
                          groups=c.n_groups, top_groups=c.top_groups, **rule)
        if expert_ids is not None:
            ids = self._forced(expert_ids, ids)
        ids = np.sort(tap("moe.ids", ids), axis=-1)
        weights = tap("moe.weights", op.route_weights(scores, ids, **rule))

        experts = [_Experts(w, f"{prefix}.experts.{{}}.{n}.weight") for n in names.experts]
        shared = self._shared(x, w, tap, f"{prefix}.{names.shared}") if c.shared_size else None
        if c.shared_gated:
            gate = tap("moe.shared_g", op.linear(x, w(f"{prefix}.{SHARED_GATE}")))
            shared = tap("moe.shared_gated", op.sigmoid_gate(shared, gate))
        act = dict(situ=None if c.situ_beta is None else (c.situ_beta, c.situ_linear_beta), limit=c.swiglu_limit)
        if not c.expert_latent:
            return tap("moe.out", op.moe(x, ids, weights, *experts, shared=shared, **act))
        u = tap("moe.latent", op.linear(x, w(f"{prefix}.{LATENT_DOWN}")))
        y = tap("moe.routed", op.moe(u, ids, weights, *experts, **act))
        if c.expert_latent_norm:
            y = tap("moe.routed_norm", op.rms_norm(y, w(f"{prefix}.{LATENT_NORM}"), eps=c.rms_norm_eps))
        y = op.linear(y, w(f"{prefix}.{LATENT_UP}"))
        if shared is not None:
            y = op.add(tap("moe.routed_up", y), shared)
        return tap("moe.out", y)

    def _shared(self, x, w, tap, prefix):
        gate = tap("moe.shared_gate", op.linear(x, w(f"{prefix}.gate_proj.weight")))
        up = tap("moe.shared_up", op.linear(x, w(f"{prefix}.up_proj.weight")))
        act = tap("moe.shared_act", self._glu(gate, up))
        return tap("moe.shared", op.linear(act, w(f"{prefix}.down_proj.weight")))

    def _forced(self, given, own):
        given, E = as_array(given, "expert_ids"), self.config.n_experts
        if given.shape != own.shape or (given < 0).any() or (given >= E).any():
            raise ValueError(f"expert_ids has shape {given.shape}, values {given.min(initial=0)} to "
                             f"{given.max(initial=0)}; it must have shape {own.shape}, values 0 to {E - 1}")
        return np.sort(given, axis=-1).astype(own.dtype)


def _cached(state, key, new):
    """A cache of the state brought up to date: what it held, then the new rows."""
    state[key] = np.concatenate([state[key], new]) if key in state else new
    return state[key]


class _Experts:
    """One matrix of each expert, fetched when it is asked for."""

    def __init__(self, weight, name):
        self.weight, self.name = weight, name

    def __getitem__(self, e):
        return self.weight(self.name.format(e))
