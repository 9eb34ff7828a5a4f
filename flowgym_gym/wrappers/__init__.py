"""Wrappers for single environments; :mod:`flowgym_gym.wrappers.vector` mirrors them for vector
environments.
"""

from flowgym_gym.wrappers import vector as vector
from flowgym_gym.wrappers.coarse_action import CoarseAction
from flowgym_gym.wrappers.flatten_action import FlattenAction
from flowgym_gym.wrappers.reward_scale import RewardScale
from flowgym_gym.wrappers.time_grid import TimeGrid
from flowgym_gym.wrappers.to_torch import ToTorch

__all__ = ["CoarseAction", "FlattenAction", "RewardScale", "TimeGrid", "ToTorch"]
