"""Generation: batches, samples, seeds, penalty, processors, stop strings, log-probabilities, states, errors.

What a token costs beside forward, measured on tiny (vocabulary 2,048; a busy x86-64 machine of 2 cores; wall time less
`Stats`' seconds, median of 8 runs of 400 tokens): 27 us greedy, 47 us at temperature 0.8 and top_p 0.95, 84 us with a
stop string and a repetition penalty besides.
"""

import concurrent.futures
import copy
import json
import threading

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear import Generation
from kimi_linear.sampling import StopStrings, _Ids, logprobs_of

PROMPTS = ["In the beginning", "And God said, Let there be", "The", "O LORD, how long", "Blessed are the meek"]
WARM = dict(temperature=0.9, top_p=0.95)


@pytest.fixture(scope="module")
def model():
    return kl.Model.tiny()


def arrays(state):
    return {name: value.tobytes() for name, value in state.items()}


def alone(model, prompt, **options):
    return model.generate(prompt, **options).run()


# ---- batches and samples ----

@pytest.mark.parametrize("options", [{"temperature": 0}, {**WARM, "seed": 3}, {**WARM, "seed": 8, "min_p": 0.1},
                                     {**WARM, "repetition_penalty": 1.3}, {"temperature": 1, "top_k": 5}])
def test_a_batch_is_each_alone(model, options):
    batch = alone(model, PROMPTS, max_new_tokens=24, **options)
    one = [alone(model, p, max_new_tokens=24, **options) for p in PROMPTS]
    assert batch.tokens == [g.tokens for g in one]
    assert batch.text == [g.text for g in one]
    assert batch.finish_reason == [g.finish_reason for g in one]
    assert [arrays(s) for s in batch.state] == [arrays(g.state) for g in one]


def test_what_it_looks_like(model):
    generation = model.generate(PROMPTS[0], max_new_tokens=3)
    assert "nothing is generated yet" in repr(generation) and ".run().text" in repr(generation)
    assert repr(generation.run()) == f"Generation({generation.text!r}, 3 tokens, finish_reason='length')"
    many = model.generate(PROMPTS[:2], max_new_tokens=1).run()
    assert repr(many).startswith("Generation('2 sequences', 2 tokens, finish_reason=['length', 'length']")


def test_threads_generate_at_once_each_as_alone(model):
    """Python threads on one model: each has the text and the bytes that it has alone."""
    wanted = [alone(model, p, max_new_tokens=40, seed=i, **WARM) for i, p in enumerate(PROMPTS)]
    start = threading.Barrier(len(PROMPTS))

    def work(i):
        start.wait()
        return [alone(model, PROMPTS[i], max_new_tokens=40, seed=i, **WARM) for _ in range(3)]

    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        got = list(pool.map(work, range(len(PROMPTS))))
    for runs, one in zip(got, wanted, strict=True):
        assert all((run.text, run.tokens) == (one.text, one.tokens) for run in runs)
        assert all(arrays(run.state) == arrays(one.state) for run in runs)


def test_threads_share_a_context_and_read_as_alone(golden_dir):
    """The same where the model has a context of its own, which serves one call at a time."""
    own = kl.Model.from_pretrained(golden_dir / "kimi-b", ctx=kl.Context(threads=2))
    prompts = [list(range(i + 1, i + 9)) for i in range(4)]
    wanted = [alone(own, p, max_new_tokens=20, temperature=1, seed=i).tokens for i, p in enumerate(prompts)]
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        runs = [pool.submit(alone, own, p, max_new_tokens=20, temperature=1, seed=i) for i, p in enumerate(prompts)]
    assert [run.result().tokens for run in runs] == wanted


