"""latent_attention, expanded, on the host build: its form by the length of a piece, segments, chunks, bounds, types."""

import numpy as np
import pytest
from block_data import READ_ONLY
from hip_build import context, everywhere, host_library, set_up, versions
from hip_weights import stored
from judge import guarded, judge, normal

import kimi_linear as kl

version = versions("1", "")


def latent(T, S, H=2, K=5, P=3, V=6, R=8, dtype=np.float32, seed=0, size=1.0):
    return dict(q=normal(T, H, K + P, scale=size, seed=seed), latent=normal(S, R, seed=seed + 1).astype(dtype),
                k_shared=normal(S, P, seed=seed + 2).astype(dtype), scale=(K + P) ** -0.5,
                w_uk=normal(H, K, R, scale=R**-0.5, seed=seed + 3), w_uv=normal(H, V, R, scale=R**-0.5, seed=seed + 4))


def run(given, form="expanded", ctx=None):
    return kl.ops.latent_attention(**given, form=form, ctx=context() if ctx is None else ctx)


def check(given, form="expanded"):
    """Within budget, same bytes everywhere, nothing written outside."""
    ref = kl.reference.latent_attention(**given)

    def one(ctx):
        out, untouched = guarded(ref.shape)
        kl.ops.latent_attention(**given, form=form, out=out, ctx=ctx)
        untouched()
        return out.copy()

    got = everywhere(one)
    judge("latent_attention", got, ref, **given)
    return got


@pytest.mark.parametrize("T, S", [(1, 1), (3, 70), (33, 64), (20, 530)])
def test_hip_expanded_within_budget(T, S, version):
    check(latent(T, S))


@pytest.mark.parametrize("H, K, P, V, R", [(1, 1, 0, 1, 1), (2, 17, 5, 33, 40), (9, 8, 16, 8, 32), (1, 16, 0, 70, 30)])
def test_hip_expanded_widths_and_heads(H, K, P, V, R, version):
    check(latent(35, 70, H, K, P, V, R))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_hip_expanded_versions_have_the_same_bytes(dtype, monkeypatch):
    given = latent(70, 560, dtype=dtype)
    whole = run(given)
    monkeypatch.setenv("KL_GPU_VERSION", "1")
    assert run(given).tobytes() == whole.tobytes()


def test_hip_expanded_of_more_than_a_chunk_and_of_three_segments():
    given = latent(520, 1100, 1, 2, 1, 2, 3)
    set_up(host_library(), checks=False)
    try:
        whole = run(given)
    finally:
        set_up(host_library())
    judge("latent_attention", whole, kl.reference.latent_attention(**given), **given)
    for t in (0, 511, 512, 519):
        part = given | {n: given[n][: 580 + t + 1] for n in ("latent", "k_shared")} | dict(q=given["q"][t: t + 1])
        assert run(part).tobytes() == whole[t: t + 1].tobytes()


@pytest.mark.parametrize("L, absorbed", [(16, 16), (17, 0), (64, 0), (70, 6), (80, 16), (81, 0)])
def test_hip_the_form_is_of_the_length_of_a_piece(L, absorbed):
    """As on the CPU: pieces of 64 from the first token; one of up to 16 tokens is absorbed."""
    given = latent(L, L + 20)
    auto, forms = run(given, "auto"), [run(given, form) for form in ("expanded", "absorbed")]
    assert auto[: L - absorbed].tobytes() == forms[0][: L - absorbed].tobytes()
    assert auto[L - absorbed:].tobytes() == forms[1][L - absorbed:].tobytes()
    assert forms[0].tobytes() != forms[1].tobytes()


@pytest.mark.parametrize("form", ["auto", "expanded"])
def test_hip_ragged_sequences_have_the_bytes_that_they_have_alone(form):
    lengths, depths = [3, 70, 1, 16, 0, 82, 5, 33], [9, 0, 520, 3, 4, 450, 0, 31]
    parts = [latent(L, L + d, seed=i) for i, (L, d) in enumerate(zip(lengths, depths, strict=True))]
    given = {n: np.concatenate([p[n] for p in parts]) for n in ("q", "latent", "k_shared")}
    given |= {n: parts[0][n] for n in ("w_uk", "w_uv", "scale")}
    ends = dict(offsets=np.cumsum([0, *lengths]), kv_offsets=np.cumsum([0, *(len(p["latent"]) for p in parts)]))
    whole = run(given | ends, form)
    judge("latent_attention", whole, kl.reference.latent_attention(**given, **ends), **given, **ends)
    alone = [run(p | {n: given[n] for n in ("w_uk", "w_uv")}, form) for p in parts]
    assert np.concatenate(alone).tobytes() == whole.tobytes()


@pytest.mark.parametrize("depth", [0, 480])
@pytest.mark.parametrize("form, cuts", [("auto", [64]), ("auto", [64, 128]), ("expanded", [1, 7, 40, 100])])
def test_hip_expanded_splits_keep_bytes(depth, form, cuts):
    T = 150
    given = latent(T, depth + T)
    whole = run(given, form)
    for first, last in zip([0, *cuts], [*cuts, T], strict=True):
        part = given | {n: given[n][: depth + last] for n in ("latent", "k_shared")} | dict(q=given["q"][first:last])
        assert run(part, form).tobytes() == whole[first:last].tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_hip_expanded_nan_reaches_only_those_who_see_it(value, version):
    given = latent(40, 540)
    given["q"][..., -3:] = np.abs(given["q"][..., -3:])
    clean = run(given)
    for name, at in (("k_shared", -3), ("latent", 0)):
        bad = given | {name: given[name].copy()}
        bad[name][520, at] = value
        got = run(bad)
        assert got[:20].tobytes() == clean[:20].tobytes() and np.isnan(got[20:]).any(-1).all()


def test_hip_expanded_positions_masked_by_minus_infinity(version):
    given = latent(30, 600)
    given["q"][:] = 1
    given["k_shared"][:560] = -np.inf
    with np.errstate(invalid="ignore"):
        ref = kl.reference.latent_attention(**given)
    np.testing.assert_allclose(run(given), ref, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 8.0, 60.0])
def test_hip_expanded_flat_and_sharp(size, version):
    check(latent(20, 150, size=size))


@pytest.mark.parametrize("type", ["Q8_0", "Q4_K", "IQ2_S", "MXFP4"])
@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_hip_latent_attention_of_block_types(type, form, version):
    """The bytes that the same values have as float32."""
    given = latent(20, 40, H=2, K=3, P=4, V=5, R=256)
    blocks = {n: stored(given[n], type) for n in ("w_uk", "w_uv")}
    given["q"] *= np.float32(1e-6 if type in READ_ONLY + ["MXFP4"] else 1)
    plain = given | {n: kl.ops.dequantize(b) for n, b in blocks.items()}
    assert run(given | blocks, form).tobytes() == run(plain, form).tobytes()
