"""Changes to the settings of a training run, and what values they may have.

:mod:`flowgym_gym.agents.runs.presets` says what settings there are.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING

import gymnasium
import numpy as np
import yaml

from flowgym_gym.agents import imports_of_extra
from flowgym_gym.agents.kinds import Options, SomeOptions
from flowgym_gym.agents.runs.bounds import Bounds
from flowgym_gym.agents.runs.environments import WRAPPERS
from flowgym_gym.agents.runs.presets import SECTIONS, TOP_LEVEL, Settings, full_id
from flowgym_gym.checks import check_mapping
from flowgym_gym.envs import making
from flowgym_gym.envs.rollout import DEFAULTS
from flowgym_gym.errors import (
    MissingExtraError,
    OptionError,
    UnknownOptionError,
    did_you_mean,
    shown,
)
from flowgym_gym.registry import base_model_registry

if TYPE_CHECKING:
    from flowgym_gym.agents.sb3.options import Defaults

# Names that each section knows; None where any name goes.
Names = dict[str, set[str] | None]

# Arguments of the environment in whose place a wrapper's come.
REPLACED = {"reward_scale": ("reward_scale",), "time_grid": ("discretization_steps", "spacing")}
MAX_DEPTH = 50
# Arguments of `gymnasium.make_vec` that whoever makes the environment gives.
OF_THE_CALLER = (
    "id",
    "num_envs",
    "autoreset_mode",
    "render_mode",
    "vectorization_mode",
    "vector_kwargs",
    "wrappers",
)
# What Python and YAML call JSON's true, false and null.
WORDS = {"True": True, "False": False, "None": None, "~": None}


def options(env_id: str, algo: str, base_model: str | None = None) -> Names:
    """Names that each section knows; None where any name goes. The empty section holds the
    top-level names.

    Args:
        env_id: The environment's id.
        algo: The algorithm.
        base_model: Whose options the environment passes on; by default those of its own base model.
    """
    algorithm, policy = _defaults(algo)
    return {**process_options(env_id, base_model), "algo": set(algorithm), "policy": set(policy)}


def process_options(env_id: str, base_model: str | None = None) -> Names:
    """As :func:`options`, without those of the agent, which stable-baselines3 has to be
    asked for.
    """
    return {"": set(TOP_LEVEL), "env": _env_options(env_id, base_model), "wrappers": set(WRAPPERS)}


def override(settings: Settings, changes: SomeOptions, env_id: str, algo: str) -> Settings:
    """Settings with some values changed.

    Args:
        settings: From :func:`load_preset`; not changed itself.
        changes: By dotted name, ``{"env.noise_level": 0.5}``, or by bare name: the environment's
            argument if it has one of this name, else the setting of the only section that has one.
            Values are plain, as :func:`plain_value` says.
        env_id: The environment's id.
        algo: The algorithm.

    Raises:
        UnknownOptionError: If there is no option of this name, or more than one.
        OptionError: If a value is of the wrong type or out of range, or contradicts another one.
    """
    check_mapping("overrides", changes)
    changed: dict[str, Options] = {name: copy.deepcopy(settings[name]) for name in SECTIONS}
    changed[""] = {}
    base_model = changes.get(
        "env.base_model", changes.get("base_model", settings.env.get("base_model"))
    )
    process = process_options(env_id, base_model)
    given: dict[tuple[str, str], str] = {}
    for key, value in changes.items():
        where = _of_process(key, process) or _locate(
            key, _all_options(env_id, algo, base_model, key)
        )
        section, name = where
        first = given.setdefault(where, key)
        if first != key and plain_value(first, changes[first]) != plain_value(key, value):
            raise OptionError(
                f"{first} is {shown(changes[first])}, but {key} is {shown(value)}, and both mean "
                "the same setting; give only one of them"
            )
        changed[section][name] = plain_value(key, value)
    for wrapper, arguments in REPLACED.items():
        own = changed["wrappers"].get(wrapper)
        for name in arguments if own is not None else ():
            if ("env", name) in given:
                raise OptionError(
                    f"env.{name} is {shown(changed['env'][name])}, but wrappers.{wrapper} is "
                    f"{shown(own)} and takes its place; give only one of them, or "
                    f"wrappers.{wrapper}=null"
                )
    result = Settings(**{**settings, **changed.pop(""), **changed})
    check(result, algo)
    return result


def plain_value(name: str, value: object, depth: int = 0) -> object:
    """A value as ``config.json`` keeps it: paths as text, numpy's numbers as Python's, tuples as
    lists.

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
    if (
        depth < MAX_DEPTH
        and isinstance(value, Mapping)
        and all(isinstance(key, str) for key in value)
    ):
        return {str(key): plain_value(name, entry, depth + 1) for key, entry in value.items()}
    raise OptionError(
        f"{name} is or holds {shown(value)}, which is no plain value that a run's config.json "
        "keeps; expected text, numbers, true, false, null or paths, and lists and dictionaries by "
        "name of these"
    )


