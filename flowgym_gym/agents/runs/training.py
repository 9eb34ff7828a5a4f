"""Training runs: prepared (checked before any long work), run, interrupted and resumed.

Training goes in intervals: one rollout and one update for PPO, one episode of every sub-environment
for SAC and TQC. Between two intervals the whole state is known, so this is where the agent is
evaluated, where checkpoints are written and where a run stops; a resumed run does what the
uninterrupted one would have done, bit by bit. The state before the running interval is kept in
memory, and saved if the interval fails.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from flowgym_gym.agents.kinds import Options, SomeOptions
from flowgym_gym.agents.runs import contents
from flowgym_gym.agents.runs.boundary import Boundary
from flowgym_gym.agents.runs.buffers import buffer_bytes, restore_buffer
from flowgym_gym.agents.runs.callbacks import Callbacks, CallbacksArgument, as_callbacks
from flowgym_gym.agents.runs.checkpoints import check_space, checkpoints, restore_checkpoint
from flowgym_gym.agents.runs.config import Config
from flowgym_gym.agents.runs.contents import check_contents
from flowgym_gym.agents.runs.cost import cost_of_long
from flowgym_gym.agents.runs.engines import Engine, StableBaselines3
from flowgym_gym.agents.runs.environments import make_vector_env
from flowgym_gym.agents.runs.files import CONFIG, locked, remove_leftovers, write_json
from flowgym_gym.agents.runs.memory import readable
from flowgym_gym.agents.runs.metrics import Row
from flowgym_gym.agents.runs.preparation import (
    PreparedRun,
    Runners,
    RunResult,
    TrainRequest,
    interval_length,
    prepare,
)
from flowgym_gym.agents.runs.presets import Settings
from flowgym_gym.agents.runs.progress import Interruption, Progress, Statistics
from flowgym_gym.agents.runs.records import Records
from flowgym_gym.agents.runs.results import play_pictures, save_pictures, show
from flowgym_gym.agents.sb3.algorithms import make_algorithm
from flowgym_gym.agents.sb3.vec_env import SB3VecEnv
from flowgym_gym.console import say
from flowgym_gym.defaults import plain_defaults
from flowgym_gym.errors import CheckpointError, DivergedError, FlowGymError, reason

_ENDS = ("", *(f"-{i}" for i in range(1, 1000)))


def train(
    env_id: str,
    algo: str | None = None,
    *,
    out: str | Path,
    timesteps: int | None = None,
    num_envs: int | None = None,
    seed: int | None = None,
    resume: bool = False,
    overrides: SomeOptions | None = None,
    progress: bool = True,
    callbacks: CallbacksArgument = None,
    engine: str | None = None,
    runners: Runners | None = None,
    logger: str | None = None,
) -> RunResult:
    """Train an agent with the preset of its environment, into a run folder.

    Args:
        env_id: The environment, with or without ``flowgym/``.
        algo: ``"ppo"``, ``"sac"`` or ``"tqc"``, which needs sb3-contrib; if None ``"ppo"``, with
            ``resume`` the run's.
        out: The run folder: new or empty, or with ``resume`` that of the run to go on with.
        timesteps: Environment steps of all sub-environments together; the preset's if None. PPO
            takes whole rollouts.
        num_envs: Number of sub-environments; the preset's if None.
        seed: Of the agent, and of the sub-environments by :func:`flowgym_gym.seeds`: runs with
            different seeds share no noise; 0 if None.
        resume: Go on from the newest checkpoint of ``out``, with the settings of that run; only
            ``timesteps`` can change.
        overrides: Changes to the preset by dotted name, ``{"env.noise_level": 0.5,
            "algo.learning_rate": 1e-4}``.
        progress: Show a progress bar where standard error is a terminal; else an occasional line.
            Of a run that will take minutes or longer, what a step of the environment costs is said
            before.
        callbacks: stable-baselines3's: a ``BaseCallback``, a function of local and global
            variables, or several. They are called on every step beside this package's own. Where
            one returns False, training stops at the end of its interval (a rollout of PPO, an
            episode of SAC and TQC), the first moment whose whole state can be saved: the run can be
            resumed, and the result's ``stopped`` names the callback. They are not part of the run:
            give them again when it is resumed.
        engine: ``"sb3"``, stable-baselines3 in this process, or ``"rllib"``, Ray's RLlib, whose
            runners play in other processes, on any machine of a cluster (extra ``rllib``); if None
            ``"sb3"``, with ``resume`` the run's. A run of RLlib is resumed from its last
            checkpoint, but not bit by bit: episodes begin anew, and so does SAC's replay buffer.
        runners: How many runners RLlib has, and where.
        logger: Where the rows of ``metrics.csv`` and ``evaluations.csv`` are copied to:
            ``"tensorboard"``, ``"wandb"`` or ``"trackio"``. None for TensorBoard where it is
            installed, and in a run that is resumed for where its rows went.

    Returns:
        Where the run is and how far it came. On SIGINT or SIGTERM the run saves a checkpoint and
        returns.

    Raises:
        FlowGymError: If an argument cannot be used, or the disk has no room for the run, before any
            long work.
        CheckpointError: If the run folder can no longer be written, say because the disk is full;
            the newest checkpoint stays, and the run can be resumed from it.
        DivergedError: If the agent's numbers become NaN or infinite; the newest checkpoint is from
            before.
        Exception: Whatever a reward, a model or a lack of memory raises within the training; all
            that was done before the interval in which it came is saved, and the resumed run is
            bit-equal to one in which it never came.
    """
    asked = as_callbacks(callbacks)
    request = TrainRequest(
        env_id,
        algo,
        out=out,
        timesteps=timesteps,
        num_envs=num_envs,
        seed=seed,
        resume=resume,
        overrides=overrides,
        engine=engine,
        runners=runners,
        logger=logger,
    )
    return carry_out(prepare(request), progress, callbacks=asked)


@plain_defaults()
def carry_out(
    prepared: PreparedRun,
    progress: bool = True,
    on_failure: Callable[[], None] = lambda: None,
    callbacks: Sequence[BaseCallback] = (),
) -> RunResult:
    """Do what :func:`prepare` has checked; see :func:`train`.

    Args:
        prepared: What is to be done.
        progress: As for :func:`train`.
        on_failure: Called when an error has stopped the training, and all of it up to that is
            saved.
        callbacks: Called beside this package's own.
    """
    for note in prepared.notes:
        say(note)
    out, config = prepared.out, copy.deepcopy(prepared.config)
    settings = config.settings
    env = SB3VecEnv(make_vector_env(config.env_id, settings, settings.num_envs))
    prompts = contents.drawn_prompts(env.vector_env)
    check_contents(out, config, prompts)
    if config.contents is None:
        config = replace(
            config, contents=contents.contents_of(config.env_id, settings.env, prompts)
        )
    # RLlib has a replay buffer of its own.
    buffer = config.replay_buffer if config.engine is None else settings.num_envs
    model = make_algorithm(config.algo, env, settings, config.seed, buffer)
    if config.engine is None and isinstance(model, OffPolicyAlgorithm):
        config = replace(config, replay_buffer=model.buffer_size)
        less = (
            f" of the run's {settings.timesteps}" if model.buffer_size < settings.timesteps else ""
        )
        say(
            f"replay buffer: {model.buffer_size}{less} transitions, {readable(buffer_bytes(model))}"
        )
    # Learning for no time resets the environment and makes what the algorithm needs for the first
    # interval.
    model.learn(total_timesteps=0)
    check_space(out, model, env, best=settings.evaluate_every is not None)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            statistics, asked = Statistics(settings.num_envs), Callbacks(callbacks)
            with closing(_engine(prepared, config, model, statistics, asked)) as engine:
                training = _Training(
                    out, config, model, env, asked, statistics, engine, prepared.logger
                )
                result = _run(training, prepared.resume, progress, on_failure)
    except FlowGymError:
        raise
    except (OSError, RuntimeError) as error:
        if not _is_disk_error(error, out):
            raise
        raise CheckpointError(_advice(out, error)) from error
    finally:
        env.close()
    return result


def _engine(
    prepared: PreparedRun,
    config: Config,
    model: BaseAlgorithm,
    statistics: Statistics,
    callbacks: Callbacks,
) -> Engine:
    if config.engine is None:
        return StableBaselines3(model, config.algo, [statistics, callbacks])
    from flowgym_gym.agents.rllib.engine import RLlib

    return RLlib(config, model, statistics, prepared.runners or Runners())


@dataclass
class _Training:
    """A training under way.

    Attributes:
        out: The run folder.
        config: What its ``config.json`` holds.
        model: The agent.
        env: Where it learns.
        callbacks: Those of whoever trains.
        statistics: Of the running episodes.
        engine: What it learns with.
        logger: Where its rows are copied to.
    """

    out: Path
    config: Config
    model: BaseAlgorithm
    env: SB3VecEnv
    callbacks: Callbacks
    statistics: Statistics
    engine: Engine
    logger: str | None = None

    def progress(self) -> Options:
        """What a checkpoint keeps beside the agent and its environment."""
        return {**self.statistics.state(), **self.engine.state()}

    @property
    def interval(self) -> int:
        """Timesteps between two moments at which the whole state is known."""
        steps = self.env.get_attr("discretization_steps")[0]
        return interval_length(self.config.settings, self.config.algo, steps)


def _run(
    training: _Training, resume: bool, progress: bool, on_failure: Callable[[], None]
) -> RunResult:
    """Train in a folder that exists and is locked."""
    out, model, target = training.out, training.model, training.config.settings.timesteps
    remove_leftovers(out)
    with Interruption() as interruption:
        _begin(training, resume)
        config, env = training.config, training.env
        if progress and config.engine is None:  # RLlib's runners step environments of their own.
            _say_cost(training)
        written = Records(out, config, model, env, training.progress, training.logger)
        with closing(written) as records:
            records.start()
            boundary = Boundary(model, env, training.interval)
            boundary.keep(training.progress())
            try:
                # The bar is closed before anything is said of an error.
                with (
                    closing(Progress(target, model.num_timesteps, progress)) as shown,
                    training.callbacks,
                ):
                    stopped = _learn(training, records, interruption, shown, boundary)
            except DivergedError:
                # Going on from the last interval would only diverge again.
                raise
            except BaseException as error:
                if _save_boundary(boundary, out, error):
                    on_failure()
                raise
    # All of the training is saved now, and a signal ends the process as it does elsewhere.
    result = RunResult(out, model.num_timesteps, target, interruption.signal, stopped)
    if result.stopped is not None:
        say(f"stopped at {result.timesteps} of {result.target} timesteps: {result.stopped}")
    elif result.signal is not None and result.timesteps < result.target:
        say(
            f"interrupted at {result.timesteps} of {result.target} timesteps; saved in {out}; "
            "resume to go on"
        )
    try:
        show(result, config)
    except Exception as error:
        raise _saved_all_the_same(result, error) from error
    return result


def _say_cost(training: _Training) -> None:
    """Say what a long training costs, if that can be told by a step in this process."""
    left = training.config.settings.timesteps - training.model.num_timesteps
    cost = cost_of_long(training.env.vector_env, left) if training.config.engine is None else None
    if cost is not None:
        say(cost)


def _begin(training: _Training, resume: bool) -> None:
    """Go on from a checkpoint, or begin the run's folder with samples of the base model."""
    out, env = training.out, training.env
    if resume:
        _restore(training)
    else:
        # From here on the run can be resumed.
        write_json(out / CONFIG, training.config.as_json())
        before = play_pictures(training.config)
        training.config = replace(training.config, base_model=before.means())
        save_pictures(out / "before.png", [("before: base model", before)])
    write_json(out / CONFIG, training.config.as_json())
    prompts = contents.drawn_prompts(env.vector_env)
    contents.write_prompts(out, training.config.contents or {}, prompts)


