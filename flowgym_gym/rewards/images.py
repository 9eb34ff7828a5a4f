"""Rewards of images that need no weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowgym_gym.rewards.base import Reward
from flowgym_gym.types import FlowTensor


class RedReward(Reward[FlowTensor]):
    """Mean of the red channel, in [0, 1].

    White has a full red channel too and scores 1.
    """

    def forward(self, x: FlowTensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Score images of shape ``(n, 3, H, W)`` in [0, 1]; see :class:`Reward`."""
        rewards = x.data[:, 0].mean(dim=(1, 2))
        return rewards, torch.ones_like(rewards, dtype=torch.bool)
