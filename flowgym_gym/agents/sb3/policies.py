"""Policies for stable-baselines3 that keep a latent's spatial layout from the observation to the
action.

Their networks are those of :mod:`flowgym_gym.agents.sb3.networks`.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import torch
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BaseModel, ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import Actor, SACPolicy
from torch import Tensor, nn

from flowgym_gym.agents.kinds import AnySpace, Options
from flowgym_gym.agents.sb3.networks import (
    LOG_STD_RANGE,
    ActionHead,
    LatentEncoder,
    ValueHead,
    as_resolution,
    image_shape,
)


class LatentActorCriticPolicy(ActorCriticPolicy):
    """Convolutional actor and critic for PPO (and A2C).

    Actor and critic have an encoder each: the critic's loss is in squared units of the return and
    would drown the actor's in a shared one. Parameters at the defaults, with 4 channels of latent
    and action and no prompt: actor 24,036, critic 24,993, and one standard deviation per action
    dimension.

    Args:
        observation_space: As :class:`LatentEncoder` wants it.
        action_space: ``Box(-1, 1, (C, h, w))``, at the latent's resolution or a coarser one, or a
            vector ``(C,)``.
        lr_schedule: Learning rate schedule.
        width: Number of features.
        blocks: Number of residual blocks of each encoder.
        log_std_init: Logarithm of the initial standard deviation of the actions.
        value_scale: Typical size of a return; the critic predicts in this unit. The value loss
            still is in squared units of the return, so choose ``vf_coef`` near ``0.5 /
            value_scale**2``.
        state_dependent_std: Let the standard deviation depend on the observation, by a head beside
            the one of the mean (``w + 1`` parameters for each channel of the action) that starts at
            zero: where an action costs much in one step and little in another, exploration has a
            size for each.
        use_sde: Must be False; stable-baselines3 passes it.
        optimizer_class: Of the joint optimiser.
        optimizer_kwargs: Its arguments, without the learning rate.

    Raises:
        OptionError: If the spaces are others, or ``use_sde`` is True.

    >>> import gymnasium, flowgym_gym
    >>> from stable_baselines3 import PPO
    >>> env = gymnasium.make("flowgym/StableDiffusion-Red-v0", discretization_steps=4)
    >>> agent = PPO(LatentActorCriticPolicy, env, device="cpu")
    >>> observation, _ = env.reset(seed=0)
    >>> float(abs(agent.predict(observation, deterministic=True)[0]).max())
    0.0
    """

    def __init__(
        self,
        observation_space: AnySpace,
        action_space: AnySpace,
        lr_schedule: Schedule,
        *,
        width: int = 32,
        blocks: int = 1,
        log_std_init: float = -1.0,
        value_scale: float = 1.0,
        state_dependent_std: bool = False,
        use_sde: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: Options | None = None,
    ) -> None:
        resolution = as_resolution(observation_space, action_space, use_sde)
        self.width, self.blocks, self.value_scale = width, blocks, value_scale
        self.state_dependent_std = state_dependent_std
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            ortho_init=False,
            log_std_init=log_std_init,
            features_extractor_class=LatentEncoder,  # type: ignore[arg-type]
            features_extractor_kwargs={"resolution": resolution, "width": width, "blocks": blocks},
            share_features_extractor=False,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self.action_net = ActionHead(self.width, image_shape(self.action_space.shape)[0])
        self.value_net = ValueHead(self.width, self.width, self.value_scale)  # type: ignore[assignment]
        if self.state_dependent_std:
            self.log_std_net = ActionHead(self.width, image_shape(self.action_space.shape)[0])
        self.optimizer = self.optimizer_class(
            self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs
        )  # type: ignore[call-arg]

    def _get_action_dist_from_latent(self, latent_pi: Tensor) -> Distribution:
        if not self.state_dependent_std:
            return super()._get_action_dist_from_latent(latent_pi)
        log_std = (self.log_std + self.log_std_net(latent_pi)).clamp(*LOG_STD_RANGE)
        return self.action_dist.proba_distribution(self.action_net(latent_pi), log_std)

    def _get_constructor_parameters(self) -> Options:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "width": self.width,
            "blocks": self.blocks,
            "log_std_init": self.log_std_init,
            "value_scale": self.value_scale,
            "state_dependent_std": self.state_dependent_std,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }


class LatentActor(Actor):
    """SAC's actor with a :class:`LatentEncoder`: mean and logarithm of the standard deviation from
    1x1 convolutions.
    """

    def __init__(self, *, log_std_init: float = -1.0, **kwargs: Any) -> None:
        super().__init__(log_std_init=log_std_init, **kwargs)
        channels = image_shape(self.action_space.shape)[0]
        self.mu = ActionHead(self.features_dim, channels)
        self.log_std = ActionHead(self.features_dim, channels, bias=log_std_init)  # type: ignore[assignment]


class LatentCritic(ContinuousCritic):
    """SAC's critics: each reads the encoder's map with the action stacked onto it."""

    def __init__(
        self,
        observation_space: AnySpace,
        action_space: gymnasium.spaces.Box,
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        n_critics: int = 2,
        value_scale: float = 1.0,
        outputs: int = 1,
        **kwargs: Any,
    ) -> None:
        # ContinuousCritic would build linear layers over the flattened action, huge for the latent
        # of a large model.
        BaseModel.__init__(
            self, observation_space, action_space, features_extractor=features_extractor
        )
        self.share_features_extractor = False
        self.n_critics = n_critics
        features = features_dim + image_shape(action_space.shape)[0]
        self.q_networks: list[nn.Module] = [
            ValueHead(features, features_dim, value_scale, outputs) for _ in range(n_critics)
        ]
        for i, q_network in enumerate(self.q_networks):
            self.add_module(f"qf{i}", q_network)

    def forward(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, ...]:
        """Values of actions ``(n, dims)``, flat as stable-baselines3 has them: ``(n, 1)`` from each
        critic.
        """
        stacked = self._stack(obs, actions)
        return tuple(q_network(stacked) for q_network in self.q_networks)

    def q1_forward(self, obs: PyTorchObs, actions: Tensor) -> Tensor:
        """Values of the first critic alone, ``(n, 1)``."""
        value: Tensor = self.q_networks[0](self._stack(obs, actions))
        return value

    def _stack(self, obs: PyTorchObs, actions: Tensor) -> Tensor:
        # In the actor's loss, where actions have a gradient, that of the critics' encoder is not
        # used.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not actions.requires_grad):
            features = self.extract_features(obs, self.features_extractor)
        return torch.cat(
            [features, actions.reshape(-1, *image_shape(self.action_space.shape))], dim=1
        )


class LatentQuantileCritic(LatentCritic):
    """TQC's critics: each gives quantiles of the return instead of its mean."""

    def __init__(self, *, n_quantiles: int, **kwargs: Any) -> None:
        super().__init__(outputs=n_quantiles, **kwargs)
        self.n_quantiles = n_quantiles
        self.quantiles_total = n_quantiles * self.n_critics

    def forward(self, obs: PyTorchObs, actions: Tensor) -> Tensor:  # type: ignore[override]
        """Quantiles of each critic for actions ``(n, dims)``: ``(n, n_critics, n_quantiles)``."""
        return torch.stack(super().forward(obs, actions), dim=1)


