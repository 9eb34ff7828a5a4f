"""Training runs: prepared (checked before any long work), run, interrupted and resumed.

Training goes in intervals: one rollout and one update for PPO, one episode of every sub-environment for SAC and TQC.
Between two intervals the whole state is known, so this is where the agent is evaluated, where checkpoints are written
and where a run stops; a resumed run does what the uninterrupted one would have done, bit by bit. The state before the
running interval is kept in memory, and saved if the interval fails.
"""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from flowgym_gym.agents import contents
from flowgym_gym.agents.bars import Bar
from flowgym_gym.agents.boundary import Boundary
from flowgym_gym.agents.contents import check_contents
from flowgym_gym.agents.evaluation import (
    EVALUATIONS,
    QUANTITIES,
    Episodes,
    Evaluations,
    check_seed,
    deterministic,
    evaluation_env,
    held_out_seeds,
    play,
    watch,
)
from flowgym_gym.agents.memory import readable
from flowgym_gym.agents.pictures import film, learning_curve, picture_grid
from flowgym_gym.agents.records import ALGORITHM_COLUMNS, Records
from flowgym_gym.agents.runs import (
    CONFIG,
    METRICS,
    UNREADABLE,
    Config,
    Row,
    best_checkpoint,
    buffer_bytes,
    check_new,
    check_space,
    check_writable,
    checkpoints,
    load_agent,
    locked,
    newest_checkpoint,
    read_config,
    read_metrics,
    remove_leftovers,
    restore_buffer,
    restore_checkpoint,
    versions,
    write_json,
)
from flowgym_gym.agents.settings import (
    SECTIONS,
    Settings,
    check,
    check_algorithm,
    check_arguments,
    full_id,
    load_preset,
    make_algorithm,
    make_vector_env,
    override,
)
from flowgym_gym.agents.vec_env import SB3VecEnv
from flowgym_gym.console import say
from flowgym_gym.defaults import plain_defaults
from flowgym_gym.errors import CheckpointError, DivergedError, FlowGymError, OptionError, reason, shown

__all__ = ["Run", "RunResult", "load_agent", "prepare", "run", "train"]

PICTURES = 16
PLAIN_LINE_SECONDS = 10.0
_ENDS = ("", *(f"-{i}" for i in range(1, 1000)))
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


