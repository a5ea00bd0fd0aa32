"""Two files of one model: errors of tensors, and KL, top-1 and perplexities beside their definitions in float64."""

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.perplexity import perplexity


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_dir):
    path = tmp_path_factory.mktemp("pair")
    kl.convert(tiny_dir, path / "q.gguf", type="Q4_K", types={"blk.3.*": "Q2_K", "output.weight": "BF16"})
    return kl.Model.tiny(), kl.Model.from_pretrained(path / "q.gguf")


@pytest.fixture
def ids():
    return np.random.default_rng(1).integers(0, 2048, 300)


def test_beside_the_definitions(pair, ids):
    a, b = pair
    seen = []
    report = kl.compare_models(a, b, ids, progress=lambda *x: seen.append(x))
    logits = [model.forward(ids).astype(np.float64) for model in pair]
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in logits)
    rows = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(report.kl, rows.mean(), rtol=1e-9)
    assert report.kl_at == rows.argmax() and report.tokens == 300
    np.testing.assert_allclose(report.kl_largest, rows.max(), rtol=1e-9)
    assert report.top1 == (logits[0].argmax(-1) == logits[1].argmax(-1)).mean() < 1
    for model, found in zip(pair, report.perplexity, strict=True):
        np.testing.assert_allclose(found, perplexity(model, ids, None).perplexity, rtol=1e-9)

    by_name = {t.name: t for t in report.tensors}
    one = by_name["model.layers.2.self_attn.q_proj.weight"]
    x, y = (np.asarray(m.weights[one.name]).astype(np.float64) for m in pair)
    rms = np.sqrt((x * x).mean())
    np.testing.assert_allclose([one.rms, one.largest], [np.sqrt(((y - x) ** 2).mean()) / rms, abs(y - x).max() / rms])
    assert one.types == ("BF16", "Q4_K") and one.values == x.size
    experts = by_name["model.layers.1.block_sparse_moe.experts.*.w2.weight"]
    names = [experts.name.replace("*", str(e)) for e in range(8)]
    x, y = (np.stack([m.weights[n] for n in names]).astype(np.float64) for m in pair)
    np.testing.assert_allclose(experts.rms, np.sqrt(((y - x) ** 2).sum() / (x * x).sum()))
    assert by_name["lm_head.weight"].rms == 0 == by_name["model.layers.0.self_attn.A_log"].rms

    errors = [t.rms for t in report.tensors]
    assert errors == sorted(errors, reverse=True) and "layers.3." in report.tensors[0].name
    assert report.tensors[0].types == ("BF16", "Q2_K") and report.equal == 50
    assert seen[-1][0] == seen[-1][1] and len({total for _, total, _ in seen}) == 1


def test_how_it_looks(pair, ids):
    report = kl.compare_models(*pair, ids[:5])
    text = str(report)
    assert text.splitlines()[0] == "A: tiny" and "and 104 more (at most" in text and "50 of them equal" in text
    assert len(report.render(all_tensors=True).splitlines()) > 128
    html = report._repr_html_()
    assert html.startswith("<div class='kl'>") and "layers.3." in html and "KL(A || B)" in html
    d = report.to_dict()
    assert d["kl"] == report.kl and d["tensors"][0]["types"] == ["BF16", "Q2_K"]


def test_the_same_model(ids):
    a, b = kl.Model.tiny(), kl.Model.tiny()
    report = kl.compare_models(a, b, ids[:1])
    assert (report.kl, report.top1) == (0, 1) and report.equal == len(report.tensors)
    assert "all values of all tensors are equal" in report.verdict and "(all of them equal)" in str(report)
    assert np.isnan(report.perplexity).all() and report.to_dict()["perplexity"] == [None, None]


def test_one_changed_tensor_is_first(ids):
    a, b = kl.Model.tiny(), kl.Model.tiny()
    name = "model.layers.4.block_sparse_moe.experts.6.w1.weight"
    w = np.array(b.weights[name])
    w[3, 5] += 1
    b.weights[name] = w
    report = kl.compare_models(a, b, ids[:40])
    assert report.tensors[0].name == name.replace("experts.6", "experts.*") and report.tensors[1].rms == 0


def test_not_a_number_is_first():
    """The weights alone: no text runs through them."""
    import importlib

    module = importlib.import_module("kimi_linear.compare_models")
    x, y = np.ones((2, 4), np.float32), np.float32([[1, 2, 3, np.nan], [1, 1, 1, 1]])
    found = module._distance("x", [(x, y)])
    assert np.isnan([found.rms, found.largest]).all()


def test_distances_of_more_values_than_are_taken_at_a_time():
    import importlib

    module = importlib.import_module("kimi_linear.compare_models")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 3, module.CACHED - 1), np.float32)
    y[2, -1] = x[2, -1] - 20
    found, d = module._distance("x", [(x, y)]), y.astype(np.float64) - x
    rms = np.sqrt(np.mean(x.astype(np.float64) ** 2))
    np.testing.assert_allclose([found.rms, found.largest], [np.sqrt(np.mean(d**2)) / rms, np.abs(d).max() / rms], 1e-12)
    assert found.values == x.size


def test_a_tensor_of_zeros(ids):
    a, b = kl.Model.tiny(), kl.Model.tiny()
    name = "model.layers.0.mlp.up_proj.weight"
    a.weights[name] = np.zeros((512, 256), np.float32)
    report = kl.compare_models(a, b, ids[:4])
    assert (report.tensors[0].name, report.tensors[0].rms) == (name, np.inf)
    assert report.to_dict()["tensors"][0]["rms"] is None


@pytest.mark.parametrize("tokens, words", [([], "tokens is empty"), ([1, 2048], "2048")])
def test_tokens(tokens, words):
    with pytest.raises(ValueError, match=words):
        kl.compare_models(kl.Model.tiny(), kl.Model.tiny(), np.array(tokens, np.int32))


def test_other_models_are_refused(golden_dir, ids):
    a, b = kl.Model.tiny(), kl.Model.from_pretrained(golden_dir / "kimi-a")
    with pytest.raises(ValueError, match=r"no two files of one model: model.embed_tokens.weight is \[2048, 256\] in "
                                         r"the one and \[320, 64\] in the other"):
        kl.compare_models(a, b, ids)
    c = kl.Model.tiny(latent_eps=1e-5)
    with pytest.raises(ValueError, match="latent_eps is 1e-06 in the one and 1e-05 in the other"):
        kl.compare_models(a, c, ids)


@pytest.mark.parametrize("case", ["qwen-a", "qwen35-a", "qwen35-moe"])
def test_a_qwen_folder_and_a_gguf_of_it(case, golden_dir, tmp_path):
    """The file's norms are 1 + w, its value heads may lie in another order: no difference."""
    kl.convert(golden_dir / case, tmp_path / "x.gguf")
    kl.convert(golden_dir / case, tmp_path / "q.gguf", types={"blk.1.ssm_out.weight": "Q8_0"})
    folder, same, other = map(kl.Model.from_pretrained, (golden_dir / case, tmp_path / "x.gguf", tmp_path / "q.gguf"))
    ids = np.arange(3, 12)
    for pair in ((folder, same), (same, folder)):
        report = kl.compare_models(*pair, ids)
        assert report.equal == len(report.tensors) and report.kl < 1e-8 and report.top1 == 1
    for pair in ((folder, other), (other, folder)):
        report = kl.compare_models(*pair, ids)
        assert [t.name for t in report.tensors if t.rms] == ["model.layers.1.linear_attn.out_proj.weight"]
        assert 1e-3 < report.tensors[0].rms < 1e-2
