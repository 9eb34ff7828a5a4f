r"""Policies for stable-baselines3 that keep a latent's spatial layout from the observation to the action.

One network, :class:`LatentEncoder`, reads the observation: a 3x3 convolution of the latent, then residual blocks

.. math:: h \leftarrow h + W_2 * \mathrm{silu}\bigl((1 + a(e)) \odot (W_1 * \mathrm{silu}(h)) + b(e)\bigr),

modulated feature by feature (FiLM, Perez et al., AAAI 2018) by an embedding :math:`e` of the time (sinusoidal) and,
where there is one, of the prompt. Its map is averaged down to the resolution of the action, and a 1x1 convolution gives
the action's mean. That last layer starts at zero, so that the deterministic action of an untrained agent is exactly
zero: the untrained agent is the base model.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import torch
from stable_baselines3.common.policies import ActorCriticPolicy, BaseModel, ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import Actor, SACPolicy
from torch import Tensor, nn
from torch.nn import functional

from flowgym_gym.errors import OptionError

TIME_FEATURES = 32


class LatentEncoder(BaseFeaturesExtractor):
    """Feature map of an observation, at the resolution of the action.

    Parameters: ``9 C w + w`` for the stem, ``w^2 + 34 w`` for the time, ``p w + w`` for a prompt of ``p`` numbers, and
    ``20 w^2 + 4 w`` per block: 3,296 and 20,608 per block for ``C = 4``, ``w = 32`` and no prompt.

    Args:
        observation_space: ``Dict(latent=Box(C, H, W), time=Box((1,)))``, optionally with ``prompt=Box((p,))``. A latent
            that is a vector ``(C,)`` is taken as ``(C, 1, 1)``.
        resolution: Height and width of the map it returns.
        width: Number of features ``w`` of each cell.
        blocks: Number of residual blocks.
    """

    def __init__(
        self, observation_space: gymnasium.Space[Any], resolution: tuple[int, int], width: int = 32, blocks: int = 1
    ) -> None:
        # stable-baselines3 sizes its own (linear) layers by features_dim; here they act on each cell of the map.
        super().__init__(observation_space, features_dim=width)
        assert isinstance(observation_space, gymnasium.spaces.Dict)
        self.shape = image_shape(observation_space["latent"].shape)
        self.stem = nn.Conv2d(self.shape[0], width, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        prompt = observation_space.spaces.get("prompt")
        self.prompt = None if prompt is None else nn.Linear((prompt.shape or ())[0], width)
        self.blocks = nn.ModuleList(FiLMBlock(width) for _ in range(blocks))
        self.pool = nn.AdaptiveAvgPool2d(resolution)

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Features of shape ``(n, width, *resolution)``."""
        embedding = self.time(sinusoidal(observations["time"]))
        if self.prompt is not None:
            embedding = embedding + self.prompt(observations["prompt"])
        features = self.stem(observations["latent"].reshape(-1, *self.shape))
        for block in self.blocks:
            features = block(features, embedding)
        pooled: Tensor = self.pool(functional.silu(features))
        return pooled