def _saved_all_the_same(result: RunResult, error: Exception) -> FlowGymError:
    """The error of pictures that cannot be made, with the word that the training is not lost."""
    kind = type(error) if isinstance(error, FlowGymError) else CheckpointError
    cause = (
        reason(error)
        if isinstance(error, FlowGymError)
        else f"{type(error).__name__}: {reason(error)}"
    )
    return kind(
        f"the run in {result.out} is saved up to {result.timesteps} timesteps, but its pictures "
        f"cannot be made: {cause}; remove the cause, then --resume draws them"
    )


def _learn(
    training: _Training,
    records: Records,
    interruption: Interruption,
    shown: Progress,
    boundary: Boundary,
) -> str | None:
    """Train interval by interval until the target is reached, a signal has come, or something stops
    the training.

    Returns:
        Why training stopped early by itself, if it did.
    """
    model, statistics, settings = training.model, training.statistics, training.config.settings
    target, stopped = settings.timesteps, records.excess
    while model.num_timesteps < target and interruption.signal is None and stopped is None:
        done, started = model.num_timesteps, time.monotonic()
        rate = _learning_rate(settings, model, done / target)
        _learn_interval(training, min(training.interval, target - done), rate)
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
            **training.engine.values(),
        }
        shown.update(steps, row)
        records.add(row, since=done)
        boundary.keep(training.progress())
        stopped = records.excess or training.callbacks.stopped
    records.save()
    return stopped if model.num_timesteps < target else None


