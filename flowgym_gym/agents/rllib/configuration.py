"""``config``: an RLlib configuration from a preset."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from flowgym_gym.agents.kinds import Options
from flowgym_gym.agents.rllib.hyperparameters import ppo, sac
from flowgym_gym.agents.rllib.modules import LatentPPOModule, LatentSACModule, as_model_config
from flowgym_gym.agents.rllib.runner import WRAPPERS, LatentEnvRunner
from flowgym_gym.agents.runs.presets import Settings, full_id, load_preset
from flowgym_gym.agents.runs.settings import env_options
from flowgym_gym.checks import check_choice, check_mapping, check_number, check_whole
from flowgym_gym.errors import OptionError, shown

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

PRESETS = ("default",)
MODULES = {"ppo": LatentPPOModule, "sac": LatentSACModule}
# A step of a large model may take minutes, and RLlib throws away what comes too late.
PATIENCE = 24 * 3600.0
NEXT_STEP = ("NextStep", None)


def config(
    env_id: str,
    algo: str = "ppo",
    preset: str = "default",
    *,
    runners: int = 0,
    gpus_per_runner: float = 0.0,
    wrappers: Mapping[str, Any] | None = None,
    **options: Any,
) -> PPOConfig | SACConfig:
    """An RLlib configuration for an environment, to be changed further and built.

    Each runner has one batched environment, with one call of the network per step; sub-environments
    of the preset are split over the runners, so that an iteration samples as many steps whatever
    their number. It is RLlib's new API stack.

    Args:
        env_id: With or without ``flowgym/``; an id that another package registers is written
            ``"package:namespace/Name-v0"``, so that runners import it.
        algo: ``"ppo"`` or ``"sac"``.
        preset: Its hyper-parameters: ``"default"``, those that stable-baselines3 trains with.
        runners: Processes that sample, on any machine of the cluster; 0 samples in the driver.
        gpus_per_runner: Accelerators of each, or a part of one.
        wrappers: Changes to the preset's, such as ``{"coarse_action": 4}``; None for one that is
            not wanted.
        **options: Changes to the preset's arguments of the environment.

    Returns:
        A ``PPOConfig`` or ``SACConfig``.

    Raises:
        UnknownIdError: If the environment does not exist.
        UnknownOptionError: If an option does not.
        OptionError: If a value cannot be used, such as another autoreset mode than RLlib's.

    >>> from flowgym_gym.agents.rllib import config
    >>> red = config("StableDiffusion-Red-v0", runners=4)
    >>> red.env, red.num_env_runners, red.num_envs_per_env_runner
    ('flowgym_gym:flowgym/StableDiffusion-Red-v0', 4, 8)
    """
    check_choice("algo", algo, tuple(MODULES))
    check_choice("preset", preset, PRESETS)
    check_whole("runners", runners, minimum=0)
    check_number("gpus_per_runner", gpus_per_runner, minimum=0)
    check_mapping("wrappers", wrappers)
    full, importable = _as_ids(env_id)
    settings = load_preset(full, algo)
    settings = replace(
        settings,
        env={**settings.env, **_env_options(full, options)},
        wrappers={**settings.wrappers, **(wrappers or {})},
    )
    return of_settings(importable, algo, settings, runners=runners, gpus_per_runner=gpus_per_runner)


def of_settings(
    importable: str,
    algo: str,
    settings: Settings,
    *,
    runners: int = 0,
    gpus_per_runner: float = 0.0,
) -> PPOConfig | SACConfig:
    """As :func:`config`, from the whole settings of a run.

    Args:
        importable: The environment, with the package that runners import for it.
        algo: ``"ppo"`` or ``"sac"``.
        settings: Complete ones.
        runners: Processes that sample.
        gpus_per_runner: Accelerators of each.
    """
    made = PPOConfig() if algo == "ppo" else SACConfig()
    made.api_stack(enable_rl_module_and_learner=True, enable_env_runner_and_connector_v2=True)
    made.framework("torch")
    made.environment(
        importable,
        env_config={
            **({"device": "cuda"} if gpus_per_runner else {}),
            **settings.env,
            WRAPPERS: settings.wrappers,
        },
    )
    _set_runners(made, settings, runners, gpus_per_runner)
    made.rl_module(
        rl_module_spec=RLModuleSpec(
            module_class=MODULES[algo], model_config=as_model_config(algo, settings.policy)
        )
    )
    hyperparameters = ppo(settings) if algo == "ppo" else sac(settings, runners)
    made.training(**hyperparameters)
    if algo == "sac":
        # By RLlib's defaults a second of sampling, however many steps that is.
        made.reporting(
            min_time_s_per_iteration=None,
            min_sample_timesteps_per_iteration=10 * settings.num_envs,
        )
        made.env_runners(rollout_fragment_length=settings.algo["train_freq"])
    return made


def _set_runners(
    made: AlgorithmConfig, settings: Settings, runners: int, gpus_per_runner: float
) -> None:
    made.env_runners(
        env_runner_cls=LatentEnvRunner,
        num_env_runners=runners,
        num_envs_per_env_runner=math.ceil(settings.num_envs / max(1, runners)),
        num_cpus_per_env_runner=1,
        num_gpus_per_env_runner=gpus_per_runner,
        # One call of the network for all sub-environments; RLlib's default makes one for each.
        gym_env_vectorize_mode="vector_entry_point",
        rollout_fragment_length="auto",
        sample_timeout_s=PATIENCE,
    )
    made.evaluation(evaluation_sample_timeout_s=PATIENCE)
    # By RLlib's default the others wait a minute for one in which an error came.
    made.fault_tolerance(restart_failed_env_runners=True, delay_between_env_runner_restarts_s=5.0)


def _as_ids(env_id: str) -> tuple[str, str]:
    """The registered id, and how runners are told it: gymnasium loads no plugins in them."""
    module, colon, name = env_id.partition(":") if isinstance(env_id, str) else ("", "", env_id)
    if colon:
        importlib.import_module(module)
    full = full_id(name if colon else env_id)
    if colon:
        return full, f"{module}:{full}"
    if not full.startswith("flowgym/"):
        raise OptionError(
            f"env_id is {shown(env_id)}, which runners in other processes would not know; write "
            f'"package:{full}", with the package that registers it'
        )
    return full, f"flowgym_gym:{full}"


def _env_options(env_id: str, options: Options) -> Options:
    """Changes to the environment's arguments, or an OptionError or UnknownOptionError."""
    options = dict(options)
    mode = options.pop("autoreset_mode", None)
    if getattr(mode, "value", mode) not in NEXT_STEP:
        raise OptionError(
            f"autoreset_mode is {shown(getattr(mode, 'value', mode))}, but RLlib's runner needs "
            "'NextStep', and would learn from false transitions; leave autoreset_mode out"
        )
    return env_options(env_id, options)
