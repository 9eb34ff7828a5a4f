"""Replay buffers no larger than the memory."""

import json
import os

import gymnasium
import numpy as np
import psutil
import pytest
from stable_baselines3.common.buffers import DictReplayBuffer

from flowgym_gym.agents.runs import buffers, memory, training
from flowgym_gym.agents.runs.checkpoints import checkpoints
from flowgym_gym.agents.runs.config import read_config
from flowgym_gym.errors import OptionError
from tests.agents.conftest import resume, same_weights, tiny, untimed
from tests.conftest import further

# A transition: two observations of 4 x 8 x 8 numbers and the time, 4 of action, and reward, end and
# time-out.
TRANSITION = 4 * (2 * 257 + 4 + 3)


def available(monkeypatch, size):
    monkeypatch.setattr(memory, "available_memory", lambda: size)


def test_the_available_memory_is_what_psutil_says(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "MEMORY_LIMIT", tmp_path / "no container")
    assert memory.available_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.1)


@pytest.mark.parametrize(("limit", "expected"), [("5000000\n", 4_000_000), ("max\n", None)])
def test_a_container_has_its_own_limit(limit, expected, monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text("1000000\n")
    monkeypatch.setattr(memory, "MEMORY_LIMIT", tmp_path / "memory.max")
    monkeypatch.setattr(memory, "MEMORY_TAKEN", tmp_path / "memory.current")
    monkeypatch.setattr(memory, "MEMORY_PARTS", tmp_path / "memory.stat")
    found = memory.available_memory()
    assert found == expected if expected else found > 100_000_000


def test_a_container_can_give_back_what_it_holds_of_files(monkeypatch, tmp_path):
    for name, text in {
        "max": "5000000",
        "current": "4000000",
        "stat": "file 3000000\ninactive_file 2500000\n",
    }.items():
        (tmp_path / name).write_text(text)
    for name, file in {"LIMIT": "max", "TAKEN": "current", "PARTS": "stat"}.items():
        monkeypatch.setattr(memory, f"MEMORY_{name}", tmp_path / file)
    assert memory.available_memory() == 3_500_000


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="POSIX")
def test_other_systems_are_asked_for_all_their_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "MEMORY_INFO", tmp_path / "none")
    monkeypatch.setattr(memory, "MEMORY_LIMIT", tmp_path / "none")
    assert memory.available_memory() == psutil.virtual_memory().total
    monkeypatch.delattr(os, "sysconf")
    assert memory.available_memory() is None


@pytest.mark.parametrize("size", [None, 1_000_000, "auto"])
def test_a_replay_buffer_is_no_larger_than_the_run_and_its_memory_is_said(size, tmp_path, capsys):
    tiny(
        tmp_path, "sac", timesteps=16, overrides={} if size is None else {"algo.buffer_size": size}
    )
    assert read_config(tmp_path)["replay_buffer"] == 16
    assert (
        f"replay buffer: 16 transitions, {16 * TRANSITION / 1000:.0f} kB" in capsys.readouterr().err
    )


def test_an_automatic_replay_buffer_takes_a_quarter_of_the_memory_and_stays_at_that(
    tmp_path, capsys, monkeypatch
):
    available(monkeypatch, 4 * 10 * TRANSITION + 3)
    tiny(tmp_path, "sac", timesteps=16, overrides={"algo.buffer_size": "auto"})
    assert (
        f"replay buffer: 10 of the run's 16 transitions, {10 * TRANSITION / 1000:.0f} kB"
        in capsys.readouterr().err
    )
    assert json.loads((tmp_path / "config.json").read_text())["replay_buffer"] == 10
    available(monkeypatch, 10**9)
    # The command that began the run goes on with it, whatever the memory is by now.
    resume(tmp_path, "sac", timesteps=16, overrides={"algo.buffer_size": "auto"})
    assert "replay buffer: 10 of the run's 16" in capsys.readouterr().err
    resume(tmp_path, "sac", timesteps=20)
    assert "replay buffer: 20 transitions" in capsys.readouterr().err
    with np.load(checkpoints(tmp_path)[0] / "replay_buffer.npz") as buffer:
        # The newest 10 of the first 16, and 4 of later.
        assert buffer["rewards"].size == 14


@pytest.mark.parametrize("size", ["auto", *further(1_000_000, 12)])
def test_a_run_that_is_made_longer_has_the_replay_buffer_of_one_that_was_long_from_the_start(
    size, tmp_path
):
    changes = {"algo.buffer_size": size}
    tiny(tmp_path / "long", "sac", timesteps=32, overrides=changes)
    tiny(tmp_path / "parts", "sac", timesteps=16, overrides=changes)
    resume(tmp_path / "parts", "sac", timesteps=32)
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "long")
    assert same_weights(tmp_path / "parts", tmp_path / "long")


@pytest.mark.parametrize(
    ("filled", "rows"), [(3, [0, 1, 2]), (4, [0, 1, 2, 3]), (6, [2, 3, 4, 5]), (9, [5, 6, 7, 8])]
)
@pytest.mark.parametrize("saved_size", [3, 4, 5, 9])
def test_transitions_go_into_a_buffer_of_another_size_the_newest_and_in_order(
    filled, rows, saved_size
):
    def buffer(size):
        spaces = gymnasium.spaces.Dict({"latent": gymnasium.spaces.Box(-9.0, 9.0, (1,))})
        return DictReplayBuffer(size, spaces, gymnasium.spaces.Box(-1.0, 1.0, (1,)), device="cpu")

    saved, restored = buffer(saved_size), buffer(4)
    for buffered, reward in [*((saved, i) for i in range(filled))]:
        one = {"latent": np.array([[reward]], dtype=np.float32)}
        buffered.add(one, one, np.zeros((1, 1)), np.array([reward]), np.array([False]), [{}])
    buffers._restore_buffer(restored, buffers.buffer_arrays(saved))
    kept = [row for row in rows if row >= filled - saved_size]
    order = (
        np.roll(restored.rewards[:, 0], -restored.pos)
        if restored.full
        else restored.rewards[: restored.pos, 0]
    )
    assert order.tolist() == kept
    assert restored.full == (len(kept) == 4)
    assert (
        restored.observations["latent"][: len(kept), 0, 0].tolist()
        == restored.rewards[: len(kept), 0].tolist()
    )


def test_where_the_memory_is_unknown_the_whole_run_is_kept(tmp_path, monkeypatch):
    available(monkeypatch, None)
    tiny(tmp_path, "sac", timesteps=16, overrides={"algo.buffer_size": "auto"})
    assert read_config(tmp_path)["replay_buffer"] == 16


def test_a_replay_buffer_that_does_not_fit_is_refused_before_any_work(tmp_path, monkeypatch):
    available(monkeypatch, 100 * TRANSITION)
    monkeypatch.setattr(training, "_run", lambda *args: pytest.fail("work began"))
    message = (
        r"algo.buffer_size is 200, a replay buffer of 417 kB, but 208 kB of memory are available; "
        r"give at most 100,"
    )
    with pytest.raises(OptionError, match=message):
        tiny(tmp_path / "run", "sac", timesteps=300, overrides={"algo.buffer_size": 200})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [0, -5, "all", 1.5, None])
def test_other_sizes_are_refused(size, tmp_path):
    with pytest.raises(OptionError, match=f"algo.buffer_size is {size!r}"):
        tiny(tmp_path / "run", "sac", overrides={"algo.buffer_size": size})
