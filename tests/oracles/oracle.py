"""What the live comparisons share: torch set up for small work, transformers models, and the measure of errors."""

import functools
import importlib
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
import transformers
from conftest import DATA, GLM_CASES, HERE, K3_CASES, QWEN_CASES, TINY, TRANSFORMERS_CASES
from safetensors.torch import load_file, save_file

import kimi_linear as kl
from kimi_linear.diff.budgets import budget

sys.path.insert(0, str(HERE.parent / "tools"))
make_golden = importlib.import_module("make_golden")

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

RMS, LARGEST = 1e-4, 2e-3   # of two float32 engines, over the array's rms; transformers alone takes 1e-5 and 1.5e-4
FOLDERS = {"tiny": TINY, **{case: DATA / "golden" / case for case in (*TRANSFORMERS_CASES, *K3_CASES, *GLM_CASES)}}
MOE = (8, 2, 1, 1, 1, 24, 2.446, True)   # experts, a token's; groups, chosen; shared; width; scale; renormalise
MLA = (3, 10, 6, 9, 20)                  # heads, nope, rope, v, latent: none a multiple of 16
SMALL = {
    "all-kda": dict(kda=[1, 2, 3], full=[], dense=0, heads=3, width=20, conv=2, mla=MLA, moe=MOE, hidden=50),
    "all-mla": dict(kda=[], full=[1, 2, 3], dense=1, heads=2, width=16, conv=4, mla=MLA, moe=MOE, hidden=40),
    "attention-first": dict(kda=[2, 4], full=[1, 3], dense=1, heads=2, width=33, conv=3, mla=(2, 17, 5, 31, 24),
                            moe=(12, 3, 4, 2, 2, 20, 1.7, False), hidden=48, eps=1e-6, q_lora=14),
    "groups": dict(kda=[1, 2, 4], full=[3], dense=0, heads=1, width=48, conv=4, mla=MLA,
                   moe=(16, 4, 4, 3, 3, 17, 0.5, True), hidden=72, q_lora=33),
    "one-expert": dict(kda=[1, 3], full=[2], dense=0, heads=5, width=7, conv=3, mla=(1, 8, 1, 40, 8),
                       moe=(6, 1, 1, 1, 1, 16, 3.0, False), hidden=33),
    "all-dense": dict(kda=[1, 2], full=[3], dense=3, heads=2, width=65, conv=4, mla=(4, 16, 16, 16, 16), moe=MOE),
    "plain-groups": dict(kda=[1, 3], full=[2], dense=1, heads=2, width=12, conv=3, mla=MLA,
                         moe=(12, 3, 4, 2, 2, 20, 1.3, False), hidden=44),
    "tied": dict(kda=[1, 2], full=[3], dense=1, heads=2, width=24, conv=4, mla=MLA, moe=MOE, hidden=64),
}
QWEN = {"next": make_golden.Qwen3NextConfig, "dense": make_golden.Qwen3_5TextConfig,
        "moe": make_golden.Qwen3_5MoeTextConfig}
QWEN_MOE = (8, 2, 20, 28)                   # experts, a token's; width, of the shared one
SMALL_QWEN = {      # layers, heads of keys and of values, their widths, base; attention: heads, of keys, width, share
    "next-1": ("next", "lal", (3, 3, 20, 12, 1e4), (4, 1, 24, 0.25), dict(
        hidden_size=50, linear_conv_kernel_dim=2, norm_topk_prob=False)),
    "next-2": ("next", "alla", (2, 4, 12, 33, 1e5), (3, 3, 10, 0.6), dict(
        hidden_size=48, linear_conv_kernel_dim=3, mlp_only_layers=[1])),
    "next-4": ("next", "ll", (1, 4, 16, 7, 1e4), (2, 1, 16, 1.0), dict(decoder_sparse_step=2, rms_norm_eps=1e-5)),
    "next-8": ("next", "all", (2, 16, 8, 8, 1e7), (6, 2, 8, 0.5), dict(shared_expert_intermediate_size=17)),
    "next-attention": ("next", "aaa", (2, 4, 8, 8, 1e3), (4, 2, 20, 0.5), dict(norm_topk_prob=False)),
    "dense-1": ("dense", "lla", (2, 2, 17, 31, 1e6), (4, 4, 12, 1.0), dict(hidden_size=33, linear_conv_kernel_dim=2)),
    "dense-2": ("dense", "al", (3, 6, 24, 24, 1e4), (8, 2, 16, 0.75), dict(
        linear_conv_kernel_dim=3, tie_word_embeddings=True)),
    "dense-linear": ("dense", "lll", (1, 4, 10, 20, 1e4), (2, 1, 16, 0.5), dict(hidden_size=40)),
    "moe-1": ("moe", "lla", (2, 2, 9, 16, 1e4), (4, 2, 40, 0.35), dict(
        linear_conv_kernel_dim=2, num_experts_per_tok=1)),
    "moe-4": ("moe", "all", (2, 8, 16, 10, 1e6), (5, 1, 18, 1 / 3), dict(
        linear_conv_kernel_dim=3, num_experts_per_tok=5)),
}
KIMI_CASES = ("tiny", *TRANSFORMERS_CASES, *SMALL)
ALL_QWEN_CASES = (*QWEN_CASES, *SMALL_QWEN)
DTYPES = {"groups": torch.bfloat16, "all-dense": torch.float16,     # of the file; the others are float32
          "next-4": torch.bfloat16, "dense-1": torch.float16}


