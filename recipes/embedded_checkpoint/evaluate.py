"""Stage 4: what the judges say about samples of the finished pipeline.

For every concept, "a photo of a <concept>" is sampled from several seeds with DDIM and judged by
the classifier. For backgrounds, every colour is named with many different concepts. The measurement
is the same whatever the model is.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from recipes.embedded_checkpoint.classifier import Classifier
from recipes.embedded_checkpoint.concepts import COLORS, CONCEPTS, EVALUATION_TEMPLATE
from recipes.embedded_checkpoint.judge import background_colors, logits_of, top_k_accuracy

STEPS = 50
SAMPLES_PER_CONCEPT = 4
BACKGROUND_PROMPTS_PER_COLOR = 20


def sample(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    guidance: float,
    eta: float,
    seed: int,
    steps: int = STEPS,
    batch: int = 64,
) -> np.ndarray:
    """Draw one picture for each prompt, picture ``i`` from the seed ``seed + i``.

    Returns:
        Pictures, uint8, shape ``(len(prompts), 64, 64, 3)``.
    """
    pictures = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        with torch.no_grad():
            images = pipeline(
                part,
                num_inference_steps=steps,
                guidance_scale=guidance,
                eta=eta,
                generator=generators,
                output_type="np",
            ).images
        pictures.append((images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def measure_concepts(
    pipeline: StableDiffusionPipeline,
    classifier: Classifier,
    *,
    guidance: float,
    eta: float,
    seed: int = 1000,
    samples: int = SAMPLES_PER_CONCEPT,
    every: int = 1,
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Share of samples whose subject the classifier names.

    Args:
        pipeline: The model.
        classifier: The judge.
        guidance: Classifier-free guidance scale.
        eta: DDIM's noise level.
        seed: Seed of the first sample.
        samples: Samples for each concept.
        every: Only every n-th concept, for a quick look.

    Returns:
        The figures, the pictures, and for each concept the share of its samples that were
        recognised.
    """
    names = list(CONCEPTS)[::every]
    labels = np.tile(np.arange(len(CONCEPTS))[::every], samples)
    prompts = [EVALUATION_TEMPLATE.format(name) for name in names] * samples
    pictures = sample(pipeline, prompts, guidance=guidance, eta=eta, seed=seed)
    logits = logits_of(classifier, pictures, "cpu")
    figures = {
        "guidance": guidance,
        "eta": eta,
        "steps": STEPS,
        "prompts": len(names),
        "samples": len(prompts),
        "top1": top_k_accuracy(logits, labels, 1),
        "top5": top_k_accuracy(logits, labels, 5),
    }
    right = (logits.argmax(-1).numpy() == labels).reshape(samples, len(names)).mean(axis=0)
    return figures, pictures, right


def measure_backgrounds(
    pipeline: StableDiffusionPipeline, *, guidance: float, eta: float, seed: int = 5000
) -> dict[str, float | dict[str, float]]:
    """Share of samples whose border has the background colour that the prompt names, overall and by
    colour.
    """
    rng = np.random.default_rng(seed)
    names, colors = list(CONCEPTS), list(COLORS)
    labels = np.repeat(np.arange(len(colors)), BACKGROUND_PROMPTS_PER_COLOR)
    chosen = np.concatenate(
        [
            rng.choice(len(names), BACKGROUND_PROMPTS_PER_COLOR, replace=False)
            for _ in range(len(colors))
        ]
    )
    prompts = [
        f"{EVALUATION_TEMPLATE.format(names[concept])} on a {colors[label]} background"
        for concept, label in zip(chosen, labels, strict=True)
    ]
    found = background_colors(sample(pipeline, prompts, guidance=guidance, eta=eta, seed=seed))
    by_color = {name: float((found[labels == i] == i).mean()) for i, name in enumerate(colors)}
    return {
        "guidance": guidance,
        "eta": eta,
        "steps": STEPS,
        "samples": len(prompts),
        "accuracy": float((found == labels).mean()),
        "by_color": by_color,
    }


def grid(pictures: np.ndarray, titles: Sequence[str], path: Path, *, scale: int = 2) -> None:
    """Save pictures as a sheet.

    Args:
        pictures: Shape ``(rows, columns, 64, 64, 3)``, uint8.
        titles: One for each column, or one for each picture, row by row.
        path: PNG file.
        scale: Integer enlargement.
    """
    rows, columns, height, width = pictures.shape[:4]
    cell, gap, band = width * scale, 4, 14
    per_picture = len(titles) == rows * columns and rows > 1
    row_height = height * scale + gap + (band if per_picture else 0)
    sheet = Image.new(
        "RGB", (columns * (cell + gap), rows * row_height + (0 if per_picture else band)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for row in range(rows):
        for column in range(columns):
            left, top = column * (cell + gap), row * row_height + band
            picture = Image.fromarray(pictures[row, column])
            sheet.paste(
                picture.resize((cell, height * scale), Image.Resampling.BICUBIC), (left, top)
            )
            if per_picture:
                draw.text(
                    (left, top - band), titles[row * columns + column][: cell // 6], fill="black"
                )
            elif row == 0:
                draw.text((left, 0), titles[column][: cell // 6], fill="black")
    sheet.save(path, optimize=True)
