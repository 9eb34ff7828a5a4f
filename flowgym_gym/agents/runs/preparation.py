"""Preparing a run: everything is checked before anything is written or any long work is done."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowgym_gym.agents.runs import contents
from flowgym_gym.agents.runs.checkpoints import checkpoints, newest_checkpoint
from flowgym_gym.agents.runs.config import Config, read_config
from flowgym_gym.agents.runs.contents import check_contents
from flowgym_gym.agents.runs.episodes import check_seed
from flowgym_gym.agents.runs.files import check_new, check_writable, versions
from flowgym_gym.agents.runs.metrics import METRICS, read_metrics
from flowgym_gym.agents.runs.presets import SECTIONS, Settings, check_algorithm, full_id, load_preset
from flowgym_gym.agents.runs.settings import check, check_arguments, override
from flowgym_gym.errors import OptionError

# stable-baselines3's own.
LEARNING_STARTS, BATCH_SIZE = 100, 64


@dataclass(frozen=True)
class Run:
    """A run that has been checked and can start.

    Attributes:
        out: Its folder.
        config: What ``config.json`` holds.
        resume: Whether it goes on from the newest checkpoint.
        notes: What the user should know, one line each.
    """

    out: Path
    config: Config
    resume: bool
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        out: The run folder.
        timesteps: Environment steps so far.
        target: Environment steps of the whole run.
        signal: The signal that interrupted it; None if it reached its target.
        stopped: Why it stopped before its target by itself; None if it did not.

    It stands for its folder wherever a path does.
    """

    out: Path
    timesteps: int
    target: int
    signal: int | None = None
    stopped: str | None = None

    def __fspath__(self) -> str:
        return str(self.out)


def prepare(
    env_id: str,
    algo: str | None = None,
    *,
    out: str | Path,
    timesteps: int | None = None,
    num_envs: int | None = None,
    seed: int | None = None,
    resume: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Run:
    """Check the arguments of :func:`train` without writing or loading anything large.

    Raises:
        FlowGymError: If an argument cannot be used.
    """
    env_id, out = full_id(env_id), Path(out)
    if algo is not None:
        check_algorithm(algo)
    if resume:
        return _prepare_resumed(env_id, algo, out, timesteps, num_envs, seed, overrides)
    algo = algo or "ppo"
    check_new(out)
    settings, notes = settings_of_run(env_id, algo, timesteps, num_envs, overrides)
    check_seed(0 if seed is None else seed, settings["num_envs"])
    config = {
        "env_id": env_id,
        "algo": algo,
        "seed": 0 if seed is None else seed,
        "settings": settings,
        "versions": versions(),
    }
    return Run(out, config, resume=False, notes=notes)


def settings_of_run(
    env_id: str,
    algo: str,
    timesteps: int | None = None,
    num_envs: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Settings, list[str]]:
    """Settings of a new run, and what to tell the user about them; arguments as of :func:`train`.

    Raises:
        FlowGymError: If an argument cannot be used.
    """
    changes = dict(overrides or {})
    check_arguments(changes, timesteps=timesteps, num_envs=num_envs)
    for name, value in (("timesteps", timesteps), ("num_envs", num_envs)):
        if value is not None:
            changes[name] = value
    settings = override(load_preset(env_id, algo), changes, env_id, algo)
    try:
        json.dumps(settings)
    except (TypeError, ValueError) as error:
        raise OptionError(f"a setting is no plain value: {error}") from error
    settings["env"] = contents.resolved(settings["env"])
    return settings, _fit(settings, algo)


def differences(changed: Settings, settings: Settings) -> list[str]:
    """What differs from the settings of a run, timesteps aside; paths count as what they mean from here."""
    both = [{**some, "env": contents.resolved(some["env"])} for some in (changed, settings)]
    flat = [
        {
            f"{section}.{name}" if section else name: value
            for section in ("", *SECTIONS)
            for name, value in (some[section] if section else some).items()
            if section or name not in (*SECTIONS, "timesteps")
        }
        for some in both
    ]
    names = [name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name)]
    return [f"{name} is {flat[0].get(name)!r}, but the run has {flat[1].get(name)!r}" for name in names]