def test_sequences_leave_the_batch_when_they_end(model, monkeypatch):
    lengths = []
    forward = model.forward

    def counted(tokens, **options):
        lengths.append(len(tokens))
        return forward(tokens, **options)

    free = [g.tokens for g in (alone(model, p, max_new_tokens=12, temperature=0) for p in PROMPTS)]
    ended = model.tokenizer.decode(free[0][:3])
    monkeypatch.setattr(model, "forward", counted)
    batch = alone(model, PROMPTS, max_new_tokens=12, temperature=0, stop=ended)
    assert batch.tokens[0] == free[0][:3] and batch.finish_reason[0] == "stop"
    ends = [len(t) for t in batch.tokens]
    assert lengths == [5, *(sum(n > step for n in ends) for step in range(1, max(ends)))]


def test_pieces_of_a_batch_carry_their_index(model):
    batch = model.generate(PROMPTS[:3], max_new_tokens=9, **WARM)
    texts = ["", "", ""]
    for i, piece in batch:
        texts[i] += piece
    assert texts == batch.text and all(texts)


def test_prompts_of_every_form_make_one_batch(model):
    ids = model.tokenizer.encode(PROMPTS[0])
    chat = [{"role": "user", "content": "Who art thou?"}]
    batch = alone(model, [PROMPTS[0], ids, np.array(ids), chat], max_new_tokens=6, temperature=0)
    assert batch.tokens[0] == batch.tokens[1] == batch.tokens[2]
    assert batch.tokens[3] == alone(model, chat, max_new_tokens=6, temperature=0).tokens
    rows = alone(model, np.array([ids, ids]), max_new_tokens=6, temperature=0)
    assert rows.tokens == batch.tokens[:2]


def test_samples_read_the_prompt_once_and_the_first_is_that_of_n_1(model):
    four = alone(model, PROMPTS[1], n=4, max_new_tokens=16, seed=5, **WARM)
    assert four.tokens[0] == alone(model, PROMPTS[1], max_new_tokens=16, seed=5, **WARM).tokens
    assert len({tuple(t) for t in four.tokens}) == 4
    assert four.stats.prompt_tokens == len(four.prompt_ids[0]) and four.stats.sequences == 4
    both = alone(model, PROMPTS[:2], n=2, max_new_tokens=16, seed=5, **WARM)
    assert both.tokens[2:] == four.tokens[:2]


def test_seeds(model):
    texts = {alone(model, PROMPTS[0], max_new_tokens=12, seed=s, **WARM).text for s in range(5)}
    assert len(texts) == 5
    assert alone(model, PROMPTS[0], max_new_tokens=12, **WARM).tokens == \
        alone(model, PROMPTS[0], max_new_tokens=12, seed=0, **WARM).tokens
    batch = alone(model, PROMPTS[:1] * 3, max_new_tokens=12, seed=[4, 9, 4], **WARM)
    assert batch.tokens[0] == batch.tokens[2] != batch.tokens[1]
    assert batch.tokens[1] == alone(model, PROMPTS[0], max_new_tokens=12, seed=9, **WARM).tokens


# ---- what is drawn from ----

def test_repetition_penalty_is_its_formula(model):
    ids = model.tokenizer.encode(PROMPTS[0])
    got = alone(model, ids, max_new_tokens=20, temperature=0, repetition_penalty=1.7).tokens
    seen, state = list(ids), model.new_state()
    logits = model.forward(ids, state=state, logits="last")
    for token in got:
        for i in set(seen):
            logits[i] = logits[i] / np.float32(1.7) if logits[i] > 0 else logits[i] * np.float32(1.7)
        assert token == logits.argmax()
        seen.append(token)
        logits = model.forward([token], state=state, logits="last")


