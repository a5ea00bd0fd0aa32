"""What transformers' model-addition debugger leaves behind, written here in its format."""

import json

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear import golden
from kimi_linear.adapters import debugger
from kimi_linear.diff import blame, traces
from kimi_linear.load.safetensors import write_safetensors

IDS = np.arange(4, 15)
CLASS = "KimiLinearForCausalLM"


@pytest.fixture(scope="module")
def model():
    return kl.Model.tiny()


@pytest.fixture(scope="module")
def ours(model):
    return model.trace(IDS)


def tensor(folder, name, x, kept=True):
    if kept:
        write_safetensors(folder / f"{name}.safetensors", {"data": np.ascontiguousarray(x)})
    return {"shape": f"torch.Size({list(x.shape)})", "dtype": "torch.float32", "mean": f"tensor({x.mean():.4e})",
            "std": "tensor(nan)", "min": f"tensor({x.min():.4e})", "max": f"tensor({x.max():.4e})",
            "value": f"./{name}.safetensors" if kept else ["tensor([[ 1.0e+00, ...,"]}


@pytest.fixture
def dump(tmp_path, ours, model):
    """Leaf modules' results and the inputs of some, as the context manager names the files."""
    return write(tmp_path, ours, model.config)


def write(folder, ours, config, kept=True, layers=range(6)):
    children = []
    for path, tap in golden.names(config).items():
        layer = int(path.split(".")[2]) if path.startswith("model.layers.") else None
        if "/" in path or tap not in ours and "{}" not in tap or layer is not None and layer not in layers:
            continue
        full = f"{CLASS}.{path}"
        x = np.concatenate([ours[tap.format(s)] for s in ("latent_raw", "k_shared")], -1) if "{}" in tap else ours[tap]
        children.append({"module_path": full, "inputs": {},
                         "outputs": tensor(folder, f"{full}_outputs", x.reshape(1, len(IDS), -1), kept)})
    for i in layers:
        full = f"{CLASS}.model.layers.{i}.post_attention_layernorm"
        children.append({"module_path": full, "outputs": None, "inputs": {
            "args": [tensor(folder, f"{full}_inputs_args_0", ours[f"layers.{i}.mid"][None], kept)]}})
    tree = {"module_path": CLASS, "children": [{"module_path": f"{CLASS}.model", "inputs": {}, "children": children}],
            "inputs": {"kwargs": {"input_ids": tensor(folder, f"{CLASS}_inputs_kwargs_input_ids", IDS[None], kept)}}}
    (folder / f"{CLASS}_debug_tree_FULL_TENSORS.json").write_text(json.dumps(tree), encoding="utf-8")
    return folder


def test_read(dump, ours, model):
    found = debugger.read(dump, model=model)
    assert found.tokens.tolist() == IDS.tolist() and "left_out" not in found.meta
    assert len(found) > 60 and all(np.array_equal(x, ours[n]) for n, x in found.items())
    assert "layers.3.mid" in found and "layers.3.mla.k_shared" in found
    assert traces(found, ours).ok and blame(model, found).ok


def test_printed_tensors_and_pruned_layers(tmp_path, ours, model):
    write(tmp_path, ours, model.config, kept=False)
    with pytest.raises(kl.FormatError, match="its tensors are printed and not kept: record with use_repr=False"):
        debugger.read(tmp_path, model=model)
    of_norm = debugger.figures(tmp_path)["model.norm/outputs"]
    assert of_norm["shape"] == [1, len(IDS), 256] and abs(of_norm["max"] - ours["norm"].max()) < 1e-3
    write(tmp_path, ours, model.config, layers=(0, 5))
    found = debugger.read(tmp_path, model=model)
    assert found.meta["left_out"] == ["layers 1, 2, 3, 4: pruned from the tree (do_prune_layers=False keeps them)"]


def test_hostile_and_damaged(dump, model):
    file = dump / f"{CLASS}_debug_tree_FULL_TENSORS.json"
    text = file.read_text(encoding="utf-8")

    def refused(new, error, says):
        file.write_text(new, encoding="utf-8")
        with pytest.raises(error, match=says):
            debugger.read(dump, model=model)

    refused(text.replace(f"./{CLASS}.lm_head", "./../../etc/x"), kl.FormatError, "it must be one in the same folder")
    refused(text.replace("lm_head_outputs", "lm_head_none"), FileNotFoundError,
            "lm_head_none.safetensors is not there; the tree")
    refused(text[:-5], kl.FormatError, "it is not JSON")
    refused("{}", kl.FormatError, "it has no children; it must be a tree of modules")
    refused('{"children": [{"children": 3}, 4, null]}', kl.FormatError, "it has no tensor of a module that has a tap")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has 0 files \*_debug_tree_FULL_TENSORS.json; it must have one"):
        debugger.read(dump, model=model)


def test_another_model(dump, golden_dir):
    other = kl.Model.from_pretrained(golden_dir / "kimi-a")
    with pytest.raises(ValueError, match=r"has shape \[11, \d+\]; of this model it must be .*: is it another?"):
        debugger.read(dump, model=other)
