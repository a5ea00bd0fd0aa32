"""What `kimi-linear inspect` says of Kimi K3: its parts, and that packed experts are copied."""

import pytest
from conftest import DATA

import kimi_linear as kl
from kimi_linear.cli import main

PARTS = {
    "KDA": "5 layers: 2 heads of 20, convolution of 4, gate bounded at -5, output gate of full rank",
    "MLA": "2 layers: 3 heads of 12 + 6, values 10, latent 24, q by rank 28, output gated",
    "activation": "SiTU, beta 4, 25 of the other factor",
    "experts": "6 layers: 3 of 10 of width 64 on a latent of 32, 2 shared; sigmoid router, renormalised, scale 1",
    "residuals": "attended: a snapshot each 3 layers, 3 in all",
}


def rows(capsys, path):
    assert main(["inspect", str(path)]) == 0
    return dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())


def test_each_part_has_a_row(capsys):
    shown = rows(capsys, DATA / "golden" / "k3-a")
    assert {name: shown.get(name) for name in PARTS} == PARTS
    other = rows(capsys, DATA / "golden" / "k3-b")
    assert other["activation"] == "SiTU, beta 2.5" and "residuals" not in other and "gated" not in other["MLA"]


@pytest.mark.parametrize("to_gguf", [False, True])
def test_experts_in_halves_are_copied(capsys, tmp_path, to_gguf):
    path = DATA / "golden" / "k3-a"
    if to_gguf:
        kl.convert(path, tmp_path / "a.gguf")
        path = tmp_path / "a.gguf"
    note = rows(capsys, path).get("note", "")
    assert note.startswith("191 KiB of experts") != to_gguf
