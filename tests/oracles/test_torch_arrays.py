"""torch tensors in place of NumPy arrays: the same bytes out, and a sentence where a tensor cannot be read."""

import ml_dtypes
import numpy as np
import pytest
import torch
from oracle import ours, tokens

import kimi_linear as kl

T, D, H, K, C, W, E, F, R, P = 9, 20, 2, 6, 12, 3, 4, 7, 5, 3


def inputs():
    """Op -> (arguments that may be tensors of any float type, others)."""
    rng = np.random.default_rng(7)

    def x(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    g, beta = -np.abs(x(T, H, K)), np.abs(np.tanh(x(T, H)))
    ids = np.sort(rng.permuted(np.tile(np.arange(E), (T, 1)), axis=1)[:, :2], axis=1)
    return {
        "add": (dict(a=x(T, D), b=x(T, D)), {}),
        "sigmoid": (dict(x=x(T, D)), {}),
        "swiglu": (dict(gate=x(T, D), up=x(T, D)), {}),
        "layer_norm": (dict(x=x(T, D), w=x(D), b=x(D)), dict(eps=1e-6)),
        "situ": (dict(gate=x(T, D), up=x(T, D)), dict(beta=4.0, linear_beta=25.0)),
        "softmax": (dict(x=x(T, D)), {}),
        "rms_norm": (dict(x=x(T, D), w=x(D)), dict(eps=1e-5)),
        "gated_rms_norm": (dict(x=x(T, D), z=x(T, D), w=x(D)), dict(eps=1e-5)),
        "l2_norm": (dict(x=x(T, D)), {}),
        "embedding": (dict(table=x(E, D)), dict(ids=np.array([3, 0, 3]))),
        "linear": (dict(x=x(T, D), w=x(F, D), bias=x(F)), {}),
        "quantize": (dict(x=x(T, 64)), dict(type="Q4_0")),
        "dequantize": ({}, dict(q=rng.integers(0, 100, (T, 36), np.uint8), type="Q4_0")),
        "short_conv": (dict(x=x(T, C), w=x(C, W), history=x(W - 1, C)), {}),
        "decay_gate": (dict(f=x(T, H, K), rate=np.abs(x(H)), dt_bias=x(H, K)), {}),
        "delta_rule": (dict(q=x(T, H, K), k=x(T, H, K), v=x(T, H, K), g=g, beta=beta, initial_state=x(H, K, K)),
                       dict(l2_norm=True)),
        "delta_rule_intra": (dict(q=x(T, H, K), k=x(T, H, K), v=x(T, H, K), g=g, beta=beta), dict(chunk=4)),
        "delta_rule_inter": (dict(q=x(T, H, K), k=x(T, H, K), g=g, P=x(T, H, 4), W=x(T, H, K), U=x(T, H, K),
                                  initial_state=x(H, K, K)), dict(chunk=4)),
        "decay_cumsum": (dict(g=g), dict(chunk=4)),
        "latent_attention": (dict(q=x(T, H, K + P), latent=x(T, R), k_shared=x(T, P), w_uk=x(H, K, R),
                                  w_uv=x(H, F, R)), dict(scale=0.3)),
        "attention": (dict(q=x(T, H, K), k=x(T, 1, K), v=x(T, 1, F)), dict(scale=0.3)),
        "rope": (dict(x=x(T, H, K)), dict(positions=np.arange(T), base=1e4, rotary=4)),
        "sigmoid_gate": (dict(x=x(T, D), gate=x(T, D)), {}),
        "attn_res": (dict(snapshots=x(3, T, D), x=x(T, D), w=x(D)), dict(eps=1e-5)),
        "mhc_expand": (dict(x=x(T, D)), dict(n=H)), "mhc_collapse": (dict(x=x(T, H, D)), {}),
        "mhc_pre": (dict(x=x(T, H, D), fn=x((2 + H) * H, H * D), base=x((2 + H) * H), scale=x(3)), dict(norm_eps=1e-5)),
        "mhc_post": (dict(y=x(T, D), x=x(T, H, D), post=x(T, H), comb=x(T, H, H)), {}),
        "index_pool": (dict(k=x(T, D), gate=x(T, D), ape=x(4, D)), {}),
        "index_scores": (dict(q=x(T, H, D), keys=x(5, D), weights=x(T, H)), dict(scale=0.3, pool=4, positions=23)),
        "index_select": (dict(q=x(T, H, D), keys=x(5, D), weights=x(T, H)), dict(topk=8, pool=4, positions=23)),
        "route": (dict(scores=x(T, E), bias=x(E)), dict(k=2)),
        "moe": (dict(x=x(T, D), weights=np.abs(x(T, 2)), w_gate=x(E, F, D), w_up=x(E, F, D), w_down=x(E, D, F),
                     shared=x(T, D)), dict(ids=ids)),
        "sample": (dict(logits=x(D)), dict(temperature=0.8, seed=3, position=5)),
    }


OPS = sorted(inputs())
DTYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}


