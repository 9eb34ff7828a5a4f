"""Wrappers for vector environments, each equal to the vector of its single version."""

from flowgym_gym.wrappers.vector.coarse_action import CoarseAction
from flowgym_gym.wrappers.vector.flatten_action import FlattenAction
from flowgym_gym.wrappers.vector.reward_scale import RewardScale
from flowgym_gym.wrappers.vector.time_grid import TimeGrid
from flowgym_gym.wrappers.vector.to_torch import ToTorch

__all__ = ["CoarseAction", "FlattenAction", "RewardScale", "TimeGrid", "ToTorch"]