def train(
    env_id: str,
    algo: str | None = None,
    *,
    out: str | Path,
    timesteps: int | None = None,
    num_envs: int | None = None,
    seed: int | None = None,
    resume: bool = False,
    overrides: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> RunResult:
    """Train an agent with the preset of its environment, into a run folder.

    Args:
        env_id: The environment, with or without ``flowgym/``.
        algo: ``"ppo"``, ``"sac"`` or ``"tqc"``, which needs sb3-contrib; if None ``"ppo"``, with ``resume`` the run's.
        out: The run folder: new or empty, or with ``resume`` that of the run to go on with.
        timesteps: Environment steps of all sub-environments together; the preset's if None. PPO takes whole rollouts.
        num_envs: Number of sub-environments; the preset's if None.
        seed: Of the agent, and of the sub-environments by :func:`flowgym_gym.seeds`: runs with
            different seeds share no noise; 0 if None.
        resume: Go on from the newest checkpoint of ``out``, with the settings of that run; only ``timesteps`` can
            change.
        overrides: Changes to the preset by dotted name, ``{"env.noise_level": 0.5, "algo.learning_rate": 1e-4}``.
        progress: Show a progress bar where standard error is a terminal; else an occasional line.

    Returns:
        Where the run is and how far it came. On SIGINT or SIGTERM the run saves a checkpoint and returns.

    Raises:
        FlowGymError: If an argument cannot be used, or the disk has no room for the run, before any long work.
        CheckpointError: If the run folder can no longer be written, say because the disk is full; the newest checkpoint
            stays, and the run can be resumed from it.
        DivergedError: If the agent's numbers become NaN or infinite; the newest checkpoint is from before.
        Exception: Whatever a reward, a model or a lack of memory raises within the training; all that was done before
            the interval in which it came is saved, and the resumed run is bit-equal to one in which it never came.
    """
    prepared = prepare(
        env_id, algo, out=out, timesteps=timesteps, num_envs=num_envs, seed=seed, resume=resume, overrides=overrides
    )
    return run(prepared, progress)


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


@plain_defaults()
def run(prepared: Run, progress: bool = True, on_failure: Callable[[], None] = lambda: None) -> RunResult:
    """Do what :func:`prepare` has checked; see :func:`train`.

    Args:
        prepared: What is to be done.
        progress: As for :func:`train`.
        on_failure: Called when an error has stopped the training, and all of it up to that is saved.
    """
    for note in prepared.notes:
        say(note)
    out, config, algo = prepared.out, copy.deepcopy(prepared.config), prepared.config["algo"]
    settings = config["settings"]
    env = SB3VecEnv(make_vector_env(config["env_id"], settings, settings["num_envs"]))
    prompts = contents.drawn_prompts(env.vector_env)
    check_contents(out, config, prompts)
    if config.get("contents") is None:
        config["contents"] = contents.contents_of(config["env_id"], settings["env"], prompts)
    model = make_algorithm(algo, env, settings, config["seed"], config.get("replay_buffer"))
    if isinstance(model, OffPolicyAlgorithm):
        config["replay_buffer"] = model.buffer_size
        less = f" of the run's {settings['timesteps']}" if model.buffer_size < settings["timesteps"] else ""
        say(f"replay buffer: {model.buffer_size}{less} transitions, {readable(buffer_bytes(model))}")
    # Learning for no time resets the environment and makes what the algorithm needs for the first interval.
    model.learn(total_timesteps=0)
    check_space(out, model, env, best=settings["evaluate_every"] is not None)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            result = _run(prepared, config, model, env, progress, on_failure)
    except FlowGymError:
        raise
    except (OSError, RuntimeError) as error:
        if not _is_disk_error(error, out):
            raise
        raise CheckpointError(_advice(out, error)) from error
    finally:
        env.close()
    return result


def _run(
    prepared: Run,
    config: Config,
    model: BaseAlgorithm,
    env: SB3VecEnv,
    progress: bool,
    on_failure: Callable[[], None],
) -> RunResult:
    """Train in a folder that exists and is locked."""
    out, settings = prepared.out, config["settings"]
    statistics = Statistics(settings["num_envs"])
    remove_leftovers(out)
    with Interruption() as interruption:
        if prepared.resume:
            _restore(out, model, env, statistics, config.get("moved", {}))
        else:
            # From here on the run can be resumed.
            write_json(out / CONFIG, config)
            before = _play_pictures(config)
            config["base_model"] = before.means()
            _save_pictures(out / "before.png", [("before: base model", before)])
        write_json(out / CONFIG, config)
        contents.write_prompts(out, config["contents"], contents.drawn_prompts(env.vector_env))
        with closing(Records(out, config, model, env, statistics.state)) as records:
            records.start()
            boundary = Boundary(model, env, _interval_of(config, env))
            boundary.keep(statistics.state())
            try:
                # The bar is closed before anything is said of an error.
                with closing(Progress(settings["timesteps"], model.num_timesteps, progress)) as shown:
                    stopped = _learn(model, env, config, records, statistics, interruption, shown, boundary)
            except DivergedError:
                # Going on from the last interval would only diverge again.
                raise
            except BaseException as error:
                if _save_boundary(boundary, out, error):
                    on_failure()
                raise
    # All of the training is saved now, and a signal ends the process as it does elsewhere.
    result = RunResult(out, model.num_timesteps, settings["timesteps"], interruption.signal, stopped)
    if result.stopped is not None:
        say(f"stopped at {result.timesteps} of {result.target} timesteps: {result.stopped}")
    elif result.signal is not None and result.timesteps < result.target:
        say(f"interrupted at {result.timesteps} of {result.target} timesteps; saved in {out}; resume to go on")
    try:
        _show(result, config)
    except Exception as error:
        raise _saved_all_the_same(result, error) from error
    return result


def _show(result: RunResult, config: Config) -> None:
    """Draw what a run has come to."""
    out = result.out
    save_curve(out)
    if result.signal is not None:
        return
    agent = load_agent(out)
    before, after = _play_pictures(config), _play_pictures(config, agent)
    _save_pictures(out / "after.png", [("after: trained agent", after)])
    _save_pictures(
        out / "comparison.png",
        [("base model", before), (f"agent after {agent.num_timesteps:,} steps, same seeds", after)],
    )
    _save_film(out / "episode.gif", config, agent)


def _saved_all_the_same(result: RunResult, error: Exception) -> FlowGymError:
    """The error of pictures that cannot be made, with the word that the training is not lost."""
    kind = type(error) if isinstance(error, FlowGymError) else CheckpointError
    cause = reason(error) if isinstance(error, FlowGymError) else f"{type(error).__name__}: {reason(error)}"
    return kind(
        f"the run in {result.out} is saved up to {result.timesteps} timesteps, but its pictures cannot be made: "
        f"{cause}; remove the cause, then --resume draws them"
    )


def save_curve(out: Path) -> None:
    """Draw ``learning_curve.png`` of a run from its metrics, and its evaluations if there are any.

    Raises:
        CheckpointError: If one of its files is damaged, or the picture cannot be written.
    """
    config, evaluations = read_config(out), read_metrics(out / EVALUATIONS, Evaluations.COLUMNS)
    # The untrained agent, on the seeds of the curve's other points, is the base model.
    base = next((row for row in evaluations if row["timesteps"] == 0), None)
    if base is None and config.get("base_model") is not None:
        base = _means(config["base_model"])
        if base is None:
            say(f"the base model's means in {out / CONFIG} are damaged; the curve does without them")
    evaluation = out / "evaluation.json"
    if evaluation.is_file():
        try:
            report = json.loads(evaluation.read_text(encoding="utf-8"))
            means = {name: report["base"][name]["mean"] for name in QUANTITIES}
            base = _means({**means, "episodes": report["episodes"]})
            if base is None:
                raise ValueError(f"base is {shown(report['base'], 60)}, expected numbers")
        except UNREADABLE as error:
            raise CheckpointError(
                f"{evaluation} is damaged: {type(error).__name__}: {reason(error)}; move it away"
            ) from error
    title = f"{config['env_id']}, {config['algo'].upper()}, seed {config['seed']}"
    best, picture = best_checkpoint(out), out / "learning_curve.png"
    try:
        learning_curve(
            picture,
            read_metrics(out / METRICS),
            title,
            base,
            evaluations,
            None if best is None else int(best.name),
        )
    except OSError as error:
        raise CheckpointError(f"{picture} cannot be written: {error.strerror or error}") from error


def _means(means: Any) -> Row | None:
    """Means of the base model; None unless there is a number for each quantity."""
    names = ("episodes", *QUANTITIES)
    known = {name: means.get(name) for name in names} if isinstance(means, dict) else {}
    good = known and all(type(value) in (int, float) for value in known.values())
    return known if good else None


class Statistics(BaseCallback):
    """Sums up control costs and returns of running episodes, and keeps those of the episodes that ended.

    Args:
        num_envs: Number of sub-environments.
    """

    def __init__(self, num_envs: int) -> None:
        super().__init__()
        self.episodes = 0
        self.seconds = 0.0
        self._costs = np.zeros(num_envs)
        self._returns = np.zeros(num_envs)
        self._ended: list[tuple[float, float, float, bool]] = []

    def _on_step(self) -> bool:
        infos, dones = self.locals["infos"], self.locals["dones"]
        self._costs += [info["control_cost"] for info in infos]
        self._returns += self.locals["rewards"]
        for i in np.flatnonzero(dones):
            self._ended.append(
                (infos[i]["terminal_reward"], self._costs[i], self._returns[i], infos[i].get("valid", True))
            )
        self._costs[dones] = self._returns[dones] = 0.0
        return True

    def take(self) -> Row:
        """Means of the episodes that ended since the last call; None where none did."""
        ended = np.array(self._ended, dtype=float)
        self.episodes += len(ended)
        self._ended = []
        names = ("terminal_reward", "control_cost", "return", "valid")
        means = [float(mean) for mean in ended.mean(axis=0)] if len(ended) else [None] * len(names)
        row: Row = dict(zip(names, means, strict=True))
        return {**row, "terminal_reward_std": float(ended[:, 0].std()) if len(ended) else None}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"episodes": self.episodes, "seconds": self.seconds, "costs": self._costs, "returns": self._returns}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.episodes, self.seconds = state["episodes"], state["seconds"]
        self._costs, self._returns = state["costs"].copy(), state["returns"].copy()


