import csv
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from stable_baselines3 import PPO, SAC

from flowgym_gym import BaseModel
from flowgym_gym.agents import evaluate, export, load_agent, load_policy, train
from flowgym_gym.agents.runs import results, training
from flowgym_gym.agents.runs.checkpoints import checkpoints
from flowgym_gym.agents.runs.metrics import Metrics, read_metrics
from flowgym_gym.agents.runs.results import save_curve
from flowgym_gym.errors import (
    CheckpointError,
    DivergedError,
    FlowGymError,
    OptionError,
    UnknownIdError,
    UnknownOptionError,
)
from flowgym_gym.models.gaussian_mixture import GaussianMixtureBaseModel
from tests.agents.conftest import TINY, assignments, finished, resume, same_weights, tiny, untimed
from tests.conftest import RED

ALGORITHMS = {"ppo": PPO, "sac": SAC}


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_run_writes_everything_and_evaluates(algo, tmp_path):
    out = tmp_path / "deep" / "run"
    result = tiny(out, algo)
    assert (result.timesteps, result.target, result.signal) == (16, 16, None)

    config = json.loads((out / "config.json").read_text())
    assert config["env_id"] == RED
    assert config["algo"] == algo
    assert config["seed"] == 0
    assert config["settings"]["env"]["discretization_steps"] == 2
    assert config["settings"]["wrappers"] == {"coarse_action": 1}
    assert config["settings"]["num_envs"] == 2
    assert {"torch", "stable_baselines3", "python"} <= set(config["versions"])
    assert config["base_model"]["control_cost"] == 0

    for name in ("before.png", "after.png", "comparison.png", "learning_curve.png", "episode.gif"):
        with Image.open(out / name) as picture:
            assert picture.width > 100

    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["timesteps"]) for row in rows] == ([8, 16] if algo == "ppo" else [4, 8, 12, 16])
    assert int(rows[-1]["episodes"]) == 8
    assert all(0 <= float(row["terminal_reward"]) <= 1 for row in rows)
    assert all(float(row["control_cost"]) > 0 for row in rows)
    for row in rows:
        weight = config["settings"]["env"].get("control_cost_weight", 1.0)
        paid = 100 * float(row["terminal_reward"]) - weight * float(row["control_cost"])
        assert float(row["return"]) == pytest.approx(paid, rel=1e-4)

    newest = checkpoints(out)[0]
    assert newest.name == "000000016"
    files = {"model.zip", "state.json", "state.npz"} | (
        {"replay_buffer.npz"} if algo == "sac" else set()
    )
    assert {path.name for path in newest.iterdir()} == files
    # Nothing that was written under a temporary name is left.
    assert not [
        path for path in out.rglob("*") if "tmp" in path.name or path.name.startswith("writing")
    ]
    assert ALGORITHMS[algo].load(newest / "model.zip", device="cpu").num_timesteps == 16

    report = evaluate(result, episodes=3)
    assert json.loads((out / "evaluation.json").read_text()) == report
    assert report["timesteps"] == 16
    assert report["base"]["control_cost"]["mean"] == 0
    assert report["agent"]["control_cost"]["mean"] > 0


@pytest.fixture
def terminate_at(monkeypatch):
    """Send the process SIGTERM as soon as a run has done this many timesteps."""

    def install(timesteps):
        def append(self, row, append=Metrics.append):
            append(self, row)
            if row["timesteps"] == timesteps:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(Metrics, "append", append)

    return install


