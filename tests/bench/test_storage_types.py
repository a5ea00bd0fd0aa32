"""The benchmark of storage types runs, small, and says which types have products with narrow activations."""

import importlib
import sys

import pytest

import kimi_linear as kl

run, storage_types = map(importlib.import_module, ("run", "storage_types"))


def test_every_type_has_its_rates():
    found = list(storage_types.run(tokens=(1, 3), turns=1, rows=24, at_least=1 << 16, threads=1))
    assert [(r["type"], r["tokens"]) for r in found] == [(name, T) for name in kl.storage_types for T in (1, 3)]
    for r in found:
        assert r["f32_weights"] > 0 and r["float32"] > 0
        assert r["bytes"] * 8 == pytest.approx(r["values"] * bits(r["type"]))
        assert len(storage_types.row(r)) == len(storage_types.HEADER)
    narrow = {r["type"] for r in found if "narrow" in r}
    assert {"Q8_0", "Q4_K", "MXFP4", "BF16"} <= narrow and not narrow & {"F32", "F16", "IQ1_S"}


def test_values_are_written_where_there_is_memory_already(monkeypatch):
    seen, dequantize = [], kl.ops.dequantize
    monkeypatch.setattr(kl.ops, "dequantize", lambda *args, **named: seen.append(named) or dequantize(*args, **named))
    assert list(storage_types.run(["Q4_K"], tokens=(1,), turns=3, rows=24, at_least=1 << 16, threads=1))
    assert len({named["out"].ctypes.data for named in seen}) == 1


def bits(name):
    kind = kl.storage_types[name]
    return 8 * kind.bytes / kind.values


def test_only_types_that_there_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "types", "--parts", "Q4_K,Q9"])
    with pytest.raises(SystemExit):
        run.main()
    assert "there is no Q9; there are F32, F16" in capsys.readouterr().err
