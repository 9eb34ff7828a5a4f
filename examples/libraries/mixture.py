"""The task of the examples in this folder: to steer samples of a Gaussian mixture in ten steps.

What the base model earns without an agent and what an optimal agent would earn are both known. The
id names the package, so that processes which have not imported it find the environment, too.
"""

import gymnasium
import numpy as np

from flowgym_gym.optimal_control import optimal_value, uncontrolled_value

ID = "flowgym_gym:flowgym/GaussianMixture-Gaussian-v0"
OPTIONS = {"discretization_steps": 10}


def make(**options):
    return gymnasium.make(ID, **OPTIONS, **options)


def make_vec(num_envs, autoreset_mode, **options):
    return gymnasium.make_vec(
        ID, num_envs=num_envs, autoreset_mode=autoreset_mode, **OPTIONS, **options
    )


def flat(observations):
    """Observations as ``gymnasium.wrappers.FlattenObservation`` has them, shape ``(n, 2)``."""
    return np.concatenate([observations["latent"], observations["time"]], axis=1)


def report(name, timesteps, act, episodes=2_000):
    """Print and return what the base model, an agent and an optimal agent earn.

    Args:
        name: Of the agent.
        timesteps: In how many it has learnt.
        act: Actions without exploration, ``(n, 1)``, for a dictionary of observations ``(n, 1)``.
        episodes: How many the agent plays, from seeds of their own.
    """
    envs = make_vec(episodes, "Disabled")
    observations, _ = envs.reset(seed=1_000_000)
    total = np.zeros(episodes)
    for _ in range(OPTIONS["discretization_steps"]):
        actions = np.asarray(act(observations), dtype=np.float32).reshape(episodes, 1)
        observations, rewards, *_ = envs.step(actions)
        total += rewards
    base, best = uncontrolled_value(envs), optimal_value(envs).value
    print(
        f"{name}: {total.mean():.2f} after {timesteps:,} steps; the base model {base:.2f}, "
        f"an optimal agent {best:.2f}"
    )
    return base, float(total.mean()), best
