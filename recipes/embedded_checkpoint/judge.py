"""Stage 3: the judges of the samples, a classifier of the subject and a colour reader for the
background.

The classifier sees real renderings, blurred and noisy at random so that it looks at shapes and
colours rather than at the sharpness of an edge. It is tested on renderings it has not seen. The
colour reader is a rule: the palette colour nearest to the mean of the border pixels.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from recipes.embedded_checkpoint.classifier import Classifier
from recipes.embedded_checkpoint.concepts import COLORS, CONCEPTS
from recipes.embedded_checkpoint.training import Outcome, train

LEARNING_RATE = 2e-3
BORDER = 2
"""Width of the frame that shows the background, in pixels."""


def as_unit(images: np.ndarray, device: torch.device | str) -> Tensor:
    """Pictures ``(n, 64, 64, 3)`` uint8 to ``(n, 3, 64, 64)`` in [0, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255


def disturb(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur, noise, contrast and a shift of up to one pixel, each at random for the whole batch or
    each picture.
    """
    n = len(x)
    blur = rng.integers(4)
    if blur:
        sigma = (0.6, 1.0, 1.5)[blur - 1]
        offsets = torch.arange(-4, 5, device=x.device, dtype=x.dtype)
        kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, 9)
        x = functional.pad(x, (4, 4, 4, 4), mode="replicate")
        x = functional.conv2d(
            functional.conv2d(x, kernel, groups=3), kernel.transpose(2, 3), groups=3
        )
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    contrast = 1 + 0.1 * (2 * torch.rand(n, 1, 1, 1, generator=generator) - 1)
    noise = (
        0.06
        * torch.rand(n, 1, 1, 1, generator=generator)
        * torch.randn(x.shape, generator=generator)
    )
    x = (x - 0.5) * contrast.to(x.device) + 0.5 + noise.to(x.device)
    dy, dx = rng.integers(-1, 2, size=2)
    return x.roll((int(dy), int(dx)), dims=(2, 3)).clamp(0, 1)


def train_classifier(
    data: dict[str, np.ndarray], work: Path, minutes: float, batch: int, device: torch.device | str
) -> tuple[Classifier, Outcome]:
    """Train the classifier on the renderings of ``data``."""
    torch.manual_seed(2)
    model = Classifier(list(CONCEPTS)).to(device)
    images, labels = data["images"], torch.from_numpy(data["concept"]).to(device)

    def losses(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((2, step))
        rows = rng.integers(len(images), size=batch)
        logits = model(disturb(as_unit(images[rows], device), rng))
        target = labels[torch.from_numpy(rows).to(device)]
        accuracy = (logits.argmax(-1) == target).float().mean()
        return {
            "loss": functional.cross_entropy(logits, target, label_smoothing=0.05),
            "accuracy": accuracy,
        }

    outcome = train(
        "classifier",
        model,
        losses,
        minutes=minutes,
        learning_rate=LEARNING_RATE,
        weight_decay=1e-3,
        checkpoint=work / "classifier.pt",
        ema_decay=0.99,
    )
    return model, outcome


def save_classifier(model: Classifier, folder: Path) -> None:
    """Write weights (float16) and class names."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        key: value.detach().half().cpu().contiguous() for key, value in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "classes.json").write_text(json.dumps(model.names, indent=0) + "\n", encoding="utf-8")


@torch.no_grad()
def logits_of(model: Classifier, images: np.ndarray, device: torch.device | str) -> Tensor:
    """Logits of uint8 pictures ``(n, 64, 64, 3)``, on the CPU."""
    return torch.cat(
        [model(as_unit(images[i : i + 256], device)).cpu() for i in range(0, len(images), 256)]
    )


def top_k_accuracy(logits: Tensor, labels: np.ndarray, k: int) -> float:
    """Share of rows whose label is among the ``k`` largest logits."""
    best = logits.topk(k, dim=-1).indices
    return (best == torch.from_numpy(labels)[:, None]).any(-1).float().mean().item()


def background_colors(images: np.ndarray) -> np.ndarray:
    """Index of the palette colour nearest to the mean of the border pixels, shape ``(n,)``."""
    frame = np.ones(images.shape[1:3], dtype=bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    border = images[:, frame].astype(np.float32).mean(axis=1)
    palette = np.array(list(COLORS.values()), dtype=np.float32)
    return np.square(border[:, None] - palette[None]).sum(-1).argmin(-1)


def validate(
    model: Classifier, held_out: dict[str, np.ndarray], device: torch.device | str
) -> dict[str, float]:
    """Accuracy of both judges on renderings that nothing was trained on."""
    images, labels = held_out["images"], held_out["concept"]
    disturbed = np.concatenate(
        [
            disturb(as_unit(images[i : i + 64], device), np.random.default_rng((3, i)))
            .mul(255)
            .round()
            .byte()
            .permute(0, 2, 3, 1)
            .cpu()
            .numpy()
            for i in range(0, len(images), 64)
        ]
    )
    logits = logits_of(model, images, device)
    return {
        "classifier_top1": top_k_accuracy(logits, labels, 1),
        "classifier_top5": top_k_accuracy(logits, labels, 5),
        "classifier_top1_disturbed": top_k_accuracy(logits_of(model, disturbed, device), labels, 1),
        "background": float((background_colors(images) == held_out["color"]).mean()),
        "pictures": len(images),
    }
