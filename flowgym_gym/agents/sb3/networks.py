r"""The networks of the latent policies, in plain torch: an exported policy needs nothing else.

One network, :class:`LatentEncoder`, reads the observation: a 3x3 convolution of the latent (1x1
where it is a vector: there are no neighbours), then residual blocks

.. math:: h \leftarrow h + W_2 * \mathrm{silu}\bigl((1 + a(e)) \odot (W_1 * \mathrm{silu}(h)) +
b(e)\bigr),

modulated feature by feature (FiLM, Perez et al., AAAI 2018) by an embedding :math:`e` of the time
(sinusoidal) and, where there is one, of the prompt. Its map is averaged down to the resolution of
the action, and a 1x1 convolution gives the action's mean. That last layer starts at zero, so that
the deterministic action of an untrained agent is exactly zero: the untrained agent is the base
model.
"""

from __future__ import annotations

import math

import gymnasium
import torch
from torch import Tensor, nn
from torch.nn import functional

from flowgym_gym.agents.kinds import AnySpace
from flowgym_gym.errors import OptionError

TIME_FEATURES = 32
# Where a step wants no exploration at all a standard deviation would shrink until PPO's ratios
# overflow.
LOG_STD_RANGE = (-4.0, 2.0)


class LatentEncoder(nn.Module):
    """Feature map of an observation, at the resolution of the action.

    Parameters: ``9 C w + w`` for the stem, ``w^2 + 34 w`` for the time, ``p w + w`` for a prompt of
    ``p`` numbers, and ``20 w^2 + 4 w`` per block: 3,296 and 20,608 per block for ``C = 4``, ``w =
    32`` and no prompt. For a vector, a multi-layer perceptron: ``C w + w`` for the stem and ``4 w^2
    + 4 w`` per block, 2,176 and 4,224 for ``C = 1``.

    Args:
        observation_space: ``Dict(latent=Box(C, H, W), time=Box((1,)))``, optionally with
            ``prompt=Box((p,))``. A latent that is a vector ``(C,)`` is taken as ``(C, 1, 1)``.
        resolution: Height and width of the map it returns.
        width: Number of features ``w`` of each cell.
        blocks: Number of residual blocks.
    """

    def __init__(
        self,
        observation_space: AnySpace,
        resolution: tuple[int, int],
        width: int = 32,
        blocks: int = 1,
    ) -> None:
        super().__init__()
        # stable-baselines3 sizes its own (linear) layers by features_dim; here they act on each
        # cell of the map.
        self.features_dim = width
        assert isinstance(observation_space, gymnasium.spaces.Dict)
        self.shape = image_shape(observation_space["latent"].shape)
        kernel = 1 if self.shape[1:] == (1, 1) else 3
        self.stem = Convolution(self.shape[0], width, kernel, padding=kernel // 2)
        self.time = nn.Sequential(
            nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width)
        )
        prompt = observation_space.spaces.get("prompt")
        self.prompt = None if prompt is None else nn.Linear((prompt.shape or ())[0], width)
        self.blocks = nn.ModuleList(FiLMBlock(width, kernel) for _ in range(blocks))
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
    """A residual block: two convolutions, feature-wise modulation between them; ``20 w^2 + 4 w``
    parameters if 3x3.
    """

    def __init__(self, width: int, kernel: int = 3) -> None:
        super().__init__()
        self.first = Convolution(width, width, kernel, padding=kernel // 2)
        self.second = Convolution(width, width, kernel, padding=kernel // 2)
        self.film = nn.Linear(width, 2 * width)

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        """Features ``(n, w, H, W)`` and embedding ``(n, w)`` to features of the same shape."""
        scale, shift = self.film(functional.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        hidden = self.first(functional.silu(features)) * (1 + scale) + shift
        updated: Tensor = features + self.second(functional.silu(hidden))
        return updated


class Convolution(nn.Conv2d):
    """A convolution that takes a 1x1 one of a single cell, a matrix product, as such: that is twice
    as fast.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(n, w_in, H, W)`` to ``(n, w_out, H, W)``."""
        if features.shape[2:] == self.kernel_size == (1, 1):
            return functional.linear(features.flatten(1), self.weight.flatten(1), self.bias)[
                :, :, None, None
            ]
        return super().forward(features)


def sinusoidal(time: Tensor, features: int = TIME_FEATURES) -> Tensor:
    """Sines and cosines of a time in [0, 1], shape ``(n, 1)`` to ``(n, features)``; half a period
    to 32 periods.
    """
    frequencies = torch.logspace(0, 6, features // 2, base=2.0, device=time.device) * math.pi
    angles = time * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ActionHead(nn.Sequential):
    """A 1x1 convolution to the action, flattened as stable-baselines3 wants it; its weights start
    at zero.

    Args:
        width: Number of features of each cell.
        channels: Number of channels of the action.
        bias: What it gives before training.
    """

    def __init__(self, width: int, channels: int, bias: float = 0.0) -> None:
        convolution = Convolution(width, channels, 1)
        nn.init.zeros_(convolution.weight)
        nn.init.constant_(convolution.bias, bias)  # type: ignore[arg-type]
        super().__init__(convolution, nn.Flatten())


class ValueHead(nn.Module):
    """One number from a feature map: 1x1 convolution, mean over the cells, linear; ``w_in w + 2 w +
    1`` parameters.

    Args:
        features: Number of features of each cell, ``w_in``.
        width: Number of hidden features ``w``.
        scale: Typical size of the number, so that the network itself works with numbers about 1.
        outputs: How many numbers; ``w + 1`` parameters more for each beyond the first.
    """

    def __init__(self, features: int, width: int, scale: float, outputs: int = 1) -> None:
        super().__init__()
        self.hidden = Convolution(features, width, 1)
        self.output = nn.Linear(width, outputs)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(n, w_in, h, w)`` to values ``(n, outputs)``."""
        value: Tensor = self.scale * self.output(
            functional.silu(self.hidden(features)).mean(dim=(2, 3))
        )
        return value


def image_shape(shape: tuple[int, ...] | None) -> tuple[int, int, int]:
    """A shape of up to three dimensions as ``(C, H, W)``.

    >>> image_shape((2,)), image_shape((4, 8, 8))
    ((2, 1, 1), (4, 8, 8))
    """
    channels, height, width = (*(shape or ()), 1, 1)[:3]
    return channels, height, width


def as_resolution(
    observation_space: AnySpace, action_space: AnySpace, use_sde: bool
) -> tuple[int, int]:
    """Height and width of the action, or an OptionError if these policies cannot act in such
    spaces.
    """
    if use_sde:
        raise OptionError(
            "use_sde is True, but the latent policies explore with independent noise; leave it "
            "False"
        )
    spaces = (
        observation_space.spaces if isinstance(observation_space, gymnasium.spaces.Dict) else {}
    )
    latent, time = spaces.get("latent"), spaces.get("time")
    if (
        latent is None
        or time is None
        or len(latent.shape or ()) not in (1, 2, 3)
        or time.shape != (1,)
    ):
        raise OptionError(
            f"observation space is {observation_space}, expected Dict(latent=Box(C, H, W), "
            "time=Box((1,)))"
        )
    if not isinstance(action_space, gymnasium.spaces.Box) or len(action_space.shape) not in (
        1,
        2,
        3,
    ):
        raise OptionError(f"action space is {action_space}, expected a Box of shape (C, h, w)")
    _, height, width = image_shape(action_space.shape)
    return height, width
