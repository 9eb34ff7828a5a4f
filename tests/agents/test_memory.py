"""Replay buffers no larger than the memory."""

import json
import os

import psutil
import pytest

from flowgym_gym.agents import memory
from flowgym_gym.agents.runs import read_config
from flowgym_gym.errors import OptionError
from tests.agents.conftest import resume, tiny

# A transition: two observations of 4 x 8 x 8 numbers and the time, 4 of action, and reward, end and time-out.
TRANSITION = 4 * (2 * 257 + 4 + 3)


def available(monkeypatch, size):
    monkeypatch.setattr(memory, "available_memory", lambda: size)


def test_the_available_memory_is_what_psutil_says(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "MEMORY_LIMIT", tmp_path / "no container")
    assert memory.available_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.1)


@pytest.mark.parametrize(("limit", "expected"), [("5000000\n", 5_000_000), ("max\n", None)])
def test_a_container_has_its_own_limit(limit, expected, monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(memory, "MEMORY_LIMIT", tmp_path / "memory.max")
    found = memory.available_memory()
    assert found == expected if expected else found > 100_000_000


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="POSIX")
def test_other_systems_are_asked_for_all_their_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "MEMORY_INFO", tmp_path / "none")
    monkeypatch.setattr(memory, "MEMORY_LIMIT", tmp_path / "none")
    assert memory.available_memory() == psutil.virtual_memory().total
    monkeypatch.delattr(os, "sysconf")
    assert memory.available_memory() is None


@pytest.mark.parametrize("size", [None, 1_000_000, "auto"])
def test_a_replay_buffer_is_no_larger_than_the_run_and_its_memory_is_said(size, tmp_path, capsys):
    tiny(tmp_path, "sac", timesteps=16, overrides={} if size is None else {"algo.buffer_size": size})
    assert read_config(tmp_path)["settings"]["algo"]["buffer_size"] == 16
    assert f"replay buffer: 16 transitions, {16 * TRANSITION / 1000:.0f} kB" in capsys.readouterr().err


def test_an_automatic_replay_buffer_takes_a_quarter_of_the_memory_and_stays_at_that(tmp_path, capsys, monkeypatch):
    available(monkeypatch, 4 * 10 * TRANSITION + 3)
    tiny(tmp_path, "sac", timesteps=16, overrides={"algo.buffer_size": "auto"})
    assert f"replay buffer: 10 of the run's 16 transitions, {10 * TRANSITION / 1000:.0f} kB" in capsys.readouterr().err
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["algo"]["buffer_size"] == 10
    available(monkeypatch, 10**9)
    resume(tmp_path, "sac", timesteps=20)
    assert "replay buffer: 10 of the run's 20" in capsys.readouterr().err


def test_where_the_memory_is_unknown_the_whole_run_is_kept(tmp_path, monkeypatch):
    available(monkeypatch, None)
    tiny(tmp_path, "sac", timesteps=16, overrides={"algo.buffer_size": "auto"})
    assert read_config(tmp_path)["settings"]["algo"]["buffer_size"] == 16


def test_a_replay_buffer_that_does_not_fit_is_refused_before_any_work(tmp_path, monkeypatch):
    available(monkeypatch, 100 * TRANSITION)
    monkeypatch.setattr("flowgym_gym.agents.training._run", lambda *args: pytest.fail("work began"))
    message = (
        r"algo.buffer_size is 200, a replay buffer of 417 kB, but 208 kB of memory are available; give at most 100,"
    )
    with pytest.raises(OptionError, match=message):
        tiny(tmp_path / "run", "sac", timesteps=300, overrides={"algo.buffer_size": 200})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [0, -5, "all", 1.5, None])
def test_other_sizes_are_refused(size, tmp_path):
    with pytest.raises(OptionError, match=f"algo.buffer_size is {size!r}"):
        tiny(tmp_path / "run", "sac", overrides={"algo.buffer_size": size})
