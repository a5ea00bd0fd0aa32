"""What generation makes of a model whose tokenizer is smaller than its vocabulary, damaged, or not there."""

import shutil

import numpy as np
import pytest
from conftest import TINY

import kimi_linear as kl
from kimi_linear.cli import main
from kimi_linear.perplexity import perplexity


@pytest.fixture(scope="module")
def padded(golden_dir):
    """A model of 320 rows and a tokenizer of 256 bytes and two names."""
    model = kl.Model.from_pretrained(golden_dir / "kimi-a")
    model.tokenizer = kl.Tokenizer({bytes([b]): b for b in range(256)}, {"[EOS]": 256, "[MID]": 257},
                                   chat_template="{% for m in messages %}{{ m.content }}[MID]{% endfor %}")
    assert model.config.vocab_size == 320
    return model


@pytest.fixture
def broken(tmp_path):
    """The packaged model with a template that is no text."""
    shutil.copytree(TINY, tmp_path / "broken")
    (tmp_path / "broken" / "chat_template.jinja").write_bytes(b"\xff")
    return tmp_path / "broken"


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2}, {"top_p": 0.9}, {"n": 2}])
def test_rows_that_the_tokenizer_lacks_are_not_drawn(padded, options):
    free = padded.generate([1], temperature=100, max_new_tokens=100, logprobs=1, stop_at_eos=False, **options).run()
    tokens = np.ravel(free.tokens)
    assert len(tokens) >= 100 and tokens.max() < 258 and len(np.unique(tokens)) > 20


def test_one_that_a_processor_asks_for_is_no_text(padded):
    asked = iter([65, 311, 66, 257])

    def force(ids, logits):
        logits[:] = -np.inf
        logits[next(asked)] = 0

    said = padded.generate([1, 319], logits_processor=force, max_new_tokens=4).run()
    assert said.tokens == [65, 311, 66, 257] and said.text == "AB"


def test_a_chat_keeps_one_that_it_has_read(padded):
    read = [ord("A"), 311, ord("B"), 257]
    state = padded.new_state()
    padded.forward(read, state=state, logits="none")
    messages = [{"role": "user", "content": "AB"}, {"role": "user", "content": "C"}]
    assert padded.generate(messages, state=state, max_new_tokens=1).prompt_ids.tolist() == [*read, ord("C"), 257]


def test_perplexity_counts_no_byte_for_them(padded):
    ids = np.array([65, 311, 66, 300, 67])
    found = perplexity(padded, ids)
    assert found.bits_per_byte == pytest.approx(found.nll_per_token / np.log(2) * 5 / 3)
    assert perplexity(padded, [311, 312]).bits_per_byte is None


def test_a_stop_that_names_a_special_token(padded):
    def force(ids, logits):
        logits[:] = -np.inf
        logits[[65, 66, 256, 257][len(ids) - 1]] = 0

    def said(**options):
        return padded.generate([1], logits_processor=force, max_new_tokens=4, stop_at_eos=False, **options).run()

    assert (said().text, said().finish_reason) == ("AB", "length")
    stopped = said(stop=["[EOS]"])
    assert (stopped.tokens, stopped.text, stopped.finish_reason) == ([65, 66, 256], "AB", "stop")
    assert said(stop=["Bx", "[EOS]"]).text == "AB"  # what was held back is shown


# ---- one that cannot be made ----

def test_a_folder_with_a_broken_template_is_opened(broken, capfd):
    model = kl.Model.from_pretrained(broken)
    assert model([1, 2]).shape == (2, 2048)
    with pytest.raises(kl.FormatError, match=r"chat_template\.jinja: it is not UTF-8 at byte 0"):
        _ = model.tokenizer
    with pytest.raises(kl.FormatError, match="not UTF-8"):
        model.generate("In the beginning")
    with pytest.warns(UserWarning, match=r"broken has no tokenizer, so ids are shown: .*chat_template\.jinja"):
        said = model.generate([1, 2], max_new_tokens=3).run()
    assert said.text == " ".join(map(str, said.tokens))
    with pytest.warns(UserWarning, match="bits a byte are not counted"):
        assert perplexity(model, [1, 2, 3]).bits_per_byte is None
    assert main(["verify", str(broken), "--ids", "1,2", "--no-free-run"]) == 0
    capfd.readouterr()
    assert main(["generate", str(broken), "--ids", "1,2", "--max-new-tokens", "2"]) == 0
    assert "broken has no tokenizer, so ids are shown" in capfd.readouterr().err
    assert main(["generate", str(broken), "--prompt", "a"]) == 2
    assert "it is not UTF-8 at byte 0" in capfd.readouterr().err
