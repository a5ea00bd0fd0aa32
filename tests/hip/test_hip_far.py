"""Arrays behind 2**31 elements or bytes: every index is wider than 32 bits.

Memory of the host build is the process's own, and pages that nobody touches cost nothing. Where an op would compute all
of such an array, only the last blocks of each grid run (`ends`), and the array's last rows are looked at.
"""

import contextlib
import ctypes

import numpy as np
import pytest
from hip_build import DEVICE, context, host_build_only, host_library, versions
from hip_weights import stored
from judge import normal

import kimi_linear as kl

pytestmark = host_build_only
version, rung = versions("1", ""), versions("1", "2", "")
FAR = 2**31


def fresh():
    """A context of its own: it takes scratch by the size of what it computes, and keeps it."""
    host_library()
    return kl.Context(device=DEVICE)


def large(shape, dtype=np.float32):
    """A DeviceArray, and NumPy's view of its memory."""
    n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    try:
        memory = kl._core.DeviceMemory.allocate(context()._core, n_bytes)
    except MemoryError:
        pytest.skip(f"the machine lends no {n_bytes} bytes, touched or not")
    items = (ctypes.c_char * n_bytes).from_address(memory.address)
    items.memory = memory  # as long as a view is
    return kl.DeviceArray(memory, shape, dtype), np.frombuffer(items, dtype).reshape(shape)


@contextlib.contextmanager
def ends(monkeypatch, blocks=4):
    """Grids have a block a task, and only their last blocks run."""
    monkeypatch.setenv("KL_GPU_BLOCKS", str(2**24 - 1))
    host_library().kl_host_last(ctypes.c_int64(blocks))
    try:
        yield
    except MemoryError:
        pytest.skip("the machine lends no scratch of this size, touched or not")
    finally:
        host_library().kl_host_last(ctypes.c_int64(0))


# ---- of large arrays the rows that a call asks for ----


