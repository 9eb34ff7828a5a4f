"""Writing the policy of a run's agent alone, for :func:`flowgym_gym.agents.load_policy`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flowgym_gym.agents.kinds import Options
from flowgym_gym.agents.sb3.exported import (
    DESCRIPTION,
    FORMAT,
    GAUSSIAN,
    POSTPROCESSING,
    PREPROCESSING,
    SQUASHED,
    WEIGHTS,
)
from flowgym_gym.agents.sb3.networks import LOG_STD_RANGE
from flowgym_gym.errors import CheckpointError, OptionError


def export(run: str | os.PathLike[str], path: str | os.PathLike[str], which: str = "best") -> Path:
    """Write the policy of a run's agent into a folder of its own, for :func:`load_policy`.

    Args:
        run: The run folder, or what ``train`` returned.
        path: The folder to write to: new or empty.
        which: ``"best"`` or ``"newest"``; see ``load_agent``.

    Returns:
        The folder.

    Raises:
        OptionError: If there is no agent in ``run``, or ``path`` is taken.
        CheckpointError: If the agent cannot be read, or the folder cannot be written.
        MissingExtraError: If stable-baselines3 is not installed: writing needs it.
    """
    from flowgym_gym import agents

    _ = agents.load_agent  # Says what is missing where stable-baselines3 is.
    from flowgym_gym.agents.runs.config import read_config
    from flowgym_gym.agents.runs.files import BEST, write_json
    from flowgym_gym.agents.runs.opening import open_agent

    folder, config = Path(path), read_config(Path(run))
    agent, checkpoint = open_agent(Path(run), which, only_policy=True)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(
            f"{folder} is there and not an empty folder; choose another one for the policy"
        )
    tensors, architecture = _actor(agent.policy)
    settings = config.settings
    observation_space: Any = agent.observation_space
    action_space: Any = agent.action_space
    description = {
        "format": FORMAT,
        "architecture": architecture,
        "observation_space": {name: list(space.shape) for name, space in observation_space.items()},
        "action_space": {
            "shape": list(action_space.shape),
            "low": float(action_space.low.flat[0]),
            "high": float(action_space.high.flat[0]),
        },
        "preprocessing": PREPROCESSING,
        "postprocessing": POSTPROCESSING[architecture["distribution"]],
        "env_id": config.env_id,
        "env": settings.env,
        "wrappers": settings.wrappers,
        "algo": config.algo,
        "seed": config.seed,
        "timesteps": agent.num_timesteps,
        "checkpoint": "best" if checkpoint.parent.name == BEST else "newest",
        "versions": config.versions or {},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            folder / WEIGHTS,
        )
        # safetensors' files are for their owner alone.
        (folder / WEIGHTS).chmod(0o644)
        write_json(folder / DESCRIPTION, description)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the policy cannot be written to {folder}: {error}") from error
    return folder


def _actor(policy: Any) -> tuple[dict[str, Tensor], Options]:
    """The weights of an agent's actor under the names of :class:`GaussianActor`, and how that is to
    be built.
    """
    from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN

    from flowgym_gym.agents.sb3.policies import LatentActorCriticPolicy

    if isinstance(policy, LatentActorCriticPolicy):
        distribution, log_std, state_dependent_std = (
            GAUSSIAN,
            policy.log_std.data,
            policy.state_dependent_std,
        )
        log_std_range = LOG_STD_RANGE if state_dependent_std else None
        modules = {"encoder": policy.pi_features_extractor, "mean": policy.action_net}
        if state_dependent_std:
            modules["log_std_net"] = policy.log_std_net
    else:
        actor, state_dependent_std = policy.actor, True
        distribution, log_std = SQUASHED, torch.zeros(policy.action_space.shape).flatten()
        log_std_range = (LOG_STD_MIN, LOG_STD_MAX)
        modules = {
            "encoder": actor.features_extractor,
            "mean": actor.mu,
            "log_std_net": actor.log_std,
        }
    tensors = {
        f"{prefix}.{key}": value
        for prefix, module in modules.items()
        for key, value in module.state_dict().items()
    }
    architecture = {
        "width": policy.width,
        "blocks": policy.blocks,
        "distribution": distribution,
        "state_dependent_std": state_dependent_std,
        "log_std_range": log_std_range,
    }
    return {**tensors, "log_std": log_std}, architecture
