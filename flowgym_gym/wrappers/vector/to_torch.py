"""``ToTorch`` for vector environments."""

from __future__ import annotations

from typing import Any

from gymnasium.vector import VectorEnv
from torch import Tensor

from flowgym_gym.envs.rollout import rollout_of
from flowgym_gym.wrappers.check import check_own_observations
from flowgym_gym.wrappers.to_torch import tensors
from flowgym_gym.wrappers.vector.mode import KnowsAutoresetMode, Wrapper


class ToTorch(KnowsAutoresetMode, Wrapper):
    """Tensors on the model's device in place of arrays; see :class:`flowgym_gym.wrappers.ToTorch`.

    Args:
        env: A denoising vector environment, wrapped or not. ``final_obs`` stays as it is.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        self._rollout = rollout_of(env)
        check_own_observations(env)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], Any]:
        """Start episodes; tensors of shape ``(n, *)``."""
        observations, infos = self.env.reset(seed=seed, options=options)
        return tensors(self._rollout, observations), infos

    def step(self, actions: Any) -> tuple[dict[str, Tensor], Any, Any, Any, dict[str, Any]]:
        """Take a step with actions of tensors or arrays."""
        observations, rewards, terminations, truncations, infos = self.env.step(actions)
        return tensors(self._rollout, observations), rewards, terminations, truncations, infos
