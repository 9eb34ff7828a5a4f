"""TensorBoard shows what ``metrics.csv`` and ``evaluations.csv`` hold."""

import sys

import pytest

from flowgym_gym.agents.runs import records
from flowgym_gym.agents.runs.metrics import read_metrics
from flowgym_gym.agents.runs.records import ALGORITHM_COLUMNS, COLUMNS, Records
from tests.agents.conftest import TIMED, resume, tiny

EVERY = {"evaluate_every": 8, "evaluation_episodes": 2}
TIMED_TAGS = {f"rollout/{name}" for name in TIMED}


def shown(out):
    """What TensorBoard shows: by tag the steps and values."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(
        str(out / "tensorboard"), size_guidance={"scalars": 0}
    ).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }  # fmt: skip


def written(out, algo="ppo"):
    """The same from the CSV files."""
    expected = {}
    for row in read_metrics(out / "metrics.csv"):
        for name in COLUMNS[1:]:
            expected.setdefault(f"rollout/{name}", []).append((row["timesteps"], row[name]))
        for name in ALGORITHM_COLUMNS[algo]:
            if row[name] is not None:
                expected.setdefault(f"train/{name}", []).append((row["timesteps"], row[name]))
    for row in read_metrics(out / "evaluations.csv"):
        for name in row.keys() - {"timesteps"}:
            expected.setdefault(f"evaluation/{name}", []).append((row["timesteps"], row[name]))
    return expected


def assert_same(out, algo="ppo"):
    found, expected = shown(out), written(out, algo)
    assert found.keys() == expected.keys()
    for tag, points in expected.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in points], tag
        # Events are float32.
        assert [value for _, value in found[tag]] == pytest.approx(
            [value for _, value in points], rel=1e-6
        ), tag


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_tensorboard_shows_the_metrics_and_evaluations(algo, tmp_path):
    pytest.importorskip("tensorboard")
    tiny(tmp_path, algo, timesteps=16, overrides=EVERY)
    assert_same(tmp_path, algo)


def test_a_resumed_run_goes_on_in_tensorboard_and_lost_work_is_hidden(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")

    def killed(self, row, since, add=Records.add):
        add(self, row, since)
        if row["timesteps"] == 24:
            self._board.flush()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Records, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny(tmp_path, timesteps=32, overrides={**EVERY, "checkpoint_every": 16})
    assert [step for step, _ in shown(tmp_path)["rollout/return"]] == [8, 16, 24]
    resume(tmp_path, timesteps=40)
    assert [step for step, _ in shown(tmp_path)["rollout/return"]] == [8, 16, 24, 32, 40]
    assert_same(tmp_path)


def test_without_tensorboard_a_run_says_so_and_writes_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert not records.tensorboard_installed()
    tiny(tmp_path, timesteps=8)
    assert not (tmp_path / "tensorboard").exists()
    assert len(read_metrics(tmp_path / "metrics.csv")) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "TensorBoard" in line]
    assert said == [
        "metrics go to metrics.csv alone; with TensorBoard (pip install tensorboard) they go "
        "there, too"
    ]
