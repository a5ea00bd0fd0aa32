"""Each verb of a state, by bytes, on the packaged model and each golden one, with both types of cache."""

import copy
import pickle
import threading

import numpy as np
import pytest
from conftest import GOLDEN_CASES
from states import assert_same, contents, ids, read

import kimi_linear as kl


@pytest.fixture(scope="module")
def tiny():
    return kl.Model.tiny()


@pytest.fixture(scope="module", params=["tiny", *GOLDEN_CASES])
def model(request, golden_dir):
    return kl.Model.tiny() if request.param == "tiny" else kl.Model.from_pretrained(golden_dir / request.param)


@pytest.fixture(params=["float32", "float16"])
def cache(request):
    return request.param

# ---- threads ----------------------------------------------------------------------------------------


def test_a_verb_has_the_state_until_its_tokens_are_told(tiny, monkeypatch):
    """What the core has read and the ids move on one after the other: no other thread sees the state in between."""
    state, told, go_on = tiny.new_state(), threading.Event(), threading.Event()
    empty = state.snapshot()

    def slow(self, ids):
        told.set()
        assert go_on.wait(30)
        self.tokens.extend(ids)

    monkeypatch.setattr(kl.State, "_append", slow)
    reader = threading.Thread(target=lambda: tiny.forward([5, 6], state=state))
    reader.start()
    assert told.wait(30)
    verbs = {"snapshot": state.snapshot, "fork": state.fork, "reset": state.reset,
             "restore": lambda: state.restore(empty), "truncate": lambda: state.truncate(1),
             "save": lambda: state.save("nowhere"), "forward": lambda: tiny.forward([7], state=state)}
    try:
        for verb, call in verbs.items():
            with pytest.raises(ValueError, match=f"{verb}: the state is in use by another call"):
                call()
    finally:
        go_on.set()
        reader.join()
    assert state.tokens == [5, 6] and state.position == 2
    assert state.snapshot().position == 2 and state.fork().tokens == [5, 6]


# ---- copies ----------------------------------------------------------------------------------------


def test_fork_is_an_independent_copy(model, cache):
    tokens = ids(model, 150)
    state, before = read(model, tokens, cache=cache), contents(read(model, tokens, cache=cache))
    fork = state.fork()
    assert contents(fork) == before
    model.forward(ids(model, 80, 1), state=fork, logits="none")
    for name, array in fork.items():
        fork[name] = np.ones_like(array)
    assert contents(state) == before
    assert_same(state, read(model, tokens, cache=cache), model)


def test_a_copy_is_a_fork(tiny):
    state = read(tiny, ids(tiny, 70))
    before = contents(state)
    for twin in (copy.copy(state), copy.deepcopy([state])[0]):
        assert contents(twin) == before and twin.tokens == state.tokens
        tiny.forward(ids(tiny, 5), state=twin, logits="none")
        assert contents(state) == before and state.position == len(state.tokens) == 70
    with pytest.raises(TypeError, match=r"a State .* is not pickled; save\(path\) writes it"):
        pickle.dumps(state)


def test_a_snapshot_is_copied_as_it_is(tiny):
    """It never changes; in a list of states and snapshots it does not hinder a copy of all."""
    state = read(tiny, ids(tiny, 20))
    kept = state.snapshot()
    assert copy.copy(kept) is kept and copy.deepcopy([state, kept])[1] is kept
    with pytest.raises(TypeError, match=r"a Snapshot .* is not pickled; restore it, and state.save\(path\) writes it"):
        pickle.dumps(kept)


def test_fork_across_a_page(tiny):
    """The cache of 512 positions a page is copied whole, the last page as far as it goes."""
    tokens = ids(tiny, 1030)
    state = read(tiny, tokens)
    assert_same(state.fork(), state, tiny)


