"""What a frontier measures, checked before any sample."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import gymnasium

from flowgym_gym.agents.kinds import Options, SomeOptions
from flowgym_gym.agents.runs import contents
from flowgym_gym.agents.runs.bounds import Bounds
from flowgym_gym.agents.runs.episodes import check_seed
from flowgym_gym.agents.runs.files import check_writable
from flowgym_gym.agents.runs.presets import Settings, as_algorithm, full_id, load_preset
from flowgym_gym.agents.runs.settings import override
from flowgym_gym.checks import check_choice, check_number
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


COUNT = Bounds(minimum=1, whole=True)
SEVERAL = Bounds(minimum=2, whole=True)
SCALE = Bounds(minimum=0)


@dataclass(frozen=True, kw_only=True)
class FrontierSpec:
    """What a frontier is asked for; see :func:`frontier`. The bounds of a list are those of its
    entries.
    """

    env_id: str
    out: str | Path
    algos: Sequence[str]
    reward_scales: Sequence[float] | None = field(metadata={Bounds.KEY: SCALE})
    strengths: Sequence[float] | None = field(metadata={Bounds.KEY: SCALE})
    gradients: Sequence[str]
    best_of: Sequence[int] = field(metadata={Bounds.KEY: SEVERAL})
    pool: int = field(metadata={Bounds.KEY: SEVERAL})
    episodes: int = field(metadata={Bounds.KEY: SEVERAL})
    seed: int
    timesteps: int | None
    overrides: SomeOptions
    batch_size: int = field(metadata={Bounds.KEY: COUNT})

    def check(self) -> None:
        """Raise an OptionError where a value cannot be used, whatever the environment."""
        for algo in self.algos:
            as_algorithm(algo)
        for gradient in self.gradients:
            check_choice("gradients", gradient, GRADIENTS)
        for entry in fields(self):
            if Bounds.KEY in entry.metadata:
                value = getattr(self, entry.name)
                for number in (
                    value or () if value is None or isinstance(value, Sequence) else (value,)
                ):
                    Bounds.of(entry).check(entry.name, number)
        check_seed(self.seed, max(self.pool, self.episodes))
        for n in self.best_of:
            if n > self.pool:
                raise OptionError(
                    f"best_of has {n}, but the pool only {self.pool} samples; take a pool of many "
                    f"times {n}"
                )
        if 0 in (self.reward_scales or ()):
            raise OptionError(
                "reward_scales has 0, expected numbers above 0; an agent without reward is the "
                "base model"
            )
        for name in (COST_WEIGHT, COST_WEIGHT.partition(".")[2]):
            if name in self.overrides:
                raise OptionError(f"{name} cannot be set: it follows from the reward scales")


@dataclass(frozen=True)
class Agent:
    """An agent to train: its algorithm, its reward scale, and what decides its point in the
    report.
    """

    algo: str
    scale: float
    asked: Options

    @property
    def name(self) -> str:
        """Its name in the report, and its run's folder."""
        return f"{self.algo}-{self.scale:g}"


@dataclass(frozen=True)
class Plan:
    """A frontier that has been checked and can be measured.

    Attributes:
        env_id: The environment, with ``flowgym/``.
        out: The folder.
        spec: What it is asked for.
        process: Settings of the process that all methods share.
        agents: Those to train.
        strengths: Of the guidance.
        gradients: Of the guidance.
        best_of: Numbers of samples that the best is taken of, in order.
        notes: What the user should know, one line each.
    """

    env_id: str
    out: Path
    spec: FrontierSpec
    process: Options
    agents: list[Agent]
    strengths: list[float]
    gradients: list[str]
    best_of: list[int]
    notes: list[str]


