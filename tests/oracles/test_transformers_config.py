"""config.json of Qwen models: transformers reads what we write, and we read what it makes of the published files."""

import warnings

import pytest
from test_config_qwen import PUBLISHED
from transformers import CONFIG_MAPPING

from kimi_linear.config import Config


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_ways(name):
    ours = Config.from_dict(PUBLISHED[name])
    written = ours.to_dict()
    theirs = [CONFIG_MAPPING[d["model_type"]](**d).to_dict() for d in (written, PUBLISHED[name])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [Config.from_dict(d) for d in theirs] == [ours, ours]
