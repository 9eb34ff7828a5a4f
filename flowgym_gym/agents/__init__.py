"""Training agents with stable-baselines3: an adapter, policies for latents, presets, ``train`` and
``evaluate``.

The names below are loaded when they are first used. All but ``load_policy`` need the ``agents``
extra: ``pip install "flowgym_gym[agents]"``.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flowgym_gym.errors import FlowGymError, MissingExtraError, reason

if TYPE_CHECKING:
    from flowgym_gym.agents.runs.evaluation import evaluate
    from flowgym_gym.agents.runs.export import export
    from flowgym_gym.agents.runs.opening import load_agent
    from flowgym_gym.agents.runs.preparation import Runners
    from flowgym_gym.agents.runs.presets import load_preset
    from flowgym_gym.agents.runs.training import train
    from flowgym_gym.agents.sb3.exported import load_policy
    from flowgym_gym.agents.sb3.policies import (
        LatentActorCriticPolicy,
        LatentSACPolicy,
        LatentTQCPolicy,
    )
    from flowgym_gym.agents.sb3.vec_env import SB3VecEnv

_LAZY = {
    "LatentActorCriticPolicy": "flowgym_gym.agents.sb3.policies",
    "LatentSACPolicy": "flowgym_gym.agents.sb3.policies",
    "LatentTQCPolicy": "flowgym_gym.agents.sb3.policies",
    "Runners": "flowgym_gym.agents.runs.preparation",
    "SB3VecEnv": "flowgym_gym.agents.sb3.vec_env",
    "evaluate": "flowgym_gym.agents.runs.evaluation",
    "export": "flowgym_gym.agents.runs.export",
    "load_agent": "flowgym_gym.agents.runs.opening",
    "load_policy": "flowgym_gym.agents.sb3.exported",
    "load_preset": "flowgym_gym.agents.runs.presets",
    "train": "flowgym_gym.agents.runs.training",
}

EXTRA = {"stable_baselines3", "matplotlib", "scipy", "yaml", "tqdm"}

__all__ = [
    "LatentActorCriticPolicy",
    "LatentSACPolicy",
    "LatentTQCPolicy",
    "MissingExtraError",
    "Runners",
    "SB3VecEnv",
    "evaluate",
    "export",
    "load_agent",
    "load_policy",
    "load_preset",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with imports_of_extra():
        module = importlib.import_module(_LAZY[name])
    value: object = getattr(module, name)
    globals()[name] = value
    return value


@contextmanager
def imports_of_extra() -> Iterator[None]:
    """Import inside what the ``agents`` extra installs.

    Raises:
        MissingExtraError: If a library is missing, or cannot be imported; it says which and what to
            do.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA:
            raise
        raise MissingExtraError(
            f"{__name__} needs {missing}, which is not installed; run: "
            'pip install "flowgym_gym[agents]", or in a '
            'clone pip install -e ".[agents]"'
        ) from error
    except (ImportError, OSError, ValueError) as error:
        # Of libraries that do not fit each other, or that read variables such as TQDM_MININTERVAL
        # when imported.
        if isinstance(error, FlowGymError):
            raise
        raise MissingExtraError(
            f"{__name__} cannot be imported: {type(error).__name__}: {reason(error)}{_where(error)}"
        ) from error


def _where(error: BaseException) -> str:
    """Which file of a library raised an error, as the end of a message."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" (in {frames[-1].filename})" if frames else ""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
