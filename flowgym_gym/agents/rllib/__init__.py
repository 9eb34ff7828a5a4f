"""Training agents with Ray's RLlib, on one machine or many: only policies travel between them.

:func:`config` gives a ``PPOConfig`` or ``SACConfig`` that can be changed further like any other.
The names below are loaded when they are first used, and need the ``rllib`` extra: ``pip install
"flowgym_gym[rllib]"``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from flowgym_gym.errors import MissingExtraError

if TYPE_CHECKING:
    from flowgym_gym.agents.rllib.configuration import config
    from flowgym_gym.agents.rllib.modules import LatentPPOModule, LatentSACModule
    from flowgym_gym.agents.rllib.policies import as_policy, export
    from flowgym_gym.agents.rllib.runner import LatentEnvRunner

_LAZY = {
    "LatentEnvRunner": "flowgym_gym.agents.rllib.runner",
    "LatentPPOModule": "flowgym_gym.agents.rllib.modules",
    "LatentSACModule": "flowgym_gym.agents.rllib.modules",
    "as_policy": "flowgym_gym.agents.rllib.policies",
    "config": "flowgym_gym.agents.rllib.configuration",
    "export": "flowgym_gym.agents.rllib.policies",
}

__all__ = [
    "LatentEnvRunner",
    "LatentPPOModule",
    "LatentSACModule",
    "as_policy",
    "config",
    "export",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_LAZY[name])
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "flowgym_gym":
            raise
        raise MissingExtraError(
            f"{__name__} needs {missing}, which is not installed; run: "
            'pip install "flowgym_gym[rllib]", or in a clone '
            'pip install -c constraints-rllib.txt -e ".[rllib]"'
        ) from error
    value: object = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
