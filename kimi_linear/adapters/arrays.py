"""A Trace from a folder of ``.npy`` or ``.npz`` files, with a mapping that says which array is which tap and how it
lies.

    {"layer_base": 1, "dtype": "bfloat16", "tokens": "ids.npy", "lengths": [7, 5], "padding": "left",
     "taps": {"layers.{i}.kda.v_conv": {"file": "blk{i}_v.npy", "axes": "BHTK", "bits": "bfloat16"},
              "layers.{i}.mlp.gate | layers.{i}.mlp.up": {"file": "ffn.npz", "key": "gate_up_{i}"},
              "layers.{i}.kda.state": {"file": "state{i}.npy", "axes": "NHVK"},
              "layers.3.mla.q": {"file": ["q_nope.npy", "q_pe.npy"]},
              "logits": "logits.npy"}}

``{i}`` is each layer that has the tap, in file names counted from `layer_base`. The letters of `axes` are those of
`kimi_linear.adapters._layout`. Without a mapping the names of files, or of the members of one npz, must be our taps.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np

from ..errors import FormatError
from . import _mapped
from ._mapped import steps_of

__all__ = ["read", "read_npy", "read_npz", "steps_of"]

_MAGIC = b"\x93NUMPY"


def read(path, mapping=None, *, model):
    """A Trace of arrays in files.

    Parameters
    ----------
    path : str or path
        A folder, or one npz.
    mapping : str, path or mapping, optional
        A JSON file or what it holds; by default ``mapping.json`` of the folder, where there is one.
    model : Model or Config
        Whose taps they are.

    Returns
    -------
    Trace
        ``meta["left_out"]`` names the taps of a pattern with ``{i}`` that have no file.

    Raises
    ------
    FileNotFoundError, KeyError
        If a file or a key is not there; the message names it.
    FormatError
        If a file is damaged, truncated, or holds Python objects (pickle), which are never read.
    ValueError, TypeError
        If shape or type do not fit; the message says what they must be.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; it must be a folder of .npy and .npz files, or one npz")
    folder = path if path.is_dir() else path.parent
    if mapping is None and path.is_dir() and (path / "mapping.json").exists():
        mapping = path / "mapping.json"
    mapping = None if mapping is None else _mapped.load_mapping(mapping)
    alone = None if path.is_dir() else path
    there = read_npz(path).keys() if alone else [p.stem for p in sorted(path.glob("*.npy"))]
    if alone is None and not there and mapping is None:
        raise ValueError(f"{path} has no .npy file; it must have some, or a mapping")
    opened = {}

    def get(file, key):
        where = alone if file is None and alone else folder / (file or f"{key}.npy")
        if not where.exists():
            raise KeyError(f"{where} is not there")
        if where.suffix != ".npz":
            return read_npy(where)
        if where not in opened:
            opened[where] = read_npz(where)
        if key not in opened[where]:
            some = ", ".join(list(opened[where])[:4])
            raise KeyError(f"{where} has no {key!r}; it has {some or 'nothing'}")
        return opened[where][key]

    trace = _mapped.read(get, list(there), mapping, model)
    trace.meta.setdefault("source", str(path))
    return trace


def read_npy(path):
    """The array of a .npy file, mapped; FormatError where it is none, is cut short, or holds Python objects."""
    path = Path(path)
    with open(path, "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise FormatError("it is no .npy file", str(path))
    try:
        size, start = _header(path.open("rb"), path)
        if path.stat().st_size < start + size:
            raise FormatError(f"it is cut short: {path.stat().st_size - start:,} of {size:,} bytes", str(path))
        return np.load(path, mmap_mode="r" if size else None, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"it cannot be read: {error}", str(path)) from None


def read_npz(path):
    """The arrays of an npz, read when they are asked for: a mapping from name to array."""
    try:
        return _Npz(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise FormatError(f"it is no npz, or it is cut short: {error}", str(path)) from None


class _Npz(dict):
    """Members of a zip; every header is looked at before memory is taken for it."""

    def __init__(self, path):
        self.path, self.zip = Path(path), zipfile.ZipFile(path)
        super().__init__((i.filename.removesuffix(".npy"), i) for i in self.zip.infolist()
                         if i.filename.endswith(".npy"))

    def __getitem__(self, name):
        info = super().__getitem__(name)
        where = f"{self.path}:{name}"
        try:
            with self.zip.open(info) as file:
                size, start = _header(file, where)
            if start + size != info.file_size:
                raise FormatError(f"its header says {size:,} bytes and it has {info.file_size - start:,}", where)
            with self.zip.open(info) as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"it cannot be read: {error}", where) from None


def _header(file, where):
    """(bytes of the values, where they begin) by a .npy header; FormatError where values are Python objects."""
    with file:
        version = np.lib.format.read_magic(file)
        of_version = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in of_version:
            raise FormatError(f"it is of version {version}; 1.0 and 2.0 are read", str(where))
        shape, _, dtype = of_version[version](file)
        if dtype.hasobject:
            raise FormatError("it holds Python objects (pickle), which are not read; save plain arrays", str(where))
        return math.prod(shape) * dtype.itemsize, file.tell()