class FiLMBlock(nn.Module):
    """A residual block: two 3x3 convolutions, feature-wise modulation between them; ``20 w^2 + 4 w`` parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(width, 2 * width)

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        """Features ``(n, w, H, W)`` and embedding ``(n, w)`` to features of the same shape."""
        scale, shift = self.film(functional.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        hidden = self.first(functional.silu(features)) * (1 + scale) + shift
        updated: Tensor = features + self.second(functional.silu(hidden))
        return updated


def sinusoidal(time: Tensor, features: int = TIME_FEATURES) -> Tensor:
    """Sines and cosines of a time in [0, 1], shape ``(n, 1)`` to ``(n, features)``; half a period to 32 periods."""
    frequencies = torch.logspace(0, 6, features // 2, base=2.0, device=time.device) * math.pi
    angles = time * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ActionHead(nn.Sequential):
    """A 1x1 convolution to the action, flattened as stable-baselines3 wants it; its weights start at zero.

    Args:
        width: Number of features of each cell.
        channels: Number of channels of the action.
        bias: What it gives before training.
    """

    def __init__(self, width: int, channels: int, bias: float = 0.0) -> None:
        convolution = nn.Conv2d(width, channels, 1)
        nn.init.zeros_(convolution.weight)
        nn.init.constant_(convolution.bias, bias)  # type: ignore[arg-type]
        super().__init__(convolution, nn.Flatten())


class ValueHead(nn.Module):
    """One number from a feature map: 1x1 convolution, mean over the cells, linear; ``w_in w + 2 w + 1`` parameters.

    Args:
        features: Number of features of each cell, ``w_in``.
        width: Number of hidden features ``w``.
        scale: Typical size of the number, so that the network itself works with numbers about 1.
    """

    def __init__(self, features: int, width: int, scale: float) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(features, width, 1)
        self.output = nn.Linear(width, 1)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(n, w_in, h, w)`` to values ``(n, 1)``."""
        value: Tensor = self.scale * self.output(functional.silu(self.hidden(features)).mean(dim=(2, 3)))
        return value


class LatentActorCriticPolicy(ActorCriticPolicy):
    """Convolutional actor and critic for PPO (and A2C).

    Actor and critic have an encoder each: the critic's loss is in squared units of the return and would drown the
    actor's in a shared one. Parameters at the defaults, with 4 channels of latent and action and no prompt: actor
    24,036, critic 24,993, and one standard deviation per action dimension.

    Args:
        observation_space: As :class:`LatentEncoder` wants it.
        action_space: ``Box(-1, 1, (C, h, w))``, at the latent's resolution or a coarser one, or a vector ``(C,)``.
        lr_schedule: Learning rate schedule.
        width: Number of features.
        blocks: Number of residual blocks of each encoder.
        log_std_init: Logarithm of the initial standard deviation of the actions.
        value_scale: Typical size of a return; the critic predicts in this unit. The value loss still is in squared
            units of the return, so choose ``vf_coef`` near ``0.5 / value_scale**2``.
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
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        lr_schedule: Schedule,
        *,
        width: int = 32,
        blocks: int = 1,
        log_std_init: float = -1.0,
        value_scale: float = 1.0,
        use_sde: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        resolution = check_spaces(observation_space, action_space, use_sde)
        self.width, self.blocks, self.value_scale = width, blocks, value_scale
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            ortho_init=False,
            log_std_init=log_std_init,
            features_extractor_class=LatentEncoder,
            features_extractor_kwargs={"resolution": resolution, "width": width, "blocks": blocks},
            share_features_extractor=False,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self.action_net = ActionHead(self.width, image_shape(self.action_space.shape)[0])
        self.value_net = ValueHead(self.width, self.width, self.value_scale)  # type: ignore[assignment]
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "width": self.width,
            "blocks": self.blocks,
            "log_std_init": self.log_std_init,
            "value_scale": self.value_scale,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }


class LatentActor(Actor):
    """SAC's actor with a :class:`LatentEncoder`: mean and logarithm of the standard deviation from 1x1 convolutions."""

    def __init__(self, *, log_std_init: float = -1.0, **kwargs: Any) -> None:
        super().__init__(log_std_init=log_std_init, **kwargs)
        channels = image_shape(self.action_space.shape)[0]
        self.mu = ActionHead(self.features_dim, channels)
        self.log_std = ActionHead(self.features_dim, channels, bias=log_std_init)  # type: ignore[assignment]


