"""What wrappers of this package ask of the environment that they are given."""

from __future__ import annotations

from typing import Any

import gymnasium

from flowgym_gym.errors import OptionError

OBSERVATION_WRAPPERS = (gymnasium.ObservationWrapper, gymnasium.vector.VectorObservationWrapper)


def check_own_observations(env: Any) -> None:
    """Raise an OptionError if a wrapper between ``env`` and the environment changes the
    observations.
    """
    inner = env
    while inner is not env.unwrapped:
        if (
            isinstance(inner, OBSERVATION_WRAPPERS)
            or inner.observation_space != env.unwrapped.observation_space
        ):
            raise OptionError(
                f"the wrapper {type(inner).__name__} changes observations, and ToTorch would pass "
                "them by; put it outside of ToTorch"
            )
        inner = inner.env
