"""The last stage: licence, lists and model card beside the checkpoint."""

import json
import math
import re
from pathlib import Path
from string import Template

from safetensors import safe_open

from recipes.embedded_checkpoint.concepts import COLORS, CONCEPTS

COPYRIGHT_FILE = Path("/usr/share/doc/fonts-noto-color-emoji/copyright")
LICENSE_FILE = "LICENSE-font.txt"
TEMPLATE_FILE = Path(__file__).with_name("model_card.md")

_LICENSE_HEAD = """\
The embedded checkpoint was trained on pictures rendered from the font Noto Color Emoji
(https://github.com/googlefonts/noto-emoji), Copyright 2013-2017 Google Inc.

The font is licensed under the SIL Open Font License, Version 1.1, which follows. The emoji
artwork and the other files of the noto-emoji project are licensed under the Apache License,
Version 2.0 (https://www.apache.org/licenses/LICENSE-2.0).

"""


def write_license(folder: Path) -> None:
    """Write the font's licence from the Debian package's copyright file, unless the folder has it
    already.

    Raises:
        FileNotFoundError: If neither is there.
    """
    target = folder / LICENSE_FILE
    if target.exists():
        return
    if not COPYRIGHT_FILE.exists():
        raise FileNotFoundError(
            f"{COPYRIGHT_FILE} not found; install fonts-noto-color-emoji or put the font's licence "
            f"at {target}"
        )
    text = COPYRIGHT_FILE.read_text(encoding="utf-8")
    license_text = re.split(r"^License:\s*SIL-1\.1\n", text, flags=re.MULTILINE)[-1].split(
        "\nFiles:"
    )[0]
    lines = [re.sub(r"^ \.?", "", line) for line in license_text.splitlines()]
    target.write_text(_LICENSE_HEAD + "\n".join(lines).strip() + "\n", encoding="utf-8")


def write_lists(folder: Path) -> None:
    """Write ``concepts.txt`` (one name a line) and ``colors.json`` (name to sRGB) beside the
    checkpoint.
    """
    (folder / "concepts.txt").write_text("\n".join(CONCEPTS) + "\n", encoding="utf-8")
    entries = ",\n".join(f'  "{name}": {json.dumps(list(rgb))}' for name, rgb in COLORS.items())
    (folder / "colors.json").write_text("{\n" + entries + "\n}\n", encoding="utf-8")


def table(rows: list[list[str]]) -> str:
    """Rows of a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def component_sizes(folder: Path) -> list[tuple[str, int, float]]:
    """Name, number of parameters and megabytes of every part's weights."""
    sizes = []
    for path in sorted(folder.glob("*/*.safetensors")):
        with safe_open(path, framework="np") as weights:
            names = list(weights.keys())
            count = sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
        sizes.append((path.parent.name, count, path.stat().st_size / 1e6))
    return sizes


def weakest_colors(by_color: dict[str, float], count: int = 3) -> str:
    """The colours that are right least often, with their figures; those that are always right are
    left out.
    """
    wrong = [(name, value) for name, value in by_color.items() if value < 1]
    ordered = sorted(wrong, key=lambda entry: entry[1])[:count]
    return ", ".join(f"{name} {value:.0%}" for name, value in ordered) or "none below 100%"


def write_card(folder: Path, quality: dict, training: dict) -> None:
    """Write the model card.

    Args:
        folder: The checkpoint's folder; sizes are read from it.
        quality: What ``quality.json`` holds.
        training: Steps, minutes and batch of every stage, the machine, and properties of data and
            model.
    """
    sizes = component_sizes(folder)
    concepts, backgrounds, judge = quality["concepts"], quality["backgrounds"], quality["judge"]
    stages = training["stages"]
    card = Template(TEMPLATE_FILE.read_text(encoding="utf-8")).substitute(
        total_size=f"{sum(size for _, _, size in sizes):.1f}",
        concept_count=len(CONCEPTS),
        color_count=len(COLORS),
        renderings=f"{training['renderings']:,}",
        size_rows=table(
            [[f"`{name}`", f"{count / 1e6:.2f} M", f"{size:.1f} MB"] for name, count, size in sizes]
        ),
        scaling_factor=f"{training['scaling_factor']:.4f}",
        machine=training["machine"],
        total_minutes=f"{sum(stage['minutes'] for stage in stages.values()):.0f}",
        stage_rows=table(
            [
                [name, f"{stage['steps']:,}", str(stage["batch"]), f"{stage['minutes']:.0f}"]
                for name, stage in stages.items()
            ]
        ),
        judge_pictures=f"{judge['pictures']:,}",
        judge_top1=f"{judge['classifier_top1']:.1%}",
        judge_disturbed=f"{judge['classifier_top1_disturbed']:.1%}",
        judge_background=f"{judge['background']:.1%}",
        steps=concepts[0]["steps"],
        samples_per_concept=concepts[0]["samples"] // concepts[0]["prompts"],
        prompts=concepts[0]["prompts"],
        subject_rows=table(
            [
                [f"{e['guidance']:g}", f"{e['eta']:g}", f"{e['top1']:.1%}", f"{e['top5']:.1%}"]
                for e in concepts
            ]
        ),
        background_prompts=backgrounds[0]["samples"] // len(COLORS),
        background_rows=table(
            [
                [
                    f"{e['guidance']:g}",
                    f"{e['eta']:g}",
                    f"{e['accuracy']:.1%}",
                    weakest_colors(e["by_color"]),
                ]
                for e in backgrounds
            ]
        ),
        psnr=f"{quality['psnr']:.1f}",
        reconstructed=f"{quality['reconstructed_top1']:.1%}",
        weakest=", ".join(quality["weakest"]) or "none",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
