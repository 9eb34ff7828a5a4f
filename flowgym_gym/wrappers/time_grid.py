"""``TimeGrid``: another number or spacing of the denoising steps."""

from __future__ import annotations

from typing import Any

import gymnasium

from flowgym_gym.envs.rollout import rollout_of
from flowgym_gym.time_grid import Steps


class TimeGrid(gymnasium.Wrapper[Any, Any, Any, Any], gymnasium.utils.RecordConstructorArgs):
    """Visit other times: an episode then has ``steps`` steps.

    The environment itself takes the new grid, and with it a new default action scale.

    Args:
        env: A denoising environment, wrapped or not.
        steps: Number of steps of an episode, or the times they start from.
        spacing: ``"leading"``, ``"trailing"`` or ``"linspace"``; None for the checkpoint's own.

    Raises:
        OptionError: If the model's schedule has no such grid.

    >>> import gymnasium, flowgym_gym
    >>> env = gymnasium.make("flowgym/StableDiffusion-Red-v0")
    >>> env = TimeGrid(env, steps=5, spacing="trailing")
    >>> env.unwrapped.discretization_steps
    5
    """

    def __init__(
        self, env: gymnasium.Env[Any, Any], steps: Steps, spacing: str | None = None
    ) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self, steps=steps, spacing=spacing)
        gymnasium.Wrapper.__init__(self, env)
        rollout_of(env).set_time_grid(steps, spacing)
