"""Conditions have names of their own."""

import pytest

from explain2me.config.load import parse_config
from explain2me.config.schema import Config
from explain2me.errors import Explain2MeError
from explain2me.run.conditions import conditions_for


def config_of(noise: object) -> Config:
    detectors = [{"name": "d", "architecture": "timm:x", "random_runs": 1}]
    return parse_config({"name": "x", "data": {"manifest": "m"}, "detectors": detectors, "measures": {"noise": noise}})


@pytest.mark.parametrize(
    "noise",
    [
        [{"levels": [0.05]}, {"levels": [0.1, 0.05]}],
        [{"levels": [0.05, 0.0500000000000001]}],
    ],
    ids=["two tables", "one name"],
)
def test_the_same_noise_twice_is_refused(noise):
    config = config_of(noise)
    with pytest.raises(Explain2MeError, match=r"different conditions, got 'salt_pepper@0\.05' twice"):
        conditions_for(config.measures, (64, 64))


def test_levels_that_differ_little_are_two_conditions():
    config = config_of({"levels": [0.05, 0.05000001]})
    names = [condition.name for condition in conditions_for(config.measures, (64, 64))]
    assert {"salt_pepper@0.05", "salt_pepper@0.05000001"} <= set(names)
