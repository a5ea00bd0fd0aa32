"""What ports of Qwen3-Next get wrong in later calls and other sequences, each written out by itself, is named."""

import faulty_runs
import numpy as np
import pytest
from conftest import DATA, QWEN_CASES, canonical_weights

import kimi_linear as kl
from kimi_linear import reference

CALLS = [9, 7], [1, 1], [1, 1], [5, 3], [2, 1]  # lengths of two sequences in each of five calls


@pytest.fixture(scope="module")
def models():
    found = {}
    for case in QWEN_CASES:
        weights = canonical_weights(DATA / "golden" / case / "model.safetensors")
        found[case] = kl.ReferenceModel(kl.Config.from_file(DATA / "golden" / case / "config.json"), weights)
    return found


def blamed(model, tap, wrong, dtype="float32"):
    rng = np.random.default_rng(12)
    calls = [[rng.integers(0, model.config.vocab_size, n).tolist() for n in lengths] for lengths in CALLS]
    return kl.diff.blame(model, faulty_runs.noisy_forward(model, calls, dtype, rng, plant={tap: wrong}))


def rows_of(site):
    """(sequence, rows of its past, rows of this call, tokens of the sequences before it in the call), call by call."""
    return [(p.sequence, past, p.rows, len(p.before)) for p, past in site.scene.pasts()]


def attention(seen, keys=lambda site: site["k"]):
    """Attention call by call, in which query i of a call of L with S cached sees what seen(i, L, S) says."""
    def wrong(site):
        q, k, v, before = site["q"], site["k"], site["v"], keys(site)
        o = np.zeros(q.shape)
        for _, past, own, _ in rows_of(site):
            ks, vs = np.concatenate([before[past], k[own]]), np.concatenate([v[past], v[own]])
            for i, row in enumerate(own):
                s = seen(i, len(own), len(past))
                o[row] = reference.attention(q[row:row + 1], ks[s], vs[s], scale=site["scale"])[0]
        return o

    return wrong


def right_rows(i, L, S):
    return slice(S + i + 1)


def positions(of):
    """Positions from (position of the call's first token, tokens of other sequences before it, whether the first)."""
    def wrong(site):
        at = np.array(site["positions"])
        for _, past, own, others in rows_of(site):
            at[own] += of(len(past), others)
        return site.run(positions=at)

    return wrong


def convolution(after, ahead=0):
    """The convolution call by call, with histories after(history, x); each reads `ahead` tokens too late."""
    def wrong(site):
        x, w = site["x"], np.asarray(site["w"], np.float64)
        y, history, W = np.zeros(x.shape), {}, w.shape[1]
        for n, _, own, _ in rows_of(site):
            seen = np.concatenate([history.get(n, np.zeros((W - 1, x.shape[1]))), x[own]])
            padded = np.concatenate([seen, np.zeros((ahead, x.shape[1]))])[ahead:]
            y[own] = reference.silu(sum(w[:, j] * padded[j:j + len(own)] for j in range(W)))
            history[n] = after(seen, W)
        return y

    return wrong


def of_q_heads(site, rows):
    H, K = site.node.shape
    return site.run(w=rows(np.asarray(site.weights[site.node.weights["w"].name]), H, K))


def gelu(site):
    gate = site["gate"]
    return gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * site["up"]


def turned_half_a_head_apart(site):
    x, n, half = site["x"], site["rotary"] // 2, site["x"].shape[-1] // 2
    angle = np.asarray(site["positions"])[:, None, None] * site["base"] ** (-2.0 * np.arange(n) / (2 * n))
    y, a, b = x.copy(), x[..., :n], x[..., half:half + n]
    y[..., :n] = a * np.cos(angle) - b * np.sin(angle)
    y[..., half:half + n] = b * np.cos(angle) + a * np.sin(angle)
    return y


def memory_of_state(site):
    """The state that a call of key width K and value width V left as [K, V] is read as [V, K]."""
    o, states = np.zeros(site["v"].shape), {}
    for n, _, own, _ in rows_of(site):
        x = {a: site[a][own] for a in ("q", "k", "v", "g", "beta")}
        o[own], S = reference.delta_rule(**x, initial_state=states.get(n))
        states[n] = S.reshape(len(S), *S.shape[:0:-1]).swapaxes(1, 2)
    return o


def unactivated(site):
    return reference.rms_norm(site["x"], site["w"], eps=site["eps"]) * site["z"]


def gated_as_a_whole(site):
    return (site.run(shared=0 * site["shared"]) + site.sibling("moe.shared")) * reference.sigmoid(
        site.sibling("moe.shared_g"))