class LatentCritic(ContinuousCritic):
    """SAC's critics: each reads the encoder's map with the action stacked onto it."""

    def __init__(
        self,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.spaces.Box,
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        n_critics: int = 2,
        value_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        # ContinuousCritic would build linear layers over the flattened action, huge for the latent of a large model.
        BaseModel.__init__(self, observation_space, action_space, features_extractor=features_extractor)
        self.share_features_extractor = False
        self.n_critics = n_critics
        features = features_dim + image_shape(action_space.shape)[0]
        self.q_networks: list[nn.Module] = [ValueHead(features, features_dim, value_scale) for _ in range(n_critics)]
        for i, q_network in enumerate(self.q_networks):
            self.add_module(f"qf{i}", q_network)

    def forward(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, ...]:
        """Values of actions ``(n, dims)``, flat as stable-baselines3 has them: ``(n, 1)`` from each critic."""
        stacked = self._stack(obs, actions)
        return tuple(q_network(stacked) for q_network in self.q_networks)

    def q1_forward(self, obs: PyTorchObs, actions: Tensor) -> Tensor:
        """Values of the first critic alone, ``(n, 1)``."""
        value: Tensor = self.q_networks[0](self._stack(obs, actions))
        return value

    def _stack(self, obs: PyTorchObs, actions: Tensor) -> Tensor:
        features = self.extract_features(obs, self.features_extractor)
        return torch.cat([features, actions.reshape(-1, *image_shape(self.action_space.shape))], dim=1)


class LatentSACPolicy(SACPolicy):
    """Convolutional actor and critics for SAC; the critics share an encoder, the actor has its own.

    Parameters at the defaults, with 4 channels of latent and action and no prompt: actor 24,168, critics 26,338 (and as
    many in their target).

    Args:
        observation_space: As :class:`LatentEncoder` wants it.
        action_space: ``Box(-1, 1, (C, h, w))``, at the latent's resolution or a coarser one, or a vector ``(C,)``.
        lr_schedule: Learning rate schedule.
        width: Number of features.
        blocks: Number of residual blocks of each encoder.
        log_std_init: Logarithm of the initial standard deviation of the actions, before they are squashed by tanh.
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
        observation_space: gymnasium.Space[Any],
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
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        resolution = check_spaces(observation_space, action_space, use_sde)
        self.width, self.blocks, self.value_scale = width, blocks, value_scale
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            log_std_init=log_std_init,
            features_extractor_class=LatentEncoder,
            features_extractor_kwargs={"resolution": resolution, "width": width, "blocks": blocks},
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            n_critics=n_critics,
            share_features_extractor=False,
        )

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> LatentActor:
        """An actor, called by stable-baselines3."""
        return LatentActor(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> LatentCritic:
        """The critics, called by stable-baselines3."""
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return LatentCritic(value_scale=self.value_scale, **kwargs).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
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


def check_spaces(
    observation_space: gymnasium.Space[Any], action_space: gymnasium.Space[Any], use_sde: bool
) -> tuple[int, int]:
    """Height and width of the action, or an OptionError if these policies cannot act in such spaces."""
    if use_sde:
        raise OptionError("use_sde is True, but the latent policies explore with independent noise; leave it False")
    spaces = observation_space.spaces if isinstance(observation_space, gymnasium.spaces.Dict) else {}
    latent, time = spaces.get("latent"), spaces.get("time")
    if latent is None or time is None or len(latent.shape or ()) not in (1, 2, 3) or time.shape != (1,):
        raise OptionError(
            f"observation space is {observation_space}, expected Dict(latent=Box(C, H, W), time=Box((1,)))"
        )
    if not isinstance(action_space, gymnasium.spaces.Box) or len(action_space.shape) not in (1, 2, 3):
        raise OptionError(f"action space is {action_space}, expected a Box of shape (C, h, w)")
    _, height, width = image_shape(action_space.shape)
    return height, width


def image_shape(shape: tuple[int, ...] | None) -> tuple[int, int, int]:
    """A shape of up to three dimensions as ``(C, H, W)``.

    >>> image_shape((2,)), image_shape((4, 8, 8))
    ((2, 1, 1), (4, 8, 8))
    """
    channels, height, width = (*(shape or ()), 1, 1)[:3]
    return channels, height, width
