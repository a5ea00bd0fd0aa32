"""The options of ``kimi-linear generate``: stop strings, penalty, samples, log-probabilities."""

import json

import kimi_linear as kl
from kimi_linear.cli import main

PROMPT = "In the beginning"


def output(capfd, *argv):
    """(exit code, stdout, stderr)"""
    code = main(["generate", "--prompt", PROMPT, "--max-new-tokens", "10", "--cache", "float32", *argv])
    return code, *capfd.readouterr()


def test_stop_and_penalty(capfd):
    options = dict(max_new_tokens=10, temperature=0, repetition_penalty=1.5)
    free = kl.Model.tiny().generate(PROMPT, **options).run().text
    assert output(capfd, "--repetition-penalty", "1.5")[:2] == (0, free + "\n")
    stop = free[7:10]
    code, out, err = output(capfd, "--repetition-penalty", "1.5", "--stop", stop, "--stop", "no such text")
    assert (code, out) == (0, free[:free.find(stop)] + "\n") and "ended by stop" in err
    code, out, err = output(capfd, "--stop", "")
    assert code == 2 and "stop[0] is ''; it must be text" in err


def test_samples(capfd):
    model = kl.Model.tiny(activations="auto")
    want = model.generate(PROMPT, n=3, max_new_tokens=10, temperature=0.9, seed=4).run().text
    code, out, _ = output(capfd, "-n", "3", "--temperature", "0.9", "--seed", "4")
    assert code == 0 and out == "".join(f"--- {i + 1} of 3\n{text}\n" for i, text in enumerate(want))
    facts = json.loads(output(capfd, "--samples", "3", "--temperature", "0.9", "--seed", "4", "--json")[1])
    assert facts["text"] == want and len(facts["logprobs"]) == 3


def test_logprobs(capfd):
    facts = json.loads(output(capfd, "--logprobs", "3", "--json")[1])
    assert [len(likeliest) for likeliest in facts["top_logprobs"]] == [3] * 10
    assert facts["logprobs"] == [likeliest[0][1] for likeliest in facts["top_logprobs"]]  # greedy
    code, _, err = output(capfd, "--logprobs", "3")
    assert code == 2 and "--logprobs needs --json" in err
