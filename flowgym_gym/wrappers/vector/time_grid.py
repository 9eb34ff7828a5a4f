"""``TimeGrid`` for vector environments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gymnasium.vector import VectorEnv

from flowgym_gym.wrappers.check import check_denoising
from flowgym_gym.wrappers.vector.mode import KnowsAutoresetMode, Wrapper

if TYPE_CHECKING:
    from flowgym_gym.time_grid import Steps


class TimeGrid(KnowsAutoresetMode, Wrapper):
    """Visit other times; see :class:`flowgym_gym.wrappers.TimeGrid`.

    Args:
        env: A denoising vector environment, wrapped or not.
        steps: Number of steps of an episode, or the times they start from.
        spacing: ``"leading"``, ``"trailing"`` or ``"linspace"``; None for the checkpoint's own.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], steps: Steps, spacing: str | None = None) -> None:
        super().__init__(env)
        check_denoising(env)
        env.unwrapped.set_time_grid(steps, spacing)  # type: ignore[attr-defined]
