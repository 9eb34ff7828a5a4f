r"""One controlled transition from a visited time to the next: the only implementation there is.

A network output is first read as a pair :math:`(x_1, \varepsilon)` with
:math:`x_t = \alpha_t x_1 + \beta_t \varepsilon` (table ``OUTPUTS``). A transition :math:`t \to s`
then is the Gaussian

.. math:: x_s = \mu + g_t c + \tau z, \qquad z \sim \mathcal N(0, I),

in which the correction :math:`c` moves the mean linearly: it is added to the predicted velocity, to
the predicted noise, or, as the control of stochastic optimal control, to :math:`z` itself
(:math:`g_t = \tau`).

Sampler ``"ddim"`` with noise level :math:`e`:

.. math::
    \tau^2 = e^2 \frac{\beta_s^2}{\beta_t^2}
             \left( \beta_t^2 - \frac{\alpha_t^2}{\alpha_s^2} \beta_s^2 \right), \qquad
    \mu = \alpha_s x_1 + \sqrt{\beta_s^2 - \tau^2}\, \varepsilon .

On a diffusion schedule this is DDIM's own variance (Song et al., ICLR 2021, equation 16); :math:`e
= 0` is the probability-flow ODE, :math:`e = 1` ancestral sampling, whose path is memoryless.

Sampler ``"euler"`` is Euler-Maruyama on :math:`dx = b\, dt + \sigma\, dB`, with
:math:`b = v + \frac{\sigma^2}{2 \eta} (v - \kappa x)` (Domingo-Enrich et al., Adjoint Matching,
ICLR 2025).

The control cost of a step is the divergence of the steered transition from the free one,
:math:`\tfrac12 \lVert g_t c / \tau \rVert^2`; over an episode it sums to the divergence of the two
path measures. Where an episode draws no noise at all (:math:`e = 0`), the memoryless :math:`\tau`
(of ``"ddim"`` with :math:`e = 1`) takes its place and the cost is a control energy. Where even that
is 0 the correction has no effect and costs nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NoReturn

import torch
from torch import Tensor

from flowgym_gym.checks import LARGEST, check_choice, check_number
from flowgym_gym.errors import OptionError
from flowgym_gym.time_grid import Grid
from flowgym_gym.types import append_dims

SAMPLERS = ("ddim", "euler")
ACTION_TYPES = ("velocity", "noise", "control")
# Control costs grow with 1 / noise_level^2; below this they would leave float32's range.
LEAST_NOISE = 1e-6


@dataclass(frozen=True)
class Schedule:
    """The schedule's coefficients where transitions start, each of shape ``(steps,)``."""

    alpha: Tensor
    beta: Tensor
    alpha_dot: Tensor
    beta_dot: Tensor

    @property
    def wronskian(self) -> Tensor:
        r""":math:`\dot\alpha \beta - \alpha \dot\beta`, the determinant of the map from data and
        noise.
        """
        return self.alpha_dot * self.beta - self.alpha * self.beta_dot


# For each kind of output o, the pairs (p, q) and (r, s) with x_1 = p x + q o and eps = r x + s o.
Pair = tuple[Tensor, Tensor]
OUTPUTS: dict[str, Callable[[Schedule], tuple[Pair, Pair]]] = {
    "epsilon": lambda c: (
        (1 / c.alpha, -c.beta / c.alpha),
        (torch.zeros_like(c.alpha), torch.ones_like(c.alpha)),
    ),
    "endpoint": lambda c: (
        (torch.zeros_like(c.alpha), torch.ones_like(c.alpha)),
        (1 / c.beta, -c.alpha / c.beta),
    ),
    "velocity": lambda c: (
        (-c.beta_dot / c.wronskian, c.beta / c.wronskian),
        (c.alpha_dot / c.wronskian, -c.alpha / c.wronskian),
    ),
    "score": lambda c: (
        (1 / c.alpha, c.beta**2 / c.alpha),
        (torch.zeros_like(c.alpha), -c.beta),
    ),
    # diffusers' v: alpha eps - beta x_1.
    "v_prediction": lambda c: (
        (c.alpha / (c.alpha**2 + c.beta**2), -c.beta / (c.alpha**2 + c.beta**2)),
        (c.beta / (c.alpha**2 + c.beta**2), c.alpha / (c.alpha**2 + c.beta**2)),
    ),
}


