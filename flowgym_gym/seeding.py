"""Seeds of many sub-environments that share no noise."""

from __future__ import annotations

import numpy as np

from flowgym_gym.checks import check_whole

# Seeds below are what Gymnasium's rule ``seed + i`` and evaluations take.
FIRST, LAST = 2**32, 2**63 - 1


def seeds(seed: int, num_envs: int, rank: int = 0) -> list[int]:
    """Seeds of sub-environments, for ``reset(seed=[...])``, that no other seed or rank has.

    ``reset(seed=0)`` gives sub-environment ``i`` the seed ``0 + i``, as everywhere in Gymnasium, so
    that runs with the seeds 0 and 1 have all but one of their sub-environments in common. These
    have none: they are spawned by numpy's ``SeedSequence`` from ``seed`` with the key
    ``(rank, i)``, and are at least ``2**32``, beyond all seeds that are written by hand, and below
    ``2**63``. An environment uses all of their bits.

    Args:
        seed: Of the run, a whole number of at least 0.
        num_envs: Number of sub-environments.
        rank: Which of several processes, or runners of a distributed engine, they belong to; below
            ``2**32``.

    Returns:
        One seed for each sub-environment. More sub-environments change nothing about those of the
        first ones.

    Raises:
        OptionError: If an argument is no whole number of that range.

    >>> from flowgym_gym import seeds
    >>> seeds(0, 2) == seeds(0, 3)[:2], set(seeds(0, 32)) & set(seeds(1, 32))
    (True, set())
    """
    check_whole("seed", seed, minimum=0)
    check_whole("num_envs", num_envs, maximum=FIRST)
    check_whole("rank", rank, minimum=0, maximum=FIRST - 1)
    # One word of 32 bits for each part of the key, so that no two keys look alike.
    keys = ((int(rank), i) for i in range(int(num_envs)))
    return [_spawn(int(seed), key) for key in keys]


def _spawn(seed: int, key: tuple[int, int]) -> int:
    (bits,) = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return FIRST + int(bits) % (LAST - FIRST + 1)
