"""Base models and rewards by id, made once per process and shared by all environments."""

from __future__ import annotations

import json
from typing import Any

import torch

from flowgym_gym.checks import check_choice
from flowgym_gym.errors import OptionError
from flowgym_gym.models.base import BaseModel
from flowgym_gym.registry import RegistryEntry, base_model_registry, reward_registry
from flowgym_gym.rewards import Reward

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_shared: dict[tuple[object, ...], Any] = {}


def load_base_model(
    id: str, device: torch.device | str | None = None, dtype: str = "float32", **kwargs: Any
) -> BaseModel[Any]:
    """The base model registered as ``id``, frozen and in evaluation mode.

    Args:
        id: Registered id, such as ``"images/stable_diffusion"``.
        device: Where it runs.
        dtype: Number format of the network, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        **kwargs: Its own arguments.

    Raises:
        UnknownIdError: If the id is not registered.
        UnknownOptionError: If the model has no such argument.
        OptionError: If the device or number format does not exist here.
    """
    entry = base_model_registry.get(id)
    kwargs = {"device": check_device(device), **kwargs}
    check_choice("dtype", dtype, DTYPES)
    options = entry.options()
    if options is None or "dtype" in options:
        kwargs["dtype"] = dtype
    elif dtype != "float32":
        raise OptionError(f"dtype is {dtype!r}, but {id!r} has no dtype option and runs in float32")
    model = _load(entry, kwargs)
    if not isinstance(model, BaseModel):
        raise OptionError(f"{id!r} is a {type(model).__name__}, expected a subclass of flowgym_gym.BaseModel")
    return model.eval().requires_grad_(False)


def load_reward(id: str, **kwargs: Any) -> Reward[Any]:
    """The reward registered as ``id``; errors as :func:`load_base_model`."""
    reward = _load(reward_registry.get(id), kwargs)
    if not isinstance(reward, Reward):
        raise OptionError(f"{id!r} is a {type(reward).__name__}, expected a subclass of flowgym_gym.Reward")
    return reward


def clear_model_cache() -> None:
    """Forget every shared model, so that its memory is freed once no environment uses it."""
    from flowgym_gym.models.checkpoints import load_pipeline

    _shared.clear()
    load_pipeline.cache_clear()


def check_device(device: torch.device | str | None) -> torch.device:
    """The device, or an OptionError if this machine does not have it."""
    try:
        checked = torch.device("cpu" if device is None else device)
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise OptionError(f"device is {device!r}, which cannot be used here ({reason}); try 'cpu'") from error
    return checked


def _device_name(value: object) -> str:
    if isinstance(value, torch.device):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not a plain value")


def _load(entry: RegistryEntry, kwargs: dict[str, Any]) -> Any:
    try:
        key = (entry.cls, json.dumps({**entry.default_kwargs, **kwargs}, sort_keys=True, default=_device_name))
    except TypeError:  # Arguments that are not plain values have no name to be found under again.
        return entry.instantiate(**kwargs)
    if key not in _shared:
        _shared[key] = entry.instantiate(**kwargs)
    return _shared[key]
