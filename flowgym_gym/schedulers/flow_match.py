r"""The schedule of flow-matching checkpoints such as Stable Diffusion 3 and Flux: straight paths on
a shifted grid.

The path is that of optimal transport, :math:`x_t = t x_1 + (1 - t) \varepsilon`; the noise level
that such checkpoints call :math:`\sigma` is :math:`1 - t`. What belongs to the checkpoint is which
times are visited: evenly spaced ones
:math:`u` are shifted to

.. math:: \sigma = \frac{s u}{1 + (s - 1) u}, \qquad \text{or} \qquad \sigma = \frac{e^\mu}{e^\mu +
1 / u - 1}

where the shift depends on the size of the picture: :math:`\mu` is linear in the number of the
transformer's tokens (Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image
Synthesis, ICML 2024, section 5.3.2). The numbers are diffusers' own, from the checkpoint's
``FlowMatchEulerDiscreteScheduler``.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgym_gym.defaults import plain_defaults
from flowgym_gym.errors import CheckpointError, OptionError
from flowgym_gym.schedulers.continuous import OptimalTransportScheduler
from flowgym_gym.time_grid import Grid, Steps, check_steps


class FlowMatchScheduler(OptimalTransportScheduler):
    """Optimal transport on the time grid of a flow-matching checkpoint.

    Args:
        scheduler: The checkpoint's ``FlowMatchEulerDiscreteScheduler``, which is copied; a
            ``FlowMatchHeunDiscreteScheduler`` has the same noise levels.
        tokens: Number of tokens that the transformer sees of a state; decides the shift where that
            is dynamic.
        max_shift: The shift at the largest size, where the configuration has none.
        even: Whether the pipeline spaces the unshifted times evenly from 1 to ``1 / steps``, as
            Flux does, instead of leaving that to the scheduler.

    Raises:
        CheckpointError: If the scheduler is of another kind.
    """

    @plain_defaults()
    def __init__(
        self, scheduler: Any, tokens: int, max_shift: float = 1.15, even: bool = False
    ) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        config, kind = scheduler.config, type(scheduler).__name__
        if not kind.startswith("FlowMatch") or config.get("invert_sigmas", False):
            inverted = " with invert_sigmas" if config.get("invert_sigmas", False) else ""
            raise CheckpointError(
                f"the checkpoint's scheduler is a {kind}{inverted}, expected a "
                "FlowMatchEulerDiscreteScheduler"
            )
        if kind == "FlowMatchLCMScheduler" or config.get("stochastic_sampling", False):
            what = (
                "stochastic_sampling"
                if config.get("stochastic_sampling", False)
                else "consistency sampling"
            )
            raise CheckpointError(
                f"the checkpoint's {kind} draws new noise at every step ({what}), for which its "
                "network was distilled; no sampler here does that. To sample it along its flow "
                "all the same, give the checkpoint a FlowMatchEulerDiscreteScheduler without "
                "stochastic_sampling"
            )
        # A copy keeps what an open scheduler was told since it was made (set_shift); its
        # configuration does not.
        same = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        self._diffusers = (
            copy.deepcopy(scheduler)
            if same
            else FlowMatchEulerDiscreteScheduler.from_config(config)
        )
        self._even = even
        self._mu: float | None = None
        if config.get("use_dynamic_shifting", False):
            least, most = (
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
            )
            low, high = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
            self._mu = low + (high - low) / (most - least) * (tokens - least)

    def model_input(self, t: Tensor) -> Tensor:
        """The noise level times the number of training steps, shape ``(n,)``; diffusers' own to
        5e-5 of 1000.
        """
        return (1 - t.to(torch.float32)) * int(self._diffusers.config.num_train_timesteps)

    @plain_defaults()
    def sigmas(self, steps: int) -> Tensor:
        """Noise levels of a grid as diffusers has them, from noise to the final 0, float32, shape
        ``(steps + 1,)``.
        """
        sigmas = np.linspace(1.0, 1 / steps, steps) if self._even else None
        self._diffusers.set_timesteps(None if self._even else steps, sigmas=sigmas, mu=self._mu)
        found: Tensor = self._diffusers.sigmas
        return found.cpu()

    def time_grid(self, steps: Steps, spacing: str | None = None) -> Grid:
        """The times that an episode visits.

        Args:
            steps: Number of transitions; or the times they start from, increasing, in [0, 1).
            spacing: None for the checkpoint's own shifted times, ``"linspace"`` for evenly spaced
                ones.

        Raises:
            OptionError: If ``steps`` or ``spacing`` cannot be used.
        """
        listed = check_steps(steps, spacing, spacings=("linspace",))
        if listed is not None or spacing is not None:
            return super().time_grid(steps, spacing)
        sigmas = self.sigmas(int(steps)).to(torch.float64)  # type: ignore[arg-type]
        if not bool(torch.isfinite(sigmas).all()):
            raise OptionError(
                f"the checkpoint's own schedule has no grid of {steps} steps; take more, or list "
                "the times"
            )
        times = 1 - sigmas
        return Grid(
            times=times,
            timesteps=None,
            alpha=times,
            beta=sigmas,
            alpha_dot=self._alpha_dot(times),
            beta_dot=self._beta_dot(times),
            sigma=self._sigma(times),
        )