def _prepare_resumed(
    env_id: str,
    algo: str | None,
    out: Path,
    timesteps: int | None,
    num_envs: int | None,
    seed: int | None,
    overrides: Mapping[str, Any] | None,
) -> Run:
    config = read_config(out)
    check_writable(out)
    done = _done(out)
    if overrides:
        config = _follow(config, overrides, env_id, algo or config["algo"])
    check_contents(out, config)
    settings = copy.deepcopy(config["settings"])
    given = {"env": env_id, "algo": algo, "seed": seed, "num_envs": num_envs}
    own = {"env": config["env_id"], "algo": config["algo"], "seed": config["seed"], "num_envs": settings["num_envs"]}
    for name, value in given.items():
        if value is not None and value != own[name]:
            raise OptionError(f"{name} is {value!r}, but the run in {out} has {own[name]!r} and resumes with that")
    algo, notes = config["algo"], contents.note(config)
    if done is None:
        notes.append(f"the run in {out} ended before its first checkpoint; starting from the beginning")
    if overrides:
        check_arguments(overrides, timesteps=timesteps)
        changed = override(settings, overrides, env_id, algo)
        _fit(changed, algo)
        found = differences(changed, settings)
        if found:
            raise OptionError(
                f"{'; '.join(found)}: settings cannot change when the run in {out} is resumed, only timesteps can"
            )
        timesteps = timesteps if timesteps is not None else changed["timesteps"]
    if timesteps is not None:
        settings["timesteps"] = timesteps
        check(settings, algo)
    notes += _fit(settings, algo)
    before, target = config["settings"]["timesteps"], settings["timesteps"]
    if done is not None and target < done:
        raise OptionError(f"timesteps is {timesteps}, but the run in {out} has already done {done}; give more")
    if target != before:
        notes += _changed_rate(settings, done or 0, before)
    if target > before:
        # Of a longer run the replay buffer may hold more.
        config = {name: value for name, value in config.items() if name != "replay_buffer"}
    return Run(out, {**config, "settings": settings}, resume=done is not None, notes=notes)


def _follow(config: Config, overrides: Mapping[str, Any], env_id: str, algo: str) -> Config:
    """The configuration of a run whose files are at another place now, if changes name that and it holds the same."""
    changed = contents.resolved(override(config["settings"], overrides, env_id, algo)["env"])
    moves = contents.moved(config, changed)
    if not moves:
        return config
    settings = config["settings"]
    return {
        **config,
        "settings": {**settings, "env": contents.replaced(settings["env"], moves)},
        "contents": contents.relocated(config["contents"], moves),
        # What checkpoints say of the environment names the places of their time.
        "moved": {old: moves.get(new, new) for old, new in config.get("moved", {}).items()} | moves,
    }


def _done(out: Path) -> int | None:
    """Timesteps of the newest checkpoint; None if the run ended before its first, which comes before any work.

    Raises:
        OptionError: If there has been work, but there is no checkpoint.
    """
    if not checkpoints(out) and not read_metrics(out / METRICS):
        return None
    return int(newest_checkpoint(out).name)


def _fit(settings: Settings, algo: str) -> list[str]:
    """Make settings that a run can have of those that are asked for, in place; returns what to tell the user."""
    notes = []
    unit, asked = _unit(settings, algo), settings["timesteps"]
    settings["timesteps"] = math.ceil(asked / unit) * unit
    if settings["timesteps"] != asked:
        notes.append(f"{asked} timesteps are rounded up to {settings['timesteps']}, whole rollouts of {unit}")
    batch = settings["algo"].get("batch_size", BATCH_SIZE)
    if algo == "ppo" and unit % batch:
        notes.append(f"algo.batch_size is {batch}, and the last batch of each pass over a rollout of {unit} is smaller")
    if algo != "ppo":
        random = settings["algo"].get("learning_starts", LEARNING_STARTS)
        if settings["timesteps"] <= random:
            notes.append(
                f"timesteps is {asked}, but {algo.upper()} learns nothing in its first {random}, whose actions are "
                "random (algo.learning_starts): the agent stays the base model; give more, or set that lower"
            )
    if settings["kl_budget"] is not None and settings["evaluate_every"] is None:
        settings["evaluate_every"] = settings["checkpoint_every"]
        notes.append(
            f"evaluations every {settings['evaluate_every']} timesteps (evaluate_every) are held against the kl_budget"
        )
    return notes


def _unit(settings: dict[str, Any], algo: str) -> int:
    """Timesteps of a rollout, the smallest piece that the algorithm collects."""
    name, default = ("n_steps", 2048) if algo == "ppo" else ("train_freq", 1)
    return int(settings["algo"].get(name, default)) * int(settings["num_envs"])


def interval_length(settings: dict[str, Any], algo: str, episode_steps: int) -> int:
    """Timesteps between two moments at which the whole state of a training is known."""
    unit = _unit(settings, algo)
    return unit if algo == "ppo" else unit * math.ceil(episode_steps * settings["num_envs"] / unit)


def _changed_rate(settings: Settings, done: int, before: int) -> list[str]:
    """What to tell the user about the learning rate of a run whose timesteps were ``before``."""
    first, final, target = settings["algo"].get("learning_rate"), settings["final_learning_rate"], settings["timesteps"]
    if final is None or first is None:
        return []
    old, new = (first + (final - first) * done / end for end in (before, target))
    return [
        f"the learning rate goes to {final:g} at {target} timesteps instead of {before}: it is {new:.3g} now, not "
        f"{old:.3g}"
    ]
