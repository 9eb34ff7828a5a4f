"""Which times, and which of the model's time steps, an episode visits.

An episode of ``steps`` transitions visits ``steps`` states and ends in one more. On a discrete
schedule the grid carries the integer time steps themselves, so that no rounding of a time decides
them. The spacings are those of diffusers (Lin et al., Common Diffusion Noise Schedules and Sample
Steps are Flawed, WACV 2024, table 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowgym_gym.checks import check_choice, check_whole
from flowgym_gym.errors import OptionError, shown
from flowgym_gym.types import real_tensor

# A number of steps, or the visited times themselves.
Steps = int | Sequence[float]
MAX_STEPS = 100_000
SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class Grid:
    """The states an episode goes through, and the schedule's coefficients there; float64, on the
    CPU.

    Attributes:
        times: Increasing, shape ``(steps + 1,)``, the last one 1.
        timesteps: The model's integer time steps, shape ``(steps,)``; None where the model takes
            ``t`` itself.
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

    def __post_init__(self) -> None:
        # The last transition may take no time: on a discrete schedule time step 0 lies at time 1,
        # before the final one.
        wrong = self.times[:-1].diff() <= 0
        if (
            len(self.times) < 2
            or bool(wrong.any())
            or not 0 <= self.times[0] <= self.times[-2] <= self.times[-1] == 1
        ):
            for at in wrong.nonzero().flatten().tolist():
                raise OptionError(
                    f"times go from {self.times[at].item():.6g} to {self.times[at + 1].item():.6g} "
                    f"at step {at} of the grid, expected times that increase from 0 (noise) to 1 "
                    "(data)"
                )
            raise OptionError(
                f"times are {shown(self.times.tolist())}, expected two or more that lie in [0, 1] "
                "and end with 1"
            )
        for name in ("alpha", "beta", "alpha_dot", "beta_dot", "sigma"):
            values = getattr(self, name)
            if values.shape != self.times.shape:
                raise OptionError(
                    f"{name} of the grid has shape {tuple(values.shape)}, expected "
                    f"{tuple(self.times.shape)}"
                )
        for name, values, rises in (
            ("alpha", self.alpha, self.alpha.diff()),
            ("beta", self.beta, -self.beta.diff()),
        ):
            if not bool(
                torch.isfinite(values).all() and (values >= 0).all() and (rises >= -1e-12).all()
            ):
                raise OptionError(
                    f"{name} goes from {values[0].item():.4g} to {values[-1].item():.4g} along the "
                    "grid; time runs from noise (0) to data (1), so alpha must not fall, beta "
                    "must not rise, and neither be negative"
                )

    @property
    def steps(self) -> int:
        """Number of transitions."""
        return len(self.times) - 1


def check_steps(steps: Steps, spacing: str | None, spacings: Sequence[str]) -> list[float] | None:
    """Check the number of steps, or the visited times themselves, and the spacing.

    Returns:
        The visited times if ``steps`` lists them, else None.

    Raises:
        OptionError: Unless ``steps`` is a positive integer or a sequence of finite numbers, and
            ``spacing`` is None or known; a sequence leaves nothing to be spaced.
    """
    if isinstance(steps, Sequence | np.ndarray | Tensor) and not isinstance(steps, str | bytes):
        try:
            times = real_tensor(steps)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            times = torch.empty(0, device="cpu")
        if times.ndim != 1 or len(times) == 0 or not bool(torch.isfinite(times).all()):
            raise OptionError(
                f"discretization_steps is {shown(steps)}, expected a number of steps or a list of "
                "times"
            )
        if spacing is not None:
            raise OptionError(
                f"spacing is {shown(spacing)}, but discretization_steps lists the times; leave one "
                "of them out"
            )
        return times.tolist()
    check_whole("discretization_steps", steps, maximum=MAX_STEPS)
    if spacing is not None:
        check_choice("spacing", spacing, spacings)
    return None


def check_timesteps(size: int, timesteps: Sequence[float]) -> np.ndarray:
    """Time steps that a user lists, from noise to data, as int64.

    Raises:
        OptionError: Unless they are decreasing whole numbers from ``size - 1`` to 0.
    """
    k = np.asarray(timesteps)
    if (k != np.round(k)).any() or k.max() >= size or k.min() < 0:
        raise OptionError(
            f"discretization_steps is {shown(list(timesteps))}, expected time steps of the model: "
            f"whole numbers from {size - 1} (noise) to 0 (data)"
        )
    k = k.astype(np.int64)
    for i in np.flatnonzero(np.diff(k) >= 0)[:1]:
        raise OptionError(
            f"time step {k[i]} is followed by {k[i + 1]}; listed time steps must decrease, noise "
            "first"
        )
    return k


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
        raise OptionError(
            f"discretization_steps is {steps}, but the model has only {size} time steps"
        )
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
            f"{steps} {spacing} steps with offset {steps_offset} would visit time steps {k[-1]} to "
            f"{k[0]}, but each of 0 to {size - 1} can be visited once; take fewer steps or another "
            "spacing"
        )
    return k
