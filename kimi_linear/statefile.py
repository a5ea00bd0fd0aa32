"""State files: a state on disk, every bit of it checked.

A state file is a safetensors file. Its arrays are those of the state under their own names, ``tokens`` [position]
int32, and what checkpoint j keeps under ``checkpoints.j.`` and their own names. Its metadata are

    format       "kimi_linear.state"
    version      "2", or "1" where there are no checkpoints; a reader refuses newer ones
    position     tokens read
    checkpoints  JSON: positions of the checkpoints, rising; in version 2
    cache        "float32", "float16" or "q8_0"
    model        name of the model, for people
    fingerprint  of the model's config and weights: see `fingerprint`
    manifest     JSON: array -> {"dtype", "shape", "blake2b" of its bytes, 16 bytes in hex}
    checksum     blake2b, 16 bytes in hex, of the file's first 8 bytes and its header, with 32 zeros in this place
"""

import errno
import hashlib
import json
import math
import os
import shutil

import numpy as np

from ._arrays import as_integers
from .context import current
from .errors import FormatError
from .load import SafetensorsFile, atomic_file
from .load.safetensors import DTYPES, array_of
from .state import State

__all__ = ["FORMAT", "VERSION", "fingerprint", "load", "save"]

FORMAT, VERSION = "kimi_linear.state", 2
_NAMES = {np.dtype(np.int32): "I32", np.dtype(np.float32): "F32", np.dtype(np.float16): "F16",
          np.dtype(np.uint8): "U8"}
_DIGEST = 16  # bytes
_SAMPLE = 64  # bytes of a tensor in a fingerprint
_ALIGN = 64


def _digest(*parts):
    hasher = hashlib.blake2b(digest_size=_DIGEST)
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def _raw(a):
    """The bytes of an array, in its order."""
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8).data


# ---- whose state it is -------------------------------------------------------------------------------


