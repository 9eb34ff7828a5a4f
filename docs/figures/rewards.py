"""Makes the picture of ``docs/rewards.md``: ``python docs/figures/rewards.py`` (two minutes on a
CPU).

256 samples of the embedded checkpoint, "a photo of a ..." of each thing that it draws, and under
each offline reward the best and the worst of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import flowgym_gym
from flowgym_gym import FlowTensor
from flowgym_gym.prompts import read_prompts
from flowgym_gym.rewards.loading import load_reward

TARGET = Path(__file__).parents[1] / "images" / "rewards.png"
REWARDS = {
    "images/red": {},
    "images/redness": {},
    "images/brightness": {},
    "images/colorfulness": {},
    "images/sharpness": {},
    "images/symmetry": {},
    "images/compression": {},
    "images/incompression": {"units": "kilobytes"},
    "images/alignment": {},
}
SHOWN, BATCH = 6, 32


def draw_samples(prompts: list[str]) -> torch.Tensor:
    """One picture for each prompt, shape ``(n, 3, H, W)``, from the default episode of 50 steps."""
    env = flowgym_gym.make("images/stable_diffusion", "images/red")
    torch.manual_seed(0)
    parts = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
    return torch.cat([env.sample(len(part), prompt=part).sample.data for part in parts])


def main() -> None:
    """Sample, score, and draw; prints mean, spread and range of each reward."""
    prompts = read_prompts("set:concepts-train") + read_prompts("set:concepts-held-out")
    images = draw_samples(prompts)
    pictures = (255 * images).round().byte().permute(0, 2, 3, 1).numpy()
    figure = Figure(figsize=(13.5, 1.32 * len(REWARDS)), layout="constrained")
    rows = figure.subfigures(len(REWARDS), 1)
    for row, (id, kwargs) in zip(rows, REWARDS.items(), strict=True):
        reward = load_reward(id, **kwargs)
        scores = reward(FlowTensor(images), prompt=prompts)[0].numpy()
        print(
            f"{id:22} mean {scores.mean():9.4g}  std {scores.std(ddof=1):8.3g}  from "
            f"{scores.min():.3g} to {scores.max():.3g}  ({reward.units})"
        )
        order = np.argsort(-scores, kind="stable")
        chosen = [*order[:SHOWN], None, *order[-SHOWN:]]
        title, *axes = row.subplots(
            1, len(chosen) + 1, width_ratios=[2.2, *[1.0 if c is not None else 0.2 for c in chosen]]
        )
        title.text(
            0, 0.5, f"{id.removeprefix('images/')}\n{wrap(reward.units)}", va="center", fontsize=8
        )
        title.set_axis_off()
        for axis, i in zip(axes, chosen, strict=True):
            axis.set_axis_off()
            if i is not None:
                axis.imshow(pictures[i], interpolation="nearest")
                name = prompts[i].removeprefix("a photo of a ")
                axis.set_title(f"{scores[i]:.3g}\n{name}", fontsize=6.5, pad=2)
    figure.savefig(TARGET, dpi=90)


def wrap(text: str, width: int = 30) -> str:
    """A text in short lines."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


if __name__ == "__main__":
    main()
