"""A run's rows in Weights & Biases or trackio: a copy of ``metrics.csv`` and ``evaluations.csv``.

What has been copied is kept in the run folder, so that a resumed run goes on in the same run over
there: rows that are there already are not sent again, and rows that are missing there follow from
the files.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from flowgym_gym.agents.kinds import SomeOptions
from flowgym_gym.agents.runs.files import UNREADABLE, write_json
from flowgym_gym.checks import check_choice
from flowgym_gym.console import say
from flowgym_gym.envs.randomness import seeded
from flowgym_gym.errors import MissingExtraError, OptionError, reason

LOGGER = "logger.json"
PROJECT = "flowgym_gym"
# Sends numbers by name at a timestep.
Send = Callable[[Mapping[str, float], int], None]
Connection = tuple[Send, Callable[[], None]]


def check_logger(logger: str | None) -> None:
    """Raise an error unless rows can be copied there; None for wherever they go by themselves.

    Raises:
        OptionError: If there is no such logger.
        MissingExtraError: If its package is not installed, or cannot be imported.
    """
    check_choice("logger", logger, (None, *LOGGERS))
    if logger is None:
        return
    try:
        importlib.import_module(LOGGERS[logger])
    except Exception as error:  # of an installation whose parts do not fit, too
        raise MissingExtraError(
            f"logger is {logger!r}, which needs the package {logger}, and that cannot be imported "
            f"({reason(error)}); run: pip install {logger}"
        ) from error


def logger_of(out: Path) -> str | None:
    """Where the rows of a run are copied to besides; None if nowhere, or if that is not known."""
    logger = _read(out).get("logger")
    return logger if logger in CONNECT else None


class Mirror:
    """The copy of a run's rows.

    Args:
        out: The run folder.
        logger: ``"wandb"`` or ``"trackio"``.
        config: What the run's ``config.json`` holds.

    Raises:
        OptionError: If the logger does not take the run.
    """

    def __init__(self, out: Path, logger: str, config: SomeOptions) -> None:
        known = _read(out)
        self._path, self._logger = out / LOGGER, logger
        if known.get("logger") != logger:
            known = {"logger": logger, "run": f"{uuid.uuid4().hex[:8]}", "copied": {}}
        self._known = known
        try:
            with _aside():
                self._send, self._finish = CONNECT[logger](out, known["run"], config)
        except Exception as error:
            raise OptionError(
                f"logger is {logger!r}, which does not take the run: {type(error).__name__}: "
                f"{reason(error)}"
            ) from error
        self._failed = False
        write_json(self._path, known)

    def add(self, table: str, numbers: Mapping[str, float], timesteps: int) -> None:
        """Copy a row of a table, unless it was before."""
        copied = self._known["copied"]
        if self._failed or timesteps <= copied.get(table, -1):
            return
        # First, so that a process that is killed here loses a row of the copy and doubles none.
        copied[table] = timesteps
        write_json(self._path, self._known)
        try:
            with _aside():
                self._send(numbers, timesteps)
        except Exception as error:
            self._failed = True
            say(f"metrics no longer go to {self._logger}: {type(error).__name__}: {reason(error)}")

    def close(self) -> None:
        """Send what is still in memory, and end."""
        try:
            with _aside():
                self._finish()
        except Exception as error:
            say(f"{self._logger} could not be ended: {type(error).__name__}: {reason(error)}")


def _read(out: Path) -> dict[str, Any]:
    path = out / LOGGER
    if not path.is_file():
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        good = isinstance(known["run"], str) and isinstance(known["logger"], str)
        copied = {str(table): int(timesteps) for table, timesteps in known["copied"].items()}
        if not good:
            raise ValueError("expected the names of a logger and a run")
    except UNREADABLE as error:
        say(f"{path} is damaged ({reason(error)}); metrics begin anew where logger= says")
        return {}
    return {**known, "copied": copied}


@contextmanager
def _aside() -> Iterator[None]:
    """Inside, libraries draw no random numbers that others go on from, and do not print."""
    with seeded(uuid.uuid4().int >> 66), redirect_stdout(io.StringIO()):
        yield


def _connect_wandb(out: Path, run: str, config: SomeOptions) -> Connection:
    import wandb

    mode = os.environ.get("WANDB_MODE", "offline")
    opened: Any = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=run,
        name=out.absolute().name,
        dir=str(out),
        config=dict(config),
        mode=mode,
        resume="allow",
        settings=wandb.Settings(silent=True, console="off"),
    )
    # Its own steps only go up; rows of a run that was killed may come later.
    opened.define_metric("timesteps")
    opened.define_metric("*", step_metric="timesteps")
    where = (
        f"in {out / 'wandb'}; wandb sync {out / 'wandb'}/offline-run-* uploads them, and the "
        "variable WANDB_MODE=online does so at once"
        if mode == "offline"
        else f"with WANDB_MODE={mode}, as run {run}"
    )
    say(f"metrics go to Weights & Biases, too, {where}")
    return lambda numbers, timesteps: opened.log({**numbers, "timesteps": timesteps}), opened.finish


def _connect_trackio(out: Path, run: str, config: SomeOptions) -> Connection:
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    opened: Any = trackio.init(
        project=project,
        name=f"{out.absolute().name}-{run}",
        config=dict(config),
        resume="allow",
        embed=False,
    )
    say(f"metrics go to trackio, too: trackio show --project {project}")
    return lambda numbers, timesteps: opened.log(dict(numbers), step=timesteps), trackio.finish


CONNECT = {"wandb": _connect_wandb, "trackio": _connect_trackio}
# Loggers by name, and what is imported of each.
LOGGERS = {"tensorboard": "torch.utils.tensorboard", **{name: name for name in CONNECT}}
