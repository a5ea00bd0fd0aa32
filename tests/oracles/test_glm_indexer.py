"""transformers' indexer of GLM-5.3-Flash as an oracle: from its own queries, keys and gates the same positions.

It scores in float32 and gives positions in no order, so that sets are compared, of queries whose choice does not hang
on less than float32 knows.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import t  # noqa: F401  (torch as the other oracles have it)
from torch.nn import functional
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextIndexer

import kimi_linear as kl

NEAR = 1e-4  # of the largest score: float32 of both, with room


def indexer(hidden=40, rank=24, heads=4, width=16, topk=8, pool=4, seed=0):
    torch.manual_seed(seed)
    config = SimpleNamespace(hidden_size=hidden, index_n_heads=heads, index_head_dim=width, qk_rope_head_dim=0,
                             index_topk=topk, q_lora_rank=rank, index_kpool=pool, index_kpool_always_select_tail=True)
    module = Glm5NextTextIndexer(config, 0).double()
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) * parameter.shape[-1] ** -0.5
    module.index_kpool_compress_ape.data.normal_()
    return module


def steps(module, hidden, resid):
    """What the ops are given: queries, keys and gates [T, .], weights of heads."""
    with torch.no_grad():
        q = module.wq_b(resid).view(-1, module.n_heads, module.head_dim)
        k = module.k_norm(module.wk(hidden))
        gate = functional.linear(hidden, module.index_kpool_compress_gate)
        weights = module.weights_proj(hidden) * module.n_heads**-0.5
    return (x.numpy() for x in (q, k, gate, weights))


def decided(scores, complete, k):
    """Whether the k best of the complete pools are so by more than float32 may be off."""
    if complete <= k:
        return True
    s = np.sort(scores[:complete])[::-1]
    return s[k - 1] - s[k] > NEAR * np.abs(s).max()


@pytest.mark.parametrize("T", [1, 3, 4, 11, 90])
@pytest.mark.parametrize("heads, width, pool, topk", [(4, 16, 4, 8), (2, 32, 16, 32), (3, 8, 1, 5), (8, 128, 4, 24)])
def test_positions_of_glm(T, heads, width, pool, topk):
    module = indexer(heads=heads, width=width, topk=topk, pool=pool, seed=T)
    hidden, resid = torch.randn(T, 40).double(), torch.randn(T, 24).double()
    theirs = module(hidden[None], resid[None], torch.ones(1, T, dtype=torch.bool), None)[0].numpy()
    assert theirs.shape == (T, topk + pool - 1)
    q, k, gate, weights = steps(module, hidden, resid)
    ape = module.index_kpool_compress_ape.detach().numpy()

    keys = kl.reference.index_pool(k, gate, ape)
    scores = kl.reference.index_scores(q, keys, weights, scale=width**-0.5, pool=pool)
    wanted = kl.reference.index_select(q, keys, weights, topk=topk, pool=pool)
    q, k, gate, weights, ape = (np.float32(x) for x in (q, k, gate, weights, ape))
    got = kl.ops.index_select(q, kl.ops.index_pool(k, gate, ape), weights, topk=topk, pool=pool)
    judged = 0
    for row in range(T):
        if decided(scores[row], (row + 1) // pool, topk // pool):
            judged += 1
            assert set(theirs[row]) - {-1} == set(wanted[row]) - {-1} == set(got[row]) - {-1}, row
    assert judged >= 0.8 * T  # where no dot of a query is above 0 its scores are equal


def test_keys_of_glm():
    """`get_pooled_states`, whose softmax is in float32."""
    module, T = indexer(), 31
    q, k, gate, weights = steps(module, torch.randn(T, 40).double(), torch.randn(T, 24).double())
    packed = torch.from_numpy(np.concatenate([k, gate, np.ones((T, 1))], axis=1))[None]
    theirs = module.get_pooled_states(packed)[0][0].detach().numpy()
    wanted = kl.reference.index_pool(k, gate, module.index_kpool_compress_ape.detach().numpy())
    np.testing.assert_allclose(theirs, wanted, rtol=0, atol=1e-5)
