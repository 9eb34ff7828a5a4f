"""The whole state of a training: counters, random generators, running episodes, what a reward
remembers.
"""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from flowgym_gym.agents.kinds import AnyVectorEnv, Options, SomeOptions
from flowgym_gym.agents.sb3.vec_env import SB3VecEnv
from flowgym_gym.envs import environment_of
from flowgym_gym.errors import shown
from flowgym_gym.rewards import Reward

# Numbers and text, and arrays.
State = tuple[Options, dict[str, np.ndarray]]
# Words that the state of numpy's Mersenne twister has; a position beyond them would be read from
# foreign memory.
TWISTER_WORDS = 624


def as_progress(
    model: BaseAlgorithm, numbers: SomeOptions, arrays: Mapping[str, np.ndarray]
) -> Options:
    """Raise a ValueError or KeyError where a state is not one of this agent; returns its
    ``progress``.

    What the environment and the random generators check themselves is not checked here.
    """
    n = model.n_envs
    prompts, (_, _, gauss) = numbers["prompts"], numbers["python_random"]
    counts = {name: numbers[name] for name in ("n_updates", "episode_num")}
    progress = dict(numbers["progress"])
    counts["progress.episodes"] = progress["episodes"]
    for name, value in counts.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} is {shown(value, 40)}, expected a count")
    seconds = progress["seconds"]
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        raise ValueError(f"progress.seconds is {shown(seconds, 40)}, expected a time")
    if len(prompts) != n or not all(
        prompt is None or isinstance(prompt, str) for prompt in prompts
    ):
        raise ValueError(f"prompts is {shown(prompts, 40)}, expected {n} texts")
    if gauss is not None and not isinstance(gauss, float):
        raise ValueError(f"python_random ends in {shown(gauss, 40)}, expected a number or null")
    if not 0 <= int(numbers["numpy_random"]["state"]["pos"]) <= TWISTER_WORDS:
        raise ValueError("numpy_random has a position outside of its words")

    last = _last_observations(model)
    expected = {"episode_starts": model._last_episode_starts, **last}
    expected |= {f"progress.{name}": np.zeros(n) for name in ("costs", "returns")}
    for name, like in expected.items():
        _check_array(name, arrays[name], like)
    # What else an engine has kept there, it checks itself.
    kept = {name: array for name, array in arrays.items() if name.startswith("progress.")}
    return progress | {name.removeprefix("progress."): array for name, array in kept.items()}


def _last_observations(model: BaseAlgorithm) -> dict[str, np.ndarray]:
    """The observations that an agent acts on next, by the names that a checkpoint has for them."""
    assert isinstance(model._last_obs, dict)
    return {f"observation.{name}": value for name, value in model._last_obs.items()}


def _check_array(name: str, array: np.ndarray, like: Any) -> None:
    if array.shape != like.shape or array.dtype != like.dtype or not np.isfinite(array).all():
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}, expected finite {like.dtype} of "
            f"shape {like.shape}"
        )


def with_frozen_reward(env: AnyVectorEnv) -> AnyVectorEnv:
    """The environment, or, if its reward remembers what it has scored, a copy whose reward stays at
    what it knows.
    """
    if not hasattr(env.unwrapped, "rollout") or not reward_of(env).stateful:
        return env
    env = copy.deepcopy(env)
    reward_of(env).freeze()
    return env


def capture_state(model: BaseAlgorithm, env: SB3VecEnv) -> State:
    """State of agent, environment and random generators; arrays that the agent goes on with are not
    copied.
    """
    numbers = {
        "timesteps": model.num_timesteps,
        "n_updates": model._n_updates,
        "episode_num": model._episode_num,
        "prompts": [info.get("prompt") for info in env.reset_infos],
        "python_random": random.getstate(),
        "numpy_random": np.random.get_state(legacy=False),
        "action_space_random": model.action_space.np_random.bit_generator.state,
    }
    arrays = {
        "torch_random": torch.get_rng_state().numpy(),
        **{f"env.{key}": value for key, value in env.vector_env.unwrapped.get_state().items()},  # type: ignore[attr-defined]
        **{f"reward.{key}": value for key, value in reward_of(env.vector_env).get_state().items()},
        "episode_starts": model._last_episode_starts,
        **_last_observations(model),
    }
    if torch.cuda.is_available():
        arrays |= {
            f"cuda_random.{i}": s.numpy() for i, s in enumerate(torch.cuda.get_rng_state_all())
        }
    return numbers, arrays


def restore_state(
    model: BaseAlgorithm, env: SB3VecEnv, numbers: SomeOptions, arrays: Mapping[str, np.ndarray]
) -> None:
    """Undo :func:`capture_state`. The random states come last: what is done before them draws
    numbers.
    """
    state = {
        key.removeprefix("env."): value for key, value in arrays.items() if key.startswith("env.")
    }
    env.vector_env.unwrapped.set_state(state)  # type: ignore[attr-defined]
    set_reward_state(env.vector_env, arrays)
    env.reset_infos = [
        {} if prompt is None else {"prompt": prompt} for prompt in numbers["prompts"]
    ]

    restore_counters(model, numbers)
    model._last_episode_starts = arrays["episode_starts"]
    model._last_obs = {
        key.removeprefix("observation."): value
        for key, value in arrays.items()
        if key.startswith("observation.")
    }

    model.action_space.np_random.bit_generator.state = numbers["action_space_random"]
    version, words, gauss = numbers["python_random"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = numbers["numpy_random"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch.from_numpy(arrays["torch_random"]))
    cuda = [
        torch.from_numpy(arrays[key]) for key in sorted(arrays) if key.startswith("cuda_random.")
    ]
    if cuda and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


def restore_counters(model: BaseAlgorithm, numbers: SomeOptions) -> None:
    """Put an agent's counters back to those of :func:`capture_state`."""
    model.num_timesteps = numbers["timesteps"]
    model._n_updates = numbers["n_updates"]
    model._episode_num = numbers["episode_num"]


def relocated(settings: np.ndarray, moved: Mapping[str, str]) -> np.ndarray:
    """What a state says of its environment, with the places of now."""
    if not moved:
        return settings
    names = {json.dumps(old): json.dumps(new) for old, new in moved.items()}
    # In one pass: two places may have changed with each other.
    return np.array(
        re.sub("|".join(map(re.escape, names)), lambda found: names[found[0]], str(settings))
    )


def reward_of(env: AnyVectorEnv) -> Reward[Any]:
    """The reward of a denoising vector environment."""
    return environment_of(env).reward


def set_reward_state(env: AnyVectorEnv, arrays: Mapping[str, np.ndarray]) -> None:
    """Let a reward know what it knew when the arrays of a checkpoint were written."""
    state = {
        key.removeprefix("reward."): value
        for key, value in arrays.items()
        if key.startswith("reward.")
    }
    if state:
        reward_of(env).set_state(state)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Arrays of a file, without pickles; a ValueError where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (ValueError, AttributeError) as error:
        # numpy takes what it does not know for a pickle and would advise to open it.
        raise ValueError(
            f"{path.name} is damaged, or holds other things than arrays of numbers and text"
        ) from error
