"""Schedulers: how much data and how much noise a state holds at each time."""

from flowgym_gym.schedulers.base import (
    ConstantNoiseSchedule,
    MemorylessNoiseSchedule,
    NoiseSchedule,
    Scheduler,
)
from flowgym_gym.schedulers.continuous import CosineScheduler, OptimalTransportScheduler
from flowgym_gym.schedulers.diffusion import DiffusionScheduler
from flowgym_gym.schedulers.flow_match import FlowMatchScheduler

__all__ = [
    "ConstantNoiseSchedule",
    "CosineScheduler",
    "DiffusionScheduler",
    "FlowMatchScheduler",
    "MemorylessNoiseSchedule",
    "NoiseSchedule",
    "OptimalTransportScheduler",
    "Scheduler",
]
