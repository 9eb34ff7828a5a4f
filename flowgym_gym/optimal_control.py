r"""The exact optimum of environments in low dimensions, to hold agents against.

In one or two dimensions dynamic programming over state, time and action solves the environment's own decision
problem: its grid, transitions, action set, costs and reward. With the mean :math:`\mu_i(x)` of the free transition, its
noise :math:`\tau_i` and the shift :math:`b_i a` that an action :math:`a \in [-1, 1]` makes,

.. math::
    V_N(x) = \text{scale} \cdot r(x), \qquad
    V_i(x) = \max_{a} \left\{ E_z[V_{i+1}(\mu_i(x) + b_i a + \tau_i z)]
             - \tfrac{\lambda}{2} \lVert b_i a / \tau_i \rVert^2 \right\},

and the optimal value is :math:`E[V_0(x_0)]`. No policy passes the free energy

.. math:: F = E_{x_0}\left[ \lambda \log E[\exp(\text{scale} \cdot r / \lambda) \mid x_0] \right],

the expectation inside being over the free process (Todorov, Efficient computation of optimal actions, PNAS 2009);
actions without bounds reach it in the limit of small steps. Expectations over :math:`z` are convolutions on a uniform
grid of cells that covers every state an agent can steer to; the exponentials stay logarithms throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from flowgym_gym.dynamics import control_cost
from flowgym_gym.envs.environment import Environment, seeded
from flowgym_gym.errors import ActionError, OptionError
from flowgym_gym.types import FlowTensor
from flowgym_gym.wrappers import RewardScale, TimeGrid
from flowgym_gym.wrappers.vector import RewardScale as VectorRewardScale
from flowgym_gym.wrappers.vector import TimeGrid as VectorTimeGrid

Policy = Callable[[dict[str, np.ndarray]], np.ndarray]

# States beyond this many standard deviations of the initial noise are not visited.
REACH = 6.0
SUBCELLS = 16
# Interpolating between cells blurs the state a little at every step; this many cells per unit keep the optimum of 20
# steps right to about a ten-thousandth, and more steps take more.
CELLS_PER_UNIT = {1: 150, 2: 15}
# Actions tried per state in each dimension, and how often the best is refined, over half the distance each time.
ACTIONS = {1: 201, 2: 17}
REFINEMENTS = {1: 1, 2: 4}
# What may stand around a denoising environment without changing its decision problem.
NEUTRAL = (
    RewardScale,
    TimeGrid,
    VectorRewardScale,
    VectorTimeGrid,
    gymnasium.wrappers.OrderEnforcing,
    gymnasium.wrappers.PassiveEnvChecker,
    gymnasium.wrappers.RecordEpisodeStatistics,
    gymnasium.wrappers.RecordVideo,
    gymnasium.wrappers.vector.RecordEpisodeStatistics,
    gymnasium.wrappers.vector.RecordVideo,
)


@dataclass(frozen=True)
class OptimalControl:
    """Solution of an environment with states of one or two dimensions.

    Attributes:
        value: Expected return of the optimal policy from the environment's own initial states.
        states: Cell centres along each dimension, shape ``(cells,)``.
        values: Value at every time, shape ``(steps + 1, cells)``, or ``(steps + 1, cells, cells)``.
        actions: Optimal action in [-1, 1], shape ``(steps, cells)``, or ``(steps, cells, cells, 2)``.
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
        index = np.abs(self.times[:-1] - time).argmin(axis=-1).reshape(-1)
        dimensions = self.values.ndim - 1
        points = torch.from_numpy(latent.reshape(-1, dimensions).astype(np.float64))
        centres = torch.from_numpy(self.states)
        fields = torch.from_numpy(self.actions.reshape(*self.values[:-1].shape, dimensions))
        actions = torch.empty_like(points)
        for i in np.unique(index):
            for axis in range(dimensions):
                actions[index == i, axis] = _interpolate(fields[i, ..., axis], centres, points[index == i])
        return actions.numpy().astype(np.float32).reshape(latent.shape)


