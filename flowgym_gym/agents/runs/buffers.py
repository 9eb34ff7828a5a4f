"""Replay buffers as arrays, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictReplayBuffer

from flowgym_gym.agents.runs.files import UNREADABLE
from flowgym_gym.agents.runs.state import load_arrays


def restore_buffer(candidates: Sequence[Path], model: BaseAlgorithm) -> str | None:
    """Fill an agent's replay buffer, if it has one.

    Args:
        candidates: The checkpoint that the agent goes on from, then others, whose transitions do as
            well if its own are gone: the agent learns from whatever was done.
        model: The agent; its buffer is empty.

    Returns:
        What to tell the user if the buffer is not the checkpoint's own.
    """
    buffer = getattr(model, "replay_buffer", None)
    if not isinstance(buffer, DictReplayBuffer):
        return None
    for checkpoint in candidates:
        try:
            _restore_buffer(buffer, load_arrays(checkpoint / "replay_buffer.npz"))
        except UNREADABLE:
            continue
        if checkpoint == candidates[0]:
            return None
        return (
            f"going on with the replay buffer of {checkpoint}, so the run is no longer what it "
            "would have been"
        )
    return (
        f"the replay buffer of {candidates[0]} is missing or damaged; going on with an empty one, "
        "so the run is no longer what it would have been"
    )


def buffer_arrays(buffer: DictReplayBuffer) -> dict[str, np.ndarray]:
    """The filled part of a replay buffer."""
    filled = buffer.buffer_size if buffer.full else buffer.pos
    arrays = {name: array[:filled] for name, array in buffer_views(buffer).items()}
    return arrays | {"pos": np.array(buffer.pos), "full": np.array(buffer.full)}


def _restore_buffer(buffer: DictReplayBuffer, arrays: Mapping[str, np.ndarray]) -> None:
    """Put saved transitions into a buffer; of one of another size, the newest that fit, the oldest
    first.
    """
    size, pos, full = buffer.buffer_size, int(arrays["pos"]), bool(arrays["full"])
    filled = len(arrays["rewards"])
    if pos not in (range(max(filled, 1)) if full else (filled,)):
        raise ValueError(f"pos is {pos} in a buffer of {filled} transitions")
    for name, view in buffer_views(buffer).items():
        array, shape = arrays[name], (filled, *view.shape[1:])
        if array.shape != shape or array.dtype != view.dtype:
            raise ValueError(
                f"{name} has shape {array.shape} and {array.dtype}, expected {shape} and "
                f"{view.dtype}"
            )
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
    return (
        sum(array.nbytes for array in buffer_views(buffer).values())
        if isinstance(buffer, DictReplayBuffer)
        else 0
    )
