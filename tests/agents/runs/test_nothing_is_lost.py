"""Killed processes, full disks and other accidents: a run keeps what it had and goes on as if
nothing had happened.
"""

import csv
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common import base_class

from flowgym_gym.agents import evaluate, load_agent
from flowgym_gym.agents.runs import checkpoints as checkpointing
from flowgym_gym.agents.runs import metrics, records, training
from flowgym_gym.agents.runs.checkpoints import best_checkpoint, checkpoints
from flowgym_gym.agents.runs.config import read_config
from flowgym_gym.agents.runs.files import locked
from flowgym_gym.agents.runs.metrics import read_metrics
from flowgym_gym.cli import main
from flowgym_gym.errors import CheckpointError, FlowGymError, OptionError
from tests.agents.conftest import (
    assignments,
    draw_little,
    finished,
    forbid_training,
    resume,
    same_weights,
    tiny,
    untimed,
)
from tests.agents.runs.killing import KILLS, TIMESTEPS
from tests.conftest import RED, further

ROOT = Path(__file__).parents[3]


@pytest.mark.second
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_a_run_killed_at_ten_moments_is_the_run_that_was_not(algo, tmp_path):
    command = [sys.executable, "-m", "tests.agents.runs.killing", algo, str(tmp_path), "0"]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == result.stderr.count("killed in") == KILLS
    parts = sorted(tmp_path.glob("part-*/"))
    assert parts
    for out in parts:
        assert untimed(out) == untimed(tmp_path / "whole")
        assert [path.name for path in checkpoints(out)] == [
            path.name for path in checkpoints(tmp_path / "whole")
        ]
        assert int(checkpoints(out)[0].name) == TIMESTEPS
        assert same_weights(out, tmp_path / "whole")
        assert read_metrics(out / "evaluations.csv") == read_metrics(
            tmp_path / "whole" / "evaluations.csv"
        )
        assert best_checkpoint(out).name == best_checkpoint(tmp_path / "whole").name
        assert same_weights(out, tmp_path / "whole", "best")
        assert not list(out.rglob("writing-*"))


