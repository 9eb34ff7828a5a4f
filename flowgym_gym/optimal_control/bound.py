r"""The free energy, which no policy passes.

No policy passes the free energy

.. math:: F = E_{x_0}\left[ \lambda \log E[\exp(\text{scale} \cdot r / \lambda) \mid x_0] \right],

the expectation inside being over the free process (Todorov, Efficient computation of optimal
actions, PNAS 2009); actions without bounds reach it in the limit of small steps.

For states of one or two dimensions :func:`free_energy` is exact up to its cells. Elsewhere
:func:`bound` estimates it from some continuations of each of some initial noises: the logarithm of
a mean of
:math:`n` is low by about its relative variance over :math:`2 n`, which is added back. The interval
is over initial noises. Where returns spread over many times :math:`\lambda`, a few of any number of
continuations decide, and the estimate stays too low; so it is made from quarters of the
continuations, too, and where these give another number, by more than half of the interval's width,
there is no estimate but a value that the free energy is at least: without the correction the
estimate is low on average.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from flowgym_gym.envs import environment_of
from flowgym_gym.errors import OptionError
from flowgym_gym.optimal_control.cells import Cells
from flowgym_gym.optimal_control.problem import decision_problem
from flowgym_gym.statistics import mean_and_interval


@torch.no_grad()
def free_energy(env: Any, cells: int | None = None) -> float:
    """The bound on the expected return that no policy can pass, for states of one or two
    dimensions.

    Args:
        env: As for :func:`optimal_value`.
        cells: Number of cells per dimension; by default 150 for each unit of length in one
            dimension and 15 in two, and more for more than 20 steps.

    Raises:
        OptionError: If the states have more dimensions, a step that can be steered draws no noise,
            control costs nothing, or the problem cannot be solved for the reasons that
            :func:`optimal_value` names.
    """
    environment, scale = decision_problem(env)
    weight, transitions = environment.control_cost_weight, environment.transitions
    if weight == 0 or bool((transitions.std == 0)[transitions.gain != 0].any()):
        raise OptionError(
            f"control_cost_weight is {weight} and the steps' noise "
            f"{transitions.std.min().item():.3g} to {transitions.std.max().item():.3g}; the bound "
            "needs a weight above 0, and noise wherever an action acts"
        )
    grid = Cells.of(environment, cells)
    rewards = scale / weight * grid.rewards(environment)
    energy = rewards.logsumexp(dim=0) - math.log(len(rewards))
    kernels = grid.kernels(transitions.std)
    for i in reversed(range(environment.discretization_steps)):
        energy = grid.interpolate_exp(
            grid.smooth_exp(energy, kernels[i]), grid.means(environment, i)
        )
    return float(weight * (energy * grid.initial()).sum())


def continued_returns(env: VectorEnv[Any, Any, Any], seeds: Iterable[int]) -> np.ndarray:
    """Returns of the base model, ``(seeds, continuations)``.

    Args:
        env: A denoising vector environment with autoreset mode ``"Disabled"``. Each of its
            sub-environments plays one continuation.
        seeds: A row's episodes begin with the noise and the prompt of the first sub-environment,
            which has this seed; the next ones draw their own noise from the seeds after it.

    Raises:
        OptionError: If the process draws no noise.
    """
    denoising: Any = env.unwrapped
    if not bool((environment_of(env).transitions.std > 0).any()):
        raise OptionError(
            "this process draws no noise: its control costs are no divergence, and the free energy "
            "bounds nothing; take a noise_level above 0"
        )
    n = env.num_envs
    still = np.zeros(env.action_space.shape or (), np.float32)
    rows = []
    for start in seeds:
        env.reset(seed=[start + i for i in range(n)])  # type: ignore[arg-type]
        state = denoising.get_state()
        for name, array in state.items():
            # Generators stay: they draw each continuation's own noise.
            if name in ("latents", "embeddings") or (name.startswith("kwargs/") and array.ndim):
                state[name] = np.repeat(array[:1], n, axis=0)
        denoising.set_state(state)
        total, done = np.zeros(n), False
        while not done:
            _, rewards, terminations, _, _ = env.step(still)
            total += rewards
            done = bool(terminations.all())
        rows.append(total)
    return np.array(rows)


def free_energies(returns: np.ndarray, weight: float, corrected: bool = True) -> np.ndarray:
    """Free energy from each noise, ``(noises,)``, for returns of the base model and this weight of
    control costs.

    Args:
        returns: From :func:`continued_returns`, ``(noises, continuations)``.
        weight: Of the control costs.
        corrected: Add the first-order bias back; without it the estimate is low on average.

    >>> gaussian = np.random.default_rng(0).normal(1.0, 2.0, (200, 4000))
    >>> bool(abs(free_energies(gaussian, 4.0).mean() - (1 + 2**2 / 2 / 4)) < 0.01)
    True
    """
    top = returns.max(axis=1, keepdims=True)
    weights = np.exp((returns - top) / weight)
    mean = weights.mean(axis=1)
    correction = (
        weights.var(axis=1, ddof=1) / mean**2 / (2 * returns.shape[1]) if corrected else 0.0
    )
    return np.asarray(top[:, 0] + weight * (np.log(mean) + correction))


def bound(returns: np.ndarray, weight: float) -> tuple[dict[str, float], bool]:
    """Mean free energy with its interval, and whether the continuations are enough for an estimate.

    If they are not, the interval is that of a mean without correction, which is low on average.

    Args:
        returns: From :func:`continued_returns`, ``(noises, continuations)``.
        weight: Of the control costs.
    """
    estimate = mean_and_interval(free_energies(returns, weight))
    size = returns.shape[1] // 4
    quarters = [
        free_energies(returns[:, i * size : (i + 1) * size], weight).mean() for i in range(4)
    ]
    if abs(estimate["mean"] - np.mean(quarters)) <= estimate["high"] - estimate["mean"]:
        return estimate, True
    return mean_and_interval(free_energies(returns, weight, corrected=False)), False
