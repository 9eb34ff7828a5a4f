"""What a step of a run's environment costs, measured before a long training begins.

The steps are taken in a copy of the environment, which shares the model and nothing else, and none
of them is the last of its episode, so that no reward is asked: the training does not notice.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from flowgym_gym.agents.kinds import AnyVectorEnv
from flowgym_gym.agents.runs.memory import readable, resident_memory
from flowgym_gym.envs import DenoisingVectorEnv, environment_of
from flowgym_gym.envs.randomness import seeded
from flowgym_gym.models.base import BaseModel

# Seconds from which on a training is long.
LONG = 60.0
UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


@dataclass(frozen=True)
class StepCost:
    """What a step of a vector environment costs.

    Attributes:
        num_envs: Number of sub-environments.
        seconds: Time of a step of all of them.
        network: Of that the time within the network; of the slowest one where there are several.
        memory: Bytes that are in use, by where; of an accelerator the most that ever were.
    """

    num_envs: int
    seconds: float
    network: float
    memory: dict[str, int] = field(default_factory=dict)

    def total(self, timesteps: int) -> float:
        """Seconds of so many timesteps of all sub-environments together."""
        return self.seconds * timesteps / self.num_envs

    def describe(self, timesteps: int) -> str:
        """The cost of a step and of so many timesteps, in a line.

        >>> StepCost(8, 0.312, 0.29, {"cpu": 1_200_000_000}).describe(4480)  # doctest: +ELLIPSIS
        'a step of 8 environments takes 0.31 s (network 0.29 s), 1.2 GB in use; 4,480 timesteps: ...
        """
        used = " and ".join(
            f"{readable(size)} in use" + (f" on {where}" if where != "cpu" else "")
            for where, size in self.memory.items()
        )
        return (
            f"a step of {self.num_envs} environments takes {self.seconds:.2g} s (network "
            f"{self.network:.2g} s){f', {used}' if used else ''}; {timesteps:,} timesteps: about "
            f"{duration(self.total(timesteps))}, on top of which come learning, rewards and "
            "evaluations"
        )


def duration(seconds: float) -> str:
    """A time in words.

    >>> duration(174.7), duration(9000)
    ('3 minutes', '2.5 hours')
    """
    size, unit = next(((s, unit) for s, unit in UNITS if seconds >= 1.5 * s), UNITS[-1])
    number = seconds / size
    return f"{number:.0f} {unit}" if unit in ("seconds", "minutes") else f"{number:.1f} {unit}"


def cost_of_long(env: AnyVectorEnv, timesteps: int) -> str | None:
    """What a training of so many timesteps costs, in a line; None where it is not long, or where
    that cannot be told by a step.
    """
    if not isinstance(env.unwrapped, DenoisingVectorEnv) or timesteps <= 0:
        return None
    try:
        cost = measure_step(env, steps=1)
        # The first step may be slow for reasons of its own.
        if cost is not None and cost.total(timesteps) >= LONG:
            cost = measure_step(env, steps=2)
    except Exception:  # which the training will meet itself, where it is saved and said
        return None
    if cost is None or cost.total(timesteps) < LONG:
        return None
    return cost.describe(timesteps)


def measure_step(env: AnyVectorEnv, steps: int) -> StepCost | None:
    """What the last of some steps costs; None where an episode is no longer than these.

    Args:
        env: The vector environment, of this package, wrapped or not.
        steps: How many are taken.
    """
    if environment_of(env).discretization_steps <= steps:
        return None
    with seeded(0):
        env = copy.deepcopy(env)
        inner: Any = env.unwrapped
        split = inner.rollout.split
        models = (
            [inner.environment.base_model]
            if split is None
            else list({id(part.model): part.model for part in split.parts}.values())
        )
        devices = {model.device for model in models}
        env.reset(seed=0)
        action = np.zeros(env.action_space.shape or (), dtype=np.float32)
        with _watched(models) as spent:
            for _ in range(steps):
                spent.clear()
                started = time.perf_counter()
                env.step(action)
                seconds = time.perf_counter() - started
        env.close()
    network = max(spent.values(), default=0.0)
    return StepCost(env.num_envs, seconds, network, _memory_in_use(devices))


@contextmanager
def _watched(models: list[BaseModel[Any]]) -> Iterator[dict[int, float]]:
    """The seconds that each thread spends in the networks, by the thread's number."""
    spent: dict[int, float] = {}
    started: dict[int, float] = {}

    def before(model: BaseModel[Any], args: Any) -> None:
        started[threading.get_ident()] = time.perf_counter()

    def after(model: BaseModel[Any], args: Any, output: Any) -> None:
        if model.device.type == "cuda":  # which is asked, and goes on by itself
            torch.cuda.synchronize(model.device)
        thread = threading.get_ident()
        taken = time.perf_counter() - started[thread]
        spent[thread] = spent.get(thread, 0.0) + taken

    handles = [model.register_forward_pre_hook(before) for model in models]
    handles += [model.register_forward_hook(after) for model in models]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def _memory_in_use(devices: set[torch.device]) -> dict[str, int]:
    on_gpu = {
        str(device): torch.cuda.max_memory_allocated(device)
        for device in sorted(devices, key=str)
        if device.type == "cuda"
    }
    resident = resident_memory()
    return on_gpu or ({} if resident is None else {"cpu": resident})
