"""A training that fails in the middle of an interval keeps all that was done before that interval."""

import signal
import sys

import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from flowgym_gym.agents.runs import results
from flowgym_gym.agents.runs.checkpoints import checkpoints
from flowgym_gym.agents.runs.metrics import Metrics, read_metrics
from flowgym_gym.cli import main
from flowgym_gym.errors import RewardError
from flowgym_gym.models.stable_diffusion import StableDiffusionBaseModel
from flowgym_gym.rewards.images import RedReward
from tests.agents.conftest import assignments, resume, same_weights, tiny, untimed
from tests.conftest import PROMPTS, RED, further

# Checkpoints so rare that everything would be lost without one upon the failure.
RARE = {"checkpoint_every": 1000, "env.prompts": PROMPTS}
STANDARDIZED = {"env.reward": "images/standardize", "env.reward_kwargs": {"reward": "images/red"}}


@pytest.fixture
def fail_at(monkeypatch):
    """Let the reward raise once, when it is called for the n-th time."""

    def install(call, error):
        calls = iter(range(1, 1000))

        def forward(self, x, forward=RedReward.forward, **kwargs):
            if next(calls) == call:
                raise error
            return forward(self, x, **kwargs)

        monkeypatch.setattr(RedReward, "forward", forward)

    return install


def same_checkpoint(first, second):
    """Whether the newest checkpoints of two runs hold the same bits, wall-clock time aside."""
    for name in ("state.npz", "replay_buffer.npz"):
        files = [checkpoints(out)[0] / name for out in (first, second)]
        assert files[0].exists() == files[1].exists()
        if files[0].exists():
            with np.load(files[0]) as one, np.load(files[1]) as other:
                assert one.files == other.files
                for key in one.files:
                    np.testing.assert_array_equal(one[key], other[key])
    return same_weights(first, second, "newest")


@pytest.mark.parametrize(
    ("algo", "changes", "call"),
    [
        # Calls 1 and 2 are pictures of the base model; two episodes end together every four
        # timesteps.
        ("ppo", {"evaluate_every": 8, "evaluation_episodes": 2}, 9),
        *further(("ppo", {}, 8), ("sac", {}, 7), ("tqc", {}, 7)),
        # The interval that fails has already scored samples, which its reward remembers.
        *further(("ppo", STANDARDIZED, 9)),
        # The buffer is full, and the interval that fails has begun to write over what it held.
        ("sac", {"algo.buffer_size": 10, "env.discretization_steps": 4}, 7),
        *further(("sac", {"algo.buffer_size": 2}, 7)),
    ],
)
def test_a_run_whose_reward_raised_once_goes_on_as_one_whose_reward_never_did(
    algo, changes, call, tmp_path, fail_at, capsys
):
    changes = {**RARE, **changes}
    tiny(tmp_path / "whole", algo, 48, changes, seed=3)
    fail_at(call, ValueError("the server is away"))
    with pytest.raises(RewardError, match="the server is away"):
        tiny(tmp_path / "parts", algo, 48, changes, seed=3)
    done = int(checkpoints(tmp_path / "parts")[0].name)
    assert 0 < done < 48
    said = f"RewardError in training; saved in {tmp_path / 'parts'} up to {done} timesteps"
    assert said in capsys.readouterr().err
    assert resume(tmp_path / "parts", algo).timesteps == 48
    assert f"resuming at {done} timesteps" in capsys.readouterr().err
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")
    assert read_metrics(tmp_path / "parts" / "evaluations.csv") == read_metrics(
        tmp_path / "whole" / "evaluations.csv"
    )
    assert same_checkpoint(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), *further(MemoryError("too much"), RuntimeError("CUDA error"))]
)
def test_whatever_stops_an_interval_the_run_is_saved_and_the_error_is_the_same(
    error, tmp_path, monkeypatch
):
    tiny(tmp_path / "whole", "ppo", 24, RARE)
    train_, calls = PPO.train, iter(range(10))

    def fail(self):
        train_(self)
        if next(calls) == 1:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(PPO, "train", fail)
        with pytest.raises(type(error)) as caught:
            tiny(tmp_path / "parts", "ppo", 24, RARE)
    assert caught.value is error
    assert [path.name for path in checkpoints(tmp_path / "parts")] == ["000000008", "000000000"]
    resume(tmp_path / "parts")
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")
    assert same_checkpoint(tmp_path / "parts", tmp_path / "whole")


