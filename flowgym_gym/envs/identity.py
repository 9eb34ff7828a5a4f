"""Which environments a state belongs to: those in which its episodes go on in the same way.

That is what :func:`flowgym_gym.make` was given for the base model, the reward and the transitions:
ids, checkpoints, and every argument whose value is not the default of its class. Left out is what a
class calls ``incidental``: the device, how much is decoded at a time, whether the network is
compiled. Prompts are left out, too: a state holds those of its episodes, and later ones draw from
the environment's own.

What is no plain value, such as an open pipeline, is described by its class and a digest of its
weights.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from flowgym_gym.errors import StateError, shown
from flowgym_gym.parameters import NAMED, parameters_of
from flowgym_gym.registry import Registry, base_model_registry, reward_registry

if TYPE_CHECKING:
    from flowgym_gym.envs.environment import Environment

# Whole numbers as wide as a number of so many bytes.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NUMBERS = ("noise_level", "noise_schedule", "action_scale", "reward_scale", "control_cost_weight")
# What states said of their environment before arguments were recorded.
BRIEF = {
    "base_model", "checkpoint", "guidance_scale", "distilled_guidance", "negative_prompt", "reward",
    "action_type",
    "sampler", *NUMBERS,
}  # fmt: skip


def describe(environment: Environment[Any]) -> dict[str, Any]:
    """What decides how an episode of the environment goes on, as plain values by name."""
    brief = _describe_briefly(environment)
    if hasattr(brief["checkpoint"], "components"):
        brief["checkpoint"] = plain(brief["checkpoint"])
    return {**brief, "output_type": environment.base_model.output_type, **environment.arguments}


def describe_arguments(environment: Environment[Any]) -> dict[str, Any]:
    """Arguments of base model and reward, neither defaults of their classes nor incidental."""
    parts = environment.parts
    found: dict[str, Any] = {}
    for role, made, registry in (
        ("base_model", environment.base_model, base_model_registry),
        ("reward", environment.reward, reward_registry),
    ):
        given = _attributes(made) if parts is None else _given(registry, parts[role])
        hidden = {"id", "checkpoint", *made.incidental}
        for name, value in _unusual(type(made), given).items():
            if name not in hidden:
                found[f"{role}/{name}"] = value
        if parts is None and isinstance(made, nn.Module):
            found[f"{role}/weights"] = plain(getattr(made, "pipe", made))
    if found.get("base_model/lora") is None:
        found.pop("base_model/lora_scale", None)
    return found


def check_settings(found: str, environment: Environment[Any]) -> None:
    """Raise a StateError that names what differs, unless a state has an environment's settings."""
    theirs = json.loads(found)
    if not isinstance(theirs, dict):
        raise StateError(
            f"settings of the state are {shown(found)}, expected what get_state returned"
        )
    if set(theirs) == BRIEF:
        ours = _describe_briefly(environment)
        ours["checkpoint"] = str(ours["checkpoint"])
    else:
        ours = describe(environment)
    different = [
        f"{name} = {_value(theirs, name)}, but this one has {_value(ours, name)}"
        for name in dict.fromkeys((*ours, *theirs))
        if not _same(name, theirs.get(name), ours.get(name))
    ]
    if different:
        raise StateError(f"the state is of an environment with {'; '.join(different)}")


