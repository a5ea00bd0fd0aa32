"""State files: the same continuation in a new process, and nothing but the whole truth is ever loaded."""

import errno
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDEN_CASES
from states import assert_same, contents, ids, read

import kimi_linear as kl
import kimi_linear.context
from kimi_linear import statefile
from kimi_linear.load import SafetensorsFile


@pytest.fixture(scope="module")
def tiny():
    return kl.Model.tiny()


@pytest.fixture(scope="module", params=["tiny", *GOLDEN_CASES])
def model(request, golden_dir):
    return kl.Model.tiny() if request.param == "tiny" else kl.Model.from_pretrained(golden_dir / request.param)


@pytest.fixture(params=["float32", "float16"])
def cache(request):
    return request.param


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny):
    """The bytes of a state file of 70 tokens."""
    path = tmp_path_factory.mktemp("saved") / "state"
    read(tiny, ids(tiny, 70)).save(path)
    return path.read_bytes()


def test_save_and_load_continue(model, cache, tmp_path):
    tokens = ids(model, 230)
    state = read(model, tokens, cache=cache)
    state.save(tmp_path / "state")
    loaded = model.load_state(tmp_path / "state")
    assert loaded.cache == cache
    assert_same(loaded, state, model)
    assert os.listdir(tmp_path) == ["state"]


def test_an_empty_state(model, tmp_path):
    model.new_state().save(tmp_path / "state")
    assert_same(kl.State.load(tmp_path / "state", model), model.new_state(), model)


def test_the_same_continuation_in_a_new_process(tiny, tmp_path):
    state, more = read(tiny, ids(tiny, 600)), ids(tiny, 40, 1)
    state.save(tmp_path / "state")
    program = ("import sys, hashlib, numpy as np, kimi_linear as kl; m = kl.Model.tiny();"
               "s = m.load_state(sys.argv[1]);"
               "x = m.forward(np.array(eval(sys.argv[2]), np.int32), state=s);"
               "print(hashlib.sha256(x.tobytes()).hexdigest())")
    out = subprocess.run([sys.executable, "-c", program, str(tmp_path / "state"), str(more.tolist())],
                         capture_output=True, text=True, check=True)
    assert out.stdout.strip() == hashlib.sha256(tiny.forward(more, state=state).tobytes()).hexdigest()


def test_others_can_read_it(tiny, tmp_path):
    from safetensors.numpy import load_file

    state = read(tiny, ids(tiny, 70))
    state.save(tmp_path / "state")
    arrays = load_file(tmp_path / "state")
    assert arrays.pop("tokens").tolist() == state.tokens
    assert {name: a.tobytes() for name, a in arrays.items()} == {name: a.tobytes() for name, a in state.items()}
    manifest = json.loads(SafetensorsFile(tmp_path / "state").metadata["manifest"])
    for name, a in state.items():
        digest = hashlib.blake2b(a.tobytes(), digest_size=16).hexdigest()
        assert manifest[name] == {"dtype": "F32", "shape": list(a.shape), "blake2b": digest}


def test_the_position_loaded_is_a_checkpoint(tiny, tmp_path):
    tokens = ids(tiny, 70)
    read(tiny, tokens).save(tmp_path / "state")
    state = tiny.load_state(tmp_path / "state", checkpoints_every=64, keep=2, context=200)
    assert state.checkpoints == [70]
    tiny.forward(ids(tiny, 20, 1), state=state, logits="none")
    with pytest.raises(ValueError, match="oldest position that the state can go back to is 70"):
        state.truncate(69)
    state.truncate(70)
    assert_same(state, read(tiny, tokens), tiny)
    with pytest.raises(ValueError, match="70 tokens were read; the state was made for a context of 50"):
        tiny.load_state(tmp_path / "state", context=50)


# ---- checkpoints -----------------------------------------------------------------------------------


def kept(model, n=300, **options):
    """A state that read n tokens and keeps checkpoints at 64, 128, ... of them."""
    return read(model, ids(model, n), checkpoints_every=64, keep=3, **options)


def test_checkpoints_are_saved_and_gone_back_to(model, cache, tmp_path):
    state = kept(model, cache=cache)
    assert state.checkpoints == [128, 192, 256]
    state.save(tmp_path / "state")
    loaded = model.load_state(tmp_path / "state", checkpoints_every=64, keep=4)
    assert loaded.checkpoints == [128, 192, 256, 300]
    for n in (300, 256, 200, 128):
        state.truncate(n)
        loaded.truncate(n)
        assert_same(loaded.fork(), state.fork(), model)
    assert loaded.checkpoints == [128]
    with pytest.raises(ValueError, match="oldest position that the state can go back to is 128"):
        loaded.truncate(127)


