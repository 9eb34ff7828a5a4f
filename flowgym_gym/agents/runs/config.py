"""The configuration of a run, ``config.json``, read back and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flowgym_gym.agents.runs.contents import check_form
from flowgym_gym.agents.runs.files import CONFIG, UNREADABLE
from flowgym_gym.agents.runs.presets import check_algorithm, complete, full_id
from flowgym_gym.agents.runs.settings import check, check_names
from flowgym_gym.errors import CheckpointError, FlowGymError, OptionError, UnknownIdError, reason, shown

Config = dict[str, Any]
NO_CONFIG = "put a copy of it back, or begin another run"


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
            f"{out} holds no run (there is no {CONFIG} in it); name a run's folder, or train one there, not resumed"
        )
    try:
        config: Config = json.loads(path.read_text(encoding="utf-8"))
        algo, env_id = check_algorithm(config["algo"]), config["env_id"]
        settings = complete(config["settings"], "settings")
        buffer, moved = config.get("replay_buffer", 1), config.get("moved", {})
        if not isinstance(env_id, str) or not isinstance(config["seed"], int):
            raise OptionError("env_id is no text, or seed no whole number")
        if isinstance(buffer, bool) or not isinstance(buffer, int) or buffer < 1:
            raise OptionError(f"replay_buffer is {buffer!r}, expected a whole number, at least 1")
        if not all(isinstance(place, str) for pair in moved.items() for place in pair):
            raise OptionError(f"moved is {shown(moved)}, expected places by their old names")
        check_form(config.get("contents"))
    except UNREADABLE as error:
        raise CheckpointError(f"{path} is damaged: {why(error)}; {NO_CONFIG}") from error
    try:
        check_names(settings, full_id(env_id), algo)
        check(settings, algo)
    except UnknownIdError:
        raise
    except UNREADABLE as error:
        raise CheckpointError(f"{path} does not describe a run: {why(error)}") from error
    return {**config, "settings": settings}


def why(error: BaseException) -> str:
    """What a reader raised; of this package's errors the message alone."""
    return reason(error) if isinstance(error, FlowGymError) else f"{type(error).__name__}: {reason(error)}"