def plain(value: Any) -> Any:
    """A value as JSON can hold it; for an object its class, and a digest if it has weights."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, torch.device | torch.dtype):
        return str(value)
    if isinstance(value, Mapping):
        return _parts({str(key): plain(entry) for key, entry in value.items()})
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    kind = value if inspect.isroutine(value) or isinstance(value, type) else type(value)
    name = f"{kind.__module__}:{kind.__qualname__}"
    parts = getattr(value, "components", {"": value})
    modules = (
        [part for part in parts.values() if isinstance(part, nn.Module)]
        if isinstance(parts, dict)
        else []
    )
    return {"class": name, "weights": weights_of(modules)} if modules else name


def _parts(entries: dict[str, Any]) -> Any:
    """A mapping where rewards that it names have only the arguments that are not their defaults.

    A reward's id alone is the same as a mapping with nothing else, and no rewards with arguments
    the same as None.
    """
    if isinstance(entries.get("id"), str) and entries["id"] in reward_registry:
        entry = reward_registry.get(entries["id"])
        defaults = {
            **_defaults(entry.cls),
            **{name: plain(value) for name, value in entry.default_kwargs.items()},
        }
        entries = {
            name: value
            for name, value in entries.items()
            if name not in defaults or value != defaults[name]
        }
        return entries["id"] if set(entries) == {"id"} else entries
    if all(
        name in reward_registry and isinstance(value, dict | None)
        for name, value in entries.items()
    ):
        parts = {name: _parts({"id": name, **(value or {})}) for name, value in entries.items()}
        return {name: part for name, part in parts.items() if part != name} or None
    return entries


def weights_of(modules: Iterable[nn.Module]) -> str:
    """A digest of names, shapes and values of all parameters; one for all devices."""
    digest = hashlib.sha256()
    for module in modules:
        for name, parameter in module.named_parameters():
            digest.update(
                f"{name.replace('_orig_mod.', '')} {tuple(parameter.shape)} "
                f"{_sums(parameter)};".encode()
            )
    return digest.hexdigest()[:16]


def _describe_briefly(environment: Environment[Any]) -> dict[str, Any]:
    parts = environment.parts or {
        "base_model": {"id": type(environment.base_model).__name__},
        "reward": {},
    }
    model = environment.base_model
    checkpoint = parts["base_model"].get("checkpoint") or getattr(model, "default_checkpoint", None)
    return {
        "base_model": parts["base_model"]["id"],
        "checkpoint": checkpoint if hasattr(checkpoint, "components") else str(checkpoint),
        "guidance_scale": getattr(model, "guidance_scale", None),
        "distilled_guidance": getattr(model, "distilled_guidance", None),
        "negative_prompt": getattr(model, "negative_prompt", None),
        "reward": parts["reward"].get("id", type(environment.reward).__name__),
        "action_type": environment.action_type,
        "sampler": environment.sampler,
        **{
            name: None if getattr(environment, name) is None else float(getattr(environment, name))
            for name in NUMBERS
        },
    }


def _given(registry: Registry, part: Mapping[str, Any]) -> dict[str, Any]:
    """What a registered class was made with."""
    entry = registry.get(part["id"])
    taken = entry.options()
    return {
        name: value
        for name, value in {**entry.default_kwargs, **part}.items()
        if taken is None or name in taken
    }  # fmt: skip


def _attributes(made: Any) -> dict[str, Any]:
    """Arguments of an object that was made by hand, where it keeps them under their names."""
    return {name: getattr(made, name) for name in _defaults(made.__class__) if hasattr(made, name)}


def _unusual(cls: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that are not their class's defaults, as plain values."""
    values = {name: plain(value) for name, value in arguments.items()}
    return {
        name: value
        for name, value in values.items()
        if value != _defaults(cls).get(name, inspect.Parameter.empty)
    }


@cache
def _defaults(cls: type) -> dict[str, Any]:
    named = [p for p in parameters_of(cls) if p.kind in NAMED]
    return {p.name: p.default if p.default is p.empty else plain(p.default) for p in named}


def _sums(parameter: Tensor) -> list[int]:
    """Sums of a parameter's bits, which are whole numbers and so the same in any order of adding
    up.

    The second one weighs a row by its place, so that rows that change places are told apart.
    """
    if parameter.is_meta or parameter.numel() == 0:
        return []
    try:
        data = parameter.detach()
        bits = data.view(BITS[data.element_size()]).reshape(len(data) if data.ndim else 1, -1)
        rows = bits.sum(dim=1, dtype=torch.int64)
        places = torch.arange(1, len(rows) + 1, dtype=torch.int64, device=rows.device)
        return [int(total) for total in torch.stack([rows.sum(), (rows * places).sum()]).tolist()]
    except (KeyError, RuntimeError, TypeError, NotImplementedError):  # of quantised numbers
        return []


def _value(settings: Mapping[str, Any], name: str) -> str:
    return shown(settings[name]) if name in settings else "its default"


def _same(name: str, one: Any, other: Any) -> bool:
    """Whether two settings agree: equal but for rounding, or two names of one file or folder."""
    if one == other:
        return True
    if name == "action_scale" and isinstance(one, float) and isinstance(other, float):
        # It may follow from the grid, which machines round differently.
        return math.isclose(one, other, rel_tol=1e-6)
    try:
        return isinstance(one, str) and isinstance(other, str) and os.path.samefile(one, other)
    except (OSError, ValueError):
        return False
