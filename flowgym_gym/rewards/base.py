"""The interface of a reward function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic

import torch
from torch import Tensor

from flowgym_gym.errors import RewardError
from flowgym_gym.types import D


class Reward(ABC, Generic[D]):
    """Scores finished samples.

    A subclass defines ``forward``; users call the instance, which checks what comes back.
    """

    @abstractmethod
    def forward(self, x: D, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Score a batch.

        Args:
            x: Samples, batch first; images are ``(n, 3, H, W)`` in [0, 1].
            **kwargs: The episode's keyword arguments, such as ``prompt``, a list of ``n`` strings.

        Returns:
            Rewards and whether each sample is valid (0 or 1, or bool), both of shape ``(n,)``.
        """

    def __call__(self, x: D, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Score a batch and check the result.

        Returns:
            Rewards, float, and validity, bool, both of shape ``(n,)``.

        Raises:
            RewardError: If ``forward`` returns something else, or NaN for a sample.
        """
        name = type(self).__name__
        result = self.forward(x, **kwargs)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise RewardError(f"{name}.forward returned {type(result).__name__}, expected (rewards, valids)")
        for values, label in zip(result, ("rewards", "valids"), strict=True):
            if not isinstance(values, Tensor) or values.shape != (len(x),):
                got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                raise RewardError(f"{name}.forward returned {label} of {got}, expected a tensor of shape ({len(x)},)")
        rewards, valids = result
        bad = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
        if bad:
            raise RewardError(
                f"{name}.forward returned {rewards[bad[0]].item()} for sample {bad[0]} of {len(x)}", sample=bad[0]
            )
        return rewards, valids.to(torch.bool)
