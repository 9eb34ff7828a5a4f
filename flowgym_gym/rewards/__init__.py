"""Rewards: what a finished sample is worth."""

from flowgym_gym.rewards.base import Reward
from flowgym_gym.rewards.images import RedReward
from flowgym_gym.rewards.vectors import BinaryReward, GaussianReward

__all__ = ["BinaryReward", "GaussianReward", "RedReward", "Reward"]