class LatentSACPolicy(SACPolicy):
    """Convolutional actor and critics for SAC; the critics share an encoder, the actor has its own.

    Parameters at the defaults, with 4 channels of latent and action and no prompt: actor 24,168,
    critics 26,338 (and as many in their target).

    Args:
        observation_space: As :class:`LatentEncoder` wants it.
        action_space: ``Box(-1, 1, (C, h, w))``, at the latent's resolution or a coarser one, or a
            vector ``(C,)``.
        lr_schedule: Learning rate schedule.
        width: Number of features.
        blocks: Number of residual blocks of each encoder.
        log_std_init: Logarithm of the initial standard deviation of the actions, before they are
            squashed by tanh.
        value_scale: Typical size of a return; the critics predict in this unit.
        n_critics: Number of critics.
        use_sde: Must be False; stable-baselines3 passes it.
        optimizer_class: Of both optimisers.
        optimizer_kwargs: Their arguments, without the learning rate.

    Raises:
        OptionError: If the spaces are others, or ``use_sde`` is True.

    >>> import gymnasium, flowgym_gym
    >>> from stable_baselines3 import SAC
    >>> env = gymnasium.make("flowgym/StableDiffusion-Red-v0", discretization_steps=4)
    >>> agent = SAC(LatentSACPolicy, env, buffer_size=1000, device="cpu")
    >>> observation, _ = env.reset(seed=0)
    >>> float(abs(agent.predict(observation, deterministic=True)[0]).max())
    0.0
    """

    def __init__(
        self,
        observation_space: AnySpace,
        action_space: gymnasium.spaces.Box,
        lr_schedule: Schedule,
        *,
        width: int = 32,
        blocks: int = 1,
        log_std_init: float = -1.0,
        value_scale: float = 1.0,
        n_critics: int = 2,
        use_sde: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: Options | None = None,
    ) -> None:
        resolution = as_resolution(observation_space, action_space, use_sde)
        self.width, self.blocks, self.value_scale = width, blocks, value_scale
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            log_std_init=log_std_init,
            features_extractor_class=LatentEncoder,  # type: ignore[arg-type]
            features_extractor_kwargs={"resolution": resolution, "width": width, "blocks": blocks},
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            n_critics=n_critics,
            share_features_extractor=False,
        )

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> LatentActor:
        """An actor, called by stable-baselines3."""
        return LatentActor(
            **self._update_features_extractor(self.actor_kwargs, features_extractor)
        ).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> LatentCritic:
        """The critics, called by stable-baselines3."""
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return LatentCritic(value_scale=self.value_scale, **kwargs).to(self.device)

    def _get_constructor_parameters(self) -> Options:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "width": self.width,
            "blocks": self.blocks,
            "log_std_init": self.actor_kwargs["log_std_init"],
            "value_scale": self.value_scale,
            "n_critics": self.critic_kwargs["n_critics"],
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }


class LatentTQCPolicy(LatentSACPolicy):
    """Convolutional actor and critics for sb3-contrib's TQC: :class:`LatentSACPolicy` with
    quantiles as values.

    Parameters at the defaults, with 4 channels of latent and action and no prompt: actor 24,168,
    critics 27,922 (and as many in their target).

    Args:
        observation_space: As for :class:`LatentSACPolicy`, like all that is not named here.
        action_space: The same.
        lr_schedule: The same.
        width: The same.
        blocks: The same.
        log_std_init: The same.
        value_scale: The same.
        n_critics: The same.
        n_quantiles: Number of quantiles of each critic.
        **kwargs: The same.

    Raises:
        OptionError: If the spaces are others, or ``use_sde`` is True.
    """

    def __init__(
        self,
        observation_space: AnySpace,
        action_space: gymnasium.spaces.Box,
        lr_schedule: Schedule,
        *,
        width: int = 32,
        blocks: int = 1,
        log_std_init: float = -1.0,
        value_scale: float = 1.0,
        n_critics: int = 2,
        n_quantiles: int = 25,
        **kwargs: Any,
    ) -> None:
        self.n_quantiles = n_quantiles
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            width=width,
            blocks=blocks,
            log_std_init=log_std_init,
            value_scale=value_scale,
            n_critics=n_critics,
            **kwargs,
        )

    def make_critic(
        self, features_extractor: BaseFeaturesExtractor | None = None
    ) -> LatentQuantileCritic:
        """The critics, called by stable-baselines3."""
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        critic = LatentQuantileCritic(
            n_quantiles=self.n_quantiles, value_scale=self.value_scale, **kwargs
        )
        return critic.to(self.device)

    def _get_constructor_parameters(self) -> Options:
        return {**super()._get_constructor_parameters(), "n_quantiles": self.n_quantiles}
