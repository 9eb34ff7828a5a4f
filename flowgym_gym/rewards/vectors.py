"""Rewards of points in low dimensions, for which optimal control can be worked out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowgym_gym.checks import check_number
from flowgym_gym.errors import OptionError, shown
from flowgym_gym.rewards.base import Reward
from flowgym_gym.types import FlowTensor, real_tensor


class BinaryReward(Reward[FlowTensor]):
    """1 where every coordinate lies within [low, high], else 0.

    Args:
        low: Lower end, included.
        high: Upper end, included.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        check_number("low", low)
        check_number("high", high, minimum=low)
        self.low, self.high = low, high

    def forward(self, x: FlowTensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Score points of shape ``(n, d)``; see :class:`Reward`."""
        inside = ((x.data >= self.low) & (x.data <= self.high)).flatten(1).all(dim=1)
        return inside.to(x.dtype), torch.ones_like(inside)


class GaussianReward(Reward[FlowTensor]):
    """Density of a normal distribution at the point; at most ``(2 pi std^2)^(-d / 2)``.

    Args:
        mean: Where it is highest, ``d`` numbers.
        std: Standard deviation in every dimension.
    """

    differentiable = True

    def __init__(self, mean: Sequence[float] = (-2.5,), std: float = 0.8) -> None:
        check_number("std", std, minimum=0)
        try:
            self.mean = real_tensor(mean)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            self.mean = torch.empty(0, device="cpu")
        if (
            std == 0
            or self.mean.ndim != 1
            or not len(self.mean)
            or not torch.isfinite(self.mean).all()
        ):
            raise OptionError(
                f"mean is {shown(mean)} and std {std}, expected at least one number, and a number "
                "above 0"
            )
        self.std = float(std)

    def forward(self, x: FlowTensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Score points of shape ``(n, d)``; see :class:`Reward`."""
        if x.data.shape[1:] != self.mean.shape:
            raise OptionError(
                f"points have shape {tuple(x.data.shape[1:])}, but mean has "
                f"{tuple(self.mean.shape)}"
            )
        distance = ((x.data - self.mean.to(x.data)) / self.std).square().sum(dim=1)
        rewards = torch.exp(-0.5 * distance) / (2 * math.pi * self.std**2) ** (len(self.mean) / 2)
        return rewards, torch.ones_like(rewards, dtype=torch.bool)
