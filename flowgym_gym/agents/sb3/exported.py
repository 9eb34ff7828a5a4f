"""A trained agent's policy by itself: two files, and an object that acts without stable-baselines3.

``policy.safetensors``
    The weights of the actor.
``policy.json``
    How it is built, its spaces, what is done before and after it, and the environment, wrappers and
    versions of its training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flowgym_gym.agents.kinds import Options, SomeOptions
from flowgym_gym.agents.sb3.networks import ActionHead, LatentEncoder, image_shape
from flowgym_gym.defaults import plain_defaults
from flowgym_gym.errors import CheckpointError, OptionError

WEIGHTS = "policy.safetensors"
DESCRIPTION = "policy.json"
FORMAT = 1
GAUSSIAN, SQUASHED = "gaussian", "squashed_gaussian"
PREPROCESSING = "none: observations are float32, as the environment gives them"
POSTPROCESSING = {
    GAUSSIAN: "clip(action, low, high)",
    SQUASHED: "low + (high - low) (tanh(action) + 1) / 2",
}
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
    SafetensorError,
)


@plain_defaults()
def load_policy(folder: str | Path, device: str = "cpu") -> ExportedPolicy:
    """The policy that :func:`export` wrote; needs neither stable-baselines3 nor the run.

    Args:
        folder: Where it is.
        device: Where it computes.

    Raises:
        OptionError: If the folder holds no policy.
        CheckpointError: If its files are damaged, or do not fit each other.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file():
        raise OptionError(
            f"{folder} holds no policy (there is no {DESCRIPTION} in it); export one from a run"
        )
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise ValueError(
                f"format is {description['format']!r}, but this version reads format {FORMAT}"
            )
        # Sizes are compared before there is memory for them.
        with torch.device("meta"):
            actor = GaussianActor(description)
        actor.load_state_dict(load_file(folder / WEIGHTS), assign=True)
        return ExportedPolicy(actor.to(device, torch.float32).eval(), description)
    except UNREADABLE as error:
        raise CheckpointError(
            f"the policy in {folder} cannot be read: {type(error).__name__}: {error}"
        ) from error


class ExportedPolicy:
    """An exported policy, with stable-baselines3's ``predict``.

    Attributes:
        description: What ``policy.json`` holds.
        action_space: Of one environment.
        observation_space: Of one environment; its bounds are not kept.
    """

    def __init__(self, actor: GaussianActor, description: Options) -> None:
        self.description = description
        self.observation_space = actor.observation_space
        action = description["action_space"]
        self.action_space = gymnasium.spaces.Box(
            action["low"], action["high"], tuple(action["shape"]), np.float32
        )
        self._actor = actor

    @plain_defaults()
    def predict(
        self,
        observation: Mapping[str, np.ndarray],
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """Act.

        Args:
            observation: Of one environment or, with a leading dimension, of a batch.
            state: Given back; the policy has no memory.
            episode_start: Not used.
            deterministic: The mean action instead of a random one, which torch's global generator
                draws.

        Returns:
            Actions, of the action space's shape, for a batch with a leading dimension; and
            ``state``.

        Raises:
            OptionError: If the observation does not fit.
        """
        tensors, batched = self._tensors(observation)
        with torch.no_grad():
            mean, log_std = self._actor(tensors)
            actions = (
                mean if deterministic else torch.distributions.Normal(mean, log_std.exp()).rsample()
            )
        low, high = self.action_space.low, self.action_space.high
        if self._actor.distribution == SQUASHED:
            actions = (
                low + (high - low) * (actions.tanh().cpu().numpy().reshape(-1, *low.shape) + 1) / 2
            )
        else:
            actions = actions.cpu().numpy().reshape(-1, *low.shape).clip(low, high)
        return actions if batched else actions[0], state

    def _tensors(self, observation: Mapping[str, np.ndarray]) -> tuple[dict[str, Tensor], bool]:
        arrays = {name: np.asarray(array, dtype=np.float32) for name, array in observation.items()}
        shapes = {name: space.shape or () for name, space in self.observation_space.items()}
        extra = {array.ndim - len(shapes.get(name, ())) for name, array in arrays.items()}
        fits = all(
            array.shape[-len(shapes[name]) :] == shapes[name]
            for name, array in arrays.items()
            if name in shapes
        )
        if arrays.keys() != shapes.keys() or not fits or extra not in ({0}, {1}):
            got = {name: array.shape for name, array in arrays.items()}
            raise OptionError(
                f"observation has shapes {got}, expected {shapes}, or each with a batch in front"
            )
        device = next(self._actor.parameters()).device
        tensors = {
            name: torch.as_tensor(array.reshape(-1, *shapes[name]), device=device)
            for name, array in arrays.items()
        }
        return tensors, extra == {1}


class GaussianActor(nn.Module):
    """Mean and logarithm of the standard deviation of actions, before they are clipped or squashed.

    Args:
        description: What ``policy.json`` holds.
    """

    def __init__(self, description: SomeOptions) -> None:
        super().__init__()
        architecture, shapes = description["architecture"], description["observation_space"]
        self.shape = tuple(description["action_space"]["shape"])
        channels, height, width = image_shape(self.shape)
        self.architecture = dict(architecture)
        self.distribution = architecture["distribution"]
        if self.distribution not in POSTPROCESSING:
            raise ValueError(
                f"distribution is {self.distribution!r}, expected one of {tuple(POSTPROCESSING)}"
            )
        self.observation_space = gymnasium.spaces.Dict(
            {
                name: gymnasium.spaces.Box(-np.inf, np.inf, tuple(shape), np.float32)
                for name, shape in shapes.items()
            }
        )
        features = architecture["width"]
        self.encoder = LatentEncoder(
            self.observation_space, (height, width), features, architecture["blocks"]
        )
        self.mean = ActionHead(features, channels)
        self.log_std = nn.Parameter(torch.zeros(channels * height * width))
        self.log_std_net = (
            ActionHead(features, channels) if architecture["state_dependent_std"] else None
        )
        low, high = architecture["log_std_range"] or (-math.inf, math.inf)
        self.log_std_range = float(low), float(high)

    def forward(self, observations: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Both of shape ``(n, dims)``."""
        features = self.encoder(observations)
        mean: Tensor = self.mean(features)
        log_std = self.log_std.expand_as(mean)
        if self.log_std_net is not None:
            log_std = log_std + self.log_std_net(features)
        return mean, log_std.clamp(*self.log_std_range)