class Interruption:
    """Remembers SIGINT, SIGTERM and SIGHUP instead of dying of them; a second SIGINT interrupts at once.

    Signals can only be caught in the main thread; in another one this does nothing. A SIGHUP, which a terminal sends
    when it is closed, stays ignored under ``nohup``.
    """

    # Windows has no SIGHUP.
    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._remember)
                for number in self.SIGNALS
                if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN
            }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


class Progress:
    """A progress bar on standard error where that is a terminal, else a line every ten seconds.

    Args:
        target: Timesteps of the whole run.
        done: Timesteps so far.
        bar: Whether a bar is wanted.
    """

    def __init__(self, target: int, done: int, bar: bool) -> None:
        self.target = target
        self._bar = Bar(target, done) if bar else None
        self._last_line = time.monotonic()

    def update(self, steps: int, row: Row) -> None:
        """Show how far the run is."""
        shown = {"reward": row["terminal_reward"], "cost": row["control_cost"], "return": row["return"]}
        text = {name: f"{value:.4g}" for name, value in shown.items() if value is not None}
        if self._bar is not None and self._bar.shown:
            self._bar.update(steps, text)
        elif time.monotonic() - self._last_line > PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            values = " ".join(f"{name} {value}" for name, value in text.items())
            line = f"{row['timesteps']}/{self.target} timesteps, {row['steps_per_second']:.0f} a second"
            say(f"{line}: {values}" if values else line)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _learn(
    model: BaseAlgorithm,
    env: SB3VecEnv,
    config: Config,
    records: Records,
    statistics: Statistics,
    interruption: Interruption,
    shown: Progress,
    boundary: Boundary,
) -> str | None:
    """Train interval by interval until the target is reached, a signal has come, or the control cost is too high.

    Returns:
        Why training stopped early by itself, if it did.
    """
    settings, algo = config["settings"], config["algo"]
    target = settings["timesteps"]
    size = _interval_of(config, env)
    while model.num_timesteps < target and interruption.signal is None and records.excess is None:
        done, started = model.num_timesteps, time.monotonic()
        rate = _learning_rate(settings, model, done / target)
        model.lr_schedule = lambda _, rate=rate: rate  # type: ignore[misc]
        try:
            model.learn(
                min(size, target - done),
                callback=statistics,
                log_interval=None,  # type: ignore[arg-type]
                reset_num_timesteps=False,
            )
        except ValueError as error:
            # torch refuses means and deviations of a distribution that are NaN or infinite.
            if _is_finite(model) and "Expected parameter" not in str(error):
                raise
            raise _diverged(records.out, done, rate) from error
        if not _is_finite(model):
            raise _diverged(records.out, done, rate)
        seconds = time.monotonic() - started
        statistics.seconds += seconds
        steps = model.num_timesteps - done
        means = statistics.take()
        row: Row = {
            "timesteps": model.num_timesteps,
            "episodes": statistics.episodes,
            "seconds": round(statistics.seconds, 3),
            "steps_per_second": round(steps / seconds, 1),
            **means,
            **_algorithm_values(model, algo),
        }
        shown.update(steps, row)
        records.add(row, since=done)
        boundary.keep(statistics.state())
    records.save()
    return records.excess if model.num_timesteps < target else None


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