@pytest.mark.parametrize(
    ("algo", "changes"),
    [
        ("ppo", {"env.prompts": ["a photo of a cat", "a red heart"], "final_learning_rate": 0}),
        # Stops within an episode.
        ("ppo", {"env.discretization_steps": 3}),
        # Random actions of the warm-up come after the first checkpoint too.
        ("sac", {"env.prompts": ["a photo of a cat", "a red heart"], "algo.learning_starts": 12}),
        pytest.param("tqc", {"policy.n_quantiles": 5}, marks=pytest.mark.second),
    ],
)
def test_a_terminated_and_resumed_run_is_bit_equal_to_an_uninterrupted_one(
    algo, changes, tmp_path, terminate_at
):
    tiny(tmp_path / "whole", algo, 24, changes, seed=3)
    terminate_at(8)
    first = tiny(tmp_path / "parts", algo, 24, changes, seed=3)
    assert (first.timesteps, first.signal) == (8, signal.SIGTERM)
    torch.manual_seed(99)
    np.random.seed(99)
    terminate_at(16)
    assert resume(tmp_path / "parts", algo).timesteps == 16
    terminate_at(None)
    assert resume(tmp_path / "parts", algo).timesteps == 24
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_runs_with_the_same_seed_are_equal_and_others_are_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tiny(tmp_path / name, timesteps=8, seed=seed)
    rows = {name: untimed(tmp_path / name) for name in "abc"}
    assert rows["a"] == rows["b"] != rows["c"]


def test_rows_after_the_checkpoint_are_not_doubled(tmp_path):
    finished(tmp_path, timesteps=16)
    newest, older = checkpoints(tmp_path)[:2]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    resume(tmp_path, timesteps=24)
    assert older.name == "000000008"
    assert [row["timesteps"] for row in read_metrics(tmp_path / "metrics.csv")] == [8, 16, 24]


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    finished(tmp_path, timesteps=16)
    (checkpoints(tmp_path)[0] / "model.zip").write_bytes(b"PK\x03\x04 half")
    assert resume(tmp_path, timesteps=16).timesteps == 16
    assert "000000016 cannot be read" in capsys.readouterr().err
    assert evaluate(tmp_path, episodes=2)["timesteps"] == 16
    (checkpoints(tmp_path)[0] / "model.zip").write_bytes(b"")
    assert evaluate(tmp_path, episodes=2)["timesteps"] == 8
    said = capsys.readouterr().err
    assert "000000016 cannot be read" in said
    assert f"taking {checkpoints(tmp_path)[1]} instead" in said


@pytest.mark.parametrize(
    ("damaged", "left", "message"),
    [
        (["model.zip"], 20, "going on with the replay buffer of"),
        (
            ["model.zip", "replay_buffer.npz"],
            12,
            "is missing or damaged; going on with an empty one",
        ),
        (["replay_buffer.npz"], 4, "is missing or damaged; going on with an empty one"),
    ],
)
def test_a_run_whose_replay_buffer_is_lost_goes_on_with_what_is_left(
    damaged, left, message, tmp_path, capsys
):
    finished(tmp_path, "sac", timesteps=16)
    for file in damaged:
        (checkpoints(tmp_path)[0] / file).write_bytes(b"half")
    capsys.readouterr()
    done = 8 if "model.zip" in damaged else 16
    assert resume(tmp_path, "sac", timesteps=20).timesteps == 20
    said = capsys.readouterr().err
    assert message in said
    assert f"resuming at {done} timesteps" in said
    assert "pickle" not in said
    with np.load(checkpoints(tmp_path)[0] / "replay_buffer.npz") as buffer:
        # A full buffer, or what came after the checkpoint.
        assert buffer["rewards"].size == left
    assert [row["timesteps"] for row in read_metrics(tmp_path / "metrics.csv")] == [
        4,
        8,
        12,
        16,
        20,
    ]


def test_resuming_a_finished_run_ends_at_once(tmp_path):
    finished(tmp_path, timesteps=8)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert resume(tmp_path).timesteps == 8
    assert read_metrics(tmp_path / "metrics.csv") == rows


def test_only_a_few_checkpoints_are_kept_and_one_replay_buffer(tmp_path):
    tiny(tmp_path, "sac", timesteps=40)
    assert [path.name for path in checkpoints(tmp_path)] == ["000000040", "000000032", "000000024"]
    assert len(list(tmp_path.rglob("replay_buffer.npz"))) == 1


