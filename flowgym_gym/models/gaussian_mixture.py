r"""Gaussian mixtures as flow models: nothing is trained, every prediction is a closed form.

For :math:`x_1 \sim \sum_i w_i\, \mathcal N(m_i, s_i^2 I)` the state :math:`x_t = \alpha x_1 + \beta
\varepsilon` of component :math:`i` is Gaussian with mean :math:`\alpha m_i` and variance :math:`v_i
= \alpha^2 s_i^2 + \beta^2`, so that with the responsibilities :math:`r_i(x) \propto w_i\, \mathcal
N(x; \alpha m_i, v_i I)`

.. math::
    E[x_1 | x] = \sum_i r_i \left( m_i + \frac{\alpha s_i^2}{v_i} (x - \alpha m_i) \right), \qquad
    E[\varepsilon | x] = \sum_i r_i \frac{\beta}{v_i} (x - \alpha m_i),

and velocity and score are :math:`\dot\alpha E[x_1|x] + \dot\beta E[\varepsilon|x]` and
:math:`-E[\varepsilon|x] / \beta`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowgym_gym.checks import check_choice
from flowgym_gym.dynamics import OUTPUTS
from flowgym_gym.errors import OptionError, reason, shown
from flowgym_gym.models.base import BaseModel
from flowgym_gym.schedulers import (
    CosineScheduler,
    DiffusionScheduler,
    OptimalTransportScheduler,
    Scheduler,
)
from flowgym_gym.types import FlowTensor, append_dims, real_tensor

PICTURE_SIZE = 64
# Buffers, so that they move with the model.
CONSTANTS = ("means", "stds", "weights")
SCHEDULES = ("optimal_transport", "cosine", "diffusion")


class GaussianMixtureBaseModel(BaseModel[FlowTensor]):
    """A flow model of a Gaussian mixture in ``d`` dimensions, exact at every time.

    Its constants stay in float64 whatever ``half`` or ``to`` is asked for, and predictions have the
    states' format.

    The default is the one-dimensional mixture of the library this suite descends from.

    Args:
        means: Of the components, shape ``(k, d)``.
        stds: Standard deviations of the components, shape ``(k,)``.
        weights: Of the components, shape ``(k,)``, above 0; need not sum to 1.
        output_type: What the model predicts.
        schedule: ``"optimal_transport"``, ``"cosine"``, or ``"diffusion"`` (Stable Diffusion's,
            1000 time steps).
        device: Where it runs.

    Raises:
        OptionError: If an argument has the wrong shape or range.

    References:
        Bishop, Pattern Recognition and Machine Learning, section 2.3.3, for the conditional means.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor

    def __init__(
        self,
        means: Sequence[Sequence[float]] = ((0.0,), (3.0,)),
        stds: Sequence[float] = (1.0, 0.4),
        weights: Sequence[float] = (0.5, 0.5),
        output_type: str = "velocity",
        schedule: str = "optimal_transport",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(device)
        check_choice("output_type", output_type, OUTPUTS)
        check_choice("schedule", schedule, SCHEDULES)
        try:
            constants = [real_tensor(values, self.device) for values in (means, stds, weights)]
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise OptionError(f"means, stds or weights are no numbers: {reason(error)}") from error
        for name, values in zip(CONSTANTS, constants, strict=True):
            self.register_buffer(name, values, persistent=False)
        k = self.means.shape[0] if self.means.ndim == 2 and torch.isfinite(self.means).all() else 0
        if (
            k == 0
            or self.means.shape[1] == 0
            or self.stds.shape != (k,)
            or self.weights.shape != (k,)
        ):
            raise OptionError(
                f"means, stds and weights have shapes {tuple(self.means.shape)}, "
                f"{tuple(self.stds.shape)} and {tuple(self.weights.shape)}, expected (k, d), (k,) "
                "and (k,), and finite numbers"
            )
        for name, values in (("stds", self.stds), ("weights", self.weights)):
            if not bool((values > 0).all() and torch.isfinite(values).all()):
                raise OptionError(
                    f"{name} is {shown(values.tolist())}, expected finite numbers above 0"
                )
        self.weights = self.weights / self.weights.sum()
        self.output_type = output_type  # type: ignore[assignment]
        self._scheduler = _schedule(schedule)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> GaussianMixtureBaseModel:
        # The constants go where the module goes, but keep their number format: what is exact stays
        # exact.
        constants = {name: getattr(self, name) for name in CONSTANTS}
        super()._apply(fn, recurse)
        for name, values in constants.items():
            moved = getattr(self, name)
            setattr(self, name, moved if moved.dtype == values.dtype else values.to(moved.device))
        return self

    @property
    def scheduler(self) -> Scheduler[FlowTensor]:
        """The schedule."""
        return self._scheduler

    @property
    def dimensions(self) -> int:
        """Number of dimensions ``d``."""
        return self.means.shape[1]

    def sample_p0(
        self, n: int, *, generator: torch.Generator | None = None, **kwargs: Any
    ) -> tuple[FlowTensor, dict[str, Any]]:
        """Standard normal noise, shape ``(n, d)``."""
        noise = torch.randn(
            n, self.dimensions, generator=generator, dtype=torch.float32, device="cpu"
        )
        return FlowTensor(noise.to(self.device)), kwargs

    def sample_p1(self, n: int) -> FlowTensor:
        """Exact samples of the mixture, shape ``(n, d)``, from torch's global generator."""
        component = torch.multinomial(self.weights.cpu(), n, replacement=True).to(self.device)
        noise = torch.randn(n, self.dimensions, dtype=torch.float32, device="cpu").to(
            self.device, torch.float64
        )
        return FlowTensor((self.means[component] + self.stds[component, None] * noise).float())

    def forward(self, x: FlowTensor, t: Tensor, **kwargs: Any) -> FlowTensor:
        """The exact prediction, shape ``(n, d)``, worked out in float64; see :class:`BaseModel`."""
        endpoint, noise = self.conditional_means(x.data, t)
        alpha, beta, alpha_dot, beta_dot = (
            append_dims(getattr(self.scheduler, name)(t.to(torch.float64)), 2)
            for name in ("alpha", "beta", "alpha_dot", "beta_dot")
        )
        output = {
            "endpoint": lambda: endpoint,
            "epsilon": lambda: noise,
            "velocity": lambda: alpha_dot * endpoint + beta_dot * noise,
            "score": lambda: -noise / beta,
            "v_prediction": lambda: alpha * noise - beta * endpoint,
        }[self.output_type]()
        return FlowTensor(output.to(x.dtype))

    def conditional_means(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``E[x_1 | x]`` and ``E[eps | x]`` for states ``(n, d)`` at times ``(n,)``, each ``(n,
        d)``, float64.
        """
        x, t = x.to(torch.float64), t.to(torch.float64)
        means, stds = self.means, self.stds
        alpha, beta = (getattr(self.scheduler, name)(t)[:, None] for name in ("alpha", "beta"))
        residual = x[:, None] - alpha[..., None] * means
        variance = (alpha * stds) ** 2 + beta**2
        logits = self.weights.log() - 0.5 * means.shape[1] * variance.log()
        responsibilities = torch.softmax(
            logits - 0.5 * residual.square().sum(-1) / variance, dim=1
        )[..., None]
        endpoints = means + (alpha * stds**2 / variance)[..., None] * residual
        noises = (beta / variance)[..., None] * residual
        return (responsibilities * endpoints).sum(1), (responsibilities * noises).sum(1)

    def picture(self, x: FlowTensor) -> Tensor:
        """The mixture's density in grey and the sample in red, shape ``(n, 3, 64, 64)``.

        In one dimension the density is drawn as a curve and the sample as a line; from two on, the
        first two coordinates are shown.
        """
        reach = float((self.means.abs().amax(dim=1) + 4 * self.stds).max())
        axis = torch.linspace(-reach, reach, PICTURE_SIZE, dtype=torch.float64, device=self.device)
        column = ((x.data[:, 0].double() / reach + 1) / 2 * (PICTURE_SIZE - 1)).round().long()
        if self.dimensions == 1:
            height = self.log_prob(axis[:, None]).exp()
            rows = torch.linspace(1, 0, PICTURE_SIZE, dtype=torch.float64, device=self.device)
            grey = 1 - 0.5 * (rows[:, None] <= height / height.max()).double()
            marked = torch.arange(PICTURE_SIZE, device=self.device) == column[:, None, None]
        else:
            points = torch.zeros(
                PICTURE_SIZE**2, self.dimensions, dtype=torch.float64, device=self.device
            )
            points[:, :2] = torch.cartesian_prod(-axis, axis).flip(1)
            density = self.log_prob(points).exp().reshape(PICTURE_SIZE, PICTURE_SIZE)
            grey = 1 - 0.7 * density / density.max()
            row = ((1 - x.data[:, 1].double() / reach) / 2 * (PICTURE_SIZE - 1)).round().long()
            pixels = torch.arange(PICTURE_SIZE, device=self.device)
            near_row = (pixels - row[:, None]).abs() <= 1
            near_column = (pixels - column[:, None]).abs() <= 1
            marked = near_row[:, :, None] & near_column[:, None, :]
        red = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, device=self.device)[:, None, None]
        return (
            torch.where(marked[:, None], red, grey)
            .float()
            .expand(len(x), 3, PICTURE_SIZE, PICTURE_SIZE)
        )

    def log_prob(self, x: Tensor, t: float = 1.0) -> Tensor:
        """Log density of the states at a time, for ``x`` of shape ``(n, d)``; shape ``(n,)``,
        float64.
        """
        time = torch.tensor([t], dtype=torch.float64, device=self.device)
        alpha, beta = self.scheduler.alpha(time), self.scheduler.beta(time)
        variance = (alpha * self.stds) ** 2 + beta**2
        residual = x.to(torch.float64)[:, None] - alpha * self.means
        log_normal = -0.5 * (
            residual.square().sum(-1) / variance + self.dimensions * (2 * math.pi * variance).log()
        )
        return torch.logsumexp(self.weights.log() + log_normal, dim=1)


def _schedule(name: str) -> Scheduler[FlowTensor]:
    if name == "diffusion":
        betas = (
            torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64, device="cpu") ** 2
        )
        return DiffusionScheduler(torch.cumprod(1 - betas, dim=0), steps_offset=1)
    return OptimalTransportScheduler() if name == "optimal_transport" else CosineScheduler(1.0)
