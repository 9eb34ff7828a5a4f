"""The vector environment that a run's settings describe."""

from __future__ import annotations

import gymnasium
from gymnasium.vector import AutoresetMode

from flowgym_gym.agents.kinds import AnyVectorEnv, Options, SomeOptions
from flowgym_gym.agents.runs.presets import full_id
from flowgym_gym.errors import UnknownOptionError, did_you_mean, shown
from flowgym_gym.wrappers import vector as vector_wrappers

WRAPPERS = {
    "coarse_action": vector_wrappers.CoarseAction,
    "reward_scale": vector_wrappers.RewardScale,
    "time_grid": vector_wrappers.TimeGrid,
}


def make_vector_env(
    env_id: str,
    settings: SomeOptions,
    num_envs: int,
    autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
    render_mode: str | None = None,
) -> AnyVectorEnv:
    """The vector environment that settings describe, wrapped as by :func:`wrapped`.

    Args:
        env_id: The environment.
        settings: Of which ``env`` and ``wrappers`` count.
        num_envs: Number of sub-environments.
        autoreset_mode: When they are reset.
        render_mode: Of the environment.

    Raises:
        FlowGymError: If the environment or a wrapper does not take its arguments.
    """
    env = gymnasium.make_vec(
        full_id(env_id),
        num_envs=num_envs,
        autoreset_mode=autoreset_mode,
        render_mode=render_mode,
        **settings["env"],
    )
    return wrapped(env, settings["wrappers"])


def wrapped(env: AnyVectorEnv, wrappers: SomeOptions) -> AnyVectorEnv:
    """A vector environment with the wrappers of a run's settings; actions that are vectors have
    nothing to coarsen.

    Args:
        env: A vector environment.
        wrappers: Their arguments by name; None for one that is not wanted.

    Raises:
        FlowGymError: If there is no such wrapper, or it does not take its argument.
    """
    for name, argument in wrappers.items():
        if name not in WRAPPERS:
            raise UnknownOptionError(
                f"there is no wrapper {shown(name)}{did_you_mean(name, WRAPPERS)}"
            )
        vectors = len(env.single_action_space.shape or ()) == 1
        if argument is not None and not (name == "coarse_action" and vectors):
            env = WRAPPERS[name](env, argument)
    return env


def with_devices_for(settings: SomeOptions, num_envs: int) -> Options:
    """Settings that name no more devices than there are sub-environments: of more, the first."""
    env = dict(settings["env"])
    if isinstance(env.get("device"), list | tuple):
        env["device"] = list(env["device"])[:num_envs]
    return {**settings, "env": env}
