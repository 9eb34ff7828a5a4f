"""Run folders: configuration, checkpoints that hold every bit of state, and metrics.

A checkpoint is a folder ``checkpoints/<timesteps>/`` that appears in one piece: it is written under
another name (``writing-...``), brought to the disk, and renamed. The same goes for single files, so
that neither a killed process nor a power cut leaves half of one under its name.

``model.zip``
    The agent as stable-baselines3 saves it: networks and optimisers.
``state.json``, ``state.npz``
    Counters, random states (Python, numpy, torch, action space, one generator per sub-environment),
    the running episodes, what the reward remembers, and the last observation.
``replay_buffer.npz``
    What is in the replay buffer of SAC and TQC; only the newest checkpoint has it.

The checkpoint of the agent that did best in the evaluations of the run lies in
``best/<timesteps>/``, without a replay buffer. ``prompts.json`` holds the prompts of a run that
come from a file or dataset (:mod:`flowgym_gym.agents.runs.contents`).

Reading one back loads tensors, numbers and text only; a pickle that would make anything else is
refused.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.save_util import load_from_zip_file

from flowgym_gym.agents.kinds import AnyVectorEnv, Options, SomeOptions
from flowgym_gym.agents.runs.buffers import buffer_arrays, buffer_bytes
from flowgym_gym.agents.runs.config import why
from flowgym_gym.agents.runs.files import BEST, CHECKPOINTS, UNREADABLE, WRITING, sync, write_json
from flowgym_gym.agents.runs.memory import readable
from flowgym_gym.agents.runs.metrics import Row
from flowgym_gym.agents.runs.state import (
    State,
    as_progress,
    capture_state,
    load_arrays,
    relocated,
    restore_state,
    reward_of,
    set_reward_state,
)
from flowgym_gym.agents.sb3.vec_env import SB3VecEnv
from flowgym_gym.errors import CheckpointError, OptionError, shown

KEPT_CHECKPOINTS = 3
# What a run writes besides its checkpoints: pictures, a film, metrics, configuration.
OTHER_BYTES = 20_000_000


def needed_space(model: BaseAlgorithm, env: SB3VecEnv, best: bool = False) -> int:
    """Bytes that a run takes on the disk at most.

    While a checkpoint is written, the older ones are still there: one more than are kept, and two
    replay buffers.

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
    """Raise an OptionError if the disk has no room for what the run will write to ``out``; see
    :func:`needed_space`.
    """
    existing = next(
        folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists()
    )
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    needed, free = needed_space(model, env, best) - written, shutil.disk_usage(existing).free
    if needed > free:
        buffer = buffer_bytes(model)
        cause = (
            f", of which twice {readable(buffer)} for the replay buffer (algo.buffer_size)"
            if buffer
            else ""
        )
        raise OptionError(
            f"the run in {out} needs about {readable(needed)} of disk space{cause}, but "
            f"{readable(free)} are free; make room, or choose another folder"
        )


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
    progress: SomeOptions,
    state: State | None = None,
) -> Path:
    """Write a checkpoint, and delete what is older than the few that are kept.

    Args:
        out: The run folder.
        model: The agent, between two rollouts.
        env: Its environment.
        progress: Further numbers and arrays of the training loop, returned by
            :func:`restore_checkpoint`.
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


def save_best(
    out: Path, model: BaseAlgorithm, env: SB3VecEnv, progress: SomeOptions, evaluation: Row
) -> Path:
    """Keep the agent as the best so far, with its evaluation and in place of the one before."""
    target = out / BEST / f"{model.num_timesteps:09d}"
    # From a run that was killed and lost what it did after its last checkpoint.
    shutil.rmtree(target, ignore_errors=True)
    _write_checkpoint(
        target, model, capture_state(model, env), {**progress, "evaluation": evaluation}
    )
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
    progress: SomeOptions,
    buffer: DictReplayBuffer | None = None,
) -> None:
    """Write a folder in one piece."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=WRITING, dir=target.parent))
    try:
        model.save(temporary / "model.zip")
        plain = {k: v for k, v in progress.items() if not isinstance(v, np.ndarray)}
        arrays = state[1] | {
            f"progress.{k}": v for k, v in progress.items() if isinstance(v, np.ndarray)
        }
        write_json(temporary / "state.json", {**state[0], "progress": plain})
        np.savez(temporary / "state.npz", **arrays)  # type: ignore[arg-type]
        if buffer is not None:
            np.savez(temporary / "replay_buffer.npz", **buffer_arrays(buffer))  # type: ignore[arg-type]
        temporary.chmod(0o755)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(target.parent)