def test_ppo_timesteps_are_rounded_up_to_whole_rollouts_and_it_says_so(tmp_path, capsys):
    assert tiny(tmp_path, timesteps=9).timesteps == 16
    assert "9 timesteps are rounded up to 16, whole rollouts of 8" in capsys.readouterr().err


def test_a_batch_that_does_not_divide_the_rollout_is_said_in_a_line(tmp_path, capsys, recwarn):
    tiny(tmp_path / "whole")
    assert "batch" not in capsys.readouterr().err
    tiny(tmp_path / "part", overrides={"algo.batch_size": 6})
    assert (
        "batch_size is 6, and the last batch of each pass over a rollout of 8 is smaller"
        in capsys.readouterr().err
    )
    assert not [warning for warning in recwarn if "mini-batch" in str(warning.message)]


def test_the_learning_rate_goes_linearly_to_its_final_value(tmp_path):
    changes = {"algo.learning_rate": 1e-3, "final_learning_rate": 2e-4}
    tiny(tmp_path, timesteps=32, overrides=changes)
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "metrics.csv")]
    assert rates == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4])


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"env_id": "flowgym/Nothing-v0"}, UnknownIdError, "no environment"),
        ({"algo": "pp0"}, OptionError, "algo is 'pp0'"),
        ({"timesteps": 0}, OptionError, "timesteps is 0"),
        ({"num_envs": 0}, OptionError, "num_envs is 0"),
        ({"seed": -1}, OptionError, "seed is -1"),
        ({"overrides": {"env.noise_levl": 1}}, UnknownOptionError, "did you mean"),
        ({"overrides": {"policy.depth": 1}}, UnknownOptionError, "no setting"),
        ({"overrides": {"env.device": object()}}, OptionError, "no plain value"),
        ({"out": "full"}, OptionError, "is not empty"),
        ({"out": "file"}, OptionError, "is a file"),
        ({"resume": True}, OptionError, "holds no run"),
    ],
)
def test_bad_input_is_refused_before_any_work(kwargs, error, message, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "make_vector_env", lambda *a, **k: pytest.fail("work began"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    (tmp_path / "file").touch()
    kwargs = {"env_id": RED, **kwargs, "out": tmp_path / kwargs.get("out", "new")}
    with pytest.raises(error, match=message):
        train(**kwargs)
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_an_unwritable_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OptionError, match="cannot be written"):
        train(RED, out=tmp_path / "a" / "run")


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="cannot be written"):
        train(RED, out=tmp_path / "file" / "run")


def test_bad_environment_options_leave_no_folder(tmp_path):
    with pytest.raises(FlowGymError, match="noise_level"):
        tiny(tmp_path / "run", overrides={"env.noise_level": 7})
    with pytest.raises(FlowGymError, match="does not accept"):
        tiny(tmp_path / "run", overrides={"algo.clip_range_vf": -1.0})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_a_training_that_diverges_says_so_and_keeps_the_agent_from_before(algo, tmp_path):
    changes = {"algo.learning_rate": 1e30, "evaluate_every": 16}
    with pytest.raises(
        DivergedError, match=r"learning rate was 1e\+30, .* keeps the agent of 0 timesteps"
    ):
        tiny(tmp_path / algo, algo, timesteps=64, overrides=changes)
    assert all(
        parameter.isfinite().all() for parameter in load_agent(tmp_path / algo).policy.parameters()
    )


def test_an_agent_that_diverges_in_its_last_update_is_not_saved(tmp_path, monkeypatch):
    def diverge(self):
        for parameter in self.policy.parameters():
            parameter.data.fill_(math.nan)

    monkeypatch.setattr(PPO, "train", diverge)
    with pytest.raises(DivergedError, match="keeps the agent of 0 timesteps"):
        tiny(tmp_path, timesteps=8)
    assert [checkpoint.name for checkpoint in checkpoints(tmp_path)] == ["000000000"]