def check_arguments(changes: SomeOptions, **arguments: object) -> None:
    """Raise an OptionError where an argument that was given is changed to another value as well."""
    for name, value in arguments.items():
        if value is not None and name in changes and changes[name] != value:
            raise OptionError(
                f"{name} is {shown(value)}, but the changes (overrides, --set) have "
                f"{shown(changes[name])}; give only one of them"
            )


def env_options(env_id: str, changes: SomeOptions) -> Options:
    """Arguments of the environment alone, by name with or without ``env.``.

    Raises:
        UnknownOptionError: If the environment does not have one.
        OptionError: If one is given twice.
    """
    names = {key: key.removeprefix("env.") for key in changes}
    found: Options = {}
    for key, name in names.items():
        if name in found and found[name] != changes[key]:
            raise OptionError(
                f"{name} is {shown(found[name])} and {shown(changes[key])}; give only one of them"
            )
        found[name] = plain_value(name, changes[key])
    known = _env_options(env_id, found.get("base_model"))
    for name in found:
        if name in OF_THE_CALLER or (known is not None and name not in known):
            raise UnknownOptionError(
                f"{env_id} has no option {shown(name)}{did_you_mean(name, known or ())}"
            )
    return found


def check_names(settings: Settings, env_id: str, algo: str) -> None:
    """Raise an UnknownOptionError where a section of complete settings has a name that does not
    exist.
    """
    for section, known in options(env_id, algo, settings.env.get("base_model")).items():
        if not section or known is None:
            continue
        for name in settings[section]:
            if name not in known:
                raise UnknownOptionError(
                    f"there is no setting {section}.{name}{did_you_mean(name, known)}"
                )


def check(settings: Settings, algo: str) -> None:
    """Raise an OptionError where a number has the wrong type or is out of range; the environment
    checks its own.
    """
    for entry in fields(Settings):
        if entry.name in TOP_LEVEL:
            Bounds.of(entry).check(entry.name, settings[entry.name])
    if not settings.algo and not settings.policy:
        return
    from flowgym_gym.agents.sb3.options import BOUNDS

    defaults = dict(zip(("algo", "policy"), _defaults(algo), strict=True))
    for section, known in defaults.items():
        for name, value in settings[section].items():
            _check_option(f"{section}.{name}", value, known.get(name), BOUNDS.get(name))
    if algo == "tqc":
        dropped = {**defaults["algo"], **settings.algo}["top_quantiles_to_drop_per_net"]
        quantiles = {**defaults["policy"], **settings.policy}["n_quantiles"]
        if dropped >= quantiles:
            raise OptionError(
                f"algo.top_quantiles_to_drop_per_net is {dropped}, expected less than "
                f"policy.n_quantiles, {quantiles}"
            )


def parse_assignments(assignments: list[str]) -> Options:
    """``["env.noise_level=0.5"]`` to ``{"env.noise_level": 0.5}``.

    Values are JSON; lists and mappings may leave out quotes, and anything else is the text that it
    is.

    Raises:
        OptionError: If one is not of the form ``name=value``, or a name has two values.

    >>> parse_assignments(["algo.learning_rate=1e-4", "prompts=a cat: red", "coarse_action=null"])
    {'algo.learning_rate': 0.0001, 'prompts': 'a cat: red', 'coarse_action': None}
    >>> parse_assignments(["prompts=[a cat, a dog]"])
    {'prompts': ['a cat', 'a dog']}
    """
    changes: Options = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        name = key.strip()
        if not equals or not name:
            raise OptionError(
                f"--set got {shown(assignment)}, expected name=value, such as env.noise_level=0.5"
            )
        value = _parse(text.strip())
        if name in changes and changes[name] != value:
            raise OptionError(
                f"--set gives {shown(name)} twice, as {shown(changes[name])} and as "
                f"{shown(value)}; give only one of them"
            )
        changes[name] = value
    return changes


