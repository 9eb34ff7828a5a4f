"""A small classifier of the embedded checkpoint's concepts, to ask whether a picture still shows
its subject.

It is trained on renderings of the emoji only, never on samples of a diffusion model.

>>> from recipes.embedded_checkpoint.classifier import load  # doctest: +SKIP
>>> classifier = load()  # doctest: +SKIP
>>> classifier.names[classifier(images).argmax(-1)[0]]  # doctest: +SKIP
'cat'
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

FOLDER = Path(__file__).parent
WIDTHS = (32, 64, 96, 128, 160)


class Classifier(nn.Module):
    """Convolutional classifier of 64 x 64 pictures.

    Args:
        names: Class names, in the order of the logits.
    """

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = list(names)
        layers: list[nn.Module] = []
        channels = 3
        for i, width in enumerate(WIDTHS):
            layers += [
                nn.Conv2d(channels, width, 3, stride=1 if i == len(WIDTHS) - 1 else 2, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.squeeze = nn.Conv2d(channels, 32, 1)
        self.head = nn.Linear(32 * 4 * 4, len(self.names))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of pictures.

        Args:
            images: Pictures in [0, 1], shape ``(n, 3, 64, 64)``; other sizes are resized.

        Returns:
            Logits, shape ``(n, len(names))``.
        """
        if images.shape[-2:] != (64, 64):
            images = functional.interpolate(images, size=(64, 64), mode="area")
        hidden = functional.silu(self.squeeze(self.features(images * 2 - 1)))
        return self.head(hidden.flatten(1))


def load(folder: Path | str = FOLDER, device: torch.device | str = "cpu") -> Classifier:
    """Load the trained classifier, in float32 and evaluation mode.

    Args:
        folder: Holds ``model.safetensors`` and ``classes.json``.
        device: Where to put it.
    """
    folder = Path(folder)
    model = Classifier(json.loads((folder / "classes.json").read_text(encoding="utf-8")))
    weights = {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(weights)
    return model.to(device).eval()
