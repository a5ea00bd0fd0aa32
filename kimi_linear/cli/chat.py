"""``kimi-linear chat``: a conversation that reads only what is new."""

import contextlib
import json
import os
import signal
import sys
import threading
from dataclasses import dataclass

import numpy as np

from ..errors import FormatError
from ..load import SafetensorsFile, atomic_file
from ..load.strict_json import is_there, read_limited, show
from ._common import (
    add_compute_arguments,
    add_model_argument,
    check_output,
    load_model,
    positive,
    reading,
    say,
    types_of,
)
from .generate import add_generation_arguments, generation_options

HELP = "talk with the model; each turn reads only its new tokens"
EPILOG = """
kimi-linear chat --system "Answer in one sentence." --temperature 0.7
kimi-linear chat ~/models/kimi --state evening.chat
"""
COMMANDS = """\
/retry         another answer to the last message
/undo          take the last message and its answer back
/system TEXT   begin the conversation with this instruction; it is read again
/save FILE     write the conversation: the state to FILE, the messages to FILE.json
/load FILE     go on with a conversation that was saved
/help          this
/quit          end (so does Ctrl-D; Ctrl-C ends an answer)"""
FORMAT = 1  # of FILE.json


def add_arguments(parser):
    add_model_argument(parser)
    parser.add_argument("--system", metavar="TEXT", help="an instruction before the first message")
    parser.add_argument("--state", metavar="FILE", type=os.path.expanduser,
                        help="go on with this conversation if it is there; save it at the end, with its messages in "
                             "FILE.json")
    parser.add_argument("--checkpoints", type=positive, default=16, metavar="N",
                        help="places kept to go back to without reading again, two a turn (default: %(default)s)")
    add_generation_arguments(parser)
    add_compute_arguments(parser, cache="float16", activations="auto", read_ahead=True)


def run(args):
    model = load_model(args)
    if model.tokenizer is None or model.tokenizer.chat_template is None:
        raise ValueError(f"{model.name} has no chat template; use kimi-linear generate")
    say(f"[{model.name}: {types_of(model)}]")
    chat = Chat(model, checkpoints=args.checkpoints, **generation_options(args))
    if args.state is not None and os.path.isdir(args.state):
        raise ValueError(f"--state is {args.state}, a folder; it must be a file, there or not")
    if args.state is not None:
        _check_files(args.state)  # now, and not when the conversation is over
    if args.state is not None and os.path.exists(args.state):
        chat.load(args.state)
        say(f"[{chat.summary()}]")
    if args.system is not None:
        chat.set_system(args.system)
    with _ended_by_signals() as ignore_signals:
        try:
            _loop(chat)
        finally:
            ignore_signals()
            if args.state is not None:
                chat.save(args.state)
    return 0


@contextlib.contextmanager
def _ended_by_signals():
    """SIGTERM, and SIGHUP when the terminal goes, leave the block by SystemExit, the first alone.

    Gives a function from whose call on they are ignored.
    """
    def ignore():
        for number in before:
            signal.signal(number, signal.SIG_IGN)

    def end(number, frame):
        ignore()
        sys.exit(128 + number)

    here = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in here if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, end)
    try:
        yield ignore
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Turn:
    """An answer: how often another was asked for and, of the newest, the logits before it."""

    retries: int = 0
    logits: np.ndarray | None = None


class Chat:
    """A conversation, and the state that has read it.

    The state keeps a checkpoint at the end of each prompt and of each answer: a next turn, `undo` and `retry` read no
    token a second time while those checkpoints are kept; a `retry` behind `undo` or `load` reads the last message.

    Parameters
    ----------
    model : Model
    checkpoints : int
    options
        Of ``model.generate``.

    Attributes
    ----------
    messages : list of dict
    stats : Stats or None
        Of the newest answer.
    reason : str or None
        Why that ended.
    """

    def __init__(self, model, *, checkpoints=16, **options):
        self.model, self.options, self.messages = model, options, []
        self.places = {"checkpoints_every": 1 << 40, "keep": checkpoints}
        self.state = model.new_state(**self.places)
        self.turns, self.stats, self.reason = [], None, None

    def ask(self, text, show):
        """Sends a message; pieces of the answer go to `show`, until KeyboardInterrupt at the latest."""
        self._answer([*self.messages, {"role": "user", "content": text}], [*self.turns, Turn()], show)

    def retry(self, show):
        """Another answer to the last message, by the next seed."""
        self._needs_answer("/retry")
        last = Turn(self.turns[-1].retries + 1, self.turns[-1].logits)
        self._answer(self.messages[:-1], [*self.turns[:-1], last], show)

    def undo(self):
        """Takes the last message and its answer back."""
        self._needs_answer("/undo")
        del self.messages[-2:]
        self.turns.pop()

    def set_system(self, text):
        """Begins the conversation with an instruction, in place of the one that is there."""
        kept = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *kept]
        for turn in self.turns:
            turn.logits = None

    def summary(self):
        """In a few words; with the type of a cache that was loaded, where it is another than the model's."""
        turns, cache = len(self.turns), self.state.cache
        other = "" if cache == self.model.cache else f", cache {cache}"
        return f"{turns} turn{'' if turns == 1 else 's'}{other}"

    def _needs_answer(self, verb):
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ValueError(f"{verb}: there is no answer yet")

    def _answer(self, messages, turns, show):
        """Answers the last of the messages; they become the conversation's once there is a token."""
        turn = turns[-1]
        options = {**self.options, "seed": self.options.get("seed", 0) + turn.retries}
        generation = self.model.generate(messages, state=self.state, prompt_logits=turn.logits, progress=reading(),
                                         **options)
        _watch(generation, show)
        self.stats, self.reason = generation.stats, generation.finish_reason
        if generation.tokens:
            for earlier in turns[:-1]:
                earlier.logits = None
            turn.logits = generation.prompt_logits
            self.messages = [*messages, {"role": "assistant", "content": generation.text}]
            self.turns = turns

    # ---- files ----

    def save(self, path):
        """Writes the state to `path` and the messages beside it, to ``path.json``, in place of a conversation alone.

        The messages come first: should the state fail behind them, an older one reads what it lacks.
        """
        path = os.path.expanduser(path)
        _check_files(path)
        facts = {"format": FORMAT, "position": self.state.position, "messages": self.messages}
        with atomic_file(f"{path}.json") as file:
            file.write((json.dumps(facts, ensure_ascii=False, indent=1) + "\n").encode())
        self.state.save(path)

    def load(self, path):
        """Goes on with what `save` wrote; on an error the conversation stays as it was."""
        path = os.path.expanduser(path)
        messages, options = _read_messages(f"{path}.json"), self.options.get("template_options")
        self.model.tokenizer.apply_chat_template(messages or [{"role": "user", "content": ""}],
                                                 template_options=options)  # raises what is wrong
        is_there(path)
        from ..state import State

        self.state = State.load(path, self.model, **self.places)
        self.messages = messages
        self.turns = [Turn() for message in messages if message["role"] == "user"]


