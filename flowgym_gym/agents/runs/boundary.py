"""The state of a training between two intervals, kept in memory: what is saved if the next interval
fails.

A reward that raises, an interrupt or a lack of memory stops an interval somewhere within it, where
the state of a run is not one that it can go on from. So what an interval changes is copied before
it begins: weights, optimisers, counters, random states, running episodes, and of a full replay
buffer the transitions that the interval overwrites.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictReplayBuffer

from flowgym_gym.agents.kinds import Options, SomeOptions
from flowgym_gym.agents.runs.buffers import buffer_views
from flowgym_gym.agents.runs.checkpoints import save_checkpoint
from flowgym_gym.agents.runs.state import State, capture_state, restore_counters
from flowgym_gym.agents.sb3.vec_env import SB3VecEnv


class Boundary:
    """Keeps the newest state between two intervals.

    Args:
        model: The agent, between two intervals.
        env: Its environment.
        timesteps: Of an interval at most, of all sub-environments together.
    """

    def __init__(self, model: BaseAlgorithm, env: SB3VecEnv, timesteps: int) -> None:
        self._model, self._env = model, env
        self._rows = -(-timesteps // env.num_envs)
        self._state: State = ({}, {})
        self._weights: Options = {}
        self._variables: Options = {}
        self._progress: Options = {}
        self._buffer: Options | None = None

    @property
    def timesteps(self) -> int:
        """Timesteps of the state that is kept."""
        return int(self._state[0]["timesteps"])

    def keep(self, progress: SomeOptions) -> None:
        """Copy the state; ``progress`` is what a checkpoint keeps of the training loop."""
        model = self._model
        numbers, arrays = capture_state(model, self._env)
        buffer = getattr(model, "replay_buffer", None)
        # All is copied before anything is kept: a copy may fail for lack of memory.
        (
            self._state, self._weights, self._variables, self._progress, self._buffer,
        ) = (
            (numbers, {name: np.array(array) for name, array in arrays.items()}),
            copy.deepcopy(model.get_parameters()),
            {name: getattr(model, name).detach().clone() for name in _variables(model)},
            copy.deepcopy(dict(progress)),
            self._rows_to_come(buffer) if isinstance(buffer, DictReplayBuffer) else None,
        )  # fmt: skip

    def save(self, out: Path) -> Path:
        """Put the agent back to the state that was kept, and write that as a checkpoint.

        The environment stays as it is: what a checkpoint keeps of it has been copied.
        """
        model = self._model
        restore_counters(model, self._state[0])
        model.set_parameters(self._weights, exact_match=True, device=model.device)
        for name, value in self._variables.items():
            getattr(model, name).data = value
        if self._buffer is not None:
            self._restore_rows(self._buffer)
        return save_checkpoint(out, model, self._env, self._progress, self._state)

    def _rows_to_come(self, buffer: DictReplayBuffer) -> Options:
        """Where a buffer stands, and what it holds where the next interval writes."""
        size = buffer.buffer_size
        rows = (buffer.pos + np.arange(min(self._rows, size))) % size
        if not buffer.full:
            # What lies behind has not been written yet, so only rows from the beginning on can be
            # lost.
            rows = rows[rows < buffer.pos]
        held = {name: view[rows] for name, view in buffer_views(buffer).items()}
        return {"pos": buffer.pos, "full": buffer.full, "rows": rows, "held": held}

    def _restore_rows(self, kept: SomeOptions) -> None:
        buffer: Any = self._model.replay_buffer  # type: ignore[attr-defined]
        for name, view in buffer_views(buffer).items():
            view[kept["rows"]] = kept["held"][name]
        buffer.pos, buffer.full = kept["pos"], kept["full"]


def _variables(model: BaseAlgorithm) -> list[str]:
    """Names of the tensors that an algorithm saves besides its networks."""
    return list(model._get_torch_save_params()[1])
