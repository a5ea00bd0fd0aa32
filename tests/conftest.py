"""Paths and readers that the tests share."""

from __future__ import annotations

import json
import signal
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

# What a script runs in its background has Ctrl-C ignored, and hands that on to the programs that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).parent
DATA = HERE / "data"
TINY = HERE.parent / "kimi_linear" / "data" / "tiny"
KIMI_CASES, QWEN_CASES = ("kimi-a", "kimi-b"), ("qwen-a", "qwen35-a", "qwen35-moe")
K3_CASES, GLM_CASES = ("k3-a", "k3-b"), ("glm-a", "glm-b")
TRANSFORMERS_CASES = KIMI_CASES + QWEN_CASES  # what computed them in float32; K3's are MLX's, GLM's a float64 run of it
GOLDEN_CASES = TRANSFORMERS_CASES + K3_CASES + GLM_CASES
PROMPTS = ("short", "long")

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
          "I64": np.int64, "I32": np.int32, "U8": np.uint8}


def pytest_collection_modifyitems(items):
    """A name with an address in it differs in each process, and parallel runs then refuse to start."""
    if named := [x.nodeid for x in items if " at 0x" in x.nodeid]:
        raise pytest.UsageError(f"tests named by an address; give them ids=: {named}")


def read_safetensors(path) -> dict[str, np.ndarray]:
    """Every tensor of a file, in its own type; apart from the package, so that it can judge the loader."""
    raw = Path(path).read_bytes()
    (n,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8:8 + n])
    out = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + n + x for x in entry["data_offsets"])
            out[name] = np.frombuffer(raw[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return out


def canonical_weights(path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint under the names and shapes of Config.weight_shapes()."""
    out = {}
    tensors = read_safetensors(path)
    for name, x in tensors.items():
        name = name.removeprefix("language_model.").replace("model.language_model.", "model.")
        if name.endswith("weight_scale") or name.startswith("model.visual."):
            continue
        if name.endswith("weight_packed"):
            x = mxfp4(x, tensors[f"language_model.{name.removesuffix('packed')}scale"])
            name = name.removesuffix("_packed")
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = name.replace(f"block_sparse_moe.{part}", f"mlp.{part}")
        if name.endswith("A_log"):
            heads = tensors.get("language_model." + name.replace("A_log", "b_proj.weight"))
            x = x.reshape(-1)[:None if heads is None else len(heads)]  # what is behind them is padding
        elif name.endswith("conv1d.weight"):
            x = x.reshape(x.shape[0], -1)
        out[name] = x
    return out


def mxfp4(packed, scale) -> np.ndarray:
    """[rows, columns / 2] bytes, the even column in the low half, and a scale 2^(e - 127) of 32 columns each."""
    codes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    values = codes[np.stack([packed & 15, packed >> 4], axis=-1)].reshape(len(packed), -1)
    return values * np.repeat(np.exp2(scale.astype(np.float32) - 127), 32, axis=1)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return DATA


@pytest.fixture(scope="session")
def tiny_dir() -> Path:
    """The packaged model, a Hugging Face folder."""
    return TINY


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folders kimi-a, kimi-b, qwen-a, qwen35-a, qwen35-moe: checkpoints, and what others compute for them."""
    return DATA / "golden"


@pytest.fixture(scope="session", params=KIMI_CASES)
def kimi_case(request) -> Path:
    """Each golden folder of Kimi-Linear in turn."""
    return DATA / "golden" / request.param


@pytest.fixture(scope="session", params=GOLDEN_CASES)
def golden_case(request) -> Path:
    """Each golden folder in turn."""
    return DATA / "golden" / request.param


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20251026)
