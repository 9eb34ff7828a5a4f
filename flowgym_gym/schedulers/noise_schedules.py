"""Noise schedules: the diffusion coefficient of the Euler-Maruyama sampler as a function of time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowgym_gym.checks import check_number

if TYPE_CHECKING:
    from flowgym_gym.schedulers.base import Scheduler


class NoiseSchedule(ABC):
    """The diffusion coefficient ``sigma(t)``."""

    @abstractmethod
    def __call__(self, t: Tensor) -> Tensor:
        """``sigma`` at times ``t`` of shape ``(n,)``."""


class MemorylessNoiseSchedule(NoiseSchedule):
    r""":math:`\sigma_t = \sqrt{2 \eta_t}`, which makes the final sample independent of the initial noise.

    References:
        Domingo-Enrich et al., Adjoint Matching, ICLR 2025.
    """

    def __init__(self, scheduler: Scheduler[Any]) -> None:
        self.scheduler = scheduler

    def __call__(self, t: Tensor) -> Tensor:
        """``sigma`` at times ``t`` of shape ``(n,)``; infinite where ``alpha`` is 0."""
        return torch.sqrt(2 * self.scheduler.eta(t))


class ConstantNoiseSchedule(NoiseSchedule):
    """The same ``sigma`` at every time; at least 0.

    Raises:
        OptionError: If ``sigma`` is not a finite number of at least 0.
    """

    def __init__(self, sigma: float) -> None:
        check_number("sigma", sigma, minimum=0)
        self.sigma = float(sigma)

    def __call__(self, t: Tensor) -> Tensor:
        """``sigma`` at times ``t`` of shape ``(n,)``."""
        return torch.full_like(t, self.sigma)
