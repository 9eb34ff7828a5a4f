r"""The discrete schedule of DDPM and Stable Diffusion, read from ``alphas_cumprod``.

With :math:`\bar\alpha` of length :math:`T` and :math:`k(t) = \lfloor T (1 - t) \rfloor` clamped to
:math:`[0, T-1]`:

.. math::
    \alpha = \sqrt{\bar\alpha_k}, \quad \beta = \sqrt{1 - \bar\alpha_k}, \quad
    \dot{\bar\alpha} = T (\bar\alpha_{k-1} - \bar\alpha_k), \quad
    \dot\alpha = \frac{\dot{\bar\alpha}}{2 \alpha}, \quad \dot\beta = -\frac{\dot{\bar\alpha}}{2
    \beta},

with :math:`\bar\alpha_{-1} = 1`. Time step :math:`k` is visited at time :math:`t = 1 - k / T`.

A schedule of zero terminal signal-to-noise ratio ends with :math:`\bar\alpha_{T-1} = 0` (Lin et
al., Common Diffusion Noise Schedules and Sample Steps are Flawed, WACV 2024). The quotient
:math:`\dot{\bar\alpha} / 2 \alpha` has no value there; :math:`\dot\alpha = T (\alpha_{k-1} -
\alpha_k)` takes its place, the same difference of :math:`\alpha` itself.
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
from flowgym_gym.time_grid import (
    SPACINGS,
    Grid,
    Steps,
    check_steps,
    check_timesteps,
    visited_timesteps,
)
from flowgym_gym.types import FlowTensor

# T (1 - t) is a whole number at every visited time; float32 misses it by less than this for T up to
# 10,000.
ROUNDING = 1e-3


class DiffusionScheduler(Scheduler[FlowTensor]):
    """Schedule of a model trained on ``T`` discrete noise levels.

    Args:
        alphas_cumprod: Share of the signal's variance at each time step, shape ``(T,)``,
            decreasing, in [0, 1]; only the last may be 0.
        final_alpha_cumprod: The same where sampling ends; by default ``alphas_cumprod[0]``, as in
            Stable Diffusion (``set_alpha_to_one=False``); 1 for a noise-free end.
        spacing: Which time steps a grid visits unless it is told otherwise: ``"leading"``,
            ``"trailing"`` or ``"linspace"``, as diffusers defines them.
        steps_offset: Added to each time step of a leading grid.

    Raises:
        OptionError: If ``alphas_cumprod`` is not a decreasing sequence in [0, 1], or another value
            is out of range.
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
            raise OptionError(
                f"alphas_cumprod has shape {tuple(abar.shape)}, expected (T,) with T at least 2"
            )
        if not bool(((abar >= 0) & (abar <= 1)).all() and (abar.diff() < 0).all()):
            raise OptionError(
                "alphas_cumprod must decrease from time step to time step within [0, 1], got "
                f"values from {abar[0]:.4g} to {abar[-1]:.4g}; it is the cumulative product of 1 - "
                "beta, not beta itself"
            )
        final = float(abar[0]) if final_alpha_cumprod is None else float(final_alpha_cumprod)
        if not abar[0] <= final <= 1:
            raise OptionError(
                f"final_alpha_cumprod is {final}, expected a value between alphas_cumprod[0] = "
                f"{abar[0]:.6g} and 1"
            )
        check_choice("spacing", spacing, SPACINGS)
        self.alphas_cumprod = abar
        self.final_alpha_cumprod = final
        self.spacing = spacing
        self.steps_offset = int(steps_offset)
        previous = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), abar[:-1]])
        abar_dot = len(abar) * (previous - abar)
        self._alpha_dots = torch.where(
            abar > 0, abar_dot / (2 * abar.sqrt()), len(abar) * (previous.sqrt() - abar.sqrt())
        )
        self._beta_dots = -abar_dot / (2 * (1 - abar).sqrt())

    @classmethod
    @plain_defaults()
    def from_diffusers(cls, scheduler: Any) -> DiffusionScheduler:
        """The schedule of a diffusers scheduler, on which DDIM sampling runs.

        Taken over are its own ``alphas_cumprod``, however it came by them, ``timestep_spacing``,
        ``steps_offset`` and ``set_alpha_to_one``; what its class does not have is as DDIM has it.
        Not taken over is how a solver chooses noise levels between the model's time steps
        (``use_karras_sigmas`` and the like).
        """
        config = scheduler.config
        abar = scheduler.alphas_cumprod.detach().to("cpu", torch.float64)
        if config.get("rescale_betas_zero_snr", False):
            # Solvers that divide by the signal put 2**-24 here, for themselves; the network was
            # trained on pure noise.
            abar = torch.cat([abar[:-1], _on_cpu([0.0])])
        return cls(
            abar,
            final_alpha_cumprod=1.0 if config.get("set_alpha_to_one", True) else float(abar[0]),
            spacing=config.get("timestep_spacing", "leading"),
            steps_offset=config.get("steps_offset", 0) or 0,
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
        return self._lookup(self._alpha_dots, t)

    def _beta_dot(self, t: Tensor) -> Tensor:
        return self._lookup(self._beta_dots, t)

    def time_grid(self, steps: Steps, spacing: str | None = None) -> Grid:
        """The time steps that an episode visits, then the end at ``final_alpha_cumprod``.

        Args:
            steps: Number of transitions; or the time steps they start from, decreasing whole
                numbers, as in the ``timesteps=`` of diffusers' pipelines.
            spacing: ``"leading"``, ``"trailing"`` or ``"linspace"``; by default the scheduler's
                own.

        Raises:
            OptionError: If there are more steps than the model was trained on, or the spacing is
                unknown.
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
        unused = _on_cpu([np.nan])
        times = 1 - torch.cat([k.to(torch.float64), _on_cpu([0.0])]) / size
        return Grid(
            times=times,
            timesteps=k,
            alpha=alpha,
            beta=beta,
            alpha_dot=torch.cat([self._alpha_dots[k], unused]),
            beta_dot=torch.cat([self._beta_dots[k], unused]),
            sigma=self._sigma(times),
        )


def _on_cpu(values: Any) -> Tensor:
    """Numbers as float64 on the CPU, whatever torch's default device is."""
    if isinstance(values, Tensor):
        return values.detach().to("cpu", torch.float64)
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")
