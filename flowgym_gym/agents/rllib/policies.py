"""The actor of an RLlib agent by itself: it acts and is saved without Ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from ray.rllib.algorithms.algorithm import Algorithm
from safetensors import SafetensorError
from safetensors.torch import save_file

from flowgym_gym.agents.kinds import Options
from flowgym_gym.agents.rllib.modules import LatentPPOModule, LatentSACModule
from flowgym_gym.agents.rllib.runner import WRAPPERS
from flowgym_gym.agents.runs.files import write_json
from flowgym_gym.agents.sb3.exported import (
    DESCRIPTION,
    FORMAT,
    POSTPROCESSING,
    PREPROCESSING,
    WEIGHTS,
    ExportedPolicy,
    GaussianActor,
)
from flowgym_gym.errors import CheckpointError, OptionError


def as_policy(algorithm: Algorithm) -> ExportedPolicy:
    """The policy of an algorithm now: what ``evaluate`` and ``predict`` take.

    Args:
        algorithm: Built from :func:`config`.

    Returns:
        A copy, which later training leaves as it is.

    Raises:
        OptionError: If its module is another than :func:`config` gives.
    """
    described, actor = _described(algorithm)
    copy = GaussianActor(described)
    copy.load_state_dict({name: torch.clone(value) for name, value in actor.state_dict().items()})
    return ExportedPolicy(copy.to("cpu", torch.float32).eval(), described)


def export(algorithm: Algorithm, path: str | os.PathLike[str]) -> Path:
    """Write the policy into a folder, for :func:`flowgym_gym.agents.load_policy`.

    Args:
        algorithm: Built from :func:`config`.
        path: A new or empty folder.

    Returns:
        The folder.

    Raises:
        OptionError: If the folder is taken, or the module is another than :func:`config` gives.
        CheckpointError: If the folder cannot be written.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(
            f"{folder} is there and not an empty folder; choose another one for the policy"
        )
    described, actor = _described(algorithm)
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in actor.state_dict().items()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS)
        # safetensors' files are for their owner alone.
        (folder / WEIGHTS).chmod(0o644)
        write_json(folder / DESCRIPTION, described)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the policy cannot be written to {folder}: {error}") from error
    return folder


def actor_of(algorithm: Algorithm) -> GaussianActor:
    """The actor that an algorithm trains: that of the learner, or where it has one, of the driver.

    Raises:
        OptionError: If its module is another than :func:`config` gives.
    """
    module: Any = algorithm.get_module()
    if not isinstance(module, LatentPPOModule | LatentSACModule):
        raise OptionError(
            f"the algorithm's module is a {type(module).__name__}, expected a LatentPPOModule or "
            "LatentSACModule; make its configuration with flowgym_gym.agents.rllib.config"
        )
    actor: GaussianActor = module.actor if isinstance(module, LatentPPOModule) else module.pi.actor
    return actor


def _described(algorithm: Algorithm) -> tuple[Options, GaussianActor]:
    """What ``policy.json`` holds, and the actor."""
    actor = actor_of(algorithm)
    module: Any = algorithm.get_module()
    ppo = isinstance(module, LatentPPOModule)
    config = algorithm.config
    env = dict(config.env_config)
    wrappers = env.pop(WRAPPERS, {})
    description = {
        "format": FORMAT,
        "architecture": actor.architecture,
        "observation_space": {
            name: list(space.shape) for name, space in module.observation_space.spaces.items()
        },
        "action_space": {
            "shape": list(module.action_space.shape),
            "low": float(module.action_space.low.flat[0]),
            "high": float(module.action_space.high.flat[0]),
        },
        "preprocessing": PREPROCESSING,
        "postprocessing": POSTPROCESSING[actor.distribution],
        "env_id": str(config.env).partition(":")[2],
        "env": env,
        "wrappers": wrappers,
        "algo": "ppo" if ppo else "sac",
        "engine": "rllib",
        "seed": config.seed,
    }
    return description, actor
