"""torch's global defaults change nothing about a training, an evaluation or an exported policy."""

import gymnasium
import numpy as np
import pytest
import torch

from flowgym_gym.agents import evaluate, export, load_policy, train
from tests.agents.conftest import untimed

ID = "flowgym/GaussianMixture-Gaussian-v0"


def everything(folder):
    """What a short run, its evaluation and its exported policy come to."""
    changes = {
        "discretization_steps": 2,
        "algo.n_steps": 4,
        "algo.batch_size": 8,
        "algo.n_epochs": 1,
    }
    run = train(ID, out=folder / "run", timesteps=16, num_envs=2, overrides=changes, progress=False)
    report = evaluate(run, episodes=4)
    policy = load_policy(export(run, folder / "policy"))
    observation, _ = gymnasium.make(ID, discretization_steps=2).reset(seed=0)
    return untimed(run.out), report["agent"], policy.predict(observation, deterministic=True)[0]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("expected"))


@pytest.mark.parametrize("what", ["float64", "meta"])
def test_global_defaults_change_nothing(what, expected, tmp_path):
    try:
        if what == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.float64)
        metrics, agent, action = everything(tmp_path)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert metrics == expected[0]
    assert agent == expected[1]
    assert np.array_equal(action, expected[2])