def command(out):
    return [
        "train", RED, "--timesteps", "48", "--num-envs", "2", "--out", str(out),
        *assignments(changes={"checkpoint_every": 1000}),
    ]  # fmt: skip


def test_the_command_line_shows_the_error_and_the_command_to_go_on_with(tmp_path, fail_at, capsys):
    fail_at(7, ValueError("the server is away"))
    assert main(command(tmp_path / "run")) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith(
        "error: RedReward raised ValueError: the server is away"
    )
    again = f"flowgym-gym train {RED} --algo ppo --out {tmp_path / 'run'} --resume"
    assert said.out.splitlines()[-1] == f"to go on: {again}"
    assert main([*again.split()[1:], "--no-evaluate"]) == 0


def test_an_error_is_told_on_a_line_of_its_own_below_the_bar(
    tmp_path, fail_at, monkeypatch, capsys
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fail_at(7, ValueError("the server is away"))
    assert main(command(tmp_path / "run")) == 2
    said = capsys.readouterr().err.split("\n")
    assert f"RewardError in training; saved in {tmp_path / 'run'} up to 16 timesteps" in [
        line.partition(":")[0] for line in said
    ]


def test_a_second_interrupt_stops_at_once_and_loses_only_the_interval(
    tmp_path, monkeypatch, capsys
):
    collect, calls = OnPolicyAlgorithm.collect_rollouts, iter(range(10))

    def interrupted(self, *args, **kwargs):
        if next(calls) == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return collect(self, *args, **kwargs)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(OnPolicyAlgorithm, "collect_rollouts", interrupted)
        assert main(command(tmp_path)) == 130
    finally:
        signal.signal(signal.SIGINT, previous)
    assert checkpoints(tmp_path)[0].name == "000000008"
    assert "--resume" in capsys.readouterr().out


def test_a_failure_before_the_first_interval_is_not_taken_for_work(tmp_path, fail_at, capsys):
    fail_at(1, ValueError("away"))
    assert main(command(tmp_path / "run")) == 2
    assert "to go on" not in capsys.readouterr().out
    assert resume(tmp_path / "run").timesteps == 48


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize(
    ("handler", "signals"), [(signal.SIG_DFL, [signal.SIGHUP]), (signal.SIG_IGN, [])]
)
def test_a_closed_terminal_ends_a_run_as_sigterm_does_unless_it_is_ignored(
    handler, signals, tmp_path, monkeypatch
):
    def append(self, row, append=Metrics.append):
        append(self, row)
        if row["timesteps"] == 8:
            signal.raise_signal(signal.SIGHUP)

    monkeypatch.setattr(Metrics, "append", append)
    previous = signal.signal(signal.SIGHUP, handler)
    try:
        result = tiny(tmp_path, timesteps=16)
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert [result.signal] == (signals or [None])
    assert result.timesteps == (8 if signals else 16)


def test_a_failure_of_the_pictures_after_a_training_loses_nothing(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(results, "_save_film", lambda *args: 1 / 0)
        assert main([*command(tmp_path / "run"), "--timesteps", "16"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        f"error: the run in {tmp_path / 'run'} is saved up to 16 timesteps, but its pictures "
        "cannot be made: ZeroDivisionError: division by zero; remove the cause, then --resume "
        "draws them"
    )
    assert checkpoints(tmp_path / "run")[0].name == "000000016"
    assert resume(tmp_path / "run").timesteps == 16


def test_a_reward_that_fails_in_the_pictures_after_a_training_is_still_a_reward_error(
    tmp_path, fail_at, monkeypatch
):
    # Two for the pictures before, and two for each of four intervals.
    fail_at(6, ValueError("away"))
    with pytest.raises(
        RewardError, match=r"is saved up to 16 timesteps, but its pictures .*: RedReward raised"
    ):
        tiny(tmp_path / "run", timesteps=16)
    assert checkpoints(tmp_path / "run")[0].name == "000000016"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(111, "Connection refused"),
        FileNotFoundError(2, "No such file", "/elsewhere"),
    ],
)
def test_what_a_model_cannot_reach_is_not_taken_for_a_full_disk(error, tmp_path, monkeypatch):
    calls = iter(range(1000))

    def forward(self, x, t, forward=StableDiffusionBaseModel.forward, **kwargs):
        if next(calls) == 6:
            raise error
        return forward(self, x, t, **kwargs)

    monkeypatch.setattr(StableDiffusionBaseModel, "forward", forward)
    with pytest.raises(type(error)):
        tiny(tmp_path / "run")
    assert checkpoints(tmp_path / "run")