@torch.no_grad()
def optimal_value(env: Any, cells: int | None = None, actions: int | None = None) -> OptimalControl:
    """Solve an environment with states of one or two dimensions by dynamic programming, with actions in [-1, 1].

    In two dimensions that takes about a minute.

    Args:
        env: A Gymnasium environment, single or vector, wrapped by ``RewardScale`` or ``TimeGrid`` or not, or the torch
            environment (which does not clip actions itself).
        cells: Number of cells that each dimension is divided into; by default 150 for each unit of length in one
            dimension and 15 in two, and more for more than 20 steps.
        actions: Number of actions tried per state in each dimension, before parabolas through the best refine it; by
            default 201 in one dimension and 17 in two.

    Raises:
        OptionError: If the states have more dimensions, the initial states are not standard normal, the
            network's predictions need keyword arguments, or another wrapper changes the problem.
    """
    environment, scale = _problem(env)
    grid = _Cells.of(environment, cells)
    dimensions = grid.dimensions
    transitions, weight = environment.transitions, environment.control_cost_weight
    value = scale * grid.rewards(environment).mean(dim=0)
    kernels = grid.kernels(transitions.std)
    axis = torch.linspace(-1, 1, ACTIONS[dimensions] if actions is None else actions, dtype=torch.float64)
    choices = torch.cartesian_prod(*[axis] * dimensions).reshape(-1, dimensions)
    values: list[Tensor] = [value]
    best: list[Tensor] = []
    for i in reversed(range(environment.discretization_steps)):
        shift = float(transitions.gain[i]) * environment.action_scale
        cost_std = float(transitions.cost_std[i])
        price = 0.5 * weight * (shift / cost_std) ** 2 if cost_std > 0 else 0.0
        smoothed = grid.smooth(value, kernels[i])
        mean = grid.means(environment, i)

        def pay(
            a: Tensor, mean: Tensor = mean, smoothed: Tensor = smoothed, b: float = shift, p: float = price
        ) -> Tensor:
            return grid.interpolate(smoothed, mean + b * a).flatten() - p * (a**2).sum(dim=-1)

        action = torch.zeros_like(grid.points)
        most = pay(action)
        for choice in choices if shift != 0 else ():
            paid = pay(choice)
            action[paid > most] = choice
            most = torch.maximum(most, paid)
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
        actions=torch.stack(best).reshape(len(best), *value.shape, *[dimensions] * (dimensions > 1)).numpy(),
        times=environment.grid.times.numpy(),
    )


@torch.no_grad()
def policy_value(env: Any, policy: Policy, cells: int | None = None) -> float:
    """Expected return of a deterministic policy, without the noise of sampled episodes, on the cells of the optimum.

    Args:
        env: As for :func:`optimal_value`, with states of one or two dimensions.
        policy: Takes a batch of observations ``latent (n, d)`` and ``time (n, 1)`` to actions ``(n, d)``, as a
            vector environment's agent does; actions are clipped to [-1, 1], as there.
        cells: Number of cells per dimension, as for :func:`free_energy`.

    Raises:
        OptionError: If the states have more dimensions, or the problem cannot be solved for the reasons that
            :func:`optimal_value` names.
        ActionError: If the policy returns another shape, NaN or infinity.
    """
    environment, scale = _problem(env)
    grid = _Cells.of(environment, cells)
    transitions, weight = environment.transitions, environment.control_cost_weight
    latent = grid.points.numpy().astype(np.float32)
    value = scale * grid.rewards(environment).mean(dim=0)
    kernels = grid.kernels(transitions.std)
    for i in reversed(range(environment.discretization_steps)):
        time = np.full((len(latent), 1), environment.grid.times[i], dtype=np.float32)
        action = _checked(policy({"latent": latent.copy(), "time": time}), latent.shape)
        shift = float(transitions.gain[i]) * environment.action_scale
        cost = control_cost(shift * action, transitions.cost_std[i].double().cpu())
        expected = grid.interpolate(grid.smooth(value, kernels[i]), grid.means(environment, i) + shift * action)
        value = expected - weight * grid.shaped(cost)
    return float((value * grid.initial()).sum())