def _learn_interval(training: _Training, timesteps: int, rate: float) -> None:
    """Let the agent learn for one interval.

    Raises:
        DivergedError: If its numbers are no longer finite.
    """
    model, done = training.model, training.model.num_timesteps
    try:
        training.engine.learn(timesteps, rate)
    except ValueError as error:
        # torch refuses means and deviations of a distribution that are NaN or infinite.
        if _is_finite(model) and "Expected parameter" not in str(error):
            raise
        raise _diverged(training.out, done, rate) from error
    if not _is_finite(model):
        raise _diverged(training.out, done, rate)


def _save_boundary(boundary: Boundary, out: Path, error: BaseException) -> bool:
    """Save what was done before the interval in which an error came; whether that worked."""
    interrupted = isinstance(error, KeyboardInterrupt)
    what = "interrupted" if interrupted else type(error).__name__
    advice = "resume to go on" if interrupted else "remove the cause, then resume to go on"
    try:
        done = int(boundary.save(out).name)
    except Exception as failure:
        say(
            f"{what} in training, and what was done since the last checkpoint cannot be saved: "
            f"{reason(failure)}"
        )
        return False
    say(f"{what} in training; saved in {out} up to {done} timesteps: {advice}")
    return True


def _learning_rate(settings: Settings, model: BaseAlgorithm, done: float) -> float:
    first, final = float(model.learning_rate), settings.final_learning_rate  # type: ignore[arg-type]
    return first if final is None else first + (float(final) - first) * done


