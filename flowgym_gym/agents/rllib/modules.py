"""``RLModule`` classes with the networks of the stable-baselines3 policies.

Observations are dictionaries and actions ``(C, h, w)``, neither of them flattened. What acts is a
:class:`GaussianActor`, the network of an exported policy, so that the weights of any of the two are
those of the other.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import torch
from ray.rllib.algorithms.sac.torch.default_sac_torch_rl_module import DefaultSACTorchRLModule
from ray.rllib.core.columns import Columns
from ray.rllib.core.models.base import ENCODER_OUT
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI, ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor, nn

from flowgym_gym.agents.kinds import AnySpace, Options
from flowgym_gym.agents.rllib.distributions import LatentGaussian, LatentSquashedGaussian
from flowgym_gym.agents.sb3.exported import GAUSSIAN, SQUASHED, GaussianActor
from flowgym_gym.agents.sb3.networks import (
    LOG_STD_RANGE,
    LatentEncoder,
    ValueHead,
    as_resolution,
    image_shape,
)
from flowgym_gym.errors import UnknownOptionError, did_you_mean, shown

# As in stable-baselines3's SAC.
SQUASHED_LOG_STD_RANGE = (-20.0, 2.0)
# Options of the policies, as in the presets, with stable-baselines3's defaults; RLlib adds names of
# its own to a module's configuration.
OPTIONS: dict[str, Options] = {
    "ppo": {
        "width": 32,
        "blocks": 1,
        "log_std_init": -1.0,
        "value_scale": 1.0,
        "state_dependent_std": False,
    },
    "sac": {"width": 32, "blocks": 1, "log_std_init": -1.0, "value_scale": 1.0},
}


def as_model_config(algo: str, policy: Options) -> Options:
    """The whole configuration of a module from options of a policy.

    Raises:
        UnknownOptionError: If the module has no option of a name.
    """
    known = OPTIONS[algo]
    for name in policy:
        if name not in known:
            raise UnknownOptionError(
                f"the module for {algo!r} has no option {shown(name)}{did_you_mean(name, known)} "
                f"(options: {', '.join(known)})"
            )
    return {**known, **policy}


class LatentPPOModule(TorchRLModule, ValueFunctionAPI, InferenceOnlyAPI):
    """Actor and critic for PPO, each with an encoder of its own: ``LatentActorCriticPolicy``.

    Its ``model_config`` takes the policy options of the presets. Runners have the actor alone.
    """

    def setup(self) -> None:
        """Build the networks; called by RLlib."""
        options: Options = {**OPTIONS["ppo"], **self.model_config}
        dependent = options["state_dependent_std"]
        self.action_dist_cls = LatentGaussian
        self.actor = _actor(
            self, options, GAUSSIAN, dependent, LOG_STD_RANGE if dependent else None
        )
        nn.init.constant_(self.actor.log_std, options["log_std_init"])
        self.value_encoder = _encoder(self, options)
        self.value_head = ValueHead(options["width"], options["width"], options["value_scale"])

    def get_non_inference_attributes(self) -> list[str]:
        """What runners do without."""
        return ["value_encoder", "value_head"]

    def compute_values(self, batch: Options, embeddings: Tensor | None = None) -> Tensor:
        """The critic's values ``(n,)``."""
        value: Tensor = self.value_head(self.value_encoder(batch[Columns.OBS]))
        return value.squeeze(-1)

    def _forward(self, batch: Options, **kwargs: Any) -> Options:
        return {Columns.ACTION_DIST_INPUTS: logits(self.actor, batch[Columns.OBS])}


class LatentSACModule(DefaultSACTorchRLModule):
    """Actor and critics for SAC: ``LatentSACPolicy``, but each critic has an encoder of its own.

    Its ``model_config`` takes the policy options of the presets. Runners have the actor alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # RLlib's catalogue knows no dictionaries and no actions with more than one dimension, and
        # nothing here is made from it.
        kwargs.pop("catalog_class", None)
        TorchRLModule.__init__(self, *args, **kwargs)

    def setup(self) -> None:
        """Build the networks; called by RLlib."""
        options: Options = {**OPTIONS["sac"], **self.model_config}
        self.twin_q = self.model_config.get("twin_q", True)
        self.action_dist_cls = LatentSquashedGaussian
        self.pi_encoder = _Observations()
        self.pi = _Logits(_actor(self, options, SQUASHED, True, SQUASHED_LOG_STD_RANGE))
        head = self.pi.actor.log_std_net
        assert head is not None
        nn.init.constant_(head.get_parameter("0.bias"), options["log_std_init"])
        if self.inference_only:
            return
        self.qf_encoder, self.qf = self._critic(options)
        if self.twin_q:
            self.qf_twin_encoder, self.qf_twin = self._critic(options)

    def _critic(self, options: Options) -> tuple[nn.Module, nn.Module]:
        shape = image_shape(self.action_space.shape)
        width = options["width"]
        head = ValueHead(width + shape[0], width, options["value_scale"])
        return _WithAction(_encoder(self, options), shape), head


class _Observations(nn.Module):
    """SAC's first half of the actor, which has none."""

    def forward(self, batch: Options) -> Options:
        return {ENCODER_OUT: batch[Columns.OBS]}


class _Logits(nn.Module):
    """SAC's second half of the actor."""

    def __init__(self, actor: GaussianActor) -> None:
        super().__init__()
        self.actor = actor

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        return logits(self.actor, observations)


class _WithAction(nn.Module):
    """An encoder's map with the action stacked onto it."""

    def __init__(self, encoder: LatentEncoder, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.encoder, self.shape = encoder, shape

    def forward(self, batch: Options) -> Options:
        actions = batch[Columns.ACTIONS].reshape(-1, *self.shape)
        return {ENCODER_OUT: torch.cat([self.encoder(batch[Columns.OBS]), actions], dim=1)}


def logits(actor: GaussianActor, observations: dict[str, Tensor]) -> Tensor:
    """Means and logarithms of standard deviations: ``(n, 2 C, h, w)``; for vectors ``(n, 2 C)``."""
    moments = [values.reshape(-1, *actor.shape) for values in actor(observations)]
    return torch.cat(moments, dim=1)


def _actor(
    module: TorchRLModule,
    options: Options,
    distribution: str,
    state_dependent_std: bool,
    log_std_range: tuple[float, float] | None,
) -> GaussianActor:
    as_resolution(module.observation_space, module.action_space, use_sde=False)
    spaces = module.observation_space.spaces
    return GaussianActor(
        {
            "architecture": {
                "width": options["width"],
                "blocks": options["blocks"],
                "distribution": distribution,
                "state_dependent_std": state_dependent_std,
                "log_std_range": log_std_range,
            },
            "observation_space": {name: space.shape for name, space in spaces.items()},
            "action_space": {"shape": module.action_space.shape},
        }
    )


def _encoder(module: TorchRLModule, options: Options) -> LatentEncoder:
    space: AnySpace = module.observation_space
    assert isinstance(module.action_space, gymnasium.spaces.Box)
    resolution = as_resolution(space, module.action_space, use_sde=False)
    return LatentEncoder(space, resolution, options["width"], options["blocks"])