@dataclass(frozen=True)
class Transitions:
    """Coefficients of every transition of a grid, each of shape ``(steps,)``, float32, on the
    model's device.

    Attributes:
        endpoint_x: Weight of the state in the expected sample ``x_1``.
        endpoint_output: Weight of the network's output in ``x_1``.
        mean_x: Weight of the state in the mean of the next state.
        mean_output: Weight of the network's output in the mean of the next state.
        gain: How far a correction of 1 moves the mean.
        std: Standard deviation of the noise that a transition adds.
        cost_std: Standard deviation that control costs are measured in.
    """

    endpoint_x: Tensor
    endpoint_output: Tensor
    mean_x: Tensor
    mean_output: Tensor
    gain: Tensor
    std: Tensor
    cost_std: Tensor

    @classmethod
    def build(
        cls,
        grid: Grid,
        output_type: str,
        action_type: str,
        sampler: str,
        noise_level: float,
        device: torch.device | str = "cpu",
    ) -> Transitions:
        """Work out the coefficients in float64.

        Args:
            grid: The visited times.
            output_type: What the network predicts, a key of ``OUTPUTS``.
            action_type: What a correction is added to: the predicted ``"velocity"`` or ``"noise"``,
                or, for ``"control"``, the standard normal ``z`` that the transition draws.
            sampler: ``"ddim"`` or ``"euler"``.
            noise_level: 0 (deterministic), or 1e-6 to 1 (memoryless).
            device: Where the coefficients are kept.

        Raises:
            OptionError: If an argument is unknown or out of range, or if a coefficient would be
                infinite.
        """
        check_choice("output_type", output_type, OUTPUTS)
        check_choice("action_type", action_type, ACTION_TYPES)
        check_choice("sampler", sampler, SAMPLERS)
        check_number("noise_level", noise_level, minimum=0)
        if noise_level > 1 or 0 < noise_level < LEAST_NOISE:
            raise OptionError(
                f"noise_level is {noise_level}, expected 0 (ODE) or a number from {LEAST_NOISE} to "
                "1 (memoryless)"
            )

        start = Schedule(grid.alpha[:-1], grid.beta[:-1], grid.alpha_dot[:-1], grid.beta_dot[:-1])
        (p, q), (r, s) = OUTPUTS[output_type](start)

        weights = _ddim_weights if sampler == "ddim" else _euler_weights
        from_x, from_endpoint, from_noise, std = weights(grid, start, noise_level)
        cost_std = std if (std > 0).any() else _ddim_weights(grid, start, 1.0)[3]
        if action_type == "control":
            gain = cost_std
        else:
            (_, shift_endpoint), (_, shift_noise) = OUTPUTS[
                "epsilon" if action_type == "noise" else "velocity"
            ](start)
            gain = from_endpoint * shift_endpoint + from_noise * shift_noise
        coefficients = cls(
            endpoint_x=p,
            endpoint_output=q,
            mean_x=from_x + from_endpoint * p + from_noise * r,
            mean_output=from_endpoint * q + from_noise * s,
            gain=torch.where(cost_std > 0, gain, torch.zeros_like(gain)),
            std=std,
            cost_std=cost_std,
        )
        bad = torch.zeros_like(std, dtype=torch.bool)
        for field in fields(cls):
            bad |= ~torch.isfinite(getattr(coefficients, field.name))
        if bad.any():
            _raise_singular(grid, start, bad, output_type, action_type, sampler)
        if (from_x < -1).any():
            warnings.warn(
                f"Euler-Maruyama is unstable on this grid: it weighs the state at time "
                f"{grid.times[:-1][from_x < -1][0]:.3g} by {from_x.min():.3g}; take more steps, a "
                "grid that starts later, or the 'ddim' sampler",
                stacklevel=2,
            )
        return cls(
            **{f.name: getattr(coefficients, f.name).to(device, torch.float32) for f in fields(cls)}
        )

    def at(self, index: Tensor, ndim: int) -> Transitions:
        """The coefficients of one transition per batch element, shaped to broadcast over ``ndim``
        dimensions.

        Args:
            index: Which transition each element takes, int64, shape ``(n,)``.
            ndim: Number of dimensions of the states, batch included.
        """
        return Transitions(
            **{f.name: append_dims(getattr(self, f.name)[index], ndim) for f in fields(self)}
        )

    def endpoint(self, x: Tensor, output: Tensor) -> Tensor:
        """The sample ``x_1`` that the model expects, shape ``(n, *)``; call on coefficients from
        :meth:`at`.
        """
        return self.endpoint_x * x + self.endpoint_output * output

    def step(
        self, x: Tensor, output: Tensor, correction: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take the transition; call on coefficients from :meth:`at`.

        Args:
            x: States, shape ``(n, *)``.
            output: The network's predictions there, same shape.
            correction: Added to what the action type says, same shape.
            noise: Standard normal, same shape.

        Returns:
            The next states, shape ``(n, *)``, and the control costs in nats, shape ``(n,)``.
        """
        delta_mean = self.gain * correction
        following = self.mean_x * x + self.mean_output * output + delta_mean + self.std * noise
        return following, control_cost(delta_mean, self.cost_std)


def control_cost(delta_mean: Tensor, std: Tensor) -> Tensor:
    r"""Divergence (KL) of a steered Gaussian transition from the free one.

    .. math:: \tfrac12 \sum_d \left( \Delta\mu_d / \tau \right)^2

    Args:
        delta_mean: How far the correction moved the mean, shape ``(n, *)``.
        std: Standard deviation of the transition, broadcastable to ``delta_mean``; 0 where nothing
            can be steered.

    Returns:
        Cost in nats, shape ``(n,)``; 0 where ``std`` is 0.

    References:
        Domingo-Enrich et al., Adjoint Matching, ICLR 2025, section 3.
    """
    # Dividing by 0 would put NaN into the gradient, even where the quotient is not taken.
    ratio = torch.where(std > 0, delta_mean / torch.where(std > 0, std, 1.0), 0.0)
    return 0.5 * ratio.square().flatten(1).sum(dim=1)


def default_action_scale(transitions: Transitions, dimensions: int, cost: float) -> float:
    r"""Action scale at which uniformly random actions in [-1, 1] cost ``cost`` nats over an episode
    on average.

    The expected cost of such an agent is
    :math:`\tfrac12 \cdot \text{scale}^2 \cdot \tfrac{d}{3} \sum_t (g_t / \tau_t)^2`, a third being
    the mean square of a uniform number in [-1, 1].

    Args:
        transitions: Coefficients of the whole grid.
        dimensions: Number of elements of an action.
        cost: The wanted cost in nats.

    Returns:
        The scale; 1 where no transition can be steered.
    """
    gain, std = transitions.gain.double(), transitions.cost_std.double()
    squares = torch.where(std > 0, (gain / std) ** 2, torch.zeros_like(gain)).sum().item()
    return math.sqrt(6 * cost / (dimensions * squares)) if squares > 0 else 1.0


def check_costs(
    transitions: Transitions, dimensions: int, action_scale: float, weight: float
) -> None:
    r"""Raise an OptionError where the control cost of an action in [-1, 1] would be infinite in
    float32.

    The largest cost of a step is :math:`\tfrac12 d\, (\text{scale}\; g_t / \tau_t)^2`, that of an
    action of ones.

    Args:
        transitions: Coefficients of the whole grid.
        dimensions: Number of elements of an action.
        action_scale: Size of the correction that an action of 1 makes.
        weight: Weight of the control costs in what is paid.
    """
    gain, std = transitions.gain.double(), transitions.cost_std.double()
    squares = torch.where(std > 0, (gain / std) ** 2, torch.zeros_like(gain)).max().item()
    cost = 0.5 * dimensions * squares * action_scale * action_scale
    # The squares are summed before they are halved, and the weight multiplies the cost.
    if not cost * max(weight, 2.0) <= LARGEST / 2:
        raise OptionError(
            f"action_scale is {action_scale:.4g} and control_cost_weight {weight:.4g}: a step "
            f"would cost up to {cost:.3g} nats, and its reward be infinite in float32; take "
            "smaller ones"
        )


def _ddim_weights(
    grid: Grid, start: Schedule, noise_level: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of ``x``, ``x_1`` and ``eps`` in the mean of the next state, and its standard
    deviation.
    """
    alpha_s, beta_s = grid.alpha[1:], grid.beta[1:]
    variance = (beta_s / start.beta) ** 2 * (start.beta**2 - (start.alpha / alpha_s * beta_s) ** 2)
    variance = noise_level**2 * variance.clamp(min=0)
    return (
        torch.zeros_like(alpha_s),
        alpha_s,
        (beta_s**2 - variance).clamp(min=0).sqrt(),
        variance.sqrt(),
    )


def _euler_weights(
    grid: Grid, start: Schedule, noise_level: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``_ddim_weights``, for a step of Euler-Maruyama."""
    dt = grid.times.diff()
    from_x, along_velocity, sigma = torch.ones_like(dt), dt, torch.zeros_like(dt)
    if noise_level > 0:
        sigma = noise_level * grid.sigma[:-1]
        # 1 / eta and kappa / eta, written so that they are finite where alpha is 0.
        inverse_eta = start.alpha / (start.beta * start.wronskian)
        kappa_over_eta = start.alpha_dot / (start.beta * start.wronskian)
        from_x = 1 - dt * sigma**2 / 2 * kappa_over_eta
        along_velocity = dt + dt * sigma**2 / 2 * inverse_eta
    return (
        from_x,
        along_velocity * start.alpha_dot,
        along_velocity * start.beta_dot,
        sigma * dt.sqrt(),
    )


def _raise_singular(
    grid: Grid, start: Schedule, bad: Tensor, output_type: str, action_type: str, sampler: str
) -> NoReturn:
    time = float(grid.times[:-1][bad][0])
    alpha, beta = float(start.alpha[bad][0]), float(start.beta[bad][0])
    advice = []
    if beta == 0:
        advice.append("leave that time out of the grid, where no noise is left to predict")
    elif alpha == 0:
        if output_type in ("epsilon", "score"):
            advice.append("take a model that predicts the velocity or the endpoint")
        if action_type == "noise":
            advice.append("take velocity corrections, or controls")
        if sampler == "euler":
            advice.append("take the 'ddim' sampler or a constant noise_schedule")
        if grid.timesteps is None:
            advice.append("list the times of a grid that starts later")
        else:
            advice.append("take spacing 'leading' or list time steps, for a grid that starts later")
    else:
        advice.append("check the schedule's derivatives there")
    raise OptionError(
        f"{output_type!r} predictions with {action_type!r} corrections and the {sampler!r} sampler "
        f"are singular at time {time:.4g} of this grid (alpha = {alpha:.4g}, beta = {beta:.4g}); "
        f"{', or '.join(advice)}"
    )
