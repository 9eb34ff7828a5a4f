"""Learning of a run by RLlib: its runners play, its learner learns, and the run's agent follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

from flowgym_gym.agents.kinds import Options, SomeOptions
from flowgym_gym.agents.rllib.configuration import of_settings
from flowgym_gym.agents.rllib.plain import packed, unpacked
from flowgym_gym.agents.rllib.policies import actor_of
from flowgym_gym.agents.rllib.reports import ENDED, QUANTITIES, EpisodeReports
from flowgym_gym.agents.runs.config import Config
from flowgym_gym.agents.runs.metrics import Row
from flowgym_gym.agents.runs.preparation import Runners
from flowgym_gym.agents.runs.progress import Statistics
from flowgym_gym.agents.sb3.policies import LatentActorCriticPolicy
from flowgym_gym.console import say
from flowgym_gym.errors import CheckpointError, OptionError, reason

STATE = "rllib"
# Columns of metrics.csv by RLlib's names.
LEARNT = {
    "ppo": {
        "vf_explained_var": "explained_variance",
        "vf_loss": "value_loss",
        "default_optimizer_learning_rate": "learning_rate",
    },
    "sac": {
        "policy_loss": "actor_loss",
        "qf_loss": "critic_loss",
        "alpha_value": "ent_coef",
        "policy_learning_rate": "learning_rate",
    },
}


class RLlib:
    """An engine whose runners play in other processes, on any machine of a Ray cluster.

    Args:
        config: Of the run.
        model: The agent of the run, which gets the weights of the actor after every interval.
        statistics: Of the run.
        runners: How many runners, and where.

    Raises:
        OptionError: If the cluster cannot be reached.
    """

    def __init__(
        self, config: Config, model: BaseAlgorithm, statistics: Statistics, runners: Runners
    ) -> None:
        self._model, self._statistics, self._algo = model, statistics, config.algo
        self._started = _connect(runners)
        made = of_settings(
            f"flowgym_gym:{config.env_id}",
            config.algo,
            config.settings,
            runners=runners.count,
            gpus_per_runner=runners.gpus,
        )
        made.debugging(seed=config.seed)
        made.callbacks(EpisodeReports)
        try:
            self._algorithm = made.build_algo()
        except BaseException:
            if self._started:
                ray.shutdown()
            raise
        self._learnt: Options = {}
        self._follow()

    def learn(self, timesteps: int, rate: float) -> None:
        """One iteration of RLlib, which has its own schedule of the learning rate."""
        result = self._algorithm.train()
        self._learnt = dict(result.get("learners", {}).get("default_policy", {}))
        ended = result.get("env_runners", {}).get(ENDED, {})
        rows = zip(*(ended.get(name, ()) for name in QUANTITIES), strict=True)
        for reward, cost, total, valid in rows:
            self._statistics.add(reward, cost, total, bool(valid))
        self._model.num_timesteps = int(result["num_env_steps_sampled_lifetime"])
        self._follow()

    def values(self) -> Row:
        """What the learner reports, in columns of ``metrics.csv``."""
        row: Row = {
            column: float(self._learnt[name])
            for name, column in LEARNT[self._algo].items()
            if name in self._learnt
        }
        if self._algo == "ppo":
            row["std"] = float(actor_of(self._algorithm).log_std.detach().exp().mean())
        return row

    def state(self) -> Options:
        """RLlib's state as JSON and arrays."""
        plain, arrays = packed(self._algorithm.get_state(), f"{STATE}.")
        return {STATE: plain, **arrays}

    def restore(self, progress: SomeOptions) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: If it is damaged, or of another agent.
        """
        try:
            state = unpacked(progress[STATE], progress)
            _check_like(state["learner_group"], self._algorithm.get_state()["learner_group"])
            self._algorithm.set_state(state)
        except Exception as error:
            raise CheckpointError(
                f"the state of RLlib in the newest checkpoint cannot be read: {reason(error)}"
            ) from error
        if self._algo == "sac":
            say("RLlib's replay buffer is not kept: it fills anew")
        self._follow()

    def close(self) -> None:
        """End the runners, and the cluster if it was started here."""
        self._algorithm.stop()
        if self._started:
            ray.shutdown()

    def _follow(self) -> None:
        """Give the agent of the run the weights of the actor."""
        take_actor(self._model.policy, actor_of(self._algorithm))


def take_actor(policy: nn.Module, actor: nn.Module) -> None:
    """Give a policy of stable-baselines3 the weights of an actor."""
    weights = {name: value.detach().cpu() for name, value in actor.state_dict().items()}
    own: Any = policy
    if isinstance(policy, LatentActorCriticPolicy):
        modules = {"encoder": own.pi_features_extractor, "mean": own.action_net}
        if own.state_dependent_std:
            modules["log_std_net"] = own.log_std_net
        with torch.no_grad():
            own.log_std.copy_(weights["log_std"].reshape(own.log_std.shape))
    else:
        own = own.actor
        modules = {"encoder": own.features_extractor, "mean": own.mu, "log_std_net": own.log_std}
    for prefix, module in modules.items():
        start = f"{prefix}."
        module.load_state_dict(
            {
                name.removeprefix(start): value
                for name, value in weights.items()
                if name.startswith(start)
            }
        )


def _connect(runners: Runners) -> bool:
    """Connect to the cluster, or start one on this machine; whether one was started."""
    if ray.is_initialized():
        return False
    try:
        if runners.address is not None:
            ray.init(address=runners.address, log_to_driver=False)
            return True
        ray.init(include_dashboard=False, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "on this machine" if runners.address is None else f"at {runners.address}"
        raise OptionError(f"Ray cannot be reached {where}: {reason(error)}") from error
    return True


def _check_like(state: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Raise a ValueError where the weights in a state have other names or shapes."""
    ours, theirs = (s["learner"]["rl_module"]["default_policy"] for s in (like, state))
    for name, value in ours.items():
        if theirs[name].shape != value.shape:
            raise ValueError(f"{name} has shape {theirs[name].shape}, expected {value.shape}")
