"""Chat: what each turn reads, /retry, /undo, /save and /load, and the command as a script and a shell meet it."""

import json
import os
import signal
import subprocess
import sys

import pytest

import kimi_linear as kl
from kimi_linear.cli.chat import Chat

PROGRAM = [sys.executable, "-m", "kimi_linear", "chat"]
OPTIONS = dict(max_new_tokens=14, temperature=0.9, seed=3)


@pytest.fixture(scope="module")
def model():
    return kl.Model.tiny()


@pytest.fixture
def chat(model):
    return Chat(model, **OPTIONS)


def quiet(piece):
    pass


def spoken(chat, *texts):
    for text in texts:
        chat.ask(text, quiet)
    return chat


def new_tokens(chat, text, ended):
    """Of a turn behind an answer: the answer's last token and end, not in the state yet, and the message."""
    turn = f"<|im_user|>user<|im_middle|>{text}<|im_end|><|im_assistant|>assistant<|im_middle|>"
    return len(chat.model.tokenizer.encode(turn)) + (1 if ended else 2)


def test_a_turn_reads_only_its_new_tokens(chat):
    spoken(chat, "Who made the heavens?")
    for text in ("And the earth?", "And what of the sea, and all that in them is?", "Why?"):
        before, ended = chat.state.position, chat.reason == "stop"
        spoken(chat, text)
        assert chat.stats.prompt_tokens == new_tokens(chat, text, ended)
        assert chat.stats.reused_tokens == before


def test_retry_reads_nothing_and_answers_otherwise(chat):
    spoken(chat, "Who made the heavens?", "And the earth?")
    answers = {chat.messages[-1]["content"]}
    for _ in range(3):
        chat.retry(quiet)
        assert chat.stats.prompt_tokens == 0
        answers.add(chat.messages[-1]["content"])
    assert len(answers) == 4 and len(chat.messages) == 4


def test_undo_reads_no_old_token(chat, model):
    spoken(chat, "Who made the heavens?")
    before, ended = chat.state.position, chat.reason == "stop"
    spoken(chat, "And the earth?")
    first = chat.messages[-1]
    chat.undo()
    assert len(chat.messages) == 2
    spoken(chat, "And the earth?")
    assert chat.messages[-1] == first
    assert (chat.stats.prompt_tokens, chat.stats.reused_tokens) == (new_tokens(chat, "And the earth?", ended), before)
    chat.undo()
    chat.undo()
    assert chat.messages == [] and chat.turns == []
    with pytest.raises(ValueError, match="/undo: there is no answer yet"):
        chat.undo()
    with pytest.raises(ValueError, match="/retry: there is no answer yet"):
        chat.retry(quiet)


def test_undo_and_retry_without_checkpoints_only_read_more(model):
    chat = spoken(Chat(model, checkpoints=1, **OPTIONS), "Who made the heavens?", "And the earth?")
    other = spoken(Chat(model, checkpoints=9, **OPTIONS), "Who made the heavens?", "And the earth?")
    for each in (chat, other):
        each.undo()
        spoken(each, "And man?")
    assert chat.messages == other.messages and chat.stats.prompt_tokens > other.stats.prompt_tokens


def test_a_system_instruction_begins_the_conversation(chat, model):
    spoken(chat, "Who art thou?")
    chat.set_system("Be brief.")
    chat.set_system("Be long.")
    spoken(chat, "Speak.")
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert "Be long." in model.tokenizer.decode(chat.state.tokens)


def test_a_saved_chat_goes_on_the_same_in_a_new_process(chat, tmp_path):
    spoken(chat, "Who made the heavens?", "And the earth?")
    chat.save(tmp_path / "evening.chat")
    spoken(chat, "And man?")
    argv = ["--state", str(tmp_path / "evening.chat"), "--cache", "float32", "--activations", "float32",
            "--max-new-tokens", "14", "--temperature", "0.9", "--seed", "3"]
    done = subprocess.run([*PROGRAM, *argv], input="And man?\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == chat.messages[-1]["content"] + "\n"
    assert f"[{chat.stats.prompt_tokens} tokens read, {chat.stats.reused_tokens} reused" in done.stderr
    assert json.loads((tmp_path / "evening.chat.json").read_text())["messages"] == chat.messages
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evening.chat", "evening.chat.json"]


def test_retry_and_undo_behind_load_read_only_the_last_message(chat, model, tmp_path):
    """The checkpoints are in the file."""
    spoken(chat, "Who made the heavens?", "And the earth?", "And what of the sea, and all that in them is?")
    answer, read = chat.messages[-1], chat.stats.prompt_tokens
    chat.save(tmp_path / "x")
    other = Chat(model, **OPTIONS)
    other.load(tmp_path / "x")
    assert other.state.checkpoints == [*chat.state.checkpoints, chat.state.position]
    other.retry(quiet)
    assert other.stats.prompt_tokens == read and other.messages[-1] != answer
    other.load(tmp_path / "x")
    other.undo()
    spoken(other, "And what of the sea, and all that in them is?")
    assert other.stats.prompt_tokens == read and other.messages[-1] == answer


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "messages": []}', '{"format": 1, "messages": 3}',
                                  "[" * 9999, '{"format": 1, "messages": [{"role": "wizard", "content": "x"}]}'])
