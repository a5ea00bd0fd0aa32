"""That a chat's conversation is not lost: where it cannot be saved is told first, and every end saves it."""

import json
import os
import signal
import subprocess
import sys

import pytest

import kimi_linear as kl
from kimi_linear.cli import chat as chat_module
from kimi_linear.cli import main
from kimi_linear.cli.chat import Chat

PROGRAM = [sys.executable, "-m", "kimi_linear", "chat", "--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def model():
    return kl.Model.tiny()


@pytest.fixture
def chat(model):
    chat = Chat(model, max_new_tokens=4)
    chat.ask("Who made the heavens?", lambda piece: None)
    return chat


def messages_in(path):
    return json.loads(path.read_text(encoding="utf-8"))["messages"]


# ---- told before a word is said ----

def no_folder(folder):
    return folder / "no" / "x", "no, and there is no such folder; it must be there"


def a_pipe(folder):
    os.mkfifo(folder / "x")
    return folder / "x", "x: it is no regular file; it must be a file"


def a_pipe_for_messages(folder):
    os.mkfifo(folder / "x.json")
    return folder / "x", "x.json: it is no regular file; it must be a file"


def a_folder_for_messages(folder):
    (folder / "x.json").mkdir()
    return folder / "x", "x.json: it is a folder; it must be a file"


def a_device(folder):
    (folder / "x").symlink_to("/dev/zero")
    return folder / "x", "x: it is no regular file; it must be a file"


@pytest.mark.parametrize("place", [no_folder, a_pipe, a_pipe_for_messages, a_folder_for_messages, a_device])
def test_where_nothing_can_be_saved(chat, tmp_path, place):
    path, words = place(tmp_path)
    done = subprocess.run([*PROGRAM, "--state", str(path)], input="Who?\n", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "") and words in done.stderr
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=words):
        chat.save(path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_may_not_be_written(chat, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    with pytest.raises(ValueError, match="a folder that may not be written"):
        chat.save(tmp_path / "x")


# ---- every end ----

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves(tmp_path, number):
    argv = [*PROGRAM, "--state", str(tmp_path / "x")]
    talk = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))  # whatever these tests ignore
    talk.stdin.write(b"Who?\n")
    talk.stdin.flush()
    while b"tokens read" not in talk.stderr.readline():
        pass
    talk.send_signal(number)
    talk.communicate(timeout=60)
    assert talk.returncode == 128 + number
    assert [m["role"] for m in messages_in(tmp_path / "x.json")] == ["user", "assistant"]


def test_a_signal_that_was_ignored_stays_so(tmp_path):
    argv = ["nohup", *PROGRAM, "--state", str(tmp_path / "x")]
    talk = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    talk.stdin.write(b"Who?\n")
    talk.stdin.flush()
    while b"tokens read" not in talk.stderr.readline():
        pass
    talk.send_signal(signal.SIGHUP)
    talk.communicate(b"Why?\n", timeout=60)
    assert talk.returncode == 0 and len(messages_in(tmp_path / "x.json")) == 4


def test_what_nobody_foresaw_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_module, "_loop", lambda chat: chat.set_system("Be brief.") or 1 / 0)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError):
        main(["chat", "--state", str(tmp_path / "x")])
    assert messages_in(tmp_path / "x.json") == [{"role": "system", "content": "Be brief."}]
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_exception_of_a_command_is_said(chat, monkeypatch, capsys):
    monkeypatch.setattr(Chat, "undo", lambda self: [][1])
    chat_module._obey(chat, "/undo")
    assert capsys.readouterr().err == "IndexError: list index out of range\n"


# ---- the two files ----