def test_a_processor_sees_ids_and_copies_and_masks(model):
    ids = model.tokenizer.encode("Let")
    calls = []

    def odd_only(so_far, logits):
        assert logits.dtype == np.float32 and logits.shape == (model.config.vocab_size,)
        calls.append(so_far)
        logits[::2] = -np.inf

    got = alone(model, ids, max_new_tokens=8, logits_processor=odd_only, logprobs=2, **WARM)
    assert all(t % 2 for t in got.tokens)
    assert calls == [[*ids, *got.tokens[:k]] for k in range(8)]
    # the model's own logits: not the masked ones
    assert got.top_logprobs[0] == alone(model, ids, max_new_tokens=1, logprobs=2, temperature=0).top_logprobs[0]
    identity = alone(model, ids, max_new_tokens=8, logits_processor=lambda ids, logits: logits, **WARM)
    assert identity.tokens == alone(model, ids, max_new_tokens=8, **WARM).tokens


def test_an_edit_steers_prompt_and_new_tokens(model):
    vector = np.random.default_rng(0).standard_normal(model.config.hidden_size).astype(np.float32)
    edit = {"layers.2.out": lambda x: x + 2 * vector}
    ids, state, tokens = model.tokenizer.encode(PROMPTS[0]), model.new_state(), []
    logits = model.forward(ids, state=state, logits="last", edit=edit)
    for _ in range(12):
        tokens.append(int(logits.argmax()))
        logits = model.forward(tokens[-1:], state=state, logits="last", edit=edit)
    steered = alone(model, PROMPTS[0], max_new_tokens=12, temperature=0, edit=edit)
    assert steered.tokens == tokens != alone(model, PROMPTS[0], max_new_tokens=12, temperature=0).tokens


def test_an_edit_knows_its_sequence_and_position_whoever_has_ended(model):
    places, prompts = [], [[5, 6, 7], [8]]

    def watch(x, at):
        places.extend(zip(at.sequence.tolist(), at.position.tolist(), strict=True))
        return x

    states = model.new_state(2, context=5)
    got = alone(model, prompts, max_new_tokens=9, state=states, stop_at_eos=False, edit={"embed": watch})
    assert got.finish_reason == ["length", "length"]
    assert sorted(places) == [(i, t) for i in range(2) for t in range(5)]
    places.clear()
    alone(model, prompts, n=2, max_new_tokens=2, stop_at_eos=False, edit={"embed": watch}, **WARM)
    assert sorted(places) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 3), (2, 0), (2, 1), (3, 1)]


@pytest.mark.parametrize("edit, error, words", [
    ({"layer.2.out": np.negative}, ValueError, "edit: 'layer.2.out' matches no tap; near it are layers.2.out"),
    ({"embed": np.zeros((2, 256), np.float32)}, TypeError, r"edit\['embed'\] is a ndarray; .* a function of rows"),
    ([np.negative], TypeError, "edit is a list; it must be a dict"),
])
def test_a_wrong_edit_is_refused_before_anything_is_read(model, edit, error, words):
    with pytest.raises(error, match=words):
        model.generate([1, 2], edit=edit)


@pytest.mark.parametrize("processor, words", [
    (lambda ids, x: np.full_like(x, -np.inf), "logits_processor masked all 2048 tokens at position 3"),
    (lambda ids, x: x[:-1], r"logits_processor gave float32 \[2047\]"),
    (lambda ids, x: x.astype(np.int32), "logits_processor gave int32"),
    (lambda ids, x: x * np.float32("nan"), "the token at position 3 cannot be drawn"),
])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_processor_that_is_wrong(model, processor, words, temperature):
    generation = model.generate([1, 2, 3], logits_processor=processor, temperature=temperature)
    with pytest.raises(ValueError, match=words):
        generation.run()
    assert generation.tokens == [] and generation.state.position == 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_name_the_position_and_are_never_token_0(temperature, value):
    own = kl.Model.tiny()
    own.weights["model.norm.weight"] = np.full(own.config.hidden_size, value, np.float32)
    generation = own.generate([5, 6, 7, 8], temperature=temperature)
    with pytest.raises(ValueError, match="the token at position 4 cannot be drawn"):
        generation.run()
    assert generation.tokens == []