def _interval(settings: dict[str, Any], algo: str, episode_steps: int) -> int:
    unit = _unit(settings, algo)
    return unit if algo == "ppo" else unit * math.ceil(episode_steps * settings["num_envs"] / unit)


def _interval_of(config: Config, env: SB3VecEnv) -> int:
    return _interval(config["settings"], config["algo"], env.get_attr("discretization_steps")[0])


def _save_boundary(boundary: Boundary, out: Path, error: BaseException) -> bool:
    """Save what was done before the interval in which an error came; whether that worked."""
    interrupted = isinstance(error, KeyboardInterrupt)
    what = "interrupted" if interrupted else type(error).__name__
    advice = "resume to go on" if interrupted else "remove the cause, then resume to go on"
    try:
        done = int(boundary.save(out).name)
    except Exception as failure:
        say(f"{what} in training, and what was done since the last checkpoint cannot be saved: {reason(failure)}")
        return False
    say(f"{what} in training; saved in {out} up to {done} timesteps: {advice}")
    return True


def _learning_rate(settings: dict[str, Any], model: BaseAlgorithm, done: float) -> float:
    first, final = float(model.learning_rate), settings["final_learning_rate"]  # type: ignore[arg-type]
    return first if final is None else first + (float(final) - first) * done


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


def _restore(
    out: Path,
    model: BaseAlgorithm,
    env: SB3VecEnv,
    statistics: Statistics,
    moved: Mapping[str, str],
) -> None:
    """Go on from the newest checkpoint that can be read."""
    failures: dict[Path, str] = {}
    for checkpoint in checkpoints(out):
        try:
            statistics.restore(restore_checkpoint(checkpoint, model, env, moved))
        except CheckpointError as error:
            failures[checkpoint] = str(error)
            continue
        for failure in failures.values():
            say(f"{failure}; going on from {checkpoint} instead")
        note = restore_buffer([checkpoint, *failures], model)
        if note is not None:
            say(note)
        for damaged in failures:
            _put_aside(damaged)
        say(f"resuming at {model.num_timesteps} timesteps")
        return
    raise CheckpointError(next(iter(failures.values())))