def test_the_messages_are_written_first_and_whole(chat, tmp_path, monkeypatch):
    path = tmp_path / "x"
    chat.save(path)
    state, first = path.read_bytes(), list(chat.messages)
    (tmp_path / "x.json.part").write_text("precious")
    chat.ask("Why?", lambda piece: None)
    monkeypatch.setattr(chat_module.json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        chat.save(path)
    assert path.read_bytes() == state and messages_in(tmp_path / "x.json") == first
    monkeypatch.undo()
    monkeypatch.setattr(kl.State, "save", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        chat.save(path)
    assert (tmp_path / "x.json.part").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "x.json", "x.json.part"]
    other = Chat(chat.model, max_new_tokens=4)
    other.load(path)  # the older state and the newer messages
    for each in (chat, other):
        each.ask("And the earth?", lambda piece: None)
    assert other.messages == chat.messages


@pytest.mark.parametrize("roles", [["assistant"], ["user"], ["user", "user"], ["user", "system", "assistant"],
                                   ["system", "assistant"], ["assistant", "user"], [["user"]], [None]])
def test_messages_that_no_chat_has(chat, tmp_path, roles):
    chat.save(tmp_path / "x")
    facts = {"format": 1, "messages": [{"role": role, "content": "x"} for role in roles]}
    (tmp_path / "x.json").write_text(json.dumps(facts))
    state, messages = chat.state, chat.messages
    with pytest.raises(ValueError, match="it must be user and assistant in turn"):
        chat.load(tmp_path / "x")
    assert chat.state is state and chat.messages is messages


def test_a_tilde_is_home(chat, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path))
    chat.save("~/x")
    other = Chat(chat.model)
    other.load("~/x")
    assert other.messages == chat.messages
    monkeypatch.setattr(chat_module, "_loop", lambda chat: None)
    assert main(["chat", "--state=~/y", "--system", "Be brief."]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"x", "x.json", "y", "y.json"}


# ---- memory, and the template ----

def test_only_the_newest_turn_keeps_logits(chat):
    for text in ("And the earth?", "Why?"):
        chat.ask(text, lambda piece: None)
    assert [turn.logits is None for turn in chat.turns] == [True, True, False]
    chat.undo()
    chat.retry(lambda piece: None)
    assert [turn.logits is None for turn in chat.turns] == [True, False]


def test_template_options_of_the_command(tmp_path, monkeypatch, capfd):
    model = kl.Model.tiny()
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ mode }}{{ 1 if thinking else 0 }}:")
    monkeypatch.setattr("kimi_linear.cli.chat.load_model", lambda args: model)
    monkeypatch.setattr("kimi_linear.cli.generate.load_model", lambda args: model)
    seen = []
    monkeypatch.setattr(chat_module, "_loop", lambda chat: seen.append(chat) or chat.ask("x", lambda piece: None))
    options = ["--template-option", "thinking=false", "--template-option", 'mode="fast"', "--max-new-tokens", "2"]
    assert main(["chat", *options]) == 0
    assert model.tokenizer.decode(seen[0].state.tokens).startswith("fast0:")
    seen[0].save(tmp_path / "x")
    seen[0].load(tmp_path / "x")
    capfd.readouterr()
    assert main(["generate", "--chat", "--prompt", "x", "--json", *options]) == 0
    assert model.tokenizer.decode(json.loads(capfd.readouterr().out)["prompt_tokens"]) == "fast0:"
    assert main(["generate", "--prompt", "x", *options]) == 2
    assert "--template-option needs --chat" in capfd.readouterr().err
    for wrong in ("thinking", "=1", "mode=fast"):
        with pytest.raises(SystemExit):
            main(["chat", "--template-option", wrong])
        assert "it must be NAME=VALUE with a value in JSON" in capfd.readouterr().err


def test_a_pipe_that_closes_ends_and_saves(tmp_path):
    """Nobody reads the first answer."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*PROGRAM, "--state", str(tmp_path / "c")], input=b"Who?\nAnd who?\n", stdout=write,
                          stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(write)
    assert done.returncode == 141 and done.stderr.count(b"\n") == 1 and b"Broken" not in done.stderr
    assert messages_in(tmp_path / "c.json") == []


def test_another_type_of_cache_is_told(chat, tmp_path):
    chat.save(tmp_path / "c")
    other = Chat(kl.Model.tiny(cache="float16"))
    assert other.summary() == "0 turns"
    other.load(tmp_path / "c")
    assert other.summary() == "1 turn, cache float32"