def test_restore_puts_back_all_of_it(model, cache):
    tokens = ids(model, 130)
    state = read(model, tokens, cache=cache)
    snapshot = state.snapshot()
    assert snapshot.position == 130 and snapshot.nbytes == state.nbytes
    for n in (1, 70):  # a snapshot serves more than once
        model.forward(ids(model, n, n), state=state, logits="none")
        state.restore(snapshot)
        assert_same(state.fork(), read(model, tokens, cache=cache), model)


def test_restore_goes_forward_too(tiny):
    late = read(tiny, ids(tiny, 700))
    early = tiny.new_state()
    early.restore(late.snapshot())
    assert_same(early, late, tiny)


def test_fork_and_snapshot_take_their_checkpoints_along(tiny):
    state = read(tiny, ids(tiny, 300), checkpoints_every=64, keep=3)
    fork, snapshot = state.fork(), state.snapshot()
    state.truncate(0)
    assert state.checkpoints == []
    assert fork.checkpoints == [128, 192, 256]
    state.restore(snapshot)
    assert state.checkpoints == [128, 192, 256]
    state.truncate(130)
    fork.truncate(130)
    assert_same(state, fork, tiny)


def test_a_state_that_keeps_fewer_takes_the_newest(tiny):
    """What it has no room for is given up, as if newer ones had taken its place."""
    tokens = ids(tiny, 300)
    snapshot = read(tiny, tokens, checkpoints_every=64, keep=4).snapshot()
    state = tiny.new_state(checkpoints_every=64, keep=2)
    state.restore(snapshot)
    assert state.checkpoints == [192, 256]
    with pytest.raises(ValueError, match="n is 100; the oldest position that the state can go back to is 192"):
        state.truncate(100)
    state.truncate(192)
    assert_same(state, read(tiny, tokens[:192]), tiny)


def test_a_snapshot_without_checkpoints_does_not_go_back(tiny):
    state = tiny.new_state(checkpoints_every=64, keep=2)
    state.restore(read(tiny, ids(tiny, 100)).snapshot())
    with pytest.raises(ValueError, match="n is 50; the oldest position that the state can go back to is 100"):
        state.truncate(50)


def test_reset_forgets(tiny):
    state = read(tiny, ids(tiny, 100), checkpoints_every=50, keep=1)
    state.reset()
    assert state.checkpoints == [] and state.tokens == []
    assert_same(state, tiny.new_state(), tiny)


# ---- checkpoints -----------------------------------------------------------------------------------


def test_checkpoints_change_no_byte(model, cache):
    tokens = ids(model, 333)
    plain, plain_state = model.new_state(cache=cache), model.new_state(cache=cache, checkpoints_every=100, keep=2)
    assert model.forward(tokens, state=plain).tobytes() == model.forward(tokens, state=plain_state).tobytes()
    assert_same(plain, plain_state, model)


@pytest.mark.parametrize("every, keep, calls, expected", [
    (64, 8, [300], [64, 128, 192, 256]),
    (64, 2, [300], [192, 256]),
    (100, 8, [300], [128, 256, 300]),         # the end of a piece behind each multiple, or of the call
    (10, 8, [70], [64, 70]),                  # several multiples in one piece make one
    (50, 8, [30, 30, 30], [60]),              # a call ends behind it
    (4, 3, [1] * 13, [4, 8, 12]),             # steps of one token meet each multiple
    (1000, 3, [999], []),
    (64, 4, [10, 200], [74, 138, 202]),       # pieces are counted from the first token of the call
])
def test_where_checkpoints_are(tiny, every, keep, calls, expected):
    state = read(tiny, ids(tiny, sum(calls)), cuts=np.cumsum(calls)[:-1], checkpoints_every=every, keep=keep)
    assert state.checkpoints == expected


def test_checkpoints_of_a_ragged_batch(tiny):
    """Each sequence has its own, and gets the bytes it would get alone."""
    lengths = (5, 700, 64, 130)
    sequences = [ids(tiny, n, n) for n in lengths]
    states = tiny.new_state(4, checkpoints_every=64, keep=20)
    tiny.forward(sequences, state=states, logits="none")
    for n, state, tokens in zip(lengths, states, sequences, strict=True):
        assert state.checkpoints == list(range(64, n + 1, 64))
        assert_same(state, read(tiny, tokens), tiny)