def uncontrolled_value(env: Any, cells: int | None = None) -> float:
    """Expected return of the zero policy, on the same cells; arguments and errors as :func:`policy_value`."""
    return policy_value(env, lambda observation: np.zeros_like(observation["latent"]), cells)


@torch.no_grad()
def free_energy(env: Any, cells: int | None = None) -> float:
    """The bound on the expected return that no policy can pass, for states of one or two dimensions.

    Args:
        env: As for :func:`optimal_value`.
        cells: Number of cells per dimension; by default 150 for each unit of length in one dimension and 15 in two,
            and more for more than 20 steps.

    Raises:
        OptionError: If the states have more dimensions, a step that can be steered draws no noise, control costs
            nothing, or the problem cannot be solved for the reasons that :func:`optimal_value` names.
    """
    environment, scale = _problem(env)
    weight, transitions = environment.control_cost_weight, environment.transitions
    if weight == 0 or bool((transitions.std == 0)[transitions.gain != 0].any()):
        raise OptionError(
            f"control_cost_weight is {weight} and the steps' noise {transitions.std.min().item():.3g} to "
            f"{transitions.std.max().item():.3g}; the bound needs a weight above 0, and noise wherever an action acts"
        )
    grid = _Cells.of(environment, cells)
    rewards = scale / weight * grid.rewards(environment)
    energy = rewards.logsumexp(dim=0) - math.log(len(rewards))
    kernels = grid.kernels(transitions.std)
    for i in reversed(range(environment.discretization_steps)):
        energy = grid.interpolate_exp(grid.smooth_exp(energy, kernels[i]), grid.means(environment, i))
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
        """Cells that cover the initial noise and every state that actions in [-1, 1] lead to."""
        shape = environment.state_shape
        if len(shape) != 1 or shape[0] > 2:
            raise OptionError(f"states have shape {shape}, expected (1,) or (2,)")
        dimensions = shape[0]
        directions = [0.0, -1.0, 1.0]
        reached = []
        with seeded(0):
            for push in torch.cartesian_prod(*[torch.tensor(directions)] * dimensions).reshape(-1, dimensions):
                action = push.to(environment.device)
                sample = environment.sample(512, lambda x, t, a=action: a.expand_as(x.data))
                reached.append(torch.stack([x.data.cpu() for x in sample.trajectory]))
        states = torch.stack(reached).double()
        margin = 2 * float(states[0, -1].std())
        low = min(-REACH, float(states.min()) - margin)
        high = max(REACH, float(states.max()) + margin)
        if cells is None:
            refinement = max(1.0, environment.discretization_steps / 20) ** 0.5
            cells = math.ceil((high - low) * CELLS_PER_UNIT[dimensions] * refinement)
        if cells < 3:
            raise OptionError(f"cells is {cells}, expected at least 3")
        return cls(low, high, cells, dimensions)

    def shaped(self, values: Tensor) -> Tensor:
        return values.reshape((self.cells,) * self.dimensions)

    def means(self, environment: Environment[Any], i: int) -> Tensor:
        """Mean of the free transition ``i`` from every cell's centre, shape ``(points, d)``."""
        x = self.points.to(environment.device, torch.float32)
        index = torch.full((len(x),), i, device=environment.device)
        here = environment.transitions.at(index, 2)
        output = environment.predict(FlowTensor(x), index)
        return (here.mean_x * x + here.mean_output * output).cpu().to(torch.float64)

    def rewards(self, environment: Environment[Any]) -> Tensor:
        """Rewards at points that divide each cell evenly, first dimension; a jump within a cell is seen as one."""
        offsets = (torch.arange(SUBCELLS, dtype=torch.float64) + 0.5) / SUBCELLS - 0.5
        if self.dimensions > 1:
            offsets = offsets.unflatten(0, (4, -1)).mean(dim=1)
        rewards = []
        for shift in torch.cartesian_prod(*[offsets] * self.dimensions).reshape(-1, self.dimensions):
            x = (self.points + shift * self.width).to(environment.device, torch.float32)
            rewards.append(self.shaped(environment.score(FlowTensor(x))[1].cpu().to(torch.float64)))
        return torch.stack(rewards)

    def initial(self) -> Tensor:
        """Probability of each cell under the standard normal initial noise."""
        edges = torch.cat([self.centres - self.width / 2, self.centres[-1:] + self.width / 2])
        # Points at the centres have a variance that is greater by that of a cell.
        mass: Tensor = torch.special.ndtr(edges / math.sqrt(max(0.5, 1 - self.width**2 / 12))).diff()
        mass = mass / mass.sum()
        return mass if self.dimensions == 1 else mass[:, None] * mass[None, :]

    def kernels(self, stds: Tensor) -> list[float]:
        """Deviations to smooth with at each step, which make up for what cells blur.

        Values that stand for whole cells, as mean rewards and the masses of a kernel do, are blurred by a variance of a
        twelfth of the squared width, interpolation blurs by a sixth on average, and a step that draws too little noise
        to make up for that leaves it to the one before.
        """
        cell, kernels = self.width**2 / 12, []
        blur = cell
        for std in reversed(stds.tolist()):
            blur += 2 * cell - std**2
            kernels.append(math.sqrt(max(0.0, -blur - cell)))
            blur = blur if kernels[-1] == 0 else 0.0
        return kernels[::-1]

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

    def smooth_exp(self, values: Tensor, std: float) -> Tensor:
        """``log E[exp(values(y + std z))]`` at every cell, as :meth:`smooth`."""
        if std == 0:
            return values
        slope = float(values.diff(dim=0).abs().max()) / self.width
        if self.dimensions > 1:
            slope = max(slope, float(values.diff(dim=1).abs().max()) / self.width)
        # The weight exp(values) moves the mass of the kernel by as much as slope * std standard deviations.
        reach = min(self.cells, max(1, math.ceil((8 + slope * std) * std / self.width)))
        offsets = -torch.arange(-reach, reach + 1, dtype=torch.float64).abs() * self.width / std
        half = 0.5 * self.width / std
        upper, lower = torch.special.log_ndtr(offsets + half), torch.special.log_ndtr(offsets - half)
        kernel = upper + torch.log1p(-(lower - upper).exp())
        kernel = kernel - kernel.logsumexp(0)
        for _ in range(self.dimensions):
            rows = values.reshape(-1, 1, self.cells)
            rows = torch.nn.functional.pad(rows, (reach, reach), mode="replicate")[:, 0]
            blocks = [(part + kernel).logsumexp(-1) for part in rows.unfold(1, len(kernel), 1).split(64, dim=1)]
            values = self.shaped(torch.cat(blocks, dim=1)).movedim(-1, 0)
        return values

    def interpolate(self, values: Tensor, at: Tensor) -> Tensor:
        """Linear interpolation at points ``(points, d)``, in the shape of a function on the cells."""
        return self.shaped(_interpolate(values, self.centres, at))

    def interpolate_exp(self, values: Tensor, at: Tensor) -> Tensor:
        """``log`` of the linear interpolation of ``exp(values)``, as :meth:`interpolate`."""
        place = ((at - self.centres[0]) / self.width).clamp(0, self.cells - 1)
        below = place.floor().clamp(max=self.cells - 2)
        logs = []
        for corner in torch.cartesian_prod(*[torch.tensor([0, 1])] * self.dimensions).reshape(-1, self.dimensions):
            weight = 1 - (place - below - corner).abs()
            logs.append(values[tuple((below.long() + corner).unbind(-1))] + weight.log().sum(dim=-1))
        return self.shaped(torch.stack(logs).logsumexp(0))