def test_more_timesteps_bring_the_learning_rate_back_and_say_so(tmp_path, capsys):
    changes = {"algo.learning_rate": 0.003, "final_learning_rate": 0.001}
    tiny(tmp_path, timesteps=16, overrides=changes)
    assert "learning rate" not in capsys.readouterr().err
    resume(tmp_path, timesteps=32)
    said = (
        "the learning rate goes to 0.001 at 32 timesteps instead of 16: it is 0.002 now, not 0.001"
    )
    assert said in capsys.readouterr().err
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "metrics.csv")]
    assert rates == pytest.approx([0.003, 0.002, 0.002, 0.0015])


def test_fewer_timesteps_change_the_learning_rate_and_say_so(tmp_path, capsys, terminate_at):
    terminate_at(8)
    tiny(
        tmp_path,
        timesteps=64,
        overrides={"algo.learning_rate": 0.003, "final_learning_rate": 0.001},
    )
    capsys.readouterr()
    resume(tmp_path, timesteps=16)
    said = (
        "the learning rate goes to 0.001 at 16 timesteps instead of 64: it is 0.002 now, not "
        "0.00275"
    )
    assert said in capsys.readouterr().err


def test_a_run_too_short_to_learn_says_so(tmp_path, capsys):
    tiny(tmp_path / "short", "sac", timesteps=4)
    assert "timesteps is 4, but SAC learns nothing in its first 4" in capsys.readouterr().err
    tiny(tmp_path / "long", "sac", timesteps=8)
    assert "learns nothing" not in capsys.readouterr().err


def test_a_resumed_run_needs_no_algorithm(tmp_path):
    finished(tmp_path, "sac", timesteps=8)
    assert train(RED, out=tmp_path, resume=True, timesteps=16, progress=False).timesteps == 16
    with pytest.raises(OptionError, match=r"algo is 'ppo', but the run in .* has 'sac'"):
        resume(tmp_path, "ppo")