def _watch(generation, show):
    """Shows the pieces; Ctrl-C ends the answer."""
    try:
        for piece in generation:
            show(piece)
    except KeyboardInterrupt:
        generation.close()


def _check_files(path):
    """ValueError where `save` could write no file, or what it did not write is where it would write one."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise ValueError(f"{path} would be in {folder}, and there is no such folder; it must be there")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} would be in {folder}, a folder that may not be written; it must be one that may")
    is_there(path)  # raises where it is no file
    is_there(f"{path}.json")
    check_output(path, _is_state, "the state of a conversation")
    check_output(f"{path}.json", _is_messages, "the messages of a conversation")


def _is_state(path):
    from ..statefile import FORMAT

    try:
        return SafetensorsFile(path).metadata.get("format") == FORMAT
    except (FormatError, OSError):
        return False


def _is_messages(path):
    try:
        return isinstance(_read_messages(path), list)
    except ValueError:
        return False


def _read_messages(path):
    try:
        facts = json.loads(read_limited(path).decode("utf-8"))
        messages = facts["messages"] if facts["format"] == FORMAT else None
    except (ValueError, KeyError, TypeError, RecursionError):
        messages = None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{path} is not what /save wrote; it must be JSON with format {FORMAT} and messages")
    roles = [message.get("role") for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(f"{path} has messages of {show(roles)}; behind one of system it must be user and assistant in "
                         "turn")
    return messages


# ---- the loop ----

def _loop(chat):
    ask = _reader()
    while True:
        try:
            line = ask().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            say("\n(/quit or Ctrl-D ends)")
            continue
        if line == "/quit":
            return
        if any("\ud800" <= c <= "\udfff" for c in line):  # bytes that made no character
            kind = sys.stdin.encoding.upper()
            say(f"the line {line!a:.40} has bytes that are not {kind}; it must be {kind} text")
        elif line:
            _obey(chat, line)


def _reader():
    """A function that reads a line: with a prompt and line editing at a terminal, else without."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # `_loop` tells what is no text, and goes on
    if not sys.stdin.isatty():
        return input
    try:
        import readline  # noqa: F401  input() uses it
    except ImportError:
        pass
    say("(/help shows the commands)")
    return lambda: input("> ")


def _obey(chat, line):
    """One line of input; what is wrong with it is said, and the conversation goes on."""
    verb, _, rest = line.partition(" ")
    try:
        if not line.startswith("/"):
            chat.ask(line, _show)
            _cost(chat)
        elif verb == "/retry":
            chat.retry(_show)
            _cost(chat)
        else:
            say(_command(chat, verb, rest.strip()))
    except BrokenPipeError:  # nobody reads any more
        raise
    except (ValueError, TypeError, OSError, MemoryError) as error:
        say(f"{error}")
    except Exception as error:  # what nobody foresaw is no reason to lose the conversation
        say(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        say("[interrupted]")


def _command(chat, verb, rest):
    """Carries out a command; the words to say."""
    if verb == "/help":
        return COMMANDS
    if verb == "/undo":
        chat.undo()
        return f"[taken back; left: {chat.summary()}]"
    if verb not in ("/system", "/save", "/load"):
        raise ValueError(f"there is no command {verb}; /help shows them")
    if not rest:
        raise ValueError(f"{verb} needs {'a text' if verb == '/system' else 'a file'}")
    {"/system": chat.set_system, "/save": chat.save, "/load": chat.load}[verb](rest)
    return {"/system": "[instruction set]", "/save": f"[saved: {rest}, {rest}.json]"}.get(verb, f"[{chat.summary()}]")


def _show(piece):
    sys.stdout.write(piece)
    sys.stdout.flush()


def _cost(chat):
    print(flush=True)
    s = chat.stats
    say(f"[{s.prompt_tokens} tokens read, {s.reused_tokens} reused; {s.new_tokens} written at {s.decode_rate:,.0f}/s; "
        f"{chat.reason}]")
