"""What options stable-baselines3's algorithms and the latent policies take, and within what
bounds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from flowgym_gym.agents.runs.bounds import Bounds
from flowgym_gym.agents.runs.memory import AUTO
from flowgym_gym.agents.sb3.algorithms import classes

Defaults = dict[str, object]

# Arguments of the algorithms that training itself decides, or that the latent policies do not
# support.
NOT_SETTABLE = {
    "self", "policy", "env", "policy_kwargs", "seed", "verbose", "tensorboard_log",
    "_init_setup_model", "use_sde", "sde_sample_freq", "use_sde_at_warmup", "rollout_buffer_class",
    "rollout_buffer_kwargs", "replay_buffer_class",
    "replay_buffer_kwargs", "optimize_memory_usage", "action_noise", "stats_window_size",
}  # fmt: skip
NOT_OF_POLICIES = {"use_sde", "optimizer_class", "optimizer_kwargs"}

COUNT = Bounds(minimum=1, whole=True)
FROM_ZERO = Bounds(minimum=0, whole=True)
POSITIVE = Bounds(minimum=0, above=True)
NOT_NEGATIVE = Bounds(minimum=0)
FRACTION = Bounds(minimum=0, maximum=1)

BOUNDS = {
    # Of the algorithms.
    "n_steps": COUNT,
    "batch_size": COUNT,
    "n_epochs": COUNT,
    "train_freq": COUNT,
    "target_update_interval": COUNT,
    "buffer_size": Bounds(minimum=1, whole=True, special=(AUTO,)),
    "learning_starts": FROM_ZERO,
    "top_quantiles_to_drop_per_net": FROM_ZERO,
    "learning_rate": POSITIVE,
    "clip_range": POSITIVE,
    "max_grad_norm": POSITIVE,
    "target_kl": POSITIVE,
    "ent_coef": NOT_NEGATIVE,
    "vf_coef": NOT_NEGATIVE,
    "gamma": FRACTION,
    "gae_lambda": FRACTION,
    "tau": FRACTION,
    # Of the policies.
    "width": COUNT,
    "n_critics": COUNT,
    "n_quantiles": COUNT,
    "blocks": FROM_ZERO,
    "value_scale": POSITIVE,
}


def algorithm_options(algo: str) -> Defaults:
    """Names of the options that an algorithm takes, with their defaults."""
    found = _parameters(classes(algo)[0].__init__)
    return {name: p.default for name, p in found.items() if name not in NOT_SETTABLE}


def policy_options(algo: str) -> Defaults:
    """Names of the options that an algorithm's policy takes, with their defaults."""
    found = _parameters(classes(algo)[1])
    return {
        name: p.default
        for name, p in found.items()
        if p.kind is p.KEYWORD_ONLY and name not in NOT_OF_POLICIES
    }


def _parameters(function: Callable[..., object]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)
