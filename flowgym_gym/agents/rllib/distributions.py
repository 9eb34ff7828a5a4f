"""Distributions of actions that keep their shape ``(C, h, w)``.

RLlib's own take vectors. These take logits of shape ``(n, 2 C, h, w)``, means and then logarithms
of standard deviations, and sum over all dimensions of an action.
"""

from __future__ import annotations

import math

import torch
from ray.rllib.core.distribution.torch.torch_distribution import (
    TorchDeterministic,
    TorchDiagGaussian,
    TorchSquashedGaussian,
)
from torch import Tensor
from torch.nn import functional


def sum_of_dimensions(values: Tensor) -> Tensor:
    """Shape ``(n, *)`` to ``(n,)``."""
    return values.flatten(1).sum(1)


class LatentGaussian(TorchDiagGaussian):
    """Independent normal distributions; actions beyond the limits are clipped for the environment
    alone.
    """

    @classmethod
    def from_logits(cls, logits: Tensor, **kwargs: object) -> LatentGaussian:
        """From logits ``(n, 2 C, h, w)``."""
        mean, log_std = logits.chunk(2, dim=1)
        return cls(loc=mean, scale=log_std.exp())

    def logp(self, value: Tensor, **kwargs: object) -> Tensor:
        """Logarithm of the density of actions, ``(n,)``."""
        return sum_of_dimensions(self._dist.log_prob(value))

    def entropy(self) -> Tensor:
        """Differential entropy, ``(n,)``."""
        return sum_of_dimensions(self._dist.entropy())

    def kl(self, other: LatentGaussian, **kwargs: object) -> Tensor:
        """Divergence from another one, ``(n,)``."""
        return sum_of_dimensions(torch.distributions.kl_divergence(self._dist, other._dist))


class LatentSquashedGaussian(TorchSquashedGaussian):
    """Normal distributions whose samples tanh brings into (-1, 1)."""

    @classmethod
    def from_logits(cls, logits: Tensor, **kwargs: object) -> LatentSquashedGaussian:
        """From logits ``(n, 2 C, h, w)``."""
        mean, log_std = logits.chunk(2, dim=1)
        return cls(loc=mean, scale=log_std.exp())

    def to_deterministic(self) -> TorchDeterministic:
        """The action of the mean: squashed, too, which RLlib's own leaves out."""
        return TorchDeterministic(loc=self._squash(self.loc))

    def _squashed_logp(self, unsquashed: Tensor) -> Tensor:
        # log(1 - tanh(x)^2), in a form that stays finite.
        jacobian = 2 * (math.log(2) - unsquashed - functional.softplus(-2 * unsquashed))
        return sum_of_dimensions(self._dist.log_prob(unsquashed) - jacobian)
