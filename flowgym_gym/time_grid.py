"""Which times, and which of the model's time steps, an episode visits.

An episode of ``steps`` transitions visits ``steps`` states and ends in one more. On a discrete schedule the grid
carries the integer time steps themselves, so that no rounding of a time decides them. The spacings are those of
diffusers (Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, WACV 2024, table 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from flowgym_gym.errors import OptionError

SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class Grid:
    """The states an episode goes through, and the schedule's coefficients there; float64, on the CPU.

    Attributes:
        times: Increasing, shape ``(steps + 1,)``, the last one 1.
        timesteps: The model's integer time steps, shape ``(steps,)``; None where the model takes ``t`` itself.
        alpha: Weight of the data, shape ``(steps + 1,)``.
        beta: Weight of the noise, shape ``(steps + 1,)``.
        alpha_dot: Time derivative of ``alpha``; the last one is not used.
        beta_dot: Time derivative of ``beta``; the last one is not used.
        sigma: Diffusion coefficient for the Euler-Maruyama sampler; the last one is not used.
    """

    times: Tensor
    timesteps: Tensor | None
    alpha: Tensor
    beta: Tensor
    alpha_dot: Tensor
    beta_dot: Tensor
    sigma: Tensor

    @property
    def steps(self) -> int:
        """Number of transitions."""
        return len(self.times) - 1


def check_steps(steps: int, spacing: str | None, spacings: Sequence[str]) -> None:
    """Raise an OptionError unless ``steps`` is a positive integer and ``spacing`` is None or known."""
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise OptionError(f"discretization_steps is {steps!r}, expected a whole number, at least 1")
    if spacing is not None and spacing not in spacings:
        raise OptionError(f"spacing is {spacing!r}, expected one of {tuple(spacings)} for this schedule")


def visited_timesteps(size: int, steps: int, spacing: str, steps_offset: int) -> np.ndarray:
    """Time steps that a sampler visits, from noise to data.

    Args:
        size: How many time steps the model was trained on.
        steps: How many are visited.
        spacing: ``"leading"``, ``"trailing"`` or ``"linspace"``.
        steps_offset: Added to each time step of a leading grid.

    Returns:
        Decreasing int64 array, shape ``(steps,)``.

    Raises:
        OptionError: If the grid would leave the model's range or visit a time step twice.
    """
    if steps > size:
        raise OptionError(f"discretization_steps is {steps}, but the model has only {size} time steps")
    k: np.ndarray
    if spacing == "leading":
        k = np.arange(steps)[::-1] * (size // steps) + steps_offset
    elif spacing == "trailing":
        k = np.round(np.arange(size, 0, -size / steps))[:steps] - 1
    else:
        k = np.linspace(0, size - 1, steps).round()[::-1]
    k = k.astype(np.int64)
    if k[0] >= size or k[-1] < 0 or (np.diff(k) >= 0).any():
        raise OptionError(
            f"{steps} {spacing} steps with offset {steps_offset} would visit time steps {k[-1]} to {k[0]}, "
            f"but each of 0 to {size - 1} can be visited once; take fewer steps or another spacing"
        )
    return k
