"""``--logger`` copies the rows of a run to Weights & Biases or trackio, each of them once."""

import json
import struct
import sys

import numpy as np
import pytest

from flowgym_gym.agents import train
from flowgym_gym.agents.runs import loggers
from flowgym_gym.agents.runs.loggers import LOGGER, check_logger
from flowgym_gym.agents.runs.records import Records
from flowgym_gym.errors import MissingExtraError, OptionError
from tests.agents.conftest import finished, resume, same_weights, tiny, untimed
from tests.agents.runs.test_records import TIMED_TAGS, written
from tests.conftest import RED

EVERY = {"evaluate_every": 8, "evaluation_episodes": 2, "checkpoint_every": 16}


class Pretended:
    """What a logger has taken: by run the rows in the order in which they came."""

    def __init__(self):
        self.rows, self.ended, self.broken = {}, 0, False

    def connect(self, out, run, config):
        np.random.random()  # as libraries do that make up names
        rows = self.rows.setdefault(run, [])

        def send(numbers, timesteps):
            if self.broken:
                raise ConnectionError("the server is gone")
            rows.append((timesteps, dict(numbers)))

        def finish():
            self.ended += 1

        return send, finish

    def shown(self):
        """By tag the steps and values, in the only run there is."""
        (rows,) = self.rows.values()
        return by_tag(rows)


def by_tag(rows):
    shown = {}
    for timesteps, numbers in rows:
        for tag, value in numbers.items():
            shown.setdefault(tag, []).append((timesteps, value))
    return shown


@pytest.fixture
def wandb(monkeypatch):
    pretended = Pretended()
    monkeypatch.setitem(loggers.CONNECT, "wandb", pretended.connect)
    monkeypatch.setitem(loggers.LOGGERS, "wandb", "json")
    return pretended


def killed(out, logger, timesteps=24):
    """A run that dies after a row, of which there is no checkpoint yet."""

    def add(self, row, since, add=Records.add):
        add(self, row, since)
        if row["timesteps"] == timesteps:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Records, "add", add)
        patch.setattr("flowgym_gym.agents.runs.training._save_boundary", lambda *_: False)
        with pytest.raises(KeyboardInterrupt):
            tiny(out, timesteps=32, overrides=EVERY, logger=logger)


def same(found, expected):
    """Equal rows; those of work that was done twice have the times of the first time."""
    assert found.keys() == expected.keys()
    for tag, points in expected.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in points], tag
        if tag not in TIMED_TAGS:
            assert found[tag] == points, tag


@pytest.mark.second
def test_the_rows_of_a_run_are_copied_and_the_training_does_not_notice(wandb, tmp_path):
    plain, copied = tmp_path / "plain", tmp_path / "copied"
    tiny(plain, overrides=EVERY)
    tiny(copied, overrides=EVERY, logger="wandb")
    same(wandb.shown(), written(copied))
    assert untimed(plain) == untimed(copied)
    assert same_weights(plain, copied)
    assert wandb.ended == 1
    assert not (copied / "tensorboard").exists()


def test_a_resumed_run_goes_on_in_the_same_run_without_doubled_rows(wandb, tmp_path):
    killed(tmp_path, "wandb")
    assert [step for step, _ in wandb.shown()["rollout/return"]] == [8, 16, 24]
    resume(tmp_path, timesteps=40)
    same(wandb.shown(), written(tmp_path))


def test_rows_that_were_not_copied_follow(wandb, tmp_path):
    resume(finished(tmp_path), timesteps=16, logger="wandb")
    same(wandb.shown(), written(tmp_path))


def test_a_logger_that_fails_is_no_reason_to_stop(wandb, tmp_path, capsys):
    wandb.broken = True
    finished(tmp_path)
    assert resume(tmp_path, timesteps=16, logger="wandb").timesteps == 16
    said = "metrics no longer go to wandb: ConnectionError: the server is gone"
    assert capsys.readouterr().err.count(said) == 1
    # What a damaged file said is not known any more.
    (tmp_path / LOGGER).write_text("{}")
    resume(tmp_path, timesteps=24)
    assert "logger.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_named_before_any_work(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=f"needs the package {name}.*pip install {name}$"):
        train(RED, out=tmp_path / "run", logger=name)
    assert not (tmp_path / "run").exists()


def test_tensorboard_that_was_asked_for_must_be_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    check_logger(None)
    with pytest.raises(MissingExtraError, match="pip install tensorboard"):
        check_logger("tensorboard")


def test_an_unknown_logger_is_refused(tmp_path):
    with pytest.raises(OptionError, match="logger is 'wandbb', expected one of"):
        train(RED, out=tmp_path / "run", logger="wandbb")


def test_a_logger_that_does_not_take_the_run_is_an_error(wandb, tmp_path, monkeypatch):
    monkeypatch.setitem(loggers.CONNECT, "wandb", lambda *_: 1 / 0)
    with pytest.raises(OptionError, match="does not take the run: ZeroDivisionError"):
        tiny(tmp_path, logger="wandb")


def offline_rows(folder):
    """The rows in the files that ``wandb sync`` would upload."""
    from wandb.proto import wandb_internal_pb2

    rows, order = [], sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    for path in order:
        data, place, parts = path.read_bytes(), 7, []
        while place + 7 <= len(data):
            left = 2**15 - place % 2**15
            if left < 7:  # the rest of a block is empty
                place += left
                continue
            length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
            parts.append(data[place + 7 : place + 7 + length])
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                record = wandb_internal_pb2.Record.FromString(b"".join(parts))
                parts = []
                if record.WhichOneof("record_type") == "history":
                    items = record.history.item
                    row = {
                        (i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items
                    }
                    rows.append((row.pop("timesteps"), row))
    return [
        (timesteps, {tag: value for tag, value in row.items() if not tag.startswith("_")})
        for timesteps, row in rows
    ]  # fmt: skip


def local_rows(folder):
    """The rows in trackio's own database."""
    import sqlite3

    (path,) = folder.glob("*.db")
    with sqlite3.connect(path) as database:
        found = database.execute(
            "SELECT run_name, step, metrics FROM metrics ORDER BY id"
        ).fetchall()
    assert len({name for name, _, _ in found}) == 1
    return [(step, json.loads(metrics)) for _, step, metrics in found]


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_libraries_take_the_rows_offline(name, tmp_path, monkeypatch):
    """In an environment of its own: ``pip install wandb trackio``."""
    pytest.importorskip(name)
    run, plain, folder = (tmp_path / part for part in ("run", "plain", "trackio"))
    if name == "trackio":
        monkeypatch.setattr("trackio.utils.TRACKIO_DIR", folder)
        monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", folder)
    killed(run, name)
    resume(run, timesteps=40)
    rows = offline_rows(run) if name == "wandb" else local_rows(folder)
    same(by_tag(rows), written(run))
    tiny(plain, timesteps=32, overrides=EVERY)
    resume(plain, timesteps=40)
    assert untimed(plain) == untimed(run)
    assert same_weights(plain, run)
