"""The race finder: faults planted in copies of a kernel, each found by the host build, with a sentence."""

import ctypes
import re

import hip_build
import pytest

pytestmark = hip_build.host_build_only

FOUND = {  # by a sentence
    "missing_barrier": r"(reads|writes) shared memory s \+ \d+ bytes, which (nobody wrote|thread \d+ touched)",
    "reused_too_soon": r"(reads|writes) shared memory s \+ \d+ bytes",
    "lock_step": r"touched with no barrier between",
    "wrong_mask": r"the shuffle of planted.hip:\d+ reads lane \d+ of 32",
    "past_the_end": r"shared memory s\[128\] of 128",
    "past_the_dynamic_end": r"shared memory s\[127\] of 127",
    "divergent_barrier": r"waits at the barrier of planted.hip:\d+, thread \d+ waits at the barrier of planted.hip:\d+",
    "early_return": r"waits at the barrier of planted.hip:\d+, thread 127 has left",
    "shuffle_in_a_branch": r"waits at the shuffle of planted.hip:\d+, thread \d+ has left",
    "never_written": r"reads shared memory s \+ \d+ bytes, which nobody wrote",
    "two_writers": r"writes shared memory s \+ \d+ bytes",
    "past_the_output": r"wrote past the end of an allocation of 512 bytes",
    "past_the_scratch": r"wrote past the end of scratch of 512 bytes",
    "host_pointer": r"argument 1 is 0x\w+, which is no device memory",
    "host_pointer_in_a_struct": r"argument 0 has 0x\w+ at byte 8, which is the host's memory",
}
SOUND = ["sound", "sound_with_teams", "sound_with_team_barriers", "sound_with_atomics", "sound_with_a_struct"]


@pytest.fixture(scope="module")
def faults():
    return ctypes.CDLL(str(hip_build.built()[1]))


def run(faults, name, wave, seed, checks=True):
    sentence = ctypes.create_string_buffer(512)
    hip_build.set_up(faults, wave, seed, checks)
    return faults.kl_fault_run(name.encode(), sentence, len(sentence)), sentence.value.decode()


@pytest.mark.parametrize("wave, seed", hip_build.SETTINGS)
@pytest.mark.parametrize("name", FOUND)
def test_hip_fault_is_found(faults, name, wave, seed):
    result, sentence = run(faults, name, wave, seed)
    assert result == 1, f"{name} was not found: {sentence}"
    assert sentence.startswith(f"kernel {name}: ") and re.search(FOUND[name], sentence), sentence


@pytest.mark.parametrize("wave, seed", hip_build.SETTINGS)
@pytest.mark.parametrize("name", SOUND)
def test_hip_sound_kernel_passes(faults, name, wave, seed):
    assert run(faults, name, wave, seed) == (0, "no error")


@pytest.mark.parametrize("name, wave", [("wave_of_32", 64), ("half_a_tree", 32), ("half_a_tree", 64),
                                        ("stale_scratch", 32)])
def test_hip_wrong_sum_shows(faults, name, wave):
    assert run(faults, name, wave, 0)[0] == 2


def test_hip_wave_of_32_hides_on_32(faults):
    """Why both wave sizes are tested."""
    assert run(faults, "wave_of_32", 32, 0)[0] == 0


@pytest.mark.parametrize("name", ["missing_barrier", "reused_too_soon"])
def test_hip_races_show_by_order_alone(faults, name):
    """Without the record of who touched what: some order of threads gives another sum."""
    assert any(run(faults, name, 32, seed, checks=False)[0] == 2 for seed in range(1, 9))


def test_hip_goes_on_after_a_fault(faults):
    assert run(faults, "early_return", 32, 0)[0] == 1
    assert run(faults, "sound", 32, 0)[0] == 0
