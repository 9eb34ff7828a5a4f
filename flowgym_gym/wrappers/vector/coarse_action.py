"""``CoarseAction`` for vector environments."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from flowgym_gym.wrappers.coarse_action import coarse_space, upsample
from flowgym_gym.wrappers.vector.mode import ActionWrapper, KnowsAutoresetMode


class CoarseAction(KnowsAutoresetMode, ActionWrapper):
    """The agents act on a low-resolution grid; see :class:`flowgym_gym.wrappers.CoarseAction`.

    Args:
        env: A vector environment with actions of shape ``(n, C, H, W)``.
        resolution: Side of the grid.
    """

    def __init__(self, env: VectorEnv[Any, np.ndarray, np.ndarray], resolution: int) -> None:
        super().__init__(env)
        self.resolution = resolution
        self.single_action_space = coarse_space(env.single_action_space, resolution)
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    def actions(self, actions: np.ndarray) -> np.ndarray:
        """Upsample actions of shape ``(n, C, resolution, resolution)``."""
        return upsample(actions, self.action_space, self.env.action_space)
