"""The entry of the command ``kimi-linear``: Ctrl-C is one line, too, while the package is being imported.

A module of its own beside the package, as importing any module of the package imports all of it.
"""

import os
import signal
import sys


def main():
    """Import the package, run the command of ``sys.argv``, return its exit code."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not where a script runs it in its background
        signal.signal(signal.SIGINT, _leave)
    from kimi_linear.cli import main as run

    signal.signal(signal.SIGINT, before)
    return run()


def _leave(*_):
    """Ends the process at once: an exception would go through the imports of others, which make another of it."""
    os.write(sys.__stderr__.fileno(), b"\nkimi-linear: interrupted\n")
    os._exit(130)
