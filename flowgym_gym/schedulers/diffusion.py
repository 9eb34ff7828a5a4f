r"""The discrete schedule of DDPM and Stable Diffusion, read from ``alphas_cumprod``.

With :math:`\bar\alpha` of length :math:`T` and :math:`k(t) = \lfloor T (1 - t) \rfloor` clamped to :math:`[0, T-1]`:

.. math::
    \alpha = \sqrt{\bar\alpha_k}, \quad \beta = \sqrt{1 - \bar\alpha_k}, \quad
    \dot{\bar\alpha} = T (\bar\alpha_{k-1} - \bar\alpha_k), \quad
    \dot\alpha = \frac{\dot{\bar\alpha}}{2 \alpha}, \quad \dot\beta = -\frac{\dot{\bar\alpha}}{2 \beta},

with :math:`\bar\alpha_{-1} = 1`. Time step :math:`k` is visited at time :math:`t = 1 - k / T`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgym_gym.checks import check_choice
from flowgym_gym.defaults import plain_defaults
from flowgym_gym.errors import OptionError
from flowgym_gym.schedulers.base import Scheduler
from flowgym_gym.time_grid import SPACINGS, Grid, Steps, check_steps, check_timesteps, visited_timesteps
from flowgym_gym.types import FlowTensor

# T (1 - t) is a whole number at every visited time; float32 misses it by less than this for T up to 10,000.
ROUNDING = 1e-3


class DiffusionScheduler(Scheduler[FlowTensor]):
    """Schedule of a model trained on ``T`` discrete noise levels.

    Args:
        alphas_cumprod: Share of the signal's variance at each time step, shape ``(T,)``, decreasing, in (0, 1].
        final_alpha_cumprod: The same where sampling ends; by default ``alphas_cumprod[0]``, as in Stable Diffusion
            (``set_alpha_to_one=False``); 1 for a noise-free end.
        spacing: Which time steps a grid visits unless it is told otherwise: ``"leading"``, ``"trailing"`` or
            ``"linspace"``, as diffusers defines them.
        steps_offset: Added to each time step of a leading grid.

    Raises:
        OptionError: If ``alphas_cumprod`` is not a decreasing sequence in (0, 1], or another value is out of range.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        *,
        final_alpha_cumprod: float | None = None,
        spacing: str = "leading",
        steps_offset: int = 0,
    ) -> None:
        abar = _on_cpu(alphas_cumprod)
        if abar.ndim != 1 or len(abar) < 2:
            raise OptionError(f"alphas_cumprod has shape {tuple(abar.shape)}, expected (T,) with T at least 2")
        if abar[-1] == 0 and bool((abar.diff() < 0).all()):
            raise OptionError(
                "alphas_cumprod ends with 0 (a schedule rescaled to zero terminal signal-to-noise ratio), where the "
                "sample cannot be read off the noise; leave the last time step out of the schedule"
            )
        if not bool(((abar > 0) & (abar <= 1)).all() and (abar.diff() < 0).all()):
            raise OptionError(
                f"alphas_cumprod must decrease from time step to time step within (0, 1], got values from "
                f"{abar[0]:.4g} to {abar[-1]:.4g}; it is the cumulative product of 1 - beta, not beta itself"
            )
        final = float(abar[0]) if final_alpha_cumprod is None else float(final_alpha_cumprod)
        if not abar[0] <= final <= 1:
            raise OptionError(
                f"final_alpha_cumprod is {final}, expected a value between alphas_cumprod[0] = {abar[0]:.6g} and 1"
            )
        check_choice("spacing", spacing, SPACINGS)
        self.alphas_cumprod = abar
        self.final_alpha_cumprod = final
        self.spacing = spacing
        self.steps_offset = int(steps_offset)
        previous = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), abar[:-1]])
        self._abar_dot = len(abar) * (previous - abar)

    @classmethod
    @plain_defaults()
    def from_diffusers(cls, scheduler: Any) -> DiffusionScheduler:
        """The schedule that DDIM sampling would use with a diffusers scheduler's configuration."""
        from diffusers import DDIMScheduler

        ddim = DDIMScheduler.from_config(scheduler.config)
        return cls(
            ddim.alphas_cumprod,
            final_alpha_cumprod=float(ddim.final_alpha_cumprod),
            spacing=ddim.config.timestep_spacing,
            steps_offset=ddim.config.steps_offset,
        )

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def index(self, t: Tensor) -> Tensor:
        """Time step ``k`` that a time belongs to, int64, same shape and device as ``t``."""
        k = torch.floor(len(self) * (1 - t.to(torch.float64)) + ROUNDING)
        return k.long().clamp(0, len(self) - 1)

    def model_input(self, t: Tensor) -> Tensor:
        """The integer time step that the network takes."""
        return self.index(t)

    def _lookup(self, table: Tensor, t: Tensor) -> Tensor:
        return table[self.index(t).cpu()].to(t)

    def _alpha(self, t: Tensor) -> Tensor:
        return self._lookup(self.alphas_cumprod.sqrt(), t)

    def _beta(self, t: Tensor) -> Tensor:
        return self._lookup((1 - self.alphas_cumprod).sqrt(), t)

    def _alpha_dot(self, t: Tensor) -> Tensor:
        return self._lookup(self._abar_dot / (2 * self.alphas_cumprod.sqrt()), t)

    def _beta_dot(self, t: Tensor) -> Tensor:
        return self._lookup(-self._abar_dot / (2 * (1 - self.alphas_cumprod).sqrt()), t)

    def time_grid(self, steps: Steps, spacing: str | None = None) -> Grid:
        """The time steps that an episode visits, then the end at ``final_alpha_cumprod``.

        Args:
            steps: Number of transitions; or the time steps they start from, decreasing whole numbers, as in the
                ``timesteps=`` of diffusers' pipelines.
            spacing: ``"leading"``, ``"trailing"`` or ``"linspace"``; by default the scheduler's own.

        Raises:
            OptionError: If there are more steps than the model was trained on, or the spacing is unknown.
        """
        listed, size = check_steps(steps, spacing, spacings=SPACINGS), len(self)
        k = torch.from_numpy(
            visited_timesteps(size, int(steps), spacing or self.spacing, self.steps_offset)  # type: ignore[arg-type]
            if listed is None
            else check_timesteps(size, listed)
        )
        # Where a leading grid's offset leaves room for another stride, diffusers ends there.
        leading = listed is None and (spacing or self.spacing) == "leading"
        after = int(k[-1]) - size // len(k) if leading else -1
        final = self.final_alpha_cumprod if after < 0 else float(self.alphas_cumprod[after])
        alpha = torch.cat([self.alphas_cumprod[k].sqrt(), _on_cpu([math.sqrt(final)])])
        beta = torch.cat([(1 - self.alphas_cumprod[k]).sqrt(), _on_cpu([math.sqrt(1 - final)])])
        # The end is never left, so its derivatives are never used.
        abar_dot = torch.cat([self._abar_dot[k], _on_cpu([np.nan])])
        times = 1 - torch.cat([k.to(torch.float64), _on_cpu([0.0])]) / size
        return Grid(
            times=times,
            timesteps=k,
            alpha=alpha,
            beta=beta,
            alpha_dot=abar_dot / (2 * alpha),
            beta_dot=-abar_dot / (2 * beta),
            sigma=self._sigma(times),
        )


def _on_cpu(values: Any) -> Tensor:
    """Numbers as float64 on the CPU, whatever torch's default device is."""
    if isinstance(values, Tensor):
        return values.detach().to("cpu", torch.float64)
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")