def fingerprint(config, tensors):
    """What tells one model from another without reading all of it.

    Parameters
    ----------
    config : Config
    tensors : mapping from name to array, or to a TensorView of a mapped file

    Returns
    -------
    str
        blake2b in hex of the config's JSON (and latent_eps) and, in the order of the names, of each tensor's name,
        dtype, shape and the 64 bytes in its middle: one page of a mapped file a tensor. Of a GGUF's blocks, split
        heads and rates these are the bytes as stored.
    """
    parts = [json.dumps([config.to_dict(), config.latent_eps], sort_keys=True).encode()]
    for name in sorted(tensors):
        if hasattr(tensors[name], "digest_parts"):
            parts += tensors[name].digest_parts(_SAMPLE)
            continue
        a = array_of(tensors[name])
        middle = max(0, a.nbytes // 2 - _SAMPLE // 2)
        values = a.reshape(-1)[middle // a.itemsize : -(-(middle + _SAMPLE) // a.itemsize)]
        parts += [f"{name} {a.dtype} {a.shape}".encode(), _raw(values)]
    return _digest(*parts)


def _fingerprint_of(model, tensors):
    """Made once for each set of weights of a model."""
    known = model.__dict__.get("_fingerprint")
    if known is None or known[0] is not tensors:
        known = model.__dict__["_fingerprint"] = (tensors, fingerprint(model.config, tensors))
    return known[1]


# ---- save --------------------------------------------------------------------------------------------


def _arrays(state, tokens):
    """(name, array) one at a time; wide types first, so that every array stays aligned."""
    yield "tokens", tokens
    for j in range(len(state.checkpoints)):
        yield from ((_of(j, name), a) for name, a in state._of_checkpoint(j))
    yield from (item for width in (4, 2, 1) for item in state.items() if item[1].itemsize == width)


def _of(j, name):
    """Name in the file of what checkpoint j keeps of an array."""
    return f"checkpoints.{j}.{name}"


def _header(state, manifest):
    """The file's first bytes, up to the data."""
    checkpoints = state.checkpoints
    header = {"__metadata__": {
        "format": FORMAT, "version": "2" if checkpoints else "1", "position": str(state.position),
        "cache": state.cache, "model": state._model.name,
        "fingerprint": _fingerprint_of(state._model, state._tensors),
        "manifest": json.dumps(manifest, separators=(",", ":")), "checksum": "0" * 2 * _DIGEST,
        **({"checkpoints": json.dumps(checkpoints)} if checkpoints else {}),
    }}
    begin = 0
    for name, entry in manifest.items():
        end = begin + math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
        header[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    raw = len(text).to_bytes(8, "little") + text
    place = raw.index(_CHECKSUM_KEY) + len(_CHECKSUM_KEY)
    return raw[:place] + _digest(raw).encode() + raw[place + 2 * _DIGEST :], begin


_CHECKSUM_KEY = b'"checksum":"'


def save(state, path):
    """Write a state to a file; see `State.save`."""
    tokens = np.array(state.tokens, np.int32)
    if len(tokens) != state.position:
        raise ValueError(f"the state has read {state.position} tokens and knows {len(tokens)}; it cannot be saved")
    manifest = {name: {"dtype": _NAMES[a.dtype], "shape": list(a.shape), "blake2b": _digest(_raw(a))}
                for name, a in _arrays(state, tokens)}
    header, n_data = _header(state, manifest)
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
    if len(header) + n_data > free:
        raise OSError(errno.ENOSPC, f"the state would be {len(header) + n_data:,} bytes and {free:,} are free on its "
                      "disk", os.fspath(path))
    with atomic_file(path) as file:
        file.write(header)
        for name, a in _arrays(state, tokens):
            if _digest(_raw(a)) != manifest[name]["blake2b"]:
                raise ValueError(f"{name} changed while the state was saved; nothing was written")
            file.write(_raw(a))


# ---- load --------------------------------------------------------------------------------------------


def _checked_metadata(file):
    """The metadata of a state file whose header is whole."""
    def refuse(problem):
        raise FormatError(problem, str(file.path))

    meta = file.metadata
    if meta.get("format") != FORMAT:
        refuse(f"its header does not name a state of kimi_linear: format is {meta.get('format')!r}")
    version = meta.get("version", "")
    if version not in ("1", str(VERSION)):
        newer = version.isascii() and version.isdigit() and len(version) < 9 and int(version) > VERSION
        refuse(f"its header has version {version[:20]!r}; this build reads versions 1 to {VERSION}"
               + (", so a newer one is needed" if newer else ""))
    n = int.from_bytes(file.mapping[:8], "little")
    raw = file.mapping[: 8 + n]
    place = raw.find(_CHECKSUM_KEY) + len(_CHECKSUM_KEY)
    blank = raw[:place] + b"0" * 2 * _DIGEST + raw[place + 2 * _DIGEST :]
    if _digest(blank).encode() != raw[place : place + 2 * _DIGEST]:
        refuse("its header does not have the checksum that it says: the file is damaged")
    return meta


def _manifest(file, meta):
    try:
        manifest = json.loads(meta.get("manifest", ""))
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        raise FormatError("its header's manifest is no JSON object", str(file.path))
    return manifest


def _checked_arrays(file, meta):
    """Name -> array on the file's pages, each with the checksum of the manifest."""
    manifest, arrays, problems = _manifest(file, meta), {}, []
    for name, view in file.items():
        a = view.array()
        if manifest.get(name) != {"dtype": view.dtype, "shape": list(view.shape), "blake2b": _digest(_raw(a))}:
            problems.append(f"{name} does not have the checksum that the manifest says: the file is damaged")
        arrays[name] = a
    if problems:
        raise FormatError(problems, str(file.path))
    return arrays


def load(path, model, *, context=0, checkpoints_every=None, keep=0):
    """Read a state from a file; see `State.load`."""
    file = SafetensorsFile(path)
    meta = _checked_metadata(file)
    if meta.get("fingerprint") != _fingerprint_of(model, model._tensors):
        raise ValueError(f"{path}: the state is of the model {meta.get('model')!r}, with other weights or another "
                         f"config than {model.name!r}")
    arrays = _checked_arrays(file, meta)
    state = State(model, cache=meta.get("cache"), context=context, checkpoints_every=checkpoints_every, keep=keep,
                  ctx=model.ctx)
    positions, kept = _checkpoints(file, meta), state.fixed()
    wanted = {"tokens", *state.keys(), *(_of(j, name) for j in range(len(positions)) for name in kept)}
    if arrays.keys() != wanted:
        odd = sorted(arrays.keys() ^ wanted)
        raise FormatError(f"its arrays are not those of this model's states: {', '.join(odd[:4])}", str(path))
    tokens = as_integers(arrays["tokens"], "tokens", ("position",), low=-1, high=model.config.vocab_size)
    if positions and positions[-1] > len(tokens):
        raise FormatError(f"its header has a checkpoint at {positions[-1]}; {len(tokens)} tokens were read", str(path))
    core = current(model.ctx)._core
    state._core.fill(core, len(tokens))
    for j, at in enumerate(positions if state.keep else []):
        for name in kept:
            state[name] = arrays[_of(j, name)]
        state._core.checkpoint(core, at)
    for name in state:
        state[name] = arrays[name]
    state.tokens = tokens.tolist()
    if state.keep:
        state.checkpoint()
    return state


def _checkpoints(file, meta):
    """Positions of the checkpoints of a file."""
    if meta["version"] == "1":
        return []
    try:
        positions = json.loads(meta.get("checkpoints", ""))
    except (ValueError, RecursionError):
        positions = None
    if (not isinstance(positions, list) or any(type(at) is not int or not 0 <= at < 2**62 for at in positions)
            or positions != sorted(set(positions))):
        raise FormatError("its header's checkpoints are no JSON list of rising positions", str(file.path))
    return positions
