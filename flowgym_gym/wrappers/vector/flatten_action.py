"""``FlattenAction`` for vector environments."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from flowgym_gym.wrappers.flatten_action import flat_space, unflatten
from flowgym_gym.wrappers.vector.mode import ActionWrapper, KnowsAutoresetMode


class FlattenAction(KnowsAutoresetMode, ActionWrapper):
    """The agents' actions are vectors; see :class:`flowgym_gym.wrappers.FlattenAction`.

    Args:
        env: A vector environment with actions of shape ``(n, C, H, W)``.
    """

    def __init__(self, env: VectorEnv[Any, np.ndarray, np.ndarray]) -> None:
        super().__init__(env)
        self.single_action_space = flat_space(env.single_action_space)
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    def actions(self, actions: np.ndarray) -> np.ndarray:
        """Give actions of shape ``(n, C * H * W)`` the environment's own shape."""
        return unflatten(actions, self.action_space, self.env.action_space)