def restore_checkpoint(
    checkpoint: Path, model: BaseAlgorithm, env: SB3VecEnv, moved: Mapping[str, str] | None = None
) -> Options:
    """Put agent, environment and random states back to where they were when the checkpoint was
    written.

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
        numbers = read_numbers(checkpoint)
        arrays = load_arrays(checkpoint / "state.npz")
        arrays["env.settings"] = relocated(arrays["env.settings"], moved or {})
        progress = as_progress(model, numbers, arrays)
        load_weights(checkpoint, model)
        restore_state(model, env, numbers, arrays)
    except UNREADABLE as error:
        raise unreadable(checkpoint, error) from error
    return progress


def unreadable(checkpoint: Path, error: BaseException) -> CheckpointError:
    """The error of a checkpoint whose reading raised another."""
    return CheckpointError(f"checkpoint {checkpoint} cannot be read: {why(error)}")


def read_numbers(checkpoint: Path) -> Options:
    """What ``state.json`` of a checkpoint holds; raises whatever it may where that is not of this
    checkpoint.
    """
    numbers = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    if not isinstance(numbers, dict):
        raise ValueError(f"state.json holds {shown(numbers, 40)}, expected an object")
    timesteps = numbers["timesteps"]
    if type(timesteps) is not int or timesteps != int(checkpoint.name):
        raise ValueError(
            f"state.json is of {shown(timesteps, 40)} timesteps, not of {checkpoint.name}"
        )
    return numbers


def freeze_reward(env: AnyVectorEnv, checkpoint: Path | None) -> None:
    """Let a reward that remembers what it has scored know what it knew at a checkpoint, and nothing
    more.

    Args:
        env: Whose reward.
        checkpoint: Its folder; None for a reward that knows nothing.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
    """
    if not reward_of(env).stateful:
        return
    if checkpoint is not None:
        try:
            set_reward_state(env, load_arrays(checkpoint / "state.npz"))
        except UNREADABLE as error:
            raise unreadable(checkpoint, error) from error
    reward_of(env).freeze()


def load_weights(checkpoint: Path, model: BaseAlgorithm) -> None:
    """Load networks and optimisers into an agent with the same settings."""
    with zipfile.ZipFile(checkpoint / "model.zip") as archive:
        # Archives lie in the archive, and of one that is cut off one of those is opened.
        if "policy.pth" not in archive.namelist():
            raise ValueError("model.zip is cut off, or holds no agent")
    # Without its data, which are pickled, an archive holds tensors only, and torch is told to
    # accept nothing else.
    _, parameters, variables = load_from_zip_file(
        checkpoint / "model.zip", device=model.device, load_data=False
    )
    model.set_parameters(parameters, exact_match=True, device=model.device)
    for name in model._get_torch_save_params()[1]:
        getattr(model, name).data = (variables or {})[name].data
    if not all(bool(parameter.isfinite().all()) for parameter in model.policy.parameters()):
        raise ValueError("model.zip holds NaN or infinity")


def newest_checkpoint(out: Path) -> Path:
    """The newest checkpoint, or an OptionError if there is none."""
    found = checkpoints(out)
    if not found:
        raise OptionError(f"{out} holds no checkpoint; start the run again in another folder")
    return found[0]
