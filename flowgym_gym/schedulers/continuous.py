"""Schedules of flow-matching models, in closed form over continuous time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowgym_gym.errors import OptionError
from flowgym_gym.schedulers.base import Scheduler
from flowgym_gym.types import FlowTensor


class OptimalTransportScheduler(Scheduler[FlowTensor]):
    r"""Straight paths: :math:`\alpha_t = t`, :math:`\beta_t = 1 - t` (Lipman et al., Flow Matching,
    ICLR 2023).
    """

    def _alpha(self, t: Tensor) -> Tensor:
        return t

    def _alpha_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class CosineScheduler(Scheduler[FlowTensor]):
    r"""Cosine paths: :math:`\alpha_t = 1 - \cos^2(\tfrac{\pi}{2} t^\nu)`, :math:`\beta_t = 1 -
    \alpha_t`.

    Grids begin where :math:`t^\nu = 0.01`: at time 0 the path stands still and nothing can be
    steered.

    Args:
        nu: Exponent of the time; above 0.
    """

    def __init__(self, nu: float = 1.0) -> None:
        if not (math.isfinite(nu) and nu > 0):
            raise OptionError(f"nu is {nu!r}, expected a finite number above 0")
        self.nu = nu
        # alpha and its derivative are both 0 at time 0; here alpha is 2.5e-4.
        self.first_time = 0.01 ** (1 / nu)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * t**self.nu) ** 2

    def _alpha_dot(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * self.nu * t ** (self.nu - 1) * torch.sin(math.pi * t**self.nu)
