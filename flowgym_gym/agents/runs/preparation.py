"""Preparing a run: everything is checked before anything is written or any long work is done."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from flowgym_gym.agents.kinds import SomeOptions
from flowgym_gym.agents.runs import contents
from flowgym_gym.agents.runs.checkpoints import checkpoints, newest_checkpoint
from flowgym_gym.agents.runs.config import ENGINES, Config, read_config
from flowgym_gym.agents.runs.contents import check_contents
from flowgym_gym.agents.runs.episodes import check_seed
from flowgym_gym.agents.runs.files import check_new, check_writable, versions
from flowgym_gym.agents.runs.loggers import check_logger, logger_of
from flowgym_gym.agents.runs.metrics import METRICS, read_metrics
from flowgym_gym.agents.runs.presets import (
    SECTIONS,
    Settings,
    as_algorithm,
    full_id,
    load_preset,
)
from flowgym_gym.agents.runs.settings import check, check_arguments, override
from flowgym_gym.checks import check_choice, check_number, check_whole
from flowgym_gym.errors import OptionError

RLLIB_ALGOS = ("ppo", "sac")
# stable-baselines3's own.
LEARNING_STARTS, BATCH_SIZE = 100, 64


@dataclass(frozen=True)
class Runners:
    """Where RLlib plays its episodes.

    Attributes:
        count: Processes that play, over which the sub-environments are split; with 0 the process
            that learns plays, too.
        gpus: Of each of them; a fraction where several share one.
        address: Of a running Ray cluster; None for this machine alone.
    """

    count: int = 0
    gpus: float = 0.0
    address: str | None = None


@dataclass(frozen=True)
class TrainRequest:
    """What a training is asked for; see :func:`train`."""

    env_id: str
    algo: str | None = None
    out: str | Path = field(kw_only=True)
    timesteps: int | None = None
    num_envs: int | None = None
    seed: int | None = None
    resume: bool = False
    overrides: SomeOptions | None = None
    engine: str | None = None
    runners: Runners | None = None
    logger: str | None = None


@dataclass(frozen=True)
class PreparedRun:
    """A run that has been checked and can start.

    Attributes:
        out: Its folder.
        config: What ``config.json`` holds.
        resume: Whether it goes on from the newest checkpoint.
        notes: What the user should know, one line each.
        runners: Where an engine on many machines plays; None for none.
        logger: Where its rows are copied to; None for TensorBoard where it is installed.
    """

    out: Path
    config: Config
    resume: bool
    notes: list[str] = field(default_factory=list)
    runners: Runners | None = None
    logger: str | None = None


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


def prepare(request: TrainRequest) -> PreparedRun:
    """Check what a training is asked for, without writing or loading anything large.

    Raises:
        FlowGymError: If an argument cannot be used.
    """
    request = replace(request, env_id=full_id(request.env_id), out=Path(request.out))
    if request.algo is not None:
        as_algorithm(request.algo)
    prepared = _prepare_resumed(request) if request.resume else _prepare_new(request)
    logger = request.logger
    if logger is None and request.resume:
        logger = logger_of(prepared.out)
    check_logger(logger)
    return replace(prepared, logger=logger)


def settings_of_run(request: TrainRequest) -> tuple[Settings, list[str]]:
    """Settings of a new run, and what to tell the user about them.

    Raises:
        FlowGymError: If an argument cannot be used.
    """
    changes, algo = dict(request.overrides or {}), request.algo or "ppo"
    given = {"timesteps": request.timesteps, "num_envs": request.num_envs}
    check_arguments(changes, **given)
    changes |= {name: value for name, value in given.items() if value is not None}
    settings = override(load_preset(request.env_id, algo), changes, request.env_id, algo)
    try:
        json.dumps(dict(settings))
    except (TypeError, ValueError) as error:
        raise OptionError(f"a setting is no plain value: {error}") from error
    return _fitted(replace(settings, env=contents.resolved(settings.env)), algo)


def differences(changed: SomeOptions, settings: SomeOptions) -> list[str]:
    """What differs from the settings of a run, timesteps aside; paths count as what they mean from
    here.
    """
    ours, theirs = _flat(changed), _flat(settings)
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return [f"{name} is {ours.get(name)!r}, but the run has {theirs.get(name)!r}" for name in names]


def _flat(settings: SomeOptions) -> dict[str, object]:
    """Settings by dotted name, timesteps aside, with absolute paths."""
    resolved = {**settings, "env": contents.resolved(settings["env"])}
    flat = {name: resolved[name] for name in resolved if name not in (*SECTIONS, "timesteps")}
    return flat | {
        f"{section}.{n}": v for section in SECTIONS for n, v in resolved[section].items()
    }


def _prepare_new(request: TrainRequest) -> PreparedRun:
    out, seed = Path(request.out), 0 if request.seed is None else request.seed
    check_new(out)
    settings, notes = settings_of_run(request)
    check_seed(seed, settings.num_envs)
    config = Config(request.env_id, request.algo or "ppo", seed, settings, versions())
    if _engine(request) != ENGINES[0]:
        config = replace(config, engine=request.engine)
    check_engine(config, request.runners)
    return PreparedRun(out, config, resume=False, notes=notes, runners=request.runners)


def _prepare_resumed(request: TrainRequest) -> PreparedRun:
    out = Path(request.out)
    config = read_config(out)
    check_writable(out)
    done = _done(out)
    if request.overrides:
        config = _follow(config, request)
    check_contents(out, config)
    _check_same(request, config)
    notes = contents.note(config)
    if done is None:
        notes.append(
            f"the run in {out} ended before its first checkpoint; starting from the beginning"
        )
    before, timesteps = config.settings.timesteps, _asked_timesteps(request, config)
    settings = config.settings
    if timesteps is not None:
        settings = replace(settings, timesteps=timesteps)
        check(settings, config.algo)
    settings, told = _fitted(settings, config.algo)
    notes += told
    if done is not None and settings.timesteps < done:
        raise OptionError(
            f"timesteps is {timesteps}, but the run in {out} has already done {done}; give more"
        )
    if settings.timesteps != before:
        notes += _changed_rate(settings, done or 0, before)
    if settings.timesteps > before:
        # Of a longer run the replay buffer may hold more.
        order = tuple(name for name in config.order if name != "replay_buffer")
        config = replace(config, replay_buffer=None, order=order)
    check_engine(config, request.runners)
    return PreparedRun(
        out,
        replace(config, settings=settings),
        resume=done is not None,
        notes=notes,
        runners=request.runners,
    )


def _engine(request: TrainRequest) -> str:
    engine = ENGINES[0] if request.engine is None else request.engine
    check_choice("engine", engine, ENGINES)
    return engine


def check_engine(config: Config, runners: Runners | None) -> None:
    """Raise an OptionError or MissingExtraError if a run's engine cannot train it, or has no
    runners.
    """
    if config.engine is None:
        if runners is not None:
            raise OptionError(
                "runners are of RLlib, and this run learns with stable-baselines3; ask for "
                "engine='rllib', or leave them out"
            )
        return
    if config.algo not in RLLIB_ALGOS:
        raise OptionError(f"algo is {config.algo!r}, but with RLlib there is one of {RLLIB_ALGOS}")
    if not config.env_id.startswith("flowgym/"):
        raise OptionError(
            f"env is {config.env_id!r}, which RLlib's runners in other processes would not know; "
            "train it by flowgym_gym.agents.rllib.config, which takes 'package:namespace/Name-v0'"
        )
    from flowgym_gym.agents import rllib

    _ = rllib.config  # Says what is missing where Ray is.
    runners = runners or Runners()
    check_whole("runners", runners.count, minimum=0)
    check_number("gpus_per_runner", runners.gpus, minimum=0)


def _check_same(request: TrainRequest, config: Config) -> None:
    """Raise an OptionError if a run is to be resumed as another than it is."""
    for name, value, own in (
        ("engine", request.engine, config.engine or ENGINES[0]),
        ("env", request.env_id, config.env_id),
        ("algo", request.algo, config.algo),
        ("seed", request.seed, config.seed),
        ("num_envs", request.num_envs, config.settings.num_envs),
    ):
        if value is not None and value != own:
            raise OptionError(
                f"{name} is {value!r}, but the run in {request.out} has {own!r} and resumes with "
                "that"
            )


def _asked_timesteps(request: TrainRequest, config: Config) -> int | None:
    """Of a run that is resumed, as the argument or the changes have it.

    Raises:
        OptionError: If the changes have something else that the run does not have.
    """
    if not request.overrides:
        return request.timesteps
    check_arguments(request.overrides, timesteps=request.timesteps)
    asked = override(config.settings, request.overrides, config.env_id, config.algo)
    changed, _ = _fitted(asked, config.algo)
    found = differences(changed, config.settings)
    if found:
        raise OptionError(
            f"{'; '.join(found)}: settings cannot change when the run in {request.out} is resumed, "
            "only timesteps can"
        )
    return request.timesteps if request.timesteps is not None else changed.timesteps


def _follow(config: Config, request: TrainRequest) -> Config:
    """The configuration of a run whose files are at another place now, if changes name that and it
    holds the same.
    """
    settings = config.settings
    changed = override(
        settings, request.overrides or {}, request.env_id, request.algo or config.algo
    )
    moves = contents.moved(config, contents.resolved(changed.env))
    if not moves:
        return config
    return replace(
        config,
        settings=replace(settings, env=contents.replaced(settings.env, moves)),
        contents=contents.relocated(config["contents"], moves),
        # What checkpoints say of the environment names the places of their time.
        moved={old: moves.get(new, new) for old, new in (config.moved or {}).items()} | moves,
    )


def _done(out: Path) -> int | None:
    """Timesteps of the newest checkpoint; None if the run ended before its first, which comes
    before any work.

    Raises:
        OptionError: If there has been work, but there is no checkpoint.
    """
    if not checkpoints(out) and not read_metrics(out / METRICS):
        return None
    return int(newest_checkpoint(out).name)


def _fitted(settings: Settings, algo: str) -> tuple[Settings, list[str]]:
    """Settings that a run can have, made of those that are asked for, and what to tell the user of
    that.
    """
    notes = []
    unit, asked = _unit(settings, algo), settings.timesteps
    settings = replace(settings, timesteps=math.ceil(asked / unit) * unit)
    if settings.timesteps != asked:
        notes.append(
            f"{asked} timesteps are rounded up to {settings.timesteps}, whole rollouts of {unit}"
        )
    batch = settings.algo.get("batch_size", BATCH_SIZE)
    if algo == "ppo" and unit % batch:
        notes.append(
            f"algo.batch_size is {batch}, and the last batch of each pass over a rollout of {unit} "
            "is smaller"
        )
    if algo != "ppo":
        random = settings.algo.get("learning_starts", LEARNING_STARTS)
        if settings.timesteps <= random:
            notes.append(
                f"timesteps is {asked}, but {algo.upper()} learns nothing in its first {random}, "
                "whose actions are random (algo.learning_starts): the agent stays the base model; "
                "give more, or set that lower"
            )
    if settings.kl_budget is not None and settings.evaluate_every is None:
        settings = replace(settings, evaluate_every=settings.checkpoint_every)
        notes.append(
            f"evaluations every {settings.evaluate_every} timesteps (evaluate_every) are held "
            "against the kl_budget"
        )
    return settings, notes


def _unit(settings: Settings, algo: str) -> int:
    """Timesteps of a rollout, the smallest piece that the algorithm collects."""
    name, default = ("n_steps", 2048) if algo == "ppo" else ("train_freq", 1)
    return int(settings.algo.get(name, default)) * settings.num_envs


def interval_length(settings: Settings, algo: str, episode_steps: int) -> int:
    """Timesteps between two moments at which the whole state of a training is known."""
    unit = _unit(settings, algo)
    return unit if algo == "ppo" else unit * math.ceil(episode_steps * settings.num_envs / unit)


def _changed_rate(settings: Settings, done: int, before: int) -> list[str]:
    """What to tell the user about the learning rate of a run whose timesteps were ``before``."""
    first, final, target = (
        settings.algo.get("learning_rate"),
        settings.final_learning_rate,
        settings.timesteps,
    )
    if final is None or first is None:
        return []
    old, new = (first + (final - first) * done / end for end in (before, target))
    return [
        f"the learning rate goes to {final:g} at {target} timesteps instead of {before}: it is "
        f"{new:.3g} now, not {old:.3g}"
    ]
