r"""The exact optimum of environments in low dimensions, to hold agents against.

In one dimension dynamic programming over state, time and action solves the environment's own decision problem: its
grid, transitions, action set, costs and reward. With the mean :math:`\mu_i(x)` of the free transition, its noise
:math:`\tau_i` and the shift :math:`b_i a` that an action :math:`a \in [-1, 1]` makes,

.. math::
    V_N(x) = \text{scale} \cdot r(x), \qquad
    V_i(x) = \max_{a} \left\{ E_z[V_{i+1}(\mu_i(x) + b_i a + \tau_i z)]
             - \tfrac{\lambda}{2} (b_i a / \tau_i)^2 \right\},

and the optimal value is :math:`E[V_0(x_0)]`. No policy passes the free energy

.. math:: F = E_{x_0}\left[ \lambda \log E[\exp(\text{scale} \cdot r / \lambda) \mid x_0] \right],

the expectation inside being over the free process (Todorov, Efficient computation of optimal actions, PNAS 2009);
actions without bounds reach it in the limit of small steps. Expectations over :math:`z` are convolutions on a uniform
grid of cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from flowgym_gym.envs.environment import Environment
from flowgym_gym.errors import OptionError
from flowgym_gym.types import FlowTensor

# States beyond this many standard deviations of the noise, or of the data's spread, are not visited.
REACH = 6.0
SUBCELLS = 16


@dataclass(frozen=True)
class OptimalControl:
    """Solution of a one-dimensional environment.

    Attributes:
        value: Expected return of the optimal policy from the environment's own initial states.
        states: Cell centres, shape ``(cells,)``.
        values: Value at every time, shape ``(steps + 1, cells)``.
        actions: Optimal action in [-1, 1], shape ``(steps, cells)``.
        times: Visited times, shape ``(steps + 1,)``.
    """

    value: float
    states: np.ndarray
    values: np.ndarray
    actions: np.ndarray
    times: np.ndarray

    def policy(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """The optimal action for observations of one or many environments, same shape as ``latent``."""
        latent, time = np.asarray(observation["latent"]), np.asarray(observation["time"])
        index = np.abs(self.times[:-1] - time).argmin(axis=-1)
        flat = [np.interp(x, self.states, self.actions[i]) for x, i in zip(latent.ravel(), index.ravel(), strict=True)]
        return np.asarray(flat, dtype=np.float32).reshape(latent.shape)


@torch.no_grad()
def optimal_value(env: Any, cells: int = 2001, actions: int = 201) -> OptimalControl:
    """Solve an environment with one-dimensional states by dynamic programming.

    Args:
        env: A Gymnasium environment, single or vector, wrapped by ``RewardScale`` or ``TimeGrid`` or not, or the torch
            environment.
        cells: Number of cells that the states are divided into.
        actions: Number of actions tried per state, before a parabola through the best refines it.

    Raises:
        OptionError: If the states have more than one dimension, or the network's predictions need keyword arguments.
    """
    environment, scale = _problem(env)
    if environment.state_shape != (1,):
        raise OptionError(f"states have shape {environment.state_shape}, dynamic programming takes (1,)")
    grid = _Cells.of(environment, cells)
    transitions, weight = environment.transitions, environment.control_cost_weight
    value = grid.terminal(environment, scale)
    choices = torch.linspace(-1, 1, actions, dtype=torch.float64)
    values: list[Tensor] = [value]
    best: list[Tensor] = []
    for i in reversed(range(environment.discretization_steps)):
        shift = float(transitions.gain[i]) * environment.action_scale
        std, cost_std = float(transitions.std[i]), float(transitions.cost_std[i])
        price = 0.5 * weight * (shift / cost_std) ** 2 if cost_std > 0 else 0.0
        smoothed = grid.smooth(value, std)
        mean = grid.means(environment, i)

        def pay(
            a: Tensor, mean: Tensor = mean, smoothed: Tensor = smoothed, b: float = shift, p: float = price
        ) -> Tensor:
            return grid.interpolate(smoothed, mean + b * a.reshape(-1, 1)) - p * a**2

        table = torch.stack([pay(a) for a in choices])
        at = table.argmax(dim=0)
        action = choices[at]
        if shift != 0:
            action = _refine(pay, action, float(choices[1] - choices[0]))
        value = torch.maximum(pay(action), table.amax(dim=0))
        values.insert(0, value)
        best.insert(0, action)
    return OptimalControl(
        value=float((value * grid.initial()).sum()),
        states=grid.centres.numpy(),
        values=torch.stack(values).numpy(),
        actions=torch.stack(best).numpy(),
        times=environment.grid.times.numpy(),
    )


@torch.no_grad()
def uncontrolled_value(env: Any, cells: int | None = None) -> float:
    """Expected return of the zero policy, on the same cells; arguments and errors as :func:`free_energy`."""
    environment, scale = _problem(env)
    grid = _Cells.of(environment, cells)
    value = grid.terminal(environment, scale)
    for i in reversed(range(environment.discretization_steps)):
        value = grid.interpolate(grid.smooth(value, float(environment.transitions.std[i])), grid.means(environment, i))
    return float((value * grid.initial()).sum())


@torch.no_grad()
def free_energy(env: Any, cells: int | None = None) -> float:
    """The bound on the expected return that no policy can pass, for states of one or two dimensions.

    Args:
        env: As for :func:`optimal_value`.
        cells: Number of cells per dimension; 2001 in one dimension and 201 in two unless given.

    Raises:
        OptionError: If the states have more dimensions, the environment draws no noise, or control costs nothing.
    """
    environment, scale = _problem(env)
    weight = environment.control_cost_weight
    if weight == 0 or environment.noise_level == 0:
        raise OptionError(
            f"control_cost_weight is {weight} and noise_level {environment.noise_level}; the bound needs both above 0"
        )
    grid = _Cells.of(environment, cells)
    energy = grid.terminal(environment, scale) / weight
    for i in reversed(range(environment.discretization_steps)):
        # exp underflows for large rewards unless the maximum is taken out.
        top = energy.max()
        std = float(environment.transitions.std[i])
        energy = grid.interpolate((grid.smooth((energy - top).exp(), std)).log() + top, grid.means(environment, i))
    return float(weight * (energy * grid.initial()).sum())


class _Cells:
    """A uniform grid of cells over states of one or two dimensions; functions on it have shape ``(cells,) * d``."""

    def __init__(self, low: float, high: float, cells: int, dimensions: int) -> None:
        edges = torch.linspace(low, high, cells + 1, dtype=torch.float64)
        self.centres = (edges[1:] + edges[:-1]) / 2
        self.width = float(edges[1] - edges[0])
        self.low, self.high, self.cells, self.dimensions = low, high, cells, dimensions
        axes = torch.meshgrid(*[self.centres] * dimensions, indexing="ij")
        self.points = torch.stack([axis.flatten() for axis in axes], dim=1)

    @classmethod
    def of(cls, environment: Environment[Any], cells: int | None) -> _Cells:
        """Cells that cover the noise and the free process's final states."""
        shape = environment.state_shape
        if len(shape) != 1 or shape[0] > 2:
            raise OptionError(f"states have shape {shape}, expected (1,) or (2,)")
        cells = cells or (2001 if shape == (1,) else 201)
        if cells < 3:
            raise OptionError(f"cells is {cells}, expected at least 3")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            final = environment.sample(512).latents.data
        spread = float(final.std())
        low = min(-REACH, float(final.min()) - 2 * spread)
        high = max(REACH, float(final.max()) + 2 * spread)
        return cls(low, high, cells, shape[0])

    def shaped(self, values: Tensor) -> Tensor:
        return values.reshape((self.cells,) * self.dimensions)

    def means(self, environment: Environment[Any], i: int) -> Tensor:
        """Mean of the free transition ``i`` from every cell's centre, shape ``(points, d)``."""
        x = self.points.to(environment.device, torch.float32)
        index = torch.full((len(x),), i, device=environment.device)
        here = environment.transitions.at(index, 2)
        output = environment.predict(FlowTensor(x), index)
        return (here.mean_x * x + here.mean_output * output).cpu().to(torch.float64)

    def terminal(self, environment: Environment[Any], scale: float) -> Tensor:
        """Scaled reward, averaged over each cell, so that jumps of the reward fall between cells without bias."""
        offsets = (torch.arange(SUBCELLS, dtype=torch.float64) + 0.5) / SUBCELLS - 0.5
        if self.dimensions > 1:
            offsets = offsets[::4]
        total = torch.zeros(len(self.points), dtype=torch.float64)
        shifts = torch.cartesian_prod(*[offsets] * self.dimensions).reshape(-1, self.dimensions)
        for shift in shifts:
            x = (self.points + shift * self.width).to(environment.device, torch.float32)
            _, rewards, _ = environment.score(FlowTensor(x))
            total += rewards.cpu().to(torch.float64)
        return self.shaped(scale * total / len(shifts))

    def initial(self) -> Tensor:
        """Probability of each cell under the standard normal initial noise."""
        edges = torch.cat([self.centres - self.width / 2, self.centres[-1:] + self.width / 2])
        mass: Tensor = torch.special.ndtr(edges).diff()
        mass = mass / mass.sum()
        return mass if self.dimensions == 1 else mass[:, None] * mass[None, :]

    def smooth(self, values: Tensor, std: float) -> Tensor:
        """``E[values(y + std z)]`` at every cell; beyond the grid values go on as at its edge."""
        if std == 0:
            return values
        reach = max(1, math.ceil(8 * std / self.width))
        edges = (torch.arange(-reach, reach + 2, dtype=torch.float64) - 0.5) * self.width / std
        kernel = torch.special.ndtr(edges).diff()
        kernel = (kernel / kernel.sum()).reshape(1, 1, -1)
        for _ in range(self.dimensions):
            # Along the last dimension, then turned, so that each dimension has its turn.
            rows = values.reshape(-1, 1, self.cells)
            rows = torch.nn.functional.pad(rows, (reach, reach), mode="replicate")
            values = self.shaped(torch.nn.functional.conv1d(rows, kernel)).movedim(-1, 0)
        return values

    def interpolate(self, values: Tensor, at: Tensor) -> Tensor:
        """Linear interpolation at points ``(points, d)``, in the shape of a function on the cells."""
        first, last = float(self.centres[0]), float(self.centres[-1])
        place = (2 * (at - first) / (last - first) - 1).clamp(-1, 1)
        if self.dimensions == 1:
            place = torch.cat([place, torch.zeros_like(place)], dim=1)
            image = values.reshape(1, 1, 1, -1)
        else:
            place, image = place.flip(-1), values[None, None]
        sampled = grid_sample(image, place.reshape(1, 1, -1, 2), align_corners=True, padding_mode="border")
        return self.shaped(sampled.flatten())