def test_truncate_to_a_checkpoint_equals_the_run_that_ended_there(model, cache):
    tokens = ids(model, 300)
    for n in (64, 192, 256):
        state = read(model, tokens, cache=cache, checkpoints_every=64, keep=8)
        state.truncate(n)
        assert state.position == n
        assert_same(state, read(model, tokens[:n], cache=cache), model)


@pytest.mark.parametrize("n", [1, 63, 65, 200, 299])
def test_truncate_between_reads_the_rest_in_one_call(model, cache, n):
    tokens, at = ids(model, 300), n // 64 * 64
    state = read(model, tokens, cache=cache, checkpoints_every=64, keep=8)
    state.truncate(n)
    assert state.position == n and state.tokens == tokens[:n].tolist()
    assert_same(state, read(model, tokens[:n], cuts=[at] if at else [], cache=cache), model)


def test_truncate_again_after_reading_other_tokens(tiny):
    """Checkpoints behind n are forgotten: what is read instead makes its own."""
    tokens, others = ids(tiny, 300), ids(tiny, 200, 5)
    state = read(tiny, tokens, checkpoints_every=64, keep=8)
    state.truncate(128)
    assert state.checkpoints == [64, 128]
    tiny.forward(others, state=state, logits="none")
    state.truncate(256)
    assert_same(state, read(tiny, np.concatenate([tokens[:128], others[:128]])), tiny)


def test_the_present_position_is_free_and_zero_always_possible(tiny):
    state = read(tiny, ids(tiny, 90))
    state.truncate(90)
    assert state.position == 90
    state.truncate(0)
    assert_same(state, tiny.new_state(), tiny)


def test_past_the_oldest_checkpoint_it_says_so(tiny):
    state = read(tiny, ids(tiny, 300), checkpoints_every=64, keep=2)
    before = contents(state)
    with pytest.raises(ValueError, match="n is 100; the oldest position that the state can go back to is 192"):
        state.truncate(100)
    plain = read(tiny, ids(tiny, 300))
    with pytest.raises(ValueError, match="n is 100 and the state keeps no checkpoints; it can stay at 300 or go back"):
        plain.truncate(100)
    for n in (-1, 301):
        with pytest.raises(ValueError, match=f"n is {n}; it must be 0 to 300"):
            state.truncate(n)
    with pytest.raises(TypeError):
        state.truncate(1.5)
    assert contents(state) == before


def test_a_checkpoint_by_hand(tiny):
    tokens = ids(tiny, 100)
    state = read(tiny, tokens[:37], checkpoints_every=1000, keep=2)
    state.checkpoint()
    state.checkpoint()
    assert state.checkpoints == [37]
    tiny.forward(tokens[37:], state=state, logits="none")
    state.truncate(37)
    assert_same(state, read(tiny, tokens[:37]), tiny)
    with pytest.raises(ValueError, match="made to keep none"):
        tiny.new_state().checkpoint()


def test_rows_without_ids_cannot_be_read_again(tiny):
    state = tiny.new_state(checkpoints_every=64, keep=4)
    tiny.forward(embeds=np.zeros((100, tiny.config.hidden_size), np.float32), state=state, logits="none")
    assert state.tokens == [-1] * 100
    before = contents(state)
    with pytest.raises(ValueError, match="n is 70; row 64 was read as embeds without an id"):
        state.truncate(70)
    assert contents(state) == before
    state.truncate(64)
    assert state.position == 64


def test_bytes_are_those_of_the_plan(tiny):
    for context, keep, cache in ((100, 0, "float32"), (1000, 3, "float32"), (513, 5, "float16")):
        state = tiny.new_state(context=context, cache=cache, checkpoints_every=64 if keep else None, keep=keep)
        plan = tiny.plan(context=context, cache=cache, keep=keep)
        assert plan.checkpoints == keep * plan.state_fixed
        assert state.nbytes == plan.state + plan.checkpoints == state.fork().nbytes


