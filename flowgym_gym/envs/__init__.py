"""Environments: torch-native and batched, Gymnasium's single one, and Gymnasium's vector one."""

from flowgym_gym.envs.checker import check_vector_env
from flowgym_gym.envs.denoising import DenoisingEnv
from flowgym_gym.envs.environment import (
    ControlEnvironment,
    Environment,
    NoiseEnvironment,
    Sample,
    VelocityEnvironment,
)
from flowgym_gym.envs.making import make
from flowgym_gym.envs.rollout import environment_of
from flowgym_gym.envs.vector import DenoisingVectorEnv

__all__ = [
    "ControlEnvironment",
    "DenoisingEnv",
    "DenoisingVectorEnv",
    "Environment",
    "NoiseEnvironment",
    "Sample",
    "VelocityEnvironment",
    "check_vector_env",
    "environment_of",
    "make",
]
