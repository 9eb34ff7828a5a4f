"""What is known without learning: the optimum, the bound, best of n, and guidance by the reward's
gradient.

It needs torch and the environments only.
"""

from flowgym_gym.optimal_control.bound import free_energy
from flowgym_gym.optimal_control.guidance import RewardGuidance
from flowgym_gym.optimal_control.optimum import (
    OptimalControl,
    Policy,
    optimal_value,
    policy_value,
    uncontrolled_value,
)

__all__ = [
    "OptimalControl",
    "Policy",
    "RewardGuidance",
    "free_energy",
    "optimal_value",
    "policy_value",
    "uncontrolled_value",
]
