"""Make the embedded checkpoint: data, autoencoder, classifier, text encoder and U-Net,
measurements, model card.

Every stage leaves its result in the work folder and is skipped when that is there; a stage that was
interrupted goes on from its last checkpoint. Times are minutes of training per stage; the learning
rates end with them.
"""

import argparse
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from recipes.embedded_checkpoint import (
    autoencoder,
    card,
    classifier,
    denoiser,
    evaluate,
    judge,
    render,
)
from recipes.embedded_checkpoint.concepts import COLORS, CONCEPTS, EVALUATION_TEMPLATE
from recipes.embedded_checkpoint.training import Outcome

RENDERINGS_PER_CONCEPT = 96
HELD_OUT_PER_CONCEPT = 8
DEFAULTS = {
    "cpu": {
        "autoencoder": (15.0, 12),
        "classifier": (5.0, 64),
        "denoiser": (60.0, 32),
        "decoder": (12.0, 12),
    },
    "cuda": {
        "autoencoder": (5.0, 128),
        "classifier": (1.0, 256),
        "denoiser": (15.0, 512),
        "decoder": (4.0, 128),
    },
}
"""Minutes and batch size of each stage, by kind of device."""
MEASURED = ((1.0, 1.0), (3.0, 1.0))
"""Guidance and eta of each measurement."""
SHOWN = (
    "cat dog fox panda frog penguin tree rose apple banana pizza hamburger|"
    "cupcake sun star rainbow fire house car train rocket sailboat guitar balloon|"
    "robot ghost skull crown key camera umbrella snowman red_heart blue_heart soccer_ball gift"
)
"""Concepts on the card's sample sheet, row by row."""


def cached(path: Path, make: Callable[[], dict]) -> dict:
    """What ``make`` gives, kept as JSON."""
    if not path.exists():
        result = make()
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    return json.loads(path.read_text(encoding="utf-8"))


