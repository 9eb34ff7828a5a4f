"""Changes to the settings of a training run, and what values they may have.

:mod:`flowgym_gym.agents.runs.presets` says what settings there are.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import gymnasium
import numpy as np
import yaml

from flowgym_gym.agents.runs.environments import WRAPPERS
from flowgym_gym.agents.runs.memory import AUTO
from flowgym_gym.agents.runs.presets import SECTIONS, TOP_LEVEL, Settings, full_id
from flowgym_gym.agents.sb3.algorithms import classes
from flowgym_gym.checks import check_mapping
from flowgym_gym.envs import making
from flowgym_gym.envs.rollout import DEFAULTS
from flowgym_gym.errors import OptionError, UnknownOptionError, did_you_mean, shown
from flowgym_gym.registry import base_model_registry

# Arguments of the environment in whose place a wrapper's come.
REPLACED = {"reward_scale": ("reward_scale",), "time_grid": ("discretization_steps", "spacing")}
MAX_DEPTH = 50
# Arguments of `gymnasium.make_vec` that whoever makes the environment gives.
OF_THE_CALLER = ("id", "num_envs", "autoreset_mode", "render_mode", "vectorization_mode", "vector_kwargs", "wrappers")
# Arguments of the algorithms that training itself decides, or that the latent policies do not support.
NOT_SETTABLE = {
    "self", "policy", "env", "policy_kwargs", "seed", "verbose", "tensorboard_log", "_init_setup_model", "use_sde",
    "sde_sample_freq", "use_sde_at_warmup", "rollout_buffer_class", "rollout_buffer_kwargs", "replay_buffer_class",
    "replay_buffer_kwargs", "optimize_memory_usage", "action_noise", "stats_window_size",
}  # fmt: skip
AT_LEAST = {
    **dict.fromkeys(("num_envs", "timesteps", "checkpoint_every", "evaluate_every", "n_steps", "batch_size", "n_epochs",
                     "buffer_size", "train_freq", "target_update_interval", "width", "n_critics", "n_quantiles"), 1),
    **dict.fromkeys(("blocks", "learning_starts", "top_quantiles_to_drop_per_net"), 0),
    "evaluation_episodes": 2,
}  # fmt: skip
POSITIVE = {"learning_rate", "value_scale", "kl_budget", "clip_range", "max_grad_norm", "target_kl"}
# From 0 to 1.
FRACTIONS = {"gamma", "gae_lambda", "tau"}
NOT_NEGATIVE = {"ent_coef", "vf_coef", "final_learning_rate"}
# Values other than numbers that mean something.
SPECIAL = {"evaluate_every": None, "kl_budget": None, "final_learning_rate": None, "buffer_size": AUTO}
# What Python and YAML call JSON's true, false and null.
WORDS = {"True": True, "False": False, "None": None, "~": None}


def options(env_id: str, algo: str, base_model: str | None = None) -> dict[str, set[str] | None]:
    """Names that each section knows; None where any name goes. The empty section holds the top-level names.

    Args:
        env_id: The environment's id.
        algo: The algorithm.
        base_model: Whose options the environment passes on; by default those of its own base model.
    """
    algorithm, policy = classes(algo)
    return {
        "": set(TOP_LEVEL),
        "env": _env_options(env_id, base_model),
        "wrappers": set(WRAPPERS),
        "algo": set(inspect.signature(algorithm.__init__).parameters) - NOT_SETTABLE,
        "policy": {p.name for p in inspect.signature(policy).parameters.values() if p.kind is p.KEYWORD_ONLY}
        - {"use_sde", "optimizer_class", "optimizer_kwargs"},
    }


def override(settings: Settings, changes: Mapping[str, Any], env_id: str, algo: str) -> Settings:
    """Settings with some values changed.

    Args:
        settings: From :func:`load_preset`; not changed itself.
        changes: By dotted name, ``{"env.noise_level": 0.5}``, or by bare name: the environment's argument if it has one
            of this name, else the setting of the only section that has one. Values are plain, as
            :func:`plain_value` says.
        env_id: The environment's id.
        algo: The algorithm.

    Raises:
        UnknownOptionError: If there is no option of this name, or more than one.
        OptionError: If a value is of the wrong type or out of range, or contradicts another one.
    """
    check_mapping("overrides", changes)
    changed = copy.deepcopy(settings)
    base_model = changes.get("env.base_model", changes.get("base_model", settings["env"].get("base_model")))
    known = options(env_id, algo, base_model)
    given: dict[tuple[str, str], str] = {}
    for key, value in changes.items():
        where = section, name = _locate(key, known)
        first = given.setdefault(where, key)
        if first != key and plain_value(first, changes[first]) != plain_value(key, value):
            raise OptionError(
                f"{first} is {shown(changes[first])}, but {key} is {shown(value)}, and both mean the same setting; "
                "give only one of them"
            )
        (changed[section] if section else changed)[name] = plain_value(key, value)
    for wrapper, arguments in REPLACED.items():
        own = changed["wrappers"].get(wrapper)
        for name in arguments if own is not None else ():
            if ("env", name) in given:
                raise OptionError(
                    f"env.{name} is {shown(changed['env'][name])}, but wrappers.{wrapper} is {shown(own)} and takes "
                    f"its place; give only one of them, or wrappers.{wrapper}=null"
                )
    check(changed, algo)
    return changed


def plain_value(name: str, value: Any, depth: int = 0) -> Any:
    """A value as ``config.json`` keeps it: paths as text, numpy's numbers as Python's, tuples as lists.

    Args:
        name: The setting's, for the message.
        value: Text, a number, true, false, None, a path, or a list, tuple or dictionary of these.
        depth: How many lists and dictionaries it lies in.

    Raises:
        OptionError: If it is something else.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if depth < MAX_DEPTH and isinstance(value, list | tuple):
        return [plain_value(name, entry, depth + 1) for entry in value]
    if depth < MAX_DEPTH and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): plain_value(name, entry, depth + 1) for key, entry in value.items()}
    raise OptionError(
        f"{name} is or holds {shown(value)}, which is no plain value that a run's config.json keeps; expected text, "
        "numbers, true, false, null or paths, and lists and dictionaries by name of these"
    )


