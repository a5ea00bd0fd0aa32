"""The forms of the delta rule in whole models: their laws, how near they are to each other, and the text they give.

That each form meets the bars against float64 and transformers is in test_verify.py.
"""

import functools

import numpy as np
import pytest
from conftest import DATA, GOLDEN_CASES

import kimi_linear as kl

FORMS = ["auto", "recurrent", "chunked"]
CASES = ["tiny", *GOLDEN_CASES]


@functools.cache
def open_model(case, form, threads=1, isa=None):
    ctx = kl.Context(threads=threads, isa=isa, delta_rule=form)
    return kl.Model.tiny(ctx=ctx) if case == "tiny" else kl.Model.from_pretrained(DATA / "golden" / case, ctx=ctx)


def ids(model, T, seed=0):
    return np.random.default_rng(seed).integers(3, model.config.vocab_size, T).astype(np.int32)


def arrays(state):
    return {name: value.tobytes() for name, value in state.items()}


def run(model, tokens, cuts=(), **options):
    """Logits and state after reading `tokens` in calls that end at `cuts`."""
    state = model.new_state()
    parts = [model.forward(part, state=state, **options) for part in np.split(tokens, cuts)]
    return np.concatenate(parts), state


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_same_bytes_on_every_instruction_set_and_thread_count(case, form):
    first = None
    for isa in kl.isa_list():
        for threads in (1, 3):
            model = open_model(case, form, threads, isa)
            logits, state = run(model, ids(model, 150))
            got = logits.tobytes(), arrays(state)
            first = first or got
            assert got == first, (isa, threads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_a_batch_and_a_split_at_multiples_of_64(case, form):
    model = open_model(case, form)
    lengths = [0, 70, 3, 1, 129, 200]
    prompts = [ids(model, n, seed=n) for n in lengths]
    states = model.new_state(len(lengths))
    together = model.forward(prompts, state=states)
    for tokens, logits, state in zip(prompts, together, states, strict=True):
        alone, own = run(model, tokens)
        assert logits.tobytes() == alone.tobytes() and arrays(state) == arrays(own)
    split, own = run(model, prompts[-1], [64, 192])
    assert together[-1].tobytes() == split.tobytes() and arrays(states[-1]) == arrays(own)


@pytest.mark.parametrize("case", CASES)
def test_the_forms_agree(case):
    """1e-5 of the logits' rms with the same experts, whole and split; and they are not the same bytes."""
    auto = open_model(case, "auto")
    tokens = ids(auto, 150)
    trace = auto.trace(tokens, "layers.*")
    experts = {int(name.split(".")[1]): value for name, value in trace.items() if name.endswith("moe.ids")}
    whole, state = run(auto, tokens, expert_ids=experts)
    for form in FORMS[1:]:
        model = open_model(case, form)
        logits, own = run(model, tokens, expert_ids=experts)
        assert logits.tobytes() != whole.tobytes()
        assert np.sqrt(np.mean((whole - logits) ** 2) / np.mean(whole**2)) < 1e-5
        for name in state:
            size = np.sqrt(np.sum(state[name] ** 2) / max(state[name].size, 1))
            assert np.abs(state[name] - own[name]).max(initial=0) <= 1e-4 * size + 1e-30


def test_a_step_of_one_token_is_the_recurrence_in_every_form_but_chunked():
    tokens = ids(open_model("tiny", "auto"), 20)
    steps = {form: run(open_model("tiny", form), tokens, range(1, 20)) for form in FORMS}
    assert steps["auto"][0].tobytes() == steps["recurrent"][0].tobytes()
    assert arrays(steps["auto"][1]) == arrays(steps["recurrent"][1])


@pytest.mark.parametrize("prompt", ["In the beginning", "And God said, Let there be light: and there was light. And"])
def test_greedy_text_of_tiny_is_the_same_in_every_form(prompt):
    texts = {open_model("tiny", form).generate(prompt, max_new_tokens=100, temperature=0).run().text for form in FORMS}
    assert len(texts) == 1


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_as_planned(form):
    model = kl.Model.tiny(ctx=kl.Context(threads=2, delta_rule=form))
    plan = model.plan(context=500)
    state = model.new_state(context=500)
    model.forward(ids(model, 500), state=state)
    assert model.ctx._core.scratch_bytes <= plan.scratch
    held = model.ctx._core.allocations
    state.reset()
    model.forward(ids(model, 500), state=state)
    assert model.ctx._core.allocations == held
