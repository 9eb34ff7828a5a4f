r"""Guidance: steering by the gradient of the reward.

The base model tilted by :math:`\exp(\lambda r)` is what a control of
:math:`u = \tau \nabla \log V` samples, with :math:`V_s(x) = E[\exp(\lambda r(x_1)) \mid x_s = x]`.
Taking
:math:`\log V_s \approx \lambda\, r(E[x_1 \mid x_s])` at the mean :math:`\mu` of the next state, the
mean is shifted by

.. math:: \tau^2\, \lambda\, \nabla_{x}\, r(E[x_1 \mid x_s = x]) \big|_{x = \mu},

which is exact for Gaussian samples and a linear reward. The gradient goes through decoder and
network (``"network"``), or stops at the expected sample (``"endpoint"``), whose dependence on the
state is then taken as that of samples with unit variance, :math:`\alpha_s / (\alpha_s^2 +
\beta_s^2)`.

References:
    Domingo-Enrich et al., Adjoint Matching, ICLR 2025, for the control of a tilted model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowgym_gym.checks import check_choice, check_number
from flowgym_gym.envs.environment import Environment
from flowgym_gym.errors import OptionError, RewardError
from flowgym_gym.rewards import Reward
from flowgym_gym.types import FlowTensor

GRADIENTS = ("endpoint", "network")


class RewardGuidance:
    """A policy for :meth:`flowgym_gym.envs.Environment.sample` that follows the gradient of the
    reward.

    Args:
        environment: The torch environment, with a differentiable reward; any action type.
        strength: The ``lambda`` of the tilted model; a reward of 1 is worth so many nats.
        gradient: ``"network"`` or ``"endpoint"``; see the module.

    Raises:
        OptionError: If the reward is not differentiable, or another argument cannot be used.

    >>> import flowgym_gym
    >>> env = flowgym_gym.make("images/stable_diffusion", "images/redness", discretization_steps=4)
    >>> sample = env.sample(2, RewardGuidance(env, strength=30.0))
    >>> sample.rewards.shape, bool((sample.control_costs.sum(dim=0) > 0).all())
    (torch.Size([2]), True)
    """

    def __init__(
        self, environment: Environment[Any], strength: float, gradient: str = "endpoint"
    ) -> None:
        check_number("strength", strength)
        check_choice("gradient", gradient, GRADIENTS)
        if not environment.reward.differentiable:
            raise OptionError(f"{no_gradient(environment.reward)}: guidance follows its gradient")
        self.environment = environment
        self.strength = float(strength)
        self.through_network = gradient == "network"

    def __call__(self, x: FlowTensor, t: Tensor, **kwargs: Any) -> Tensor:
        """Actions for states ``(n, *)`` that are all at the same time."""
        env = self.environment
        index = torch.full((len(x),), int((env.times[:-1] == t[0]).nonzero()), device=x.device)
        here = env.transitions.at(index, x.data.ndim)
        shift = self.strength * here.std**2 * self.gradient(x, index, **kwargs)
        unit = here.gain * env.action_scale
        return torch.where(unit != 0, shift / unit, torch.zeros_like(shift))

    def gradient(self, x: FlowTensor, index: Tensor, **kwargs: Any) -> Tensor:
        """Gradient of the reward that the model expects, with respect to the next state at its free
        mean.

        Args:
            x: States, shape ``(n, *)``.
            index: Which visited time they are at, the same for all, int64, shape ``(n,)``.
            **kwargs: What :meth:`flowgym_gym.envs.Environment.start` returned.

        Returns:
            Shape ``(n, *)``.

        Raises:
            RewardError: If the reward carries no gradient.
        """
        env, i = self.environment, int(index[0])
        with torch.no_grad():
            output = env.predict(x, index, **kwargs)
            here = env.transitions.at(index, x.data.ndim)
            mean = here.mean_x * x.data + here.mean_output * output
            expected = env.expected_endpoint(x.data, output, index)
        last = i + 1 == env.discretization_steps
        factor = 1.0
        with torch.enable_grad():
            if last:
                point = sample = mean.requires_grad_()
            elif self.through_network:
                point = mean.requires_grad_()
                sample = env.expected_endpoint(
                    point, env.predict(type(x)(point), index + 1, **kwargs), index + 1
                )
            else:
                point = sample = expected.requires_grad_()
                alpha, beta = float(env.grid.alpha[i + 1]), float(env.grid.beta[i + 1])
                factor = alpha / (alpha**2 + beta**2)
            _, rewards, _ = env.score(type(x)(sample), **kwargs)
            if not rewards.requires_grad:
                raise RewardError(
                    f"{type(env.reward).__name__} says it is differentiable, but carries no "
                    "gradient"
                )
            (gradient,) = torch.autograd.grad(rewards.sum(), point)
        return factor * gradient


def no_gradient(reward: Reward[Any]) -> str:
    """What keeps a reward from guiding, and what to do where it could."""
    name = type(reward).__name__
    return (
        f"{name} is not differentiable; where its gradients do reach the samples, set "
        "differentiable = True in the class, else take another reward"
    )