def plan_frontier(spec: FrontierSpec) -> Plan:
    """Check everything that can be checked without a sample."""
    env_id, overrides = full_id(spec.env_id), resolved_changes(spec.overrides)
    spec.check()
    check_writable(Path(spec.out))
    presets = _presets(env_id, spec.algos, overrides)
    first = next(iter(presets))
    process, unit = _process(presets[first]), _reward_scale(env_id, presets[first])
    agents, notes = [], []
    for algo in dict.fromkeys(spec.algos):
        shared = _shared(process, _process(presets[algo]), first, algo)
        if shared:
            told = ", ".join(f"{name}={value}" for name, value in shared.items())
            notes.append(f"{algo} steers the process of the preset for {first}: {told}")
        for scale in _scales(spec.reward_scales, REWARD_SCALES, unit):
            changes = {
                **overrides,
                **shared,
                COST_WEIGHT: _reward_scale(env_id, presets[algo]) / scale,
            }
            asked = {
                "episodes": spec.episodes, "seed": spec.seed, "asked_timesteps": spec.timesteps,
                "overrides": as_json(changes),
            }  # fmt: skip
            agents.append(Agent(algo, scale, {"method": algo, "setting": scale, **asked}))
    return Plan(
        env_id=env_id,
        out=Path(spec.out),
        spec=spec,
        process=process,
        agents=agents,
        strengths=_scales(spec.strengths, STRENGTHS, unit),
        gradients=list(dict.fromkeys(spec.gradients)),
        best_of=sorted(set(spec.best_of)),
        notes=notes,
    )


def _presets(env_id: str, algos: Sequence[str], overrides: SomeOptions) -> dict[str, Settings]:
    """Settings of each algorithm; without any those for PPO, of which the process alone counts."""
    if algos:
        return {algo: _preset(load_preset(env_id, algo), env_id, algo, overrides) for algo in algos}
    process = replace(load_preset(env_id, "ppo"), algo={}, policy={})
    return {"ppo": _preset(process, env_id, "ppo", overrides)}


def _preset(preset: Settings, env_id: str, algo: str, overrides: SomeOptions) -> Settings:
    try:
        settings = override(preset, overrides, env_id, algo)
        return replace(settings, env=contents.resolved(settings.env))
    except UnknownOptionError as error:
        raise UnknownOptionError(
            f"{error} for {algo.upper()}; a change applies to all agents"
        ) from error


def _shared(process: Options, own: Options, first: str, algo: str) -> Options:
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
                f"the preset for {algo} sets {name}, that for {first} does not, and both must "
                f"steer one process; give {name} yourself"
            )
    return changes


def _scales(given: Sequence[float] | None, multiples: Sequence[float], unit: float) -> list[float]:
    return (
        [multiple * unit for multiple in multiples]
        if given is None
        else [float(s) for s in dict.fromkeys(given)]
    )


def _process(settings: Settings) -> Options:
    """The part of an agent's settings that decides what it steers: environment and time grid, as
    JSON keeps them.
    """
    env = {name: value for name, value in settings.env.items() if name not in OF_THE_AGENT}
    grid = {
        name: v for name, v in settings.wrappers.items() if name == "time_grid" and v is not None
    }
    return as_json({"env": env, "wrappers": grid})


def as_json(settings: SomeOptions) -> Options:
    """Settings as JSON gives them back."""
    try:
        plain: Options = json.loads(json.dumps(dict(settings)))
    except (TypeError, ValueError) as error:
        raise OptionError(f"a setting is no plain value: {reason(error)}") from error
    return plain


def _reward_scale(env_id: str, settings: Settings) -> float:
    """Weight of the terminal reward that an agent is trained with."""
    own = gymnasium.spec(env_id).kwargs.get("reward_scale", DEFAULTS["reward_scale"])
    scale = settings.wrappers.get("reward_scale")
    scale = settings.env.get("reward_scale", own) if scale is None else scale
    check_number("reward_scale", scale)
    if scale <= 0:
        raise OptionError(f"reward_scale is {scale}, expected a number above 0")
    return float(scale)


def resolved_changes(overrides: SomeOptions) -> Options:
    """Changes by dotted name, with absolute paths."""
    names = {key: key.rpartition(".")[2] for key in overrides}
    return {
        key: contents.resolved({names[key]: value})[names[key]] for key, value in overrides.items()
    }