def test_checkpoints_that_there_is_no_room_for_are_left(tiny, tmp_path):
    kept(tiny).save(tmp_path / "state")
    assert tiny.load_state(tmp_path / "state", checkpoints_every=64, keep=2).checkpoints == [256, 300]
    plain = tiny.load_state(tmp_path / "state")
    assert plain.checkpoints == [] and plain.nbytes == tiny.plan(context=300).state
    assert_same(plain, read(tiny, ids(tiny, 300)), tiny)


def test_only_a_file_with_checkpoints_needs_a_newer_reader(tiny, tmp_path):
    for state, version in ((read(tiny, ids(tiny, 20)), "1"), (kept(tiny, 70), "2"), (kept(tiny, 20), "1")):
        state.save(tmp_path / "state")
        assert SafetensorsFile(tmp_path / "state").metadata["version"] == version


@pytest.mark.parametrize("positions", ["", "7", "[64, 64]", "[128, 64]", "[true]", "[-1]", "[1.5]", "[" * 9999])
def test_positions_of_checkpoints_are_checked(tiny, tmp_path, positions):
    kept(tiny, 140).save(tmp_path / "state")
    (tmp_path / "state").write_bytes(rewritten((tmp_path / "state").read_bytes(), checkpoints=positions))
    with pytest.raises(kl.FormatError, match="checkpoints are no JSON list of rising positions"):
        tiny.load_state(tmp_path / "state", checkpoints_every=64, keep=2)


def test_a_checkpoint_behind_the_end_is_refused(tiny, tmp_path):
    kept(tiny, 140).save(tmp_path / "state")
    (tmp_path / "state").write_bytes(rewritten((tmp_path / "state").read_bytes(), checkpoints="[64, 141]"))
    with pytest.raises(kl.FormatError, match="a checkpoint at 141; 140 tokens were read"):
        tiny.load_state(tmp_path / "state")


def test_core_reads_only_checkpoints_that_are_there(tiny):
    state, ctx = kept(tiny, 140), kl.context.current()._core
    layer, part, shape, dtype = state._place("layers.0.kda.q_history")
    for i in (-2, 2, 1 << 62):
        with pytest.raises(ValueError, match="of 2 has no part 1"):
            state._core.read(ctx, layer, part, np.empty(shape, dtype), i)
    name = next(name for name in state if ".mla." in name)
    layer, part, shape, dtype = state._place(name)
    with pytest.raises(ValueError, match="checkpoint 0 of 2 has no part 4"):
        state._core.read(ctx, layer, part, np.empty(shape, dtype), 0)
    for n in (-2, 127, 141):
        with pytest.raises(ValueError, match=f"checkpoint: n is {n}; it must be 128 to 140"):
            state._core.checkpoint(ctx, n)


def test_a_flipped_bit_of_a_checkpoint_is_refused_by_name(tiny, tmp_path):
    path = tmp_path / "state"
    kept(tiny, 140).save(path)
    whole = path.read_bytes()
    n = 8 + int.from_bytes(whole[:8], "little")
    entry = json.loads(whole[8:n])["checkpoints.1.layers.0.kda.q_history"]
    raw = bytearray(whole)
    raw[n + entry["data_offsets"][0]] ^= 4
    path.write_bytes(raw)
    with pytest.raises(kl.FormatError, match="checkpoints.1.layers.0.kda.q_history does not have the checksum"):
        tiny.load_state(path)


# ---- damage ----------------------------------------------------------------------------------------


def owner(raw, byte):
    """The array that a byte of a file belongs to, or the header."""
    n = 8 + int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8:n]).items():
        begin, end = entry.get("data_offsets", (0, 0))
        if begin <= byte - n < end:
            return name
    return "header"


