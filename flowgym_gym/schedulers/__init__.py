"""Schedulers: how much data and how much noise a state holds at each time."""

from flowgym_gym.schedulers.base import Scheduler
from flowgym_gym.schedulers.continuous import CosineScheduler, OptimalTransportScheduler
from flowgym_gym.schedulers.diffusion import DiffusionScheduler
from flowgym_gym.schedulers.flow_match import FlowMatchScheduler
from flowgym_gym.schedulers.noise_schedules import (
    ConstantNoiseSchedule,
    MemorylessNoiseSchedule,
    NoiseSchedule,
)

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