def _put_aside(checkpoint: Path) -> None:
    """Give a damaged checkpoint a name that no run writes to, and that none of it has yet."""
    names = (checkpoint.with_name(f"damaged-{checkpoint.name}{end}") for end in _ENDS)
    checkpoint.rename(next(name for name in names if not os.path.lexists(name)))


def _is_finite(model: BaseAlgorithm) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in model.policy.parameters())


def _diverged(out: Path, done: int, rate: float) -> DivergedError:
    saved = int(checkpoints(out)[0].name)
    return DivergedError(
        f"the training diverged after {done} timesteps: the agent's numbers are no longer finite; its learning rate "
        f"was {rate:.3g}, take a lower one in a new run, or less extreme values where other settings are far from the "
        f"preset's ({out} keeps the agent of {saved} timesteps)"
    )


def _algorithm_values(model: BaseAlgorithm, algo: str) -> Row:
    values = model.logger.name_to_value
    return {name: float(values[f"train/{name}"]) for name in ALGORITHM_COLUMNS[algo] if f"train/{name}" in values}


def _play_pictures(config: Config, model: BaseAlgorithm | None = None) -> Episodes:
    env = evaluation_env(config, PICTURES)
    predict = None if model is None else deterministic(model)
    episodes = play(env, held_out_seeds(PICTURES), predict, pictures=PICTURES)
    env.close()
    return episodes


def _save_pictures(path: Path, parts: list[tuple[str, Episodes]]) -> None:
    if all(episodes.pictures for _, episodes in parts):
        picture_grid(path, parts)


def _save_film(path: Path, config: Config, agent: BaseAlgorithm) -> None:
    env = evaluation_env(config, 2)
    frames = watch(env, held_out_seeds(1)[0], deterministic(agent))
    env.close()
    if frames:
        film(path, frames, ("base model", "agent"))


def _is_disk_error(error: BaseException | None, out: Path) -> bool:
    """Whether an error is, or comes from, one of writing to a folder; torch hides a full disk behind its own.

    Models and rewards can raise errors of the operating system, too: of a server that is gone, or of a file elsewhere.
    """
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    if error is None or error.errno is None or isinstance(error, ConnectionError | TimeoutError):
        return False
    return error.filename is None or Path(os.fsdecode(error.filename)).absolute().is_relative_to(out.absolute())


def _advice(out: Path, error: BaseException) -> str:
    """What stopped a run, what is left of it, and what to do."""
    cause = getattr(error, "strerror", None) or reason(error)
    found = checkpoints(out)
    left = f"is saved up to {int(found[0].name)} timesteps" if found else "has no checkpoint yet"
    return f"writing to {out} failed: {cause}; the run {left}: remove the cause, then go on with --resume"
