"""Make the embedded CLIP: data, training, measurements, model card.

Every stage leaves its result in the work folder and is skipped when that is there; training that
was interrupted goes on from its last checkpoint. The renderings are those of the embedded
checkpoint's recipe.
"""

import argparse
import json
import os
import platform
import shutil
from pathlib import Path
from string import Template

import torch
from transformers import CLIPTokenizer

from flowgym_gym.models.stable_diffusion import EMBEDDED
from flowgym_gym.rewards.clip import CLIP
from recipes.embedded_checkpoint import classifier, render
from recipes.embedded_checkpoint.__main__ import (
    HELD_OUT_PER_CONCEPT,
    cached,
    load_pipeline,
    report,
    stage_data,
)
from recipes.embedded_checkpoint.card import LICENSE_FILE
from recipes.embedded_checkpoint.concepts import COLORS, CONCEPTS
from recipes.embedded_clip import measure
from recipes.embedded_clip import model as clip

MINUTES, CONCEPTS_PER_BATCH = 35.0, 48
CARD = Path(__file__).with_name("model_card.md")


def stage_training(args: argparse.Namespace, data: dict) -> dict:
    """Train the model and export it to ``finished/clip``."""

    def make() -> dict:
        # Training a tokenizer again numbers its tokens otherwise, so a run that resumes needs one
        # that is written down.
        tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tiny" / "tokenizer")
        model, outcome = clip.train_clip(
            data, tokenizer, args.work, args.minutes, args.concepts, args.device
        )
        clip.export(model.cpu(), tokenizer, args.work / "finished" / "clip")
        return report(outcome, 2 * args.concepts)

    return cached(args.work / "clip.json", make)


def stage_measurements(args: argparse.Namespace, folder: Path) -> dict:
    """Measure the exported model on held-out renderings and on samples of the embedded
    checkpoint.
    """

    def make() -> dict:
        model = CLIP(str(folder), local=True)
        held_out = render.dataset(render.find_font(args.font), HELD_OUT_PER_CONCEPT, seed=1)
        renderings = measure.measure_renderings(model, held_out)
        print({key: value for key, value in renderings.items() if key != "weakest"}, flush=True)
        pipeline = load_pipeline(EMBEDDED / "tiny", "cpu")
        samples = measure.measure_samples(model, pipeline, classifier.load())
        print(samples, flush=True)
        return {"renderings": renderings, "samples": samples}

    return cached(args.work / "quality.json", make)


def write_card(args: argparse.Namespace, training: dict, quality: dict, renderings: int) -> None:
    """Write the model card from what was measured."""
    parameters, megabytes = measure.size(args.out)
    held_out, samples = quality["renderings"], quality["samples"]
    percentages = (
        "top1",
        "top5",
        "top1_disturbed",
        "probability",
        "probability_disturbed",
        "background",
    )
    weakest = [f"{name} ({right:.0%})" for name, right in list(held_out["weakest"].items())[:12]]
    card = Template(CARD.read_text(encoding="utf-8")).substitute(
        megabytes=f"{megabytes:.1f}",
        parameters=f"{parameters / 1e6:.2f} M",
        concept_count=len(CONCEPTS),
        color_count=len(COLORS),
        renderings=f"{renderings:,}",
        vision_layers=clip.VISION_LAYERS,
        vision_width=clip.VISION_WIDTH,
        patch_size=clip.PATCH_SIZE,
        text_layers=clip.TEXT_LAYERS,
        text_width=clip.TEXT_WIDTH,
        projection=clip.PROJECTION,
        machine=args.machine,
        steps=f"{training['steps']:,}",
        batch=training["batch"],
        minutes=f"{training['minutes']:.0f}",
        held_out=f"{held_out['pictures']:,}",
        samples=samples["samples"],
        sample_top1=f"{samples['top1']:.1%}",
        sample_probability=f"{samples['probability']:.1%}",
        agreement=f"{samples['agreement']:.1%}",
        weakest=", ".join(weakest) or "none",
        **{name: f"{held_out[name]:.2%}" for name in percentages},
    )
    (args.out / "README.md").write_text(card, encoding="utf-8")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.embedded_clip", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for data, checkpoints and measurements"
    )
    parser.add_argument("--font", help="NotoColorEmoji.ttf, or noto-emoji's folder png/128")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--machine", default="", help="the machine in words, for the card")
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="training time")
    parser.add_argument(
        "--concepts",
        type=int,
        default=CONCEPTS_PER_BATCH,
        help="concepts in a batch, two pictures each",
    )
    args = parser.parse_args()
    if not args.machine:
        on_gpu = args.device.startswith("cuda")
        args.machine = (
            torch.cuda.get_device_name()
            if on_gpu
            else f"{args.threads} CPU threads ({platform.machine()})"
        )
    return args


def main() -> None:
    """Run all stages."""
    args = parse()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    render.find_font(args.font)
    data = stage_data(args)
    training = stage_training(args, data)
    finished = args.work / "finished" / "clip"
    quality = stage_measurements(args, finished)
    args.out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(finished, args.out, dirs_exist_ok=True)
    shutil.copyfile(EMBEDDED / "tiny" / LICENSE_FILE, args.out / LICENSE_FILE)
    (args.out / "quality.json").write_text(json.dumps(quality, indent=2) + "\n", encoding="utf-8")
    write_card(args, training, quality, len(data["images"]))


if __name__ == "__main__":
    main()