def test_logprobs_are_log_softmax(model):
    got = alone(model, PROMPTS[0], max_new_tokens=10, logprobs=4, seed=2, **WARM)
    ids = [*got.prompt_ids, *got.tokens]
    want = model.logprobs(ids)[len(got.prompt_ids) - 1:]
    # two runs of the same tokens cut otherwise: logits within 1e-4, as in test_forward's split law
    assert np.abs(np.array(got.logprobs) - want).max() < 1e-3
    for likeliest in got.top_logprobs:
        assert len(likeliest) == 4 and likeliest == sorted(likeliest, key=lambda pair: -pair[1])
    none = alone(model, PROMPTS[0], max_new_tokens=3)
    assert none.logprobs == [] and none.top_logprobs == []


@pytest.mark.parametrize("n", [1, 63, 64, 200, 4097, 163_840])
@pytest.mark.parametrize("scale", [0.01, 3, 30])
def test_logprobs_are_near_those_of_float64(n, scale):
    rng = np.random.default_rng(n)
    logits = (scale * rng.standard_normal(n)).astype(np.float32)
    logits[rng.integers(0, n, n // 4)] = np.round(logits[0])  # many are equal
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    order = np.lexsort((np.arange(n), -exact))
    for k in (1, 5, 64, 100, 5000):
        own, likeliest = logprobs_of(logits, n // 2, k)
        assert abs(own - exact[n // 2]) < 1e-6
        assert [i for i, _ in likeliest] == order[:k].tolist()
        assert all(abs(value - exact[i]) < 1e-6 for i, value in likeliest)


def test_logprobs_of_equal_logits_and_masks():
    own, likeliest = logprobs_of(np.array([0, 0, -np.inf], np.float32), 1, 5)
    assert own == pytest.approx(-np.log(2)) and likeliest[:2] == [(0, own), (1, own)]
    assert likeliest[2] == (2, -np.inf)


def test_ids_seen_are_a_set_that_grows():
    seen = _Ids(np.array([5, 3, 5]), 1000)
    for id in [*range(700), *range(10)]:
        seen.add(id)
    assert sorted(seen.ids.tolist()) == list(range(700))


# ---- where it ends ----

def streamed(stop, pieces):
    stops, shown = StopStrings(stop), []
    for piece in pieces:
        shown.append(stops.push(piece))
        if stops.met:
            return "".join(shown), True
    return "".join(shown) + stops.finish(), False


@pytest.mark.parametrize("stop", [("abc",), ("bcd", "abcx"), ("aab",), ("c", "zz"), ("ababac",), ("q",), ("cd", "ab")])
@pytest.mark.parametrize("text", ["aabcd", "ababababac!", "xaaab", "zabcz", "ab", "aababcx"])
def test_stop_strings_split_in_every_place(stop, text):
    found = [text.find(s) for s in stop if s in text]
    want = (text[:min(found)], True) if found else (text, False)
    for cuts in range(1 << (len(text) - 1)):
        ends = [i + 1 for i in range(len(text) - 1) if cuts >> i & 1]
        pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
        got = streamed(stop, pieces)
        if len(found) < 2:
            assert got == want, pieces
        else:  # of two, the one that is complete first may be met
            assert got[1] and text.startswith(got[0]) and not any(s in got[0] for s in stop), pieces


def test_every_stop_string_of_a_text_ends_it_there(model):
    free = alone(model, PROMPTS[0], max_new_tokens=14, temperature=0).text
    for begin in range(len(free)):
        for length in (1, 2, 5, 9):
            stop = free[begin:begin + length]
            generation = model.generate(PROMPTS[0], max_new_tokens=14, temperature=0, stop=[stop, "\x00"])
            shown = "".join(generation)
            assert shown == generation.text == free[:free.find(stop)]
            assert generation.finish_reason == "stop"


def test_what_was_held_back_is_shown_at_the_end(model):
    free = alone(model, PROMPTS[0], max_new_tokens=6, temperature=0).text
    held = alone(model, PROMPTS[0], max_new_tokens=6, temperature=0, stop=free[-3:] + "\x00")
    assert held.text == free and held.finish_reason == "length"


def test_close_interrupts(model):
    generation = model.generate(PROMPTS[:2], temperature=0)
    next(generation)
    generation.close()
    assert generation.finish_reason == ["interrupted"] * 2 and next(generation, None) is None


def test_an_interrupt_while_it_runs(model):
    calls = []

    def interrupting(ids, logits):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt

    generation = model.generate(PROMPTS[0], temperature=0, logits_processor=interrupting)
    with pytest.raises(KeyboardInterrupt):
        generation.run()
    assert generation.finish_reason == "interrupted" and len(generation.tokens) == 3
    whole = alone(model, PROMPTS[0], temperature=0, max_new_tokens=8).tokens
    read = [*generation.prompt_ids, *generation.tokens]
    assert alone(model, read, state=generation.state, temperature=0, max_new_tokens=5).tokens == whole[3:]


def test_a_context_that_is_full_ends_it(model):
    state = model.new_state(context=10)
    got = alone(model, [5, 6, 7, 8], state=state, temperature=0, max_new_tokens=100, stop_at_eos=False)
    assert got.finish_reason == "length" and state.position == 10 and len(got.tokens) == 7


# ---- states ----

def test_a_state_is_read_on_from(model):
    ids, state = model.tokenizer.encode(PROMPTS[1]), model.new_state()
    whole = alone(model, ids, max_new_tokens=12, temperature=0)
    first = alone(model, ids, state=state, max_new_tokens=5, temperature=0)
    rest = alone(model, [*ids, *first.tokens], state=state, max_new_tokens=7, temperature=0)
    assert first.tokens + rest.tokens == whole.tokens
    assert rest.stats.prompt_tokens == 1 and rest.stats.reused_tokens == len(ids) + 4
    assert arrays(state) == arrays(whole.state)


@pytest.mark.parametrize("keep", [0, 4])
@pytest.mark.parametrize("common", [0, 1, 7, 12])
def test_only_the_common_prefix_is_reused(model, keep, common):
    state = model.new_state(checkpoints_every=4 if keep else None, keep=keep)
    ids = list(range(20, 33))
    for token in ids:
        model.forward([token], state=state, logits="none")
    prompt = [*ids[:common], *range(70, 77)]
    got = alone(model, prompt, state=state, max_new_tokens=3, temperature=0, stop_at_eos=False)
    assert got.stats.reused_tokens == (common // 4 * 4 if keep else 0)
    assert got.stats.prompt_tokens == len(prompt) - got.stats.reused_tokens
    assert state.tokens == [*prompt, *got.tokens[:-1]]
    assert got.tokens == alone(model, prompt, max_new_tokens=3, temperature=0, stop_at_eos=False).tokens


def test_known_logits_read_nothing(model):
    state = model.new_state(checkpoints_every=1 << 40, keep=4)
    first = alone(model, PROMPTS[1], state=state, max_new_tokens=6, seed=1, **WARM)
    again = alone(model, PROMPTS[1], state=state, max_new_tokens=6, seed=1, prompt_logits=first.prompt_logits, **WARM)
    assert again.tokens == first.tokens and again.stats.prompt_tokens == 0
    other = alone(model, PROMPTS[1], state=state, max_new_tokens=6, seed=1, **WARM)
    assert other.stats.prompt_tokens > 0 and other.tokens == first.tokens


def test_answers_keep_their_tokens_in_a_chat(model):
    """A drawn answer is read again by its own ids, however its text would be cut."""
    messages, state = [{"role": "user", "content": "Who is he?"}], model.new_state()
    one_by_one = iter(model.tokenizer.encode("the k") + [model.tokenizer.encode(c)[0] for c in "ing of glory"])
    allowed = []

    def forced(ids, logits):
        allowed.append(next(one_by_one))
        logits[np.arange(len(logits)) != allowed[-1]] = -np.inf

    said = alone(model, messages, state=state, logits_processor=forced, max_new_tokens=10, temperature=0)
    assert said.tokens == allowed and model.tokenizer.encode(said.text) != allowed
    messages += [{"role": "assistant", "content": said.text}, {"role": "user", "content": "Say more."}]
    ids = alone(model, messages, state=state, max_new_tokens=1).prompt_ids.tolist()
    assert ids[:len(said.prompt_ids) + 9] == [*said.prompt_ids, *allowed[:9]]
    text = model.tokenizer.apply_chat_template(messages)
    assert model.tokenizer.decode(ids) == text


def test_tools_reach_the_template(model):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    generation = model.generate([{"role": "user", "content": "x"}], tools=tools)
    assert '"name": "weather"' in model.tokenizer.decode(generation.prompt_ids)


# ---- errors ----

@pytest.mark.parametrize("options, words", [
    ({"n": 0}, "n is 0; it must be an int >= 1"), ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"logprobs": -1}, "logprobs is -1"), ({"stop": ""}, r"stop\[0\] is ''"), ({"stop": ["a", ""]}, r"stop\[1\] is ''"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"), ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"), ({"top_k": -1}, "top_k is -1"), ({"min_p": 2}, "min_p"),
    ({"seed": -1}, "seed"), ({"seed": [1, 2]}, "seed has 2 values"),
])
def test_a_wrong_option_is_refused_before_anything_is_read(model, options, words):
    state = model.new_state()
    with pytest.raises(ValueError, match=words):
        model.generate([1, 2], state=state, **options)
    assert state.position == 0


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "n",
                                  "max_new_tokens", "logprobs"])
@pytest.mark.parametrize("wrong", [2.5, "0.5", True])
def test_an_option_of_another_type_is_named(model, name, wrong):
    """A number in words is none, and no option is a number that may be yes."""
    fits = (float,) if name in ("temperature", "top_p", "min_p", "repetition_penalty") else \
        (str,) if name == "stop" else ()
    if isinstance(wrong, fits):
        return
    with pytest.raises(TypeError, match=f"^{name} is {wrong!r}; it must be"):
        model.generate([1], **{name: wrong})


def test_a_stop_string_that_is_no_text(model):
    with pytest.raises(TypeError, match=r"stop\[1\] is 3; it must be text"):
        model.generate([1], stop=["a", 3])


# ---- what the checkpoint's generation_config asks for ----

def kept(model, **config):
    """The model with a generation_config as JSON gives it."""
    twin = copy.copy(model)
    twin.generation_config = json.loads(json.dumps(config))
    return twin


@pytest.mark.parametrize("name, value, as_given", [("top_k", 50.0, 50), ("temperature", 1, 1.0), ("top_p", 1, 1.0)])
def test_whole_numbers_are_numbers_of_json(model, name, value, as_given):
    sampling = kept(model, do_sample=True, **{name: value}).generate([1]).sampling[name]
    assert sampling == as_given and type(sampling) is type(as_given)


@pytest.mark.parametrize("name, value, words", [
    ("top_k", 50.5, "top_k is 50.5; it must be an int"), ("top_k", "50", "top_k is '50'; it must be an int"),
    ("top_k", -1.0, "top_k is -1; it must be 0 <= top_k"), ("temperature", "hot", "temperature is 'hot'; it must be a"),
    ("top_p", 7, "top_p is 7"), ("min_p", True, "min_p is True"),
    ("repetition_penalty", 0, "repetition_penalty is 0; it"),
    ("eos_token_id", "</s>", "eos_token_id is '</s>'; it must be an int, or a list of them"),
    ("eos_token_id", [2, 2.5], "eos_token_id is 2.5"),
])
def test_a_generation_config_that_is_wrong_is_named(model, name, value, words):
    wrong = kept(model, do_sample=True, **{name: value})
    with pytest.raises(kl.FormatError, match=f"^generation_config: {words}"):
        wrong.generate([1])
    if name != "eos_token_id":
        wrong.generate([1], **{name: {"top_k": 5}.get(name, 0.5)})  # what is asked for comes first


def test_ends_of_a_generation_config_may_be_whole_numbers(model):
    assert 7 in kept(model, eos_token_id=[7.0]).generate([1]).stop_ids


def test_stop_may_be_none(model):
    assert model.generate([1, 2], stop=None, max_new_tokens=3).run().tokens \
        == model.generate([1, 2], max_new_tokens=3).run().tokens


def test_a_processor_that_cannot_be_called(model):
    with pytest.raises(TypeError, match="logits_processor is a str; it must be callable"):
        model.generate([1], logits_processor="json")


def test_prompts_and_states_that_are_wrong(model):
    state = model.new_state(context=4)
    model.forward([1, 2], state=state, logits="none")
    with pytest.raises(ValueError, match="prompt has 5 tokens; its state was made for a context of 4"):
        model.generate([1, 2, 3, 4, 5], state=state)
    with pytest.raises(ValueError, match="prompt is empty"):
        model.generate([], state=state)
    with pytest.raises(ValueError, match="prompt is a batch of none"):
        model.generate(np.zeros((0, 3), int))
    with pytest.raises(ValueError, match=r"prompt\[1\] is empty"):
        model.generate(["a", ""])
    with pytest.raises(ValueError, match=r"state\[1\] is given twice"):
        model.generate([[1], [2]], state=[state, state])
    with pytest.raises(ValueError, match="one for each of 2 prompts"):
        model.generate([[1], [2]], state=state)
    with pytest.raises(TypeError, match="it must be a State"):
        model.generate([1], state=3)
    with pytest.raises(ValueError, match="of another model"):
        kl.Model.tiny().generate([1, 2], state=state)
    with pytest.raises(ValueError, match="prompt_logits"):
        model.generate([1], prompt_logits=np.zeros(3, np.float32))
    assert state.tokens == [1, 2] and state.position == 2


def test_messages_that_are_wrong(model, monkeypatch):
    with pytest.raises(ValueError, match=r"messages\[0\]\['role'\] is 'wizard'; it must be one of system, developer"):
        model.generate([{"role": "wizard", "content": "x"}])
    monkeypatch.setattr(model.tokenizer, "chat_template", "a\n{{ messages[9].content }}\n")
    with pytest.raises(ValueError, match="failed at line 2"):
        model.generate([{"role": "user", "content": "x"}])


def test_a_model_without_a_tokenizer_gives_ids():
    golden = kl.Model.from_config(kl.Model.tiny().config, seed=1)
    generation = Generation(golden, [1, 2, 3], max_new_tokens=3, temperature=0, stop_at_eos=False).run()
    assert generation.text == " ".join(map(str, generation.tokens))
    with pytest.raises(ValueError, match="stop strings need"):
        golden.generate([1], stop="a")
    with pytest.raises(ValueError, match="no tokenizer"):
        golden.generate([{"role": "user", "content": "x"}])


def test_progress_tells_of_the_prompt_and_changes_nothing():
    model, told = kl.Model.tiny(), []
    prompts = [list(range(3, 1303)), list(range(40, 80))]
    quiet = model.generate(prompts, max_new_tokens=2, logprobs=1).run()
    loud = model.generate(prompts, max_new_tokens=2, logprobs=1, progress=lambda *pair: told.append(pair)).run()
    assert told == [(0, 1340), (552, 1340), (1064, 1340), (1340, 1340)]
    assert loud.tokens == quiet.tokens and loud.logprobs == quiet.logprobs
