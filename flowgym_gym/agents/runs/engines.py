"""What an agent learns with: stable-baselines3 in this process, or an engine on many machines.

An engine learns for one interval, at whose end its whole state is known. All else that a run is
(its folder, evaluations, pictures, resuming) is the same for each of them, since after an interval
the weights of the actor are in a stable-baselines3 agent, whatever has trained them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from flowgym_gym.agents.kinds import Options, SomeOptions
from flowgym_gym.agents.runs.metrics import Row
from flowgym_gym.agents.runs.records import ALGORITHM_COLUMNS


class Engine(Protocol):
    """What a training learns with."""

    def learn(self, timesteps: int, rate: float) -> None:
        """Learn for one interval of at most ``timesteps`` at a learning rate; what ended is in the
        statistics of the training then, and what was learnt in its agent.
        """

    def values(self) -> Row:
        """What the algorithm reports of its last updates, in columns of ``metrics.csv``."""

    def state(self) -> Options:
        """Numbers and arrays that a checkpoint keeps beside the agent."""

    def restore(self, progress: SomeOptions) -> None:
        """Go on from what a checkpoint has kept; the agent has its weights already."""

    def close(self) -> None:
        """End what was started."""


class StableBaselines3:
    """Learning in this process; the agent's own state is all there is.

    Args:
        model: The agent.
        algo: Its algorithm.
        callbacks: Called on every step.
    """

    def __init__(self, model: BaseAlgorithm, algo: str, callbacks: Sequence[BaseCallback]) -> None:
        self._model, self._algo, self._callbacks = model, algo, list(callbacks)

    def learn(self, timesteps: int, rate: float) -> None:
        """As stable-baselines3's own ``learn``, going on."""
        self._model.lr_schedule = lambda _: rate
        self._model.learn(
            timesteps,
            callback=self._callbacks,
            log_interval=None,  # type: ignore[arg-type]
            reset_num_timesteps=False,
        )

    def values(self) -> Row:
        """What its logger holds."""
        logged = self._model.logger.name_to_value
        return {
            name: float(logged[f"train/{name}"])
            for name in ALGORITHM_COLUMNS[self._algo]
            if f"train/{name}" in logged
        }

    def state(self) -> Options:
        """Nothing beside the agent."""
        return {}

    def restore(self, progress: SomeOptions) -> None:
        """The agent is all there is."""

    def close(self) -> None:
        """Nothing was started."""
