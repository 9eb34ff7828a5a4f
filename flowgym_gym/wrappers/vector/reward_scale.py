"""``RewardScale`` for vector environments."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from flowgym_gym.checks import check_weight
from flowgym_gym.envs.rollout import rollout_of
from flowgym_gym.wrappers.vector.mode import KnowsAutoresetMode, Wrapper


class RewardScale(KnowsAutoresetMode, Wrapper):
    """Weigh the terminal reward by ``scale``; see :class:`flowgym_gym.wrappers.RewardScale`.

    Args:
        env: A denoising vector environment, wrapped or not.
        scale: The new weight.
    """

    def __init__(self, env: VectorEnv[Any, Any, np.ndarray], scale: float) -> None:
        super().__init__(env)
        check_weight("scale", scale)
        rollout_of(env)  # which refuses environments that pay no such reward
        self._difference = scale - _reward_scale(env)
        self.reward_scale = float(scale)

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step, with the terminal rewards weighed anew."""
        observations, rewards, terminations, truncations, infos = self.env.step(actions)
        # In SAME_STEP mode the infos of an ended episode are those of its final step.
        for source in (infos, infos.get("final_info", {})):
            if "terminal_reward" in source:
                rewards = rewards + self._difference * source["terminal_reward"]
        return observations, rewards, terminations, truncations, infos


def _reward_scale(env: VectorEnv[Any, Any, Any]) -> float:
    """The weight that the outermost wrapper which has one gives, or else the environment's own."""
    outermost: Any = env
    while not hasattr(outermost, "reward_scale"):
        outermost = outermost.env
    return float(outermost.reward_scale)