def _interpolate(values: Tensor, centres: Tensor, at: Tensor) -> Tensor:
    """Linear interpolation of values at the cells' centres, shape ``(cells,) * d``, at points ``(n, d)``."""
    first, last = float(centres[0]), float(centres[-1])
    place = (2 * (at - first) / (last - first) - 1).clamp(-1, 1)
    if at.shape[1] == 1:
        place = torch.cat([place, torch.zeros_like(place)], dim=1)
        image = values.reshape(1, 1, 1, -1)
    else:
        place, image = place.flip(-1), values[None, None]
    return grid_sample(image, place.reshape(1, 1, -1, 2), align_corners=True, padding_mode="border").flatten()


def _checked(actions: Any, shape: tuple[int, ...]) -> Tensor:
    """Actions within [-1, 1], float64, or an ActionError if they are none."""
    array = np.asarray(actions)
    if array.shape != shape or not np.isfinite(array).all():
        got = f"shape {array.shape}" if array.shape != shape else "NaN or infinity"
        raise ActionError(f"the policy returned {got}, expected finite actions of shape {shape}")
    return torch.from_numpy(array.astype(np.float64)).clamp(-1, 1)


def _refine(pay: Any, action: Tensor, along: int, h: float) -> Tensor:
    """Actions ``(points, d)`` moved along one dimension to the best of three.

    These are the action itself, its neighbours at a distance ``h``, and the vertex of the parabola through them, all
    within [-1, 1].
    """
    step = torch.zeros_like(action)
    step[:, along] = h
    left, right = (action - step).clamp(-1, 1), (action + step).clamp(-1, 1)
    f, g, k = (pay(a) for a in (left, action, right))
    curvature = f - 2 * g + k
    vertex = torch.where(curvature < 0, 0.5 * (f - k) / curvature, torch.zeros_like(curvature)).clamp(-1, 1)
    inside = (left[:, along] == action[:, along] - h) & (right[:, along] == action[:, along] + h)
    middle = torch.where(inside[:, None], action + vertex[:, None] * step, action)
    for candidate, paid in ((left, f), (right, k), (middle, pay(middle))):
        better = paid > g
        action, g = torch.where(better[:, None], candidate, action), torch.maximum(g, paid)
    return action