def _refine(pay: Any, action: Tensor, h: float) -> Tensor:
    """The vertex of the parabola through the best action and its neighbours, within [-1, 1]."""
    left, right = (action - h).clamp(-1, 1), (action + h).clamp(-1, 1)
    f, g, k = (pay(a) for a in (left, action, right))
    curvature = f - 2 * g + k
    step = torch.where(curvature < 0, 0.5 * h * (f - k) / curvature, torch.zeros_like(curvature))
    inside = (action > -1) & (action < 1)
    refined = torch.where(inside, action + step.clamp(-h, h), action)
    return torch.where(pay(refined) > g, refined, action)


def _problem(env: Any) -> tuple[Environment[Any], float]:
    """The torch environment behind any of its interfaces, and the weight of the terminal reward."""
    if isinstance(env, Environment):
        return env, env.reward_scale
    if not isinstance(env, gymnasium.Env | gymnasium.vector.VectorEnv):
        raise OptionError(f"env is a {type(env).__name__}, expected a flowgym environment")
    rollout = getattr(env.unwrapped, "rollout", None)
    if rollout is None:
        raise OptionError(f"env is {env}, expected a flowgym environment")
    inner: Any = env
    while not hasattr(inner, "reward_scale"):
        inner = inner.env
    return rollout.environment, float(inner.reward_scale)
