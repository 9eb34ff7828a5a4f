"""Rewards: what a finished sample is worth."""

from flowgym_gym.rewards.base import Reward
from flowgym_gym.rewards.images import RedReward

__all__ = ["RedReward", "Reward"]
