"""The configuration of a run, ``config.json``, read back and checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowgym_gym.agents.kinds import Named, Options
from flowgym_gym.agents.runs.contents import Contents, check_form
from flowgym_gym.agents.runs.files import CONFIG, UNREADABLE
from flowgym_gym.agents.runs.presets import COUNT, Settings, as_algorithm, complete, full_id
from flowgym_gym.agents.runs.settings import check, check_names
from flowgym_gym.checks import check_choice
from flowgym_gym.errors import (
    CheckpointError,
    FlowGymError,
    OptionError,
    UnknownIdError,
    reason,
    shown,
)

# stable-baselines3, the default, is the first one.
ENGINES = ("sb3", "rllib")
NO_CONFIG = "put a copy of it back, or begin another run"


@dataclass(frozen=True, eq=False)
class Config(Named):
    """What ``config.json`` of a run holds. It reads as a mapping of what is there, too.

    Attributes:
        env_id: The environment, with ``flowgym/``.
        algo: The algorithm.
        seed: Of agent and sub-environments.
        settings: All settings.
        versions: Of Python and the libraries when the run began.
        contents: Fingerprints of what the settings name; None in runs from before there were any.
        replay_buffer: Transitions of the replay buffer; None before it is made, and for PPO.
        base_model: Means of the base model in the episodes of ``before.png``.
        moved: Places that the settings named, and where the same lies now.
        engine: What it is trained with; None for stable-baselines3.
        others: What else the file holds.
        order: The names in the file as it was read; what is new comes behind them.
    """

    env_id: str
    algo: str
    seed: int
    settings: Settings
    versions: dict[str, str] | None = None
    contents: Contents | None = None
    replay_buffer: int | None = None
    base_model: Options | None = None
    moved: dict[str, str] | None = None
    engine: str | None = None
    others: Options = field(default_factory=dict)
    order: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.others[name] if name in self.others else super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        own = (name for name in super().__iter__() if name not in ("others", "order"))
        there = [*(name for name in own if getattr(self, name) is not None), *self.others]
        yield from dict.fromkeys([*(name for name in self.order if name in there), *there])

    def as_json(self) -> Options:
        """What ``config.json`` holds."""
        return {**self, "settings": dict(self.settings)}


KNOWN = tuple(Config.__dataclass_fields__)


def read_config(out: Path) -> Config:
    """The configuration of a run.

    Raises:
        OptionError: If ``out`` holds no run.
        CheckpointError: If its configuration is damaged, or has settings that a run cannot have.
        UnknownIdError: If its environment is not registered here.
    """
    path = out / CONFIG
    if not path.is_file():
        raise OptionError(
            f"{out} holds no run (there is no {CONFIG} in it); name a run's folder, or train one "
            "there, not resumed"
        )
    try:
        config = _as_config(json.loads(path.read_text(encoding="utf-8")))
    except UNREADABLE as error:
        raise CheckpointError(f"{path} is damaged: {why(error)}; {NO_CONFIG}") from error
    try:
        check_names(config.settings, full_id(config.env_id), config.algo)
        check(config.settings, config.algo)
    except UnknownIdError:
        raise
    except UNREADABLE as error:
        raise CheckpointError(f"{path} does not describe a run: {why(error)}") from error
    return config


def _as_config(found: Options) -> Config:
    """The configuration in a file, or whatever error comes unless it is one."""
    known = {
        name: found[name] for name in KNOWN if name in found and name not in ("others", "order")
    }
    config = Config(
        **{
            **known,
            "algo": as_algorithm(found["algo"]),
            "settings": complete(found["settings"], "settings"),
            "order": tuple(found),
            "others": {name: value for name, value in found.items() if name not in known},
        }
    )
    if not isinstance(config.env_id, str) or not isinstance(config.seed, int):
        raise OptionError("env_id is no text, or seed no whole number")
    if config.engine is not None:
        check_choice("engine", config.engine, ENGINES)
    if config.replay_buffer is not None:
        COUNT.check("replay_buffer", config.replay_buffer)
    moved = config.moved or {}
    if not all(isinstance(place, str) for pair in moved.items() for place in pair):
        raise OptionError(f"moved is {shown(moved)}, expected places by their old names")
    check_form(config.contents)
    return config


def why(error: BaseException) -> str:
    """What a reader raised; of this package's errors the message alone."""
    return (
        reason(error)
        if isinstance(error, FlowGymError)
        else f"{type(error).__name__}: {reason(error)}"
    )
