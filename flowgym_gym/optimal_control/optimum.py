r"""The exact optimum of environments in low dimensions, to hold agents against.

In one or two dimensions dynamic programming over state, time and action solves the environment's
own decision problem: its grid, transitions, action set, costs and reward. With the mean
:math:`\mu_i(x)` of the free transition, its noise :math:`\tau_i` and the shift :math:`b_i a` that
an action :math:`a \in [-1, 1]` makes,

.. math::
    V_N(x) = \text{scale} \cdot r(x), \qquad
    V_i(x) = \max_{a} \left\{ E_z[V_{i+1}(\mu_i(x) + b_i a + \tau_i z)]
             - \tfrac{\lambda}{2} \lVert b_i a / \tau_i \rVert^2 \right\},

and the optimal value is :math:`E[V_0(x_0)]`. Expectations over :math:`z` are convolutions on a
uniform grid of cells that covers every state an agent can steer to; the exponentials stay
logarithms throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgym_gym.dynamics import control_cost
from flowgym_gym.errors import ActionError
from flowgym_gym.optimal_control.cells import (
    Cells,
    as_image_axes,
    interpolate,
    interpolate_at,
    places,
)
from flowgym_gym.optimal_control.problem import decision_problem

Policy = Callable[[dict[str, np.ndarray]], np.ndarray]
# Actions tried per state in each dimension, and how often the best is refined, over half the
# distance each time.
ACTIONS = {1: 201, 2: 17}
REFINEMENTS = {1: 1, 2: 4}


@dataclass(frozen=True)
class OptimalControl:
    """Solution of an environment with states of one or two dimensions.

    Attributes:
        value: Expected return of the optimal policy from the environment's own initial states.
        states: Cell centres along each dimension, shape ``(cells,)``.
        values: Value at every time, shape ``(steps + 1, cells)``, or ``(steps + 1, cells, cells)``.
        actions: Optimal action in [-1, 1], shape ``(steps, cells)``, or ``(steps, cells, cells,
            2)``.
        times: Visited times, shape ``(steps + 1,)``.
    """

    value: float
    states: np.ndarray
    values: np.ndarray
    actions: np.ndarray
    times: np.ndarray

    def policy(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """The optimal action for observations of one or many environments, same shape as
        ``latent``.
        """
        latent, time = np.asarray(observation["latent"]), np.asarray(observation["time"])
        index = np.abs(self.times[:-1] - time).argmin(axis=-1).reshape(-1)
        dimensions = self.values.ndim - 1
        points = torch.from_numpy(latent.reshape(-1, dimensions).astype(np.float64))
        centres = torch.from_numpy(self.states)
        fields = torch.from_numpy(self.actions.reshape(*self.values[:-1].shape, dimensions))
        actions = torch.empty_like(points)
        for i in np.unique(index):
            for axis in range(dimensions):
                actions[index == i, axis] = interpolate(
                    fields[i, ..., axis], centres, points[index == i]
                )
        return actions.numpy().astype(np.float32).reshape(latent.shape)


@torch.no_grad()
def optimal_value(env: Any, cells: int | None = None, actions: int | None = None) -> OptimalControl:
    """Solve an environment with states of one or two dimensions by dynamic programming, with
    actions in [-1, 1].

    In two dimensions that takes about a minute.

    Args:
        env: A Gymnasium environment, single or vector, wrapped by ``RewardScale`` or ``TimeGrid``
            or not, or the torch environment (which does not clip actions itself).
        cells: Number of cells that each dimension is divided into; by default 150 for each unit of
            length in one dimension and 15 in two, and more for more than 20 steps.
        actions: Number of actions tried per state in each dimension, before parabolas through the
            best refine it; by default 201 in one dimension and 17 in two.

    Raises:
        OptionError: If the states have more dimensions, the initial states are not standard normal,
            the network's predictions need keyword arguments, or another wrapper changes the
            problem.
    """
    environment, scale = decision_problem(env)
    grid = Cells.of(environment, cells)
    dimensions = grid.dimensions
    transitions, weight = environment.transitions, environment.control_cost_weight
    value = scale * grid.rewards(environment).mean(dim=0)
    kernels = grid.kernels(transitions.std)
    axis = torch.linspace(
        -1, 1, ACTIONS[dimensions] if actions is None else actions, dtype=torch.float64
    )
    choices = torch.cartesian_prod(*[axis] * dimensions).reshape(-1, dimensions)
    values: list[Tensor] = [value]
    best: list[Tensor] = []
    for i in reversed(range(environment.discretization_steps)):
        shift = float(transitions.gain[i]) * environment.action_scale
        cost_std = float(transitions.cost_std[i])
        price = 0.5 * weight * (shift / cost_std) ** 2 if cost_std > 0 else 0.0
        smoothed = grid.smooth(value, kernels[i])
        mean = places(grid.centres, grid.means(environment, i))

        def pay(
            a: Tensor,
            mean: Tensor = mean,
            smoothed: Tensor = smoothed,
            b: float = 2 * shift / float(grid.centres[-1] - grid.centres[0]),
            p: float = price,
        ) -> Tensor:
            reached = interpolate_at(smoothed, mean + as_image_axes(b * a))
            return reached - p * a.square().sum(dim=-1)

        most = pay(torch.zeros_like(choices[0]))
        tried = torch.full(most.shape, -1)
        for k, choice in enumerate(choices if shift != 0 else ()):
            paid = pay(choice)
            tried.masked_fill_(paid > most, k)
            most = torch.maximum(most, paid)
        action = torch.where((tried < 0)[:, None], 0.0, choices[tried])
        for halving in range(REFINEMENTS[dimensions] if shift != 0 else 0):
            for along in range(dimensions):
                action = _refine(pay, action, along, float(axis[1] - axis[0]) / 2**halving)
        value = grid.shaped(pay(action))
        values.insert(0, value)
        best.insert(0, action)
    return OptimalControl(
        value=float((value * grid.initial()).sum()),
        states=grid.centres.numpy(),
        values=torch.stack(values).numpy(),
        actions=torch.stack(best)
        .reshape(len(best), *value.shape, *[dimensions] * (dimensions > 1))
        .numpy(),
        times=environment.grid.times.numpy(),
    )


@torch.no_grad()
def policy_value(env: Any, policy: Policy, cells: int | None = None) -> float:
    """Expected return of a deterministic policy, without the noise of sampled episodes, on the
    cells of the optimum.

    Args:
        env: As for :func:`optimal_value`, with states of one or two dimensions.
        policy: Takes a batch of observations ``latent (n, d)`` and ``time (n, 1)`` to actions ``(n,
            d)``, as a vector environment's agent does; actions are clipped to [-1, 1], as there.
        cells: Number of cells per dimension, as for :func:`free_energy`.

    Raises:
        OptionError: If the states have more dimensions, or the problem cannot be solved for the
            reasons that
            :func:`optimal_value` names.
        ActionError: If the policy returns another shape, NaN or infinity.
    """
    environment, scale = decision_problem(env)
    grid = Cells.of(environment, cells)
    transitions, weight = environment.transitions, environment.control_cost_weight
    latent = grid.points.numpy().astype(np.float32)
    value = scale * grid.rewards(environment).mean(dim=0)
    kernels = grid.kernels(transitions.std)
    for i in reversed(range(environment.discretization_steps)):
        time = np.full((len(latent), 1), environment.grid.times[i], dtype=np.float32)
        action = _checked(policy({"latent": latent.copy(), "time": time}), latent.shape)
        shift = float(transitions.gain[i]) * environment.action_scale
        cost = control_cost(shift * action, transitions.cost_std[i].double().cpu())
        expected = grid.interpolate(
            grid.smooth(value, kernels[i]), grid.means(environment, i) + shift * action
        )
        value = expected - weight * grid.shaped(cost)
    return float((value * grid.initial()).sum())


def uncontrolled_value(env: Any, cells: int | None = None) -> float:
    """Expected return of the zero policy, on the same cells; arguments and errors as
    :func:`policy_value`.
    """
    return policy_value(env, lambda observation: np.zeros_like(observation["latent"]), cells)


def _checked(actions: Any, shape: tuple[int, ...]) -> Tensor:
    """Actions within [-1, 1], float64, or an ActionError if they are none."""
    array = np.asarray(actions)
    if array.shape != shape or not np.isfinite(array).all():
        got = f"shape {array.shape}" if array.shape != shape else "NaN or infinity"
        raise ActionError(f"the policy returned {got}, expected finite actions of shape {shape}")
    return torch.from_numpy(array.astype(np.float64)).clamp(-1, 1)


def _refine(pay: Any, action: Tensor, along: int, h: float) -> Tensor:
    """Actions ``(points, d)`` moved along one dimension to the best of three.

    These are the action itself, its neighbours at a distance ``h``, and the vertex of the parabola
    through them, all within [-1, 1].
    """
    step = torch.zeros_like(action)
    step[:, along] = h
    left, right = (action - step).clamp(-1, 1), (action + step).clamp(-1, 1)
    f, g, k = (pay(a) for a in (left, action, right))
    curvature = f - 2 * g + k
    vertex = torch.where(
        curvature < 0, 0.5 * (f - k) / curvature, torch.zeros_like(curvature)
    ).clamp(-1, 1)
    inside = (left[:, along] == action[:, along] - h) & (right[:, along] == action[:, along] + h)
    middle = torch.where(inside[:, None], action + vertex[:, None] * step, action)
    for candidate, paid in ((left, f), (right, k), (middle, pay(middle))):
        better = paid > g
        action, g = torch.where(better[:, None], candidate, action), torch.maximum(g, paid)
    return action
