"""Every op at the shapes of Kimi-Linear-48B-A3B, with the operations and bytes that it cannot do without.

A case makes the arguments of one call of ``kl.ops.<op>`` for T tokens. Where one call's weights would stay in
the caches, it makes several sets of them, which calls take in turn: a model reads each weight once a pass.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from random_blocks import random_blocks

import kimi_linear as kl

TOKENS = (1, 16, 64, 512)
D, H, K, V, C, W = 2304, 32, 128, 128, 4096, 4      # model, KDA
CHUNK = 64                                          # of the delta rule's halves
R, P, NOPE = 512, 64, 128                           # MLA
E, USED, F, DENSE, VOCAB = 256, 8, 1024, 9216, 163840
EXPERTS = 32       # held here: 256 would be 3.4 GiB
DEPTH = 4096       # cached positions before the new tokens
HEADS, KV_HEADS, HEAD, TURNED = 16, 2, 256, 64      # attention of Qwen3-Next
COLD = 256 << 20   # bytes of weights that no cache holds
BFLOAT16 = ml_dtypes.bfloat16


@dataclass(frozen=True)
class Case:
    """An op at a shape.

    Attributes
    ----------
    op : str
        Of ``kl.ops``.
    label : str
        What tells it from the op's other cases.
    make : callable
        (T, rng) -> list of keyword arguments of a call; calls take them in turn.
    work : callable
        (T, arguments) -> (operations, bytes) of a call.
    tokens : tuple of int
        Values of T to time.
    sgemm : bool
        Whether NumPy's ``x @ w.T`` is a contender.
    """

    op: str
    label: str
    make: Callable
    work: Callable
    tokens: tuple = TOKENS
    sgemm: bool = False

    @property
    def name(self):
        """``op``, or ``op label``."""
        return f"{self.op} {self.label}".strip()


def normal(rng, *shape, dtype=np.float32, scale=1.0):
    """Random values; large arrays repeat a pool of them."""
    n = int(np.prod(shape))
    pool = (rng.standard_normal(min(n, 1 << 20), np.float32) * np.float32(scale)).astype(dtype)
    return np.resize(pool, n).reshape(shape)


def unit(rng, *shape):
    """Random vectors of length 1."""
    x = rng.standard_normal(shape, np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def size(*arrays):
    """Bytes of arrays."""
    return sum(a.n_bytes if isinstance(a, kl.Quantized) else a.nbytes for a in arrays)


# ---- element by element, norms ----

def one(**arguments):
    """Arguments of normal values, each given by its shape without T; what is no shape stays as it is."""
    def make(T, rng):
        return [{name: normal(rng, T, *shape) if isinstance(shape, tuple) else shape
                 for name, shape in arguments.items()}]

    return make


def norm(width, gated=False):
    """Rows, their weight, and for the gated norm the gate."""
    def make(T, rng):
        shape = (T, D) if width == D else (T, H, width)
        arguments = {"x": normal(rng, *shape), "w": 1 + normal(rng, width, scale=0.2), "eps": 1e-5}
        return [arguments | ({"z": normal(rng, *shape)} if gated else {})]

    return make


def layer_norm(T, rng):
    """Keys of a lightning indexer."""
    return [{"x": normal(rng, T, 128), "w": 1 + normal(rng, 128, scale=0.2), "b": normal(rng, 128), "eps": 1e-6}]


def streamed(per_value=1):
    """Each array argument read once, one like the first written; `per_value` operations a value."""
    def work(T, arguments):
        arrays = [a for a in arguments.values() if isinstance(a, np.ndarray)]
        return per_value * arrays[0].size, size(*arrays) + arrays[0].nbytes

    return work


RESIDUAL, SNAPSHOTS = 7168, 8  # Kimi K3's


def attn_res(T, rng):
    return [{"snapshots": normal(rng, SNAPSHOTS, T, RESIDUAL), "x": normal(rng, T, RESIDUAL),
             "w": normal(rng, RESIDUAL, scale=0.02), "eps": 1e-5}]


def attn_res_work(T, arguments):
    """A score is a dot and a sum of squares, the mixture a dot; candidates read once, a row written."""
    arrays = arguments["snapshots"], arguments["x"], arguments["x"], arguments["w"]
    return 6 * (SNAPSHOTS + 1) * T * RESIDUAL, size(*arrays)


STREAMS, WIDTH = 4, 4096  # GLM-5.3-Flash's
MIXES = (2 + STREAMS) * STREAMS


def ends_work(T, arguments):
    return STREAMS * T * WIDTH, 4 * T * WIDTH * (1 + STREAMS)


def mhc_pre(T, rng):
    return [{"x": normal(rng, T, STREAMS, WIDTH), "fn": normal(rng, MIXES, STREAMS * WIDTH, scale=0.02),
             "base": normal(rng, MIXES), "scale": normal(rng, 3), "norm_eps": 1e-5}]


def mhc_pre_work(T, arguments):
    """A dot a row of fn, a sum of squares, a mixture; and what 20 normalisations divide. Streams and fn read once."""
    a = arguments
    return T * (2 * (MIXES + 2) * STREAMS * WIDTH + 4 * 20 * STREAMS**2), (
        size(a["x"], a["fn"]) + 4 * T * (WIDTH + STREAMS + STREAMS**2))


def mhc_post(T, rng):
    return [{"y": normal(rng, T, WIDTH), "x": normal(rng, T, STREAMS, WIDTH), "post": normal(rng, T, STREAMS),
             "comb": normal(rng, T, STREAMS, STREAMS)}]


def mhc_post_work(T, arguments):
    a = arguments
    return 2 * (STREAMS + 1) * T * STREAMS * WIDTH, size(a["y"], a["x"], a["x"], a["post"], a["comb"])


# ---- products with weights ----

def embedding(T, rng):
    ids = rng.integers(0, 32768, T).astype(np.int32)
    return [{"ids": ids, "table": normal(rng, 32768, D, dtype=BFLOAT16)}]


def embedding_work(T, arguments):
    return 0, T * D * (arguments["table"].dtype.itemsize + 4)


def to_blocks(name):
    """T rows to write as blocks."""
    def make(T, rng):
        return [{"x": normal(rng, T, D), "type": name}]

    return make


def from_blocks(name):
    """T rows of blocks to read."""
    def make(T, rng):
        return [{"q": kl.ops.quantize(normal(rng, T, D), name)}]

    return make


def blocks_work(T, arguments):
    kind = arguments["q"].storage if "q" in arguments else kl.storage_types[arguments["type"]]
    return 0, T * (4 * D + kind.row_bytes(D))


def linear(cols, rows, dtype):
    """x [T, cols] times w [rows, cols]; weights cold."""
    def make(T, rng):
        n = max(2, COLD // (rows * cols * np.dtype(dtype).itemsize)) if T <= 16 else 2
        x = normal(rng, T, cols)
        return [{"x": x, "w": normal(rng, rows, cols, dtype=dtype, scale=cols**-0.5)} for _ in range(n)]

    return make


def linear_blocks(cols, rows, type):
    """The same, w in random blocks."""
    def make(T, rng):
        kind = kl.storage_types[type]
        n = rows * cols // kind.values
        sets = max(2, COLD // (n * kind.bytes)) if T <= 16 else 2
        x = normal(rng, T, cols)
        return [{"x": x, "w": kl.Quantized(random_blocks(type, cols**-0.5, n, rng), type, (rows, cols))}
                for _ in range(sets)]

    return make


def linear_work(T, arguments):
    rows, cols = arguments["w"].shape
    return 2 * T * rows * cols, size(arguments["x"], arguments["w"]) + 4 * T * rows


def route(T, rng):
    return [{"scores": normal(rng, T, E), "k": USED, "bias": normal(rng, E, scale=0.1), "scale": 2.446}]


def route_work(T, arguments):
    """Scores and bias read, ids and weights written."""
    return 10 * T * E, size(arguments["scores"], arguments["bias"]) + 8 * T * USED


def moe(dtype):
    """Tokens spread evenly over `EXPERTS` experts; weights cold by their size."""
    def make(T, rng):
        ids = np.sort([rng.choice(EXPERTS, USED, replace=False) for _ in range(T)]).astype(np.int32)
        weights = rng.random((T, USED), np.float32)
        up = {name: normal(rng, EXPERTS, F, D, dtype=dtype, scale=D**-0.5) for name in ("w_gate", "w_up")}
        down = normal(rng, EXPERTS, D, F, dtype=dtype, scale=F**-0.5)
        return [{"x": normal(rng, T, D), "ids": ids, "weights": weights, **up, "w_down": down}]

    return make


def moe_work(T, arguments):
    used = len(np.unique(arguments["ids"]))
    weights = used * 3 * D * F * arguments["w_up"].dtype.itemsize
    return 2 * T * USED * 3 * D * F, weights + 2 * arguments["x"].nbytes


# ---- KDA ----

def short_conv(T, rng):
    return [{"x": normal(rng, T, C), "w": normal(rng, C, W, scale=0.5), "history": normal(rng, W - 1, C)}]


def decay_gate(T, rng):
    rate = np.exp(rng.uniform(0, np.log(16), H)).astype(np.float32)
    dt_bias = rng.uniform(-4, -1, (H, K)).astype(np.float32)
    return [{"f": normal(rng, T, H, K), "rate": rate, "dt_bias": dt_bias}]


def decay_cumsum(T, rng):
    return [{"g": -np.exp(rng.uniform(-6, 1, (T, H, K))).astype(np.float32)}]


def delta_rule(T, rng):
    g = -np.exp(rng.uniform(-6, 1, (T, H, K))).astype(np.float32)
    return [{"q": unit(rng, T, H, K), "k": unit(rng, T, H, K), "v": normal(rng, T, H, V), "g": g,
             "beta": rng.random((T, H), np.float32), "initial_state": normal(rng, H, K, V, scale=0.1)}]


def delta_rule_work(T, arguments):
    arrays = [a for a in arguments.values() if isinstance(a, np.ndarray)]
    return T * H * 7 * K * V, size(*arrays) + arguments["initial_state"].nbytes + arguments["v"].nbytes


def chunks(T):
    """Lengths of the chunks of T tokens: the last may be shorter."""
    return [min(CHUNK, T - begin) for begin in range(0, T, CHUNK)]


def delta_rule_intra(T, rng):
    (arguments,) = delta_rule(T, rng)
    del arguments["initial_state"]
    return [arguments]


def delta_rule_intra_work(T, arguments):
    """Triangles of L and P, T by substitution, W and U as products with it."""
    arrays = [a for a in arguments.values() if isinstance(a, np.ndarray)]
    results = 4 * T * H * (3 * CHUNK + K + V)
    return H * sum(n * n * (3 * K + V) + n**3 // 3 for n in chunks(T)), size(*arrays) + results


def delta_rule_inter(T, rng):
    (x,) = delta_rule(T, rng)
    rows = {"P": normal(rng, T, H, CHUNK, scale=0.1), "W": normal(rng, T, H, K, scale=0.1), "U": x["v"]}
    return [{name: x[name] for name in ("q", "k", "g", "initial_state")} | rows]


def delta_rule_inter_work(T, arguments):
    arrays = [a for a in arguments.values() if isinstance(a, np.ndarray)]
    results = size(arguments["initial_state"]) + 2 * size(arguments["U"])
    return H * V * sum(n * (6 * K + n) for n in chunks(T)), size(*arrays) + results


# ---- MLA ----

def latent_attention(dtype):
    """T new tokens behind `DEPTH` cached ones."""
    def make(T, rng):
        S = DEPTH + T
        return [{
            "q": normal(rng, T, H, NOPE + P), "latent": normal(rng, S, R, dtype=dtype),
            "k_shared": normal(rng, S, P, dtype=dtype), "w_uk": normal(rng, H, NOPE, R, scale=R**-0.5),
            "w_uv": normal(rng, H, V, R, scale=R**-0.5), "scale": (NOPE + P) ** -0.5,
            "offsets": np.array([0, T]), "kv_offsets": np.array([0, S]),
        }]

    return make


def latent_attention_work(T, arguments):
    """Of the cheaper form: latents expanded once for all queries, or queries brought to the latents."""
    S, both = DEPTH + T, 2 * R * (NOPE + V)
    absorbed = T * H * (both + 2 * S * (2 * R + P))
    expanded = S * H * both + T * H * 2 * S * (NOPE + P + V)
    arrays = [arguments[name] for name in ("q", "latent", "k_shared", "w_uk", "w_uv")]
    return min(absorbed, expanded), size(*arrays) + 4 * T * H * V


def chosen_latents(T, rng):
    """The same, of which each query attends to a quarter."""
    return [call | {"select": np.sort([rng.permutation(DEPTH)[:DEPTH // 4] for _ in range(T)]).astype(np.int32)}
            for call in latent_attention(F32)(T, rng)]


def chosen_latents_work(T, arguments):
    """Absorbed, of the positions that are chosen."""
    chosen, queries = arguments["select"], [arguments[name] for name in ("q", "w_uk", "w_uv", "select")]
    flops = T * H * 2 * (R * (NOPE + V) + chosen.shape[1] * (2 * R + P))
    return flops, size(*queries) + 4 * len(np.unique(chosen)) * (R + P) + 4 * T * H * V


# ---- the indexer of sparse attention (GLM-5.3-Flash) ----

INDEX_HEADS, INDEX_WIDTH, POOL, TOPK = 32, 128, 4, 2048


def index_pool(T, rng):
    k, gate, ape = (normal(rng, rows, INDEX_WIDTH) for rows in (T, T, POOL))
    return [{"k": k, "gate": gate, "ape": ape}]


def index_pool_work(T, arguments):
    return 8 * T * INDEX_WIDTH, size(*arguments.values()) + 4 * (T // POOL) * INDEX_WIDTH


def indexed(**more):
    """T new tokens behind `DEPTH` cached ones."""
    def make(T, rng):
        S = DEPTH + T
        return [{"q": normal(rng, T, INDEX_HEADS, INDEX_WIDTH), "keys": normal(rng, S // POOL, INDEX_WIDTH),
                 "weights": normal(rng, T, INDEX_HEADS), "pool": POOL, "positions": S, **more}]

    return make


def indexed_work(T, arguments):
    pools = (T * DEPTH + T * (T + 1) // 2) // POOL
    return 2 * INDEX_HEADS * (INDEX_WIDTH + 1) * pools, size(*(arguments[name] for name in ("q", "keys", "weights")))


# ---- grouped-query attention (Qwen3-Next) ----

def rope(T, rng):
    return [{"x": normal(rng, T, HEADS, HEAD), "positions": np.arange(DEPTH, DEPTH + T), "base": 1e7, "rotary": TURNED}]


def rope_work(T, arguments):
    return 3 * T * HEADS * TURNED, 2 * size(arguments["x"])


def attention(dtype):
    """T new tokens behind `DEPTH` cached ones."""
    def make(T, rng):
        S = DEPTH + T
        k, v = (normal(rng, S, KV_HEADS, HEAD, dtype=dtype) for _ in "kv")
        return [{"q": normal(rng, T, HEADS, HEAD), "k": k, "v": v, "scale": HEAD ** -0.5, "offsets": np.array([0, T]),
                 "kv_offsets": np.array([0, S])}]

    return make


def attention_work(T, arguments):
    seen = T * DEPTH + T * (T + 1) // 2
    return 4 * HEADS * HEAD * seen, size(*(arguments[name] for name in "qkv")) + size(arguments["q"])


def sample(T, rng):
    return [{"logits": normal(rng, T, VOCAB, scale=3), "temperature": 0.8, "top_p": 0.95}]


def sample_work(T, arguments):
    """Logits read, an id a row written."""
    return 9 * T * VOCAB, size(arguments["logits"]) + 4 * T


F32, BF16, F16 = np.float32, BFLOAT16, np.float16
CASES = [
    Case("embedding", "bf16", embedding, embedding_work),
    Case("rms_norm", "2304", norm(D), streamed(4)),
    Case("gated_rms_norm", "32x128", norm(V, gated=True), streamed(9)),
    Case("layer_norm", "128", layer_norm, streamed(6)),
    Case("l2_norm", "32x128", one(x=(H, K)), streamed(3)),
    Case("attn_res", f"{SNAPSHOTS} of {RESIDUAL}", attn_res, attn_res_work),
    Case("mhc_expand", f"{STREAMS}x{WIDTH}", lambda T, rng: [{"x": normal(rng, T, WIDTH), "n": STREAMS}], ends_work),
    Case("mhc_collapse", f"{STREAMS}x{WIDTH}", lambda T, rng: [{"x": normal(rng, T, STREAMS, WIDTH)}], ends_work),
    Case("mhc_pre", f"{STREAMS}x{WIDTH}", mhc_pre, mhc_pre_work),
    Case("mhc_post", f"{STREAMS}x{WIDTH}", mhc_post, mhc_post_work),
    *(Case("quantize", name, to_blocks(name), blocks_work, tokens=(512,)) for name in ("Q8_0", "Q4_K", "Q6_K")),
    *(Case("dequantize", name, from_blocks(name), blocks_work, tokens=(512,))
      for name in ("Q8_0", "Q4_K", "Q6_K", "IQ4_XS")),
    *(Case("linear", f"{cols}->{rows} {label}", linear(cols, rows, dtype), linear_work, sgemm=dtype is F32)
      for (cols, rows), (label, dtype) in itertools.product(
          [(D, C), (C, D), (D, F)], [("f32", F32), ("bf16", BF16), ("f16", F16)])),
    Case("short_conv", "4096x4", short_conv, streamed(2 * W + 4)),
    Case("decay_gate", "32x128", decay_gate, streamed(12)),
    Case("delta_rule", "32x128x128", delta_rule, delta_rule_work),
    Case("delta_rule_intra", "32x128x128", delta_rule_intra, delta_rule_intra_work),
    Case("delta_rule_inter", "32x128x128", delta_rule_inter, delta_rule_inter_work),
    Case("decay_cumsum", "32x128", decay_cumsum, streamed(1)),
    Case("latent_attention", f"at {DEPTH} f32", latent_attention(F32), latent_attention_work),
    Case("latent_attention", f"at {DEPTH} f16", latent_attention(F16), latent_attention_work),
    Case("latent_attention", f"{DEPTH // 4} of {DEPTH} f32", chosen_latents, chosen_latents_work),
    Case("index_pool", f"{POOL} of {INDEX_WIDTH}", index_pool, index_pool_work),
    Case("index_scores", f"at {DEPTH}", indexed(scale=INDEX_WIDTH**-0.5), indexed_work),
    Case("index_select", f"{TOPK} at {DEPTH}", indexed(topk=TOPK), indexed_work),
    Case("attention", f"at {DEPTH} f32", attention(F32), attention_work),
    Case("attention", f"at {DEPTH} f16", attention(F16), attention_work),
    Case("rope", f"{HEADS}x{HEAD}", rope, rope_work),
    Case("sigmoid_gate", "4096", one(x=(HEADS * HEAD,), gate=(HEADS * HEAD,)), streamed(8)),
    Case("swiglu", "9216", one(gate=(DENSE,), up=(DENSE,)), streamed(8)),
    Case("situ", "6144", one(gate=(6144,), up=(6144,), beta=4.0, linear_beta=25.0), streamed(10)),
    Case("sigmoid", "4096", one(x=(C,)), streamed(7)),
    Case("add", "2304", one(a=(D,), b=(D,)), streamed(1)),
    Case("softmax", "256", one(x=(E,)), streamed(9)),
    Case("route", "8 of 256", route, route_work),
    Case("moe", f"8 of {EXPERTS} bf16", moe(BF16), moe_work),
    Case("sample", "163840", sample, sample_work, tokens=(1, 16)),
]
OPS = sorted({case.op for case in CASES})
