"""``ToTorch``: tensors on the model's device in place of arrays."""

from __future__ import annotations

from typing import Any

import gymnasium
import torch
from torch import Tensor

from flowgym_gym.envs.rollout import Rollout, rollout_of
from flowgym_gym.wrappers.check import check_own_observations


class ToTorch(gymnasium.Wrapper[Any, Any, Any, Any], gymnasium.utils.RecordConstructorArgs):
    """Observations are torch tensors on the model's device, and actions may be; the latent is
    handed out uncopied.

    What stays as it is: rewards, infos, and the spaces, which describe the same numbers.
    Gymnasium's ``NumpyToTorch`` would carry every latent from the device to the CPU and back. The
    latent is the environment's own: do not write to it.

    Args:
        env: A denoising environment, wrapped or not.

    Raises:
        OptionError: If a wrapper inside changes the observations.

    >>> import gymnasium, flowgym_gym
    >>> env = ToTorch(gymnasium.make("flowgym/StableDiffusion-Red-v0"))
    >>> observation, info = env.reset(seed=0)
    >>> observation["latent"].shape, observation["latent"].device
    (torch.Size([4, 8, 8]), device(type='cpu'))
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self)
        gymnasium.Wrapper.__init__(self, env)
        self._rollout = rollout_of(env)
        check_own_observations(env)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Start an episode; tensors of shape ``(*)``."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._tensors(observation), info

    def step(self, action: Any) -> tuple[dict[str, Tensor], Any, bool, bool, dict[str, Any]]:
        """Take a step with an action of tensors or arrays."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._tensors(observation), reward, terminated, truncated, info

    def _tensors(self, observation: dict[str, Any]) -> dict[str, Tensor]:
        batched = tensors(self._rollout, {name: value[None] for name, value in observation.items()})
        return {name: value[0] for name, value in batched.items()}


def tensors(rollout: Rollout, observation: dict[str, Any]) -> dict[str, Tensor]:
    """A batched observation of arrays as tensors on the device of the ``rollout`` that it was made
    of.
    """
    latents = rollout.latents
    rest = {
        name: torch.from_numpy(value).to(latents.device)
        for name, value in observation.items()
        if name != "latent"
    }
    return {"latent": latents, **rest}