@pytest.mark.parametrize("type", ["F32", "F16", "Q8_0", "Q5_0"])
def test_hip_embedding_of_far_rows(type, version):
    D = 4096
    ids = np.array([FAR // D + 8, FAR // D, FAR // D - 1, 7])
    few = stored(normal(len(ids), D), type)
    if isinstance(few, kl.Quantized):
        data, view = large((ids[0] + 1, few.data.shape[1]), np.uint8)
        view[ids], table = few.data, kl.Quantized(data, type, (len(data), D))
    else:
        table, view = large((ids[0] + 1, D), few.dtype)
        view[ids] = few
    got = kl.ops.embedding(ids, table, ctx=fresh())
    assert got.numpy().tobytes() == kl.ops.embedding(np.arange(4), few, ctx=fresh()).tobytes()


@pytest.mark.parametrize("type", ["F16", "Q8_0"])
def test_hip_moe_with_the_last_of_many_experts(type, version):
    """Each of the three tables is behind 2**31 values, and bytes."""
    F, D, used = 1024, 512, [FAR // 2**19, FAR // 2**19 + 3]
    few, tables = [], []
    for i, (rows, cols) in enumerate([(F, D), (F, D), (D, F)]):
        w = stored(normal(2 * rows, cols, seed=i, scale=0.05), type)
        data = (w.data if type == "Q8_0" else w).reshape(2, rows, -1)
        table, view = large((used[1] + 1, *data.shape[1:]), data.dtype)
        view[used] = data
        few.append(kl.Quantized(data, type, (2, rows, cols)) if type == "Q8_0" else data)
        tables.append(kl.Quantized(table, type, (len(table), rows, cols)) if type == "Q8_0" else table)
    x, weights = normal(1, D, seed=5), np.array([[0.75, 0.5]], np.float32)
    got = kl.ops.moe(x, np.array([used], np.int32), weights, *tables, ctx=fresh())
    assert got.tobytes() == kl.ops.moe(x, np.array([[0, 1]]), weights, *few, ctx=kl.Context()).tobytes()


KINDS = {"F32": (0, np.float32), "F16": (1, np.uint16), "Q8_0": (8, np.uint8)}


def append(ctx, cache, x, start, type):
    kl._core.cache_append(ctx._core, cache, KINDS[type][0], x, np.array([0, len(x)]), np.array([start]),
                          np.array([0, len(cache)]), 1, *x.shape, len(cache))


@pytest.mark.parametrize("type, D, start", [
    ("F32", FAR // 2000 // 32 * 32, 510), ("F16", FAR // 1000 // 32 * 32, 510), ("Q8_0", FAR // 500 // 32 * 32, 510),
    ("F32", 32, FAR // 32), ("Q8_0", 32, FAR // 32), ("F16", 1, FAR),
], ids=["F32 page", "F16 page", "Q8_0 page", "F32 values", "Q8_0 values", "F16 position"])
def test_hip_cache_append_far_into_a_cache(type, D, start, version):
    """A page, 512 rows, of more than 2**31 bytes; values, and a position, behind 2**31."""
    dtype, x = KINDS[type][1], np.resize(normal(67, scale=3), (1 if D > 32 else 2, D))
    wanted = np.zeros((len(x), D // 32 * 34 if type == "Q8_0" else D), dtype)
    append(kl.Context(), wanted, x, 0, type)
    cache, view = large((start + len(x), wanted.shape[1]), dtype)
    append(fresh(), cache, x, start, type)
    assert view[start:].tobytes() == wanted.tobytes()


# ---- of ops that compute all of an array, its end ----

N = 3  # rows that are looked at
ROWS = {
    "add": lambda x: dict(a=x, b=x),
    "sigmoid": lambda x: dict(x=x),
    "sigmoid_gate": lambda x: dict(x=x, gate=np.ones((len(x), 4), np.float32)),
    "swiglu": lambda x: dict(gate=x, up=x),
    "situ": lambda x: dict(gate=x, up=x, beta=4.0, linear_beta=25.0),
    "softmax": lambda x: dict(x=x),
    "rms_norm": lambda x: dict(x=x, w=normal(1024), eps=1e-6),
    "layer_norm": lambda x: dict(x=x, w=normal(1024), b=normal(1024, seed=1), eps=1e-6),
    "gated_rms_norm": lambda x: dict(x=x, z=x, w=normal(1024), eps=1e-6),
    "l2_norm": lambda x: dict(x=x),
    "rope": lambda x: dict(x=x.reshape(-1, 8, 128), positions=np.arange(len(x)) % N, base=1e4, rotary=64),
    "decay_gate": lambda x: dict(f=x.reshape(-1, 8, 128), rate=np.ones(8, np.float32), dt_bias=normal(8, 128)),
    "decay_cumsum": lambda x: dict(g=x, offsets=[0, len(x) - N, len(x)], chunk=2),
}


@pytest.mark.parametrize("op", ROWS)
def test_hip_end_of_rows(op, version, monkeypatch):
    few, T = -np.abs(normal(N, 1024)), FAR // 1024 // N * N + 2 * N
    wanted = getattr(kl.ops, op)(**ROWS[op](few), ctx=fresh())
    x, view = large((T, 1024))
    view[-N:] = few
    given = ROWS[op](x)
    with ends(monkeypatch):
        getattr(kl.ops, op)(**given, out=x.reshape(-1, 8, 128) if op in ("rope", "decay_gate") else x, ctx=fresh())
    assert view[-1].tobytes() == wanted[-1].tobytes()


@pytest.mark.parametrize("n", [0, 2])
def test_hip_end_of_snapshots(n, version, monkeypatch):
    few, past, w, T = normal(N, 1024), normal(n, N, 1024, seed=1), normal(1024, seed=2), FAR // 1024 + N
    (x, view), (snapshots, taken), (y, out) = large((T, 1024)), large((n, T, 1024)), large((T, 1024))
    view[-N:], taken[:, -N:] = few, past
    with ends(monkeypatch):
        kl.ops.attn_res(snapshots if n else taken, x, w, eps=1e-6, out=y, ctx=fresh())
    wanted = kl.ops.attn_res(past, few, w, eps=1e-6, ctx=fresh())
    assert out[-1].tobytes() == wanted[-1].tobytes()


@pytest.mark.parametrize("n", [3, 4])
def test_hip_end_of_streams(n, version, monkeypatch):
    T, some = FAR // (n * 1024) + N, dict(norm_eps=1e-6, iters=2, base=normal((2 + n) * n), scale=normal(3))
    few, fn = normal(N, n, 1024), normal((2 + n) * n, n * 1024, seed=1, scale=0.02)
    (x, view), results = large((T, n, 1024)), [large(shape) for shape in ((T, 1024), (T, n), (T, n, n))]
    view[-N:] = few
    with ends(monkeypatch):
        y, post, comb = kl.ops.mhc_pre(x, fn, **some, out=tuple(a for a, _ in results), ctx=fresh())
    wanted = kl.ops.mhc_pre(few, fn, **some, ctx=fresh())
    assert [a[-1].tobytes() for _, a in results] == [a[-1].tobytes() for a in wanted]
    with ends(monkeypatch):
        kl.ops.mhc_post(y, x, post, comb, out=x, ctx=fresh())
    right = kl.ops.mhc_post(wanted[0], few, *wanted[1:], ctx=fresh())
    assert view[-1, :, -64:].tobytes() == right[-1, :, -64:].tobytes()
    mean = kl.ops.mhc_collapse(right, ctx=fresh())
    view[-N:] = right
    with ends(monkeypatch):
        kl.ops.mhc_collapse(x, out=y, ctx=fresh())
    assert results[0][1][-1].tobytes() == mean[-1].tobytes()
    with ends(monkeypatch):
        kl.ops.mhc_expand(y, n=n, out=x, ctx=fresh())
    assert view[-1, -1].tobytes() == mean[-1].tobytes()


def test_hip_end_of_embeddings(version, monkeypatch):
    table, ids = normal(N, 1024), np.arange(FAR // 1024 // N * N + 2 * N) % N
    y, view = large((len(ids), 1024))
    with ends(monkeypatch):
        kl.ops.embedding(ids, table, out=y, ctx=fresh())
    assert view[-1].tobytes() == table[-1].tobytes()


def test_hip_end_of_blocks(monkeypatch):
    """quantize and dequantize: values behind 2**31."""
    few = normal(N, 1024)
    x, view = large((FAR // 1024 + N, 1024))
    q, blocks = large((len(x), 1088), np.uint8)
    view[-N:] = few
    with ends(monkeypatch):
        kl.ops.quantize(x, "Q8_0", out=q, ctx=fresh())
        kl.ops.dequantize(kl.Quantized(q, "Q8_0", x.shape), out=x, ctx=fresh())
    wanted = kl.ops.quantize(few, "Q8_0")
    assert blocks[-N:].tobytes() == wanted.data.tobytes()
    assert view[-1].tobytes() == kl.ops.dequantize(wanted)[-1].tobytes()


@pytest.mark.parametrize("type", ["F32", "Q8_0", "IQ3_S"])
@pytest.mark.parametrize("T", [1, 40])
def test_hip_end_of_a_large_weight(T, type, version, monkeypatch):
    x, few = normal(T, 1024), stored(normal(N, 1024, seed=1), type)
    data = few.data if isinstance(few, kl.Quantized) else few
    w, view = large((FAR // 1024 + N, data.shape[1]), data.dtype)
    view[-N:] = data
    y, out = large((T, len(w)))
    with ends(monkeypatch):
        kl.ops.linear(x, w if type == "F32" else kl.Quantized(w, type, (len(w), 1024)), out=y, ctx=fresh())
    assert out[-1, -N:].tobytes() == kl.ops.linear(x, few)[-1].tobytes()


@pytest.mark.parametrize("D", [128, 1])
def test_hip_end_of_a_product_of_many_rows(D, version, monkeypatch):
    """Behind 2**31 values of x and y; of one column each, behind 2**31 rows."""
    few, w = normal(N, D), normal(D, D, seed=1)
    x, view = large((FAR // D + N, D))
    y, out = large(x.shape)
    view[-N:] = few
    with ends(monkeypatch):
        kl.ops.linear(x, w, out=y, ctx=fresh())
    assert out[-N:].tobytes() == kl.ops.linear(few, w).tobytes()


def test_hip_end_of_a_convolution(version, monkeypatch):
    few, w = normal(N, 1024), normal(1024, 4, seed=1)
    x, view = large((FAR // 1024 + N, 1024))
    y, out = large(x.shape)
    view[-N:] = few
    with ends(monkeypatch):
        _, history = kl.ops.short_conv(x, w, offsets=[0, len(x) - N, len(x)], out=(y, None), ctx=fresh())
    wanted, after = kl.ops.short_conv(few, w, ctx=context())
    assert out[-N:].tobytes() == wanted.tobytes() and history.numpy()[-1].tobytes() == after.tobytes()


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_hip_end_of_the_delta_rule(form, rung, monkeypatch):
    """q, k and v are one array; the last tokens are a sequence of their own."""
    H, K = 64, 128
    few = normal(N, H, K)
    few /= np.linalg.norm(few, axis=-1, keepdims=True)
    x, view = large((FAR // (H * K) + N, H, K))
    g, gates = large(x.shape)
    beta, rates = large(x.shape[:2])
    o, out = large(x.shape)
    view[-N:], gates[-N:], rates[-N:] = few, -np.abs(few), 0.5
    with ends(monkeypatch):
        _, state = kl.ops.delta_rule(x, x, x, g, beta, offsets=[0, len(x) - N, len(x)], form=form, out=(o, None),
                                     ctx=fresh())
    wanted, after = kl.ops.delta_rule(few, few, few, -np.abs(few), rates[-N:].copy(), form=form, ctx=fresh())
    assert out[-N:, -1].tobytes() == wanted[:, -1].tobytes()
    assert state.numpy()[-1, -1].tobytes() == after[-1].tobytes()


def test_hip_end_of_the_delta_rules_halves(monkeypatch):
    H, K, V, C = 16, 128, 16, 16
    few, values, rate = normal(N, H, K, scale=0.1), normal(N, H, V, seed=1), np.full((N, H), 0.5, np.float32)
    T = FAR // (H * K) + N
    (x, view), (v, given), (beta, rates) = large((T, H, K)), large((T, H, V)), large((T, H))
    made = [large((T, H, width)) for width in (C, C, C, K, V)]
    view[-N:], given[-N:], rates[-N:] = few, values, rate
    more = dict(g=None, chunk=C, ctx=context())
    with ends(monkeypatch, N * H * (K + V) // 256):
        kl.ops.delta_rule_intra(x, x, v, beta=beta, offsets=[0, T - N, T], out=tuple(a for a, _ in made), **more)
    wanted = kl.ops.delta_rule_intra(few, few, values, beta=rate, **more)
    for (_, got), want in zip(made, wanted, strict=True):
        assert got[-N:].tobytes() == want.tobytes()
    P, W, U = (made[i][0] for i in (1, 3, 4))
    o, out = large((T, H, V))
    empty = N * H * K // 256 * [T - N]  # so that what runs of the second launch does not reach the first sequence
    with ends(monkeypatch, len(empty)):
        kl.ops.delta_rule_inter(x, x, None, P, W, U, offsets=[0, *empty, T], chunk=C, out=(o, None, None), ctx=fresh())
    after, *_ = kl.ops.delta_rule_inter(few, few, P=wanted[1], W=wanted[3], U=wanted[4], **more)
    assert out[-N:, -1].tobytes() == after[:, -1].tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_hip_end_of_attention(dtype, version, monkeypatch):
    """Queries, keys, values and results behind 2**31 values."""
    T, H, K = 16, 16, 128
    few, cached = normal(T, H, K), normal(T, H, K, seed=1).astype(dtype)
    q, view = large((FAR // (H * K) + T, H, K))
    k, keys = large(q.shape, dtype)
    o, out = large(q.shape)
    view[-T:], keys[-T:] = few, cached
    with ends(monkeypatch, 1):
        kl.ops.attention(q, k, k, scale=0.1, offsets=[0, len(q) - T, len(q)], out=o, ctx=fresh())
    wanted = kl.ops.attention(few, cached, cached, scale=0.1, ctx=fresh())
    assert out[-T:, -1].tobytes() == wanted[:, -1].tobytes()


def test_hip_end_of_pools(version, monkeypatch):
    D, P = 1024, 4
    (k, last), (gate, gates), ape = large((FAR // D + P, D)), large((FAR // D + P, D)), normal(P, D)
    last[-P:], gates[-P:] = normal(P, D, seed=1), normal(P, D, seed=2)
    y, out = large((len(k) // P, D))
    with ends(monkeypatch, blocks=32):
        kl.ops.index_pool(k, gate, ape, out=y, ctx=fresh())
    wanted = kl.ops.index_pool(last[-P:].copy(), gates[-P:].copy(), ape, ctx=context())
    assert out[-1].tobytes() == wanted[-1].tobytes()


@pytest.mark.parametrize("op, more", [("index_scores", dict(scale=0.3)), ("index_select", dict(topk=2))])
def test_hip_end_of_index(op, more, version, monkeypatch):
    """Queries, each its own sequence of 8 positions: the last ones."""
    H, D, T = 4, 512, FAR // 2048 + 4
    q, view = large((T, H, D))
    few, keys, weights = normal(4, H, D), np.zeros((4 * T, D), np.float32), np.zeros((T, H), np.float32)
    view[-4:], keys[-16:], weights[-4:] = few, normal(16, D), normal(4, H, seed=1)
    given = dict(pool=2, **more)
    wanted = getattr(kl.ops, op)(few, keys[-16:], weights[-4:], offsets=np.arange(5), positions=[8] * 4, ctx=context(),
                                 **given)
    with ends(monkeypatch):
        got = getattr(kl.ops, op)(q, keys, weights, offsets=np.arange(T + 1), positions=np.full(T, 8), ctx=fresh(),
                                  **given)
    assert got.numpy()[-1].tobytes() == wanted[-1].tobytes()


def test_hip_end_of_latent_attention(version, monkeypatch):
    """Absorbed: sequences of one token, which go 256 at a time."""
    H, K, P, V, R = 2**14, 4, 124, 128, 4
    few, latent, shared = normal(1, 1, K + P), normal(1, R, seed=1), normal(1, P, seed=2)
    w_uk, w_uv = np.zeros((H, K, R), np.float32), np.zeros((H, V, R), np.float32)
    w_uk[-1], w_uv[-1] = normal(K, R, seed=3), normal(V, R, seed=4)
    q, view = large((FAR // (H * (K + P)) + 2, H, K + P))
    caches = [np.zeros((len(q), n), np.float32) for n in (R, P)]
    o, out = large((len(q), H, V))
    view[-1, -1], caches[0][-1], caches[1][-1] = few, latent, shared
    given = dict(scale=0.1, form="absorbed")
    with ends(monkeypatch, 1):
        kl.ops.latent_attention(q, *caches, w_uk, w_uv, offsets=np.arange(len(q) + 1), out=o, ctx=fresh(), **given)
    wanted = kl.ops.latent_attention(few, latent, shared, w_uk[-1:], w_uv[-1:], ctx=context(), **given)
    assert out[-1, -1, -8:].tobytes() == wanted[-1, -1, -8:].tobytes()


def test_hip_end_of_router_scores(version, monkeypatch):
    few = normal(N, 512)
    scores, view = large((FAR // 512 + N, 512))
    ids, weights = large((len(scores), 8), np.int32), large((len(scores), 8))
    view[-N:] = few
    with ends(monkeypatch):
        kl.ops.route(scores, k=8, out=(ids[0], weights[0]), ctx=fresh())
    wanted = kl.ops.route(few, k=8)
    assert ids[1][-N:].tobytes() == wanted[0].tobytes() and weights[1][-N:].tobytes() == wanted[1].tobytes()


def test_hip_end_of_logits(monkeypatch):
    few = normal(N, 2**17)  # new scratch is full of ones: of a row that did not run, that nothing was wrong
    logits, view = large((FAR // 2**17 + N, 2**17))
    view[-N:] = few
    with ends(monkeypatch):
        ids = kl.ops.sample(logits, sequence=np.arange(len(logits)) % 7, ctx=fresh())
    assert ids[-N:].tolist() == kl.ops.sample(few, sequence=np.arange(len(logits))[-N:] % 7).tolist()
