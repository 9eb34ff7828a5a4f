"""What the trained CLIP says of pictures it has not seen: renderings with new shifts and sizes, and
samples.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from recipes.embedded_checkpoint.classifier import Classifier
from recipes.embedded_checkpoint.concepts import COLORS, CONCEPTS, EVALUATION_TEMPLATE
from recipes.embedded_checkpoint.evaluate import sample
from recipes.embedded_checkpoint.judge import as_unit, disturb, logits_of, top_k_accuracy

SAMPLES_SEED = 9000


@torch.no_grad()
def logits(clip: Any, pictures: Tensor, texts: list[str]) -> Tensor:
    """CLIP's logits of pictures ``(n, 3, 64, 64)`` against texts, shape ``(n, len(texts))``."""
    captions = clip.embed_texts(texts, pictures.device)
    return torch.cat(
        [clip.logit_scale * clip.embed_images(part) @ captions.T for part in pictures.split(256)]
    )


def measure_renderings(clip: Any, data: dict[str, np.ndarray]) -> dict[str, Any]:
    """Accuracy among all concepts, and among all backgrounds of the right concept.

    Args:
        clip: The model, as :class:`flowgym_gym.rewards.clip.CLIP` opens it.
        data: Renderings that nothing was trained on.
    """
    pictures, labels = as_unit(data["images"], "cpu"), data["concept"]
    disturbed = torch.cat(
        [disturb(part, np.random.default_rng((12, i))) for i, part in enumerate(pictures.split(64))]
    )
    texts = [EVALUATION_TEMPLATE.format(name) for name in CONCEPTS]
    plain, rough = logits(clip, pictures, texts), logits(clip, disturbed, texts)
    right = torch.from_numpy(labels)[:, None]
    backgrounds = []
    for index, name in enumerate(CONCEPTS):
        rows = labels == index
        named = [f"{EVALUATION_TEMPLATE.format(name)} on a {color} background" for color in COLORS]
        backgrounds.append(
            logits(clip, pictures[rows], named).argmax(-1).numpy() == data["color"][rows]
        )
    return {
        "pictures": len(pictures),
        "top1": top_k_accuracy(plain, labels, 1),
        "top5": top_k_accuracy(plain, labels, 5),
        "probability": plain.softmax(-1).gather(1, right).mean().item(),
        "top1_disturbed": top_k_accuracy(rough, labels, 1),
        "probability_disturbed": rough.softmax(-1).gather(1, right).mean().item(),
        "background": float(np.concatenate(backgrounds).mean()),
        "weakest": weakest(plain.argmax(-1).numpy() == labels, labels),
    }


def weakest(right: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy of the concepts that are not always recognised."""
    by_concept = {name: float(right[labels == i].mean()) for i, name in enumerate(CONCEPTS)}
    return dict(
        sorted((entry for entry in by_concept.items() if entry[1] < 1), key=lambda entry: entry[1])
    )


def measure_samples(
    clip: Any, pipeline: StableDiffusionPipeline, judge: Classifier
) -> dict[str, float]:
    """One sample of the embedded checkpoint for each concept, at guidance 1 and eta 1."""
    texts = [EVALUATION_TEMPLATE.format(name) for name in CONCEPTS]
    pictures = sample(pipeline, texts, guidance=1.0, eta=1.0, seed=SAMPLES_SEED)
    found = logits(clip, as_unit(pictures, "cpu"), texts)
    labels = np.arange(len(texts))
    return {
        "samples": len(texts),
        "top1": top_k_accuracy(found, labels, 1),
        "probability": found.softmax(-1).diagonal().mean().item(),
        "agreement": float(
            (found.argmax(-1) == logits_of(judge, pictures, "cpu").argmax(-1)).float().mean()
        ),
    }


def size(folder: Path) -> tuple[int, float]:
    """Number of parameters and megabytes of a model's weights."""
    from safetensors.torch import load_file

    file = folder / "model.safetensors"
    return sum(tensor.numel() for tensor in load_file(file).values()), file.stat().st_size / 1e6