def check_arguments(changes: Mapping[str, Any], **arguments: Any) -> None:
    """Raise an OptionError where an argument that was given is changed to another value as well."""
    for name, value in arguments.items():
        if value is not None and name in changes and changes[name] != value:
            raise OptionError(
                f"{name} is {shown(value)}, but the changes (overrides, --set) have {shown(changes[name])}; give only "
                "one of them"
            )


def env_options(env_id: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the environment alone, by name with or without ``env.``.

    Raises:
        UnknownOptionError: If the environment does not have one.
        OptionError: If one is given twice.
    """
    names = {key: key.removeprefix("env.") for key in changes}
    found: dict[str, Any] = {}
    for key, name in names.items():
        if name in found and found[name] != changes[key]:
            raise OptionError(f"{name} is {shown(found[name])} and {shown(changes[key])}; give only one of them")
        found[name] = plain_value(name, changes[key])
    known = _env_options(env_id, found.get("base_model"))
    for name in found:
        if name in OF_THE_CALLER or (known is not None and name not in known):
            raise UnknownOptionError(f"{env_id} has no option {shown(name)}{did_you_mean(name, known or ())}")
    return found


def check_names(settings: Settings, env_id: str, algo: str) -> None:
    """Raise an UnknownOptionError where a section of complete settings has a name that does not exist."""
    for section, known in options(env_id, algo, settings["env"].get("base_model")).items():
        if not section or known is None:
            continue
        for name in settings[section]:
            if name not in known:
                raise UnknownOptionError(f"there is no setting {section}.{name}{did_you_mean(name, known)}")


def check(settings: Settings, algo: str) -> None:
    """Raise an OptionError where a number has the wrong type or is out of range; the environment checks its own."""
    algorithm, policy = classes(algo)
    groups = (
        ("", TOP_LEVEL, {name: settings[name] for name in TOP_LEVEL}),
        ("algo.", _defaults(algorithm.__init__), settings["algo"]),
        ("policy.", _defaults(policy), settings["policy"]),
    )
    for prefix, defaults, values in groups:
        for name, value in values.items():
            _check_value(prefix + name, name, value, defaults.get(name))
    if algo == "tqc":
        dropped = {**groups[1][1], **settings["algo"]}["top_quantiles_to_drop_per_net"]
        quantiles = {**groups[2][1], **settings["policy"]}["n_quantiles"]
        if dropped >= quantiles:
            raise OptionError(
                f"algo.top_quantiles_to_drop_per_net is {dropped}, expected less than policy.n_quantiles, {quantiles}"
            )


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """``["env.noise_level=0.5"]`` to ``{"env.noise_level": 0.5}``.

    Values are JSON; lists and mappings may leave out quotes, and anything else is the text that it is.

    Raises:
        OptionError: If one is not of the form ``name=value``, or a name has two values.

    >>> parse_assignments(["algo.learning_rate=1e-4", "prompts=a cat: red", "coarse_action=null"])
    {'algo.learning_rate': 0.0001, 'prompts': 'a cat: red', 'coarse_action': None}
    >>> parse_assignments(["prompts=[a cat, a dog]"])
    {'prompts': ['a cat', 'a dog']}
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        name = key.strip()
        if not equals or not name:
            raise OptionError(f"--set got {shown(assignment)}, expected name=value, such as env.noise_level=0.5")
        value = _parse(text.strip())
        if name in changes and changes[name] != value:
            raise OptionError(
                f"--set gives {shown(name)} twice, as {shown(changes[name])} and as {shown(value)}; give only one of "
                "them"
            )
        changes[name] = value
    return changes


def describe(settings: Settings, indent: str = "  ") -> str:
    """Settings as lines of text, one part a line."""
    unused = {"evaluation_episodes"} if settings["evaluate_every"] is None else set()
    lines = [f"{name}: {settings[name]}" for name in TOP_LEVEL if name not in unused and settings[name] is not None]
    for section in SECTIONS:
        values = ", ".join(f"{name}={value}" for name, value in settings[section].items()) or "-"
        lines.append(f"{section}: {values}")
    return "\n".join(indent + line for line in lines)


def _env_options(env_id: str, base_model: str | None) -> set[str] | None:
    own = gymnasium.spec(full_id(env_id)).kwargs.get("base_model", DEFAULTS["base_model"])
    return making.option_names(base_model_registry.get(base_model or own))


def _locate(key: str, known: dict[str, set[str] | None]) -> tuple[str, str]:
    section, dot, name = key.partition(".")
    if not dot:
        section, name = "", key
        holders = [s for s, names in known.items() if names is not None and name in names]
        if "env" in holders and "" not in holders:
            return "env", name
        if len(holders) > 1:
            dotted = " or ".join(f"{s}.{name}" if s else name for s in holders)
            raise UnknownOptionError(f"{shown(key)} could be {dotted}; give the whole name")
        if holders:
            return holders[0], name
    elif section in known and section and (known[section] is None or name in known[section]):  # type: ignore[operator]
        return section, name
    every = [f"{s}.{n}" if s else n for s, names in known.items() for n in names or ()]
    bare = [n for names in known.values() for n in names or ()]
    hint = did_you_mean(key, every) or did_you_mean(key, bare)
    raise UnknownOptionError(f"there is no setting {shown(key)}{hint}")


def _defaults(function: Any) -> dict[str, Any]:
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


def _check_value(label: str, name: str, value: Any, default: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and not math.isfinite(value):
        raise OptionError(f"{label} is {shown(value)}, expected a finite number")
    if name in SPECIAL and value == SPECIAL[name]:
        return
    if name in POSITIVE and value is not None and not (number and value > 0):
        raise OptionError(f"{label} is {shown(value)}, expected a positive number")
    if name in FRACTIONS and not (number and 0 <= value <= 1):
        raise OptionError(f"{label} is {shown(value)}, expected a number from 0 to 1")
    if name in NOT_NEGATIVE and number and value < 0:
        raise OptionError(f"{label} is {shown(value)}, expected a number, at least 0")
    if name == "final_learning_rate" and not number:
        raise OptionError(f"{label} is {shown(value)}, expected a number, at least 0, or null")
    if name in AT_LEAST and not (isinstance(value, int) and number and value >= AT_LEAST[name]):
        raise OptionError(f"{label} is {shown(value)}, expected a whole number, at least {AT_LEAST[name]}")
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise OptionError(f"{label} is {shown(value)}, expected true or false")
    elif isinstance(default, int) and not (number and isinstance(value, int)):
        raise OptionError(f"{label} is {shown(value)}, expected a whole number")
    elif isinstance(default, float) and not number:
        raise OptionError(f"{label} is {shown(value)}, expected a number")


def _parse(text: str) -> Any:
    with suppress(ValueError, RecursionError):  # of numbers with thousands of digits, too
        return json.loads(text)
    if text in WORDS:
        return WORDS[text]
    if text[:1] in ("[", "{"):
        # All scalars as text: YAML takes `no`, `12:30` and `1990-01-01` for something else.
        with suppress(yaml.YAMLError, ValueError, TypeError, RecursionError):
            return _parse_scalars(yaml.load(text, Loader=yaml.BaseLoader))
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text, re.IGNORECASE):
        return float(text)
    return text


def _parse_scalars(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _parse_scalars(v) for key, v in value.items()}
    return [_parse_scalars(v) for v in value] if isinstance(value, list) else _parse(value)