def strided(x):
    """The same tensor, every second column of a wider one."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7.0, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


FORMS = {"plain": lambda x: x, "strided": strided, "grad": lambda x: x.requires_grad_(),
         "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)}


def tensors(arrays, dtype, form):
    """Rounded to dtype: as tensors in the form, and the same values as NumPy arrays."""
    given = {name: torch.from_numpy(a.copy()).to(dtype) for name, a in arrays.items()}
    plain = {name: a.astype(DTYPES[dtype]) for name, a in arrays.items()}
    return {name: FORMS[form](x) for name, x in given.items()}, plain


def contents(result):
    parts = result if isinstance(result, tuple) else (result,)
    return [(np.asarray(p).shape, np.asarray(p).dtype, np.asarray(p).tobytes()) for p in parts]


def test_every_op_is_here():
    assert set(OPS) == set(kl.ops.__all__)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_same_bytes(op, dtype, form):
    arrays, others = inputs()[op]
    given, plain = tensors(arrays, dtype, form)
    before = {name: x.detach().clone() for name, x in given.items()}
    function = getattr(kl.ops, op)
    ids = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in others.items()}
    assert contents(function(**given, **ids)) == contents(function(**plain, **others))
    for name, x in given.items():
        assert torch.equal(x.detach(), before[name]), f"{name} was written to"


@pytest.mark.parametrize("op", OPS)
def test_a_device_tensor_names_the_way_to_the_cpu(op):
    """A meta tensor stands for one on a GPU: no memory of it can be read here."""
    arrays, others = inputs()[op]
    for name in arrays:
        mixed = {n: torch.from_numpy(a) for n, a in arrays.items()} | {name: torch.empty_like(
            torch.from_numpy(arrays[name]), device="meta")}
        with pytest.raises(TypeError, match=rf"^{name} is a tensor on meta; give {name}\.cpu\(\)"):
            getattr(kl.ops, op)(**mixed, **others)


@pytest.mark.parametrize("dtype, named", [(torch.float64, "float64"), (torch.int32, "int32")])
@pytest.mark.parametrize("op", OPS)
def test_other_types_are_refused_by_name(op, dtype, named):
    arrays, others = inputs()[op]
    for name in arrays:
        mixed = arrays | {name: torch.from_numpy(arrays[name]).to(dtype)}
        with pytest.raises(TypeError, match=rf"^{name} is {named}; it must be float32, float16 or bfloat16"):
            getattr(kl.ops, op)(**mixed, **others)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_forward_takes_ids(dtype):
    model, ids = ours("kimi-a"), tokens("kimi-a", 24) % 250
    given, want = torch.from_numpy(ids).to(dtype), model.forward(ids)
    assert model.forward(given).tobytes() == want.tobytes()
    batch = model.forward(given.view(2, 12))
    assert batch.shape == (2, 12, model.config.vocab_size)
    assert batch.tobytes() == model.forward(ids.reshape(2, 12)).tobytes()
    second = torch.stack([given, given], dim=1)[:, 0]
    assert not second.is_contiguous() and model.forward(second).tobytes() == want.tobytes()
    parts = model.forward([given[:5], given[5:]])
    assert [p.tobytes() for p in parts] == [p.tobytes() for p in model.forward([ids[:5], ids[5:]])]
    packed = model.forward(given, offsets=torch.tensor([0, 5, 24]), logits=torch.tensor([4, 23]))
    assert packed.tobytes() == np.stack([parts[0][-1], parts[1][-1]]).tobytes()


def test_forward_takes_experts_and_states():
    model, ids = ours("kimi-a"), tokens("kimi-a", 12)
    experts = (np.arange(24).reshape(12, 2) % 8).astype(np.int64)
    want = model.forward(ids, expert_ids={2: experts})
    assert model.forward(ids, expert_ids={2: torch.from_numpy(experts)}).tobytes() == want.tobytes()
    first, second = model.new_state(2)
    model.forward(ids, state=first, logits="none")
    model.forward(ids, state=second, logits="none")
    name = "layers.0.kda.state"
    value = np.random.default_rng(1).standard_normal(first[name].shape).astype(np.float32)
    first[name], second[name] = value, torch.from_numpy(value).requires_grad_()
    assert first[name].tobytes() == second[name].tobytes() == value.tobytes()


def test_forward_refuses():
    model = ours("kimi-a")
    ids = torch.arange(4)
    with pytest.raises(TypeError, match=r"^tokens is a tensor on meta; give tokens\.cpu\(\)"):
        model.forward(ids.to("meta"))
    with pytest.raises(TypeError, match=r"^tokens\[1\] is a tensor on meta; give tokens\[1\]\.cpu\(\)"):
        model.forward([ids, ids.to("meta")])
    with pytest.raises(TypeError, match="tokens is float32; it must be an array of integers"):
        model.forward(ids.float())
    with pytest.raises(ValueError, match=r"tokens\[2\] is -7"):
        model.forward(torch.tensor([1, 2, -7]))


def test_an_output_is_a_numpy_array():
    """torch.from_numpy and DLPack share its memory, so a result is a tensor without a copy."""
    out = np.empty((T, D), np.float32)
    shared = torch.from_numpy(out)
    x = torch.randn(T, D)
    assert kl.ops.add(x, x, out=out) is out and torch.equal(shared, x + x)
    assert torch.equal(torch.from_dlpack(kl.ops.add(x, x)), x + x)
    with pytest.raises(TypeError, match="out is a Tensor; it must be a NumPy array"):
        kl.ops.add(x, x, out=torch.empty(T, D))


@pytest.mark.parametrize("op", ["delta_rule", "delta_rule_inter", "short_conv"])
def test_offsets_may_be_a_tensor(op):
    """As cu_seqlens is elsewhere."""
    arrays, others = inputs()[op]
    arrays = {name: x for name, x in arrays.items() if name not in ("initial_state", "history")}
    want = getattr(kl.ops, op)(**arrays, **others, offsets=[0, 4, T])
    assert contents(getattr(kl.ops, op)(**arrays, **others, offsets=torch.tensor([0, 4, T]))) == contents(want)


class Weight(torch.nn.Parameter):
    """Of another module than torch's, as quantisation libraries have them."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_subclass_is_a_tensor(dtype):
    x, w = torch.randn(T, D), Weight(torch.randn(F, D).to(dtype))
    assert contents(kl.ops.linear(x, w)) == contents(kl.ops.linear(x, w.detach()))


def test_what_torch_keeps_as_a_bit_is_read():
    x = torch.randn(T, D, dtype=torch.complex64).conj().imag
    assert x.is_neg() and contents(kl.ops.softmax(x)) == contents(kl.ops.softmax(x.resolve_neg()))


@pytest.mark.parametrize("x", [torch.eye(4).to_sparse(), torch.eye(4).to(torch.float8_e4m3fn)],
                         ids=["sparse", "float8"])
def test_what_numpy_cannot_read_is_named(x):
    with pytest.raises(TypeError, match="^b: a tensor of torch.float.* that NumPy cannot read"):
        kl.ops.add(torch.eye(4), x)


def test_generate_takes_a_batch_of_ids():
    model, ids = ours("kimi-a"), torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert model.generate(ids, max_new_tokens=3).run().tokens \
        == model.generate(ids.tolist(), max_new_tokens=3).run().tokens
