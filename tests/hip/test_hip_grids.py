"""Any op on a grid of fewer blocks than tasks: kernels walk over the rest, and the bytes are the same. A GPU's grid has
65,535 blocks at most; here it has one or three."""

import numpy as np
import pytest
from hip_build import ON_HOST, context, versions
from hip_weights import stored
from judge import normal

import kimi_linear as kl

version = versions("1", "2", "")


def gates(T, H, K):
    return dict(g=-np.abs(normal(T, H, K, seed=7, scale=0.1)), beta=np.abs(np.tanh(normal(T, H, seed=8))))


def delta(T=37, H=5, K=8, V=12):
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (normal(T, H, K), normal(T, H, K, seed=1))]
    return dict(q=unit[0], k=unit[1], v=normal(T, H, V, seed=2), **gates(T, H, K))


def latent(form):
    return dict(q=normal(40, 3, 6), latent=normal(530, 8, seed=1), k_shared=normal(530, 2, seed=2), scale=0.4,
                form=form, w_uk=normal(3, 4, 8, seed=3), w_uv=normal(3, 5, 8, seed=4))


def chosen():
    """For each of 40 queries the last 490 positions that it sees."""
    return (np.arange(491, 531)[:, None] - np.arange(490, 0, -1)).astype(np.int32)


def experts(T):
    rng = np.random.default_rng(T)
    ids = np.array([np.sort(rng.choice(9, 3, replace=False)) for _ in range(T)], np.int32)
    return dict(x=normal(T, 40), ids=ids, weights=rng.uniform(0, 1, (T, 3)).astype(np.float32),
                w_gate=normal(9, 70, 40, seed=1), w_up=normal(9, 70, 40, seed=2), w_down=normal(9, 40, 70, seed=3))


def halves():
    """What `delta_rule_inter` takes."""
    x = delta()
    _, P, _, W, U = kl.ops.delta_rule_intra(**x, chunk=16)
    return dict(q=x["q"], k=x["k"], g=x["g"], P=P, W=W, U=U, chunk=16)


def cache_append(x, type, ctx):
    """What a cache of two sequences holds behind 3 rows and none that it had."""
    kind, dtype, width = {"F32": (0, np.float32, 64), "F16": (1, np.uint16, 64), "Q8_0": (8, np.uint8, 68)}[type]
    cache = np.full((90, width), 7, dtype)
    kl._core.cache_append(ctx._core, cache, kind, x, np.array([0, 33, 70]), np.array([3, 0]), np.array([0, 40, 90]), 2,
                          *x.shape, 90)
    return cache


