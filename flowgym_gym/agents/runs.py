"""Run folders: configuration, checkpoints that hold every bit of state, and metrics.

A checkpoint is a folder ``checkpoints/<timesteps>/`` that appears in one piece: it is written under another name
(``writing-...``), brought to the disk, and renamed. The same goes for single files, so that neither a killed process
nor a power cut leaves half of one under its name.

``model.zip``
    The agent as stable-baselines3 saves it: networks and optimisers.
``state.json``, ``state.npz``
    Counters, random states (Python, numpy, torch, action space, one generator per sub-environment), the running
    episodes, what the reward remembers, and the last observation.
``replay_buffer.npz``
    What is in the replay buffer of SAC and TQC; only the newest checkpoint has it.

The checkpoint of the agent that did best in the evaluations of the run lies in ``best/<timesteps>/``, without a replay
buffer. ``prompts.json`` holds the prompts of a run that come from a file or dataset
(:mod:`flowgym_gym.agents.contents`).

Reading one back loads tensors, numbers and text only; a pickle that would make anything else is refused.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import os
import platform
import random
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.save_util import load_from_zip_file

from flowgym_gym.agents.contents import check_contents, check_form, drawn_prompts
from flowgym_gym.agents.memory import readable
from flowgym_gym.agents.settings import (
    check,
    check_algorithm,
    check_names,
    complete,
    full_id,
    make_algorithm,
    make_vector_env,
)
from flowgym_gym.agents.vec_env import SB3VecEnv
from flowgym_gym.console import say
from flowgym_gym.defaults import plain_defaults
from flowgym_gym.errors import (
    CheckpointError,
    FlowGymError,
    OptionError,
    UnknownIdError,
    reason,
    shown,
)
from flowgym_gym.rewards import Reward

Config = dict[str, Any]
Row = dict[str, float | int | None]
# Numbers and text, and arrays.
State = tuple[dict[str, Any], dict[str, np.ndarray]]

CONFIG = "config.json"
METRICS = "metrics.csv"
CHECKPOINTS = "checkpoints"
BEST = "best"
WHICH = ("best", "newest")
# Names under which files and folders are written before they get their own.
WRITING = "writing-"
KEPT_CHECKPOINTS = 3
# What a run writes besides its checkpoints: pictures, a film, metrics, configuration.
OTHER_BYTES = 20_000_000
NO_CONFIG = "put a copy of it back, or begin another run"
LIBRARIES = ("flowgym_gym", "gymnasium", "stable_baselines3", "torch", "numpy", "diffusers", "transformers")
# What reading a half-written or foreign file can raise: json, zipfile, numpy, torch and whatever they call.
UNREADABLE = Exception
# Words that the state of numpy's Mersenne twister has; a position beyond them would be read from foreign memory.
TWISTER_WORDS = 624


def check_new(out: Path) -> None:
    """Raise an OptionError unless a new run can be written to the folder ``out``; creates nothing."""
    if out.exists() and not out.is_dir():
        raise OptionError(f"{out} is a file, expected a folder for the run")
    if out.is_dir() and any(not path.name.startswith(WRITING) for path in out.iterdir()):
        advice = (
            "resume it (--resume), or choose another folder" if (out / CONFIG).is_file() else "choose another folder"
        )
        raise OptionError(f"{out} is not empty; {advice}")
    check_writable(out)


def check_writable(out: Path) -> None:
    """Raise an OptionError if files cannot be made in ``out``, or ``out`` cannot be made."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OptionError(f"{out} cannot be written: no permission to make files in {existing}")


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
        raise CheckpointError(f"{path} is damaged: {_why(error)}; {NO_CONFIG}") from error
    try:
        check_names(settings, full_id(env_id), algo)
        check(settings, algo)
    except UnknownIdError:
        raise
    except UNREADABLE as error:
        raise CheckpointError(f"{path} does not describe a run: {_why(error)}") from error
    return {**config, "settings": settings}


