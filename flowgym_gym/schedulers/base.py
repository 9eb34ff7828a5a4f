r"""The schedule of a diffusion or flow model, and the noise that its Euler-Maruyama sampler draws.

Time runs from :math:`t = 0` (noise) to :math:`t = 1` (data):

.. math:: x_t = \alpha_t x_1 + \beta_t \varepsilon, \qquad \varepsilon \sim \mathcal N(0, I).

From the two coefficients and their time derivatives follow

.. math::
    \kappa_t = \dot\alpha_t / \alpha_t, \qquad
    \eta_t = \beta_t (\kappa_t \beta_t - \dot\beta_t),

and the memoryless noise :math:`\sigma_t^2 = 2 \eta_t` (Domingo-Enrich et al., Adjoint Matching,
ICLR 2025).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, overload

import torch
from torch import Tensor

from flowgym_gym.checks import check_number
from flowgym_gym.errors import ModelError, OptionError
from flowgym_gym.time_grid import Grid, Steps, check_steps
from flowgym_gym.types import D, append_dims


class NoiseSchedule(ABC):
    """The diffusion coefficient ``sigma(t)``."""

    @abstractmethod
    def __call__(self, t: Tensor) -> Tensor:
        """``sigma`` at times ``t`` of shape ``(n,)``."""


class Scheduler(ABC, Generic[D]):
    """Coefficients of the path from noise to data.

    Each coefficient is called with times, ``scheduler.alpha(t)``, and returns a tensor like ``t``;
    or with a batch first, ``scheduler.alpha(x, t)``, and returns a ``FlowTensor`` that broadcasts
    over ``x``. A subclass defines ``_alpha`` and ``_alpha_dot``, and ``_beta`` and ``_beta_dot``
    unless ``beta = 1 - alpha``.

    Attributes:
        first_time: Where grids begin; above 0 for a schedule that stands still at 0, where nothing
            can be steered.
    """

    first_time: float = 0.0

    @abstractmethod
    def _alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _alpha_dot(self, t: Tensor) -> Tensor: ...

    def _beta(self, t: Tensor) -> Tensor:
        return 1 - self._alpha(t)

    def _beta_dot(self, t: Tensor) -> Tensor:
        return -self._alpha_dot(t)

    def _kappa(self, t: Tensor) -> Tensor:
        return self._alpha_dot(t) / self._alpha(t)

    def _eta(self, t: Tensor) -> Tensor:
        beta = self._beta(t)
        return beta * (self._kappa(t) * beta - self._beta_dot(t))

    def _sigma(self, t: Tensor) -> Tensor:
        return self.noise_schedule(t)

    @overload
    def alpha(self, x: Tensor, t: None = None) -> Tensor: ...
    @overload
    def alpha(self, x: D, t: Tensor) -> D: ...
    def alpha(self, x: D | Tensor, t: Tensor | None = None) -> D | Tensor:
        r"""Weight of the data, :math:`\alpha_t`; ``t`` of shape ``(n,)`` in [0, 1]."""
        return self._broadcast(self._alpha, x, t)

    @overload
    def beta(self, x: Tensor, t: None = None) -> Tensor: ...
    @overload
    def beta(self, x: D, t: Tensor) -> D: ...
    def beta(self, x: D | Tensor, t: Tensor | None = None) -> D | Tensor:
        r"""Weight of the noise, :math:`\beta_t`."""
        return self._broadcast(self._beta, x, t)

    @overload
    def alpha_dot(self, x: Tensor, t: None = None) -> Tensor: ...
    @overload
    def alpha_dot(self, x: D, t: Tensor) -> D: ...
    def alpha_dot(self, x: D | Tensor, t: Tensor | None = None) -> D | Tensor:
        r"""Time derivative :math:`\dot\alpha_t`."""
        return self._broadcast(self._alpha_dot, x, t)

    @overload
    def beta_dot(self, x: Tensor, t: None = None) -> Tensor: ...
    @overload
    def beta_dot(self, x: D, t: Tensor) -> D: ...
    def beta_dot(self, x: D | Tensor, t: Tensor | None = None) -> D | Tensor:
        r"""Time derivative :math:`\dot\beta_t`."""
        return self._broadcast(self._beta_dot, x, t)

    @overload
    def kappa(self, x: Tensor, t: None = None) -> Tensor: ...
    @overload
    def kappa(self, x: D, t: Tensor) -> D: ...
    def kappa(self, x: D | Tensor, t: Tensor | None = None) -> D | Tensor:
        r""":math:`\kappa_t = \dot\alpha_t / \alpha_t`; infinite where ``alpha`` is 0."""
        return self._broadcast(self._kappa, x, t)

    @overload
    def eta(self, x: Tensor, t: None = None) -> Tensor: ...
    @overload
    def eta(self, x: D, t: Tensor) -> D: ...
    def eta(self, x: D | Tensor, t: Tensor | None = None) -> D | Tensor:
        r""":math:`\eta_t = \beta_t (\kappa_t \beta_t - \dot\beta_t)`."""
        return self._broadcast(self._eta, x, t)

    @overload
    def sigma(self, x: Tensor, t: None = None) -> Tensor: ...
    @overload
    def sigma(self, x: D, t: Tensor) -> D: ...
    def sigma(self, x: D | Tensor, t: Tensor | None = None) -> D | Tensor:
        r"""Diffusion coefficient :math:`\sigma_t` of the noise schedule; memoryless unless another
        one is set.
        """
        return self._broadcast(self._sigma, x, t)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The diffusion coefficient used by the Euler-Maruyama sampler."""
        if not hasattr(self, "_noise_schedule"):
            self._noise_schedule: NoiseSchedule = MemorylessNoiseSchedule(self)
        return self._noise_schedule

    @noise_schedule.setter
    def noise_schedule(self, schedule: NoiseSchedule) -> None:
        self._noise_schedule = schedule

    def model_input(self, t: Tensor) -> Tensor:
        """What the network takes as time; ``t`` itself unless the network was trained on integer
        time steps.
        """
        return t

    def time_grid(self, steps: Steps, spacing: str | None = None) -> Grid:
        """The times that an episode visits, with the schedule's coefficients there.

        Args:
            steps: Number of transitions, at least 1; or the times they start from, increasing, in
                [0, 1).
            spacing: Must be None or ``"linspace"``: continuous time is divided evenly.

        Raises:
            OptionError: If ``steps`` or ``spacing`` cannot be used.
            ModelError: If a coefficient of a subclass is no tensor like the times.
        """
        listed = check_steps(steps, spacing, spacings=("linspace",))
        if listed is None:
            count = int(steps) + 1  # type: ignore[arg-type]
            times = torch.linspace(self.first_time, 1, count, dtype=torch.float64, device="cpu")
        else:
            if listed[-1] == 1:
                raise OptionError(
                    f"discretization_steps is {listed}, but no step starts at time 1; leave it out"
                )
            times = torch.tensor([*listed, 1.0], dtype=torch.float64, device="cpu")
        # In this order, as later ones follow from earlier ones.
        names = ("alpha", "alpha_dot", "beta", "beta_dot", "sigma")
        return Grid(
            times=times, timesteps=None, **{name: self._coefficient(name, times) for name in names}
        )

    def _coefficient(self, name: str, times: Tensor) -> Tensor:
        values = getattr(self, f"_{name}")(times)
        if (
            not isinstance(values, Tensor)
            or values.shape != times.shape
            or not values.is_floating_point()
        ):
            shape = (
                f" of shape {tuple(values.shape)}, {values.dtype}"
                if isinstance(values, Tensor)
                else ""
            )
            raise ModelError(
                f"{type(self).__name__}._{name} returned a {type(values).__name__}{shape}, "
                f"expected real numbers of shape {tuple(times.shape)}"
            )
        return values

    @staticmethod
    def _broadcast(
        coefficient: Callable[[Tensor], Tensor], x: D | Tensor, t: Tensor | None
    ) -> D | Tensor:
        if isinstance(x, Tensor):
            return coefficient(x)
        if t is None:
            raise TypeError(
                "a coefficient of a batch needs times: call it with (x, t), got "
                f"{type(x).__name__} alone"
            )
        return type(x)(append_dims(coefficient(t), x.data.ndim))


class MemorylessNoiseSchedule(NoiseSchedule):
    r""":math:`\sigma_t = \sqrt{2 \eta_t}`, which makes the final sample independent of the initial
    noise.

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