CASES = {
    "add": dict(a=normal(40, 70), b=normal(40, 70, seed=1)),
    "swiglu": dict(gate=normal(40, 70), up=normal(40, 70, seed=1)),
    "swiglu limit": dict(gate=normal(40, 70), up=normal(40, 70, seed=1), limit=0.5),
    "situ": dict(gate=normal(40, 70), up=normal(40, 70, seed=1), beta=4.0, linear_beta=25.0),
    "sigmoid": dict(x=normal(40, 70)),
    "sigmoid_gate": dict(x=normal(40, 70), gate=normal(40, 7, seed=1)),
    "softmax": dict(x=normal(70, 40)),
    "rms_norm": dict(x=normal(70, 40), w=normal(40), eps=1e-6),
    "layer_norm": dict(x=normal(70, 40), w=normal(40), b=normal(40, seed=1), eps=1e-6),
    "layer_norm wide": dict(x=normal(7, 600), w=normal(600), b=normal(600, seed=1), eps=1e-6),
    "gated_rms_norm": dict(x=normal(70, 40), z=normal(70, 40, seed=1), w=normal(40), eps=1e-6),
    "l2_norm": dict(x=normal(70, 40)),
    "attn_res": dict(snapshots=normal(5, 70, 40), x=normal(70, 40), w=normal(40, seed=1), eps=1e-6),
    "attn_res of no snapshots": dict(snapshots=normal(0, 70, 40), x=normal(70, 40), w=normal(40, seed=1), eps=1e-6),
    "mhc_expand": dict(x=normal(70, 40), n=3),
    "mhc_collapse": dict(x=normal(70, 3, 40)),
    "mhc_pre": dict(x=normal(70, 3, 20), fn=normal(15, 60, seed=1, scale=0.1), base=normal(15), scale=normal(3),
                    norm_eps=1e-6),
    "mhc_post": dict(y=normal(70, 40), x=normal(70, 4, 40), post=normal(70, 4), comb=normal(70, 4, 4)),
    "mhc_post of three": dict(y=normal(70, 40), x=normal(70, 3, 40), post=normal(70, 3), comb=normal(70, 3, 3)),
    "rope": dict(x=normal(70, 3, 8), positions=np.arange(70), base=1e4, rotary=6),
    "short_conv": dict(x=normal(70, 40), w=normal(40, 4, seed=1), offsets=[0, 33, 70]),
    "decay_gate": dict(f=normal(70, 5, 8), rate=np.ones(5, np.float32), dt_bias=normal(5, 8, seed=1)),
    "decay_cumsum": dict(g=-np.abs(normal(70, 40)), chunk=16, offsets=[0, 33, 70]),
    "sample": dict(logits=normal(7, 60), top_k=20, top_p=0.9, seed=3),
    "cache_append float32": dict(x=normal(70, 64), type="F32"),
    "cache_append float16": dict(x=normal(70, 64), type="F16"),
    "cache_append q8_0": dict(x=normal(70, 64), type="Q8_0"),
    "embedding": dict(ids=np.arange(70) % 9, table=stored(normal(9, 512), "Q5_0")),
    "linear few": dict(x=normal(5, 256), w=stored(normal(90, 256, seed=1), "IQ3_S")),
    "linear": dict(x=normal(70, 256), w=stored(normal(90, 256, seed=1), "Q4_K")),
    "linear several": dict(x=normal(5, 256), w=[stored(normal(n, 256, seed=n), "Q4_K") for n in (90, 3, 40)]),
    "moe few": experts(6),
    "moe": experts(90),
    "moe situ": experts(90) | dict(situ=(4.0, 25.0)),
    "moe limit": experts(90) | dict(limit=0.5),
    "route": dict(scores=normal(70, 33), k=4),
    "quantize": dict(x=normal(50, 64), type="Q8_0"),
    "dequantize": dict(q=stored(normal(9, 512), "TQ1_0")),
    "delta_rule": delta(),
    "delta_rule_intra": dict(**delta(), chunk=16),
    "delta_rule_inter": halves(),
    "index_pool": dict(k=normal(70, 40), gate=normal(70, 40, seed=1), ape=normal(4, 40), offsets=[0, 33, 70]),
    "index_scores": dict(q=normal(40, 3, 20), keys=normal(132, 20, seed=1), weights=normal(40, 3), scale=0.3, pool=4,
                         positions=530),
    "index_select": dict(q=normal(40, 3, 20), keys=normal(132, 20, seed=1), weights=normal(40, 3), topk=64, pool=4,
                         positions=530),
    "attention": dict(q=normal(40, 6, 8), k=normal(530, 2, 8, seed=1), v=normal(530, 2, 8, seed=2), scale=0.3),
    "latent_attention absorbed": latent("absorbed"),
    "latent_attention expanded": latent("expanded"),
    "latent_attention select": latent("auto") | dict(select=chosen()),
}


def bytes_of(got):
    parts = got if isinstance(got, tuple | list) else (got,)
    return b"".join(np.asarray(getattr(part, "data", part)).tobytes() for part in parts)


def test_hip_every_op_has_a_case():
    assert {case.split()[0] for case in CASES} == {*kl.ops.__all__, "cache_append"}


@pytest.mark.parametrize("case", CASES)
def test_hip_kernels_walk_over_more_tasks_than_blocks(case, version, monkeypatch):
    op = getattr(kl.ops, case.split()[0], cache_append)
    wanted = bytes_of(op(**CASES[case], ctx=context()))
    for blocks in ("1", "3"):
        monkeypatch.setenv("KL_GPU_BLOCKS", blocks)
        assert bytes_of(op(**CASES[case], ctx=context())) == wanted


if not ON_HOST:  # on the host, test_hip_far.py does it without touching 2.1 GiB

    def test_hip_rows_behind_2_to_the_31_bytes():
        """Byte offsets are wider than 32 bits: the last rows of a table of 2.1 GiB, which is zeros but for them."""
        table, ids = np.zeros((270_000, 4096), np.float16), np.array([269_999, 262_144, 262_143, 7])
        table[ids] = normal(4, 4096).astype(np.float16)
        assert table.nbytes > 2**31
        assert kl.ops.embedding(ids, table, ctx=context()).tobytes() == table[ids].astype(np.float32).tobytes()
