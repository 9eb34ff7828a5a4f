"""Runs that RLlib trains: one folder, whatever trained it."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

pytest.importorskip("ray.rllib", reason="RLlib is in the extra rllib; run .ci/run rllib")
pytestmark = [pytest.mark.second, pytest.mark.usefixtures("_ray")]

from flowgym_gym.agents import Runners, evaluate, export, load_agent, load_policy, train
from flowgym_gym.agents.rllib.engine import RLlib
from flowgym_gym.agents.rllib.policies import as_policy
from flowgym_gym.agents.runs.checkpoints import checkpoints
from flowgym_gym.agents.runs.config import read_config
from flowgym_gym.agents.runs.environments import make_vector_env
from flowgym_gym.agents.runs.metrics import read_metrics
from flowgym_gym.agents.runs.preparation import TrainRequest, prepare
from flowgym_gym.agents.runs.progress import Statistics
from flowgym_gym.agents.sb3.algorithms import make_algorithm
from flowgym_gym.agents.sb3.vec_env import SB3VecEnv
from flowgym_gym.errors import OptionError

MIXTURE = "flowgym/GaussianMixture-Gaussian-v0"
ENV = {"env.discretization_steps": 4, "policy.width": 8}
OFTEN = {"checkpoint_every": 64, "evaluate_every": 64, "evaluation_episodes": 4}
CHANGES = {
    "ppo": {**ENV, **OFTEN, "algo.n_steps": 8, "algo.batch_size": 32, "algo.n_epochs": 2},
    "sac": {**ENV, **OFTEN, "algo.learning_starts": 16, "algo.batch_size": 16},
}


def run_of(out, algo="ppo", timesteps=128, **kwargs):
    return train(
        MIXTURE,
        algo,
        out=out,
        timesteps=timesteps,
        num_envs=8,
        overrides=None if kwargs.get("resume") else CHANGES[algo],
        progress=False,
        engine="rllib",
        **kwargs,
    )


@pytest.fixture(scope="module")
def whole(_ray, tmp_path_factory):
    """A finished run of each algorithm."""
    folder = tmp_path_factory.mktemp("whole")
    return {algo: run_of(folder / algo, algo) for algo in CHANGES}


@pytest.fixture
def run(whole, tmp_path, request):
    return shutil.copytree(whole[request.param], tmp_path / "run")


@pytest.mark.parametrize("run", CHANGES, indirect=True)
def test_a_run_of_rllib_has_all_that_a_run_has(run, tmp_path):
    rows = read_metrics(run / "metrics.csv")
    done = [row["timesteps"] for row in rows]
    assert done == sorted(set(done))
    assert done[-1] >= 128
    # Of four steps each; those that are still running have not ended.
    assert done[-1] / 4 - 16 <= rows[-1]["episodes"] <= done[-1] / 4
    ended = [row for row in rows if row["return"] is not None]
    # The environment pays thirty times the reward.
    for row in ended:
        assert row["return"] == pytest.approx(30 * row["terminal_reward"] - row["control_cost"])
        assert row["control_cost"] > 0
    assert next(row["timesteps"] for row in read_metrics(run / "evaluations.csv")) == 0
    assert evaluate(run, episodes=4)["agent"]["return"]["mean"] < 100
    assert load_agent(run, "newest").num_timesteps == done[-1]
    policy = load_policy(export(run, tmp_path / "policy"))
    observation = {"latent": np.zeros(1, "f4"), "time": np.zeros(1, "f4")}
    assert policy.predict(observation, deterministic=True)[0].shape == (1,)
    for name in ("before.png", "after.png", "learning_curve.png", "comparison.png", "config.json"):
        assert (run / name).is_file()


@pytest.mark.parametrize("algo", CHANGES)
def test_the_agent_of_the_run_acts_as_that_of_rllib(algo, tmp_path):
    request = TrainRequest(
        MIXTURE, algo, out=tmp_path, num_envs=8, overrides=CHANGES[algo], engine="rllib"
    )
    config = prepare(request).config
    env = SB3VecEnv(make_vector_env(MIXTURE, config.settings, 8))
    model = make_algorithm(algo, env, config.settings, 0, buffer_size=8)
    engine, other = (RLlib(config, model, Statistics(8), Runners()) for _ in range(2))
    observation = {
        "latent": np.linspace(-2, 2, 8, dtype="f4")[:, None],
        "time": np.full((8, 1), 0.5, "f4"),
    }
    before = model.predict(observation, deterministic=True)[0]
    for _ in range(2):
        engine.learn(64, 0.0)
    after = model.predict(observation, deterministic=True)[0]
    assert not np.array_equal(before, after)
    theirs = as_policy(engine._algorithm).predict(observation, deterministic=True)[0]
    np.testing.assert_allclose(after, theirs, atol=1e-6)
    # What a checkpoint keeps, networks and optimisers, comes back bit by bit.
    other.restore(engine.state())
    one, two = (e._algorithm.get_state()["learner_group"]["learner"] for e in (engine, other))
    for part in ("rl_module", "optimizer"):
        assert flat(one[part]) == flat(two[part])
    engine.close()
    other.close()


def flat(state):
    if isinstance(state, dict):
        return {name: flat(value) for name, value in state.items()}
    if isinstance(state, torch.Tensor | np.ndarray):
        return np.asarray(state).tobytes()
    return [flat(value) for value in state] if isinstance(state, list | tuple) else state


@pytest.mark.parametrize("run", CHANGES, indirect=True)
def test_a_run_goes_on_longer_from_its_last_checkpoint(run):
    before = read_metrics(run / "metrics.csv")
    assert run_of(run, run_algo(run), timesteps=192, resume=True).timesteps >= 192
    rows = read_metrics(run / "metrics.csv")
    assert rows[: len(before)] == before
    assert [row["timesteps"] for row in rows] == sorted({row["timesteps"] for row in rows})


def run_algo(run):
    return read_config(run).algo


@pytest.mark.parametrize("run", ["ppo"], indirect=True)
def test_a_damaged_state_gives_way_to_the_checkpoint_before(run, capsys):
    newest = checkpoints(run)[0]
    text = (newest / "state.json").read_text()
    (newest / "state.json").write_text(text.replace('"learner_group"', '"learner_troupe"'))
    run_of(run, resume=True)
    assert f"going on from {checkpoints(run)[1]} instead" in capsys.readouterr().err


@pytest.mark.parametrize("run", ["ppo"], indirect=True)
def test_a_run_of_rllib_holds_nothing_that_can_be_executed(run):
    with np.load(checkpoints(run)[0] / "state.npz", allow_pickle=False) as state:
        assert sum(name.startswith("progress.rllib.") for name in state.files) > 10
        assert all(state[name].dtype.kind in "biufSU" for name in state.files)
    assert not [path for path in run.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt")]


def test_a_driver_that_is_killed_goes_on_and_nothing_is_doubled(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "flowgym_gym", "train", MIXTURE, "--engine", "rllib"]
    command += ["--out", str(out), "--num-envs", "8", "--timesteps", "100000", "--no-evaluate"]
    command += [f"--set={name}={value}" for name, value in CHANGES["ppo"].items()]
    environ = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen(command, env=environ, start_new_session=True)
    try:
        for _ in itertools.repeat(None, 600):
            if (out / "checkpoints").is_dir() and len(checkpoints(out)) == 3:
                break
            time.sleep(0.5)
            assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    saved = int(checkpoints(out)[0].name)
    shutil.rmtree(out / "before.png", ignore_errors=True)
    resumed = [
        *command[:5],
        "--out",
        str(out),
        "--resume",
        "--timesteps",
        str(saved + 128),
        "--no-evaluate",
    ]
    subprocess.run(resumed, env=environ, check=True, timeout=500)
    done = [row["timesteps"] for row in read_metrics(out / "metrics.csv")]
    assert done == list(range(64, saved + 129, 64))


def test_callbacks_of_another_library_are_refused(tmp_path):
    with pytest.raises(OptionError, match="callbacks are stable-baselines3's"):
        run_of(tmp_path / "run", callbacks=lambda *args: True)
    assert not (tmp_path / "run").exists()


def test_an_unreachable_cluster_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(OptionError, match=r"Ray cannot be reached at 127\.0"):
        run_of(tmp_path / "run", runners=Runners(1, 0.0, "127.0.0.1:1"))
