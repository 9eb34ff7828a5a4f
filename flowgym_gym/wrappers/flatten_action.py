"""``FlattenAction``: actions as vectors, for libraries that know no others."""

from __future__ import annotations

from typing import Any, TypeVar

import gymnasium
import numpy as np
from torch import Tensor

from flowgym_gym.envs.rollout import as_array
from flowgym_gym.errors import ActionError, OptionError
from flowgym_gym.types import oddity

A = TypeVar("A", np.ndarray, Tensor)


class FlattenAction(
    gymnasium.ActionWrapper[Any, np.ndarray, np.ndarray], gymnasium.utils.RecordConstructorArgs
):
    """The agent's actions are vectors of ``C * H * W`` numbers, channel by channel, row by row.

    Many libraries take vectors alone. Where the latent is large, put a :class:`CoarseAction`
    inside, which leaves few numbers. Actions that are vectors already stay as they are.

    Args:
        env: An environment with actions in a ``Box`` of at least one dimension.

    Raises:
        OptionError: If its actions are of another kind.

    >>> import gymnasium, flowgym_gym
    >>> from flowgym_gym.wrappers import CoarseAction
    >>> env = gymnasium.make("flowgym/StableDiffusion-Red-v0")
    >>> FlattenAction(env).action_space.shape
    (256,)
    >>> FlattenAction(CoarseAction(env, resolution=2)).action_space.shape
    (16,)
    """

    def __init__(self, env: gymnasium.Env[Any, np.ndarray]) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self)
        gymnasium.ActionWrapper.__init__(self, env)
        self.action_space = flat_space(env.action_space)

    def action(self, action: np.ndarray) -> np.ndarray:
        """Give an action of shape ``(C * H * W,)`` the environment's own shape."""
        return unflatten(action, self.action_space, self.env.action_space)


def flat_space(space: gymnasium.Space[Any]) -> gymnasium.spaces.Box:
    """The action space of vectors with the same bounds.

    Raises:
        OptionError: If the space is no box of at least one dimension.
    """
    if not isinstance(space, gymnasium.spaces.Box) or not space.shape:
        raise OptionError(
            f"FlattenAction needs actions in a Box of at least one dimension, got {space}"
        )
    return gymnasium.spaces.Box(space.low.flatten(), space.high.flatten(), dtype=np.float32)


def unflatten(action: A, flat_space: gymnasium.Space[Any], space: gymnasium.Space[Any]) -> A:
    """An action, or a batch of them, of one space in the shape of the other.

    Raises:
        ActionError: If the action does not have the shape of ``flat_space``.
    """
    flat, shape = flat_space.shape, space.shape
    assert shape is not None
    if not isinstance(action, Tensor):  # which stays one
        action = as_array(action, flat or ())
    elif odd := oddity(action):
        raise ActionError(f"action is {odd}, expected float32 numbers of shape {flat}")
    if action.shape != flat:
        raise ActionError(f"action has shape {tuple(action.shape)}, expected {flat}")
    return action.reshape(shape)
