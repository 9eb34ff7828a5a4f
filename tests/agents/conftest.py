"""Settings so small that a run takes seconds."""

import pytest

TINY = {
    "ppo": {
        "env.discretization_steps": 2,
        "policy.width": 8,
        "algo.n_steps": 4,
        "algo.batch_size": 8,
        "algo.n_epochs": 2,
        "checkpoint_every": 8,
    },
    "sac": {
        "env.discretization_steps": 2,
        "policy.width": 8,
        "algo.learning_starts": 4,
        "algo.batch_size": 8,
        "algo.gradient_steps": 2,
        "checkpoint_every": 8,
    },
}


@pytest.fixture(autouse=True)
def _tiny_pictures(monkeypatch):
    monkeypatch.setattr("flowgym_gym.agents.training.PICTURES", 2)
