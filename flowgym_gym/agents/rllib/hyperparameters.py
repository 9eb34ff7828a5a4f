"""The presets' hyper-parameters under the names that RLlib gives them.

Differences that remain: RLlib standardises advantages over a whole batch, stable-baselines3 over
each minibatch; its SAC takes Huber's loss for the critics, which have an encoder each, and draws no
uniformly random actions before it learns.
"""

from __future__ import annotations

import math
from typing import Any

from flowgym_gym.agents.kinds import Options
from flowgym_gym.agents.runs.memory import AUTO
from flowgym_gym.agents.runs.presets import Settings


def ppo(settings: Settings) -> Options:
    """Arguments of ``PPOConfig.training``."""
    algo = settings.algo
    return {
        "lr": learning_rate(settings),
        "train_batch_size_per_learner": algo["n_steps"] * settings.num_envs,
        "minibatch_size": algo["batch_size"],
        "num_epochs": algo["n_epochs"],
        "gamma": algo["gamma"],
        "lambda_": algo["gae_lambda"],
        "clip_param": algo["clip_range"],
        "entropy_coeff": float(algo["ent_coef"]),
        "vf_loss_coeff": algo["vf_coef"],
        # By RLlib's default no error of the values beyond the square root of 10 is learnt from.
        "vf_clip_param": math.inf,
        "use_kl_loss": False,
        "grad_clip": algo["max_grad_norm"],
        "grad_clip_by": "global_norm",
    }


def sac(settings: Settings, runners: int) -> Options:
    """Arguments of ``SACConfig.training``."""
    algo = settings.algo
    alpha, alpha_learning_rate = _temperature(algo["ent_coef"], learning_rate(settings))
    size = algo["buffer_size"]
    return {
        "actor_lr": learning_rate(settings),
        "critic_lr": learning_rate(settings),
        "alpha_lr": alpha_learning_rate,
        "initial_alpha": alpha,
        "target_entropy": algo["target_entropy"],
        "train_batch_size_per_learner": algo["batch_size"],
        "training_intensity": _training_intensity(settings, runners),
        "num_steps_sampled_before_learning_starts": algo["learning_starts"],
        "gamma": algo["gamma"],
        "tau": algo["tau"],
        "replay_buffer_config": {
            "type": "EpisodeReplayBuffer",
            "capacity": settings.timesteps if size == AUTO else size,
        },
    }


def learning_rate(settings: Settings) -> Any:
    """A number, or RLlib's schedule over environment steps."""
    first, final = float(settings.algo["learning_rate"]), settings.final_learning_rate
    return first if final is None else [[0, first], [settings.timesteps, float(final)]]


def _temperature(ent_coef: str | float, rate: Any) -> tuple[float, Any]:
    """SAC's first temperature, and the learning rate with which it is fitted, 0 for a fixed one."""
    if isinstance(ent_coef, str):
        return float(ent_coef.partition("_")[2] or 1), rate
    return float(ent_coef), 0.0


def _training_intensity(settings: Settings, runners: int) -> float:
    """Replayed steps for each one sampled, such that RLlib makes as many updates as the preset.

    RLlib counts a runner more than there are.
    """
    algo = settings.algo
    sampled = algo["train_freq"] * math.ceil(settings.num_envs / max(1, runners)) * (runners + 1)
    return float(algo["gradient_steps"] * algo["batch_size"] / sampled)
