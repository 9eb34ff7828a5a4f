r"""The free energy, which no policy passes.

No policy passes the free energy

.. math:: F = E_{x_0}\left[ \lambda \log E[\exp(\text{scale} \cdot r / \lambda) \mid x_0] \right],

the expectation inside being over the free process (Todorov, Efficient computation of optimal actions, PNAS 2009);
actions without bounds reach it in the limit of small steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from flowgym_gym.errors import OptionError
from flowgym_gym.optimal_control.cells import Cells
from flowgym_gym.optimal_control.problem import decision_problem


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
    environment, scale = decision_problem(env)
    weight, transitions = environment.control_cost_weight, environment.transitions
    if weight == 0 or bool((transitions.std == 0)[transitions.gain != 0].any()):
        raise OptionError(
            f"control_cost_weight is {weight} and the steps' noise {transitions.std.min().item():.3g} to "
            f"{transitions.std.max().item():.3g}; the bound needs a weight above 0, and noise wherever an action acts"
        )
    grid = Cells.of(environment, cells)
    rewards = scale / weight * grid.rewards(environment)
    energy = rewards.logsumexp(dim=0) - math.log(len(rewards))
    kernels = grid.kernels(transitions.std)
    for i in reversed(range(environment.discretization_steps)):
        energy = grid.interpolate_exp(grid.smooth_exp(energy, kernels[i]), grid.means(environment, i))
    return float(weight * (energy * grid.initial()).sum())
