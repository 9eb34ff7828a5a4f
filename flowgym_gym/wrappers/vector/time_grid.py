"""``TimeGrid`` for vector environments."""

from __future__ import annotations

from typing import Any

from gymnasium.vector import VectorEnv

from flowgym_gym.envs.rollout import rollout_of
from flowgym_gym.time_grid import Steps
from flowgym_gym.wrappers.vector.mode import KnowsAutoresetMode, Wrapper


class TimeGrid(KnowsAutoresetMode, Wrapper):
    """Visit other times; see :class:`flowgym_gym.wrappers.TimeGrid`.

    Args:
        env: A denoising vector environment, wrapped or not.
        steps: Number of steps of an episode, or the times they start from.
        spacing: ``"leading"``, ``"trailing"`` or ``"linspace"``; None for the checkpoint's own.
    """

    def __init__(
        self, env: VectorEnv[Any, Any, Any], steps: Steps, spacing: str | None = None
    ) -> None:
        super().__init__(env)
        rollout_of(env).set_time_grid(steps, spacing)
