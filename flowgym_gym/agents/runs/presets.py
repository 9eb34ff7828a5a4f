"""Presets: the settings of a training, plain data, one file per environment and algorithm.

A preset has these parts; each may be left out:

``env``
    Keyword arguments of the environment.
``wrappers``
    ``coarse_action`` (resolution), ``reward_scale`` (weight), ``time_grid`` (steps); null switches
    one off.
``num_envs``, ``timesteps``
    Sub-environments, and environment steps of all of them together.
``checkpoint_every``
    Timesteps between two checkpoints.
``evaluate_every``, ``evaluation_episodes``
    Timesteps between two evaluations (null: none), each of so many episodes with deterministic
    actions on the same held-out seeds; the agent with the highest return is kept.
``kl_budget``
    Nats of mean control cost in an evaluation beyond which training stops, and no agent counts as
    the best; null for no limit. With a budget ``evaluate_every: null`` means ``checkpoint_every``.
``final_learning_rate``
    The learning rate goes linearly from ``algo.learning_rate`` to this; null keeps it constant.
``algo``
    Hyper-parameters of stable-baselines3's algorithm. ``buffer_size: auto`` is a replay buffer for
    the whole run, or as much of it as fits in a quarter of the memory that is available; a number
    is at most the whole run, too.
``policy``
    Options of the policy: ``width``, ``blocks``, ``log_std_init``, ``value_scale``, and for PPO
    ``state_dependent_std``.

TQC takes the presets of SAC, from which it differs in its critics alone, where it has none of its
own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from importlib import resources

import gymnasium
import yaml

from flowgym_gym.agents.kinds import Named, Options, SomeOptions
from flowgym_gym.agents.runs.bounds import Bounds
from flowgym_gym.catalogue import DENOISING
from flowgym_gym.errors import OptionError, UnknownIdError, UnknownOptionError, did_you_mean, shown

ALGORITHMS = ("ppo", "sac", "tqc")
# Whose presets an algorithm takes, the first first.
PRESETS = {"ppo": ("ppo",), "sac": ("sac",), "tqc": ("tqc", "sac")}
COUNT = Bounds(minimum=1, whole=True)


@dataclass(frozen=True, eq=False)
class Settings(Named):
    """The settings of a training, complete; see the module for what each means.

    It reads as a mapping, too: ``settings["env"]``, ``{**settings}``. The sections are dictionaries
    by name: what names they may have, the environment, the algorithm and the policy decide.
    """

    env: Options = field(default_factory=dict)
    wrappers: Options = field(default_factory=dict)
    algo: Options = field(default_factory=dict)
    policy: Options = field(default_factory=dict)
    num_envs: int = field(default=16, metadata={Bounds.KEY: COUNT})
    timesteps: int = field(default=20_000, metadata={Bounds.KEY: COUNT})
    checkpoint_every: int = field(default=10_000, metadata={Bounds.KEY: COUNT})
    evaluate_every: int | None = field(
        default=None, metadata={Bounds.KEY: Bounds(minimum=1, whole=True, special=(None,))}
    )
    evaluation_episodes: int = field(
        default=64, metadata={Bounds.KEY: Bounds(minimum=2, whole=True)}
    )
    kl_budget: float | None = field(
        default=None, metadata={Bounds.KEY: Bounds(minimum=0, above=True, special=(None,))}
    )
    final_learning_rate: float | None = field(
        default=None, metadata={Bounds.KEY: Bounds(minimum=0, special=(None,))}
    )


SECTIONS = ("env", "wrappers", "algo", "policy")
# The settings that stand in no section.
TOP_LEVEL = tuple(entry.name for entry in fields(Settings) if entry.name not in SECTIONS)


def full_id(env_id: str) -> str:
    """``"flowgym/StableDiffusion-Red-v0"`` from that or from ``"StableDiffusion-Red-v0"``.

    Raises:
        UnknownIdError: If no environment is registered under this id.
    """
    known = [
        id
        for id, spec in gymnasium.registry.items()
        if id.startswith("flowgym/") or spec.entry_point == DENOISING
    ]
    if isinstance(env_id, str):
        for id in (env_id, f"flowgym/{env_id}"):
            if id in known:
                return id
    hint = did_you_mean(env_id, known)
    raise UnknownIdError(
        f"no environment is registered as {shown(env_id)}{hint} (registered: "
        f"{', '.join(sorted(known))})"
    )


def as_algorithm(algo: object) -> str:
    """The name of the algorithm, or an OptionError if there is none of this name."""
    if not isinstance(algo, str) or algo not in ALGORITHMS:
        raise OptionError(
            f"algo is {shown(algo)}, expected one of {ALGORITHMS}{did_you_mean(algo, ALGORITHMS)}"
        )
    return algo


def load_preset(env_id: str, algo: str = "ppo") -> Settings:
    """The preset of an environment and an algorithm.

    It is the first of ``StableDiffusion-Red-v0.ppo.yaml``, ``StableDiffusion.ppo.yaml`` (the whole
    family) and ``default.ppo.yaml`` that exists in ``agents/presets``. For TQC, SAC's stands in for
    each that does not.

    Args:
        env_id: With or without ``flowgym/``.
        algo: ``"ppo"``, ``"sac"`` or ``"tqc"``.

    Returns:
        Settings with every part of the module's description; they read as a mapping, too.

    Raises:
        UnknownIdError: If the environment does not exist.
        OptionError: If the algorithm does not exist.

    >>> load_preset("StableDiffusion-Red-v0", "ppo")["wrappers"]
    {'coarse_action': 1}
    """
    name = full_id(env_id).rpartition("/")[2]
    as_algorithm(algo)
    folder = resources.files("flowgym_gym.agents") / "presets"
    stems = (name, name.partition("-")[0], "default")
    candidates = [folder / f"{stem}.{preset}.yaml" for stem in stems for preset in PRESETS[algo]]
    file = next(file for file in candidates if file.is_file())
    return complete(yaml.safe_load(file.read_text(encoding="utf-8")) or {}, file.name)


def complete(preset: SomeOptions, name: str = "preset") -> Settings:
    """A preset with its missing parts filled in.

    Raises:
        UnknownOptionError: If it has a part that does not exist.
    """
    parts = [*SECTIONS, *TOP_LEVEL]
    for key in preset:
        if key not in parts:
            raise UnknownOptionError(
                f"{name} has a part {shown(key)}{did_you_mean(key, parts)} (parts: "
                f"{', '.join(parts)})"
            )
    own = copy.deepcopy(dict(preset))
    return Settings(**{**own, **{section: dict(own.get(section) or {}) for section in SECTIONS}})
