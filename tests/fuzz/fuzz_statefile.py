"""State files, fuzzed by coverage: whatever the bytes are, loading refuses with a ValueError or gives a whole state.

    make fuzz                                       ten minutes
    python tests/fuzz/fuzz_statefile.py [folder of inputs] [options of libFuzzer]
    python tests/fuzz/fuzz_statefile.py one-input   once more, with its traceback

An input is a byte that says how the file is made of the rest: 0, the rest is the file; else the rest is a file's
JSON header, to which the data of a whole file are put, with checksums that are right again in the header (bit 1) and
in the manifest (bit 2), so that what lies behind them is reached, too. Python's part is instrumented, C's is not.
"""

import hashlib
import json
import random
import sys
import tempfile
from pathlib import Path

import atheris
from harness import run

with atheris.instrument_imports(include=["kimi_linear.statefile", "kimi_linear.load.safetensors",
                                         "kimi_linear.load.strict_json", "kimi_linear.state"]):
    import kimi_linear as kl
    import kimi_linear.load.safetensors
    import kimi_linear.load.strict_json
    import kimi_linear.state
    import kimi_linear.statefile  # noqa: F401

RAW, HEADER, CHECKSUM, MANIFEST = 0, 1, 2, 4
ODD = [None, True, -1, 0, 1, 2, 2**31, 2**63, 2**64, 1e400, "", "0", "x", "1", "2", "float16", "q8_0", "I32", "F64",
       "BOOL", [], [0], [-1], [1, 0], [0, 0], [2**62], {}, "[]", "[0]", "[0, 20]", "[20, 0]", "[true]", "[1e3]", "{}",
       "[" * 50]


def whole_files(model):
    """State files: without a token, without and with checkpoints, with a cache of half floats and of blocks."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    for n, options in ((0, {}), (20, {}), (20, dict(checkpoints_every=8, keep=2)), (3, dict(cache="float16")),
                       (3, dict(cache="q8_0"))):
        state = model.new_state(**options)
        for token in range(n):
            model.forward([token], state=state, logits="none")
        state.save(folder / "whole")
        yield (folder / "whole").read_bytes()
    (folder / "whole").unlink()
    folder.rmdir()


def split(file):
    n = 8 + int.from_bytes(file[:8], "little")
    return file[8:n], file[n:]


def repaired(text, body, mode):
    """The file of a header and data, with right checksums where the mode asks for them."""
    try:
        header = json.loads(text)
        meta = header["__metadata__"]
        if mode & MANIFEST:
            manifest = json.loads(meta["manifest"])
            for name, entry in manifest.items():
                begin, end = header[name]["data_offsets"]
                entry["blake2b"] = hashlib.blake2b(body[begin:end], digest_size=16).hexdigest()
            meta["manifest"] = json.dumps(manifest, separators=(",", ":"))
            text = json.dumps(header, separators=(",", ":")).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raw = len(text).to_bytes(8, "little") + text
    key = b'"checksum":"'
    place = raw.find(key) + len(key)
    if mode & CHECKSUM and place >= len(key) and place + 32 <= len(raw):
        raw = raw[:place] + b"0" * 32 + raw[place + 32 :]
        raw = raw[:place] + hashlib.blake2b(raw, digest_size=16).hexdigest().encode() + raw[place + 32 :]
    return raw + body


class Target:
    """What is fuzzed: one load, and what must hold behind it."""

    def __init__(self):
        self.model = kl.Model.from_pretrained(Path(__file__).parents[1] / "data" / "golden" / "kimi-a")
        self.files = list(whole_files(self.model))
        self.bodies = [split(file)[1] for file in self.files]
        self.path = Path(tempfile.mkdtemp(prefix="fuzz")) / "state"

    def file_of(self, data):
        mode, rest = data[0] if data else RAW, data[1:]
        if not mode & HEADER:
            return rest
        return repaired(rest, self.bodies[mode >> 3 & 3], mode)

    def __call__(self, data):
        file = self.file_of(bytes(data))
        self.path.write_bytes(file)
        for options in ({}, {"checkpoints_every": 8, "keep": 2}):
            try:
                state = self.model.load_state(self.path, **options)
            except ValueError as error:
                assert str(error)
                continue
            assert state.position == len(state.tokens) and state.checkpoints == sorted(set(state.checkpoints))
            state.save(self.path.with_name("again"))
            again = self.model.load_state(self.path.with_name("again"), **options)
            assert again.tokens == state.tokens and again.checkpoints == state.checkpoints
            assert all(again[name].tobytes() == a.tobytes() for name, a in state.items())
            self.model.forward([1], state=state, logits="none")

    def seeds(self):
        """Inputs to begin with: each file as it is, and its header with each choice of checksums."""
        for i, file in enumerate(self.files):
            yield bytes([RAW]) + file
            for mode in (HEADER, HEADER | CHECKSUM, HEADER | CHECKSUM | MANIFEST):
                yield bytes([mode | i << 3]) + split(file)[0].rstrip()


def mutated(data, max_size, seed):
    """Half the time another value somewhere in the header's JSON, else another byte."""
    rng = random.Random(seed)
    try:
        if not data or not data[0] & HEADER or rng.random() < 0.5:
            raise ValueError
        header = json.loads(data[1:])
        meta = header["__metadata__"]
        nested = rng.random() < 0.3
        at = json.loads(meta["manifest"]) if nested else rng.choice([header, meta, *header.values()])
        key = rng.choice(list(at))
        if rng.random() < 0.2:
            at[rng.choice(["tokens", "checkpoints.0.layers.0.kda.state", "layers.9.kda.state", "x"])] = at[key]
        elif isinstance(at[key], list) and at[key] and rng.random() < 0.6:
            at[key][rng.randrange(len(at[key]))] += rng.choice([-4, -1, 1, 4, 64, 2**40])
        elif rng.random() < 0.2:
            del at[key]
        else:
            at[key] = rng.choice(ODD)
        if nested:
            meta["manifest"] = json.dumps(at, separators=(",", ":"))
        changed = data[:1] + json.dumps(header, separators=(",", ":")).encode()
        return changed if len(changed) <= max_size else data
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return atheris.Mutate(data, max_size)


if __name__ == "__main__":
    run(Target(), sys.argv, mutated, room=4096)
