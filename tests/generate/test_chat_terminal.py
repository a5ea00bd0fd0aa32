"""Chat at a terminal: line editing, history, Ctrl-C and Ctrl-D at the prompt and in an answer."""

import contextlib
import os
import pty
import select
import subprocess
import sys
import time

import pytest

pytest.importorskip("readline", reason="line editing is tested where Python was built with readline")

#: Takes the terminal on stdin for its own, so that its Ctrl-C is heard, and becomes the chat.
OWN_TERMINAL = ("import os, sys, fcntl, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
                "os.execv(sys.executable, [sys.executable, '-m', 'kimi_linear', 'chat', *sys.argv[1:]])")
CTRL_A, CTRL_C, CTRL_D, UP = "\x01", "\x03", "\x04", "\x1b[A"


class Terminal:
    """A chat on a terminal of its own: `type` what a hand types, `see` what an eye sees."""

    def __init__(self, *argv):
        self.fd, inner = pty.openpty()
        self.process = subprocess.Popen([sys.executable, "-c", OWN_TERMINAL, *argv], stdin=inner, stdout=inner,
                                        stderr=inner, env={**os.environ, "TERM": "xterm", "INPUTRC": "/dev/null"})
        os.close(inner)
        self.unseen = ""

    def type(self, text):
        os.write(self.fd, text.encode())

    def see(self, text, seconds=60):
        """Waits until the text is shown; what was shown up to its end since the last text seen."""
        end = time.monotonic() + seconds
        while text not in self.unseen:
            assert self.look(max(0, end - time.monotonic())), f"{text!r} is not shown; there is {self.unseen!r}"
        at = self.unseen.index(text) + len(text)
        shown, self.unseen = self.unseen[:at], self.unseen[at:]
        return shown

    def interrupt(self, text):
        """Ctrl-C until `text` is shown: input() misses a signal that comes while it draws its prompt."""
        for _ in range(5):
            self.type(CTRL_C)
            with contextlib.suppress(AssertionError):
                return self.see(text, 10)
        return self.see(text)

    def look(self, seconds):
        """Waits for more to be shown; False where nothing comes, or the chat has ended."""
        ready, _, _ = select.select([self.fd], [], [], seconds)
        piece = b""
        with contextlib.suppress(OSError):  # the other end was closed
            piece = os.read(self.fd, 4096) if ready else b""
        self.unseen += piece.decode(errors="replace")
        return bool(piece)

    def ends(self):
        while self.look(60):  # a terminal that nobody reads would hold it up
            pass
        return self.process.wait(60)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.fixture
def chat():
    with contextlib.closing(Terminal("--max-new-tokens", "6", "--temperature", "0")) as terminal:
        terminal.see("> ")
        yield terminal


def test_ctrl_c_at_the_prompt_drops_the_line_and_says_how_to_end(chat):
    chat.interrupt("(/quit or Ctrl-D ends)")
    chat.see("> ")
    chat.type("/undo")
    chat.see("/undo")
    assert "no answer yet" not in chat.interrupt("(/quit or Ctrl-D ends)")
    chat.see("> ")
    chat.type("Who?\r")
    chat.see("tokens read")
    chat.see("> ")
    chat.type(CTRL_D)
    assert chat.ends() == 0


def test_lines_are_edited_and_recalled(chat):
    chat.type("nonsense" + CTRL_A + "/\r")  # to the beginning of the line
    chat.see("there is no command /nonsense")
    chat.see("> ")
    chat.type(UP + "2\r")
    chat.see("there is no command /nonsense2")
    chat.see("> ")
    chat.type("/quit\r")
    assert chat.ends() == 0


def test_ctrl_c_in_an_answer_ends_the_answer():
    argv = ["--max-new-tokens", "1000000", "--temperature", "100", "--seed", "10"]  # an answer of 3,578 tokens
    with contextlib.closing(Terminal(*argv)) as chat:
        chat.see("> ")
        chat.type("Who?\r")
        chat.see("Who?\r\n")
        while len(chat.unseen) < 40:
            chat.look(60)
        assert "tokens read" in chat.interrupt("; interrupted]")
        chat.see("> ")
        chat.type("/undo\r")
        chat.see("[taken back; left: 0 turns]")
        chat.see("> ")
        chat.type(CTRL_D)
        assert chat.ends() == 0
