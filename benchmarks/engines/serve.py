"""The side of a process that holds an engine: lines of JSON in, lines of JSON out."""

import ctypes
import json
import os
import sys

__all__ = ["own_memory", "serve"]


def serve(engine):
    """Answer {"do": method, ...} on each line of stdin by its value, or by {"error": sentence}, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        task = json.loads(line)
        try:
            answer = getattr(engine, task.pop("do"))(**task)
        except Exception as error:  # whatever it is, the one who asked must hear of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def own_memory():
    """Bytes of memory that are the process's own, without mapped files; what was freed is given back first."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))
