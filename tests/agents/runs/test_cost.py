"""What a step costs is said before a long training, which does not notice."""

import copy
import random
import re

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence

from flowgym_gym.agents import train
from flowgym_gym.agents.runs import cost
from flowgym_gym.agents.runs.cost import cost_of_long, duration, measure_step
from flowgym_gym.rewards.images import RedReward
from flowgym_gym.wrappers.vector import CoarseAction
from tests.agents.conftest import TINY, same_weights, tiny, untimed
from tests.conftest import PROMPTS, RED
from tests.models.tiny import folder

LINE = (
    r"a step of 2 environments takes [\d.e-]+ s \(network [\d.e-]+ s\), [\d.]+ [MG]B in use; "
    r"16 timesteps: about \d+ seconds, on top of which come learning, rewards and evaluations"
)


def make(n=2, **options):
    options = {"discretization_steps": 4, "prompts": PROMPTS, **options}
    checkpoint = folder("like_the_embedded_one")
    return gymnasium.make_vec(RED, num_envs=n, checkpoint=checkpoint, **options)


def everything(envs):
    globals_ = (torch.get_rng_state().numpy(), np.random.get_state()[1], repr(random.getstate()))
    return envs.unwrapped.get_state(), envs.unwrapped._needs_reset.copy(), globals_


@pytest.mark.parametrize("device", ["cpu", ["cpu", "cpu"]], ids=str)
def test_measuring_a_step_asks_no_reward_and_changes_nothing(device, monkeypatch):
    envs = CoarseAction(make(device=device), 4)
    envs.reset(seed=0)
    envs.step(envs.action_space.sample())
    monkeypatch.setattr(RedReward, "forward", lambda *_: pytest.fail("a reward was asked"))
    before, twin = copy.deepcopy(everything(envs)), copy.deepcopy(envs)
    measured = measure_step(envs, steps=3)
    assert 0 < measured.network < measured.seconds
    assert measured.memory["cpu"] > 1e6
    assert data_equivalence(everything(envs), before, exact=True)
    model = envs.unwrapped.environment.base_model
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    action = np.full(envs.action_space.shape, 0.3, np.float32)
    assert data_equivalence(envs.step(action), twin.step(action), exact=True)


def test_where_any_step_is_the_last_nothing_is_measured():
    assert measure_step(make(discretization_steps=1), steps=1) is None
    assert cost_of_long(make(discretization_steps=1), 10**9) is None


def test_a_step_that_fails_is_left_to_the_training(monkeypatch):
    envs = make()
    model = envs.unwrapped.environment.base_model
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: 1 / 0)
    assert cost_of_long(envs, 10**9) is None


@pytest.mark.second
def test_of_a_long_training_the_cost_is_said_which_changes_nothing(tmp_path, monkeypatch, capfd):
    quiet, said = tmp_path / "quiet", tmp_path / "said"
    changes = {"env.discretization_steps": 4}
    monkeypatch.setattr(cost, "LONG", 0.0)
    tiny(quiet, overrides=changes)  # with progress=False
    assert "a step of" not in capfd.readouterr().err
    train(RED, "ppo", out=said, timesteps=16, num_envs=2, overrides={**TINY["ppo"], **changes})
    assert re.search(LINE, capfd.readouterr().err)
    assert untimed(said) == untimed(quiet)
    assert same_weights(said, quiet)


def test_of_a_short_training_nothing_is_said():
    assert cost_of_long(make(), 16) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 seconds"), (61, "61 seconds"), (174, "3 minutes"), (9000, "2.5 hours"),
     (3e5, "3.5 days")],
)  # fmt: skip
def test_times_are_in_words(seconds, words):
    assert duration(seconds) == words
