"""tools/make_golden_glm.py makes the committed files of GLM-5.3-Flash again, in a process of its own: it changes
transformers."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from conftest import DATA, GLM_CASES, HERE, read_safetensors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    subprocess.run([sys.executable, HERE.parent / "tools" / "make_golden_glm.py", folder], check=True, timeout=300)
    return folder


@pytest.mark.parametrize("case", GLM_CASES)
def test_the_checkpoint(made, case):
    """The same config and tensors; a weight drawn by another libm may round the other way, one in 1000."""
    old, new = DATA / "golden" / case, made / case
    for name in ("config.json", "generation_config.json"):
        assert (old / name).read_text() == (new / name).read_text()
    old, new = (read_safetensors(folder / "model.safetensors") for folder in (old, new))
    assert set(old) == set(new)
    for name, x in old.items():
        y = new[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        step = 2.0**-7 if x.dtype == ml_dtypes.bfloat16 else 1e-6
        assert np.allclose(x.astype(float), y.astype(float), rtol=step), name
        assert (x != y).mean() <= 1e-3, name


@pytest.mark.parametrize("file, largest", [("golden", 2.0**-23), ("golden64", 1e-11)])
@pytest.mark.parametrize("case", GLM_CASES)
def test_the_arrays(made, case, file, largest):
    """Tokens, experts and positions equal, floats within a rounding to the file's type, or what float64 leaves of
    one."""
    old, new = (read_safetensors(folder / case / f"{file}.safetensors") for folder in (DATA / "golden", made))
    assert set(old) == set(new)
    for name, x in old.items():
        y = new[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        if x.dtype.kind in "iu":
            assert np.array_equal(x, y), name
        elif x.size:
            scale = np.abs(x).max() if file == "golden" else np.sqrt(np.mean(x**2))
            assert np.abs(y - x).max() <= largest * scale, name
