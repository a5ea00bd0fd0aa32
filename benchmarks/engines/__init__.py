"""Engines that run a whole model, each in a process of its own that lasts: both are loaded once and take turns.

A script here makes an ``Engine`` with ``open(path, threads, context, ...)``, ``about()``, ``run(tokens, step)``,
``logits()``, ``empty()``, ``keep(name)``, ``restore(name)`` and ``memory()``, and serves it; `Process` calls them.
"""

import base64
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import kimi_linear

__all__ = ["EngineError", "Process", "llama_python"]

HERE = Path(__file__).parent


class EngineError(Exception):
    """What went wrong in an engine's process."""


class Process:
    """An engine's process.

    Parameters
    ----------
    script : str
        ``"ours"`` or ``"llama"``.
    python : str or path, optional
        The interpreter, of the environment that has the engine.
    """

    def __init__(self, script, python=sys.executable):
        root = str(Path(kimi_linear.__file__).parents[1])  # the package that this process has
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self.script = script
        self.process = subprocess.Popen([str(python), str(HERE / f"{script}.py")], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})

    def call(self, do, **arguments):
        """The value of a method."""
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineError(f"{self.script}: its process ended with {self.process.wait()} in {do}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise EngineError(f"{self.script}: {do}: {answer['error']}")
        return answer

    def logits(self):
        """Of the last token read, (vocab,) float32."""
        return np.frombuffer(base64.b64decode(self.call("logits")), np.float32)

    def close(self):
        """End the process; its memory is free then."""
        with contextlib.suppress(BrokenPipeError):  # a line that a process did not live to read
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def llama_python():
    """The interpreter that has llama.cpp: this one, or that of the environment that `make peers` makes; else None."""
    import importlib.util

    if importlib.util.find_spec("llama_cpp"):
        return sys.executable
    found = HERE.parents[1] / ".venv-peers" / "bin" / "python"
    return str(found) if found.exists() else None
