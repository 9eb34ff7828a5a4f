"""What a frontier measures, checked before any sample."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium

from flowgym_gym.agents.runs import contents
from flowgym_gym.agents.runs.episodes import check_seed
from flowgym_gym.agents.runs.files import check_writable
from flowgym_gym.agents.runs.presets import Settings, check_algorithm, full_id, load_preset
from flowgym_gym.agents.runs.settings import override
from flowgym_gym.checks import check_choice, check_number, check_whole
from flowgym_gym.envs.rollout import DEFAULTS
from flowgym_gym.errors import OptionError, UnknownOptionError, reason
from flowgym_gym.optimal_control.guidance import GRADIENTS

BEST_OF = (2, 4, 8, 16, 32, 64)
POOL = 1024
EPISODES = 256
BATCH = 32
# Reward scales and strengths in units of the environment's own reward scale.
REWARD_SCALES = (0.1, 0.3, 1.0, 3.0, 10.0)
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)
# What belongs to an agent rather than to the process that it steers.
OF_THE_AGENT = ("action_type", "action_scale", "reward_scale", "control_cost_weight")
COST_WEIGHT = "env.control_cost_weight"


@dataclass(frozen=True)
class Agent:
    """An agent to train: its algorithm, its reward scale, and what decides its point in the report."""

    algo: str
    scale: float
    asked: dict[str, Any]

    @property
    def name(self) -> str:
        """Its name in the report, and its run's folder."""
        return f"{self.algo}-{self.scale:g}"


@dataclass(frozen=True)
class Plan:
    """A frontier that has been checked and can be measured; see :func:`frontier` for what is not named here.

    Attributes:
        process: Settings of the process that all methods share.
        agents: Those to train.
        notes: What the user should know, one line each.
    """

    env_id: str
    out: Path
    process: Settings
    agents: list[Agent]
    strengths: list[float]
    gradients: list[str]
    best_of: list[int]
    pool: int
    episodes: int
    seed: int
    timesteps: int | None
    batch_size: int
    notes: list[str]


def plan_frontier(
    env_id: str,
    out: str | Path,
    algos: Sequence[str],
    reward_scales: Sequence[float] | None,
    strengths: Sequence[float] | None,
    gradients: Sequence[str],
    best_of: Sequence[int],
    pool: int,
    episodes: int,
    seed: int,
    timesteps: int | None,
    overrides: dict[str, Any],
    batch_size: int,
) -> Plan:
    """Check everything that can be checked without a sample."""
    env_id, out, overrides = full_id(env_id), Path(out), resolved_changes(overrides)
    for algo in algos:
        check_algorithm(algo)
    for gradient in gradients:
        check_choice("gradients", gradient, GRADIENTS)
    check_whole("episodes", episodes, minimum=2)
    check_whole("pool", pool, minimum=2)
    check_whole("batch_size", batch_size)
    check_seed(seed, max(pool, episodes))
    for n in best_of:
        check_whole("best_of", n, minimum=2)
        if n > pool:
            raise OptionError(f"best_of has {n}, but the pool only {pool} samples; take a pool of many times {n}")
    for name, values in (("reward_scales", reward_scales), ("strengths", strengths)):
        for value in values or ():
            check_number(name, value, minimum=0)
    if 0 in (reward_scales or ()):
        raise OptionError("reward_scales has 0, expected numbers above 0; an agent without reward is the base model")
    for name in (COST_WEIGHT, COST_WEIGHT.partition(".")[2]):
        if name in overrides:
            raise OptionError(f"{name} cannot be set: it follows from the reward scales")
    check_writable(out)

    algos = list(dict.fromkeys(algos))
    presets = {algo: _preset(env_id, algo, overrides) for algo in algos or ["ppo"]}
    first = next(iter(presets))
    process, unit = _process(presets[first]), _reward_scale(env_id, presets[first])
    agents, notes = [], []
    for algo in algos:
        shared = _shared(process, _process(presets[algo]), first, algo)
        if shared:
            told = ", ".join(f"{name}={value}" for name, value in shared.items())
            notes.append(f"{algo} steers the process of the preset for {first}: {told}")
        for scale in _scales(reward_scales, REWARD_SCALES, unit):
            changes = {**overrides, **shared, COST_WEIGHT: _reward_scale(env_id, presets[algo]) / scale}
            asked = {"episodes": episodes, "seed": seed, "asked_timesteps": timesteps, "overrides": as_json(changes)}
            agents.append(Agent(algo, scale, {"method": algo, "setting": scale, **asked}))
    return Plan(
        env_id=env_id,
        out=out,
        process=process,
        agents=agents,
        strengths=_scales(strengths, STRENGTHS, unit),
        gradients=list(dict.fromkeys(gradients)),
        best_of=sorted(set(best_of)),
        pool=pool,
        episodes=episodes,
        seed=seed,
        timesteps=timesteps,
        batch_size=batch_size,
        notes=notes,
    )


def _preset(env_id: str, algo: str, overrides: Mapping[str, Any]) -> Settings:
    try:
        settings = override(load_preset(env_id, algo), overrides, env_id, algo)
        return {**settings, "env": contents.resolved(settings["env"])}
    except UnknownOptionError as error:
        raise UnknownOptionError(f"{error} for {algo.upper()}; a change applies to all agents") from error


def _shared(process: Settings, own: Settings, first: str, algo: str) -> dict[str, Any]:
    """What to change about a preset with the process ``own`` to make it steer ``process``.

    Raises:
        OptionError: If the other preset says nothing of something that this one sets.
    """
    changes = {
        f"{section}.{name}": process[section].get(name)
        for section in process
        for name in {**process[section], **own[section]}
        if process[section].get(name) != own[section].get(name)
    }
    for name, value in changes.items():
        if value is None and name.startswith("env."):
            raise OptionError(
                f"the preset for {algo} sets {name}, that for {first} does not, and both must steer one process; give "
                f"{name} yourself"
            )
    return changes


def _scales(given: Sequence[float] | None, multiples: Sequence[float], unit: float) -> list[float]:
    return [multiple * unit for multiple in multiples] if given is None else [float(s) for s in dict.fromkeys(given)]


def _process(settings: Settings) -> Settings:
    """The part of an agent's settings that decides what it steers: environment and time grid, as JSON keeps them."""
    env = {name: value for name, value in settings["env"].items() if name not in OF_THE_AGENT}
    grid = {name: v for name, v in settings["wrappers"].items() if name == "time_grid" and v is not None}
    return as_json({"env": env, "wrappers": grid})


def as_json(settings: Settings) -> Settings:
    """Settings as JSON gives them back."""
    try:
        plain: Settings = json.loads(json.dumps(settings))
    except (TypeError, ValueError) as error:
        raise OptionError(f"a setting is no plain value: {reason(error)}") from error
    return plain


def _reward_scale(env_id: str, settings: Settings) -> float:
    """Weight of the terminal reward that an agent is trained with."""
    own = gymnasium.spec(env_id).kwargs.get("reward_scale", DEFAULTS["reward_scale"])
    scale = settings["wrappers"].get("reward_scale")
    scale = settings["env"].get("reward_scale", own) if scale is None else scale
    check_number("reward_scale", scale)
    if scale <= 0:
        raise OptionError(f"reward_scale is {scale}, expected a number above 0")
    return float(scale)


def resolved_changes(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Changes by dotted name, with absolute paths."""
    names = {key: key.rpartition(".")[2] for key in overrides}
    return {key: contents.resolved({names[key]: value})[names[key]] for key, value in overrides.items()}
