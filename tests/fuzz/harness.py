"""What the fuzzers share: a folder of inputs that begins with the target's seeds, or one input again."""

import hashlib
import os
import tempfile
from pathlib import Path

import atheris


def run(target, argv, mutated, *, room):
    """Fuzz as the command line says: ``[folder | file] [libFuzzer options]``; a file is only run, once.

    `target` takes bytes and has `seeds()` and `files`; inputs may be `room` bytes longer than the longest file.
    """
    if len(argv) > 1 and os.path.isfile(argv[1]):
        return target(Path(argv[1]).read_bytes())
    named = len(argv) > 1 and not argv[1].startswith("-")
    folder = Path(argv[1]) if named else Path(tempfile.mkdtemp(prefix="inputs"))
    folder.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (folder / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    longest = f"-max_len={max(map(len, target.files)) + room}"
    atheris.Setup([argv[0], str(folder), longest, *argv[2 if named else 1 :]], target, custom_mutator=mutated)
    atheris.Fuzz()