# ---- transactions ----------------------------------------------------------------------------------


def cancelled_at(model, tokens, state, nth):
    """Runs a call whose nth parallel region cancels it; the error, or None where it ended before."""
    ctx = kl.Context(threads=2)
    twin = kl.Model(model.config, model._tensors, ctx=ctx) if state is None else None
    state = twin.new_state(checkpoints_every=100, keep=3)
    ctx._core.cancel_at(nth)
    try:
        twin.forward(tokens, state=state, logits="none")
        return None, state, twin
    except KeyboardInterrupt as error:
        return str(error), state, twin
    finally:
        ctx._core.cancel_at(0)


def test_an_interrupted_call_ends_at_a_whole_pass_and_says_where(tiny):
    tokens, seen = ids(tiny, 700), set()
    for nth in (1, 200, 400, 900, 1500, 2500):
        error, state, twin = cancelled_at(tiny, tokens, None, nth)
        if error is None:
            continue
        assert state.position % 64 == 0 and state.tokens == tokens[: state.position].tolist()
        assert (f"after {state.position} new tokens" in error) == (state.position > 0)
        assert all(at <= state.position for at in state.checkpoints)
        seen.add(state.position)
        twin.forward(tokens[state.position :], state=state, logits="none")
        assert contents(state) == contents(read(tiny, tokens))
    assert 0 in seen and max(seen) > 0


def test_out_of_memory_leaves_the_state(tiny):
    """The allocation that grows the cache fails: nothing has been read."""
    ctx = kl.Context(threads=1)
    twin = kl.Model(tiny.config, tiny._tensors, ctx=ctx)
    state = read(twin, ids(tiny, 500))
    before = contents(state)
    ctx._core.fail_at(1)
    with pytest.raises(MemoryError):
        twin.forward(ids(tiny, 100, 1), state=state, logits="none")
    ctx._core.fail_at(0)
    assert contents(state) == before
    twin.forward(ids(tiny, 100, 1), state=state, logits="none")
    assert state.position == 600


def test_a_state_used_by_two_calls_at_once_is_refused(tiny):
    """While a call of another thread reads, every other verb is refused, and the call is not disturbed."""
    state, tokens = tiny.new_state(), ids(tiny, 200)
    inside, go_on = threading.Event(), threading.Event()

    def wait(x):
        inside.set()
        assert go_on.wait(60)
        return x

    call = threading.Thread(target=tiny.forward, args=(tokens,),
                            kwargs={"state": state, "logits": "none", "edit": {"layers.2.out": wait}})
    call.start()
    assert inside.wait(60)
    snapshot = tiny.new_state().snapshot()
    for verb in (lambda: tiny.forward(tokens, state=state), state.fork, state.snapshot, state.reset,
                 lambda: state.truncate(0), lambda: state.restore(snapshot), lambda: state["layers.0.kda.state"]):
        with pytest.raises(ValueError, match="in use"):
            verb()
    go_on.set()
    call.join()
    assert_same(state, read(tiny, tokens), tiny)


@pytest.fixture(scope="module")
def breaks_at_7():
    """A model whose router gets NaN at token 7: a step that fails on its way, after it has moved some states on."""
    model, name = kl.Model.tiny(), "model.embed_tokens.weight"
    table = np.array(model.weights[name], np.float32)
    table[7] = np.nan
    model.weights[name] = table
    return model


def test_a_lost_state_says_so(breaks_at_7, tmp_path):
    model, tokens = breaks_at_7, np.arange(8, 28)
    state = read(model, tokens, checkpoints_every=64, keep=2)
    with pytest.raises(ValueError, match="is NaN; scores must be numbers"):
        model.forward([7], state=state, logits="none")
    verbs = {"forward": lambda: model.forward([8], state=state), "copy": state.snapshot, "checkpoint": state.checkpoint,
             "read": lambda: state["layers.0.kda.state"]}
    for verb, call in verbs.items():
        with pytest.raises(ValueError, match=f"{verb}: .*was lost when a step failed after token 20"):
            call()
    with pytest.raises(ValueError, match="was lost when a step failed after token 20"):
        state.save(tmp_path / "state")
    assert state.position == 20 and not any(tmp_path.iterdir())
    state.reset()
    assert_same(state, model.new_state(), model)