@functools.cache
def scratch() -> Path:
    """A folder that lasts as long as the tests."""
    keep = tempfile.TemporaryDirectory(prefix="kimi-linear-oracles-")
    scratch.keep = keep
    return Path(keep.name)


def small_qwen(case: str):
    """The config of a case of SMALL_QWEN."""
    kind, layers, linear, attn, more = SMALL_QWEN[case]
    kinds = {"l": "linear_attention", "a": "full_attention"}
    sizes = dict(intermediate_size=44, num_hidden_layers=len(layers), layer_types=[kinds[x] for x in layers])
    return make_golden.qwen(QWEN[kind], *linear, attn, None if kind == "dense" else QWEN_MOE, **sizes | more)


@functools.cache
def folder(case: str) -> Path:
    """The checkpoint of a case; a small one is made, and saved by transformers."""
    if case in FOLDERS:
        return FOLDERS[case]
    config = small_qwen(case) if case in SMALL_QWEN else make_golden.kimi(**SMALL[case])
    if case in SMALL:
        config.tie_word_embeddings = case == "tied"
    model = make_golden.MODELS[config.model_type](config).eval()
    make_golden.randomise(model, torch.Generator().manual_seed(sum(map(ord, case))))
    model.to(DTYPES.get(case, torch.float32)).save_pretrained(scratch() / case)
    if case == "tied":                      # transformers writes lm_head beside the embedding in any case
        file = scratch() / case / "model.safetensors"
        weights = {name: x for name, x in load_file(file).items() if name != "lm_head.weight"}
        save_file(weights, file, {"format": "pt"})
    return scratch() / case


@functools.cache
def theirs(case: str):
    """The case's model in transformers, float32 on the file's values.

    Its products of all experts at once, the default, need widths that are multiples of four.
    """
    options, kind = {} if case in FOLDERS else {"experts_implementation": "eager"}, transformers.AutoModelForCausalLM
    if case in GLM_CASES:
        options = dict.fromkeys(("attn_implementation", "experts_implementation"), "eager")
        kind = transformers.Glm5NextForConditionalGeneration
    with warnings.catch_warnings(action="ignore", category=FutureWarning):      # published configs say rope_scaling
        model = kind.from_pretrained(folder(case), dtype=torch.float32, **options).eval()
    if case == "tied":                      # not done by transformers: its class names no tied weights
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


@functools.cache
def ours(case: str) -> kl.Model:
    return kl.Model.from_pretrained(folder(case))


def no_attention(config, first, last):
    """Arguments without which transformers keeps no cache for a model that has no attention layer."""
    if any(spec.mixer in ("mla", "attn") for spec in config.layers):
        return {}
    return {"attention_mask": {"full_attention": None, "linear_attention": None},
            "position_ids": torch.arange(first, last)[None]}


def tokens(case: str, T: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, T]).integers(3, ours(case).config.vocab_size, T)


def near(got, want, name, rms=RMS, largest=LARGEST):
    """AssertionError unless got is within rms and largest of want, both over want's rms."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, wanted {want.shape}"
    if not want.size:
        return
    size = np.sqrt(np.mean(want**2))
    error = np.abs(got - want) / (size or 1.0)
    worst = float(error.max()), float(np.sqrt(np.mean(error**2)))
    assert worst[0] <= largest and worst[1] <= rms, f"{name}: largest {worst[0]:.2e}, rms {worst[1]:.2e} of its rms"


def within(op, got, times, **inputs):
    """AssertionError unless `got` is within `times` the op's budget of the float64 reference."""
    ref = getattr(kl.reference, op)(**inputs)
    bounds = budget(op, ref, **inputs)
    parts = zip(*(x if isinstance(x, tuple) else (x,) for x in (got, ref, bounds)), strict=True)
    for i, (g, r, bound) in enumerate(parts):
        ratio = np.abs(np.asarray(g, np.float64) - r) / (times * bound + 1e-300)
        assert np.asarray(g).shape == np.shape(r) and np.isfinite(g).all()
        assert ratio.max(initial=0) <= 1, f"{op}[{i}]: {ratio.max():.3g} of {times} budgets"


def numpy(x) -> np.ndarray:
    return x.detach().cpu().numpy()


def t(x) -> torch.Tensor:
    return torch.from_numpy(np.array(x))