def stage_data(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Render the training set, or load it."""
    path = args.work / "renderings.npz"
    if not path.exists():
        data = render.dataset(render.find_font(args.font), RENDERINGS_PER_CONCEPT, seed=0)
        temporary = path.with_name("renderings.tmp.npz")
        np.savez(temporary, **data)  # type: ignore[arg-type]
        temporary.replace(path)
    with np.load(path) as data:
        return {key: data[key] for key in data.files}


def stage_autoencoder(
    args: argparse.Namespace, data: dict[str, np.ndarray]
) -> tuple[AutoencoderKL, dict, dict]:
    """Train the autoencoder and encode the training set, or load both.

    Returns:
        The autoencoder, the latents of the training set, and the stage's report.
    """
    folder, latents_path = args.work / "vae", args.work / "latents.npz"

    def make() -> dict:
        model, outcome, psnr = autoencoder.train_autoencoder(
            data["images"], args.work, args.autoencoder_minutes, args.autoencoder_batch, args.device
        )
        latents = autoencoder.encode_all(model, data["images"], args.device)
        autoencoder.finish(model, latents, folder)
        np.savez(latents_path, **latents)  # type: ignore[arg-type]
        return report(outcome, args.autoencoder_batch) | {"psnr": psnr}

    result = cached(args.work / "autoencoder.json", make)
    vae = AutoencoderKL.from_pretrained(folder).to(args.device).eval()
    with np.load(latents_path) as latents:
        return vae, {key: latents[key] for key in latents.files}, result


def stage_classifier(
    args: argparse.Namespace, data: dict[str, np.ndarray]
) -> tuple[classifier.Classifier, dict]:
    """Train the classifier and validate the judges on new renderings, or load it."""
    folder = args.work / "classifier"

    def make() -> dict:
        model, outcome = judge.train_classifier(
            data, args.work, args.classifier_minutes, args.classifier_batch, args.device
        )
        judge.save_classifier(model, folder)
        held_out = render.dataset(render.find_font(args.font), HELD_OUT_PER_CONCEPT, seed=1)
        validation = judge.validate(classifier.load(folder, args.device), held_out, args.device)
        return report(outcome, args.classifier_batch) | validation

    result = cached(args.work / "classifier.json", make)
    return classifier.load(folder), result


def stage_denoiser(args: argparse.Namespace, data: dict, latents: dict, vae: AutoencoderKL) -> dict:
    """Train text encoder and U-Net and export the pipeline to ``trained``."""

    def make() -> dict:
        model, tokenizer, outcome = denoiser.train_denoiser(
            data, latents, vae, args.work, args.denoiser_minutes, args.denoiser_batch, args.device
        )
        denoiser.export(vae, tokenizer, model, args.work / "trained")
        return report(outcome, args.denoiser_batch)

    return cached(args.work / "denoiser.json", make)


def stage_decoder(args: argparse.Namespace, data: dict, latents: dict) -> dict:
    """Train the trained pipeline's decoder further and export the result to ``finished``."""

    def make() -> dict:
        pipeline = load_pipeline(args.work / "trained", args.device)
        vae = AutoencoderKL.from_pretrained(args.work / "vae").to(args.device)
        outcome, psnr = autoencoder.sharpen_decoder(
            vae,
            data["images"],
            latents,
            args.work,
            args.decoder_minutes,
            args.decoder_batch,
            args.device,
        )
        model = denoiser.Denoiser(pipeline.text_encoder, pipeline.unet)
        denoiser.export(vae, pipeline.tokenizer, model, args.work / "finished")
        return report(outcome, args.decoder_batch) | {"psnr": psnr}

    return cached(args.work / "decoder.json", make)


def load_pipeline(folder: Path, device: str) -> StableDiffusionPipeline:
    """Open an exported pipeline in float32."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def report(outcome: Outcome, batch: int) -> dict:
    """A stage's outcome as plain values."""
    return asdict(outcome) | {"batch": batch}


def stage_measurements(
    args: argparse.Namespace, pipeline: StableDiffusionPipeline, judged_by: classifier.Classifier
) -> tuple[list[dict], list[dict]]:
    """Measure subjects and backgrounds; each figure is kept as soon as it is there."""
    folder = args.work / "measurements"
    folder.mkdir(exist_ok=True)
    concepts, backgrounds = [], []

    def subjects(guidance: float, eta: float) -> dict:
        figures, pictures, right = evaluate.measure_concepts(
            pipeline, judged_by, guidance=guidance, eta=eta
        )
        np.savez(folder / f"concepts_{guidance:g}_{eta:g}.npz", pictures=pictures, right=right)
        order = np.argsort(right, kind="stable")
        names = list(CONCEPTS)
        return figures | {"by_concept": {names[i]: float(right[i]) for i in order}}

    for guidance, eta in MEASURED:
        name = f"{guidance:g}_{eta:g}.json"
        concepts.append(cached(folder / f"concepts_{name}", partial(subjects, guidance, eta)))
        backgrounds.append(
            cached(
                folder / f"backgrounds_{name}",
                partial(evaluate.measure_backgrounds, pipeline, guidance=guidance, eta=eta),
            )
        )
        top1, right = concepts[-1]["top1"], backgrounds[-1]["accuracy"]
        print(
            f"guidance {guidance:g}, eta {eta:g}: top-1 {top1:.3f}, background {right:.3f}",
            flush=True,
        )
    return concepts, backgrounds


def reconstructions(vae: AutoencoderKL, pictures: np.ndarray, device: str) -> np.ndarray:
    """What the autoencoder makes of pictures ``(n, 64, 64, 3)``."""
    results = []
    with torch.no_grad():
        for start in range(0, len(pictures), 128):
            x = autoencoder.to_tensor(pictures[start : start + 128], device)
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample
            results.append(
                ((y.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            )
    return np.concatenate(results)


def draw_sheets(args: argparse.Namespace, pipeline: StableDiffusionPipeline, data: dict) -> None:
    """Save the card's pictures in the output folder."""
    rows = [[name.replace("_", " ") for name in row.split()] for row in SHOWN.split("|")]
    names = [name for row in rows for name in row]
    prompts = [EVALUATION_TEMPLATE.format(name) for name in names]
    for guidance in (1.0, 3.0):
        pictures = evaluate.sample(pipeline, prompts, guidance=guidance, eta=1.0, seed=0)
        sheet = pictures.reshape(len(rows), -1, *pictures.shape[1:])
        evaluate.grid(sheet, names, args.out / f"samples_guidance{guidance:g}.png")
    subjects = ("cat", "car", "red heart", "penguin")
    prompts = [
        f"a photo of a {name} on a {color} background" for name in subjects for color in COLORS
    ]
    pictures = evaluate.sample(pipeline, prompts, guidance=1.0, eta=1.0, seed=100)
    sheet = pictures.reshape(len(subjects), len(COLORS), *pictures.shape[1:])
    evaluate.grid(sheet, list(COLORS), args.out / "samples_backgrounds.png")
    originals = data["images"][:: RENDERINGS_PER_CONCEPT * 8][:24].reshape(2, 12, 64, 64, 3)
    decoded = reconstructions(pipeline.vae, originals.reshape(-1, 64, 64, 3), args.device).reshape(
        originals.shape
    )
    evaluate.grid(
        np.stack([originals[0], decoded[0], originals[1], decoded[1]]),
        [""] * 12,
        args.out / "reconstructions.png",
    )


def parse() -> argparse.Namespace:
    """Command line, with defaults for the device."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.embedded_checkpoint", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished checkpoint")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for data, checkpoints and measurements"
    )
    parser.add_argument(
        "--classifier-out", type=Path, default=classifier.FOLDER, help="folder of the classifier"
    )
    parser.add_argument("--font", help="NotoColorEmoji.ttf, where it is not in the usual place")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--machine", default="", help="the machine in words, for the card")
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 16))
    for stage in DEFAULTS["cpu"]:
        parser.add_argument(f"--{stage}-minutes", type=float, help="training time of this stage")
        parser.add_argument(f"--{stage}-batch", type=int)
    args = parser.parse_args()
    for stage, (minutes, batch) in DEFAULTS["cpu" if args.device == "cpu" else "cuda"].items():
        for key, value in ((f"{stage}_minutes", minutes), (f"{stage}_batch", batch)):
            if getattr(args, key) is None:
                setattr(args, key, value)
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
    data = stage_data(args)
    vae, latents, autoencoder_report = stage_autoencoder(args, data)
    judged_by, judge_report = stage_classifier(args, data)
    stages = {"autoencoder": autoencoder_report, "classifier": judge_report}
    stages["text encoder and U-Net"] = stage_denoiser(args, data, latents, vae)
    stages["decoder"] = stage_decoder(args, data, latents)

    args.out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(args.work / "finished", args.out, dirs_exist_ok=True)
    shutil.copytree(args.work / "classifier", args.classifier_out, dirs_exist_ok=True)
    card.write_license(args.out)
    card.write_lists(args.out)

    pipeline = load_pipeline(args.out, args.device)
    concepts, backgrounds = stage_measurements(args, pipeline, judged_by)
    draw_sheets(args, pipeline, data)
    held_out = render.dataset(render.find_font(args.font), HELD_OUT_PER_CONCEPT, seed=1)
    decoded = reconstructions(pipeline.vae, held_out["images"], args.device)
    default = concepts[MEASURED.index((1.0, 1.0))]
    quality = {
        "concepts": concepts,
        "backgrounds": backgrounds,
        "judge": {
            key: value
            for key, value in judge_report.items()
            if key not in ("steps", "minutes", "losses", "batch")
        },
        "psnr": stages["decoder"]["psnr"],
        "reconstructed_top1": judge.top_k_accuracy(
            judge.logits_of(judged_by, decoded, "cpu"), held_out["concept"], 1
        ),
        "weakest": [name for name, share in default["by_concept"].items() if share < 1][:10],
    }
    (args.out / "quality.json").write_text(json.dumps(quality, indent=2) + "\n", encoding="utf-8")
    training = {
        "stages": stages,
        "machine": args.machine,
        "renderings": len(data["images"]),
        "scaling_factor": vae.config.scaling_factor,
    }
    card.write_card(args.out, quality, training)


if __name__ == "__main__":
    main()
