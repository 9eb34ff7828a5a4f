"""Rewards trained on human preferences that come with packages of their own: ImageReward and HPSv2.

Both score 8-bit pictures through their package, one prompt at a time, and give no gradients. Their checkpoints are
pickles; while they are read, torch is told to accept tensors and plain values only.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flowgym_gym.errors import CheckpointError, MissingExtraError
from flowgym_gym.rewards.base import Reward, all_valid
from flowgym_gym.rewards.clip import prompted_images
from flowgym_gym.rewards.weights import find_file, loading
from flowgym_gym.types import FlowTensor


class PackageReward(Reward[FlowTensor]):
    """A reward that a package computes; subclasses define ``score_pictures``."""

    def score_pictures(self, pictures: list[Any], prompt: str) -> list[float]:
        """Scores of Pillow images that share a prompt."""
        raise NotImplementedError(f"{type(self).__name__} does not define score_pictures")

    def forward(self, x: FlowTensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Score images of shape ``(n, 3, H, W)`` in [0, 1] by ``prompt``; see :class:`Reward`."""
        from PIL import Image

        images, prompts = prompted_images(type(self).__name__, x, kwargs)
        levels = (255 * images.detach()).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        rewards = torch.zeros(len(images), dtype=images.dtype)
        for prompt in dict.fromkeys(prompts):
            rows = [i for i, other in enumerate(prompts) if other == prompt]
            scores = self.score_pictures([Image.fromarray(levels[i]) for i in rows], prompt)
            rewards[rows] = torch.tensor(scores, dtype=images.dtype)
        return all_valid(rewards.to(images.device))


class ImageRewardReward(PackageReward):
    """ImageReward: a BLIP model trained on rankings; standardised, so that most pictures score between -2 and 2.

    Args:
        weights: ``"ImageReward-v1.0"``, which the package brings from the Hub, or a local ``ImageReward.pt``.
        med_config: The local ``med_config.json`` that goes with local weights.
        device: Where the package runs it.

    Raises:
        MissingExtraError: If the package ``image-reward`` is missing.

    References:
        Xu et al., ImageReward, NeurIPS 2023.
    """

    units = "standard deviations of ImageReward's own scores"
    PUBLISHED = "ImageReward-v1.0"

    def __init__(self, weights: str | None = None, med_config: str | None = None, device: str = "cpu") -> None:
        name = "images/image_reward"
        package = import_extra("ImageReward", "image-reward", name)
        if weights != self.PUBLISHED:
            weights = str(find_file("weights", weights, name, self.PUBLISHED))
            if med_config is None or not Path(med_config).expanduser().is_file():
                raise CheckpointError(
                    f"med_config is {med_config!r}, expected the local med_config.json that goes with {weights!r}"
                )
        with loading(weights), only_tensors():
            self.model = package.load(weights, device=device, med_config=med_config)

    def score_pictures(self, pictures: list[Any], prompt: str) -> list[float]:
        """See :class:`PackageReward`."""
        with torch.inference_mode(False), torch.no_grad():
            return [float(self.model.score(prompt, picture)) for picture in pictures]


class HPSv2Reward(PackageReward):
    """Human Preference Score v2: the cosine of a CLIP ViT-H/14 trained on choices, about 0.2 to 0.35.

    Args:
        weights: ``"v2.0"`` or ``"v2.1"``, which the package brings from the Hub, or a local checkpoint file. The
            package also brings the CLIP that it starts from.

    Raises:
        MissingExtraError: If the package ``hpsv2`` is missing.

    References:
        Wu et al., Human Preference Score v2, 2023.
    """

    value_range = (-1.0, 1.0)
    units = "cosine of HPSv2's embeddings"
    VERSIONS = ("v2.0", "v2.1")

    def __init__(self, weights: str | None = None) -> None:
        name = "images/hpsv2"
        self.package = import_extra("hpsv2.img_score", "hpsv2", name)
        if weights in self.VERSIONS:
            self.options: dict[str, Any] = {"hps_version": weights}
        else:
            self.options = {"cp": str(find_file("weights", weights, name, "v2.1"))}

    def score_pictures(self, pictures: list[Any], prompt: str) -> list[float]:
        """See :class:`PackageReward`."""
        with torch.inference_mode(False), torch.no_grad(), only_tensors():
            return [float(score) for score in self.package.score(pictures, prompt, **self.options)]


def import_extra(module: str, package: str, reward: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: What to import.
        package: Its name for pip.
        reward: The reward that needs it, for the message.

    Raises:
        MissingExtraError: If it is not installed, or fails to import.
    """
    top = module.partition(".")[0]
    try:
        importlib.import_module(top)
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == top:
            raise MissingExtraError(
                f"{reward} needs the package {package!r}, which is not installed: pip install 'flowgym_gym[{package}]'"
            ) from error
        raise _broken(package, reward, error) from error
    except Exception as error:
        raise _broken(package, reward, error) from error


@contextmanager
def only_tensors() -> Iterator[None]:
    """Make ``torch.load`` refuse pickles that hold more than tensors and plain values, whatever the caller asks for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _broken(package: str, reward: str, error: Exception) -> MissingExtraError:
    return MissingExtraError(
        f"{reward} needs the package {package!r}, which is installed but cannot be imported "
        f"({type(error).__name__}: {error}); it may need other versions of its dependencies than are installed here"
    )
