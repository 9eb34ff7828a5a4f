"""Diffusion and flow models as Gymnasium environments: one denoising step is one ``Env.step``.

Importing this package registers the environment ids with Gymnasium. It imports neither torch nor
diffusers: the public names below, and the subpackages, are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flowgym_gym.catalogue import register_all
from flowgym_gym.registry import base_model_registry, reward_registry
from flowgym_gym.seeding import seeds

if TYPE_CHECKING:
    from flowgym_gym.envs import (
        ControlEnvironment,
        DenoisingEnv,
        DenoisingVectorEnv,
        Environment,
        NoiseEnvironment,
        Sample,
        VelocityEnvironment,
        make,
    )
    from flowgym_gym.models import BaseModel
    from flowgym_gym.rewards import Reward
    from flowgym_gym.schedulers import (
        ConstantNoiseSchedule,
        CosineScheduler,
        DiffusionScheduler,
        MemorylessNoiseSchedule,
        NoiseSchedule,
        OptimalTransportScheduler,
        Scheduler,
    )
    from flowgym_gym.types import FlowTensor

__version__ = "0.1.0"

_LAZY = {
    "BaseModel": "flowgym_gym.models",
    "ConstantNoiseSchedule": "flowgym_gym.schedulers",
    "ControlEnvironment": "flowgym_gym.envs",
    "CosineScheduler": "flowgym_gym.schedulers",
    "DenoisingEnv": "flowgym_gym.envs",
    "DenoisingVectorEnv": "flowgym_gym.envs",
    "DiffusionScheduler": "flowgym_gym.schedulers",
    "Environment": "flowgym_gym.envs",
    "FlowTensor": "flowgym_gym.types",
    "MemorylessNoiseSchedule": "flowgym_gym.schedulers",
    "NoiseEnvironment": "flowgym_gym.envs",
    "NoiseSchedule": "flowgym_gym.schedulers",
    "OptimalTransportScheduler": "flowgym_gym.schedulers",
    "Reward": "flowgym_gym.rewards",
    "Sample": "flowgym_gym.envs",
    "Scheduler": "flowgym_gym.schedulers",
    "VelocityEnvironment": "flowgym_gym.envs",
    "make": "flowgym_gym.envs",
}

_SUBMODULES = {
    "agents", "dynamics", "envs", "models", "optimal_control", "prompts", "rewards", "schedulers",
    "time_grid", "types",
    "wrappers",
}  # fmt: skip

__all__ = [
    "BaseModel",
    "ConstantNoiseSchedule",
    "ControlEnvironment",
    "CosineScheduler",
    "DenoisingEnv",
    "DenoisingVectorEnv",
    "DiffusionScheduler",
    "Environment",
    "FlowTensor",
    "MemorylessNoiseSchedule",
    "NoiseEnvironment",
    "NoiseSchedule",
    "OptimalTransportScheduler",
    "Reward",
    "Sample",
    "Scheduler",
    "VelocityEnvironment",
    "__version__",
    "base_model_registry",
    "make",
    "reward_registry",
    "seeds",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_all()
