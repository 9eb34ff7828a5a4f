"""``CoarseAction``: the agent acts on a low-resolution grid."""

from __future__ import annotations

from typing import Any, TypeVar

import gymnasium
import numpy as np
from torch import Tensor

from flowgym_gym.envs.rollout import as_array
from flowgym_gym.errors import ActionError, OptionError, shown
from flowgym_gym.types import oddity

A = TypeVar("A", np.ndarray, Tensor)


class CoarseAction(
    gymnasium.ActionWrapper[Any, np.ndarray, np.ndarray], gymnasium.utils.RecordConstructorArgs
):
    """The agent acts on a low-resolution grid that is upsampled to the latent's size (nearest
    neighbour).

    A Gaussian policy over thousands of dimensions cannot be trained by likelihood ratios: a shift
    of 0.01 standard deviations in each of 16,384 dimensions already puts almost every ratio outside
    PPO's clipping range.

    Args:
        env: An environment with actions of shape ``(C, H, W)``.
        resolution: Side of the grid the agent acts on; 1 gives one number per channel.

    Raises:
        OptionError: If ``resolution`` is not a whole number from 1 to ``min(H, W)``.

    >>> import gymnasium, flowgym_gym
    >>> env = CoarseAction(gymnasium.make("flowgym/StableDiffusion-Red-v0"), resolution=2)
    >>> env.action_space.shape
    (4, 2, 2)
    """

    def __init__(self, env: gymnasium.Env[Any, np.ndarray], resolution: int) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self, resolution=resolution)
        gymnasium.ActionWrapper.__init__(self, env)
        self.resolution = resolution
        self.action_space = coarse_space(env.action_space, resolution)

    def action(self, action: np.ndarray) -> np.ndarray:
        """Upsample an action of shape ``(C, resolution, resolution)``."""
        return upsample(action, self.action_space, self.env.action_space)


def coarse_space(space: gymnasium.Space[Any], resolution: int) -> gymnasium.spaces.Box:
    """The action space at another resolution; leading dimensions are kept.

    Raises:
        OptionError: If the space is no box of images, or the resolution does not fit it.
    """
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) < 3:
        raise OptionError(f"CoarseAction needs actions of shape (C, H, W), got {space}")
    height, width = space.shape[-2:]
    if (
        isinstance(resolution, bool)
        or not isinstance(resolution, int)
        or not 1 <= resolution <= min(height, width)
    ):
        raise OptionError(
            f"resolution is {shown(resolution)}, expected a whole number from 1 to "
            f"{min(height, width)}"
        )
    shape = (*space.shape[:-2], resolution, resolution)
    return gymnasium.spaces.Box(float(space.low.min()), float(space.high.max()), shape, np.float32)


def upsample(action: A, coarse_space: gymnasium.Space[Any], space: gymnasium.Space[Any]) -> A:
    """Nearest-neighbour upsampling of the last two dimensions, from one action space to the other.

    Raises:
        ActionError: If the action does not have the shape of ``coarse_space``.
    """
    coarse, fine = coarse_space.shape, space.shape
    assert coarse is not None
    assert fine is not None
    if not isinstance(action, Tensor):  # which stays one
        action = as_array(action, coarse)
    elif odd := oddity(action):
        raise ActionError(f"action is {odd}, expected float32 numbers of shape {coarse}")
    if action.shape != coarse:
        raise ActionError(f"action has shape {tuple(action.shape)}, expected {coarse}")
    rows = np.arange(fine[-2]) * coarse[-2] // fine[-2]
    columns = np.arange(fine[-1]) * coarse[-1] // fine[-1]
    return action[..., rows[:, None], columns]