def test_a_lost_state_goes_back_to_a_checkpoint(breaks_at_7):
    """Where it is, too: the tokens behind the checkpoint are read again."""
    model, tokens = breaks_at_7, np.arange(8, 108)
    for n in (100, 80, 64):
        state = read(model, tokens, cuts=[64], checkpoints_every=64, keep=1)
        assert state.checkpoints == [64]
        with pytest.raises(ValueError, match="is NaN"):
            model.forward([7], state=state, logits="none")
        state.truncate(n)
        assert_same(state, read(model, tokens[:n], cuts=[64][:n > 64]), model)


def test_a_lost_state_is_restored(breaks_at_7):
    state = read(breaks_at_7, np.arange(8, 28))
    kept = state.snapshot()
    with pytest.raises(ValueError, match="is NaN"):
        breaks_at_7.forward([7], state=state, logits="none")
    state.restore(kept)
    assert_same(state, read(breaks_at_7, np.arange(8, 28)), breaks_at_7)


# ---- errors ----------------------------------------------------------------------------------------


def test_the_context_is_a_limit(tiny):
    state = read(tiny, ids(tiny, 90), context=100)
    before = contents(state)
    with pytest.raises(ValueError, match="has read 90 tokens and 11 more are given; it was made for a context of 100"):
        tiny.forward(ids(tiny, 11), state=state)
    with pytest.raises(ValueError, match="101 tokens were read; the state was made for a context of 100"):
        state.restore(read(tiny, ids(tiny, 101)).snapshot())
    assert contents(state) == before


def test_what_cannot_be_restored(tiny, golden_dir):
    state = read(tiny, ids(tiny, 10))
    before = contents(state)
    other = kl.Model.from_pretrained(golden_dir / "kimi-a").new_state().snapshot()
    with pytest.raises(ValueError, match="two models"):
        state.restore(other)
    with pytest.raises(ValueError, match="cache of F16|cache of F32"):
        state.restore(tiny.new_state(cache="float16").snapshot())
    with pytest.raises(TypeError, match="it must be a Snapshot"):
        state.restore(tiny.new_state())
    assert contents(state) == before


@pytest.mark.parametrize("options, message", [
    ({"checkpoints_every": 0, "keep": 1}, "checkpoints_every is 0"),
    ({"keep": 2}, "checkpoints_every must then say"),
    ({"checkpoints_every": 64, "keep": -1}, "keep is -1"),
    ({"context": -1}, "context is -1"),
])
def test_bad_options(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.new_state(**options)


def test_checkpoints_that_do_not_fit(tiny):
    with pytest.raises(MemoryError):
        tiny.new_state(checkpoints_every=64, keep=1 << 50)


@pytest.mark.parametrize("wrong", [dict(expert_ids={1: np.zeros((1, 2), np.int32)}),
                                   dict(embeds=np.full((1, 128), np.nan, np.float32), check="finite")])
def test_a_wrong_argument_of_one_token_loses_no_state(tiny, wrong):
    state = tiny.new_state()
    tiny.forward([1, 2, 3], state=state)
    before = state.fork()
    given = [] if "embeds" in wrong else [[4]]
    with pytest.raises((ValueError, ArithmeticError)):
        tiny.forward(*given, state=state, **wrong)
    assert tiny.forward([5], state=state).tobytes() == tiny.forward([5], state=before).tobytes()


def test_a_context_that_the_machine_cannot_hold_is_refused(tiny):
    with pytest.raises(MemoryError, match="a cache of 1000000000000 positions has .* this machine has"):
        tiny.new_state(context=10**12)