def describe(settings: SomeOptions, indent: str = "  ") -> str:
    """Settings as lines of text, one part a line."""
    unused = {"evaluation_episodes"} if settings["evaluate_every"] is None else set()
    lines = [
        f"{name}: {settings[name]}"
        for name in TOP_LEVEL
        if name not in unused and settings[name] is not None
    ]
    for section in SECTIONS:
        values = ", ".join(f"{name}={value}" for name, value in settings[section].items()) or "-"
        lines.append(f"{section}: {values}")
    return "\n".join(indent + line for line in lines)


def _env_options(env_id: str, base_model: str | None) -> set[str] | None:
    own = gymnasium.spec(full_id(env_id)).kwargs.get("base_model", DEFAULTS["base_model"])
    return making.option_names(base_model_registry.get(base_model or own))


def _defaults(algo: str) -> tuple[Defaults, Defaults]:
    """Options of an algorithm and of its policy, with their defaults."""
    with imports_of_extra():
        from flowgym_gym.agents.sb3.options import algorithm_options, policy_options
    return algorithm_options(algo), policy_options(algo)


def _all_options(env_id: str, algo: str, base_model: str | None, key: str) -> Names:
    """All options; without stable-baselines3 those of the process, if the key cannot mean
    another.
    """
    try:
        return options(env_id, algo, base_model)
    except MissingExtraError:
        if key.partition(".")[0] in ("algo", "policy"):
            raise
        return process_options(env_id, base_model)


def _of_process(key: str, process: Names) -> tuple[str, str] | None:
    """Where a key belongs if the process has it: none of its names is an agent's option as well."""
    section, dot, name = key.partition(".")
    if dot:
        names = process.get(section, set())
        return (section, name) if section and (names is None or name in names) else None
    holders = [section for section, names in process.items() if names is not None and key in names]
    if "env" in holders and "" not in holders:
        return "env", key
    return (holders[0], key) if len(holders) == 1 else None


def _locate(key: str, known: Names) -> tuple[str, str]:
    """Where a key belongs.

    Raises:
        UnknownOptionError: If no section has it, or several do.
    """
    section, dot, name = key.partition(".")
    if not dot:
        holders = [s for s, names in known.items() if names is not None and key in names]
        if len(holders) > 1:
            dotted = " or ".join(f"{s}.{key}" if s else key for s in holders)
            raise UnknownOptionError(f"{shown(key)} could be {dotted}; give the whole name")
        if holders:
            return holders[0], key
    elif section and name in (known.get(section) or ()):
        return section, name
    every = [f"{s}.{n}" if s else n for s, names in known.items() for n in names or ()]
    bare = [n for names in known.values() for n in names or ()]
    hint = did_you_mean(key, every) or did_you_mean(key, bare)
    raise UnknownOptionError(f"there is no setting {shown(key)}{hint}")


def _check_option(label: str, value: object, default: object, bounds: Bounds | None) -> None:
    """Raise an OptionError unless a value is of the kind of an option's default, and within its
    bounds.
    """
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise OptionError(f"{label} is {shown(value)}, expected true or false")
        return
    if (value is None and default is None) or (isinstance(value, str) and isinstance(default, str)):
        return
    if bounds is None and isinstance(default, int | float):
        bounds = Bounds(whole=isinstance(default, int))
    if bounds is None and isinstance(value, int | float) and not isinstance(value, bool):
        bounds = Bounds()
    if bounds is not None:
        bounds.check(label, value)


def _parse(text: str) -> object:
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


def _parse_scalars(value: object) -> object:
    if isinstance(value, dict):
        return {key: _parse_scalars(v) for key, v in value.items()}
    return [_parse_scalars(v) for v in value] if isinstance(value, list) else _parse(str(value))
