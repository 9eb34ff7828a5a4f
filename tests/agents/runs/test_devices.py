"""A run on several devices: its environments are split, however few episodes they play."""

import pytest

from flowgym_gym.agents import evaluate
from flowgym_gym.agents.runs.environments import with_devices_for
from flowgym_gym.errors import OptionError
from tests.agents.conftest import resume, same_weights, tiny, untimed

DEVICES = {"env.device": ["cpu"] * 2, "evaluate_every": 8, "evaluation_episodes": 2}


@pytest.mark.second
def test_a_run_on_several_devices_resumes_bit_for_bit_and_is_evaluated(tmp_path, drawing):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    tiny(whole, overrides=DEVICES)
    tiny(halves, timesteps=8, overrides=DEVICES)
    resume(halves, timesteps=16)
    assert untimed(whole) == untimed(halves)
    assert same_weights(whole, halves)
    assert (whole / "episode.gif").is_file()
    assert evaluate(whole, episodes=3)["episodes"] == 3


def test_a_training_refuses_more_devices_than_sub_environments(tmp_path):
    with pytest.raises(OptionError, match="3 devices, but num_envs is 2"):
        tiny(tmp_path / "run", overrides={"env.device": ["cpu"] * 3})
    assert not (tmp_path / "run").exists()


def test_few_episodes_take_the_first_devices():
    settings = {"env": {"device": ["cuda:0", "cuda:1", "cpu"]}, "wrappers": {}}
    assert with_devices_for(settings, 2)["env"]["device"] == ["cuda:0", "cuda:1"]
    assert with_devices_for({"env": {"device": "cpu"}}, 2) == {"env": {"device": "cpu"}}