def test_messages_that_save_did_not_write_change_nothing(chat, tmp_path, text):
    spoken(chat, "Who made the heavens?")
    path = tmp_path / "x"
    chat.save(path)
    (tmp_path / "x.json").write_text(text)
    state, messages = chat.state, chat.messages
    with pytest.raises(ValueError, match="it must be"):
        chat.load(path)
    assert chat.state is state and chat.messages is messages


def test_what_save_did_not_write_is_not_lost(chat, tmp_path):
    spoken(chat, "Who made the heavens?")
    for notes in ("x", "x.json"):
        folder = tmp_path / f"beside {notes}"
        folder.mkdir()
        (folder / notes).write_text('{"precious": 1}')
        with pytest.raises(ValueError, match="it would be lost: give another name"):
            chat.save(folder / "x")
        assert [(p.name, p.read_text()) for p in folder.iterdir()] == [(notes, '{"precious": 1}')]
    chat.save(tmp_path / "x")
    spoken(chat, "And the earth?")
    chat.save(tmp_path / "x")
    other = Chat(chat.model, **OPTIONS)
    other.load(tmp_path / "x")
    assert other.messages == chat.messages


def test_an_interrupted_answer_stays_and_goes_on(chat):
    shown = []

    def three(piece):
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    chat.ask("Who made the heavens?", three)
    assert chat.reason == "interrupted" and chat.messages[-1]["content"] == "".join(shown)
    before = chat.state.position
    spoken(chat, "Go on.")
    assert chat.stats.reused_tokens == before


def test_an_error_leaves_the_conversation(chat, monkeypatch):
    spoken(chat, "Who made the heavens?")
    messages, turns = list(chat.messages), list(chat.turns)
    monkeypatch.setattr(chat.model.tokenizer, "chat_template", "{{ nothing.there }}")
    with pytest.raises(ValueError, match="failed at line 1"):
        chat.ask("And the earth?", quiet)
    with pytest.raises(ValueError, match="failed at line 1"):
        chat.retry(quiet)
    assert chat.messages == messages and chat.turns == turns


# ---- the command ----

def script(*lines, argv=()):
    text = "".join(line + "\n" for line in lines)
    return subprocess.run([*PROGRAM, "--max-new-tokens", "6", *argv], input=text, capture_output=True, text=True,
                          timeout=60)


def test_a_script_sees_answers_on_stdout_and_the_rest_on_stderr(tmp_path):
    saved = str(tmp_path / "s")
    done = script("/help", "Who?", "/retry", "/nonsense", "/save", "/undo", "/undo", f"/load {tmp_path}/none", "",
                  "/system Be brief.", "Who?", f"/save {saved}", f"/load {saved}", "/quit", "never read")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 3 and "> " not in done.stdout + done.stderr
    for words in ("/retry         another answer", "[0 tokens read,", "there is no command /nonsense",
                  "/save needs a file", "[taken back; left: 0 turns]", "/undo: there is no answer yet", "none.json",
                  "[instruction set]", f"[saved: {saved}", "[1 turn]"):
        assert words in done.stderr, words


def test_ctrl_c_ends_the_answer_and_not_the_program():
    argv = ["--max-new-tokens", "1000000", "--temperature", "100", "--seed", "10"]  # an answer of 3,578 tokens
    talk = subprocess.Popen([*PROGRAM, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    talk.stdin.write(b"Who?\n")
    talk.stdin.flush()
    assert talk.stdout.read(1)
    assert talk.stderr.readline() == b"[tiny: activations bfloat16, cache float16]\n"
    os.kill(talk.pid, signal.SIGINT)
    line = talk.stderr.readline()
    assert b"tokens read" in line and line.endswith(b"interrupted]\n")
    _, err = talk.communicate(b"/undo\n/quit\n", timeout=60)
    assert talk.returncode == 0 and b"[taken back; left: 0 turns]" in err


def test_usage_errors(tmp_path):
    done = script(argv=["--temperature", "-1"])
    assert done.returncode == 0
    done = script("Who?", argv=["--temperature", "-1"])
    assert "temperature" in done.stderr and done.returncode == 0
    (tmp_path / "x.json").write_text("{}")
    done = script("Who?", argv=["--state", str(tmp_path / "x")])
    assert done.returncode == 2 and "x.json is there and is not the messages of a conversation" in done.stderr
    assert (done.stdout, (tmp_path / "x.json").read_text()) == ("", "{}")
    done = script(argv=["--checkpoints", "0"])
    assert done.returncode == 2 and "--checkpoints" in done.stderr
