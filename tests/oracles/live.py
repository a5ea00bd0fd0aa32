"""transformers and this engine on the same tokens: what every family of models is asked, case by case."""

import numpy as np
import torch
from oracle import near, no_attention, numpy, ours, theirs, tokens

import kimi_linear as kl
from kimi_linear import golden
from kimi_linear.adapters import transformers as adapter

UNSEEN = ("kda.q", "kda.k", "gdn.q", "gdn.k", "moe.shared_gated",  # inside a function, or between two
          "streams", "mla.index_gate", "mla.pool_cache")


def experts(arrays):
    return {int(n.split(".")[1]): x for n, x in arrays.items() if n.endswith("moe.ids")}


def filled(state):
    """The arrays of a state that have a place in transformers' caches, which keep none without a value."""
    return {name for name, x in state.items() if np.size(x) and not name.endswith("pool_cache")}


def assert_all_near(got, want, names):
    """Each name's arrays; the message lists all that are too far apart."""
    problems = []
    for name in names:
        try:
            near(got[name], want[name], name)
        except AssertionError as error:
            problems.append(str(error))
    assert not problems, "\n".join(problems)


def every_module_and_cache(case, length):
    """Their float32 against our float32 and our float64, each expert as they chose it."""
    ids = tokens(case, length)
    want = adapter.trace(theirs(case), ids, state=True)
    model, state = ours(case), ours(case).new_state()
    logits, got = model.forward(ids, state=state, taps="*", expert_ids=experts(want))
    names = set(model.taps) | filled(state)
    assert set(want) == {n for n in names if n.split(".", 2)[-1] not in UNSEEN}
    floats = [n for n in want if not n.endswith(("moe.ids", "mla.select"))]
    assert_all_near(dict(got) | dict(state.items()), want, floats)
    reference = model.reference().forward(ids, taps="*", expert_ids=experts(want))
    assert_all_near(reference.taps | reference.state, want, floats)


def free_run(case):
    """Nothing given from outside: the same experts wherever float32 can tell them apart, then the same logits."""
    ids = tokens(case, 64, seed=1)
    same_experts_and_logits(ours(case), adapter.trace(theirs(case), ids), ids)


def same_experts_and_logits(model, want, ids):
    logits, got = model.forward(ids, taps="*")
    flipped = np.zeros(len(ids), bool)
    for i, chosen in experts(want).items():
        own = got[f"layers.{i}.moe.ids"]
        other = (own != chosen).any(axis=1) & ~np.logical_or.accumulate(flipped)   # what a flip does is not judged
        for at in np.flatnonzero(other):
            assert gap(model, i, got[f"layers.{i}.moe.logits"][at], own[at], chosen[at]) < 1e-5, (i, at)
        flipped |= other
    first = int(flipped.argmax()) if flipped.any() else len(ids)
    assert first > 0
    near(logits[:first], want["logits"][:first], "logits")


def gap(model, layer, scores, own, chosen):
    """How near two choices of experts are, in the scores that choose: the experts, or the last group in and out."""
    c = model.config
    score = getattr(kl.reference, c.router_function)(scores)
    if c.router_bias:
        bias = model.weights[f"model.layers.{layer}.block_sparse_moe.gate.e_score_correction_bias"]
        score = score + bias.astype(np.float64)
    gaps = [abs(score[a] - score[b]) for a in set(own) - set(chosen) for b in set(chosen) - set(own)]
    if c.top_groups < c.n_groups:
        groups = np.sort(np.sort(score.reshape(c.n_groups, -1), axis=1)[:, -2:].sum(1))[::-1]
        gaps.append(groups[c.top_groups - 1] - groups[c.top_groups])
    return min(gaps)


def step_by_step(case):
    """A prompt and then one token at a time, where transformers takes its recurrent form and its kept caches."""
    ids = tokens(case, 30, seed=2)
    cuts = [0, 21, *range(22, 31)]
    cache, state = None, ours(case).new_state()
    for a, b in zip(cuts, cuts[1:]):
        with torch.no_grad():
            result = theirs(case)(torch.from_numpy(ids[None, a:b]), past_key_values=cache, use_cache=True,
                                  **no_attention(ours(case).config, a, b))
        cache = result.past_key_values
        logits = ours(case).forward(ids[a:b], state=state)
        near(logits, numpy(result.logits)[0], f"logits of {a}..{b}")
    found = {}
    for i, layer in enumerate(cache.layers):
        found |= golden.to_taps(adapter._caches(layer, i), ours(case).config)
    assert set(found) == filled(state)
    assert_all_near(dict(state.items()), found, found)


def ragged_batch(case):
    """Lengths 40, 9 and 1: theirs with padding on the left and a mask, ours packed."""
    sequences = [tokens(case, n, seed=3) for n in (40, 9, 1)]
    padded, mask = np.zeros((3, 40), np.int64), np.zeros((3, 40), np.int64)
    for row, ids in enumerate(sequences):
        padded[row, 40 - len(ids):], mask[row, 40 - len(ids):] = ids, 1
    with torch.no_grad():
        result = theirs(case)(torch.from_numpy(padded), attention_mask=torch.from_numpy(mask), use_cache=False)
    want = numpy(result.logits)
    for row, logits in enumerate(ours(case).forward(sequences)):
        near(logits, want[row, 40 - len(logits):], f"sequence {row}")


def eps_of_norms(case):
    """The eps of every norm of theirs, by the module's last name; an eps is too small to show in every result."""
    found = {path.rsplit(".", 1)[-1]: getattr(module, "variance_epsilon", getattr(module, "eps", None))
             for path, module in theirs(case).named_modules()}
    return {name: eps for name, eps in found.items() if eps is not None}
