"""``make``: the torch-native environment of a base model and a reward, by their ids and plain
options.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch

from flowgym_gym.checks import check_choice, check_mapping, check_once
from flowgym_gym.envs.environment import (
    ControlEnvironment,
    Environment,
    NoiseEnvironment,
    VelocityEnvironment,
)
from flowgym_gym.errors import OptionError, UnknownOptionError, did_you_mean, shown
from flowgym_gym.models.loading import find_base_model, load_found
from flowgym_gym.registry import RegistryEntry, base_model_registry, reward_registry
from flowgym_gym.rewards.loading import load_reward
from flowgym_gym.time_grid import Steps

BY_ACTION_TYPE: dict[str, type[Environment[Any]]] = {
    cls.action_type: cls for cls in (VelocityEnvironment, NoiseEnvironment, ControlEnvironment)
}

# The options of every environment, which `make` hands on.
ENVIRONMENT_OPTIONS = frozenset(inspect.signature(Environment.__init__).parameters) - {
    "self", "base_model", "reward", "parts",
}  # fmt: skip


def make(
    base_model: str,
    reward: str,
    discretization_steps: Steps = 50,
    reward_scale: float = 1.0,
    device: torch.device | str | None = None,
    base_model_kwargs: dict[str, Any] | None = None,
    reward_kwargs: dict[str, Any] | None = None,
    *,
    action_type: str = "velocity",
    dtype: str | None = None,
    **options: Any,
) -> Environment[Any]:
    """Make the torch-native environment of a registered base model and a registered reward.

    Args:
        base_model: Id, such as ``"images/stable_diffusion"``.
        reward: Id, such as ``"images/red"``; of the same domain.
        discretization_steps: Number of transitions of an episode.
        reward_scale: Weight of the terminal reward.
        device: Where the model runs.
        base_model_kwargs: Arguments of the base model.
        reward_kwargs: Arguments of the reward.
        action_type: What an action corrects: the predicted ``"velocity"`` or ``"noise"``, or for
            ``"control"`` the transition's mean, in its own standard deviations.
        dtype: Number format of the network, ``"float32"`` by default.
        **options: Further arguments of :class:`Environment`, or of the base model.

    Returns:
        A :class:`VelocityEnvironment`, :class:`NoiseEnvironment` or :class:`ControlEnvironment`.

    Raises:
        UnknownIdError: If an id is not registered.
        UnknownOptionError: If an option does not exist.
        OptionError: If the domains differ, an option is out of range, or one is given twice:
            directly and in ``base_model_kwargs``.

    >>> import flowgym_gym
    >>> env = flowgym_gym.make("images/stable_diffusion", "images/red", discretization_steps=4)
    >>> env.sample(2).rewards.shape
    torch.Size([2])
    """
    base_model_registry.get(base_model), reward_registry.get(reward)
    domains = [id.partition("/")[0] for id in (base_model, reward)]
    if domains[0] != domains[1]:
        raise OptionError(
            f"base model {base_model!r} makes {domains[0]!r}, but reward {reward!r} scores "
            f"{domains[1]!r}; both ids must start with the same domain"
        )
    check_choice("action_type", action_type, BY_ACTION_TYPE)
    check_mapping("base_model_kwargs", base_model_kwargs)
    check_mapping("reward_kwargs", reward_kwargs)
    model_kwargs, reward_kwargs = dict(base_model_kwargs or {}), dict(reward_kwargs or {})
    check_once("reward", reward, "reward_kwargs", reward_kwargs, "id")
    check_once("base_model", base_model, "base_model_kwargs", model_kwargs, "id")
    for name, value in (("device", device), ("dtype", dtype), *options.items()):
        if value is not None or name in options:
            check_once(name, value, "base_model_kwargs", model_kwargs)
    found = find_base_model(base_model, {**options, **model_kwargs}.get("checkpoint"))
    _check_known(options, option_names(found.entry))
    env_options = {name: value for name, value in options.items() if name in ENVIRONMENT_OPTIONS}
    model_kwargs |= {
        name: value for name, value in options.items() if name not in ENVIRONMENT_OPTIONS
    }
    model_kwargs = {
        "device": device,
        "dtype": "float32" if dtype is None else dtype,
        **model_kwargs,
    }
    return BY_ACTION_TYPE[action_type](
        load_found(found, **model_kwargs),
        load_reward(reward, **reward_kwargs),
        discretization_steps,
        reward_scale,
        **env_options,
        parts={
            "base_model": {"id": found.entry.id, **model_kwargs},
            "reward": {"id": reward, **reward_kwargs},
        },
    )


def _check_known(options: Iterable[str], known: set[str] | None) -> None:
    """Raise an UnknownOptionError if an option is none of those that are known; None for any.

    Its message has Python's own words, too, which libraries look for that try out an option.
    """
    for name in options:
        if known is not None and name not in known:
            raise UnknownOptionError(
                f"there is no option {shown(name)}{did_you_mean(name, known)}: unexpected keyword "
                f"argument {shown(name)} (options: {', '.join(sorted(known))})"
            )


def option_names(base_model: RegistryEntry) -> set[str] | None:
    """What :func:`make` takes by name with a base model; None where that model takes any name."""
    own = base_model.options()
    named = {*inspect.signature(make).parameters, *ENVIRONMENT_OPTIONS} - {"options"}
    return None if own is None else named | own
