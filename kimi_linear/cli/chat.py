"""``kimi-linear chat``: a conversation that reads only what is new."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import FormatError
from ..load import SafetensorsFile
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
    parser.add_argument("--state", metavar="FILE",
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
    _loop(chat)
    if args.state is not None:
        chat.save(args.state)
    return 0


@dataclass
class Turn:
    """Where the newest answer began, for another: how often it was asked for, and the logits before it."""

    retries: int = 0
    logits: np.ndarray | None = None


class Chat:
    """A conversation, and the state that has read it.

    The state keeps a checkpoint at the end of each prompt and of each answer: a next turn, `undo` and `retry` read no
    token a second time while those checkpoints are kept.

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
        """In a few words."""
        turns = len(self.turns)
        return f"{turns} turn{'' if turns == 1 else 's'}"

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
            turn.logits = generation.prompt_logits
            self.messages = [*messages, {"role": "assistant", "content": generation.text}]
            self.turns = turns

    # ---- files ----

    def save(self, path):
        """Writes the state to `path` and the messages beside it, to ``path.json``, in place of a conversation alone."""
        _check_files(path)
        self.state.save(path)
        facts = {"format": FORMAT, "position": self.state.position, "messages": self.messages}
        beside, part = Path(f"{path}.json"), Path(f"{path}.json.part")
        part.write_text(json.dumps(facts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(part, beside)

    def load(self, path):
        """Goes on with what `save` wrote; on an error the conversation stays as it was."""
        messages = _read_messages(Path(f"{path}.json"))
        self.model.tokenizer.apply_chat_template(messages or [{"role": "user", "content": ""}])  # raises what is wrong
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
    """ValueError where a file that `save` did not write is where it would write one."""
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
        return isinstance(_read_messages(Path(path)), list)
    except ValueError:
        return False


def _read_messages(path):
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        messages = facts["messages"] if facts["format"] == FORMAT else None
    except (ValueError, KeyError, TypeError, RecursionError):
        messages = None
    if not isinstance(messages, list):
        raise ValueError(f"{path} is not what /save wrote; it must be JSON with format {FORMAT} and messages")
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
    except (ValueError, TypeError, OSError, MemoryError) as error:
        say(f"{error}")
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
