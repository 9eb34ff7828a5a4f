"""What a run shows: picture grids, a film, and the learning curve."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from flowgym_gym.agents.kinds import Options
from flowgym_gym.agents.runs.drawing import Figure, plain_style, plain_text
from flowgym_gym.agents.runs.episodes import Episodes
from flowgym_gym.agents.runs.metrics import Row

# Sizes of the film in pixels: a picture's height, space between pictures, and the line above them.
FILM_SIZE, GAP, HEADER = 256, 4, 18
# Width and height of a picture in a grid, in inches.
CELL = 1.3
# Of the prompt above a picture.
PROMPT_LINES, PROMPT_WIDTH = 2, 24
FRAME_MILLISECONDS, LAST_FRAME_MILLISECONDS = 150, 2000
# Column of metrics.csv, and what the axis says.
PANELS = (
    ("terminal_reward", "terminal reward"),
    ("return", "return"),
    ("control_cost", "control cost [nats]"),
)


@plain_style()
def picture_grid(path: Path, parts: Sequence[tuple[str, Episodes]], columns: int = 8) -> None:
    """Save pictures in rows, each with its reward above it, and its prompt where there are several.

    Args:
        path: PNG file to write.
        parts: From top to bottom: a title, to which the mean reward is added, and episodes with
            their pictures.
        columns: Pictures in a row.
    """
    columns = min(columns, max(len(episodes.pictures) for _, episodes in parts))
    rows = [math.ceil(len(episodes.pictures) / columns) for _, episodes in parts]
    several = len({prompt for _, episodes in parts for prompt in episodes.prompts}) > 1
    # In inches: above a part, above a picture, and the picture. Placed by hand, a grid takes three
    # fifths of the time that it takes with matplotlib's layout.
    title_height, above = 0.27, 0.2 + (PROMPT_LINES * 0.12 if several else 0.0)
    heights = [title_height + (above + CELL) * count for count in rows]
    figure = Figure(figsize=(CELL * columns, sum(heights)))
    subfigures = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)
    for subfigure, (title, episodes), count, height in zip(
        subfigures[:, 0], parts, rows, heights, strict=True
    ):
        rewards = episodes.terminal_rewards
        subfigure.suptitle(
            f"{title}, mean reward {rewards.mean():.4g}", fontsize=10, y=1 - 0.08 / height
        )
        grid = {
            "left": 0.0, "right": 1.0, "bottom": 0.0, "wspace": 0.04,
            "top": 1 - (title_height + above) / height, "hspace": above / CELL,
        }  # fmt: skip
        axes = subfigure.subplots(count, columns, squeeze=False, gridspec_kw=grid).flatten()
        for axis in axes:
            axis.set_axis_off()
        for i, (axis, picture) in enumerate(zip(axes, episodes.pictures, strict=False)):
            axis.imshow(picture, interpolation="nearest")
            prompt = _lines(episodes.prompts[i]) if several else ""
            axis.set_title(f"{prompt}{rewards[i]:.3g}", fontsize=7 if several else 8, pad=2)
    figure.savefig(path, dpi=120)


def film(path: Path, frames: Sequence[Sequence[np.ndarray]], titles: Sequence[str]) -> None:
    """Save an animation of pictures side by side.

    Args:
        path: GIF file to write.
        frames: At each moment the pictures, uint8 ``(H, W, 3)``, from left to right.
        titles: What is written above each.
    """
    height, width, _ = frames[0][0].shape
    scale = FILM_SIZE // height or FILM_SIZE / height
    size = (round(width * scale), round(height * scale))
    stills = []
    for moment, pictures in enumerate(frames):
        still = Image.new("RGB", (len(pictures) * (size[0] + GAP) - GAP, size[1] + HEADER), "white")
        draw = ImageDraw.Draw(still)
        for i, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
            left = i * (size[0] + GAP)
            draw.text((left + GAP, GAP), f"{title}, step {moment}", fill="black")
            still.paste(Image.fromarray(picture).resize(size, Image.Resampling.BOX), (left, HEADER))
        stills.append(still)
    durations = [FRAME_MILLISECONDS] * (len(stills) - 1) + [LAST_FRAME_MILLISECONDS]
    stills[0].save(path, save_all=True, append_images=stills[1:], duration=durations, loop=0)


@plain_style()
def learning_curve(
    path: Path,
    rows: Sequence[Row],
    title: str,
    base: Options | None,
    evaluations: Sequence[Row] = (),
    best: int | None = None,
) -> None:
    """Save reward, return and control cost over the timesteps.

    Args:
        path: PNG file to write.
        rows: Rows of ``metrics.csv``.
        title: Title of the figure.
        base: Means of the base model, drawn as a dashed line, and their number of ``episodes``.
        evaluations: Rows of ``evaluations.csv``, drawn with their intervals.
        best: Timesteps of the best agent, marked among them.
    """
    figure = Figure(figsize=(7, 7), layout="constrained")
    figure.suptitle(title)
    for axis, (column, label) in zip(
        figure.subplots(len(PANELS), 1, sharex=True), PANELS, strict=True
    ):
        points = [(row["timesteps"], row[column]) for row in rows if row.get(column) is not None]
        if points:
            timesteps, values = np.array(points, dtype=float).T
            window = max(1, len(values) // 20)
            axis.plot(timesteps, values, color="tab:red", alpha=0.35, linewidth=1)
            axis.plot(
                timesteps[window - 1 :],
                moving_average(values, window),
                color="tab:red",
                label="agent, exploring",
            )
        if evaluations:
            timesteps, means, lows, highs = np.array(
                [
                    [row[name] for name in ("timesteps", column, f"{column}_low", f"{column}_high")]
                    for row in evaluations
                ],
                dtype=float,
            ).T
            axis.errorbar(
                timesteps, means, (means - lows, highs - means), color="tab:blue", marker="o",
                markersize=3, capsize=2,
                label=f"agent, evaluated, mean of {evaluations[-1]['episodes']} and 95 % interval",
            )  # fmt: skip
            chosen = timesteps == best
            axis.plot(
                timesteps[chosen],
                means[chosen],
                "*",
                color="tab:blue",
                markersize=12,
                label="best agent",
            )
        if base is not None:
            label_base = f"base model, mean of {base['episodes']}"
            axis.axhline(base[column], color="black", linestyle="--", linewidth=1, label=label_base)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.margins(x=0.02)
    axis.set_xlabel("environment steps")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8
    )
    figure.savefig(path, dpi=120)


def _lines(prompt: str) -> str:
    """A prompt as the same number of short lines, whatever its length; what does not fit becomes
    dots.
    """
    lines = textwrap.wrap(prompt, PROMPT_WIDTH, max_lines=PROMPT_LINES, placeholder="...")
    return "\n" * (PROMPT_LINES - len(lines)) + "".join(f"{plain_text(line)}\n" for line in lines)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Means over ``window`` neighbouring values, shape ``(n - window + 1,)``.

    >>> moving_average(np.array([1.0, 2.0, 6.0]), 2)
    array([1.5, 4. ])
    """
    return np.convolve(values, np.full(window, 1 / window), mode="valid")