def _problem(env: Any) -> tuple[Environment[Any], float]:
    """The torch environment behind any of its interfaces, and the weight of the terminal reward."""
    scale: float | None = None
    if isinstance(env, Environment):
        environment: Environment[Any] = env
    else:
        if not isinstance(env, gymnasium.Env | gymnasium.vector.VectorEnv):
            raise OptionError(f"env is a {type(env).__name__}, expected a flowgym environment")
        rollout = getattr(env.unwrapped, "rollout", None)
        if rollout is None:
            raise OptionError(f"env is {env}, expected a flowgym environment")
        environment = rollout.environment
        wrapper: Any = env
        while wrapper is not env.unwrapped:
            if not isinstance(wrapper, NEUTRAL):
                raise OptionError(f"the wrapper {type(wrapper).__name__} may change the problem; take it off")
            if scale is None and isinstance(wrapper, RewardScale | VectorRewardScale):
                scale = wrapper.reward_scale
            wrapper = wrapper.env
    with seeded(0), torch.no_grad():
        x, kwargs = environment.start(4096)
    if kwargs:
        raise OptionError(f"the model's predictions depend on {sorted(kwargs)}, which this solver does not know of")
    mean, std = x.data.double().mean().item(), x.data.double().std().item()
    if abs(mean) > 0.1 or abs(std - 1) > 0.1:
        raise OptionError(f"initial states have mean {mean:.3g} and std {std:.3g}, expected standard normal noise")
    return environment, environment.reward_scale if scale is None else scale
