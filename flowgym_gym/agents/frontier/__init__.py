r"""The reward-divergence frontier: what a method earns, against how far it leaves the base model.

The divergence is that of the steered process from the free one, in nats. Methods that steer pay it
step by step (the control cost), and by the chain rule the expected sum is the divergence of the two
laws of whole paths; the samples' own divergence is at most that.

Best of n is in :mod:`flowgym_gym.optimal_control.best_of_n`, guidance in
:mod:`flowgym_gym.optimal_control.guidance`.

**Agents** are trained at several reward scales and act deterministically. The scale of an agent is
the weight of the reward against the control costs, ``reward_scale / control_cost_weight``: what a
reward of 1 is worth in nats. At the optimum it is guidance's :math:`\lambda`.
"""

from flowgym_gym.agents.frontier.measure import Frontier, frontier
from flowgym_gym.agents.frontier.report import PICTURE, REPORT, against_best_of_n, draw, table
from flowgym_gym.agents.frontier.spec import BEST_OF
from flowgym_gym.optimal_control.best_of_n import (
    best_of_n,
    best_of_n_curve,
    kl_best_of_n,
    maximum_weights,
)
from flowgym_gym.optimal_control.guidance import RewardGuidance

__all__ = [
    "BEST_OF",
    "PICTURE",
    "REPORT",
    "Frontier",
    "RewardGuidance",
    "against_best_of_n",
    "best_of_n",
    "best_of_n_curve",
    "draw",
    "frontier",
    "kl_best_of_n",
    "maximum_weights",
    "table",
]
