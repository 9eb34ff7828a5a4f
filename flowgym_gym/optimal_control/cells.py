"""Functions of states in one or two dimensions, on a uniform grid of cells."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from flowgym_gym.envs.environment import Environment, seeded
from flowgym_gym.errors import OptionError
from flowgym_gym.types import FlowTensor

# States beyond this many standard deviations of the initial noise are not visited.
REACH = 6.0
SUBCELLS = 16
# Interpolating between cells blurs the state a little at every step; this many cells per unit keep
# the optimum of 20 steps right to about a ten-thousandth, and more steps take more.
CELLS_PER_UNIT = {1: 150, 2: 15}


class Cells:
    """A uniform grid of cells over states of one or two dimensions; functions on it have shape
    ``(cells,) * d``.
    """

    def __init__(self, low: float, high: float, cells: int, dimensions: int) -> None:
        edges = torch.linspace(low, high, cells + 1, dtype=torch.float64)
        self.centres = (edges[1:] + edges[:-1]) / 2
        self.width = float(edges[1] - edges[0])
        self.low, self.high, self.cells, self.dimensions = low, high, cells, dimensions
        axes = torch.meshgrid(*[self.centres] * dimensions, indexing="ij")
        self.points = torch.stack([axis.flatten() for axis in axes], dim=1)

    @classmethod
    def of(cls, environment: Environment[Any], cells: int | None) -> Cells:
        """Cells that cover the initial noise and every state that actions in [-1, 1] lead to."""
        shape = environment.state_shape
        if len(shape) != 1 or shape[0] > 2:
            raise OptionError(f"states have shape {shape}, expected (1,) or (2,)")
        dimensions = shape[0]
        directions = [0.0, -1.0, 1.0]
        reached = []
        with seeded(0):
            for push in torch.cartesian_prod(*[torch.tensor(directions)] * dimensions).reshape(
                -1, dimensions
            ):
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
        """One value per cell as a function on the grid."""
        return values.reshape((self.cells,) * self.dimensions)

    def means(self, environment: Environment[Any], i: int) -> Tensor:
        """Mean of the free transition ``i`` from every cell's centre, shape ``(points, d)``."""
        x = self.points.to(environment.device, torch.float32)
        index = torch.full((len(x),), i, device=environment.device)
        here = environment.transitions.at(index, 2)
        output = environment.predict(FlowTensor(x), index)
        return (here.mean_x * x + here.mean_output * output).cpu().to(torch.float64)

    def rewards(self, environment: Environment[Any]) -> Tensor:
        """Rewards at points that divide each cell evenly, first dimension; a jump within a cell is
        seen as one.
        """
        offsets = (torch.arange(SUBCELLS, dtype=torch.float64) + 0.5) / SUBCELLS - 0.5
        if self.dimensions > 1:
            offsets = offsets.unflatten(0, (4, -1)).mean(dim=1)
        rewards = []
        for shift in torch.cartesian_prod(*[offsets] * self.dimensions).reshape(
            -1, self.dimensions
        ):
            x = (self.points + shift * self.width).to(environment.device, torch.float32)
            rewards.append(self.shaped(environment.score(FlowTensor(x))[1].cpu().to(torch.float64)))
        return torch.stack(rewards)

    def initial(self) -> Tensor:
        """Probability of each cell under the standard normal initial noise."""
        edges = torch.cat([self.centres - self.width / 2, self.centres[-1:] + self.width / 2])
        # Points at the centres have a variance that is greater by that of a cell.
        mass: Tensor = torch.special.ndtr(
            edges / math.sqrt(max(0.5, 1 - self.width**2 / 12))
        ).diff()
        mass = mass / mass.sum()
        return mass if self.dimensions == 1 else mass[:, None] * mass[None, :]

    def kernels(self, stds: Tensor) -> list[float]:
        """Deviations to smooth with at each step, which make up for what cells blur.

        Values that stand for whole cells, as mean rewards and the masses of a kernel do, are
        blurred by a variance of a twelfth of the squared width, interpolation blurs by a sixth on
        average, and a step that draws too little noise to make up for that leaves it to the one
        before.
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
        length = self.cells + 2 * reach
        spectrum = torch.fft.rfft(kernel / kernel.sum(), length)
        for _ in range(self.dimensions):
            # Along the last dimension, then turned, so that each dimension has its turn.
            rows = values.reshape(1, -1, self.cells)
            rows = torch.nn.functional.pad(rows, (reach, reach), mode="replicate")
            rows = torch.fft.irfft(torch.fft.rfft(rows) * spectrum, length)[..., 2 * reach :]
            values = self.shaped(rows).movedim(-1, 0)
        return values

    def smooth_exp(self, values: Tensor, std: float) -> Tensor:
        """``log E[exp(values(y + std z))]`` at every cell, as :meth:`smooth`."""
        if std == 0:
            return values
        slope = float(values.diff(dim=0).abs().max()) / self.width
        if self.dimensions > 1:
            slope = max(slope, float(values.diff(dim=1).abs().max()) / self.width)
        # The weight exp(values) moves the mass of the kernel by as much as slope * std standard
        # deviations.
        reach = min(self.cells, max(1, math.ceil((8 + slope * std) * std / self.width)))
        offsets = -torch.arange(-reach, reach + 1, dtype=torch.float64).abs() * self.width / std
        half = 0.5 * self.width / std
        upper, lower = (
            torch.special.log_ndtr(offsets + half),
            torch.special.log_ndtr(offsets - half),
        )
        kernel = upper + torch.log1p(-(lower - upper).exp())
        kernel = kernel - kernel.logsumexp(0)
        for _ in range(self.dimensions):
            rows = values.reshape(-1, 1, self.cells)
            rows = torch.nn.functional.pad(rows, (reach, reach), mode="replicate")[:, 0]
            blocks = [
                (part + kernel).logsumexp(-1)
                for part in rows.unfold(1, len(kernel), 1).split(64, dim=1)
            ]
            values = self.shaped(torch.cat(blocks, dim=1)).movedim(-1, 0)
        return values

    def interpolate(self, values: Tensor, at: Tensor) -> Tensor:
        """Linear interpolation at points ``(points, d)``, in the shape of a function on the
        cells.
        """
        return self.shaped(interpolate(values, self.centres, at))

    def interpolate_exp(self, values: Tensor, at: Tensor) -> Tensor:
        """``log`` of the linear interpolation of ``exp(values)``, as :meth:`interpolate`."""
        place = ((at - self.centres[0]) / self.width).clamp(0, self.cells - 1)
        below = place.floor().clamp(max=self.cells - 2)
        logs = []
        for corner in torch.cartesian_prod(*[torch.tensor([0, 1])] * self.dimensions).reshape(
            -1, self.dimensions
        ):
            weight = 1 - (place - below - corner).abs()
            logs.append(
                values[tuple((below.long() + corner).unbind(-1))] + weight.log().sum(dim=-1)
            )
        return self.shaped(torch.stack(logs).logsumexp(0))


def interpolate(values: Tensor, centres: Tensor, at: Tensor) -> Tensor:
    """Linear interpolation of values at the cells' centres, shape ``(cells,) * d``, at points ``(n,
    d)``; beyond the outermost centres values go on as at these.
    """
    return interpolate_at(values, places(centres, at))


def interpolate_at(values: Tensor, place: Tensor) -> Tensor:
    """As :func:`interpolate`, at points in the coordinates of an image, shape ``(n, 2)``."""
    image = values.reshape(1, 1, -1, values.shape[-1])
    return grid_sample(
        image, place.reshape(1, 1, -1, 2), align_corners=True, padding_mode="border"
    ).flatten()


def places(centres: Tensor, at: Tensor) -> Tensor:
    """Points ``(n, d)`` in the coordinates of an image, shape ``(n, 2)``: -1 and 1 at the outermost
    centres.
    """
    middle, half = (centres[0] + centres[-1]) / 2, (centres[-1] - centres[0]) / 2
    return as_image_axes((at - middle) / half)


def as_image_axes(points: Tensor) -> Tensor:
    """Points ``(..., d)`` with the axes of an image: two, the last one first."""
    if points.shape[-1] == 1:
        return torch.cat([points, torch.zeros_like(points)], dim=-1)
    return points.flip(-1)
