"""stable-baselines3's algorithms with policies for latents, made from a run's settings."""

from __future__ import annotations

import warnings

from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm

from flowgym_gym.agents.runs.memory import AUTO, check_replay_size, replay_size
from flowgym_gym.agents.runs.presets import Settings
from flowgym_gym.agents.sb3.policies import (
    LatentActorCriticPolicy,
    LatentSACPolicy,
    LatentTQCPolicy,
)
from flowgym_gym.agents.sb3.vec_env import SB3VecEnv
from flowgym_gym.errors import FlowGymError, MissingExtraError, OptionError, reason


def classes(algo: str) -> tuple[type[BaseAlgorithm], type]:
    """The classes of an algorithm and its policy.

    Raises:
        MissingExtraError: If they need sb3-contrib, which no extra installs, and it is not there.
    """
    if algo == "ppo":
        return PPO, LatentActorCriticPolicy
    if algo == "sac":
        return SAC, LatentSACPolicy
    try:
        from sb3_contrib import TQC
    except ImportError as error:
        raise MissingExtraError(
            "algo 'tqc' needs sb3-contrib, which is not installed; run: pip install sb3-contrib"
        ) from error
    return TQC, LatentTQCPolicy


def make_algorithm(
    algo: str, env: SB3VecEnv, settings: Settings, seed: int | None, buffer_size: int | None = None
) -> BaseAlgorithm:
    """The untrained agent that settings describe; with a seed, every global random generator is
    seeded too.

    Args:
        algo: ``"ppo"``, ``"sac"`` or ``"tqc"``.
        env: Where it acts.
        settings: Complete ones, from :func:`load_preset` or :func:`override`.
        seed: Of all random numbers; None leaves the generators as they are.
        buffer_size: Transitions of the replay buffer; as the settings have it if None.

    Raises:
        OptionError: If stable-baselines3 does not accept the hyper-parameters, or the replay buffer
            does not fit in the memory.
    """
    algorithm, policy = classes(algo)
    hyper = dict(settings.algo)
    if algo != "ppo":
        size = hyper.get("buffer_size", AUTO) if buffer_size is None else buffer_size
        timesteps = settings.timesteps
        size = (
            replay_size(env, timesteps) if size == AUTO else max(env.num_envs, min(size, timesteps))
        )
        check_replay_size(env, size)
        hyper["buffer_size"] = size
    try:
        with warnings.catch_warnings():
            # Of short rollouts; `train` says it in a line.
            warnings.filterwarnings("ignore", message="You have specified a mini-batch size")
            return algorithm(
                policy, env, policy_kwargs=dict(settings.policy), seed=seed, verbose=0, **hyper
            )
    except FlowGymError:
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise OptionError(
            f"stable-baselines3's {algo.upper()} does not accept these settings: {reason(error)}"
        ) from error
