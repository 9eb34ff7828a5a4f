"""The interface of a reward function, and what rewards of images and prompts check of their
input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic

import numpy as np
import torch
from torch import Tensor

from flowgym_gym.errors import RewardError, shown
from flowgym_gym.types import D, FlowTensor, oddity


class Reward(ABC, Generic[D]):
    """Scores finished samples.

    A subclass defines ``forward``; users call the instance, which checks what comes back.

    Attributes:
        value_range: Smallest and largest reward there can be.
        units: What a reward of 1 means.
        differentiable: Whether gradients reach the samples.
        stateful: Whether rewards depend on earlier ones. Environments share an instance of a reward
            unless it is stateful, and a training run's checkpoints hold what ``get_state`` returns.
        incidental: Names of constructor arguments that change no reward but by rounding: a state of
            an environment belongs to others that differ in these.
    """

    value_range: tuple[float, float] = (-float("inf"), float("inf"))
    units: str = ""
    differentiable: bool = False
    stateful: bool = False
    incidental: ClassVar[tuple[str, ...]] = ("device", "batch_size")

    @abstractmethod
    def forward(self, x: D, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Score a batch.

        Args:
            x: Samples, batch first; images are ``(n, 3, H, W)`` in [0, 1].
            **kwargs: The episode's keyword arguments, such as ``prompt``, a list of ``n`` strings.

        Returns:
            Rewards and whether each sample is valid (0 or 1, or bool), both of shape ``(n,)``.
        """

    def get_state(self) -> dict[str, np.ndarray]:
        """What the reward remembers of the samples it has scored, as arrays; nothing unless it is
        stateful.
        """
        return {}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what :meth:`get_state` returned."""

    def freeze(self) -> None:
        """Remember nothing more from now on, so that samples are compared by one measure."""

    def __call__(self, x: D, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Score a batch and check the result.

        Returns:
            Rewards, float (whole numbers become float64), and validity, bool, both of shape
            ``(n,)``.

        Raises:
            RewardError: If ``forward`` returns something else, NaN for a sample, or a validity
                other than 0 and 1.
        """
        name = type(self).__name__
        result = self.forward(x, **kwargs)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise RewardError(
                f"{name}.forward returned {type(result).__name__}, expected (rewards, valids)"
            )
        for values, label in zip(result, ("rewards", "valids"), strict=True):
            if not isinstance(values, Tensor) or values.shape != (len(x),):
                got = (
                    f"shape {tuple(values.shape)}"
                    if isinstance(values, Tensor)
                    else type(values).__name__
                )
                raise RewardError(
                    f"{name}.forward returned {label} of {got}, expected a tensor of shape "
                    f"({len(x)},)"
                )
            odd = oddity(values)
            if odd:
                raise RewardError(
                    f"{name}.forward returned {label} as {odd}, expected real numbers"
                )
        rewards, valids = result
        if not rewards.is_floating_point():
            rewards = rewards.to(torch.float64)
        bad = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
        if bad:
            raise RewardError(
                f"{name}.forward returned {rewards[bad[0]].item()} for sample {bad[0]} of {len(x)}",
                sample=bad[0],
            )
        unclear = ((valids != 0) & (valids != 1)).nonzero().flatten().tolist()
        if unclear:
            raise RewardError(
                f"{name}.forward returned valids of {valids[unclear[0]].item()} for sample "
                f"{unclear[0]} of {len(x)}, expected 0 or 1, or bool",
                sample=unclear[0],
            )
        return rewards, valids.detach().to(torch.bool)


def all_valid(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards of samples that are all valid, as ``forward`` returns them."""
    return rewards, torch.ones_like(rewards, dtype=torch.bool)


def as_images(name: str, x: FlowTensor, tolerance: float = 1e-3) -> Tensor:
    """The pixels of a batch of images, shape ``(n, 3, H, W)``, float32 or better, clipped to [0,
    1].

    Args:
        name: The reward's name, for the message.
        x: The samples.
        tolerance: How far outside [0, 1] rounding may have put a pixel.

    Raises:
        RewardError: If they are no images with three channels, or one has a pixel outside [0, 1] or
            NaN.
    """
    images: Tensor = x.data
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise RewardError(
            f"{name} got {images.dtype} samples of shape {tuple(images.shape[1:])}, expected float "
            "images (3, H, W)"
        )
    if images.dtype in (torch.float16, torch.bfloat16):
        images = images.float()
    flat = images.detach().flatten(1)
    # Written so that NaN counts as outside.
    outside = ~((flat >= -tolerance) & (flat <= 1 + tolerance)).all(dim=1)
    if outside.any():
        i = int(outside.nonzero()[0])
        low, high = flat[i].min().item(), flat[i].max().item()
        raise RewardError(
            f"{name} got image {i} with pixels from {low:.4g} to {high:.4g}, expected [0, 1]; "
            "scale or clip them in the model's postprocess",
            sample=i,
        )
    return images.clamp(0, 1)


def as_prompts(name: str, n: int, kwargs: Mapping[str, Any]) -> list[str]:
    """The prompts of ``n`` samples.

    Raises:
        RewardError: If there is none, or not one for each sample.
    """
    prompts = kwargs.get("prompt")
    if isinstance(prompts, str):
        prompts = [prompts] * n
    if prompts is None:
        raise RewardError(
            f"{name} needs the prompt of each sample, but the base model gives none; use a model "
            "with prompts, such as 'images/stable_diffusion', or pass prompt="
        )
    if (
        not isinstance(prompts, list | tuple)
        or len(prompts) != n
        or not all(isinstance(prompt, str) for prompt in prompts)
    ):
        raise RewardError(f"{name} got prompt={shown(prompts)}, expected a list of {n} strings")
    return list(prompts)
