"""``RewardScale``: another weight of the terminal reward, with the control costs as they are."""

from __future__ import annotations

from typing import Any

import gymnasium

from flowgym_gym.checks import check_weight
from flowgym_gym.envs.rollout import rollout_of


class RewardScale(gymnasium.Wrapper[Any, Any, Any, Any], gymnasium.utils.RecordConstructorArgs):
    """Weigh the terminal reward by ``scale`` instead of the environment's ``reward_scale``; control
    costs stay.

    Gymnasium's ``TransformReward`` would scale both.

    Args:
        env: A denoising environment, wrapped or not.
        scale: The new weight.

    >>> import gymnasium, flowgym_gym
    >>> env = RewardScale(gymnasium.make("flowgym/StableDiffusion-Red-v0"), scale=10.0)
    >>> env.reward_scale
    10.0
    """

    def __init__(self, env: gymnasium.Env[Any, Any], scale: float) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self, scale=scale)
        gymnasium.Wrapper.__init__(self, env)
        check_weight("scale", scale)
        rollout_of(env)  # which refuses environments that pay no such reward
        self._difference = scale - env.get_wrapper_attr("reward_scale")
        self.reward_scale = float(scale)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step, with the terminal reward weighed anew."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if "terminal_reward" in info:
            reward = float(reward) + self._difference * info["terminal_reward"]
        return observation, float(reward), terminated, truncated, info
