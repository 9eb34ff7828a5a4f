"""Whole episodes on given seeds, with a policy or without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from flowgym_gym.agents.kinds import AnyVectorEnv, Options
from flowgym_gym.errors import ModelError, OptionError

# Runs have seeds below this, and their sub-environments seeds of 33 bits and more; held-out ones
# lie between.
SEEDS = 2**30
BATCH = 32
QUANTITIES = {
    "terminal_reward": "terminal_rewards",
    "control_cost": "control_costs",
    "return": "returns",
}

Predict = Callable[[dict[str, np.ndarray]], np.ndarray]


@dataclass
class Episodes:
    """What came of whole episodes; arrays of shape ``(n,)``.

    Attributes:
        terminal_rewards: Unscaled.
        control_costs: Sum over the episode, in nats.
        returns: What the agent was paid.
        valids: Whether each sample is valid.
        pictures: The first finished samples, uint8 ``(H, W, 3)``; empty if they are no pictures.
        prompts: The prompt of each episode; empty if the model has none.
    """

    terminal_rewards: np.ndarray
    control_costs: np.ndarray
    returns: np.ndarray
    valids: np.ndarray
    pictures: list[np.ndarray] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)

    def means(self) -> dict[str, float | int]:
        """Mean of each quantity, and the number of episodes."""
        means: dict[str, float | int] = {
            name: float(getattr(self, a).mean()) for name, a in QUANTITIES.items()
        }
        return {"episodes": len(self.returns), **means}


def held_out_seeds(episodes: int, seed: int = 0) -> list[int]:
    """Seeds of evaluation episodes: from ``2**30 + seed`` on, which no training takes.

    >>> held_out_seeds(2)
    [1073741824, 1073741825]
    """
    return [SEEDS + seed + i for i in range(episodes)]


def selection_seeds(episodes: int) -> list[int]:
    """Seeds of the episodes by which a run chooses its best agent: from ``2**31`` on.

    >>> selection_seeds(2)
    [2147483648, 2147483649]
    """
    return [2 * SEEDS + i for i in range(episodes)]


def play(
    env: AnyVectorEnv, seeds: list[int], predict: Predict | None = None, pictures: int = 0
) -> Episodes:
    """Play one episode for each seed.

    Args:
        env: A denoising vector environment with autoreset mode ``"Disabled"``; episodes are played
            in batches of its size.
        seeds: One for each episode.
        predict: Gives actions for a batch of observations; None for no correction, the base model.
        pictures: How many of the finished samples to return as pictures.
    """
    n = env.num_envs
    results: dict[str, list[np.ndarray]] = {
        name: [] for name in ("terminal_reward", "control_cost", "return", "valid")
    }
    frames: list[np.ndarray] = []
    prompts: list[str] = []
    still = np.zeros(env.action_space.shape or (), dtype=np.float32)
    for start in range(0, len(seeds), n):
        batch = seeds[start : start + n]
        # The last batch is filled up with episodes that are not counted.
        observations, infos = _reset(env, batch + [batch[-1]] * (n - len(batch)))
        prompts.extend(infos.get("prompt", ())[: len(batch)])
        costs, returns, done = np.zeros(n), np.zeros(n), False
        while not done:
            actions = still if predict is None else predict(observations)
            observations, rewards, terminations, truncations, infos = env.step(actions)
            costs += infos["control_cost"]
            returns += rewards
            done = bool((terminations | truncations).all())
        values = (infos["terminal_reward"], costs, returns, infos["valid"])
        for name, value in zip(results, values, strict=True):
            results[name].append(value[: len(batch)])
        if len(frames) < pictures:
            frames.extend(frames_of(env)[: min(len(batch), pictures - len(frames))])
    joined = {name: np.concatenate(values) for name, values in results.items()}
    return Episodes(
        joined["terminal_reward"],
        joined["control_cost"],
        joined["return"],
        joined["valid"],
        frames,
        prompts,
    )


def watch(env: AnyVectorEnv, seed: int, predict: Predict) -> list[list[np.ndarray]]:
    """Film the base model and an agent on the same seed.

    Args:
        env: A denoising vector environment of two, with autoreset mode ``"Disabled"``.
        seed: Of both episodes.
        predict: The agent.

    Returns:
        At the start and after each step the two samples that the model expects, base model first;
        nothing if samples are no pictures.
    """
    observations, _ = _reset(env, [seed, seed])
    frames, done = [frames_of(env)], False
    while frames[0] and not done:
        actions = np.array(predict(observations))
        actions[0] = 0
        observations, _, terminations, truncations, _ = env.step(actions)
        frames.append(frames_of(env))
        done = bool((terminations | truncations).all())
    return frames if frames[0] else []


def _reset(env: AnyVectorEnv, seeds: list[int]) -> tuple[dict[str, np.ndarray], Options]:
    """Begin an episode for each seed."""
    # Gymnasium's type of it knows a single seed alone.
    observations, infos = env.reset(seed=seeds)  # type: ignore[arg-type]
    return observations, infos


def check_seed(seed: int, num_envs: int = 1) -> None:
    """Raise an OptionError unless the seeds of all sub-environments are whole numbers below
    ``2**30``.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= SEEDS - num_envs:
        raise OptionError(f"seed is {seed!r}, expected a whole number from 0 to {SEEDS - num_envs}")


def frames_of(env: AnyVectorEnv) -> list[np.ndarray]:
    """The samples of a vector environment as pictures; nothing if they are none."""
    try:
        return list(env.render() or ())  # type: ignore[arg-type]
    except ModelError:
        # Samples that are no pictures have none to show.
        return []