def killed(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        draw_little(patch)
        tiny(out, timesteps=32, seed=1)
    return out


def same_run(first, second):
    return untimed(first) == untimed(second) and same_weights(first, second)


@pytest.mark.parametrize(
    ("module", "function"),
    [(records, "save_checkpoint"), (training, "play_pictures"), (training, "write_json")],
)
def test_a_run_killed_before_its_first_checkpoint_starts_over(
    module, function, whole, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(module, function, killed)
        with pytest.raises(KeyboardInterrupt):
            tiny(out, timesteps=32, seed=1)
    capsys.readouterr()
    if function == "write_json":
        # Nothing is there yet, and the same command starts it.
        with pytest.raises(OptionError, match="train one there, not resumed"):
            resume(out)
        (out / "writing-abc").write_text("{")
        tiny(out, timesteps=32, seed=1)
    else:
        resume(out)
        assert (
            "ended before its first checkpoint; starting from the beginning"
            in capsys.readouterr().err
        )
    assert same_run(out, whole)
    assert "base_model" in read_config(out)
    assert not list(out.rglob("writing-*"))


def test_a_run_that_started_over_may_have_another_length(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(records, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny(tmp_path, timesteps=32)
    assert resume(tmp_path, timesteps=8).timesteps == 8


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    finished(tmp_path, timesteps=8)
    leftovers = [tmp_path / "writing-a", tmp_path / "checkpoints" / "writing-b"]
    leftovers[0].write_text("{")
    leftovers[1].mkdir()
    (leftovers[1] / "replay_buffer.npz").write_bytes(bytes(100))
    resume(tmp_path, timesteps=16)
    assert not any(path.exists() for path in leftovers)


@pytest.mark.parametrize(
    "cut", ["24", "24,", "24,12,0.5,20.0,0.", "24,12,0.5,20.0,0.7,0.1,1.0,70.0,1.0,0,0,0,0,0,0.00"]
)
def test_a_row_that_was_cut_off_is_written_anew(cut, whole, tmp_path):
    out = tmp_path / "run"
    tiny(out, timesteps=16, seed=1)
    with (out / "metrics.csv").open("a", newline="") as file:
        file.write(cut)
    assert [row["timesteps"] for row in read_metrics(out / "metrics.csv")] == [8, 16]
    resume(out, timesteps=32)
    assert same_run(out, whole)


@pytest.mark.parametrize(
    "line",
    ["8,4,0.5\r\n", "8" + ",0" * 30 + "\r\n", "8,4,x" + ",0" * 12 + "\r\n", '8,"\r\n', "\0\r\n"],
)
def test_damaged_metrics_are_an_error_that_names_the_cure(line, tmp_path):
    finished(tmp_path, timesteps=8)
    with (tmp_path / "metrics.csv").open("a", newline="") as file:
        file.write(line)
    with pytest.raises(CheckpointError, match=r"metrics.csv is damaged: .*move it away"):
        resume(tmp_path, timesteps=16)
    (tmp_path / "metrics.csv").unlink()
    assert resume(tmp_path, timesteps=16).timesteps == 16
    assert [row["timesteps"] for row in read_metrics(tmp_path / "metrics.csv")] == [16]


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be brought to the disk")
def test_files_get_their_names_once_they_are_on_the_disk(tmp_path, monkeypatch):
    on_disk, changed, renamed = [], set(), []

    def append(self, row, append=metrics.Metrics.append):
        append(self, row)
        changed.add(self.path.stat().st_ino)

    def fsync(descriptor, fsync=os.fsync):
        on_disk.append(os.fstat(descriptor).st_ino)
        changed.discard(on_disk[-1])
        fsync(descriptor)

    def replace(self, target, replace=Path.replace):
        parts = [*self.iterdir(), self] if self.is_dir() else [self]
        assert {path.stat().st_ino for path in parts} <= set(on_disk), (
            f"{target} may turn out empty after a power cut"
        )
        if self.is_dir():
            assert not changed, f"rows of metrics.csv before {target} may be lost"
        renamed.append((Path(target), len(on_disk)))
        return replace(self, target)

    monkeypatch.setattr(metrics.Metrics, "append", append)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    tiny(tmp_path, "sac", timesteps=12)
    lasting = [(target, count) for target, count in renamed if "writing-" not in str(target)]
    for target, count in lasting:
        assert target.parent.stat().st_ino in on_disk[count:], (
            f"{target} may lose its name in a power cut"
        )
    assert [target.relative_to(tmp_path).as_posix() for target, _ in lasting] == [
        "config.json", "config.json", "metrics.csv",
        "checkpoints/000000000", "checkpoints/000000008", "checkpoints/000000012",
    ]  # fmt: skip


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    finished(tmp_path, timesteps=8)
    with locked(tmp_path), pytest.raises(OptionError, match="another process is training in"):
        resume(tmp_path, timesteps=16)
    assert resume(tmp_path, timesteps=16).timesteps == 16


# --- full disks
# ------------------------------------------------------------------------------------------------------


def free_space(monkeypatch, free):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(total=free, used=0, free=free)
    )


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_a_disk_that_is_too_full_is_refused_before_the_first_step(algo, tmp_path, monkeypatch):
    forbid_training(monkeypatch)
    free_space(monkeypatch, 1_000_000)
    with pytest.raises(
        OptionError, match=r"needs about \d+ MB of disk space.* but 1 MB are free; make room"
    ):
        tiny(tmp_path / "deep" / "run", algo)
    assert not (tmp_path / "deep").exists()


def test_the_replay_buffer_counts_twice(tmp_path, monkeypatch):
    forbid_training(monkeypatch)
    # A transition of this environment: two observations of 257 numbers, 4 of action, and reward, end and time-out.
    size = 100_000 * 4 * (2 * 257 + 4 + 3)
    free_space(monkeypatch, 2 * size)
    options = {"overrides": {"algo.buffer_size": 100_000}, "timesteps": 100_000}
    with pytest.raises(
        OptionError, match=r"needs about 43\d MB.*of which twice 208 MB.*\(algo.buffer_size\)"
    ):
        tiny(tmp_path, "sac", **options)


@pytest.mark.parametrize("algo", ["ppo", *further("sac")])
def test_a_run_takes_no_more_than_it_asked_for(algo, tmp_path, monkeypatch):
    needed, peak = [], []

    def count(model, env, best, needed_space=checkpointing.needed_space):
        needed.append(needed_space(model, env, best) - checkpointing.OTHER_BYTES)
        return needed[-1]

    def replace(self, target, replace=Path.replace):
        peak.append(sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))
        return replace(self, target)

    monkeypatch.setattr(checkpointing, "needed_space", count)
    monkeypatch.setattr(Path, "replace", replace)
    tiny(tmp_path, algo, timesteps=80)
    assert needed[0] / 3 < max(peak) <= needed[0]


def test_a_resumed_run_counts_what_it_has_written(tmp_path, monkeypatch):
    tiny(tmp_path, timesteps=32)
    needed = []
    monkeypatch.setattr(
        checkpointing, "needed_space", lambda *args: needed.append(written(tmp_path)) or needed[-1]
    )
    free_space(monkeypatch, 0)
    assert resume(tmp_path, timesteps=40).timesteps == 40
    monkeypatch.setattr(checkpointing, "needed_space", lambda *args: written(tmp_path) + 1)
    with pytest.raises(OptionError, match="of disk space"):
        resume(tmp_path, timesteps=48)


def written(out):
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_in_torch(*args, **kwargs):
    try:
        full_disk()
    except OSError:
        raise RuntimeError(
            "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598\nframe #0"
        ) from None


@pytest.mark.parametrize(
    ("owner", "function", "failure"),
    [
        (os, "fsync", full_disk),
        (base_class, "save_to_zip_file", full_disk_in_torch),
        *further(
            (np, "savez", full_disk),
            (base_class, "save_to_zip_file", full_disk),
            (csv.DictWriter, "writerow", full_disk),
        ),
    ],
)
def test_a_disk_that_fills_later_ends_the_run_and_leaves_the_last_checkpoint(
    owner, function, failure, whole, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:

        def append(self, row, append=metrics.Metrics.append):
            if row["timesteps"] == 24:
                patch.setattr(owner, function, failure)
            append(self, row)

        patch.setattr(metrics.Metrics, "append", append)
        command = [
            "train",
            RED,
            "--seed",
            "1",
            "--timesteps",
            "32",
            "--num-envs",
            "2",
            "--out",
            str(out),
            *assignments(),
        ]
        assert main(command) == 2
    captured = capsys.readouterr().err.splitlines()
    reason = "[enforce fail" if failure is full_disk_in_torch else os.strerror(errno.ENOSPC)
    assert captured[-1].startswith(f"error: writing to {out} failed: {reason}")
    assert captured[-1].endswith(
        "; the run is saved up to 16 timesteps: remove the cause, then go on with --resume"
    )
    assert not [line for line in captured if "Traceback" in line]
    assert checkpoints(out)[0].name == "000000016"
    assert not list(out.rglob("writing-*"))
    assert load_agent(out).num_timesteps == 16
    resume(out)
    assert same_run(out, whole)


def test_a_disk_that_is_full_from_the_start_leaves_a_run_that_starts_over(
    whole, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full_disk)
        with pytest.raises(CheckpointError, match="the run has no checkpoint yet"):
            tiny(out, timesteps=32, seed=1)
    resume(out)
    assert same_run(out, whole)


def test_other_errors_of_training_are_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(PPO, "train", fail)
    with pytest.raises(RuntimeError, match="shapes do not match") as caught:
        tiny(tmp_path)
    assert not isinstance(caught.value, FlowGymError)


def test_an_evaluation_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    finished(tmp_path, timesteps=8)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match=r"evaluation\.json cannot be written: No space left"):
        evaluate(tmp_path, episodes=2)