def _restore(training: _Training) -> None:
    """Go on from the newest checkpoint that can be read."""
    out, model, env = training.out, training.model, training.env
    failures: dict[Path, str] = {}
    for checkpoint in checkpoints(out):
        try:
            progress = restore_checkpoint(checkpoint, model, env, training.config.moved or {})
            training.statistics.restore(progress)
            training.engine.restore(progress)
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
        f"the training diverged after {done} timesteps: the agent's numbers are no longer finite; "
        f"its learning rate was {rate:.3g}, take a lower one in a new run, or less extreme values "
        f"where other settings are far from the preset's ({out} keeps the agent of {saved} "
        "timesteps)"
    )


def _is_disk_error(error: BaseException | None, out: Path) -> bool:
    """Whether an error is, or comes from, one of writing to a folder; torch hides a full disk
    behind its own.

    Models and rewards can raise errors of the operating system, too: of a server that is gone, or
    of a file elsewhere.
    """
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    if error is None or error.errno is None or isinstance(error, ConnectionError | TimeoutError):
        return False
    return error.filename is None or Path(os.fsdecode(error.filename)).absolute().is_relative_to(
        out.absolute()
    )


def _advice(out: Path, error: BaseException) -> str:
    """What stopped a run, what is left of it, and what to do."""
    cause = getattr(error, "strerror", None) or reason(error)
    found = checkpoints(out)
    left = f"is saved up to {int(found[0].name)} timesteps" if found else "has no checkpoint yet"
    return (
        f"writing to {out} failed: {cause}; the run {left}: remove the cause, then go on with "
        "--resume"
    )
