"""Settings of a training run: presets (plain data, one file per environment and algorithm) and changes to them.

A preset has these parts; each may be left out:

``env``
    Keyword arguments of the environment.
``wrappers``
    ``coarse_action`` (resolution), ``reward_scale`` (weight), ``time_grid`` (steps); null switches one off.
``num_envs``, ``timesteps``
    Sub-environments, and environment steps of all of them together.
``checkpoint_every``
    Timesteps between two checkpoints.
``evaluate_every``, ``evaluation_episodes``
    Timesteps between two evaluations (null: none), each of so many episodes with deterministic actions on the same
    held-out seeds; the agent with the highest return is kept.
``kl_budget``
    Nats of mean control cost in an evaluation beyond which training stops, and no agent counts as the best; null for no
    limit. With a budget ``evaluate_every: null`` means ``checkpoint_every``.
``final_learning_rate``
    The learning rate goes linearly from ``algo.learning_rate`` to this; null keeps it constant.
``algo``
    Hyper-parameters of stable-baselines3's algorithm. ``buffer_size: auto`` is a replay buffer for the whole run, or as
    much of it as fits in a quarter of the memory that is available; a number is at most the whole run, too.
``policy``
    Options of the policy: ``width``, ``blocks``, ``log_std_init``, ``value_scale``, and for PPO
    ``state_dependent_std``.

TQC takes the presets of SAC, from which it differs in its critics alone, where it has none of its own.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib import resources
from typing import Any

import gymnasium
import numpy as np
import yaml
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm

from flowgym_gym.agents.memory import AUTO, check_replay_size, replay_size
from flowgym_gym.agents.policies import LatentActorCriticPolicy, LatentSACPolicy, LatentTQCPolicy
from flowgym_gym.agents.vec_env import SB3VecEnv
from flowgym_gym.catalogue import DENOISING
from flowgym_gym.checks import check_mapping
from flowgym_gym.envs import making
from flowgym_gym.envs.rollout import DEFAULTS
from flowgym_gym.errors import (
    FlowGymError,
    MissingExtraError,
    OptionError,
    UnknownIdError,
    UnknownOptionError,
    did_you_mean,
    reason,
    shown,
)
from flowgym_gym.registry import base_model_registry
from flowgym_gym.wrappers import vector as vector_wrappers

Settings = dict[str, Any]

ALGORITHMS = ("ppo", "sac", "tqc")
# Whose presets an algorithm takes, the first first.
PRESETS = {"ppo": ("ppo",), "sac": ("sac",), "tqc": ("tqc", "sac")}
WRAPPERS = {
    "coarse_action": vector_wrappers.CoarseAction,
    "reward_scale": vector_wrappers.RewardScale,
    "time_grid": vector_wrappers.TimeGrid,
}
# Arguments of the environment in whose place a wrapper's come.
REPLACED = {"reward_scale": ("reward_scale",), "time_grid": ("discretization_steps", "spacing")}
SECTIONS = ("env", "wrappers", "algo", "policy")
MAX_DEPTH = 50
# Arguments of `gymnasium.make_vec` that whoever makes the environment gives.
OF_THE_CALLER = ("id", "num_envs", "autoreset_mode", "render_mode", "vectorization_mode", "vector_kwargs", "wrappers")
TOP_LEVEL: Settings = {
    "num_envs": 16,
    "timesteps": 20_000,
    "checkpoint_every": 10_000,
    "evaluate_every": None,
    "evaluation_episodes": 64,
    "kl_budget": None,
    "final_learning_rate": None,
}
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
# Runs have seeds below this, and their sub-environments seeds of 33 bits and more; held-out ones
# lie between.
SEEDS = 2**30


def full_id(env_id: str) -> str:
    """``"flowgym/StableDiffusion-Red-v0"`` from that or from ``"StableDiffusion-Red-v0"``.

    Raises:
        UnknownIdError: If no environment is registered under this id.
    """
    known = [
        id for id, spec in gymnasium.registry.items() if id.startswith("flowgym/") or spec.entry_point == DENOISING
    ]
    if isinstance(env_id, str):
        for id in (env_id, f"flowgym/{env_id}"):
            if id in known:
                return id
    hint = did_you_mean(env_id, known)
    raise UnknownIdError(
        f"no environment is registered as {shown(env_id)}{hint} (registered: {', '.join(sorted(known))})"
    )


def check_algorithm(algo: str) -> str:
    """The name of the algorithm, or an OptionError if there is none of this name."""
    if not isinstance(algo, str) or algo not in ALGORITHMS:
        raise OptionError(f"algo is {shown(algo)}, expected one of {ALGORITHMS}{did_you_mean(algo, ALGORITHMS)}")
    return algo


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


def load_preset(env_id: str, algo: str = "ppo") -> Settings:
    """The preset of an environment and an algorithm.

    It is the first of ``StableDiffusion-Red-v0.ppo.yaml``, ``StableDiffusion.ppo.yaml`` (the whole family) and
    ``default.ppo.yaml`` that exists in ``agents/presets``. For TQC, SAC's stands in for each that does not.

    Args:
        env_id: With or without ``flowgym/``.
        algo: ``"ppo"``, ``"sac"`` or ``"tqc"``.

    Returns:
        Settings with every part of the module's description.

    Raises:
        UnknownIdError: If the environment does not exist.
        OptionError: If the algorithm does not exist.

    >>> load_preset("StableDiffusion-Red-v0", "ppo")["wrappers"]
    {'coarse_action': 1}
    """
    name = full_id(env_id).rpartition("/")[2]
    check_algorithm(algo)
    folder = resources.files("flowgym_gym.agents") / "presets"
    stems = (name, name.partition("-")[0], "default")
    candidates = [folder / f"{stem}.{preset}.yaml" for stem in stems for preset in PRESETS[algo]]
    file = next(file for file in candidates if file.is_file())
    return complete(yaml.safe_load(file.read_text(encoding="utf-8")) or {}, file.name)


def complete(preset: Mapping[str, Any], name: str = "preset") -> Settings:
    """A preset with its missing parts filled in.

    Raises:
        UnknownOptionError: If it has a part that does not exist.
    """
    parts = [*SECTIONS, *TOP_LEVEL]
    for key in preset:
        if key not in parts:
            raise UnknownOptionError(
                f"{name} has a part {shown(key)}{did_you_mean(key, parts)} (parts: {', '.join(parts)})"
            )
    settings: Settings = {**{section: {} for section in SECTIONS}, **TOP_LEVEL, **copy.deepcopy(dict(preset))}
    for section in SECTIONS:
        settings[section] = dict(settings[section] or {})
    return settings


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


def make_vector_env(
    env_id: str,
    settings: Settings,
    num_envs: int,
    autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
    render_mode: str | None = None,
) -> VectorEnv[Any, Any, Any]:
    """The vector environment that settings describe, wrapped; actions that are vectors have nothing to coarsen.

    Raises:
        FlowGymError: If the environment or a wrapper does not take its arguments.
    """
    env = gymnasium.make_vec(
        full_id(env_id), num_envs=num_envs, autoreset_mode=autoreset_mode, render_mode=render_mode, **settings["env"]
    )
    for name, argument in settings["wrappers"].items():
        if name not in WRAPPERS:
            raise UnknownOptionError(f"there is no wrapper {shown(name)}{did_you_mean(name, WRAPPERS)}")
        vectors = len(env.single_action_space.shape or ()) == 1
        if argument is not None and not (name == "coarse_action" and vectors):
            env = WRAPPERS[name](env, argument)
    return env


def make_algorithm(
    algo: str, env: SB3VecEnv, settings: Settings, seed: int | None, buffer_size: int | None = None
) -> BaseAlgorithm:
    """The untrained agent that settings describe; with a seed, every global random generator is seeded too.

    Args:
        algo: ``"ppo"``, ``"sac"`` or ``"tqc"``.
        env: Where it acts.
        settings: Complete ones, from :func:`load_preset` or :func:`override`.
        seed: Of all random numbers; None leaves the generators as they are.
        buffer_size: Transitions of the replay buffer; as the settings have it if None.

    Raises:
        OptionError: If stable-baselines3 does not accept the hyper-parameters, or the replay buffer does not fit in the
            memory.
    """
    algorithm, policy = classes(algo)
    hyper = dict(settings["algo"])
    if algo != "ppo":
        size = hyper.get("buffer_size", AUTO) if buffer_size is None else buffer_size
        timesteps = settings["timesteps"]
        size = replay_size(env, timesteps) if size == AUTO else max(env.num_envs, min(size, timesteps))
        check_replay_size(env, size)
        hyper["buffer_size"] = size
    try:
        with warnings.catch_warnings():
            # Of short rollouts; `train` says it in a line.
            warnings.filterwarnings("ignore", message="You have specified a mini-batch size")
            return algorithm(policy, env, policy_kwargs=dict(settings["policy"]), seed=seed, verbose=0, **hyper)
    except FlowGymError:
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise OptionError(
            f"stable-baselines3's {algo.upper()} does not accept these settings: {reason(error)}"
        ) from error


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