O, Q = "layers.3.attn.o", "layers.3.attn.q"
PORTS = [
    (O, "attention_mask_missing", attention(lambda i, L, S: slice(S + L))),
    (O, "attention_mask_from_the_left", attention(lambda i, L, S: slice(i + 1))),
    (O, "attention_own_call_missing", attention(lambda i, L, S: slice(S) if S else right_rows(i, L, S))),
    (O, "attention_cached_keys_unturned", attention(right_rows, lambda site: site.sibling("attn.k_norm"))),
    (O, "attention_scale_of_hidden", lambda s: s.run(scale=(64 // s["q"].shape[1]) ** -0.5)),
    (Q, "rope_positions_shifted_between_calls", positions(lambda at, others: -1 if at else 0)),
    (Q, "rope_positions_shifted_between_calls", positions(lambda at, others: 1 if at else 0)),
    (Q, "rope_positions_over_sequences", positions(lambda at, others: others)),
    (Q, "rope_positions_over_sequences", positions(lambda at, others: 0 if at else others)),
    ("layers.3.attn.k", "rope_pairs_of_head", turned_half_a_head_apart),
    ("layers.3.attn.q_norm", "norm_weight_of_other",
     lambda s: s.run(w=1 + np.asarray(s.weights["model.layers.3.self_attn.k_norm.weight"], np.float64))),
    ("layers.3.attn.q_proj", "query_and_gate_in_turn", lambda s: of_q_heads(
        s, lambda w, H, K: np.concatenate([w[h * 2 * K:(h + 1) * 2 * K:2] for h in range(H)]))),
    ("layers.3.attn.gate", "query_and_gate_in_turn", lambda s: of_q_heads(
        s, lambda w, H, K: np.concatenate([w[h * 2 * K + 1:(h + 1) * 2 * K:2] for h in range(H)]))),
    ("layers.1.gdn.q_conv", "conv_off_by_one", convolution(lambda seen, W: seen[1 - W:], ahead=1)),
    ("layers.1.gdn.v_conv", "conv_hands_on_too_early", convolution(lambda seen, W: seen[-W:-1])),
    ("layers.1.gdn.k_conv", "conv_history_turned", convolution(lambda seen, W: seen[1 - W:][::-1])),
    ("layers.0.gdn.k_conv", "conv_history_off_by_one",
     convolution(lambda seen, W: np.concatenate([seen[2 - W:], 0 * seen[:1]]))),
    ("layers.0.gdn.q", "l2_of_mean", lambda s: s["x"] / np.sqrt((s["x"] ** 2).mean(-1, keepdims=True) + 1e-7)),
    ("layers.0.gdn.g", "a_log_negated", lambda s: s.run(rate=1 / s["rate"])),
    ("layers.2.gdn.o_norm", "gate_without_activation", unactivated),
    ("layers.2.moe.shared_act", "swiglu_gelu", gelu), ("layers.2.moe.out", "shared_gate_on_all", gated_as_a_whole),
]


@pytest.mark.parametrize("tap, name, wrong", PORTS, ids=[f"{name}-{i}" for i, (_, name, _) in enumerate(PORTS)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_port_is_named(models, tap, name, wrong, dtype):
    found = blamed(models["qwen-a"], tap, wrong, dtype)
    assert [(r.tap, r.kind, r.also) for r in found.wrong] == [(tap, name, ())], str(found)


@pytest.mark.parametrize("case", QWEN_CASES)
@pytest.mark.parametrize("part, other", [("q_proj", "k_proj"), ("k_proj", "q_proj"), ("v_proj", "z"),
                                         ("z", "v_proj"), ("a", "b"), ("b", "a")])
def test_an_input_with_the_rows_of_another_is_named(models, case, part, other):
    model = models[case]
    rng = np.random.default_rng(4)
    calls = [[rng.integers(0, model.config.vocab_size, 20).tolist()]]
    right, = faulty_runs.noisy_forward(model, calls, "float64", rng)
    tap = f"layers.1.gdn.{part}"
    theirs = right[f"layers.1.gdn.{other}"].reshape(right[tap].shape)
    found = kl.diff.blame(model, faulty_runs.noisy_forward(model, calls, "float32", rng, plant={tap: lambda s: theirs}))
    assert [(r.tap, r.kind, r.choice, r.also) for r in found.wrong] == [(tap, "input_of_other", (other[0],), ())], found


def test_a_state_read_by_its_memory_is_named_where_keys_and_values_differ(models):
    """K = 16, V = 24: the same numbers, in other rows."""
    model = models["qwen-a"]
    tap = "layers.1.gdn.o"
    found = blamed(model, tap, lambda s: memory_of_state(s))
    assert [(r.tap, r.kind, r.choice, r.also) for r in found.wrong] == \
        [(tap, "state_transposed_between_calls", ("taken up",), ())], str(found)
