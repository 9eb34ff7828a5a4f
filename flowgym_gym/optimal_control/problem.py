"""The decision problem inside an environment, whatever neutral wrappers stand around it."""

from __future__ import annotations

from typing import Any

import gymnasium
import torch

from flowgym_gym.envs.environment import Environment, seeded
from flowgym_gym.errors import OptionError
from flowgym_gym.wrappers import FlattenAction, RewardScale, TimeGrid
from flowgym_gym.wrappers.vector import FlattenAction as VectorFlattenAction
from flowgym_gym.wrappers.vector import RewardScale as VectorRewardScale
from flowgym_gym.wrappers.vector import TimeGrid as VectorTimeGrid

# What may stand around a denoising environment without changing its decision problem.
NEUTRAL = (
    FlattenAction,
    RewardScale,
    TimeGrid,
    VectorFlattenAction,
    VectorRewardScale,
    VectorTimeGrid,
    gymnasium.wrappers.OrderEnforcing,
    gymnasium.wrappers.PassiveEnvChecker,
    gymnasium.wrappers.RecordEpisodeStatistics,
    gymnasium.wrappers.RecordVideo,
    gymnasium.wrappers.vector.RecordEpisodeStatistics,
    gymnasium.wrappers.vector.RecordVideo,
)


def decision_problem(env: Any) -> tuple[Environment[Any], float]:
    """The torch environment behind any of its interfaces, and the weight of the terminal reward."""
    scale: float | None = None
    if isinstance(env, Environment):
        environment: Environment[Any] = env
    else:
        if not isinstance(env, gymnasium.Env | gymnasium.vector.VectorEnv):
            raise OptionError(f"env is a {type(env).__name__}, expected a flowgym environment")
        rollout = getattr(env.unwrapped, "rollout", None)
        if rollout is None:
            raise OptionError(f"env is {env}, expected a flowgym environment")
        environment = rollout.environment
        wrapper: Any = env
        while wrapper is not env.unwrapped:
            if not isinstance(wrapper, NEUTRAL):
                raise OptionError(
                    f"the wrapper {type(wrapper).__name__} may change the problem; take it off"
                )
            if scale is None and isinstance(wrapper, RewardScale | VectorRewardScale):
                scale = wrapper.reward_scale
            wrapper = wrapper.env
    with seeded(0), torch.no_grad():
        x, kwargs = environment.start(4096)
    if kwargs:
        raise OptionError(
            f"the model's predictions depend on {sorted(kwargs)}, which this solver does not know "
            "of"
        )
    mean, std = x.data.double().mean().item(), x.data.double().std().item()
    if abs(mean) > 0.1 or abs(std - 1) > 0.1:
        raise OptionError(
            f"initial states have mean {mean:.3g} and std {std:.3g}, expected standard normal noise"
        )
    return environment, environment.reward_scale if scale is None else scale