def _why(error: BaseException) -> str:
    """What a reader raised; of this package's errors the message alone."""
    return reason(error) if isinstance(error, FlowGymError) else f"{type(error).__name__}: {reason(error)}"


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one piece."""
    with whole_file(path) as file:
        json.dump(content, file, indent=2, default=_plain)
        file.write("\n")


@contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """A text file to write to that gets its name when all of it is on the disk, or never."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=WRITING, delete=False, encoding="utf-8", newline=""
        ) as file:
            temporary = Path(file.name)
            yield file
        sync(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or what a folder says of its entries, is on the disk."""
    if path.is_dir():
        with suppress(OSError):  # Not every system can do this for a folder.
            _fsync(path, os.O_RDONLY)
    else:
        _fsync(path, os.O_RDWR)


def remove_leftovers(out: Path) -> None:
    """Delete what a killed process was writing."""
    for folder in (out, out / CHECKPOINTS, out / BEST):
        for path in folder.glob(f"{WRITING}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a run folder to this process; the lock ends with the process, however that ends.

    Raises:
        OptionError: If another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OptionError(f"another process is training in {out}; wait for it, or choose another folder") from error
        except OSError:  # A file system without locks.
            pass
        yield
    finally:
        os.close(descriptor)


def needed_space(model: BaseAlgorithm, env: SB3VecEnv, best: bool = False) -> int:
    """Bytes that a run takes on the disk at most.

    While a checkpoint is written, the older ones are still there: one more than are kept, and two replay buffers.

    Args:
        model: The agent, after its ``learn`` has been called once.
        env: Its environment.
        best: Whether the best agent is kept, too.
    """
    weights = sum(int(tensor.nbytes) for tensor in model.policy.state_dict().values())
    states = sum(int(np.asarray(array).nbytes) for array in capture_state(model, env)[1].values())
    # Adam keeps two numbers for each weight.
    checkpoint = 3 * weights + states + 120_000
    return (KEPT_CHECKPOINTS + 1 + 2 * best) * checkpoint + 2 * buffer_bytes(model) + OTHER_BYTES


def check_space(out: Path, model: BaseAlgorithm, env: SB3VecEnv, best: bool = False) -> None:
    """Raise an OptionError if the disk has no room for what the run will write to ``out``; see :func:`needed_space`."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    needed, free = needed_space(model, env, best) - written, shutil.disk_usage(existing).free
    if needed > free:
        buffer = buffer_bytes(model)
        cause = f", of which twice {readable(buffer)} for the replay buffer (algo.buffer_size)" if buffer else ""
        raise OptionError(
            f"the run in {out} needs about {readable(needed)} of disk space{cause}, but {readable(free)} are free; "
            "make room, or choose another folder"
        )


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def checkpoints(out: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    return _numbered(out / CHECKPOINTS)


def _numbered(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    names = re.compile(r"[0-9]{1,18}")
    found = [path for path in folder.glob("*") if path.is_dir() and names.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def save_checkpoint(
    out: Path,
    model: BaseAlgorithm,
    env: SB3VecEnv,
    progress: Mapping[str, Any],
    state: State | None = None,
) -> Path:
    """Write a checkpoint, and delete what is older than the few that are kept.

    Args:
        out: The run folder.
        model: The agent, between two rollouts.
        env: Its environment.
        progress: Further numbers and arrays of the training loop, returned by :func:`restore_checkpoint`.
        state: What :func:`capture_state` returned; that of now if None.
    """
    target = out / CHECKPOINTS / f"{model.num_timesteps:09d}"
    if target.is_dir():
        return target
    buffer = getattr(model, "replay_buffer", None)
    _write_checkpoint(
        target,
        model,
        state or capture_state(model, env),
        progress,
        buffer if isinstance(buffer, DictReplayBuffer) else None,
    )
    for old in checkpoints(out)[1:]:
        with suppress(OSError):  # Something else lies there, which takes no space of ours.
            (old / "replay_buffer.npz").unlink(missing_ok=True)
    for old in checkpoints(out)[KEPT_CHECKPOINTS:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def save_best(out: Path, model: BaseAlgorithm, env: SB3VecEnv, progress: Mapping[str, Any], evaluation: Row) -> Path:
    """Keep the agent as the best so far, with its evaluation and in place of the one before."""
    target = out / BEST / f"{model.num_timesteps:09d}"
    # From a run that was killed and lost what it did after its last checkpoint.
    shutil.rmtree(target, ignore_errors=True)
    _write_checkpoint(target, model, capture_state(model, env), {**progress, "evaluation": evaluation})
    for old in _numbered(target.parent):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def best_checkpoint(out: Path) -> Path | None:
    """The checkpoint of the best agent; None if there is none."""
    return max(_numbered(out / BEST), key=_return, default=None)


def best_return(out: Path) -> float:
    """Mean return of the best agent in its evaluation; minus infinity if there is none."""
    best = best_checkpoint(out)
    return -math.inf if best is None else _return(best)


def _return(checkpoint: Path) -> float:
    try:
        numbers = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        found = float(numbers["progress"]["evaluation"]["return"])
    except UNREADABLE:
        return -math.inf
    return -math.inf if math.isnan(found) else found


def _write_checkpoint(
    target: Path,
    model: BaseAlgorithm,
    state: State,
    progress: Mapping[str, Any],
    buffer: DictReplayBuffer | None = None,
) -> None:
    """Write a folder in one piece."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=WRITING, dir=target.parent))
    try:
        model.save(temporary / "model.zip")
        plain = {k: v for k, v in progress.items() if not isinstance(v, np.ndarray)}
        arrays = state[1] | {f"progress.{k}": v for k, v in progress.items() if isinstance(v, np.ndarray)}
        write_json(temporary / "state.json", {**state[0], "progress": plain})
        np.savez(temporary / "state.npz", **arrays)  # type: ignore[arg-type]
        if buffer is not None:
            np.savez(temporary / "replay_buffer.npz", **_buffer_arrays(buffer))  # type: ignore[arg-type]
        temporary.chmod(0o755)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(target.parent)


def restore_checkpoint(
    checkpoint: Path, model: BaseAlgorithm, env: SB3VecEnv, moved: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Put agent, environment and random states back to where they were when the checkpoint was written.

    The replay buffer is not among them; see :func:`restore_buffer`.

    Args:
        checkpoint: Its folder.
        model: A new agent with the same settings whose ``learn`` has been called once.
        env: Its environment.
        moved: Places that its settings named, and where the same lies now.

    Returns:
        The ``progress`` that was saved.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    try:
        numbers = _read_numbers(checkpoint)
        arrays = _load_arrays(checkpoint / "state.npz")
        arrays["env.settings"] = _relocated(arrays["env.settings"], moved or {})
        progress = _check_state(model, numbers, arrays)
        load_weights(checkpoint, model)
        _restore(model, env, numbers, arrays)
    except UNREADABLE as error:
        raise _unreadable(checkpoint, error) from error
    return progress


def _unreadable(checkpoint: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"checkpoint {checkpoint} cannot be read: {_why(error)}")


def _read_numbers(checkpoint: Path) -> dict[str, Any]:
    """What ``state.json`` of a checkpoint holds; raises whatever it may where that is not of this checkpoint."""
    numbers = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    if not isinstance(numbers, dict):
        raise ValueError(f"state.json holds {shown(numbers, 40)}, expected an object")
    timesteps = numbers["timesteps"]
    if type(timesteps) is not int or timesteps != int(checkpoint.name):
        raise ValueError(f"state.json is of {shown(timesteps, 40)} timesteps, not of {checkpoint.name}")
    return numbers


def _check_state(model: BaseAlgorithm, numbers: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Raise a ValueError or KeyError where a state is not one of this agent; returns its ``progress``.

    What the environment and the random generators check themselves is not checked here.
    """
    n = model.n_envs
    prompts, (_, _, gauss) = numbers["prompts"], numbers["python_random"]
    counts = {name: numbers[name] for name in ("n_updates", "episode_num")}
    progress = dict(numbers["progress"])
    counts["progress.episodes"] = progress["episodes"]
    for name, value in counts.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} is {shown(value, 40)}, expected a count")
    seconds = progress["seconds"]
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        raise ValueError(f"progress.seconds is {shown(seconds, 40)}, expected a time")
    if len(prompts) != n or not all(prompt is None or isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts is {shown(prompts, 40)}, expected {n} texts")
    if gauss is not None and not isinstance(gauss, float):
        raise ValueError(f"python_random ends in {shown(gauss, 40)}, expected a number or null")
    if not 0 <= int(numbers["numpy_random"]["state"]["pos"]) <= TWISTER_WORDS:
        raise ValueError("numpy_random has a position outside of its words")

    last = {f"observation.{name}": value for name, value in model._last_obs.items()}  # type: ignore[union-attr]
    expected = {"episode_starts": model._last_episode_starts, **last}
    expected |= {f"progress.{name}": np.zeros(n) for name in ("costs", "returns")}
    for name, like in expected.items():
        _check_array(name, arrays[name], like)
        if name.startswith("progress."):
            progress[name.removeprefix("progress.")] = arrays[name]
    return progress


def _check_array(name: str, array: np.ndarray, like: Any) -> None:
    if array.shape != like.shape or array.dtype != like.dtype or not np.isfinite(array).all():
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}, expected finite {like.dtype} of shape {like.shape}"
        )


def restore_buffer(candidates: Sequence[Path], model: BaseAlgorithm) -> str | None:
    """Fill an agent's replay buffer, if it has one.

    Args:
        candidates: The checkpoint that the agent goes on from, then others, whose transitions do as well if its own
            are gone: the agent learns from whatever was done.
        model: The agent; its buffer is empty.

    Returns:
        What to tell the user if the buffer is not the checkpoint's own.
    """
    buffer = getattr(model, "replay_buffer", None)
    if not isinstance(buffer, DictReplayBuffer):
        return None
    for checkpoint in candidates:
        try:
            _restore_buffer(buffer, _load_arrays(checkpoint / "replay_buffer.npz"))
        except UNREADABLE:
            continue
        if checkpoint == candidates[0]:
            return None
        return f"going on with the replay buffer of {checkpoint}, so the run is no longer what it would have been"
    return (
        f"the replay buffer of {candidates[0]} is missing or damaged; going on with an empty one, so the run is no "
        "longer what it would have been"
    )


def freeze_reward(env: VectorEnv[Any, Any, Any], checkpoint: Path | None) -> None:
    """Let a reward that remembers what it has scored know what it knew at a checkpoint, and nothing more.

    Args:
        env: Whose reward.
        checkpoint: Its folder; None for a reward that knows nothing.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
    """
    if not _reward(env).stateful:
        return
    if checkpoint is not None:
        try:
            _set_reward_state(env, _load_arrays(checkpoint / "state.npz"))
        except UNREADABLE as error:
            raise _unreadable(checkpoint, error) from error
    _reward(env).freeze()


def with_frozen_reward(env: VectorEnv[Any, Any, Any]) -> VectorEnv[Any, Any, Any]:
    """The environment, or, if its reward remembers what it has scored, a copy whose reward stays at what it knows."""
    if not hasattr(env.unwrapped, "rollout") or not _reward(env).stateful:
        return env
    env = copy.deepcopy(env)
    _reward(env).freeze()
    return env


def load_weights(checkpoint: Path, model: BaseAlgorithm) -> None:
    """Load networks and optimisers into an agent with the same settings."""
    with zipfile.ZipFile(checkpoint / "model.zip") as archive:
        # Archives lie in the archive, and of one that is cut off one of those is opened.
        if "policy.pth" not in archive.namelist():
            raise ValueError("model.zip is cut off, or holds no agent")
    # Without its data, which are pickled, an archive holds tensors only, and torch is told to accept nothing else.
    _, parameters, variables = load_from_zip_file(checkpoint / "model.zip", device=model.device, load_data=False)
    model.set_parameters(parameters, exact_match=True, device=model.device)
    for name in model._get_torch_save_params()[1]:
        getattr(model, name).data = (variables or {})[name].data
    if not all(bool(parameter.isfinite().all()) for parameter in model.policy.parameters()):
        raise ValueError("model.zip holds NaN or infinity")


def load_agent(run: str | os.PathLike[str], which: str = "best") -> BaseAlgorithm:
    """The trained agent of a run folder with its environment (and an empty replay buffer).

    Args:
        run: The run folder, or what ``train`` returned.
        which: ``"best"``, the agent with the highest return in the run's evaluations, or the newest if it had none; or
            ``"newest"``, that of the newest checkpoint.

    Returns:
        A stable-baselines3 algorithm; ``agent.predict(observation, deterministic=True)`` acts.

    Raises:
        OptionError: If the folder holds no run or no checkpoint, ``which`` is something else, or prompts or weights
            that the run's settings name are no longer those that it was trained on.
        CheckpointError: If no checkpoint can be read; a damaged one gives way to an older one, which is said.
    """
    return open_agent(Path(run), which)[0]


@plain_defaults()
def open_agent(out: Path, which: str, only_policy: bool = False) -> tuple[BaseAlgorithm, Path]:
    """The agent of a run, and the checkpoint it comes from; see :func:`load_agent`.

    Args:
        out: The run folder.
        which: ``"best"`` or ``"newest"``.
        only_policy: Whether its environment does not matter: then files that have changed since the training are
            said, and no error.
    """
    config = read_config(out)
    candidates = _candidates(out, which)
    settings = config["settings"]
    _check_contents(out, config, only_policy)
    env = SB3VecEnv(make_vector_env(config["env_id"], settings, settings["num_envs"]))
    _check_contents(out, config, only_policy, drawn_prompts(env.vector_env))
    model = make_algorithm(config["algo"], env, settings, seed=None, buffer_size=settings["num_envs"])
    failures: list[str] = []
    for checkpoint in candidates:
        try:
            model.num_timesteps = _read_numbers(checkpoint)["timesteps"]
            load_weights(checkpoint, model)
            if _reward(env.vector_env).stateful:
                _load_arrays(checkpoint / "state.npz")
        except UNREADABLE as error:
            failures.append(str(_unreadable(checkpoint, error)))
            continue
        for failure in failures:
            say(f"{failure}; taking {checkpoint} instead")
        return model, checkpoint
    raise CheckpointError(
        f"{failures[0]}; {'no other checkpoint of' if failures[1:] else 'there is no other in'} {out} "
        f"{'can be read either' if failures[1:] else 'to take instead'}"
    )


def _check_contents(out: Path, config: Config, only_said: bool, prompts: Sequence[str] | None = None) -> None:
    try:
        check_contents(out, config, prompts)
    except OptionError as error:
        if not only_said:
            raise
        if prompts is None:
            say(str(error))


def _candidates(out: Path, which: str) -> list[Path]:
    """Checkpoints of a run in the order in which they are taken: one that is damaged gives way to the next."""
    if which not in WHICH:
        raise OptionError(f"which is {which!r}, expected one of {WHICH}")
    newest_checkpoint(out)
    best = best_checkpoint(out) if which == "best" else None
    return [*([] if best is None else [best]), *checkpoints(out)]


def newest_checkpoint(out: Path) -> Path:
    """The newest checkpoint, or an OptionError if there is none."""
    found = checkpoints(out)
    if not found:
        raise OptionError(f"{out} holds no checkpoint; start the run again in another folder")
    return found[0]


class Metrics:
    """A CSV file such as ``metrics.csv``: one row per interval of training, or per evaluation.

    Args:
        path: The file.
        columns: Its columns; the first is ``timesteps``.
        needed: Those that every row has a number in.
    """

    def __init__(self, path: Path, columns: Iterable[str], needed: Sequence[str] = ("timesteps",)) -> None:
        self.path = path
        self.columns, self._needed = list(columns), needed

    def start(self, timesteps: int = 0) -> list[Row]:
        """Begin the file, or go on after the row of ``timesteps``: later rows belong to work that was lost.

        Returns:
            The rows that are there.
        """
        kept = (
            [row for row in read_metrics(self.path, self._needed) if (row["timesteps"] or 0) <= timesteps]
            if timesteps
            else []
        )
        with whole_file(self.path) as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        return kept

    def append(self, row: Row) -> None:
        """Add a row."""
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns, extrasaction="ignore").writerow(row)

    def sync(self) -> None:
        """Wait until the rows are on the disk."""
        sync(self.path)


def read_metrics(path: Path, columns: Sequence[str] = ("timesteps",)) -> list[Row]:
    """Rows of a ``metrics.csv``; empty cells are None. A last line that was cut off is left out.

    Args:
        path: The file.
        columns: Those that must be there, with a number in every row.

    Raises:
        CheckpointError: If another line is damaged, or such a column is missing.
    """
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read()
        lines = io.StringIO(text[: text.rfind("\n") + 1], newline="")
        rows = list(csv.DictReader(lines, strict=True))
        if any(None in row or None in row.values() for row in rows):
            raise ValueError("a line has not as many cells as there are columns")
        found = [{k: _number(v) for k, v in row.items()} for row in rows]
        for row in found:
            if missing := [name for name in columns if row.get(name) is None]:
                raise ValueError(f"a row has no {missing[0]}")
            if type(row["timesteps"]) is not int or row["timesteps"] < 0:
                raise ValueError(f"timesteps is {row['timesteps']}, expected a count")
        return found
    except UNREADABLE as error:
        raise CheckpointError(
            f"{path} is damaged: {type(error).__name__}: {error}; repair it, or move it away to go on without its rows"
        ) from error


def _number(text: str) -> float | int | None:
    if not text:
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)


def capture_state(model: BaseAlgorithm, env: SB3VecEnv) -> State:
    """State of agent, environment and random generators; arrays that the agent goes on with are not copied."""
    numbers = {
        "timesteps": model.num_timesteps,
        "n_updates": model._n_updates,
        "episode_num": model._episode_num,
        "prompts": [info.get("prompt") for info in env.reset_infos],
        "python_random": random.getstate(),
        "numpy_random": np.random.get_state(legacy=False),
        "action_space_random": model.action_space.np_random.bit_generator.state,
    }
    arrays = {
        "torch_random": torch.get_rng_state().numpy(),
        **{f"env.{key}": value for key, value in env.vector_env.unwrapped.get_state().items()},  # type: ignore[attr-defined]
        **{f"reward.{key}": value for key, value in _reward(env.vector_env).get_state().items()},
        "episode_starts": model._last_episode_starts,
        **{f"observation.{key}": value for key, value in model._last_obs.items()},  # type: ignore[union-attr]
    }
    if torch.cuda.is_available():
        arrays |= {f"cuda_random.{i}": s.numpy() for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return numbers, arrays  # type: ignore[return-value]


def _restore(
    model: BaseAlgorithm, env: SB3VecEnv, numbers: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Undo :func:`capture_state`. The random states come last: what is done before them draws numbers."""
    state = {key.removeprefix("env."): value for key, value in arrays.items() if key.startswith("env.")}
    env.vector_env.unwrapped.set_state(state)  # type: ignore[attr-defined]
    _set_reward_state(env.vector_env, arrays)
    env.reset_infos = [{} if prompt is None else {"prompt": prompt} for prompt in numbers["prompts"]]

    restore_counters(model, numbers)
    model._last_episode_starts = arrays["episode_starts"]
    model._last_obs = {
        key.removeprefix("observation."): value for key, value in arrays.items() if key.startswith("observation.")
    }

    model.action_space.np_random.bit_generator.state = numbers["action_space_random"]
    version, words, gauss = numbers["python_random"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = numbers["numpy_random"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch.from_numpy(arrays["torch_random"]))
    cuda = [torch.from_numpy(arrays[key]) for key in sorted(arrays) if key.startswith("cuda_random.")]
    if cuda and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


def restore_counters(model: BaseAlgorithm, numbers: Mapping[str, Any]) -> None:
    """Put an agent's counters back to those of :func:`capture_state`."""
    model.num_timesteps = numbers["timesteps"]
    model._n_updates = numbers["n_updates"]
    model._episode_num = numbers["episode_num"]


def _relocated(settings: np.ndarray, moved: Mapping[str, str]) -> np.ndarray:
    """What a state says of its environment, with the places of now."""
    if not moved:
        return settings
    names = {json.dumps(old): json.dumps(new) for old, new in moved.items()}
    # In one pass: two places may have changed with each other.
    return np.array(re.sub("|".join(map(re.escape, names)), lambda found: names[found[0]], str(settings)))


def _reward(env: VectorEnv[Any, Any, Any]) -> Reward[Any]:
    reward: Reward[Any] = env.unwrapped.rollout.environment.reward  # type: ignore[attr-defined]
    return reward


def _set_reward_state(env: VectorEnv[Any, Any, Any], arrays: Mapping[str, np.ndarray]) -> None:
    state = {key.removeprefix("reward."): value for key, value in arrays.items() if key.startswith("reward.")}
    if state:
        _reward(env).set_state(state)


def _buffer_arrays(buffer: DictReplayBuffer) -> dict[str, np.ndarray]:
    """The filled part of a replay buffer."""
    filled = buffer.buffer_size if buffer.full else buffer.pos
    arrays = {name: array[:filled] for name, array in buffer_views(buffer).items()}
    return arrays | {"pos": np.array(buffer.pos), "full": np.array(buffer.full)}


def _restore_buffer(buffer: DictReplayBuffer, arrays: Mapping[str, np.ndarray]) -> None:
    """Put saved transitions into a buffer; of one of another size, the newest that fit, the oldest first."""
    size, pos, full = buffer.buffer_size, int(arrays["pos"]), bool(arrays["full"])
    filled = len(arrays["rewards"])
    if pos not in (range(max(filled, 1)) if full else (filled,)):
        raise ValueError(f"pos is {pos} in a buffer of {filled} transitions")
    for name, view in buffer_views(buffer).items():
        array, shape = arrays[name], (filled, *view.shape[1:])
        if array.shape != shape or array.dtype != view.dtype:
            raise ValueError(f"{name} has shape {array.shape} and {array.dtype}, expected {shape} and {view.dtype}")
    rows = np.arange(filled)
    if not (full and filled == size):
        rows = (rows + pos * full)[-size:] % max(filled, 1)
        pos, full = len(rows) % size, len(rows) == size
    for name, view in buffer_views(buffer).items():
        view[: len(rows)] = arrays[name][rows]
    buffer.pos, buffer.full = pos, full


def buffer_views(buffer: DictReplayBuffer) -> dict[str, np.ndarray]:
    """The arrays of a replay buffer by name, not copied."""
    views = {name: getattr(buffer, name) for name in ("actions", "rewards", "dones", "timeouts")}
    for name in ("observations", "next_observations"):
        views |= {f"{name}.{key}": array for key, array in getattr(buffer, name).items()}
    return views


def buffer_bytes(model: BaseAlgorithm) -> int:
    """Size of an agent's replay buffer; 0 if it has none."""
    buffer = getattr(model, "replay_buffer", None)
    return sum(array.nbytes for array in buffer_views(buffer).values()) if isinstance(buffer, DictReplayBuffer) else 0


def _fsync(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (ValueError, AttributeError) as error:
        # numpy takes what it does not know for a pickle and would advise to open it.
        raise ValueError(f"{path.name} is damaged, or holds other things than arrays of numbers and text") from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a plain value")