def test_a_curves_base_model_is_that_of_its_evaluations(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(results, "learning_curve", lambda *args: drawn.append(args[3]))
    tiny(tmp_path, timesteps=8, overrides={"evaluate_every": 8, "evaluation_episodes": 3})
    first = read_metrics(tmp_path / "evaluations.csv")[0]
    assert drawn[-1]["episodes"] == 3
    assert drawn[-1]["return"] == first["return"]
    report = evaluate(tmp_path, episodes=4)
    save_curve(tmp_path)
    assert (drawn[-1]["episodes"], drawn[-1]["return"]) == (4, report["base"]["return"]["mean"])


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_a_model_of_vectors_trains_with_the_preset_of_any_environment(algo, tmp_path):
    changes = {"env.base_model": "2d/gaussian_mixture", "env.reward": "2d/gaussian"}
    env = {name: value for name, value in TINY[algo].items() if name != "env.discretization_steps"}
    kwargs = {
        "num_envs": 2,
        "overrides": {**env, **changes, "env.discretization_steps": 2},
        "progress": False,
    }
    train("Denoising-v0", algo, out=tmp_path, timesteps=8, **kwargs)
    assert load_agent(tmp_path).action_space.shape == (2,)


def test_what_train_returns_stands_for_its_folder(tmp_path):
    result = tiny(tmp_path / "run", timesteps=8)
    assert load_agent(result).num_timesteps == 8
    assert load_policy(export(result, tmp_path / "policy")).description["timesteps"] == 8
    assert evaluate(result, episodes=2) == evaluate(tmp_path / "run", episodes=2)


def test_a_resumed_run_keeps_its_settings(tmp_path):
    finished(tmp_path, timesteps=8)
    for change in ({"num_envs": 3}, {"seed": 1}, {"overrides": {"algo.gamma": 0.5}}):
        with pytest.raises(OptionError, match=r"resumes with that|cannot change"):
            resume(tmp_path, **change)
    with pytest.raises(
        OptionError, match=r"^algo.gamma is 0.5, but the run has 1.0: settings cannot change"
    ):
        resume(tmp_path, overrides={"algo.gamma": 0.5, "policy.width": TINY["ppo"]["policy.width"]})
    with pytest.raises(OptionError, match="algo is 'sac'"):
        resume(tmp_path, "sac")
    with pytest.raises(OptionError, match="not empty; resume it"):
        tiny(tmp_path)
    resume(tmp_path, timesteps=16)
    with pytest.raises(OptionError, match="has already done 16"):
        resume(tmp_path, timesteps=8)
    for checkpoint in checkpoints(tmp_path):
        checkpoint.rename(tmp_path / checkpoint.name)
    with pytest.raises(OptionError, match="no checkpoint"):
        resume(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        resume(tmp_path)


@pytest.mark.usefixtures("drawing")
def test_a_signal_after_the_training_is_not_swallowed(tmp_path, monkeypatch):
    def interrupt(*args):
        signal.raise_signal(signal.SIGINT)

    # A shell starts background jobs with SIGINT ignored.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(results, "_save_film", interrupt)
            with pytest.raises(KeyboardInterrupt):
                tiny(tmp_path)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert resume(tmp_path).timesteps == 16


@pytest.mark.usefixtures("drawing")
def test_damaged_evaluations_and_pictures_that_cannot_be_written_are_said(tmp_path):
    tiny(tmp_path, timesteps=8)
    (tmp_path / "evaluation.json").write_text('{"base":')
    with pytest.raises(CheckpointError, match=r"evaluation\.json is damaged"):
        save_curve(tmp_path)
    (tmp_path / "evaluation.json").unlink()
    (tmp_path / "learning_curve.png").unlink(missing_ok=True)
    (tmp_path / "learning_curve.png").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_curve(tmp_path)


@pytest.mark.second
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_terminated_process_leaves_a_run_that_can_be_resumed(tmp_path):
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "flowgym_gym",
        "train",
        RED,
        "--out",
        str(out),
        "--num-envs",
        "2",
    ]
    process = subprocess.Popen(
        [*command, "--timesteps", "1000000", *assignments()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while process.poll() is None and len(read_metrics(out / "metrics.csv")) < 2:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, errors
    assert f"--out {out} --resume" in printed
    assert "Traceback" not in errors
    assert (out / "learning_curve.png").is_file()
    done = int(checkpoints(out)[0].name)
    rows = read_metrics(out / "metrics.csv")
    assert rows[-1]["timesteps"] == done
    result = resume(out, timesteps=done + 8)
    assert result.timesteps == done + 8
    assert [row["timesteps"] for row in read_metrics(out / "metrics.csv")] == list(
        range(8, done + 9, 8)
    )


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_samples_that_are_no_pictures_train_without_pictures(algo, tmp_path, monkeypatch):
    monkeypatch.setattr(GaussianMixtureBaseModel, "picture", BaseModel.picture)
    changes = {key: value for key, value in TINY[algo].items() if key != "algo.n_steps"}
    train(
        "GaussianMixture-Gaussian2D-v0",
        algo,
        out=tmp_path,
        timesteps=40,
        num_envs=2,
        overrides=changes,
        progress=False,
    )
    assert (tmp_path / "learning_curve.png").is_file()
    assert not (tmp_path / "before.png").exists()
    assert not (tmp_path / "episode.gif").exists()
    assert evaluate(tmp_path, episodes=3)["timesteps"] == 40


def test_the_untrained_agent_is_the_base_model(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_learn", lambda *a: None)
    tiny(tmp_path)
    report = evaluate(tmp_path, episodes=2)
    assert report["timesteps"] == 0
    assert report["agent"] == report["base"]
