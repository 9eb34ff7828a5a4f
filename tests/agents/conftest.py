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


@pytest.fixture
def drawing():
    """For tests that look at the files of pictures; the others do not draw, which takes half of a tiny run's time."""


@pytest.fixture(autouse=True)
def _few_pictures(monkeypatch, request):
    monkeypatch.setattr("flowgym_gym.agents.training.PICTURES", 2)
    if "drawing" not in request.fixturenames:
        for name in ("picture_grid", "learning_curve"):
            monkeypatch.setattr(f"flowgym_gym.agents.training.{name}", lambda *args: None)
