"""Options of a generation at their bounds, and those that would be without effect."""

import warnings

import pytest

import kimi_linear as kl

USER = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def model():
    return kl.Model.tiny()


@pytest.mark.parametrize("options, words", [
    ({"repetition_penalty": 1e-46}, r"repetition_penalty is 1e-46; it must be from 1e-30 to 1e\+30"),
    ({"repetition_penalty": 1e-40}, r"repetition_penalty is 1e-40; it must be from"),
    ({"repetition_penalty": 1e39}, r"repetition_penalty is 1e\+39; it must be from"),
    ({"temperature": 1e39}, r"temperature is 1e\+39; it must be finite and >= 0 in float32"),
    ({"temperature": 1, "top_p": 1.0000001}, r"top_p is 1.0000001; it must be in \(0, 1\]$"),
    ({"temperature": 1, "top_p": 1e-50}, r"top_p is 1e-50; it must be in \(0, 1\] in float32"),
    ({"top_p": 0.9}, "top_p is 0.9, and without a temperature the likeliest token is taken; give temperature, too"),
    ({"top_k": 5}, "top_k is 5, and without a temperature"),
    ({"min_p": 0.1}, "min_p is 0.1, and without a temperature"),
    ({"n": 10**26}, f"n is {10**26}; it must be an int >= 1, at most 65536"),
    ({"max_new_tokens": 2**70}, f"max_new_tokens is {2**70}; it must be an int >= 1, at most {2**63 - 1}"),
    ({"seed": 2**64}, f"seed is {2**64}; it must be an int, or one for each prompt, at most {2**64 - 1}"),
    ({"tools": 5}, "tools is given and prompt is text; only messages go through the template"),
    ({"template_options": {"a": 1}}, "template_options is given and prompt is text"),
])
def test_an_option_that_would_do_harm_or_nothing(model, options, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=words):
            model.generate("In the beginning", **options)


@pytest.mark.parametrize("options", [
    {"repetition_penalty": 1e-30}, {"repetition_penalty": 1e30}, {"top_p": 1.0}, {"top_k": 0},
    {"temperature": 0, "top_p": 0.9}, {"seed": 2**64 - 1}])
def test_options_at_their_bounds(model, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(model.generate("In the beginning", max_new_tokens=3, **options).run().tokens) == 3


def test_top_p_does_where_the_checkpoint_samples(model):
    model = kl.Model.tiny()
    model.generation_config = {"do_sample": True, "temperature": 0.8}
    assert model.generate("In", top_p=0.9).sampling["temperature"] == 0.8


def test_template_options_reach_the_template(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ messages[0].content }}{{ enable_thinking is defined and "
                                                          "enable_thinking }}{{ tools is none }}")
    ids = model.generate(USER, template_options={"enable_thinking": True}).prompt_ids
    assert model.tokenizer.decode(ids) == "xTrueTrue"
    assert model.tokenizer.decode(model.generate(USER).prompt_ids) == "xFalseTrue"


@pytest.mark.parametrize("options", [{"threads": 7}, {"device": "hip"}])
def test_a_context_beside_what_it_would_replace(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name} is .*ctx is .*give one of them"):
        kl.Model.tiny(ctx=kl.Context(), **options)
    assert kl.Model.tiny(ctx=kl.Context(threads=1)).ctx.threads == 1
