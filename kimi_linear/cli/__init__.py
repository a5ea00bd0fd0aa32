"""The command line: ``kimi-linear COMMAND ...``, one module a command.

A command module has ``HELP`` (one line), ``EPILOG`` (examples), ``add_arguments(parser)`` and ``run(args) ->
int``. Exit codes: 0 done; 1 done, and the answer is no (a comparison over its budget); 2 bad usage or input,
said in one sentence on stderr; 130 interrupted; 141 the reader of the output has gone.
"""

import argparse
import difflib
import importlib
import os
import shlex
import sys
import warnings

from ..errors import DeviceError

__all__ = ["COMMANDS", "main"]

COMMANDS = ("demo", "generate", "chat", "inspect", "plan", "verify", "laws", "golden", "trace", "diff", "blame",
            "report", "replay", "perplexity", "bench", "convert", "quantize")

_BAD_INPUT = (ValueError, TypeError, KeyError, OSError, MemoryError, NotImplementedError, DeviceError,
              ImportError)  # a package that an input needs and that is not there


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, without the usage before it; an unknown option is the first."""

    def parse_known_args(self, args=None, namespace=None):
        before = None
        for arg in sys.argv[1:] if args is None else args:
            if arg == "--":
                break  # what follows are positional arguments
            if _looks_like_an_option(arg) and not self._knows(arg):
                action = self._option_string_actions.get(before)
                takes = action is not None and action.nargs != 0
                value = f"; if it is a value, {before}={shlex.quote(arg)}" if takes else ""
                self.error(self._unknown(arg.partition("=")[0]) + value)
            before = arg
        return super().parse_known_args(args, namespace)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def _knows(self, arg):
        options = self._option_string_actions
        short = arg[1] != "-" and arg[:2] in options  # -n3
        return short or arg.partition("=")[0] in options

    def _unknown(self, name):
        words = {option.lstrip("-"): option for option in self._option_string_actions if option.startswith("--")}
        near = [w for w in words if name.startswith("--") and w.startswith(name[2:])]
        near = near or difflib.get_close_matches(name.lstrip("-"), words, n=1, cutoff=0.65)
        return f"{name} is not an option" + (f"; did you mean {words[near[0]]}?" if near else "")


def _looks_like_an_option(arg):
    """As argparse has it: a number, a lone dash and what has a blank in it are values."""
    if len(arg) < 2 or arg[0] != "-" or " " in arg:
        return False
    try:
        float(arg)
    except ValueError:
        return True
    return False


def main(argv=None):
    """Run a command and return its exit code.

    Parameters
    ----------
    argv : list of str, optional
        Without the program's name; by default the process's.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    _open_streams()
    if not argv or argv[0] not in COMMANDS:
        return _guarded("kimi-linear", _no_command, argv)
    prog = f"kimi-linear {argv[0]}"
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest, **named: print(f"{prog}: {message}", file=sys.stderr)
        return _guarded(prog, _run_command, argv)


def _open_streams():
    """Streams that were closed lead nowhere; a character that stdout's encoding lacks is written as its escape."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _run_command(argv):
    command = importlib.import_module(f"{__name__}.{argv[0]}")
    return command.run(_parser(argv[0], command).parse_args(argv[1:]))


def _guarded(prog, run, args):
    try:
        try:
            return run(args)
        finally:
            sys.stdout.flush()  # of argparse's help, too, which exits
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return 141
    except _BAD_INPUT as error:
        said = _sentence(error).removeprefix(f"{prog.split()[-1]}: ")  # the core's plan begins so, too
        print(f"{prog}: {said}", file=sys.stderr)
        return 2


def _sentence(error):
    if isinstance(error, KeyError) and error.args:
        return error.args[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) and not str(error):  # Python's own
        return "there is not enough memory"
    return str(error) or type(error).__name__


def _parser(name, command):
    examples = "\n".join(f"  {line}".rstrip() for line in command.EPILOG.strip().splitlines())
    parser = _Parser(prog=f"kimi-linear {name}", description=command.HELP, epilog=f"example:\n{examples}",
                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_arguments(parser)
    return parser


def _no_command(argv):
    """Help, the version, or what is wrong with the name of the command."""
    if argv and argv[0] in ("--version", "-V"):
        from .. import __version__

        print(f"kimi-linear {__version__}")
        return 0
    if argv and argv[0] not in ("--help", "-h", "help"):
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"it has {', '.join(COMMANDS)}"
        print(f"kimi-linear: there is no command {argv[0]!r}; {meant}", file=sys.stderr)
        return 2
    _print_help(sys.stdout if argv else sys.stderr)
    return 0 if argv else 2


def _print_help(file):
    print("usage: kimi-linear COMMAND [arguments]\n", file=file)
    print("Kimi-Linear, Kimi K3, GLM-5.3-Flash, Qwen3-Next, Qwen3.5; every number beside float64.\n", file=file)
    for name in COMMANDS:
        print(f"  {name:<12}{importlib.import_module(f'{__name__}.{name}').HELP}", file=file)
    print("\nA command's own help has an example: kimi-linear COMMAND --help", file=file)
    print("Without a model, a command that runs one takes the trained one in the package.", file=file)
    print("Exit codes: 0 done; 1 done, and the answer is no; 2 bad usage or input; 130 interrupted.", file=file)
    print('example:\n  kimi-linear generate --prompt "In the beginning"', file=file)
