"""Settings so small that a run takes seconds."""

import contextlib
import functools
import io
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from flowgym_gym.agents import load_agent, train
from flowgym_gym.agents.runs import results
from flowgym_gym.agents.runs.metrics import read_metrics
from flowgym_gym.models import clear_model_cache
from flowgym_gym.models.stable_diffusion import StableDiffusionBaseModel
from tests.conftest import RED
from tests.models.tiny import folder

TINY = {
    "ppo": {
        "env.discretization_steps": 2,
        "policy.width": 8,
        "algo.n_steps": 4,
        "algo.batch_size": 8,
        "algo.n_epochs": 2,
        "checkpoint_every": 8,
        "evaluate_every": None,
        # So that longer runs begin as shorter ones.
        "final_learning_rate": None,
    },
    "sac": {
        "env.discretization_steps": 2,
        "policy.width": 8,
        "algo.learning_starts": 4,
        "algo.batch_size": 8,
        "algo.gradient_steps": 2,
        "checkpoint_every": 8,
        "evaluate_every": None,
        # So that longer runs begin as shorter ones.
        "final_learning_rate": None,
    },
}
TINY["tqc"] = TINY["sac"]
# All algorithms; those of a further engine in the second lane.
ENGINES = ["ppo", "sac", pytest.param("tqc", marks=pytest.mark.second)]
# Columns that hold wall-clock time.
TIMED = {"seconds", "steps_per_second"}


def tiny(out, algo="ppo", timesteps=16, overrides=(), **kwargs):
    """Train for a moment."""
    changes = {**TINY[algo], **dict(overrides)}
    return train(
        RED,
        algo,
        out=out,
        timesteps=timesteps,
        num_envs=2,
        overrides=changes,
        progress=False,
        **kwargs,
    )


FINISHED = tempfile.TemporaryDirectory(prefix="finished-runs-")


@functools.cache
def _trained(algo, timesteps):
    out = Path(FINISHED.name) / f"{algo}-{timesteps}"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        draw_little(patch)
        tiny(out, algo, timesteps)
    return out


def finished(out, algo="ppo", timesteps=8):
    """The run of ``tiny``, copied: all tests of a process that begin with a finished run share one
    of each kind.
    """
    shutil.copytree(_trained(algo, timesteps), out, dirs_exist_ok=True)
    return out


def assignments(algo="ppo", changes=()):
    """The same settings for the command line."""
    return [
        f"--set={key}={json.dumps(value)}" for key, value in {**TINY[algo], **dict(changes)}.items()
    ]


def resume(out, algo="ppo", **kwargs):
    return train(RED, algo, out=out, resume=True, progress=False, **kwargs)


def untimed(out):
    """The learning curve of a run, without wall-clock times."""
    return [
        {k: v for k, v in row.items() if k not in TIMED}
        for row in read_metrics(out / "metrics.csv")
    ]


def same_weights(first, second, which="newest"):
    states = [load_agent(out, which).policy.state_dict() for out in (first, second)]
    return all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.fixture
def drawing():
    """For tests that look at the files of pictures; the others do not draw, which takes half of a
    tiny run's time.
    """


def draw_little(monkeypatch, drawing=False):
    monkeypatch.setattr(results, "PICTURES", 2)
    if not drawing:
        for name in ("picture_grid", "learning_curve", "_save_film"):
            monkeypatch.setattr(results, name, lambda *args: None)


def forbid_training(monkeypatch):
    """Fail as soon as an agent would take its first step."""
    for algorithm in (OnPolicyAlgorithm, OffPolicyAlgorithm):
        monkeypatch.setattr(
            algorithm, "collect_rollouts", lambda *args, **kwargs: pytest.fail("work began")
        )


@pytest.fixture(autouse=True)
def _few_pictures(monkeypatch, request):
    draw_little(monkeypatch, "drawing" in request.fixturenames)


@pytest.fixture(scope="package", autouse=True)
def _small_network(request):
    """What the ids of Stable Diffusion open here is a checkpoint of a few thousand weights: what is
    done with a run does not depend on what its network draws.

    Other processes open the embedded one; where tests start some, all take that.
    """
    if any(item.get_closest_marker("second") for item in request.session.items):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            StableDiffusionBaseModel, "default_checkpoint", folder("like_the_embedded_one")
        )
        clear_model_cache()
        yield
    clear_model_cache()
