"""Damaged state files: whatever was done to the bytes, loading refuses or gives the very same state."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from states import contents, ids, read

import kimi_linear as kl


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, file to write, its bytes when whole, the state's arrays) of a small model's state."""
    import pathlib

    folder = pathlib.Path(__file__).parents[1] / "data" / "golden" / "kimi-b"
    model = kl.Model.from_pretrained(folder)
    state = read(model, ids(model, 40), checkpoints_every=16, keep=2)
    path = tmp_path_factory.mktemp("fuzz") / "state"
    state.save(path)
    return model, path, path.read_bytes(), contents(state)


places = st.floats(0, 1, exclude_max=True)
damage = st.one_of(
    st.tuples(st.just("flip"), places, st.integers(0, 7)),
    st.tuples(st.just("set"), places, st.integers(0, 255)),
    st.tuples(st.just("cut"), places, st.just(0)),
    st.tuples(st.just("drop"), places, st.integers(1, 64)),
    st.tuples(st.just("insert"), places, st.integers(1, 64)),
    st.tuples(st.just("header"), places, st.integers(0, 255)),
)


def damaged(whole, wounds):
    data = bytearray(whole)
    header = 8 + int.from_bytes(whole[:8], "little")
    for kind, place, value in wounds:
        i = int(place * len(data))
        if kind == "flip" and data:
            data[i] ^= 1 << value
        elif kind == "set" and data:
            data[i] = value
        elif kind == "cut":
            del data[i:]
        elif kind == "drop":
            del data[i : i + value]
        elif kind == "insert":
            data[i:i] = bytes(value)
        elif data:
            data[int(place * min(header, len(data)))] = value
    return bytes(data)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wounds=st.lists(damage, min_size=1, max_size=4))
def test_a_damaged_file_is_refused_or_is_the_same(saved, wounds):
    model, path, whole, arrays = saved
    data = damaged(whole, wounds)
    path.write_bytes(data)
    try:
        loaded = model.load_state(path)
    except ValueError as error:
        assert str(error) and data != whole
    else:
        assert contents(loaded) == arrays and data == whole