def test_one_flipped_bit_is_refused_by_name(tiny, saved, tmp_path):
    """Each bit of a sample of the arrays and of the header, among them every byte of its padding and checksum."""
    n = 8 + int.from_bytes(saved[:8], "little")
    rng, path = np.random.default_rng(4), tmp_path / "state"
    bits = np.concatenate([rng.integers(0, 8 * n, 300), rng.integers(8 * n, 8 * len(saved), 60), np.arange(64),
                           np.arange(8 * (n - 8), 8 * n)])
    for bit in bits.tolist():
        raw = bytearray(saved)
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        with pytest.raises(kl.FormatError) as caught:
            tiny.load_state(path)
        where = owner(saved, bit // 8)
        assert where in str(caught.value) or where == "header", (bit, str(caught.value))
        if where != "header":
            assert caught.value.problems == (f"{where} does not have the checksum that the manifest says: "
                                             "the file is damaged",)


def test_a_file_cut_short_or_grown(tiny, saved, tmp_path):
    path = tmp_path / "state"
    for n in (0, 4, 8, 100, len(saved) // 2, len(saved) - 1):
        path.write_bytes(saved[:n])
        with pytest.raises(kl.FormatError):
            tiny.load_state(path)
    path.write_bytes(saved + b"\0")
    with pytest.raises(kl.FormatError, match="belong to no tensor"):
        tiny.load_state(path)


def rewritten(saved, **changes):
    """The file with other metadata, and a header checksum that is right again."""
    n = int.from_bytes(saved[:8], "little")
    header = json.loads(saved[8 : 8 + n])
    header["__metadata__"] |= changes | {"checksum": "0" * 32}
    text = json.dumps(header, separators=(",", ":")).encode()
    raw = len(text).to_bytes(8, "little") + text
    place = raw.index(b'"checksum":"') + 12
    digest = hashlib.blake2b(raw, digest_size=16).hexdigest().encode()
    return raw[:place] + digest + raw[place + 32 :] + saved[8 + n :]


@pytest.mark.parametrize("changes, message", [
    ({"version": "3"}, "version '3'; this build reads versions 1 to 2, so a newer one is needed"),
    ({"version": "x"}, "version 'x'; this build reads versions 1 to 2"),
    ({"version": "2"}, "header's checkpoints are no JSON list of rising positions"),
    ({"version": "2", "checkpoints": "[10]"}, "its arrays are not those of this model's states: checkpoints.0.layers"),
    ({"format": "else"}, "does not name a state of kimi_linear: format is 'else'"),
    ({"manifest": "{}"}, "does not have the checksum that the manifest says"),
    ({"manifest": "["}, "header's manifest"),
    ({"manifest": "[]"}, "header's manifest"),
    ({"cache": "int4"}, "cache is 'int4'"),
])
def test_foreign_and_future_files(tiny, saved, tmp_path, changes, message):
    (tmp_path / "state").write_bytes(rewritten(saved, **changes))
    with pytest.raises(ValueError, match=message):
        tiny.load_state(tmp_path / "state")


def test_a_checkpoint_is_no_state(tiny, tiny_dir):
    with pytest.raises(kl.FormatError, match="does not name a state of kimi_linear"):
        tiny.load_state(next(tiny_dir.glob("*.safetensors")))
    with pytest.raises(FileNotFoundError):
        tiny.load_state(tiny_dir / "nothing")


def test_a_state_of_another_model(tiny, golden_dir, saved, tmp_path):
    path = tmp_path / "state"
    path.write_bytes(saved)
    with pytest.raises(ValueError, match="with other weights or another config than 'kimi-a'"):
        kl.Model.from_pretrained(golden_dir / "kimi-a").load_state(path)
    edited = kl.Model.tiny()
    name = "model.layers.0.input_layernorm.weight"
    edited.weights[name] = np.asarray(edited.weights[name], np.float32) * 2
    with pytest.raises(ValueError, match="with other weights"):
        edited.load_state(path)


def test_the_fingerprint_tells_config_names_shapes_and_bytes(tiny):
    weights = {"a": np.arange(100, dtype=np.float32), "b": np.ones((3, 5), np.float32)}
    seen = {statefile.fingerprint(tiny.config, weights)}
    for other in ({"a": weights["a"]}, weights | {"b": np.ones((5, 3), np.float32)}, weights | {"a": -weights["a"]},
                  weights | {"b": np.ones((3, 5), np.float16)}, {"a": weights["a"], "c": weights["b"]}):
        seen.add(statefile.fingerprint(tiny.config, other))
    assert len(seen) == 6


# ---- writing ---------------------------------------------------------------------------------------


def test_no_space_on_the_disk(tiny, tmp_path, monkeypatch):
    state = read(tiny, ids(tiny, 70))
    before, path = contents(state), tmp_path / "state"
    path.write_bytes(b"old")
    monkeypatch.setattr(statefile.shutil, "disk_usage", lambda folder: type("", (), {"free": 1000}))
    with pytest.raises(OSError, match="1,000 are free on its disk") as caught:
        state.save(path)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["state"] and contents(state) == before


def test_a_disk_that_fills_up_on_the_way(tiny, tmp_path):
    """A limit on the size of files fails the write itself."""
    program = ("import resource, signal, sys, numpy as np, kimi_linear as kl; m = kl.Model.tiny(); s = m.new_state();"
               "m.forward(np.arange(200, dtype=np.int32), state=s, logits='none');"
               "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
               "\ntry: s.save(sys.argv[1])\nexcept OSError as error: print(type(error).__name__, s.position)")
    out = subprocess.run([sys.executable, "-c", program, str(tmp_path / "state")], capture_output=True, text=True,
                         check=True)
    assert out.stdout == "OSError 200\n" and os.listdir(tmp_path) == []


def test_a_state_that_moves_while_it_is_saved(tiny, tmp_path, monkeypatch):
    state = read(tiny, ids(tiny, 70))
    plain = statefile._header

    def moved(*args):
        state["layers.0.kda.state"] = state["layers.0.kda.state"] + 1
        return plain(*args)

    monkeypatch.setattr(statefile, "_header", moved)
    with pytest.raises(ValueError, match="layers.0.kda.state changed while the state was saved"):
        state.save(tmp_path / "state")
    assert os.listdir(tmp_path) == []
