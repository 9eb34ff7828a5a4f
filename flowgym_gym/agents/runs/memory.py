"""How large a replay buffer may be: a transition holds two whole observations, so latents fill the
memory soon.
"""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import gymnasium

from flowgym_gym.errors import OptionError

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

AUTO = "auto"
# Of the memory that is available, what an automatic replay buffer takes at most.
SHARE = 4
MEMORY_INFO = Path("/proc/meminfo")
PROCESS_INFO = Path("/proc/self/status")
# What a container may take, what it has taken, and of that the files that it can give back.
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
MEMORY_TAKEN = Path("/sys/fs/cgroup/memory.current")
MEMORY_PARTS = Path("/sys/fs/cgroup/memory.stat")


def available_memory() -> int | None:
    """Bytes of memory that are available, as far as the system tells; None where it does not."""
    limits = []
    free = _number_in(MEMORY_INFO, r"MemAvailable: *(\d+) kB")
    if free is not None:
        limits.append(1024 * free)
    with suppress(OSError, ValueError):
        limit, taken = int(MEMORY_LIMIT.read_text()), int(MEMORY_TAKEN.read_text())
        files = _number_in(MEMORY_PARTS, r"^inactive_file (\d+)$") or 0
        limits.append(max(0, limit - taken + files))
    if not limits:
        # Elsewhere than on Linux: all that there is, taken or not.
        with suppress(AttributeError, OSError, ValueError):
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def resident_memory() -> int | None:
    """Bytes of memory that this process takes, as far as the system tells; None where it does
    not.
    """
    found = _number_in(PROCESS_INFO, r"^VmRSS:\s*(\d+) kB")
    return None if found is None else 1024 * found


def _number_in(path: Path, pattern: str) -> int | None:
    """The number that a pattern finds in a file; None where there is none."""
    with suppress(OSError):
        found = re.search(pattern, path.read_text(), re.MULTILINE)
        return None if found is None else int(found[1])
    return None


def transition_bytes(env: VecEnv) -> int:
    """Size of a transition in stable-baselines3's replay buffer.

    Two observations, an action, and reward, end and time-out, numbers of four bytes each.
    """
    assert isinstance(env.observation_space, gymnasium.spaces.Dict)
    observation = sum(math.prod(space.shape or ()) for space in env.observation_space.values())
    return 4 * (2 * observation + math.prod(env.action_space.shape or ()) + 3)


def replay_size(env: VecEnv, timesteps: int) -> int:
    """Transitions of an automatic replay buffer: the whole run, or what fits in a quarter of the
    available memory.
    """
    available = available_memory()
    fitting = timesteps if available is None else available // SHARE // transition_bytes(env)
    return max(env.num_envs, min(timesteps, fitting))


def check_replay_size(env: VecEnv, size: int) -> None:
    """Raise an OptionError if a replay buffer of so many transitions is larger than the available
    memory.
    """
    available, needed = available_memory(), size * transition_bytes(env)
    if available is not None and needed > available:
        raise OptionError(
            f"algo.buffer_size is {size}, a replay buffer of {readable(needed)}, but "
            f"{readable(available)} of memory are available; give at most "
            f"{available // transition_bytes(env)}, or {AUTO} for a quarter of the memory"
        )


def readable(size: int) -> str:
    """Bytes in a unit that suits their number.

    >>> readable(2_500_000_000), readable(3_000_000), readable(4_100)
    ('2.5 GB', '3 MB', '4 kB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.{1 if name == 'GB' else 0}f} {name}"
    return f"{size / 1e3:.0f} kB"
